# SPDX-License-Identifier: Apache-2.0
"""Yardsticks: recommenders without a model, which a model has to beat before it is useful.

Both are fitted on the training interactions alone and look at no more of a user than a model does: "unseen" leaves out
the items among the latest ``max_items`` before the target.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from patchkern.batch.arguments import check_count
from patchkern.batch.columns import id_array
from patchkern.data.interactions import Interactions, check_interactions, positions_of
from patchkern.data.samples import Samples

_SCORES_AT_ONCE = 1 << 22


class Ranking(NamedTuple):
    """Recommendations for many samples, best first.

    Attributes:
        items: ``(S, k)`` item ids.
        scores: ``(S, k)`` float64, falling; -inf where fewer than k items were left to recommend.
    """

    items: NDArray[Any]
    scores: NDArray[np.float64]

    def __repr__(self) -> str:
        samples, k = self.items.shape
        return f"Ranking({samples:,} samples, {k:,} items each)"

    def as_lists(self) -> list[list[tuple[Any, float]]]:
        """The form of `PatchedCausalLM.recommend`: per sample, ``[(item id, score), ...]``."""
        rows = zip(self.items.tolist(), self.scores.tolist(), strict=True)
        return [[pair for pair in zip(*row, strict=True) if pair[1] > -np.inf] for row in rows]

    def hit_rate(self, targets: ArrayLike, k: int) -> float:
        """The share of samples whose target is among the first ``k``.

        Raises:
            TypeError, ValueError: targets that are not one id per sample, of the items' kind; k longer than the lists.
        """
        samples, longest = self.items.shape
        check_count("k", k, minimum=1, maximum=longest)
        wanted = id_array(targets, "targets")
        if wanted.shape != (samples,):
            raise ValueError(f"targets: expected one per sample ({samples}), got shape {wanted.shape}")
        if samples and wanted.dtype.kind != self.items.dtype.kind:
            raise TypeError(f"targets: expected ids of dtype {self.items.dtype}, as the items, got {wanted.dtype}")
        hits = (self.items == wanted[:, None]) & (self.scores > -np.inf)
        return float(hits[:, :k].any(axis=1).mean()) if len(hits) else 0.0


def most_popular(
    interactions: Interactions, samples: Samples, k: int = 20, *, unseen: bool = False, max_items: int | None = 100
) -> Ranking:
    """Everybody gets the items with the most training interactions (ties: the one that occurs first in the data).

    Args:
        k: how many to recommend.
        unseen: leave out what is among the latest ``max_items`` (None: all) items before the target.

    Raises:
        ValueError: k outside 1..number of items, or a data set without training split.
    """
    item_ids, count = by_popularity(interactions, k)

    def score(part: Samples) -> NDArray[np.float64]:
        return np.tile(count.astype(np.float64), (part.users.size, 1))

    return rank(interactions, samples, item_ids, score, k, unseen, max_items)


def transitions(
    interactions: Interactions,
    samples: Samples,
    k: int = 20,
    *,
    recent: int = 10,
    unseen: bool = True,
    max_items: int | None = 100,
) -> Ranking:
    """Items that, in training, came soon after the user's latest ``recent`` items.

    ``count[a, b]`` is how often b came after a, within ``recent`` steps, in a training history; with ``popularity`` the
    training interactions of an item and ``h[j]`` the j-th latest item of the user (j = 1, 2, ...),

        score[b] = sum over j <= recent of  count[h[j], b] / sqrt(popularity[h[j]] * popularity[b]) / j

    Ties: the more popular item first.

    Args:
        k: how many to recommend.
        recent: how far back to look, when counting and when recommending.
        unseen: leave out what is among the latest ``max_items`` (None: all) items before the target.

    Raises:
        ValueError: k outside 1..number of items, ``recent`` below 1, or a data set without training split.

    Examples:
        >>> from patchkern.data import synthetic
        >>> from patchkern.evaluation import most_popular, transitions
        >>> data = synthetic(num_users=50, num_items=40, num_genres=4)
        >>> test = data.samples("test")
        >>> [round(find(data, test, k=5).hit_rate(data.targets(test), 5), 2) for find in (most_popular, transitions)]
        [0.12, 0.53]
    """
    check_count("recent", recent, minimum=1)
    item_ids, count = by_popularity(interactions, k)
    users, items = in_training(interactions)
    follows = Follows(users, positions_of(item_ids, items), count, recent)

    def score(part: Samples) -> NDArray[np.float64]:
        history = interactions.before(part, recent)
        return follows.score(positions_of(item_ids, history.items), history.offsets)

    return rank(interactions, samples, item_ids, score, k, unseen, max_items)


def in_training(interactions: Interactions) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """The user and the item id of every training interaction, users ascending, oldest first.

    Raises:
        TypeError, ValueError: no data set, or one without training split.
    """
    check_interactions(interactions)
    training = interactions.in_split("train")
    return interactions.user_index[training], interactions.histories.items[training]


class Follows:
    """Which item follows which, a sparse matrix: row a is ``columns[offsets[a]:offsets[a + 1]]`` with their weights.

    Args:
        users, items: ``(N,)`` of all training interactions, users together and oldest first; items as numbers.
        count: ``(num_items,)`` how often each item occurs.
        recent: as of `transitions`.
    """

    def __init__(
        self, users: NDArray[np.int64], items: NDArray[np.int64], count: NDArray[np.int64], recent: int
    ) -> None:
        self.num_items = count.size
        pairs = [
            (items[:-lag] * self.num_items + items[lag:])[users[:-lag] == users[lag:]]
            for lag in range(1, min(recent, max(items.size - 1, 0)) + 1)
        ]
        pair, times = np.unique(np.concatenate(pairs) if pairs else np.zeros(0, np.int64), return_counts=True)
        before, self.columns = np.divmod(pair, self.num_items)
        self.weights = times / np.sqrt(count[before] * count[self.columns])
        self.offsets = np.searchsorted(before, np.arange(self.num_items + 1))

    @classmethod
    def of(cls, columns: NDArray[np.int64], weights: NDArray[np.float64], offsets: NDArray[np.int64]) -> Follows:
        """Of what was found before."""
        follows = cls.__new__(cls)
        follows.num_items, follows.columns, follows.weights, follows.offsets = (
            offsets.size - 1,
            columns,
            weights,
            offsets,
        )
        return follows

    def score(self, items: NDArray[np.int64], offsets: NDArray[np.int64]) -> NDArray[np.float64]:
        """``(S, num_items)`` scores, see `transitions`, for ragged latest items, oldest first."""
        table = np.zeros((offsets.size - 1, self.num_items))
        for row, begin, end in zip(table, offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
            for age, item in zip(range(end - begin, 0, -1), items[begin:end].tolist(), strict=True):
                followers = slice(self.offsets[item], self.offsets[item + 1])
                row[self.columns[followers]] += self.weights[followers] / age
        return table


def by_popularity(interactions: Interactions, k: int) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Item ids and their training interactions, most popular first."""
    check_interactions(interactions)
    item_ids = interactions.item_ids
    check_count("k", k, minimum=1, maximum=item_ids.size)
    at = np.flatnonzero(interactions.in_split("train"))
    items = positions_of(item_ids, interactions.histories.items[at])
    count = np.bincount(items, minlength=item_ids.size)
    first = np.full(item_ids.size, interactions.num_interactions)
    np.minimum.at(first, items, at)
    order = np.lexsort((first, -count))
    return item_ids[order], count[order]


def rank(
    interactions: Interactions,
    samples: Samples,
    item_ids: NDArray[Any],
    score: Callable[[Samples], NDArray[np.float64]],
    k: int,
    unseen: bool,
    max_items: int | None,
) -> Ranking:
    """The k best by ``score`` (samples -> (S, items)); equal scores stay in the order of ``item_ids``."""
    samples = Samples.of(samples, interactions.histories)
    best = np.zeros((samples.users.size, k), np.int64)
    scores = np.zeros((samples.users.size, k))
    step = max(_SCORES_AT_ONCE // item_ids.size, 1)
    for begin in range(0, samples.users.size, step):
        part = Samples(samples.users[begin : begin + step], samples.positions[begin : begin + step])
        table = score(part)
        if unseen:
            seen = interactions.before(part, max_items)
            table[np.repeat(np.arange(len(seen)), seen.lengths), positions_of(item_ids, seen.items)] = -np.inf
        chosen = top(table, k)
        best[begin : begin + step] = chosen
        scores[begin : begin + step] = np.take_along_axis(table, chosen, axis=1)
    return Ranking(item_ids[best], scores)


def top(table: NDArray[np.floating[Any]], k: int) -> NDArray[np.int64]:
    """``(S, k)`` columns of the k largest values per row, equal ones in order, without sorting whole rows."""
    kth = np.partition(table, table.shape[1] - k, axis=1)[:, [table.shape[1] - k]]
    rows, columns = np.nonzero(table >= kth)
    order = np.lexsort((columns, -table[rows, columns], rows))
    first = np.searchsorted(rows, np.arange(len(table)))
    return columns[order][first[:, None] + np.arange(k)]
