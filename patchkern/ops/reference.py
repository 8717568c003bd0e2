# SPDX-License-Identifier: Apache-2.0
"""`pool_rows` in plain PyTorch: the oracle, the documentation, and the fallback on any device."""

from __future__ import annotations

import torch
from torch import Tensor


def pool_rows(
    weight: Tensor,
    lo: Tensor,
    hi: Tensor,
    items: Tensor,
    token_ids: Tensor,
    offsets: Tensor,
    table: Tensor | None,
    title_index: Tensor | None,
    scale: float,
    out: Tensor,
) -> None:
    """Write every row of the packed batch, times ``scale``, into ``out`` ``(T, D)``.

    With a ``table`` of item patches, title ``i``'s mean is its row ``title_index[i]``; else it is taken over its
    ``token_ids``.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    if table is None or title_index is None:
        titles = _means(weight[token_ids.long()].to(wide), torch.diff(offsets))
    else:
        titles = table[title_index.long()].to(wide)
    rows = weight[torch.where(lo < 0, -1 - lo, 0).long()]
    if scale != 1:
        rows = (rows.to(wide) * scale).to(weight.dtype)
    patches = torch.nonzero(lo >= 0)[:, 0]
    starts, sizes = lo[patches], (hi - lo)[patches]
    entries = torch.arange(int(sizes.sum()), device=lo.device)
    entries += torch.repeat_interleave(starts - (sizes.cumsum(0) - sizes), sizes)
    rows[patches] = (_means(titles[items[entries].long()], sizes) * scale).to(weight.dtype)
    out.copy_(rows)


def pool_rows_grad(
    grad_rows: Tensor,
    tokens: Tensor,
    token_offsets: Tensor,
    rows: Tensor,
    divisors: Tensor,
    scale: float,
    out: Tensor,
    scatter: bool,
    accumulate: bool,
) -> None:
    """Write each token's gradient, ``scale * sum(grad_rows[rows] / divisors)``, into its row of ``out``.

    With ``scatter`` that is row ``tokens[u]`` of ``(V, D)``, and no other row is touched; else row ``u`` of ``(U, D)``.
    With ``accumulate`` it is added to what is there.
    """
    wide = torch.promote_types(grad_rows.dtype, torch.float32)
    shares = grad_rows[rows.long()].to(wide) / divisors[:, None]
    sums = _sums(shares, torch.diff(token_offsets)) * scale
    where = tokens.long() if scatter else slice(None)
    if accumulate:
        sums += out[where]
    out[where] = sums.to(out.dtype)


def _sums(values: Tensor, lengths: Tensor) -> Tensor:
    """Sum the first ``lengths[0]`` rows of ``values``, the next ``lengths[1]``, and so on."""
    # Sums start from -0.0: unlike 0.0 it changes no number that is added to it.
    if values.is_cuda:  # where index_add_ adds in another order each time
        return torch.segment_reduce(values, "sum", lengths=lengths, unsafe=True, initial=-0.0)
    owners = torch.repeat_interleave(torch.arange(lengths.shape[0]), lengths)
    return values.new_full((lengths.shape[0], values.shape[1]), -0.0).index_add_(0, owners, values)


def _means(values: Tensor, lengths: Tensor) -> Tensor:
    return _sums(values, lengths) / lengths[:, None]


def unusable_reason() -> str | None:
    """Why this backend cannot be used here: it always can."""
    return None
