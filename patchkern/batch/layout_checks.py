# SPDX-License-Identifier: Apache-2.0
"""What a layout must be before a kernel may rely on it.

`PatchLayout` asks for all of it when a layout is made by hand and when one comes out of a pickle. Its tensors can still
be resized, or exchanged, after that: what takes no time to see is looked at again before they are read by address.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from patchkern.batch.span_ranges import check_ranges

_VECTORS = {
    "lo": torch.int32,
    "hi": torch.int32,
    "items": torch.int32,
    "token_ids": torch.int32,
    "offsets": torch.int32,
    "title_index": torch.int32,
    "cu_seqlens": torch.int32,
    "position_ids": torch.int64,
    "labels": torch.int64,
    "logit_rows": torch.int64,
    "logit_labels": torch.int64,
    "item_rows": torch.int64,
    "item_labels": torch.int64,
    "cu_users": torch.int32,
    "vector_rows": torch.int64,
}
_SUPERVISED = ("labels", "logit_rows", "logit_labels")
_OPTIONAL = {*_SUPERVISED, "item_rows", "item_labels", "cu_users", "vector_rows"}
_COUNTS = ("max_seqlen", "history_tokens", "history_rows", "max_token_id", "max_prefix", "max_position")


def check_vector(name: str, value: Any, dtype: torch.dtype, device: torch.device | None) -> None:
    """Raise unless ``value`` is a contiguous 1-D tensor of ``dtype`` that lies on ``device``, with memory behind it."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.dtype != dtype:
        raise TypeError(f"{name}: expected dtype {dtype}, got {value.dtype}")
    if value.layout != torch.strided or value.device.type == "meta":
        raise ValueError(f"{name}: expected a dense tensor with values, got {value.layout} on {value.device}")
    if value.dim() != 1:
        raise ValueError(f"{name}: expected a 1-D tensor, got shape {tuple(value.shape)}")
    if not value.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, got stride {value.stride()}")
    if device is not None and value.device != device:
        raise ValueError(f"{name}: expected device {device}, got {value.device}")
    check_memory(name, value, value.numel())


def check_memory(name: str, tensor: Tensor, elements: int) -> None:
    """Raise a ValueError unless there is memory behind so many elements, and it is aligned to them."""
    size = tensor.element_size()
    needed, there = size * (tensor.storage_offset() + elements), tensor.untyped_storage().nbytes()
    if elements and needed > there:
        raise ValueError(f"{name}: expected {needed} bytes behind the tensor, got {there}: its storage was resized")
    if elements and tensor.data_ptr() % size:
        raise ValueError(
            f"{name}: expected memory aligned to {size} bytes, got address {tensor.data_ptr():#x}; clone it"
        )


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where its memory is not aligned to its elements, as that of a NumPy view may be."""
    if tensor.layout != torch.strided or tensor.is_meta or not tensor.is_contiguous():
        return tensor
    size = tensor.element_size()
    has_memory = size * (tensor.storage_offset() + tensor.numel()) <= tensor.untyped_storage().nbytes()
    return tensor.clone() if has_memory and tensor.data_ptr() % size else tensor


def check_readable(layout: Any) -> None:
    """In no time: that every tensor pooling reads still has its dtype, device, length and memory."""
    device = layout.lo.device if isinstance(layout.lo, Tensor) else None
    for name in ("lo", "hi", "items", "token_ids", "offsets", "title_index"):
        check_vector(name, getattr(layout, name), torch.int32, device)
    _check_shape("hi", layout.hi, layout.lo.shape[0], "one per row, as lo")
    _check_shape("offsets", layout.offsets, layout.title_index.shape[0] + 1, "one more than title_index")
    if layout.transpose is not None:
        _check_transpose_shape(layout.transpose, device)


def _check_shape(name: str, tensor: Tensor, expected: int, like: str) -> None:
    if tensor.shape[0] != expected:
        raise ValueError(f"{name}: expected {expected} entries ({like}), got {tensor.shape[0]}")


def _check_range(name: str, tensor: Tensor, low: int, high: int) -> None:
    """Every entry in ``low..high``."""
    if tensor.numel() == 0:
        return
    wrong = torch.nonzero((tensor < low) | (tensor > high))
    if wrong.numel():
        at = int(wrong[0])
        raise ValueError(f"{name}[{at}]: expected a value in {low}..{high}, got {int(tensor[at])}")


def _check_cuts(name: str, offsets: Tensor, total: int) -> None:
    if offsets.numel() == 0 or int(offsets[0]) != 0 or int(offsets[-1]) != total:
        raise ValueError(
            f"{name}: expected offsets from 0 to {total}, got {offsets.tolist()[:1] + offsets.tolist()[-1:]}"
        )
    falls = torch.nonzero(offsets[1:] < offsets[:-1])
    if falls.numel():
        raise ValueError(f"{name}[{int(falls[0]) + 1}]: expected non-decreasing offsets, got a smaller one")


def _check_transpose_shape(transpose: Any, device: torch.device | None) -> None:
    for field in fields(transpose):
        check_vector(f"transpose.{field.name}", getattr(transpose, field.name), torch.int32, device)
    _check_shape("transpose.offsets", transpose.offsets, transpose.tokens.shape[0] + 1, "one more than tokens")
    _check_shape("transpose.divisors", transpose.divisors, transpose.rows.shape[0], "one per contribution")


def check_layout(layout: Any, exact: bool = True) -> None:
    """All that the kernels rely on.

    Args:
        layout: any.
        exact: whether the largest token and position and the longest span and prefix must be just those; else they are
            bounds, as they are in a part of a layout.
    """
    for name, dtype in _VECTORS.items():
        value = getattr(layout, name)
        if not (value is None and name in _OPTIONAL):
            check_vector(name, value, dtype, None if name == "lo" else layout.lo.device)
    for name in _COUNTS:
        value = getattr(layout, name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
    rows, entries, titles = layout.lo.shape[0], layout.items.shape[0], layout.title_index.shape[0]
    for name in ("hi", "position_ids"):
        _check_shape(name, getattr(layout, name), rows, "one per row, as lo")
    _check_cuts("cu_seqlens", layout.cu_seqlens, rows)
    if layout.cu_users is not None:
        _check_cuts("cu_users", layout.cu_users, rows)
        if not bool(torch.isin(layout.cu_users, layout.cu_seqlens).all()):
            raise ValueError(
                "cu_users: expected users who are whole spans of cu_seqlens, got one who ends inside a span"
            )
    _check_shape("offsets", layout.offsets, titles + 1, "one more than title_index")
    _check_cuts("offsets", layout.offsets, layout.token_ids.shape[0])
    lengths = torch.diff(layout.offsets)
    if titles and int(lengths.min()) == 0:
        raise ValueError(f"offsets: expected at least one token per title, got none for title {int(lengths.argmin())}")
    _check_range("title_index", layout.title_index, 0, torch.iinfo(torch.int32).max)
    fingerprint: Any = layout.catalog_fingerprint
    if not (fingerprint is None or isinstance(fingerprint, str)):
        raise TypeError(f"catalog_fingerprint: expected a string or None, got {type(fingerprint).__name__}")
    _check_range("items", layout.items, 0, titles - 1)
    largest = torch.iinfo(torch.int32).max - 1
    _check_range("token_ids", layout.token_ids, 0, largest)
    literal = layout.lo < 0
    _check_range("lo", layout.lo, -1 - largest, max(entries - 1, -1))
    _check_range("hi", layout.hi, 0, entries)
    empty = torch.nonzero(~literal & (layout.hi <= layout.lo))
    if empty.numel():
        raise ValueError(f"hi[{int(empty[0])}]: expected more than lo for a patch, got {int(layout.hi[empty[0]])}")
    beyond = torch.nonzero(literal & (layout.hi != 0))
    if beyond.numel():
        raise ValueError(f"hi[{int(beyond[0])}]: expected 0 for a literal, got {int(layout.hi[beyond[0]])}")
    seen = [-1 - layout.lo[literal], layout.token_ids]
    largest_token = max((int(tokens.max()) for tokens in seen if tokens.numel()), default=-1)
    if layout.max_token_id < largest_token or (exact and layout.max_token_id != largest_token):
        raise ValueError(f"max_token_id: expected the largest token id, {largest_token}, got {layout.max_token_id}")
    longest = int(torch.diff(layout.cu_seqlens).max()) if layout.num_users else 0
    if layout.max_seqlen < longest or (exact and layout.max_seqlen != longest):
        raise ValueError(f"max_seqlen: expected the longest user's rows, {longest}, got {layout.max_seqlen}")
    last = int(layout.position_ids.max()) if rows else -1
    if layout.max_position < last or (exact and layout.max_position != last):
        raise ValueError(f"max_position: expected the largest position, {last}, got {layout.max_position}")
    _check_supervision(layout, rows)
    if layout.vector_rows is not None:
        _check_ascending("vector_rows", layout.vector_rows, rows)
    _check_prefix(layout, exact)
    if layout.transpose is not None:
        _check_transpose(layout.transpose, rows, layout.max_token_id, layout.lo.device)
    if layout.identities is not None:
        _check_identities(layout.identities, rows, layout.lo.device)


def _check_prefix(layout: Any, exact: bool) -> None:
    prefix, longest = layout.prefix, 0
    if prefix is not None:
        if not isinstance(prefix, Tensor):
            raise TypeError(f"prefix: expected a tensor, got {type(prefix).__name__}")
        spans = layout.num_users
        if not (
            prefix.shape == (spans, 2) or (prefix.dim() == 3 and prefix.shape == (spans, max(prefix.shape[1], 1), 2))
        ):
            raise ValueError(
                f"prefix: expected shape {(spans, 2)}, one range per span of cu_seqlens, or ({spans}, R, 2), got "
                f"{tuple(prefix.shape)}"
            )
        if not prefix.is_contiguous():
            raise ValueError(f"prefix: expected a contiguous tensor, got stride {prefix.stride()}")
        check_vector("prefix", prefix.flatten(), torch.int32, layout.lo.device)
        check_ranges(layout.cu_seqlens, layout.ranges, layout.lo.shape[0], layout.lo.shape[0], apart=False)
        start, end = layout.ranges.unbind(2)
        longest = int((end - start).sum(dim=1).max()) if spans else 0
    if layout.max_prefix < longest or (exact and layout.max_prefix != longest):
        raise ValueError(f"max_prefix: expected the longest prefix's rows, {longest}, got {layout.max_prefix}")


def _check_supervision(layout: Any, rows: int) -> None:
    if layout.item_labels is not None:
        expected = 0 if layout.item_rows is None else layout.item_rows.shape[0]
        _check_shape("item_labels", layout.item_labels, expected, "one per item row")
        _check_range("item_labels", layout.item_labels, 0, torch.iinfo(torch.int32).max)
    if layout.item_rows is not None:
        _check_range("item_rows", layout.item_rows, 0, rows - 1)
    given = [getattr(layout, name) is not None for name in _SUPERVISED]
    if any(given) != all(given):
        raise ValueError("labels: expected labels, logit_rows and logit_labels together or none of them")
    if layout.labels is None or layout.logit_rows is None or layout.logit_labels is None:
        return
    _check_shape("labels", layout.labels, rows, "one per row, as lo")
    _check_shape("logit_labels", layout.logit_labels, layout.logit_rows.shape[0], "one per logit row")
    _check_range("logit_rows", layout.logit_rows, 0, rows - 1)


def _check_transpose(transpose: Any, rows: int, max_token_id: int, device: torch.device) -> None:
    _check_transpose_shape(transpose, device)
    _check_cuts("transpose.offsets", transpose.offsets, transpose.rows.shape[0])
    if bool((transpose.offsets.diff() == 0).any()):
        raise ValueError("transpose.offsets: expected at least one contribution per token, got none for one")
    _check_range("transpose.rows", transpose.rows, 0, rows - 1)
    _check_range("transpose.divisors", transpose.divisors, 1, torch.iinfo(torch.int32).max)
    if bool((torch.diff(transpose.tokens) <= 0).any()):
        raise ValueError("transpose.tokens: expected ascending token ids without repeats")
    _check_range("transpose.tokens", transpose.tokens, 0, max_token_id)


def _check_identities(identities: Any, rows: int, device: torch.device) -> None:
    if identities.layout.device != device:
        raise ValueError(f"identities.layout: expected device {device}, got {identities.layout.device}")
    check_vector("identities.rows", identities.rows, torch.int64, device)
    _check_shape("identities.rows", identities.rows, identities.layout.num_rows, "one per row of identities.layout")
    _check_ascending("identities.rows", identities.rows, rows)


def _check_ascending(name: str, chosen: Tensor, rows: int) -> None:
    _check_range(name, chosen, 0, rows - 1)
    if bool((torch.diff(chosen) <= 0).any()):
        raise ValueError(f"{name}: expected ascending rows without repeats")
