# SPDX-License-Identifier: Apache-2.0
"""`pool_rows` in plain PyTorch: the oracle, the documentation, and the fallback on any device."""

from __future__ import annotations

import torch
from torch import Tensor


def pool_rows(
    weight: Tensor, lo: Tensor, hi: Tensor, items: Tensor, token_ids: Tensor, offsets: Tensor, out: Tensor
) -> None:
    """Write every row of the packed batch into ``out`` ``(T, D)``."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    titles = _means(weight[token_ids.long()].to(wide), torch.diff(offsets))
    patches = torch.nonzero(lo >= 0)[:, 0]
    starts, sizes = lo[patches], (hi - lo)[patches]
    entries = torch.arange(int(sizes.sum()), device=lo.device)
    entries += torch.repeat_interleave(starts - (sizes.cumsum(0) - sizes), sizes)
    rows = weight[torch.where(lo < 0, -1 - lo, 0).long()].to(wide)
    rows[patches] = _means(titles[items[entries].long()], sizes)
    out.copy_(rows)


def pool_rows_grad(
    grad_rows: Tensor, tokens: Tensor, token_offsets: Tensor, rows: Tensor, divisors: Tensor, out: Tensor, scatter: bool
) -> None:
    """Write each token's gradient, ``sum(grad_rows[rows] / divisors)``, into its row of ``out``.

    With ``scatter`` that is row ``tokens[u]`` of ``(V, D)``, and no other row is touched; else row ``u`` of ``(U, D)``.
    """
    wide = torch.promote_types(grad_rows.dtype, torch.float32)
    shares = grad_rows[rows.long()].to(wide) / divisors[:, None]
    sums = _sums(shares, torch.diff(token_offsets))
    out[tokens.long() if scatter else slice(None)] = sums.to(out.dtype)


def _sums(values: Tensor, lengths: Tensor) -> Tensor:
    """Sum the first ``lengths[0]`` rows of ``values``, the next ``lengths[1]``, and so on."""
    owners = torch.repeat_interleave(torch.arange(lengths.shape[0], device=lengths.device), lengths)
    return values.new_zeros(lengths.shape[0], values.shape[1]).index_add_(0, owners, values)


def _means(values: Tensor, lengths: Tensor) -> Tensor:
    return _sums(values, lengths) / lengths[:, None]
