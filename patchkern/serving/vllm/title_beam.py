# SPDX-License-Identifier: Apache-2.0
"""A beam search for one user's titles, whose log-probabilities come from elsewhere; as `patchkern.search.title_search`.

A step of it asks what may follow some beginnings of titles, and takes the answers. An engine that keeps prompts' keys
and values computes one row for each beginning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from patchkern.search.trie import Trie


class HostTrie:
    """A tree of titles as arrays on the host, for small steps."""

    def __init__(self, trie: Trie) -> None:
        self.tokens, self.children = trie.tokens.numpy(), trie.children.numpy()
        self.begin, self.own_end = trie.begin.numpy(), trie.own_end.numpy()
        self.items, self.first_item = trie.items.numpy(), trie.first_item.numpy()
        self.depth = trie.depth

    def follow(self, node: int, token: int) -> int | None:
        """The child of a node by a token, None where there is none."""
        begin, end = self.children[node : node + 2].tolist()
        place = begin + int(np.searchsorted(self.tokens[begin:end], token))
        return place if place < end and self.tokens[place] == token else None

    def own_items(self, node: int) -> NDArray[np.int64]:
        """Catalogue positions of the items whose title ends here, ascending."""
        own: NDArray[np.int64] = self.items[self.begin[node] : self.own_end[node]]
        return own


class _Beginning(NamedTuple):
    score: float
    node: int
    tokens: tuple[int, ...]


class TitleBeam:
    """One user's search.

    Args:
        trie: the titles.
        k: titles wanted.
        num_beams: beginnings that a step goes on with.
    """

    def __init__(self, trie: HostTrie, k: int, num_beams: int) -> None:
        self._trie, self._k, self._num_beams = trie, k, num_beams
        self._beginnings = [_Beginning(0.0, 0, ())]
        self._found: list[tuple[float, int]] = []

    @property
    def beginnings(self) -> list[tuple[int, ...]]:
        """Token ids after which the next token's log-probabilities are asked for; none where the search is done."""
        return [beginning.tokens for beginning in self._beginnings]

    @property
    def choices(self) -> int:
        """How many of the best next tokens an answer must hold: one of them may end a title and does not go on."""
        return self._num_beams + 1

    def take(self, answers: Sequence[Mapping[int, float]]) -> None:
        """Go a step further.

        Args:
            answers: for each of `beginnings` its most probable next tokens with their log-probabilities, over the
                whole vocabulary: the best `choices` of those that lead to an item which the user may get, no others.

        Raises:
            ValueError: a token that no title has there.
        """
        made = []
        for beginning, answer in zip(self._beginnings, answers, strict=True):
            for token, log_prob in answer.items():
                node = self._trie.follow(beginning.node, token)
                if node is None:
                    raise ValueError(f"answer: expected tokens of titles after {list(beginning.tokens)}, got {token}")
                made.append(_Beginning(beginning.score + log_prob, node, (*beginning.tokens, token)))
        trie = self._trie
        self._found += [(one.score, one.node) for one in made if trie.own_items(one.node).size]
        self._found = sorted(self._found, key=lambda found: (-found[0], trie.own_items(found[1])[0]))[: self._k]
        worst = self._found[-1][0] if len(self._found) == self._k else -np.inf
        longer = [one for one in made if trie.children[one.node] < trie.children[one.node + 1] and one.score >= worst]
        longer.sort(key=lambda one: (-one.score, trie.first_item[one.node]))
        self._beginnings = longer[: self._num_beams]

    def items(self, may: Any) -> list[tuple[int, float]]:
        """The first ``k`` items of the titles found, best first, as catalogue positions and scores.

        Args:
            may: from an array of catalogue positions to which of them the user may get.
        """
        every: list[tuple[int, float]] = []
        for score, node in self._found:
            own = self._trie.own_items(node)
            every += [(item, score) for item in own[may(own)].tolist()]
        return every[: self._k]
