# SPDX-License-Identifier: Apache-2.0
"""`span_attention` in matrix products over tiles of rows: the CPU's path, and any device's where no kernel serves.

A tile is a run of consecutive query rows whose prefixes begin at the same row. All heads that share a key head, of all
its rows, are multiplied with the keys at once; keys and values are read where they lie, never copied per span. Tiles
bound the memory: there is no score matrix but that of the tile at work.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# Scores of one tile, over all heads: four bytes each and read five times, they should stay in the second-level cache.
_SCORES = 1 << 18
_ROWS = range(16, 257)  # query rows of a tile; few only where prefixes are so long that the bound above cannot hold
# What calling a tile's dozen operators costs, in scores of one head that could be computed in that time.
_OVERHEAD = 4096


@dataclass(frozen=True)
class _Tile:
    """Query rows ``begin..end - 1``: all rows of one or more spans, or a block of one long span.

    They see the prefix rows ``prefix_begin..prefix_end - 1`` (all of them the first ``shared``; how many more, differs
    from row to row) and the own rows from ``first`` on, causally.
    """

    begin: int
    end: int
    first: int
    prefix_begin: int
    prefix_end: int
    shared: int

    @property
    def prefix_length(self) -> int:
        return self.prefix_end - self.prefix_begin

    @property
    def columns(self) -> int:
        return self.prefix_length + self.end - self.first

    @property
    def cost(self) -> int:
        return (self.end - self.begin) * self.columns + _OVERHEAD


def _rows_of(columns: int, n_heads: int) -> int:
    return min(max(_SCORES // (n_heads * max(columns, 1)), _ROWS.start), _ROWS.stop - 1)


def _plan(cu_seqlens: Tensor, prefix: Tensor, n_rows: int, n_prefix: int, n_heads: int) -> Iterator[_Tile]:
    """Cut the rows into tiles; neighbouring short spans of one trunk share a tile where that is less work."""
    _check_ranges(cu_seqlens, prefix, n_rows, n_prefix)
    pending: _Tile | None = None
    for (begin, end), (prefix_begin, prefix_end) in zip(
        itertools.pairwise(cu_seqlens.tolist()), prefix.tolist(), strict=True
    ):
        if begin == end:
            continue
        length = prefix_end - prefix_begin
        alone = _Tile(begin, end, begin, prefix_begin, prefix_end, length)
        if pending is not None and length and pending.prefix_length and pending.prefix_begin == prefix_begin:
            shared, furthest = min(pending.shared, length), max(pending.prefix_end, prefix_end)
            both = replace(pending, end=end, prefix_end=furthest, shared=shared)
            fits = end - both.begin <= _rows_of(both.columns, n_heads)
            if fits and both.cost <= pending.cost + alone.cost:
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


def _check_ranges(cu_seqlens: Tensor, prefix: Tensor, n_rows: int, n_prefix: int) -> None:
    first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
    if first != 0 or last != n_rows or bool((cu_seqlens.diff() < 0).any()):
        raise ValueError(f"cu_seqlens: expected non-decreasing offsets from 0 to {n_rows}, got {first} to {last}")
    begin, end = prefix.unbind(1)
    wrong = torch.nonzero((begin < 0) | (end < begin) | (end > n_prefix))
    if wrong.numel():
        at = int(wrong[0])
        raise ValueError(f"prefix[{at}]: expected a range of rows in 0..{n_prefix}, got {prefix[at].tolist()}")


class _Pass:
    """What the forward and the backward pass over the same tiles have in common."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seqlens: Tensor,
        prefix: Tensor,
        prefix_key: Tensor,
        prefix_value: Tensor,
        scale: float,
        dropout: float,
        seed: int,
    ) -> None:
        self.wide = torch.promote_types(query.dtype, torch.float32)
        self.n_kv_heads, self.groups = key.shape[1], query.shape[1] // key.shape[1]
        self.query, self.scale, self.dropout = query, scale, dropout
        # per key head, as matrices: (Hkv, rows, d)
        self.keys, self.values = key.transpose(0, 1), value.transpose(0, 1)
        self.prefix_keys, self.prefix_values = prefix_key.transpose(0, 1), prefix_value.transpose(0, 1)
        self.tiles = list(_plan(cu_seqlens, prefix, query.shape[0], prefix_key.shape[0], query.shape[1]))
        lengths = cu_seqlens.diff().long()
        self.row = torch.arange(query.shape[0], device=query.device)
        owner = torch.repeat_interleave(lengths, output_size=query.shape[0])
        self.span_begin = cu_seqlens[:-1].long()[owner]
        self.prefix_end = prefix[:, 1].long()[owner]
        self.generator = torch.Generator(query.device).manual_seed(seed) if dropout > 0 else None

    def grouped(self, rows: Tensor) -> Tensor:
        """(R, H, d) as (Hkv, R * G, d) in the wide dtype."""
        rows = rows.to(self.wide).unflatten(1, (self.n_kv_heads, self.groups)).transpose(0, 1)
        return rows.reshape(self.n_kv_heads, -1, rows.shape[-1])

    def ungrouped(self, rows: Tensor) -> Tensor:
        """(Hkv, R * G, ...) as (R, H, ...)."""
        return rows.unflatten(1, (-1, self.groups)).transpose(0, 1).flatten(1, 2)

    def parts(self, tile: _Tile, prefix: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        """The rows that a tile sees, (Hkv, P, d) and (Hkv, L, d), as views unless the dtype is narrow."""
        seen = prefix[:, tile.prefix_begin : tile.prefix_end], own[:, tile.first : tile.end]
        return seen[0].to(self.wide), seen[1].to(self.wide)

    def scores(self, tile: _Tile, query: Tensor) -> Tensor:
        """(Hkv, R * G, P + L), minus infinity where a row does not see a key."""
        length = tile.prefix_length
        scores = query.new_empty(self.n_kv_heads, query.shape[1], tile.columns)
        keys, own_keys = self.parts(tile, self.prefix_keys, self.keys)
        torch.bmm(query, keys.transpose(1, 2), out=scores[..., :length])
        torch.bmm(query, own_keys.transpose(1, 2), out=scores[..., length:])
        by_row = scores.unflatten(1, (-1, self.groups))  # (Hkv, R, G, P + L)
        if tile.shared < length:
            places = torch.arange(tile.prefix_begin + tile.shared, tile.prefix_end, device=scores.device)
            hidden = places >= self.prefix_end[tile.begin : tile.end, None]
            by_row[..., tile.shared : length].masked_fill_(hidden[:, None], float("-inf"))
        rows = self.row[tile.begin : tile.end]
        hidden = (rows > rows[:, None]) | (rows < self.span_begin[tile.begin : tile.end, None])
        by_row[..., tile.columns - len(rows) :].masked_fill_(hidden[:, None], float("-inf"))
        return scores

    def kept(self, scores: Tensor) -> Tensor | None:
        """Factors that drop attention weights, the same in both passes; tile after tile from one generator."""
        if self.generator is None:
            return None
        draws = torch.rand(scores.shape, generator=self.generator, device=scores.device)
        return (draws >= self.dropout).to(scores.dtype).div_(1 - self.dropout)


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
) -> tuple[Tensor, Tensor]:
    """Output (T, H, dv), and the log-sum-exp of every row's scores, (T, H), that `backward` starts from."""
    prefix_key, prefix_value = _or_own(prefix_key, key), _or_own(prefix_value, value)
    run = _Pass(query, key, value, cu_seqlens, prefix, prefix_key, prefix_value, scale, dropout, seed)
    out = query.new_empty(*query.shape[:2], value.shape[2])
    lse = query.new_empty(query.shape[:2], dtype=run.wide)
    for tile in run.tiles:
        rows = slice(tile.begin, tile.end)
        weights = run.scores(tile, run.grouped(query[rows]) * scale)
        peak = weights.amax(dim=-1, keepdim=True)
        total = weights.sub_(peak).exp_().sum(dim=-1, keepdim=True)
        if (kept := run.kept(weights)) is not None:
            weights.mul_(kept)
        values, own_values = run.parts(tile, run.prefix_values, run.values)
        length = tile.prefix_length
        summed = torch.bmm(weights[..., length:], own_values)
        if length:
            summed.baddbmm_(weights[..., :length], values)
        out[rows] = run.ungrouped(summed.div_(total))
        lse[rows] = run.ungrouped(total.log_().add_(peak)[..., 0])
    return out, lse


def backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    prefix: Tensor,
    prefix_key: Tensor | None,
    prefix_value: Tensor | None,
    scale: float,
    dropout: float,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, prefix_key and prefix_value; of the last two without rows where they are None.

    The weights are recomputed from the log-sum-exp. A key's gradient collects from tile after tile in a fixed order,
    in at least float32, and is rounded once.
    """
    keys, values = _or_own(prefix_key, key), _or_own(prefix_value, value)
    run = _Pass(query, key, value, cu_seqlens, prefix, keys, values, scale, dropout, seed)

    def zeros(like: Tensor) -> Tensor:  # (Hkv, rows, d) for the products, (rows, Hkv, d) in memory
        return torch.zeros(like.shape, dtype=run.wide, device=like.device).transpose(0, 1)

    grad_query = torch.empty_like(query, memory_format=torch.contiguous_format)
    grad_key, grad_value = zeros(key), zeros(value)
    grad_prefix_key = grad_key if prefix_key is None else zeros(prefix_key)
    grad_prefix_value = grad_value if prefix_value is None else zeros(prefix_value)
    for tile in run.tiles:
        rows, length = slice(tile.begin, tile.end), tile.prefix_length
        scaled, grads = run.grouped(query[rows]) * scale, run.grouped(grad_out[rows])
        weights = run.scores(tile, scaled).sub_(run.grouped(lse[rows, :, None])).exp_()
        kept = run.kept(weights)
        dropped = weights if kept is None else weights * kept
        seen_values, own_values = run.parts(tile, run.prefix_values, run.values)
        seen_keys, own_keys = run.parts(tile, run.prefix_keys, run.keys)
        grad_scores = torch.empty_like(weights)
        torch.bmm(grads, own_values.transpose(1, 2), out=grad_scores[..., length:])
        torch.bmm(grads, seen_values.transpose(1, 2), out=grad_scores[..., :length])
        if kept is not None:
            grad_scores.mul_(kept)
        balance = (grads * run.grouped(out[rows])).sum(dim=-1, keepdim=True)
        grad_scores.sub_(balance).mul_(weights)
        summed = torch.bmm(grad_scores[..., length:], own_keys)
        own = slice(tile.first, tile.end)
        grad_value[:, own].baddbmm_(dropped[..., length:].transpose(1, 2), grads)
        grad_key[:, own].baddbmm_(grad_scores[..., length:].transpose(1, 2), scaled)
        if length:
            summed.baddbmm_(grad_scores[..., :length], seen_keys)
            seen = slice(tile.prefix_begin, tile.prefix_end)
            grad_prefix_value[:, seen].baddbmm_(dropped[..., :length].transpose(1, 2), grads)
            grad_prefix_key[:, seen].baddbmm_(grad_scores[..., :length].transpose(1, 2), scaled)
        grad_query[rows] = run.ungrouped(summed.mul_(scale))
    results = [x.transpose(0, 1).to(query.dtype) for x in (grad_key, grad_value)]
    for given, grad in ((prefix_key, grad_prefix_key), (prefix_value, grad_prefix_value)):
        results.append(key.new_empty(0) if given is None else grad.transpose(0, 1).to(query.dtype))
    return grad_query, results[0], results[1], results[2], results[3]


def _or_own(given: Tensor | None, own: Tensor) -> Tensor:
    return own if given is None else given
