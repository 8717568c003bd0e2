# SPDX-License-Identifier: Apache-2.0
"""Keys and values of the tokens that a search feeds after the prompts: a tree per user, every row stored once."""

from __future__ import annotations

import torch
from torch import Tensor

Partial = tuple[Tensor, Tensor, "Tensor | None"]
"""Unnormalised attention, its largest score, and the sum of exponentials; None where that is 1."""


class Suffixes:
    """A pool of rows, each with the row it continues, so that any row fed so far can be continued at any time.

    Rows are numbered in the order in which they are fed, over all passes. A row sees itself and the rows on its way to
    the prompt; which ones is found by following parents on the device, without waiting for it. The pool grows with what
    is fed, by doubling up to ``max_rows``; rows that nothing will continue can be given back, see `keep`.

    Args:
        max_rows: rows kept at most.
        device: of the model.
    """

    def __init__(self, max_rows: int, device: torch.device) -> None:
        self.num_rows = 0
        self.max_rows = max_rows
        self._parent = torch.full((0,), -1, dtype=torch.int64, device=device)  # (num_rows,)
        self._before = torch.zeros(0, 0, dtype=torch.int64, device=device)  # (N, depth - 1) rows seen, any for none
        self._hidden = self._before.new_zeros(0, 1, 0, dtype=torch.bool)  # (N, 1, depth - 1) where there is none
        self._pool: dict[int, tuple[Tensor, Tensor]] = {}  # per layer (Hkv, capacity, d)
        self._capacity = 0
        self._kept: Tensor | None = None  # rows of the last pass that are still there, by new number; None: all
        self._to_keep: Tensor | None = None  # the same, for the next pass

    def advance(self, parent: Tensor, depth: int | None = None) -> Tensor:
        """Choose the rows of the next pass.

        Args:
            parent: ``(N,)`` int64, the row that each new one continues, -1 the prompt. New rows are ``num_rows``,
                ``num_rows + 1``, ... and may continue each other.
            depth: rows from the first after the prompt to the deepest new one, both included; more costs time, nothing
                else. Found with host synchronisations where not given.

        Returns:
            ``(N,)`` int64, the depth of each new row: 1 where it follows the prompt.
        """
        first, self.num_rows = self.num_rows, self.num_rows + len(parent)
        if self.num_rows > self.max_rows:
            raise ValueError(f"max_rows: expected at least {self.num_rows}, got {self.max_rows}")
        self._kept, self._to_keep = self._to_keep, None
        if self._kept is not None:
            self._capacity = self.num_rows
        elif self.num_rows > self._capacity:
            self._capacity = min(max(self.num_rows, 2 * self._capacity), self.max_rows)
        self._parent = torch.cat([self._parent, parent])
        chain = self._ancestors(torch.arange(first, self.num_rows, device=parent.device), depth)
        self._before, is_row = chain[:, 1:].clamp(min=0), chain >= 0
        self._hidden = is_row[:, None, 1:].logical_not()
        return is_row.sum(dim=1)

    def live(self, rows: Tensor, depth: int) -> Tensor:
        """``(num_rows,)`` bool: the given rows and all on their way to the prompt.

        Args:
            rows: int64 of any shape, -1 for none.
            depth: at least that of the deepest of them.
        """
        is_live = torch.zeros(self.num_rows + 1, dtype=torch.bool, device=rows.device)
        is_live[self._ancestors(rows.flatten(), max(depth, 1))] = True  # -1 is the last, which stands for none
        return is_live[:-1]

    def keep(self, is_live: Tensor, count: int) -> Tensor:
        """Give the other rows back and number those that stay anew, in their order.

        Args:
            is_live: ``(num_rows,)`` bool, with every row also those before it. At most once between two passes.
            count: how many.

        Returns:
            ``(num_rows + 1,)`` int64, each row's new number, or any number for those given back; -1 stays -1.
        """
        self._to_keep = is_live.logical_not().to(torch.int8).argsort(stable=True)[:count]
        number = torch.cat([is_live.cumsum(0) - 1, self._to_keep.new_full((1,), -1)])
        self._parent = number[self._parent[self._to_keep]]
        self.num_rows = count
        return number

    def forget(self) -> None:
        """Make room: no row fed so far can be continued any more."""
        self.num_rows, self._parent, self._to_keep = 0, self._parent[:0], None

    def _ancestors(self, rows: Tensor, depth: int | None) -> Tensor:
        """(n, depth): each row and those before it, -1 behind."""
        chain = [rows]
        while depth is None or len(chain) < depth:
            above = self._parent[chain[-1].clamp(min=0)].masked_fill_(chain[-1] < 0, -1)
            if depth is None and bool((above < 0).all()):
                break
            chain.append(above)
        return torch.stack(chain, dim=1)

    def partial(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Partial | None:
        """Store the new rows of one layer, then attend to the rows before each, not itself; see `partial_softmax`.

        Args:
            layer: its number.
            query: ``(N, Hkv, G, d)``, scaled.
            key, value: ``(N, Hkv, 1, d)``.

        Returns:
            ``(N, Hkv, G, d)`` and twice ``(N, Hkv, G, 1)``; None where all rows follow the prompt.
        """
        keys, values = (
            self._stored(old, new[:, :, 0].transpose(0, 1))
            for old, new in zip(self._pool.get(layer, (None, None)), (key, value), strict=True)
        )
        self._pool[layer] = keys, values
        # heads outermost: what is gathered is then one batch of matrices, without another copy
        shape = (len(keys), *self._before.shape, -1)
        if self._before.shape[1] == 0:
            return None
        rows = self._before.flatten()
        keys, values = (x.index_select(1, rows).view(shape) for x in (keys, values))
        out, peak, total = partial_softmax(query.transpose(0, 1), keys, values, self._hidden)
        return out.transpose(0, 1), peak.transpose(0, 1), total.transpose(0, 1)

    def _stored(self, pool: Tensor | None, new: Tensor) -> Tensor:
        """The pool, larger if need be, with the pass' rows (Hkv, N, d) at its end."""
        n_old = self.num_rows - new.shape[1]
        if pool is not None and self._kept is not None:
            return torch.cat([pool.index_select(1, self._kept), new], dim=1)
        if pool is None or pool.shape[1] < self._capacity:
            larger = new.new_empty(len(new), self._capacity, new.shape[2])
            if pool is not None:
                larger[:, :n_old] = pool[:, :n_old]
            pool = larger
        pool[:, n_old : self.num_rows] = new
        return pool


def partial_softmax(
    query: Tensor, keys: Tensor, values: Tensor, hidden: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Unnormalised attention (..., R, d), with the largest score and the sum of exponentials (..., R, 1) beside it.

    At least float32. A row that has all its keys hidden gets zeros, and a peak below all others.
    """
    scores = query @ keys.transpose(-1, -2)
    if scores.dtype in (torch.float16, torch.bfloat16):
        scores = scores.float()
    if hidden is not None:
        scores.masked_fill_(hidden, float("-inf"))
    peak = scores.amax(dim=-1, keepdim=True).clamp_(min=torch.finfo(scores.dtype).min)
    weights = scores.sub_(peak).exp_()
    total = weights.sum(dim=-1, keepdim=True)
    return (weights.to(values.dtype) @ values).to(weights.dtype), peak, total
