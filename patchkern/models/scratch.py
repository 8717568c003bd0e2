# SPDX-License-Identifier: Apache-2.0
"""Small models from scratch: a tokenizer fitted on the titles, a prompt of markers only, a little Llama or Phi-3.

All of it is ordinary transformers: saved with ``save_pretrained``, a model of this module is a folder like any other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from patchkern.batch.catalog import Catalog
from patchkern.batch.control_tokens import MARKERS
from patchkern.batch.prompt import Prompt

BOS, EOS, PAD = "<|begin|>", "<|end|>", "<|pad|>"
SPECIAL_TOKENS = (BOS, EOS, PAD, *MARKERS)
SMALLEST_VOCABULARY = len(SPECIAL_TOKENS) + 256
"""of a tokenizer: the special tokens and all bytes"""

# Sizes that two CPU cores train in minutes (tiny) or hours (small).
SIZES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 4},
    "small": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 8},
}
LLAMA_1B: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128_256,
}
"""the shape of Llama-3.2-1B, for what random weights can tell of its time and memory"""

# Rotary positions cost nothing: long enough for a history of 10,000 items with titles of several tokens.
_MAX_POSITIONS = 131_072


def from_scratch(
    titles: Mapping[Any, str],
    size: str = "tiny",
    *,
    texts: Mapping[Any, str] | None = None,
    vocab_size: int = 2048,
    separator: bool = True,
    **model: Any,
) -> tuple[PreTrainedModel, Catalog, Prompt]:
    """What a `PatchedCausalLM` is made of, from nothing but titles: `fit_tokenizer`, `scratch_model`, `scratch_prompt`.

    Args:
        titles: ``{item_id: title}``, as of `patchkern.Catalog.from_titles`.
        size: as of `scratch_model`.
        texts: what the model reads in place of the titles, as of `patchkern.Catalog.from_titles`; None: the titles.
        vocab_size: as of `fit_tokenizer`.
        separator: as of `scratch_prompt`.
        model: further arguments of `scratch_model`, such as ``seed``, ``dropout`` and ``hidden_size``.

    Returns:
        The model with random weights, the catalogue and the prompt. The tokenizer is not among them: a saved
        `PatchedCausalLM` needs none, its catalogue holds the titles and their tokens.

    Raises:
        TypeError, ValueError: as of the functions above.

    Examples:
        >>> import patchkern as pk
        >>> from patchkern.models.scratch import from_scratch
        >>> parts = from_scratch({7: "Alien", 8: "Aliens"}, hidden_size=16, intermediate_size=32)
        >>> model = pk.PatchedCausalLM(*parts, pk.ItemPatches(keep_text=1))
        >>> model.catalog
        Catalog(2 items, 2 tokens, with titles)
    """
    if not isinstance(titles, Mapping):
        raise TypeError(f"titles: expected a mapping of item id to title, got {type(titles).__name__}")
    tokenizer = fit_tokenizer([*titles.values(), *(texts or {}).values()], vocab_size)
    catalog = Catalog.from_titles(titles, tokenizer, texts)
    return scratch_model(tokenizer, size, **model), catalog, scratch_prompt(tokenizer, separator)


def fit_tokenizer(titles: Iterable[str], vocab_size: int = 2048) -> PreTrainedTokenizerFast:
    """Fit a byte-level BPE tokenizer on the titles.

    The same titles give the same tokenizer, and every string has tokens, whether its letters occurred or not.

    Args:
        titles: the texts to fit on.
        vocab_size: upper bound of the vocabulary, special tokens and the 256 bytes included.

    Raises:
        ValueError: ``vocab_size`` has no room for the bytes and the special tokens.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise ValueError(
            f"vocab_size: expected at least {SMALLEST_VOCABULARY} (bytes and special tokens), got {vocab_size}"
        )
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(titles, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=list(MARKERS),
        clean_up_tokenization_spaces=False,
    )


def scratch_prompt(tokenizer: Any, separator: bool = True) -> Prompt:
    """A prompt of special tokens only: begin, history start | separator | history end | ... | end of sequence.

    Works for any tokenizer that knows the three history markers; a beginning-of-sequence token is used if there is one.

    Args:
        tokenizer: knows the tokens.
        separator: put one between items; a history of patches alone can do without.

    Raises:
        ValueError: a marker or the end-of-sequence token is missing.
    """
    vocabulary = tokenizer.get_vocab()
    missing = [marker for marker in MARKERS if marker not in vocabulary]
    if missing or tokenizer.eos_token_id is None:
        lacking = ", ".join([*missing, *([] if tokenizer.eos_token_id is not None else ["an end-of-sequence token"])])
        raise ValueError(f"tokenizer: expected one with history markers, got one without {lacking}")
    start, between, end = (vocabulary[marker] for marker in MARKERS)
    begin = () if tokenizer.bos_token_id is None else (tokenizer.bos_token_id,)
    return Prompt(
        prefix=(*begin, start),
        separator=(between,) if separator else (),
        suffix=(end,),
        response_end=(tokenizer.eos_token_id,),
    )


def scratch_model(
    tokenizer: Any, size: str = "tiny", seed: int = 0, dropout: float = 0.0, **config: Any
) -> PreTrainedModel:
    """A randomly initialised small model with tied embeddings for ``tokenizer``.

    It is a Llama; with ``dropout`` a Phi-3, which is a Llama that drops out what attention and MLP add to the residual
    stream.

    Args:
        tokenizer: decides the vocabulary.
        size: "tiny" (hidden 128, 2 layers) or "small" (hidden 256, 4 layers).
        seed: of the weights; torch's global generator is left as it was.
        dropout: probability of dropping a number that a layer's attention or MLP gives, in training.
        config: fields of `LlamaConfig` or `Phi3Config` to override, such as ``hidden_size=64``. Dropping attention
            weights as well, ``attention_dropout=0.1``, is slow on a GPU, whose kernels over prefixes lack it.

    Raises:
        ValueError: an unknown size, or a ``dropout`` that is no probability below 1.
    """
    if size not in SIZES:
        raise ValueError(f"size: expected one of {', '.join(SIZES)}, got {size!r}")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout: expected a probability below 1, got {dropout}")
    settings: dict[str, Any] = {
        **SIZES[size],
        "vocab_size": len(tokenizer),
        "tie_word_embeddings": True,
        "max_position_embeddings": _MAX_POSITIONS,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **config,
    }
    settings.setdefault("num_key_value_heads", settings["num_attention_heads"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if dropout:
            return Phi3ForCausalLM(Phi3Config(**settings, resid_pdrop=dropout))
        return LlamaForCausalLM(LlamaConfig(**settings))
