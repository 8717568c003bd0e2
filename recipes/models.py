# SPDX-License-Identifier: Apache-2.0
"""The model that a recipe works with: from random weights, a folder, a GGUF file, a hub id or a run, by its name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import patchkern as pk
from patchkern.batch.control_tokens import MARKERS
from patchkern.data import Interactions
from patchkern.models.adapters import ADAPTER, add_lora
from patchkern.models.files import choose_catalog, is_model, read_description
from patchkern.models.folders import current
from patchkern.models.gguf_file import is_gguf
from patchkern.models.learned_rows import reserve_experts
from patchkern.models.scratch import SIZES, SMALLEST_VOCABULARY, fit_tokenizer, scratch_model, scratch_prompt
from patchkern.models.sources import locate, read_model, read_tokenizer
from patchkern.training import checkpoints, find_model
from recipes.item_models import catalog_of_ids
from recipes.training_run import ARGUMENTS

CONFIG = "config.json"
SYSTEM = "You are a helpful assistant in recommendations."
INSTRUCTION = "A user has chosen [HISTORY_SEQUENCE]. Recommend one title to choose next."


def with_flags(policy: Any, flags: Mapping[str, Any]) -> Any:
    """The policy with what flags ask of its fields of the same names; None: nothing.

    Raises:
        ValueError: naming the flag of a field that the policy has not.
    """
    asked = {name: value for name, value in flags.items() if value is not None}
    own = {field.name for field in fields(policy)}
    for name in asked:
        if name not in own:
            raise ValueError(f"--{name}: expected only with a policy that has it, got {policy}")
    return replace(policy, **asked)


def load_model(
    name: str,
    titles: Mapping[Any, str],
    *,
    texts: Mapping[Any, str] | None = None,
    dtype: torch.dtype = torch.float32,
    words: pk.PromptWords | None = None,
    prompt_file: str | None = None,
    item_embeddings: bool = False,
    item_head: bool = False,
    vector_dropout: float | None = None,
    lora: int | None = None,
    experts: int = 0,
    trainable: bool = False,
    random_weights: bool = False,
    seed: int = 0,
    vocab_size: int = 4096,
    item_tokens: bool = False,
    dropout: float = 0.0,
    separator: bool = True,
    argument: str = "--model",
    **hf_kwargs: Any,
) -> tuple[pk.PatchedCausalLM | pk.ItemModel | pk.RecurrentMemory, Any]:
    """A model over ``titles``, and its tokenizer; None of an `ItemModel`, which reads none.

    Args:
        name: a size of `patchkern.models.scratch`; a run of recipes/train.py, one of its checkpoints, or another folder
            that patchkern saved, which brings its prompt and policy; else a transformers model: its folder, a GGUF
            file, or a hub id.
        titles: ``{item id: title}``.
        texts: what the model reads in place of the titles, in the same form; None: the titles.
        dtype: of the weights.
        words: of the prompt of a transformers model whose tokenizer has a chat template; without any, general ones.
        prompt_file: of words (`patchkern.PromptWords.read`) to use instead; an error where the model has no use for it.
        item_embeddings, item_head: have them, also where a saved model has none.
        vector_dropout: of item embeddings in training; None: as a saved model has it, else 0.
        lora: train a LoRA adapter of this rank on a transformers model instead of its weights, with its marker rows.
        experts: learned rows of `patchkern.Experts` for a transformers model; others get theirs from
            `patchkern.add_experts`.
        trainable: go on training the adapter of a saved model, which else is as fixed as the weights under it.
        random_weights: keep a transformers model's architecture, tokenizer and prompt, and draw its weights.
        seed: of whatever is drawn.
        vocab_size, dropout, separator: of a model from scratch.
        item_tokens: in a model from scratch, a token for each item in place of its title. Items that a saved one of
            these does not know share one more, which was never trained.
        argument: that errors name.
        hf_kwargs: for the transformers model's ``from_pretrained``, such as ``quantization_config``.

    Raises:
        FileNotFoundError: nothing of that name here or on a hub, or a folder without a model.
        ValueError: ``prompt_file`` is no such file, or the model has its prompt or no chat template; ``lora`` for a
            model whose base could not be found again.
    """
    wrapping: dict[str, Any] = {"item_embeddings": item_embeddings, "item_head": item_head}
    if lora is not None and (name in SIZES or is_saved(name) or random_weights):
        raise ValueError("lora: expected None but for the weights of a transformers model, which an adapter names")
    if prompt_file is not None and (name in SIZES or is_saved(name)):
        raise ValueError(f"--prompt: expected none with {argument} {name}, which has its prompt")
    if is_saved(name):
        folder = find_model(name, argument)
        kind, reads_titles = _kind_of(folder)
        if not reads_titles:
            return kind.from_pretrained(folder, catalog_of_ids(titles), dtype=dtype, **hf_kwargs), None
        tokenizer = read_tokenizer(folder)
        catalog = _catalog_for(folder, titles, texts, tokenizer)
        if trainable and (current(folder) / ADAPTER).is_file():
            hf_kwargs["is_trainable"] = True
        model = kind.from_pretrained(
            folder, catalog, dtype=dtype, vector_dropout=vector_dropout, **wrapping, **hf_kwargs
        )
        return model, tokenizer
    if name in SIZES and item_tokens:
        if texts is not None:
            raise ValueError("texts: expected none with item_tokens, by which an item is read, got some")
        tokenizer = fit_tokenizer((), SMALLEST_VOCABULARY)
        first, size = len(tokenizer), len(titles)
        hf_model: Any = scratch_model(tokenizer, name, seed=seed, dropout=dropout, vocab_size=first + size + 1)
        prompt = scratch_prompt(tokenizer, separator)
        catalog = pk.Catalog.from_token_ids(np.arange(first, first + size), np.arange(size + 1), list(titles))
    elif name in SIZES:
        tokenizer = fit_tokenizer([*titles.values(), *(texts or {}).values()], vocab_size)
        hf_model = scratch_model(tokenizer, name, seed=seed, dropout=dropout)
        prompt = scratch_prompt(tokenizer, separator)
        catalog = pk.Catalog.from_titles(titles, tokenizer, texts)
    else:
        path = locate(name, argument)
        if path.is_dir() and not any((path / file).is_file() for file in (CONFIG, ADAPTER)):
            raise FileNotFoundError(f"{argument}: expected the folder of a model, got {name!r}, without a {CONFIG}")
        tokenizer = read_tokenizer(path)
        prompt = make_prompt(tokenizer, words, prompt_file)
        hf_model = read_model(path, dtype=dtype, **hf_kwargs)
        if random_weights:
            hf_model = _in_dtype(_drawn_anew(hf_model, seed), dtype)
        if len(tokenizer) > hf_model.get_input_embeddings().num_embeddings:
            if lora is not None and is_gguf(path):
                raise ValueError(
                    f"lora: expected a vocabulary with markers, of which {path.name} has none and could not be saved "
                    "with some; write it as a folder first, name unused special tokens, or put the history last"
                )
            _make_room(hf_model, tokenizer, seed)
        if experts:
            rows = hf_model.get_input_embeddings().num_embeddings
            prompt = reserve_experts(hf_model, prompt, tokenizer, experts, seed=seed)
            if lora is not None and is_gguf(path) and hf_model.get_input_embeddings().num_embeddings > rows:
                raise ValueError(f"lora: expected a vocabulary with {experts} tokens to spare for experts, got fewer")
        if lora is not None:
            hf_model = add_lora(hf_model, lora, prompt, tokenizer, seed=seed)
        catalog = pk.Catalog.from_titles(titles, tokenizer, texts)
    if name in SIZES:
        _in_dtype(hf_model, dtype)
    return pk.PatchedCausalLM(hf_model, catalog, prompt, **wrapping, vector_dropout=vector_dropout or 0.0), tokenizer


def load_saved(folder: Path, dtype: torch.dtype) -> pk.PatchedCausalLM | pk.ItemModel | pk.RecurrentMemory:
    """A model that patchkern saved, with the catalogue that it was saved with."""
    kind, _ = _kind_of(folder)
    model: pk.PatchedCausalLM | pk.ItemModel | pk.RecurrentMemory = kind.from_pretrained(folder, dtype=dtype)
    return model


def _kind_of(folder: Path) -> tuple[Any, bool]:
    """What is saved there, and whether it reads titles."""
    description = read_description(current(folder))
    reads_titles = "titles" in description.learns
    if description.memory is not None:
        return pk.RecurrentMemory, reads_titles
    return (pk.PatchedCausalLM if reads_titles else pk.ItemModel), reads_titles


def is_saved(name: str) -> bool:
    """Whether it is a folder that patchkern saved, or a run: these have prompt and policy.

    Also a run that saved nothing, for which `find_model` has a better answer than that it is no transformers model.
    """
    folder = Path(name)
    return folder.is_dir() and (is_model(name) or bool(checkpoints(name)) or (folder / ARGUMENTS).is_file())


def _catalog_for(
    folder: Path, titles: Mapping[Any, str], texts: Mapping[Any, str] | None, tokenizer: Any
) -> pk.Catalog:
    """``titles`` as the model of a folder has them: by their own tokens, or by one token for each item.

    Items that are new to the latter share the token after those of its items.
    """
    description = read_description(current(folder))
    saved = None if description.catalog is None else choose_catalog(current(folder), None)[0]
    if saved is None or saved.titles is not None or description.vocabulary_size is None or (saved.lengths != 1).any():
        return pk.Catalog.from_titles(titles, tokenizer, texts)
    if texts is not None:
        raise ValueError(f"texts: expected none, as the model in {str(folder)!r} reads a token for each item, got some")
    places = saved.find(list(titles))
    tokens = np.where(places >= 0, saved.token_ids[places], saved.max_token_id + 1)
    return pk.Catalog.from_token_ids(tokens, np.arange(len(titles) + 1), list(titles))


def words_of(data: Interactions) -> pk.PromptWords:
    """What a data set says of itself, and where it says nothing, general words."""
    return pk.PromptWords(data.instruction or INSTRUCTION, data.system or SYSTEM)


def make_prompt(tokenizer: Any, words: pk.PromptWords | None = None, prompt_file: str | None = None) -> pk.Prompt:
    """The file's words, else ``words``, in the tokenizer's chat template; without a template, markers alone."""
    if tokenizer.chat_template:
        if prompt_file is not None:
            words = pk.PromptWords.read(prompt_file)
        return (words or pk.PromptWords(INSTRUCTION, SYSTEM)).prompt(tokenizer)
    if prompt_file is not None:
        raise ValueError("--prompt: expected none, as the model's tokenizer has no chat template to put words into")
    missing = [marker for marker in MARKERS if marker not in tokenizer.get_vocab()]
    if missing:
        tokenizer.add_special_tokens({"additional_special_tokens": missing}, replace_extra_special_tokens=False)
    return scratch_prompt(tokenizer)


def _drawn_anew(hf_model: Any, seed: int) -> Any:
    """The same architecture with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return type(hf_model)(hf_model.config)


def _in_dtype(hf_model: Any, dtype: torch.dtype) -> Any:
    """The model with its parameters in ``dtype``: what else it has, such as the rates of rotary positions, is exact.

    So it has that when it is read from a folder.
    """
    for parameter in hf_model.parameters():
        parameter.data = parameter.data.to(dtype)
    return hf_model


def _make_room(hf_model: Any, tokenizer: Any, seed: int) -> None:
    """A row of the embedding for every token of the tokenizer; new ones are drawn."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        hf_model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64)
