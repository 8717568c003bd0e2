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
            bare = cls.from_catalog(catalog, (), items=items)
            is_leaf = bare.children.diff()[bare.titles] == 0
            items = items[is_leaf[bare.title_of_item].numpy()]
        tokens, offsets = _sequences(catalog, items, response_end)
        return cls._of_sequences(tokens, offsets, items, len(response_end))

    @classmethod
    def _of_sequences(
        cls, tokens: NDArray[np.int32], offsets: NDArray[np.int64], items: NDArray[np.int64], end_length: int
    ) -> Trie:
        order, shared = _in_order(tokens, offsets)
        items = items[order]
        # every sequence adds the nodes that it does not share: this is depth-first order, from 1 on, behind the root
        added = np.diff(offsets)[order] - shared
        source = _ranges(offsets[order] + shared, added)
        first = np.repeat(np.arange(added.size), added)
        level = np.append(0, source - offsets[order][first] + 1)
        depth = int(level.max())
        token, begin = np.append(np.int32(-1), tokens[source]), np.append(0, first)
        del source, first
        # to the order of levels; the smallest dtype sorts in linear time
        place = level.astype(np.min_scalar_type(depth)).argsort(kind="stable")
        number = np.empty_like(place)
        number[place] = np.arange(place.size)
        own = np.bincount(number[added.cumsum()], minlength=place.size)
        del number
        token, begin, level = (x[place].astype(np.int64) for x in (token, begin, level))
        # a node's first child is the first node of the next level to come after it; without one this is the next one's
        place += level * place.size
        children = np.append(np.searchsorted(place, place + place.size), place.size)
        del place
        own += begin
        end, longest = own.copy(), level.copy()
        first_item = np.where(own > begin, items[begin], items.max() + 1)
        # upwards: the children of a level's nodes are the whole next level
        for below, at in itertools.pairwise(reversed(_levels(level))):
            inner = at.start + np.flatnonzero(np.diff(children[at.start : at.stop + 1]))
            groups = children[inner] - below.start
            end[inner] = end[children[inner + 1] - 1]
            longest[inner] = np.maximum.reduceat(longest[below], groups)
            first_item[inner] = np.minimum(first_item[inner], np.minimum.reduceat(first_item[below], groups))
        arrays = (token, children, begin, end, own, items, first_item, level, longest)
        a, b, c, d, e, f, g, h, i = (torch.from_numpy(array) for array in arrays)
        return cls(a, b, c, d, e, f, g, h, i, depth, end_length)

    @property
    def num_nodes(self) -> int:
        """Nodes, the root included."""
        return self.tokens.shape[0]

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors, and of the `subtrees` at most."""
        values = [getattr(self, field.name) for field in fields(self)]
        return sum(value.nbytes for value in values if isinstance(value, Tensor)) + 16 * self.num_nodes

    @functools.cached_property
    def num_first_tokens(self) -> int:
        """Distinct tokens that titles begin with."""
        return int(self.children[1]) - 1

    @functools.cached_property
    def subtrees(self) -> Subtrees:
        """The inner nodes subtree by subtree."""
        n_children = self.children.diff()
        inner = n_children.nonzero()[:, 0]
        # a node has a first item below it, which it shares with those on its way to the root alone
        key = self.begin[inner] * (self.depth + 1) + self.level[inner]
        key, order = key.sort()
        nodes = inner[order]
        place = torch.zeros_like(self.tokens)
        place[nodes] = torch.arange(len(nodes), device=nodes.device)
        count = torch.searchsorted(key, self.end * (self.depth + 1)) - place
        count.masked_fill_(n_children == 0, 0)
        parent = torch.arange(self.num_nodes, device=nodes.device).repeat_interleave(n_children)
        above = place[nodes] - place[torch.cat([parent[:1], parent])[nodes]]
        most = n_children.new_zeros(self.depth + 1).scatter_reduce_(0, self.level, n_children, "amax")
        most = most.flip(0).cummax(0).values.flip(0)
        return Subtrees(nodes.int(), place.int(), count.int(), above.int(), most.tolist())

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
        level, _, count = self._inner
        return int(np.minimum(np.bincount(level, count), num_beams).sum())

    def live_rows(self, num_beams: int) -> int:
        """Tokens of a user that a beam search may have to keep in one step: those that lead to its hypotheses."""
        level, longest, count = self._inner
        # of each level the nodes that lead furthest, num_beams of them; each is kept until the step that it leads to
        upto = count.cumsum()
        upto -= (upto - count)[np.searchsorted(level, level)]
        kept = (np.minimum(upto, num_beams) - (upto - count)).clip(min=0)
        change = np.bincount(level, kept, self.depth + 1) - np.bincount(longest, kept, self.depth + 1)
        return int(change.cumsum().max())

    @functools.cached_property
    def _inner(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Level, longest and number of the inner nodes with both, of a level the longest first; not of the root."""
        level, longest, children = (x.cpu().numpy() for x in (self.level, self.longest, self.children))
        inner = 1 + np.flatnonzero(np.diff(children[1:]))
        pairs, count = np.unique(level[inner] * (self.depth + 1) + self.depth - longest[inner], return_counts=True)
        return pairs // (self.depth + 1), self.depth - pairs % (self.depth + 1), count

    def passes(self, nodes_per_pass: int) -> list[TreePass]:
        """Cut all titles into trees that feed about ``nodes_per_pass`` tokens each, at most ``depth - 1`` more."""
        host = self.to("cpu")
        tensors = (host.tokens, host.begin, host.own_end, host.end, host.children, host.level, host.titles)
        tokens, begin, own_end, end, children, level, titles = (x.numpy() for x in tensors)
        parent_of = np.append(-1, np.repeat(np.arange(self.num_nodes), np.diff(children)))
        inner = 1 + np.flatnonzero(np.diff(children[1:]))
        # every inner node is new to the first title that goes through it
        added = np.bincount(np.searchsorted(begin[titles], begin[inner], side="right") - 1, minlength=titles.size)
        number = np.maximum(added.cumsum() - 1, 0) // nodes_per_pass
        cuts = np.append(np.flatnonzero(np.diff(number, prepend=-1)), titles.size)
        # a node belongs to every pass that has items below it
        first = np.searchsorted(own_end[titles[cuts[1:] - 1]], begin[1:], side="right")
        counts = np.searchsorted(begin[titles[cuts[:-1]]], end[1:]) - first
        node = np.repeat(np.arange(1, self.num_nodes), counts)
        number = _ranges(first, counts)
        nodes_of = np.split(node[number.argsort(kind="stable")], np.bincount(number).cumsum()[:-1])
        return [
            self._pass(nodes, parent_of[nodes], level[nodes], tokens, titles[slice(*own)])
            for nodes, own in zip(nodes_of, itertools.pairwise(cuts.tolist()), strict=True)
        ]

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


class Subtrees(NamedTuple):
    """The n inner nodes, those that something follows, in depth-first order: a node, then all below it. int32."""

    nodes: Tensor  # (n,)
    place: Tensor  # (n_nodes,) of the inner nodes, among them
    sizes: Tensor  # (n_nodes,) inner nodes at and below each node
    above: Tensor  # (n,) how many places before a node its parent stands; 0 for the root
    most_children: list[int]  # (depth + 1,) of a node of each level or a later one


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


def _in_order(tokens: NDArray[np.int32], offsets: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Order sequences lexicographically, each before those that it begins, equal ones as they were.

    Returns:
        The sequence at each place, and how many leading tokens it has in common with the one before.
    """
    order = np.arange(offsets.size - 1)
    shared = np.zeros_like(order)
    # two tokens at a time, of those only that are still equal to others: a long one costs no more than its own tokens
    place, group, depth = order.copy(), np.zeros_like(order), 0
    while place.size:
        at = order[place]
        start, stop = offsets[at] + depth, offsets[at + 1]
        # 0 behind the end
        one, two = (np.where(x < stop, tokens.take(x, mode="clip"), -1) + np.int64(1) for x in (start, start + 1))
        key = one << 32 | two
        sort = np.lexsort((key, group))
        order[place], one, two, key = at[sort], one[sort], two[sort], key[sort]
        follows = group[1:] == group[:-1]
        is_same = follows & (key[1:] == key[:-1])
        shared[place[1:][follows]] = depth + (one[1:] == one[:-1])[follows] + is_same[follows]
        goes_on = is_same & (two[1:] > 0)
        kept = np.append(False, goes_on) | np.append(goes_on, False)
        place, group, depth = place[kept], np.append(0, np.cumsum(~goes_on))[kept], depth + 2
    return order, np.minimum(shared, np.diff(offsets)[order])


def _sequences(
    catalog: Catalog, items: NDArray[np.int64], response_end: Sequence[int]
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Tokens of each item's title and the response end, one item after the other, and their offsets."""
    chosen = np.zeros(len(catalog), bool)
    chosen[items] = True
    offsets = np.append(0, (catalog.lengths[items].astype(np.int64) + len(response_end)).cumsum())
    end_places = offsets[1:, None] - np.arange(len(response_end), 0, -1)
    is_title = np.ones(offsets[-1], bool)
    is_title[end_places] = False
    tokens = np.empty(offsets[-1], np.int32)
    tokens[is_title] = catalog.token_ids[np.repeat(chosen, catalog.lengths)]
    tokens[end_places] = np.asarray(response_end, np.int32)
    return tokens, offsets


def _ranges(starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """``starts[0], starts[0] + 1, ...``, ``lengths[0]`` of them, and so on for every range."""
    ends = lengths.cumsum()
    places = np.arange(ends[-1] if ends.size else 0)
    places += np.repeat(starts - (ends - lengths), lengths)
    return places


def _levels(level: NDArray[np.int64]) -> list[slice]:
    """The nodes of each level, given the ascending levels of all nodes."""
    borders = np.searchsorted(level, np.arange(level[-1] + 2))
    return [slice(*pair) for pair in itertools.pairwise(borders.tolist())]
