# SPDX-License-Identifier: Apache-2.0
"""Which tokens may come next in titles that are being written, each for a request with items of its own.

Nothing here knows vLLM. A batch's requests are arrays: one search finds where every title has come to, and one
operation over all children of all requests says which tokens lead to an item that its request may get.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from patchkern.search.trie import Trie

ENDED = -1
"""the node of a title that has ended, or of a request that may get nothing"""


@dataclass
class Writing:
    """One request: the items that it may get, and how far it has come.

    Attributes:
        listed: ``(m,)`` int64 distinct catalogue positions, ascending.
        is_allowed: whether those are all that it may get, or all that it may not.
        output: token ids generated so far, as the engine goes on filling them in.
        begun: token ids of its title that were in the prompt.
    """

    listed: NDArray[np.int64]
    is_allowed: bool
    output: Sequence[int] = ()
    begun: Sequence[int] = ()
    node: int = 0
    read: int = 0
    """of `begun` and then `output`, how many tokens led to `node`"""
    ranks: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))

    def next_token(self) -> int | None:
        """The token after those that led to `node`; None where it is not known yet."""
        place = self.read - len(self.begun)
        if place < 0:
            return self.begun[self.read]
        return self.output[place] if place < len(self.output) and self.output[place] >= 0 else None


class TitleMasks:
    """Masks over the vocabulary, from a tree of all titles.

    Args:
        trie: of the catalogue's titles with their ``response_end``, on the CPU.
        end: the token that is allowed where nothing else is.
        device: of the logits.
    """

    def __init__(self, trie: Trie, end: int, device: torch.device | str) -> None:
        self._tokens, self._children = trie.tokens.numpy(), trie.children.numpy()
        self._end = end
        self._n_items = trie.items.shape[0]
        self._rank_of = np.empty(self._n_items, np.int64)
        self._rank_of[trie.items.numpy()] = np.arange(self._n_items)
        # nodes in the order of (parent, token), so that one search follows any number of titles by a token
        self._stride = int(self._tokens.max(initial=0)) + 1
        parents = np.repeat(np.arange(trie.num_nodes), np.diff(self._children))
        self._steps = parents * self._stride + self._tokens[1:]
        self._device = torch.device(device)
        self._on_device = tuple(x.to(device) for x in (trie.tokens, trie.children, trie.begin, trie.end))

    def begin(self, writing: Writing) -> None:
        """Make a request ready: one with no item left to get has ended before it began."""
        inside = writing.listed[writing.listed < self._n_items]
        writing.ranks = np.sort(self._rank_of[inside])
        left = inside.size if writing.is_allowed else self._n_items - inside.size
        writing.node = 0 if left else ENDED
        writing.read = 0

    def advance(self, writings: Sequence[Writing]) -> None:
        """Follow the tokens that have come since the last call."""
        while True:
            steps = [(writing, token) for writing in writings if (token := writing.next_token()) is not None]
            if not steps:
                return
            nodes = np.array([writing.node for writing, _ in steps], np.int64)
            tokens = np.array([token for _, token in steps], np.int64)
            wanted = nodes * self._stride + tokens
            place = np.minimum(np.searchsorted(self._steps, wanted), self._steps.size - 1)
            found = (self._steps[place] == wanted) & (nodes >= 0) & (tokens < self._stride)
            for (writing, _), node in zip(steps, np.where(found, place + 1, ENDED).tolist(), strict=True):
                writing.node = node
                writing.read += 1

    def apply(self, logits: Tensor, rows: Sequence[int], writings: Sequence[Writing]) -> Tensor:
        """Set to -inf, in these rows, what does not lead to an item that the row's request may get; in place.

        Args:
            logits: ``(N, V)``.
            rows: ``n`` of its rows.
            writings: the request of each.
        """
        if not rows:
            return logits
        owner_rows = torch.tensor(list(rows), device=self._device)
        at = np.array([writing.node for writing in writings], np.int64)
        counts = np.where(at < 0, 0, self._children[at + 1] - self._children[np.maximum(at, 0)])
        total = int(counts.sum())
        tokens, children, begin, end = self._on_device
        nodes = torch.from_numpy(at).to(self._device)
        n_children = torch.from_numpy(counts).to(self._device)
        owner = torch.arange(len(rows), device=self._device).repeat_interleave(n_children, output_size=total)
        first = children[nodes.clamp(min=0)] - (n_children.cumsum(0) - n_children)
        child = torch.arange(total, device=self._device) + first[owner]
        may = self._may(child, owner, writings, begin, end)
        row, token = owner_rows[owner[may]], tokens[child[may]]
        kept = logits[row, token]
        ending = owner_rows[torch.bincount(owner[may], minlength=len(rows)) == 0]
        logits[owner_rows] = float("-inf")
        logits[row, token] = kept
        logits[ending, self._end] = 0.0
        return logits

    def _may(self, child: Tensor, owner: Tensor, writings: Sequence[Writing], begin: Tensor, end: Tensor) -> Tensor:
        """``(C,)`` bool, which children have an item below them that their request may get."""
        items = end[child] - begin[child]
        if not any(writing.ranks.size for writing in writings):
            return items > 0
        # all lists as one ascending array, a range of ranks for each request
        width = self._n_items + 1
        listed = np.concatenate([number * width + writing.ranks for number, writing in enumerate(writings)])
        keys = torch.from_numpy(listed).to(self._device)
        offset = owner * width
        inside = torch.searchsorted(keys, offset + end[child]) - torch.searchsorted(keys, offset + begin[child])
        allowed = torch.tensor([writing.is_allowed for writing in writings], device=self._device)
        return torch.where(allowed[owner], inside > 0, items - inside > 0)


def mask_items(logits: Tensor, first: int, rows: Sequence[int], writings: Sequence[Writing]) -> Tensor:
    """Set to -inf, in these rows, all but the items that the row's request may get; in place.

    Token 0, which is no item, is what is left for a request that may get nothing.

    Args:
        logits: ``(N, first + n_items)``; column ``first + i`` is item i.
        first: tokens before the items.
        rows: ``n`` of its rows.
        writings: the request of each.
    """
    n_items = logits.shape[1] - first
    listed = [writing.listed[writing.listed < n_items] for writing in writings]
    sizes = np.array([places.size for places in listed], np.int64)
    is_allowed = np.array([writing.is_allowed for writing in writings], bool)
    row = np.repeat(np.array(rows, np.int64), sizes)
    place = np.concatenate([first + places for places in listed]) if len(listed) else np.zeros(0, np.int64)
    of_allowed = np.repeat(is_allowed, sizes)
    barred = _pairs(row[~of_allowed], place[~of_allowed], logits)
    allowed = _pairs(row[of_allowed], place[of_allowed], logits)
    kept = logits[allowed]
    logits[barred] = float("-inf")
    logits[torch.from_numpy(np.array(rows, np.int64)[is_allowed]).to(logits.device)] = float("-inf")
    logits[allowed] = kept
    nothing = np.array(rows, np.int64)[np.where(is_allowed, sizes, n_items - sizes) == 0]
    logits[_pairs(nothing, np.zeros_like(nothing), logits)] = 0.0
    return logits


def _pairs(rows: NDArray[np.int64], places: NDArray[np.int64], like: Tensor) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(rows).to(like.device), torch.from_numpy(places).to(like.device)
