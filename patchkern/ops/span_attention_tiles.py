# SPDX-License-Identifier: Apache-2.0
"""`span_attention` over tiles of rows: any device's path where no kernel serves, as with attention dropout.

A tile is a run of consecutive query rows whose ranges begin at the same rows. It attends to its parts one after the
other: the ranges, the earlier rows of its span, and itself. Each part gives an output and the log-sum-exp of its
scores, by which they are merged. Given the merged output and log-sum-exp, the parts' gradients are exact on their own.
Keys and values are read where they lie, never copied per span (narrow dtypes are widened a part at a time), and no
temporary tensor is larger than a tile's.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from patchkern.batch.span_ranges import check_ranges

# Scores of a tile over all heads: read five times, they should stay in the caches.
_SCORES = 1 << 18
_ROWS = range(16, 129)  # query rows of a tile; few only where prefixes are so long that the bound above cannot hold
# What calling a tile's dozen operators costs, in multiplications of queries with keys that fit into that time.
_OVERHEAD = 1 << 20


# ------------------------------------------------------------------ the plan


class _Range(NamedTuple):
    """Prefix rows ``begin..end - 1``: all of a tile see the first ``shared``, and how many more differs by row."""

    begin: int
    end: int
    shared: int

    def joined(self, other: _Range) -> _Range | None:
        """Both as one, where they begin at the same row or neither has any; else None."""
        if (self.begin == self.end) != (other.begin == other.end):
            return None
        if self.begin == self.end:
            return self
        both = _Range(self.begin, max(self.end, other.end), min(self.shared, other.shared))
        return both if self.begin == other.begin else None


@dataclass(frozen=True)
class _Tile:
    """Query rows ``begin..end - 1``: all rows of one or more spans, or a block of one long span.

    They see their ``prefix``, range by range, and the own rows from ``first`` on, causally.
    """

    begin: int
    end: int
    first: int
    prefix: tuple[_Range, ...]
    spans: int = 1

    @property
    def prefix_length(self) -> int:
        return sum(seen.end - seen.begin for seen in self.prefix)

    @property
    def columns(self) -> int:
        return self.prefix_length + self.end - self.first

    def joined(self, other: _Tile) -> _Tile | None:
        """The next tile with this one, where both see ranges of the same trunk; else None."""
        both = [mine.joined(theirs) for mine, theirs in zip(self.prefix, other.prefix, strict=True)]
        prefix = tuple(one for one in both if one is not None)
        if self.prefix_length == 0 or len(prefix) < len(both):
            return None
        return replace(self, end=other.end, prefix=prefix, spans=self.spans + 1)

    def cost(self, width: int) -> int:
        """Multiplications, for all heads' ``width`` together."""
        return (self.end - self.begin) * self.columns * width + _OVERHEAD


def _rows_of(columns: int, n_heads: int) -> int:
    return min(max(_SCORES // (n_heads * max(columns, 1)), _ROWS.start), _ROWS.stop - 1)


def _plan(cu_seqlens: Tensor, prefix: Tensor, width: int, n_heads: int) -> Iterator[_Tile]:
    """Cut the rows into tiles; neighbouring short spans of one trunk share a tile where that is less work.

    Args:
        cu_seqlens: (S + 1,), and prefix: (S, R, 2), checked.
        width: of all heads together.
        n_heads: whose scores are written out at once.
    """
    pending: _Tile | None = None
    for (begin, end), ranges in zip(itertools.pairwise(cu_seqlens.tolist()), prefix.tolist(), strict=True):
        if begin == end:
            continue
        alone = _Tile(begin, end, begin, tuple(_Range(first, last, last - first) for first, last in ranges))
        both = None if pending is None else pending.joined(alone)
        if pending is not None and both is not None:
            fits = end - both.begin <= _rows_of(both.columns, n_heads)
            if fits and both.cost(width) <= pending.cost(width) + alone.cost(width):
                pending = both
                continue
        if pending is not None:
            yield pending
        pending = None
        rows = _rows_of(alone.columns, n_heads)
        if end - begin <= rows:
            pending = alone
            continue
        for start in range(begin, end, rows):
            yield replace(alone, begin=start, end=min(start + rows, end))
    if pending is not None:
        yield pending


class _Part(NamedTuple):
    """Keys that a tile sees: rows of the prefix tensors (``stored``) or the tile's own, all of them but the ``hidden``.

    ``hidden`` is (R, N); where it is no more than the future of one span, ``causal`` says so in its place.
    """

    stored: bool
    rows: slice
    hidden: Tensor | None = None
    causal: bool = False


class _Plan:
    """Tiles, and for each its parts, from the same integers in both passes."""

    def __init__(self, query: Tensor, key: Tensor, cu_seqlens: Tensor, prefix: Tensor, stored: Tensor | None) -> None:
        n_rows, n_heads, width = query.shape
        check_ranges(cu_seqlens, prefix, n_rows, len(key if stored is None else stored), apart=stored is not None)
        self.tiles = list(_plan(cu_seqlens, prefix, n_heads * width, n_heads))
        self._row = torch.arange(n_rows, device=cu_seqlens.device)
        span = torch.repeat_interleave(cu_seqlens.diff().long(), output_size=n_rows)
        self._begin = cu_seqlens[:-1].long()[span]
        self._prefix_end = prefix[:, :, 1].long()[span]  # (T, R)

    def parts(self, tile: _Tile) -> Iterator[_Part]:
        rows = slice(tile.begin, tile.end)
        for number, (begin, end, shared) in enumerate(tile.prefix):
            if begin == end:
                continue
            hidden = None
            if begin + shared < end:
                hidden = torch.arange(begin, end, device=self._row.device) >= self._prefix_end[rows, number, None]
            yield _Part(True, slice(begin, end), hidden)
        if tile.first < tile.begin:
            yield _Part(False, slice(tile.first, tile.begin))
        if tile.spans == 1:
            yield _Part(False, rows, causal=True)
        else:
            row = self._row[rows]
            yield _Part(False, rows, (row > row[:, None]) | (row < self._begin[rows, None]))


# ------------------------------------------------------------------ attention of one part


class _Attention:
    """Attention of queries (H, R, d) over keys (Hkv, N, d) and values (Hkv, N, dv); every row sees at least one key.

    `merged` makes one result of those of two parts; `backward` starts from what is saved of that of all parts.
    """

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def forward(self, query: Tensor, keys: Tensor, values: Tensor, part: _Part) -> tuple[Tensor, ...]:
        """The output (H, R, dv), and what else the merging needs."""
        raise NotImplementedError

    def merged(self, left: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Of the keys of both."""
        raise NotImplementedError

    def backward(
        self, grad: Tensor, query: Tensor, keys: Tensor, values: Tensor, part: _Part, *saved: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the three."""
        raise NotImplementedError

    def scores(self, query: Tensor, keys: Tensor, part: _Part, unseen: float) -> Tensor:
        """(Hkv, G * R, N), ``unseen`` where a row does not see a key."""
        scores = torch.bmm(query.view(len(keys), -1, query.shape[2]) * self.scale, keys.transpose(1, 2))
        hidden = part.hidden
        if part.causal:
            hidden = torch.ones(scores.shape[2], scores.shape[2], dtype=torch.bool, device=scores.device).triu_(1)
        if hidden is not None:
            scores.unflatten(1, (-1, len(hidden))).masked_fill_(hidden, unseen)
        return scores


class _Softmax(_Attention):
    """A part's result is the output and the log-sum-exp of the scores (H, R)."""

    def __init__(self, scale: float, dropout: float, seed: int, device: torch.device) -> None:
        super().__init__(scale)
        self.dropout = dropout
        self.generator = torch.Generator(device).manual_seed(seed) if dropout > 0 else None

    def _kept(self, scores: Tensor) -> Tensor | None:
        """Factors that drop attention weights, the same in both passes; part after part from one generator."""
        if self.generator is None:
            return None
        draws = torch.rand(scores.shape, generator=self.generator, device=scores.device)
        return (draws >= self.dropout).to(scores.dtype).div_(1 - self.dropout)

    def forward(self, query: Tensor, keys: Tensor, values: Tensor, part: _Part) -> tuple[Tensor, ...]:
        weights = self.scores(query, keys, part, float("-inf"))
        peak = weights.amax(dim=-1, keepdim=True)
        total = weights.sub_(peak).exp_().sum(dim=-1, keepdim=True)
        if (kept := self._kept(weights)) is not None:
            weights.mul_(kept)
        out = torch.bmm(weights, values).div_(total)
        return out.view(*query.shape[:2], -1), total.log_().add_(peak).view(query.shape[:2])

    def merged(self, left: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """A mean of the outputs, weighted by their sums of exponentials."""
        share = torch.sigmoid(right[1] - left[1])
        return torch.lerp(left[0], right[0], share[..., None]), torch.logaddexp(left[1], right[1])

    def backward(
        self, grad: Tensor, query: Tensor, keys: Tensor, values: Tensor, part: _Part, *saved: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        out, lse = saved
        weights = self.scores(query, keys, part, float("-inf"))
        weights.sub_(lse.view(len(keys), -1, 1)).exp_()
        balance = (grad * out).sum(dim=-1).view(len(keys), -1, 1)
        grad = grad.view(len(keys), -1, grad.shape[2])
        grad_scores = torch.bmm(grad, values.transpose(1, 2))
        kept = self._kept(weights)
        grad_values = torch.bmm((weights if kept is None else weights * kept).transpose(1, 2), grad)
        if kept is not None:
            grad_scores.mul_(kept)
        grad_scores.sub_(balance).mul_(weights).mul_(self.scale)
        grad_keys = torch.bmm(grad_scores.transpose(1, 2), query.view(len(keys), -1, query.shape[2]))
        return torch.bmm(grad_scores, keys).view(query.shape), grad_keys, grad_values


class _Silu(_Attention):
    """A part's result is its output, a sum: parts add up."""

    def __init__(self, scale: float, normalizer: float) -> None:
        super().__init__(scale)
        self.normalizer = normalizer

    def forward(self, query: Tensor, keys: Tensor, values: Tensor, part: _Part) -> tuple[Tensor, ...]:
        weights = F.silu(self.scores(query, keys, part, torch.finfo(query.dtype).min), inplace=True)
        return (torch.bmm(weights, values).div_(self.normalizer).view(*query.shape[:2], -1),)

    def merged(self, left: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (left[0].add_(right[0]),)

    def backward(
        self, grad: Tensor, query: Tensor, keys: Tensor, values: Tensor, part: _Part, *saved: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        scores = self.scores(query, keys, part, torch.finfo(query.dtype).min)  # of unseen keys: all below is zero
        gate = torch.sigmoid(scores)
        weights = scores.mul_(gate)
        grad = grad.view(len(keys), -1, grad.shape[2]) / self.normalizer
        grad_values = torch.bmm(weights.transpose(1, 2), grad)
        # the derivative of silu: sigmoid(s) (1 + s (1 - sigmoid(s)))
        grad_scores = torch.bmm(grad, values.transpose(1, 2)).mul_(gate + weights * (1 - gate)).mul_(self.scale)
        grad_keys = torch.bmm(grad_scores.transpose(1, 2), query.view(len(keys), -1, query.shape[2]))
        return torch.bmm(grad_scores, keys).view(query.shape), grad_keys, grad_values


def _attention(scale: float, dropout: float, seed: int, normalizer: float | None, device: torch.device) -> _Attention:
    return _Softmax(scale, dropout, seed, device) if normalizer is None else _Silu(scale, normalizer)


# ------------------------------------------------------------------ both passes


class _Pass:
    """What the forward and the backward pass over the same tiles have in common."""

    def __init__(self, query: Tensor, own: tuple[Tensor, Tensor], stored: tuple[Tensor | None, Tensor | None]) -> None:
        self.wide = torch.promote_types(query.dtype, torch.float32)
        self._own = [x.transpose(0, 1) for x in own]  # (Hkv, rows, d)
        self._stored = [x if y is None else y.transpose(0, 1) for x, y in zip(self._own, stored, strict=True)]

    def by_head(self, rows: Tensor) -> Tensor:
        """(R, H, ...) as (H, R, ...), contiguous and wide."""
        return rows.transpose(0, 1).to(self.wide).contiguous()

    def seen(self, part: _Part) -> tuple[Tensor, Tensor]:
        """Keys and values of a part, as views unless the dtype is narrow."""
        keys, values = self._stored if part.stored else self._own
        return _contiguous_rows(keys[:, part.rows].to(self.wide)), _contiguous_rows(values[:, part.rows].to(self.wide))


def _contiguous_rows(x: Tensor) -> Tensor:
    return x if x.stride(2) == 1 else x.contiguous()


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    prefix: Tensor,
    prefix_key: Tensor | None,
    prefix_value: Tensor | None,
    scale: float,
    dropout: float,
    seed: int,
    normalizer: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Output (T, H, dv), and the log-sum-exp of every row's scores, (T, H), that `backward` starts from.

    With a ``normalizer`` the weights are silu of the scores, divided by it, and there is no log-sum-exp.
    """
    attention = _attention(scale, dropout, seed, normalizer, query.device)
    plan = _Plan(query, key, cu_seqlens, prefix, prefix_key)
    run = _Pass(query, (key, value), (prefix_key, prefix_value))
    out = query.new_empty(*query.shape[:2], value.shape[2])
    lse = query.new_empty(query.shape[:2] if normalizer is None else 0, dtype=run.wide)
    for tile in plan.tiles:
        rows = slice(tile.begin, tile.end)
        queries = run.by_head(query[rows])
        merged: tuple[Tensor, ...] = ()
        for part in plan.parts(tile):
            one = attention.forward(queries, *run.seen(part), part)
            merged = attention.merged(merged, one) if merged else one
        for whole, result in zip((out, lse), merged, strict=False):
            whole[rows] = result.transpose(0, 1)
    return out, lse


def backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor | None,
    lse: Tensor | None,
    cu_seqlens: Tensor,
    prefix: Tensor,
    prefix_key: Tensor | None,
    prefix_value: Tensor | None,
    scale: float,
    dropout: float,
    seed: int,
    normalizer: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, prefix_key and prefix_value; of the last two without rows where they are None.

    The weights are recomputed from the log-sum-exp. A key's gradient collects from tile after tile in a fixed order,
    in at least float32, and is rounded once. ``out`` and ``lse`` are not read where there is a ``normalizer``.
    """
    attention = _attention(scale, dropout, seed, normalizer, query.device)
    plan = _Plan(query, key, cu_seqlens, prefix, prefix_key)
    run = _Pass(query, (key, value), (prefix_key, prefix_value))
    grad_query = torch.empty_like(query, memory_format=torch.contiguous_format)
    own = [torch.zeros(x.shape, dtype=run.wide, device=x.device) for x in (key, value)]
    stored = [
        x if y is None else torch.zeros(y.shape, dtype=run.wide, device=y.device)
        for x, y in zip(own, (prefix_key, prefix_value), strict=True)
    ]
    for tile in plan.tiles:
        rows = slice(tile.begin, tile.end)
        grad, queries = run.by_head(grad_out[rows]), run.by_head(query[rows])
        saved = [run.by_head(x[rows]) for x in (out, lse) if x is not None]
        grad_queries = torch.zeros_like(queries)
        for part in plan.parts(tile):
            grads = attention.backward(grad, queries, *run.seen(part), part, *saved)
            grad_queries += grads[0]
            for total, one in zip(stored if part.stored else own, grads[1:], strict=True):
                total[part.rows] += one.transpose(0, 1)
        grad_query[rows] = grad_queries.transpose(0, 1)
    results = [x.to(query.dtype) for x in own]
    for given, total in zip((prefix_key, prefix_value), stored, strict=True):
        results.append(query.new_empty(0) if given is None else total.to(query.dtype))
    return grad_query, results[0], results[1], results[2], results[3]
