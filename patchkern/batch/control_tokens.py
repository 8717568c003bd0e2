# SPDX-License-Identifier: Apache-2.0
"""Titles and prompts are text: what a tokenizer's control tokens are, and that no text becomes one.

A control token ends a turn, opens a message, separates items: the model obeys it. Whoever writes a title must not be
able to write one, so a title that spells ``<|eot_id|>`` gets the ordinary tokens of these letters, or is refused.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

MARKERS = ("<|history_start|>", "<|history_separator|>", "<|history_end|>")
_ROLES = ("bos", "eos", "sep", "cls", "mask", "pad")
_UNKNOWN = ("<unk>", "[UNK]")
_USUAL = ("<s>", "</s>", "<pad>", "<mask>", "[CLS]", "[SEP]", "[PAD]", "[MASK]", "<|endoftext|>")


def control_tokens(tokenizer: Any) -> dict[int, str]:
    """Ids and texts of the tokens that no text may become.

    They are all special tokens, the history's markers, and the added tokens that a chat template writes although they
    are not declared special. The unknown token is none of them unless it has another role too: it is what becomes of
    letters that a vocabulary lacks.

    Args:
        tokenizer: of transformers or tokenizers, or a method of one. Of any other callable nothing is known.
    """
    while not is_tokenizer(tokenizer):
        inner = getattr(tokenizer, "func", None) if isinstance(tokenizer, functools.partial) else None
        inner = getattr(tokenizer, "__self__", None) if inner is None else inner
        if inner is None:
            break
        tokenizer = inner
    texts = {int(token_id): str(token) for token_id, token in _special_tokens(tokenizer).items()}
    if hasattr(tokenizer, "get_vocab"):
        vocabulary = tokenizer.get_vocab()
        texts |= {vocabulary[marker]: marker for marker in MARKERS if marker in vocabulary}
    roles = {getattr(tokenizer, f"{role}_token_id", None) for role in _ROLES[:-1]}
    unknown = getattr(tokenizer, "unk_token_id", None)
    if unknown is not None and unknown not in roles:
        texts.pop(unknown, None)
    return texts


def configured_tokens(hf_model: Any) -> dict[int, str]:
    """Ids that a transformers model's configurations name as special, and the names."""
    texts: dict[int, str] = {}
    for config in (hf_model.config.get_text_config(), getattr(hf_model, "generation_config", None)):
        for name in (f"{role}_token_id" for role in _ROLES):
            value = getattr(config, name, None)
            texts |= {i: name for i in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(i, int)}
    return texts


def encode_titles(texts: Sequence[str], tokenizer: Any, control: Mapping[int, str]) -> list[Any]:
    """Each text's token ids, without special tokens.

    Texts that spell tokens of ``control`` are encoded once more with ``split_special_tokens``, and a warning, where the
    tokenizer knows that; whether it helped is for `first_control_token` to see.
    """
    if not texts:
        return []
    if not is_tokenizer(tokenizer):
        return [tokenizer(text) for text in texts]
    encoded = _encode(texts, tokenizer, split=False)
    spelled = [index for index, ids in enumerate(encoded) if not control.keys().isdisjoint(ids)]
    if spelled:
        try:
            split = _encode([texts[index] for index in spelled], tokenizer, split=True)
        except (TypeError, ValueError):  # a tokenizer without this option: the titles will be refused
            return encoded
        for index, ids in zip(spelled, split, strict=True):
            encoded[index] = ids
        helped = [texts[index] for index in spelled if control.keys().isdisjoint(encoded[index])]
        if helped:
            warnings.warn(
                f"titles: {len(helped)} of {len(texts)} spell control tokens, which were encoded as ordinary text: "
                f"{', '.join(map(repr, helped[:3]))}",
                stacklevel=3,
            )
    return encoded


def first_control_token(token_ids: NDArray[Any], control: Mapping[int, str]) -> int | None:
    """Where in ``token_ids`` (nnz,) the first control token stands, None if nowhere."""
    if not control or token_ids.size == 0 or token_ids.dtype.kind not in "iu":
        return None
    held = np.isin(token_ids, np.fromiter(control, np.int64, len(control)))
    at = int(held.argmax())
    return at if held[at] else None


def is_tokenizer(tokenizer: Any) -> bool:
    """Whether it is a tokenizer of transformers or tokenizers, not just a callable."""
    return _is_raw(tokenizer) or (hasattr(tokenizer, "get_vocab") and hasattr(tokenizer, "convert_tokens_to_ids"))


def _is_raw(tokenizer: Any) -> bool:
    """Whether it is a `tokenizers.Tokenizer`."""
    return hasattr(tokenizer, "encode_batch") and hasattr(tokenizer, "get_added_tokens_decoder")


def _encode(texts: Sequence[str], tokenizer: Any, split: bool) -> list[Any]:
    if _is_raw(tokenizer):
        plain = type(tokenizer).from_str(tokenizer.to_str())  # a copy: its settings are the caller's
        plain.no_padding()
        plain.no_truncation()
        plain.encode_special_tokens = split
        return [encoding.ids for encoding in plain.encode_batch(list(texts), add_special_tokens=False)]
    if not split:
        return list(tokenizer(list(texts), add_special_tokens=False)["input_ids"])
    encoded = list(tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)["input_ids"])
    tokenizer("", add_special_tokens=False)  # a fast tokenizer's backend would keep the option
    return encoded


def _special_tokens(tokenizer: Any) -> dict[int, str]:
    if _is_raw(tokenizer):
        unknown = (*_UNKNOWN, getattr(tokenizer.model, "unk_token", None))
        added = tokenizer.get_added_tokens_decoder()
        texts = {i: token.content for i, token in added.items() if token.special and token.content not in unknown}
        # it may hold the usual ones without knowing what they are
        usual = ((tokenizer.token_to_id(token), token) for token in _USUAL)
        return texts | {i: token for i, token in usual if i is not None}
    template = getattr(tokenizer, "chat_template", None) or ""
    template = "\n".join(template.values()) if isinstance(template, Mapping) else str(template)
    texts = {}
    for token_id, token in (getattr(tokenizer, "added_tokens_decoder", None) or {}).items():
        # words, white space and punctuation that were added stand in many templates and control nothing
        content = token.content.strip()
        if token.special or (len(content) >= 3 and not content.isalnum() and token.content in template):
            texts[token_id] = token.content
    named = zip(
        getattr(tokenizer, "all_special_ids", None) or (),
        getattr(tokenizer, "all_special_tokens", None) or (),
        strict=False,
    )
    return {**texts, **dict(named)}
