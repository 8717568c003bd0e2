# SPDX-License-Identifier: Apache-2.0
"""The prefix tree of all titles, as flat arrays: what a search may generate, and which items lie below each choice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from patchkern.catalog import Catalog


@dataclass(frozen=True)
class Trie:
    """Every token sequence ``title + response_end`` of a catalogue; node 0 is the root.

    Nodes are numbered level by level, so the children of a node have adjacent numbers (ascending in their tokens).
    Items are ranked in depth-first order, so those below a node have adjacent ranks, the node's own first. Whether a
    node leads to an item that a user may get is therefore the difference of two entries of a running count, see
    `running_count`.

    Attributes:
        tokens: ``(n_nodes,)`` int64, the token that leads to the node; -1 for the root.
        children: ``(n_nodes + 1,)`` int64; the children of ``v`` are nodes ``children[v]..children[v + 1]``.
        begin, end: ``(n_nodes,)`` int64; ranks ``begin[v]..end[v]`` are the items below ``v``, its own included.
        own_end: ``(n_nodes,)`` int64; ranks ``begin[v]..own_end[v]`` are the items whose sequence ends at ``v``: none,
            one, or all items that share a title, in catalogue order.
        items: ``(n_items,)`` int64, catalogue index of each rank.
        first_item: ``(n_nodes,)`` int64, the lowest catalogue index below ``v``; orders equal scores.
        depth: tokens in the longest sequence.
        end_length: tokens of ``response_end``.
    """

    tokens: Tensor
    children: Tensor
    begin: Tensor
    end: Tensor
    own_end: Tensor
    items: Tensor
    first_item: Tensor
    depth: int
    end_length: int

    @classmethod
    def from_catalog(cls, catalog: Catalog, response_end: Sequence[int], leaves_only: bool = False) -> Trie:
        """Build the tree.

        Args:
            catalog: the titles; those with equal tokens share one end node.
            response_end: tokens that close every title. Without them a title that begins another one ends at an
                inner node.
            leaves_only: leave out the titles that begin another title, as the PatchRec authors' tree does, which
                cannot stop before the longer one ends.

        Raises:
            ValueError: an empty catalogue.
        """
        if len(catalog) == 0:
            raise ValueError("catalog: expected at least one item to search for, got none")
        items = np.arange(len(catalog))
        if leaves_only:
            titles = _Sorted.of(_sequences(catalog, items, ()))
            begins_another = np.append(titles.shared[1:] == titles.lengths[:-1], False)
            items = np.sort(titles.order[~np.repeat(begins_another, np.diff(titles.offsets))])
        sequences = _Sorted.of(_sequences(catalog, items, tuple(response_end)))
        return cls._from_sorted(sequences, items[sequences.order], len(response_end))

    @classmethod
    def _from_sorted(cls, sequences: _Sorted, items: NDArray[np.int64], end_length: int) -> Trie:
        n_rows, depth = sequences.rows.shape
        levels = np.arange(depth)[:, None]
        starts = (sequences.shared <= levels) & (levels < sequences.lengths)  # (depth, n_rows): a new node
        level, first_row = np.nonzero(starts)
        level_start = np.searchsorted(level, np.arange(depth + 1))
        parent = np.zeros_like(level)
        last_row = np.empty_like(level)
        started = np.cumsum(starts, axis=1)
        for at in range(depth):
            nodes = slice(level_start[at], level_start[at + 1])
            # a node ends before the next row that shares fewer tokens than lead to it
            breaks = np.append(np.flatnonzero(sequences.shared <= at), n_rows)
            last_row[nodes] = breaks[np.searchsorted(breaks, first_row[nodes], side="right")]
            if at:  # the root has number 0, so the c-th node of the level above has number level_start + c
                parent[nodes] = level_start[at - 1] + started[at - 1, first_row[nodes]]
        own_end = first_row + (sequences.lengths[first_row] == level + 1)
        begin = np.append(0, sequences.offsets[first_row])
        end = np.append(items.size, sequences.offsets[last_row])
        # reduceat over begin, end, begin, end, ...: every other result is the minimum of one range
        lowest = np.minimum.reduceat(np.append(items, items.max()), np.stack([begin, end], axis=1).ravel())[::2]
        arrays = {
            "tokens": np.append(-1, sequences.rows[first_row, level]),
            "children": 1 + np.append(0, np.cumsum(np.bincount(parent, minlength=level.size + 1))),
            "begin": begin,
            "end": end,
            "own_end": np.append(0, sequences.offsets[own_end]),
            "items": items,
            "first_item": lowest,
        }
        tensors = {name: torch.from_numpy(array.astype(np.int64)) for name, array in arrays.items()}
        return cls(**tensors, depth=depth, end_length=end_length)

    @property
    def num_nodes(self) -> int:
        """Nodes, the root included."""
        return self.tokens.shape[0]

    @property
    def num_titles(self) -> int:
        """Distinct titles."""
        return int((self.own_end > self.begin).sum())

    def to(self, device: torch.device | str) -> Trie:
        """The same tree on ``device``."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {name: x.to(device) for name, x in values.items() if isinstance(x, Tensor)}
        return replace(self, **moved)

    def running_count(self, allowed: Tensor) -> Tensor:
        """Count allowed items by rank: ``running[u, end] - running[u, begin]`` is how many user ``u`` has in a range.

        Args:
            allowed: ``(B, n_catalog)`` bool, which items of the catalogue each user may get.

        Returns:
            ``(B, n_items + 1)`` int64.
        """
        running = allowed.new_zeros(allowed.shape[0], self.items.shape[0] + 1, dtype=torch.int64)
        torch.cumsum(allowed[:, self.items], dim=1, out=running[:, 1:])
        return running


class _Sorted(NamedTuple):
    """The distinct rows of a matrix, sorted, each before the rows that it begins."""

    rows: NDArray[np.int64]  # (m, depth), -1 behind a row's end
    lengths: NDArray[np.int64]  # (m,)
    shared: NDArray[np.int64]  # (m,) leading tokens in common with the row before
    order: NDArray[np.int64]  # (n,) the matrix's rows in this order, equal ones in their own order
    offsets: NDArray[np.int64]  # (m + 1,) row r stands for order[offsets[r]:offsets[r + 1]]

    @classmethod
    def of(cls, sequences: NDArray[np.int64]) -> _Sorted:
        order = np.lexsort(sequences.T[::-1])
        rows = sequences[order]
        differs = rows[1:] != rows[:-1]
        first = np.append(0, 1 + np.flatnonzero(differs.any(axis=1)))
        rows = rows[first]
        shared = np.append(0, differs[first[1:] - 1].argmax(axis=1))
        return cls(rows, (rows >= 0).sum(axis=1), shared, order, np.append(first, order.size))


def _sequences(catalog: Catalog, items: NDArray[np.int64], response_end: tuple[int, ...]) -> NDArray[np.int64]:
    """(n, longest) tokens of each item's title and the response end, -1 behind; ``items`` ascend."""
    chosen = np.zeros(len(catalog), bool)
    chosen[items] = True
    lengths = catalog.lengths[items][:, None]
    columns = np.arange(int(lengths.max()) + len(response_end))
    sequences = np.full((items.size, columns.size), -1, np.int64)
    sequences[columns < lengths] = catalog.token_ids[np.repeat(chosen, catalog.lengths)]
    is_end = (columns >= lengths) & (columns < lengths + len(response_end))
    sequences[is_end] = np.tile(np.asarray(response_end, np.int64), items.size)
    return sequences
