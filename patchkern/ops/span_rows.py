# SPDX-License-Identifier: Apache-2.0
"""Attention of some rows of a packed batch alone, over the keys and values of all: each is a span of one row.

Its prefix is what its span's prefix is, and the rows of its span before it; so nothing is needed that attention over
spans lacks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from patchkern.ops import span_attention_native as native

# Measured on one core, widths 32 to 256: with more rows read, or a smaller product of all rows with a square matrix,
# what is saved is less than what choosing costs.
_ROWS_PER_READ = 3
_LEAST_PRODUCT = 1 << 21


def are_few(rows: Tensor, count: int) -> bool:
    """Whether choosing so few of the rows ``(..., T, D)`` costs less than a layer's products with all of them."""
    total, width = rows.shape[-2:]
    return _ROWS_PER_READ * count <= total and total * width * width >= _LEAST_PRODUCT


def worthwhile(rows: Tensor, count: int) -> bool:
    """Whether attention of so few of the rows ``(..., T, D)`` alone takes less time than of all.

    It does with the CPU's kernels, which take a user's rows together and those of others apart. Those of a GPU take so
    many rows together as there come, and go through what each user's see one after another: a row of each user alone
    would take longer than all rows of users side by side.
    """
    return are_few(rows, count) and native.serves(rows, 0.0)


def attend_rows(
    attention: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Tensor,
    cu_seqlens: Tensor,
    prefix: Tensor | None = None,
    scaling: float | None = None,
    *,
    prefix_key: Tensor | None = None,
    prefix_value: Tensor | None = None,
    places: Tensor | None = None,
) -> Tensor:
    """What ``attention`` gives for some rows, of their queries and of the keys and values of all.

    Args:
        attention: `patchkern.ops.span_attention.span_attention`, or what takes the same arguments.
        query: (1, H, M, d), of those rows.
        key, value: (1, Hkv, T, d), of all.
        rows: (M,) int64, which they are, in any order.
        cu_seqlens, prefix, scaling: of all rows, as ``attention`` takes them.
        prefix_key, prefix_value: as well; those of all rows are among them then.
        places: (T,) int64, where: side by side for each span. Given with the two.

    Returns:
        (1, M, H, d), differentiable as ``attention`` is.
    """
    ranges = _ranges(rows, cu_seqlens, prefix, places)
    each = torch.arange(rows.shape[0] + 1, dtype=torch.int32, device=rows.device)
    return attention(
        query,
        key[:, :, rows],
        value[:, :, rows],
        each,
        1,
        scaling,
        prefix=ranges,
        prefix_key=key if prefix_key is None else prefix_key,
        prefix_value=value if prefix_value is None else prefix_value,
    )


def _ranges(rows: Tensor, cu_seqlens: Tensor, prefix: Tensor | None, places: Tensor | None) -> Tensor:
    """``(M, 1 + R, 2)`` int32, what each of the rows sees besides itself."""
    span = torch.searchsorted(cu_seqlens, rows.to(cu_seqlens.dtype), right=True) - 1
    first = cu_seqlens[span].long()
    before = torch.stack([first, rows], dim=1)
    if places is not None:
        before += (places[first] - first)[:, None]
    seen = [before.to(torch.int32)[:, None]]
    if prefix is not None:
        seen.append((prefix if prefix.dim() == 3 else prefix[:, None])[span])
    return torch.cat(seen, dim=1)
