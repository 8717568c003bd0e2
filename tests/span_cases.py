# SPDX-License-Identifier: Apache-2.0
"""Spans with prefixes in every arrangement, and what attention over them must be."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from patchkern.ops import span_attention_prefixed as op


class Spans(NamedTuple):
    """Lengths, prefix ranges, and how many rows ``prefix_key`` has (None: the ranges are of the rows).

    A span has one range, or a list of as many as every other.
    """

    lengths: Sequence[int]
    prefix: Sequence[tuple[int, int]] | Sequence[Sequence[tuple[int, int]]]
    stored: int | None = None

    @property
    def ranges(self) -> list[list[tuple[int, int]]]:
        return [[span] if isinstance(span, tuple) else list(span) for span in self.prefix]

    @property
    def integers(self) -> tuple[Tensor, Tensor]:
        """``cu_seqlens`` and the ``(S, R, 2)`` ranges, or ``(S, 2)`` where each span has one that is no list."""
        cu_seqlens = torch.tensor([0, *itertools.accumulate(self.lengths)], dtype=torch.int32)
        prefix = torch.tensor(self.prefix, dtype=torch.int32)
        return cu_seqlens, prefix if len(self.lengths) else prefix.reshape(0, 2)

    @property
    def raw(self) -> tuple[Tensor, Tensor]:
        """`integers` as the operator takes them, ``(S, R, 2)``."""
        cu_seqlens, prefix = self.integers
        return cu_seqlens, prefix if prefix.dim() == 3 else prefix[:, None]

    def tensors(self, heads: tuple[int, int], width: int, value_width: int | None = None) -> tuple[Tensor | None, ...]:
        """query, key, value, prefix_key and prefix_value: (1, H, rows, d), float64."""
        sizes = [(heads[0], sum(self.lengths), width), (heads[1], sum(self.lengths), width)]
        sizes += [(heads[1], sum(self.lengths), value_width or width)]
        if self.stored is not None:
            sizes += [(heads[1], self.stored, width), (heads[1], self.stored, value_width or width)]
        made = [torch.randn(1, *size, dtype=torch.float64) for size in sizes]
        return (*made, *[None] * (5 - len(made)))


SPANS = {
    "no rows": Spans([], []),
    "no prefix": Spans([7, 1, 0, 12], [(0, 0)] * 4),
    "empty spans": Spans([9, 0, 0, 4, 0], [(0, 0), (0, 9), (0, 9), (2, 9), (0, 0)]),
    "one row each": Spans([5, 1, 1, 1, 1], [(0, 0), (0, 5), (4, 5), (0, 1), (0, 0)]),
    "trunk and branches": Spans([40, 6, 9, 5, 30, 8], [(0, 0), (0, 12), (0, 25), (0, 40), (0, 0), (60, 90)]),
    "prefix of one row": Spans([3, 20], [(0, 1), (6, 7)], stored=7),
    "nothing stored": Spans([3, 20], [(0, 0), (0, 0)], stored=0),
    "forty share one": Spans([1] * 20 + [3] * 20, [(100, 1100)] * 40, stored=1200),
    "prefixes that cross": Spans([5, 6, 7, 8, 9], [(0, 30), (0, 10), (20, 50), (0, 50), (10, 11)], stored=50),
    "a long span": Spans([700], [(3, 103)], stored=104),
    "several ranges": Spans(
        [4, 2, 2, 9, 7, 5, 3, 4, 3],  # a prompt, two compressed parts, what they compress, the rest, branches
        [
            *[[(0, 0), (0, 0)], [(0, 4), (8, 17)], [(0, 6), (17, 24)], [(0, 4), (8, 8)], [(0, 6), (0, 0)]],
            *[[(29, 29), (0, 8)], [(0, 6), (17, 20)], [(0, 6), (17, 22)], [(0, 8), (24, 26)]],
        ],
    ),
    "ranges empty in every place": Spans(
        [3, 0, 2, 5, 1, 4, 2, 3],
        [
            [(first, 9 if n & 1 else first), (20, 31 if n & 2 else 20), (40, 60 if n & 4 else 40)]
            for n, first in enumerate((0, 0, 2, 0, 0, 2, 0, 0))
        ],
        stored=61,
    ),
    "ranges of many": Spans([1] * 6 + [3] * 6, [[(10, 90), (95, 96 + 5 * n)] for n in range(12)], stored=160),
    "ranges of a long span": Spans([70], [[(40, 63), (3, 38)]], stored=64),
}


def expected(spans: Spans, tensors: Sequence[Tensor | None], scaling: float) -> Tensor:
    query, key, value, *stored = (None if x is None else x[0].transpose(0, 1) for x in tensors)
    return op.reference(query, key, value, *spans.raw, *stored, scaling)[None]


def sdpa(spans: Spans, tensors: Sequence[Tensor | None], scaling: float) -> Tensor:
    """What PyTorch alone offers: one dense mask over everything."""
    query, key, value, prefix_key, prefix_value = tensors
    prefix_key, prefix_value = (key, value) if prefix_key is None else (prefix_key, prefix_value)
    key, value = torch.cat([prefix_key, key], dim=2), torch.cat([prefix_value, value], dim=2)
    visible = visibility(spans, prefix_key.shape[2])
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2)


def visibility(spans: Spans, stored: int) -> Tensor:
    """(T, stored + T), written out span by span."""
    rows = sum(spans.lengths)
    visible = torch.zeros(rows, stored + rows, dtype=torch.bool)
    bounds = itertools.pairwise([0, *itertools.accumulate(spans.lengths)])
    for (begin, end), ranges in zip(bounds, spans.ranges, strict=True):
        for first, last in ranges:
            visible[begin:end, first:last] = True
        for row in range(begin, end):
            visible[row, stored + begin : stored + row + 1] = True
    return visible


def gradients(out: Tensor, tensors: Sequence[Tensor | None], weight: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad((out * weight.to(out.dtype)).sum(), [x for x in tensors if x is not None]))


def leaves(tensors: Sequence[Tensor | None], dtype: torch.dtype = torch.float64) -> list[Tensor | None]:
    return [None if x is None else x.to(dtype).requires_grad_() for x in tensors]
