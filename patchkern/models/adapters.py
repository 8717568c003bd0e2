# SPDX-License-Identifier: Apache-2.0
"""A peft adapter on its base: made for training, and read again, over an embedding that may have been resized."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import safetensors
import torch
from transformers import PreTrainedModel

from patchkern.batch.arguments import check_count
from patchkern.batch.control_tokens import control_tokens
from patchkern.batch.prompt import Prompt
from patchkern.models.sources import locate, read_model

ADAPTER = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


def add_lora(
    hf_model: PreTrainedModel, rank: int, prompt: Prompt, tokenizer: Any, *, seed: int = 0, **config: Any
) -> Any:
    """A LoRA adapter on all linear layers, for training, and the embeddings of markers and experts beside it.

    A model knows nothing of tokens that were added or reserved; everything else it has learned.

    Args:
        hf_model: a model whose embedding has the prompt's tokens.
        rank: of the adapter; its ``lora_alpha`` is twice that.
        prompt: that the model will read.
        tokenizer: of the prompt.
        seed: of the adapter's weights; torch's global generator is left as it was.
        config: fields of ``peft.LoraConfig`` to override.

    Raises:
        ImportError: peft is missing.
        ValueError: a rank below 1.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError("a LoRA adapter needs peft: pip install 'patchkern[peft]'") from error
    check_count("rank", rank, minimum=1)
    fields: dict[str, Any] = {
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": "all-linear",
        "task_type": "CAUSAL_LM",
        "trainable_token_indices": untrained_markers(prompt, tokenizer) or None,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_peft_model(hf_model, LoraConfig(**fields | config))


def untrained_markers(prompt: Prompt, tokenizer: Any) -> list[int]:
    """The tokens that frame a prompt's history and are special, but no part of what a chat template writes; experts."""
    markers = {*prompt.prefix[-1:], *prompt.separator, *prompt.suffix[:1]}
    known = {*prompt.control, *prompt.response_end[:1], getattr(tokenizer, "bos_token_id", None)}
    return sorted((markers & control_tokens(tokenizer).keys() - known).union(prompt.experts))


def read_adapter(
    folder: str | os.PathLike[str],
    base_model: PreTrainedModel | None,
    vocabulary_size: int | None,
    hf_kwargs: dict[str, Any],
) -> Any:
    """The adapter of a folder on ``base_model``, or on the one named in its configuration.

    Args:
        vocabulary_size: rows of the embedding under the adapter; a base with another number of them is resized where
            the adapter's file has them all. None takes the base as it is.
        hf_kwargs: for the base's ``from_pretrained``, and the adapter's.

    Raises:
        ValueError: the base has other rows, and the adapter does not bring them.
    """
    try:
        from peft import PeftConfig, PeftModelForCausalLM
    except ImportError as error:
        raise ImportError(f"{os.fspath(folder)!r} holds a peft adapter; install peft to read it") from error
    named = base_model is None
    if base_model is None:
        config = PeftConfig.from_pretrained(os.fspath(folder))
        if not config.base_model_name_or_path:
            raise ValueError(
                f"base_model: expected a model, because {os.fspath(folder)!r} names none under its adapter"
            )
        for_base = dict(hf_kwargs)
        for name in ("is_trainable", "adapter_name"):
            for_base.pop(name, None)
        revision = {} if config.revision is None else {"revision": config.revision}
        base_model = read_model(locate(config.base_model_name_or_path, "base_model", **revision), **for_base)
    rows = base_model.config.get_text_config().vocab_size
    if vocabulary_size is not None and rows != vocabulary_size:
        missing = _not_in_adapter(Path(folder) / ADAPTER_WEIGHTS, base_model, vocabulary_size)
        if missing:
            base = repr(base_model.name_or_path) if named else "the model that was given"
            raise ValueError(
                f"base_model: expected the model that the adapter was trained on, with {vocabulary_size} rows in its "
                f"embedding, got {base} with {rows}; the adapter has no {' and no '.join(missing)} to take them from"
            )
        base_model.resize_token_embeddings(vocabulary_size, mean_resizing=False)
    return PeftModelForCausalLM.from_pretrained(base_model, folder, **hf_kwargs)


def _not_in_adapter(path: Path, base_model: PreTrainedModel, rows: int) -> list[str]:
    """The embeddings, input and output, whose rows are not all in the adapter's file."""
    found = [base_model.get_input_embeddings(), base_model.get_output_embeddings()]
    layers = [
        layer for layer in found if layer is not None and (layer is found[0] or layer.weight is not found[0].weight)
    ]
    names = [name for name, module in base_model.named_modules() if any(module is layer for layer in layers)]
    with safetensors.safe_open(path, "pt") as file:
        sizes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    ends = ("weight", "base_layer.weight", "token_adapter.base_layer.weight")
    whole = {key for key, size in sizes.items() if size[0] == rows}
    return [name for name in names if not any(f"base_model.model.{name}.{end}" in whole for end in ends)]
