# SPDX-License-Identifier: Apache-2.0
"""What attention over spans asks of its tensors, as far as can be seen without waiting for the device."""

from __future__ import annotations

import torch
from torch import Tensor


def check_spans(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    prefix: Tensor | None,
    prefix_key: Tensor | None,
    prefix_value: Tensor | None,
    *,
    packed: bool,
) -> None:
    """Raise a TypeError or ValueError that names the argument; the ranges themselves are checked where they are made.

    Args:
        packed: whether the tensors are (rows, heads, width); if not, they are (1, heads, rows, width).
    """

    def shape(heads: int | str, rows: int | str, width: int | str) -> tuple[int | str, ...]:
        return (rows, heads, width) if packed else (1, heads, rows, width)

    def shown(expected: tuple[int | str, ...]) -> str:
        return f"({', '.join(map(str, expected))})"

    if (prefix_key is None) != (prefix_value is None):
        raise ValueError("prefix_key: expected prefix_key and prefix_value together or neither of them, got one")
    for name, given in (("query", query), ("key", key), ("value", value), ("cu_seqlens", cu_seqlens)):
        if not isinstance(given, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(given).__name__}")
    integers = {"cu_seqlens": cu_seqlens}
    if prefix is not None:
        if not isinstance(prefix, Tensor):
            raise TypeError(f"prefix: expected a tensor, got {type(prefix).__name__}")
        integers["prefix"] = prefix
    for name, tensor in integers.items():
        if tensor.dtype != torch.int32:
            raise TypeError(f"{name}: expected dtype torch.int32, got {tensor.dtype}")
    if cu_seqlens.dim() != 1 or not cu_seqlens.shape[0]:
        raise ValueError(f"cu_seqlens: expected shape (S + 1,), got {tuple(cu_seqlens.shape)}")
    spans = cu_seqlens.shape[0] - 1
    if prefix is not None and not _one_or_several(prefix.shape, spans):
        raise ValueError(
            f"prefix: expected shape {(spans, 2)}, one range per span, or ({spans}, R, 2), got {tuple(prefix.shape)}"
        )
    dims = len(shape(0, 0, 0))
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != dims:
            form = shown(shape("heads", "rows", "width"))
            raise ValueError(f"{name}: expected {dims} dimensions, {form}, got {tuple(tensor.shape)}")
    at_heads, at_rows = (1, 0) if packed else (1, 2)
    rows, width, heads = query.shape[at_rows], query.shape[-1], key.shape[at_heads]
    if (not packed and query.shape[0] != 1) or heads == 0 or query.shape[at_heads] % heads:
        form = shown(shape(f"a multiple of {heads}", "T", "d"))
        raise ValueError(f"query: expected shape {form}, got {tuple(query.shape)}")
    expected = {"key": (key, shape(heads, rows, width)), "value": (value, shape(heads, rows, value.shape[-1]))}
    if prefix_key is not None and prefix_value is not None:
        stored = prefix_key.shape[at_rows]
        expected["prefix_key"] = (prefix_key, shape(heads, stored, width))
        expected["prefix_value"] = (prefix_value, shape(heads, stored, value.shape[-1]))
    for name, (tensor, wanted) in expected.items():
        if tensor.shape != wanted:
            raise ValueError(f"{name}: expected shape {shown(wanted)}, got {tuple(tensor.shape)}")
        if tensor.dtype != query.dtype:
            raise TypeError(f"{name}: expected query's dtype, {query.dtype}, got {tensor.dtype}")
        if tensor.device != query.device:
            raise ValueError(f"{name}: expected query's device, {query.device}, got {tensor.device}")
    for name, tensor in integers.items():
        if tensor.device != query.device:
            raise ValueError(f"{name}: expected query's device, {query.device}, got {tensor.device}")


def _one_or_several(shape: torch.Size, spans: int) -> bool:
    """Whether these are ranges of as many spans: (S, 2), or (S, R, 2) with at least one range each."""
    return shape == (spans, 2) or (len(shape) == 3 and shape == (spans, max(shape[1], 1), 2))
