# SPDX-License-Identifier: Apache-2.0
"""Pointwise attention over the spans of a packed batch, one span after the other."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def hstu_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    prefix: Tensor | None = None,
    prefix_key: Tensor | None = None,
    prefix_value: Tensor | None = None,
    *,
    scale: float = 1.0,
    normalizer: float,
) -> Tensor:
    """The sum of ``silu(scale * q k) v`` over what a row sees, divided by ``normalizer``: no softmax.

    Args:
        query, key: ``(T, H, d)``.
        value: ``(T, H, dv)``.
        cu_seqlens: ``(S + 1,)`` int32, where spans begin; a row sees its span up to itself.
        prefix: ``(S, 2)`` int32, rows of ``prefix_key`` and ``prefix_value`` that a span sees besides.
        prefix_key, prefix_value: ``(P, H, d)`` and ``(P, H, dv)``; ``key`` and ``value`` where not given.
        scale: of the products.
        normalizer: above 0, the same in training and serving.

    Returns:
        ``(T, H, dv)``.
    """
    if not normalizer > 0:
        raise ValueError(f"normalizer: expected a number above 0, got {normalizer}")
    stored_key = key if prefix_key is None else prefix_key
    stored_value = value if prefix_value is None else prefix_value
    lengths = cu_seqlens.diff().tolist()
    ranges = [[0, 0]] * len(lengths) if prefix is None else prefix.tolist()
    spans = zip(query.split(lengths), key.split(lengths), value.split(lengths), ranges, strict=True)
    out = [value[:0]]
    for q, k, v, (begin, end) in spans:
        seen_key, seen_value = torch.cat([stored_key[begin:end], k]), torch.cat([stored_value[begin:end], v])
        weights = F.silu(scale * q.transpose(0, 1) @ seen_key.permute(1, 2, 0))  # (H, n, seen)
        sums = weights.tril(end - begin) @ seen_value.transpose(0, 1)
        out.append((sums / normalizer).transpose(0, 1))
    return torch.cat(out)
