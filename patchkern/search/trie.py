# SPDX-License-Identifier: Apache-2.0
"""The prefix tree of all titles, as flat arrays: what a search may generate, and which items lie below each choice."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from patchkern.batch.catalog import Catalog


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
        level: ``(n_nodes,)`` int64, tokens that lead to ``v``; 0 for the root.
        longest: ``(n_nodes,)`` int64, tokens in the longest sequence that goes through ``v`` or ends there.
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
    level: Tensor
    longest: Tensor
    depth: int
    end_length: int

    @classmethod
    def from_catalog(
        cls,
        catalog: Catalog,
        response_end: Sequence[int],
        leaves_only: bool = False,
        items: NDArray[np.int64] | None = None,
    ) -> Trie:
        """Build the tree.

        Args:
            catalog: the titles; those with equal tokens share one end node.
            response_end: tokens that close every title. Without them a title that begins another one ends at an
                inner node.
            leaves_only: leave out the titles that begin another title, as the PatchRec authors' tree does, which
                cannot stop before the longer one ends.
            items: catalogue indices, to build the tree of these alone; each at most once.

        Raises:
            ValueError: an empty catalogue, or no items.
        """
        if len(catalog) == 0 or (items is not None and len(items) == 0):
            raise ValueError("catalog: expected at least one item to search for, got none")
        items = np.arange(len(catalog), dtype=np.int64) if items is None else np.sort(items)
        if leaves_only:
            titles = _Sorted.of(_sequences(catalog, items, ()))
            begins_another = np.append(titles.shared[1:] == titles.lengths[:-1], False)
            items = items[np.sort(titles.order[~np.repeat(begins_another, np.diff(titles.offsets))])]
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
        rows = np.append(0, first_row), np.append(n_rows, last_row)
        arrays = {
            "tokens": np.append(-1, sequences.rows[first_row, level]),
            "children": 1 + np.append(0, np.cumsum(np.bincount(parent, minlength=level.size + 1))),
            "begin": begin,
            "end": end,
            "own_end": np.append(0, sequences.offsets[own_end]),
            "items": items,
            "first_item": _over_ranges(np.minimum, items, begin, end),
            "level": np.append(0, level + 1),
            "longest": _over_ranges(np.maximum, sequences.lengths, *rows),
        }
        tensors = {name: torch.from_numpy(array.astype(np.int64)) for name, array in arrays.items()}
        return cls(**tensors, depth=depth, end_length=end_length)

    @property
    def num_nodes(self) -> int:
        """Nodes, the root included."""
        return self.tokens.shape[0]

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        values = [getattr(self, field.name) for field in fields(self)]
        return sum(value.nbytes for value in values if isinstance(value, Tensor))

    @property
    def num_titles(self) -> int:
        """Distinct titles."""
        return len(self.titles)

    @functools.cached_property
    def num_first_tokens(self) -> int:
        """Distinct tokens that titles begin with."""
        return int(self.children[1]) - 1

    @functools.cached_property
    def titles(self) -> Tensor:
        """``(n_titles,)`` int64, the nodes where titles end, in the order of their items' ranks."""
        ends = (self.own_end > self.begin).nonzero()[:, 0]
        return ends[self.begin[ends].argsort()]

    @functools.cached_property
    def title_of_item(self) -> Tensor:
        """``(n_items,)`` int64, which of `titles` each item has; items in catalogue order."""
        counts = (self.own_end - self.begin)[self.titles]
        numbers = torch.arange(len(counts), device=counts.device)
        return numbers.repeat_interleave(counts, output_size=len(self.items))[self.items.argsort()]

    def to(self, device: torch.device | str) -> Trie:
        """The same tree on ``device``."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {name: x.to(device) for name, x in values.items() if isinstance(x, Tensor)}
        return replace(self, **moved)

    def fed_rows(self, num_beams: int) -> int:
        """Tokens that a beam search may feed per user: in each step at most ``num_beams``, and no last ones."""
        return int(np.minimum(self._fed_at_level.sum(axis=1), num_beams).sum())

    def live_rows(self, num_beams: int) -> int:
        """Tokens of a user that a beam search may have to keep in one step: those that lead to its hypotheses."""
        widths = self._fed_at_level[:, ::-1].cumsum(axis=1)[:, ::-1]  # [j, l]: nodes of level j that lead to level l
        return int(np.triu(np.minimum(widths, num_beams)).sum(axis=0).max(initial=0))

    @functools.cached_property
    def _fed_at_level(self) -> NDArray[np.int64]:
        """(depth - 1, depth - 1) number of inner nodes by their level and by the level to which they lead, both - 1."""
        level, longest = self.level.cpu().numpy(), self.longest.cpu().numpy()
        inner = (self.children.diff() > 0).cpu().numpy() & (level > 0)
        count = np.zeros((self.depth - 1, self.depth - 1), np.int64)
        np.add.at(count, (level[inner] - 1, longest[inner] - 2), 1)
        return count

    def passes(self, nodes_per_pass: int) -> list[TreePass]:
        """Cut all titles into trees that feed about ``nodes_per_pass`` tokens each, at most ``depth - 1`` more."""
        host = self.to("cpu")
        tensors = (host.tokens, host.begin, host.own_end, host.end, host.children, host.level, host.titles)
        tokens, begin, own_end, end, children, level, titles = (x.numpy() for x in tensors)
        parent_of = np.append(-1, np.repeat(np.arange(self.num_nodes), np.diff(children)))
        inner = np.flatnonzero(children[:-1] < children[1:])[1:]
        # every inner node is new to the first title that goes through it
        added = np.bincount(np.searchsorted(begin[titles], begin[inner], side="right") - 1, minlength=titles.size)
        number = np.maximum(added.cumsum() - 1, 0) // nodes_per_pass
        cuts = np.append(np.flatnonzero(np.diff(number, prepend=-1)), titles.size)
        # the nodes of a level stand in the order of their ranks, so those of a pass are adjacent
        from_rank, to_rank = begin[titles[cuts[:-1]]], own_end[titles[cuts[1:] - 1]]
        borders = np.searchsorted(level, np.arange(1, self.depth + 2))
        of_level = [slice(*pair) for pair in itertools.pairwise(borders.tolist())]
        firsts = [at.start + np.searchsorted(end[at], from_rank, side="right") for at in of_level]
        lasts = [at.start + np.searchsorted(begin[at], to_rank) for at in of_level]
        passes = []
        for number_of_pass, (first, last) in enumerate(itertools.pairwise(cuts.tolist())):
            spans = zip(firsts, lasts, strict=True)
            nodes = np.concatenate([np.arange(x[number_of_pass], y[number_of_pass]) for x, y in spans])
            passes.append(self._pass(nodes, parent_of[nodes], level[nodes], tokens, titles[first:last]))
        return passes

    def _pass(
        self,
        nodes: NDArray[np.int64],
        parents: NDArray[np.int64],
        level: NDArray[np.int64],
        tokens: NDArray[np.int64],
        titles: NDArray[np.int64],
    ) -> TreePass:
        later = level > 1
        fed = np.unique(parents[later])
        above = np.searchsorted(fed, parents[np.searchsorted(nodes, fed)])
        above[: int((level[np.searchsorted(nodes, fed)] == 1).sum())] = -1
        arrays = (
            tokens[fed],
            above,
            tokens[nodes],
            np.searchsorted(fed, parents[later]),
            np.searchsorted(nodes, parents[later]),
            np.searchsorted(nodes, titles),
        )
        device = self.tokens.device
        a, b, c, d, e, f = (torch.from_numpy(array.astype(np.int64)).to(device) for array in arrays)
        level_ends = tuple(np.searchsorted(level, np.arange(1, level.max() + 1), side="right").tolist())
        return TreePass(a, b, c, level_ends, d, e, f)

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

    def best_of(self, values: Tensor) -> BestValues:
        """The largest of some values of items at and below every node, as many operations as the tree has levels.

        Args:
            values: ``(B, n_catalog)``, -inf for what a user may not get.
        """
        n_users, (parents, levels) = len(values), self._climb
        at = values.new_full((n_users, self.num_nodes), float("-inf"))
        at.scatter_reduce_(1, self.titles[self.title_of_item].expand(n_users, -1), values, "amax")
        below = torch.full_like(at, float("-inf"))
        for level in reversed(levels):
            reached = torch.maximum(at[:, level], below[:, level])
            below.scatter_reduce_(1, parents[level].expand(n_users, -1), reached, "amax")
        return BestValues(values, at, below)

    @functools.cached_property
    def _climb(self) -> tuple[Tensor, list[slice]]:
        """Every node's parent (the root is its own), and the nodes of each level, from the first."""
        numbers = torch.arange(self.num_nodes, device=self.tokens.device)
        parents = numbers.repeat_interleave(self.children.diff(), output_size=self.num_nodes - 1)
        borders = self.level.bincount().cumsum(0).tolist()
        return torch.cat([numbers[:1], parents]), [slice(*pair) for pair in itertools.pairwise(borders)]


class BestValues(NamedTuple):
    """Values of items, and how good they get in each part of the tree."""

    items: Tensor  # (B, n_catalog), -inf for what a user may not get
    at: Tensor  # (B, n_nodes) the largest of the items whose sequence ends at the node; -inf where there is none
    below: Tensor  # (B, n_nodes) the largest of those whose sequence goes on from there

    def expand(self, n_users: int) -> BestValues:
        """The same, of one user for all, or as it is."""
        return BestValues(*(x.expand(n_users, -1) for x in self))


class TreePass(NamedTuple):
    """Some titles as a tree, with the tokens on their way; nodes in the order of their levels.

    Whatever another token follows is fed to a model, and its output scores that other token.
    """

    fed: Tensor  # (F,) tokens to feed
    above: Tensor  # (F,) the fed token before each, -1 the prompt
    tokens: Tensor  # (R,) all tokens
    level_ends: tuple[int, ...]  # where each level's tokens end; those of the first follow the prompt
    source: Tensor  # (R - level_ends[0],) the fed token before each of the others
    parent: Tensor  # (R - level_ends[0],) the same token's place among all
    ends: Tensor  # (n,) last tokens of the titles, in the order of `Trie.titles`


def _over_ranges(
    reduce: np.ufunc, values: NDArray[np.int64], begin: NDArray[np.int64], end: NDArray[np.int64]
) -> NDArray[np.int64]:
    """``reduce`` over every ``values[begin:end]``; no range is empty."""
    # reduceat over begin, end, begin, end, ...: every other result is that of one range
    return reduce.reduceat(np.append(values, values[-1]), np.stack([begin, end], axis=1).ravel())[::2]


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
