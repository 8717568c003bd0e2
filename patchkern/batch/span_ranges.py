# SPDX-License-Identifier: Apache-2.0
"""The rows that a span sees besides itself: ``(S, R, 2)`` int32, R ranges of rows for each of S spans."""

from __future__ import annotations

import torch
from torch import Tensor


def check_ranges(cu_seqlens: Tensor, prefix: Tensor, n_rows: int, n_stored: int, apart: bool) -> None:
    """Raise a ValueError unless the spans are cut from ``n_rows`` rows, and every range lies in ``n_stored`` rows.

    Args:
        cu_seqlens: (S + 1,) int32.
        prefix: (S, R, 2) int32; the ranges of one span must not overlap.
        n_rows: of the batch.
        n_stored: that the ranges are of.
        apart: whether those are others than the batch's; if not, no range overlaps its own span.
    """
    first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
    if first != 0 or last != n_rows or bool((cu_seqlens.diff() < 0).any()):
        raise ValueError(f"cu_seqlens: expected non-decreasing offsets from 0 to {n_rows}, got {first} to {last}")
    begin, end = prefix.unbind(2)
    if (at := _first((begin < 0) | (end < begin) | (end > n_stored))) is not None:
        raise range_error(prefix, at, n_stored)
    if (at := _first(overlapping(cu_seqlens, prefix, apart))) is not None:
        raise overlap_error(prefix, at)


def overlapping(cu_seqlens: Tensor, prefix: Tensor, apart: bool) -> Tensor:
    """(S, R) bool: which ranges overlap an earlier one of their span or, unless they lie ``apart``, the span itself."""
    bounds = prefix if apart else torch.cat([torch.stack([cu_seqlens[:-1], cu_seqlens[1:]], 1)[:, None], prefix], 1)
    begin, end = bounds.unbind(2)
    meet = torch.maximum(begin[:, :, None], begin[:, None]) < torch.minimum(end[:, :, None], end[:, None])
    return meet.tril(-1).any(2)[:, bounds.shape[1] - prefix.shape[1] :]


def range_error(prefix: Tensor, at: int, n_stored: int) -> ValueError:
    """That range ``at`` of all is none of the rows."""
    name, given = _named(prefix, at)
    return ValueError(f"{name}: expected a range of rows in 0..{n_stored}, got {given}")


def overlap_error(prefix: Tensor, at: int) -> ValueError:
    """That range ``at`` of all has rows of its span, or of another of its ranges."""
    name, given = _named(prefix, at)
    return ValueError(f"{name}: expected rows that neither the span nor an earlier range of it has, got {given}")


def _named(prefix: Tensor, at: int) -> tuple[str, list[int]]:
    span, number = divmod(at, prefix.shape[1])
    return f"prefix[{span}]" if prefix.shape[1] == 1 else f"prefix[{span}, {number}]", prefix[span, number].tolist()


def _first(wrong: Tensor) -> int | None:
    at = torch.nonzero(wrong.flatten())
    return int(at[0]) if at.numel() else None
