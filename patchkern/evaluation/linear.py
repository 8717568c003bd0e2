# SPDX-License-Identifier: Apache-2.0
"""Closed-form item-item models: what a user takes next, as a linear function of the history, decayed by its age.

Fitting is one pass over the training interactions and one Cholesky factorisation of an item by item matrix, in float64.
Only items that occur in training have a row and a column. Seconds for thousands of items; see `ItemRegression.fit` for
what it takes of the memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from patchkern.batch.arguments import check_count, check_number
from patchkern.budget.search import parse_bytes
from patchkern.budget.search_plan import in_units
from patchkern.data.interactions import Interactions, positions_of
from patchkern.data.samples import Samples
from patchkern.evaluation.yardsticks import Ranking, by_popularity, in_training, rank

FORMS = ("ridge", "ease")

_MATRICES = 4  # of float64, items by items, that fitting holds at once
_CELLS_AT_ONCE = 1 << 22


def linear(
    interactions: Interactions,
    samples: Samples,
    k: int = 20,
    *,
    form: str = "ridge",
    penalty: float = 1000.0,
    half_life: float = 4.0,
    recent: int = 30,
    memory_budget: int | str = "16GiB",
    unseen: bool = True,
    max_items: int | None = 100,
) -> Ranking:
    """Items that a linear regression expects after the user's latest ``recent`` items, each the less the older it is.

    ``x[a]`` is the sum over the user's latest ``recent`` items that are a of ``0.5 ** (age / half_life)``, the latest
    having age 0, and ``score = x @ W``. What ``W`` is, ``form`` says:

    - ``"ridge"``: the regression of the next item on ``x``. With a row of ``X`` and of ``Y``, one-hot, for every
      training interaction but a user's first, ``W = inverse(X'X + penalty) X'Y``.
    - ``"ease"``: the regression of each item on all others (Steck, WWW 2019). With a row of ``X`` for every user, 1 for
      the items of the training history, ``P = inverse(X'X + penalty)`` and ``W[a, b] = -P[a, b] / P[b, b]``,
      ``W[a, a] = 0``. Only what it is asked about is decayed.

    Ties: the more popular item first.

    Args:
        k: how many to recommend.
        form: ``"ridge"`` or ``"ease"``.
        penalty: on the squares of ``W``, above 0.
        half_life: in items: one that is so much older counts half.
        recent: how far back to look, when fitting ``"ridge"`` and when recommending.
        memory_budget: what fitting may take, in bytes or as a text: 32 bytes times the square of the number of items
            that occur in training.
        unseen: leave out what is among the latest ``max_items`` (None: all) items before the target.

    Raises:
        TypeError, ValueError: naming the argument; k outside 1..number of items, a data set without training split, too
            many items for ``memory_budget``.
    """
    item_ids, count = by_popularity(interactions, k)
    users, items = in_training(interactions)
    places = positions_of(item_ids, items)
    model = ItemRegression.fit(users, places, form, penalty, half_life, recent, memory_budget)

    def score(part: Samples) -> NDArray[np.float64]:
        history = interactions.before(part, recent)
        return model.score(positions_of(item_ids, history.items), history.offsets, count.size).astype(np.float64)

    return rank(interactions, samples, item_ids, score, k, unseen, max_items)


@dataclass(frozen=True, eq=False)
class ItemRegression:
    """Weights of items for items, and what they say of a history; see `linear` for the definitions.

    Attributes:
        items: ``(n,)`` int64, distinct numbers of the items that occur in training.
        weights: ``(n, n)`` float32; row a is what having taken ``items[a]`` says of each.
        half_life, recent: as of `linear`.
    """

    items: NDArray[np.int64]
    weights: NDArray[np.float32]
    half_life: float
    recent: int

    @classmethod
    def fit(
        cls,
        users: NDArray[np.int64],
        items: NDArray[np.int64],
        form: str = "ridge",
        penalty: float = 1000.0,
        half_life: float = 4.0,
        recent: int = 30,
        memory_budget: int | str = "16GiB",
    ) -> ItemRegression:
        """From all training interactions, ``(N,)`` each, users ascending and each oldest first; items as numbers.

        Raises:
            TypeError, ValueError: naming the argument; too many items for ``memory_budget``, before anything is taken.
        """
        if form not in FORMS:
            raise ValueError(f"form: expected one of {', '.join(FORMS)}, got {form!r}")
        for name, value in (("penalty", penalty), ("half_life", half_life)):
            check_number(name, value, above=0)
        check_count("recent", recent, minimum=1)
        budget = parse_bytes("memory_budget", memory_budget)
        distinct, own = np.unique(items, return_inverse=True)
        needed = _MATRICES * 8 * distinct.size**2
        if needed > budget:
            raise ValueError(
                f"memory_budget: expected at least {needed} bytes ({in_units(needed)}), which {distinct.size:,} items "
                f"that occur in training take as matrices of items by items, got {budget} ({in_units(budget)})"
            )
        if form == "ease":
            weights = _each_on_all_others(_together(users, own, distinct.size), penalty)
        else:
            weights = _next_on_decayed(users, own, distinct.size, 0.5 ** (np.arange(recent) / half_life), penalty)
        return cls(distinct, weights, half_life, recent)

    def score(self, items: NDArray[np.int64], offsets: NDArray[np.int64], num_items: int) -> NDArray[np.float32]:
        """``(S, num_items)`` scores of ragged histories, oldest first; 0 for items that do not occur in training."""
        place = np.full(num_items, -1)
        place[self.items] = np.arange(self.items.size)
        decay = (0.5 ** (np.arange(self.recent) / self.half_life)).astype(np.float32)
        table = np.zeros((offsets.size - 1, num_items), np.float32)
        for row, begin, end in zip(table, offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
            latest = place[items[max(begin, end - self.recent) : end][::-1]]
            known = latest >= 0
            row[self.items] = decay[: latest.size][known] @ self.weights[latest[known]]
        return table


def _together(users: NDArray[np.int64], items: NDArray[np.int64], n: int) -> NDArray[np.float64]:
    """``(n, n)`` how many users took both items."""
    gram = np.zeros((n, n))
    pairs = np.unique(users * n + items)
    user, taken = np.divmod(pairs, n)
    bounds = np.flatnonzero(np.diff(user, prepend=-1, append=-1))
    for begin, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        own = taken[begin:end]
        step = max(_CELLS_AT_ONCE // own.size, 1)
        for first in range(0, own.size, step):
            gram[np.ix_(own[first : first + step], own)] += 1
    return gram


def _each_on_all_others(gram: NDArray[np.float64], penalty: float) -> NDArray[np.float32]:
    """``(n, n)`` the ``"ease"`` of `linear`."""
    weights = torch.cholesky_inverse(_factor(gram, penalty))
    weights /= -weights.diagonal().clone()
    return weights.fill_diagonal_(0).float().numpy()


def _next_on_decayed(
    users: NDArray[np.int64], items: NDArray[np.int64], n: int, decay: NDArray[np.float64], penalty: float
) -> NDArray[np.float32]:
    """``(n, n)`` the ``"ridge"`` of `linear`, without its rows.

    Two interactions that are ``lag`` apart meet in the rows of all targets after the later one, until the earlier one
    is too old: with a geometric decay the sum of those products depends on ``lag`` and on the number of targets alone.
    """
    gram, cross = np.zeros((n, n)), np.zeros((n, n))
    targets = np.searchsorted(users, users, side="right") - 1 - np.arange(users.size)  # after each interaction
    terms = np.append(0.0, np.cumsum(decay**2))
    for lag in range(min(decay.size + 1, users.size)):
        same = users[: users.size - lag] == users[lag:]
        pair = (items[: items.size - lag] * n + items[lag:])[same]
        if lag:
            np.add.at(cross.reshape(-1), pair, decay[lag - 1])
        if lag < decay.size:
            met = np.minimum(targets[lag:][same], decay.size - lag)
            np.add.at(gram.reshape(-1), pair, decay[lag] * terms[met] / (1 if lag else 2))
    gram += gram.T.copy()
    factor = _factor(gram, penalty)
    del gram  # solving copies the factor
    weights = np.zeros((n, n), np.float32)
    step = max(_CELLS_AT_ONCE // max(n, 1), 1)
    for first in range(0, n, step):
        some = torch.from_numpy(cross[:, first : first + step])
        weights[:, first : first + step] = torch.cholesky_solve(some, factor).numpy()
    return weights


def _factor(gram: NDArray[np.float64], penalty: float) -> torch.Tensor:
    matrix = torch.from_numpy(gram)
    matrix.diagonal().add_(penalty)
    return torch.linalg.cholesky(matrix)
