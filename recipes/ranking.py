# SPDX-License-Identifier: Apache-2.0
"""Recommending to the samples of a data set: prompts that samples share are computed once; priors on their own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import patchkern as pk
from patchkern.batch.policy_kinds import AnyPolicy
from patchkern.budget.search import SearchCost, SearchSize, parse_bytes
from patchkern.data import Interactions, Samples
from patchkern.evaluation import Ranking
from patchkern.evaluation.yardsticks import top
from patchkern.training import TrainableModel, item_log_probs

SHARED_ENOUGH = 0.5  # of a prompt's rows; with fewer in common there was no gain to be measured
CACHE_BYTES = 2 << 30  # at most, where no budget is given; of a budget a quarter
USERS_AT_ONCE = 256
SCORES_AT_ONCE = 1 << 24

Lists = list[list[tuple[Any, float]]]


def recommend(
    model: TrainableModel,
    data: Interactions,
    samples: Samples,
    policy: AnyPolicy,
    *,
    batch_size: int = 64,
    memory_budget: int | str | None = None,
    **options: Any,
) -> Lists:
    """`PatchedCausalLM.recommend` for samples in the order of users and positions, ``batch_size`` at once.

    Where successive prompts of a user begin alike, the samples are walked through in ``batch_size`` lanes, consecutive
    ones one after the other, and a `UserCache` keeps each lane's latest prompt: only what is new in the next is
    computed. Lists are the same, scores up to rounding.
    """
    histories = data.before(samples)
    options |= {"batch_size": batch_size, "memory_budget": memory_budget}
    cache = prompt_cache(model, histories, policy, batch_size, memory_budget)
    if cache is None:
        return model.recommend(histories, policy, **options)
    lists: Lists = [[] for _ in range(len(histories))]
    for lane, chosen in lanes(len(histories), batch_size):
        # named by user and lane: a user may be in several lanes at once
        names = list(zip(data.user_ids[samples.users[chosen]].tolist(), lane.tolist(), strict=True))
        found = model.recommend(histories.take(chosen), policy, user_cache=cache, user_ids=names, **options)
        for sample, row in zip(chosen.tolist(), found, strict=True):
            lists[sample] = row
    return lists


def lanes(size: int, width: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """``size`` samples cut into at most ``width`` runs: the runs' first samples, their second ones, and so on.

    Each with the number of the run that it is of.
    """
    length = -(-size // width)
    for first in range(length):
        chosen = np.arange(first, size, length)
        yield chosen // length, chosen


def prompt_cache(
    model: TrainableModel,
    histories: pk.Histories,
    policy: AnyPolicy,
    batch_size: int,
    memory_budget: int | str | None,
) -> pk.UserCache | None:
    """A cache for the prompts of a batch, if successive samples share enough of theirs and there is room for it."""
    if isinstance(policy, pk.PreferenceMemory):  # memories of successive prompts differ in their last bits
        return None
    if len(histories) <= batch_size or shared_rows(model, histories, policy) < SHARED_ENOUGH:
        return None
    longest = int(pk.row_counts(model.catalog, histories, policy, model.prompt).max())
    return cache_of(model, batch_size * longest, memory_budget)


def cache_of(model: TrainableModel, rows: int, memory_budget: int | str | None) -> pk.UserCache | None:
    """A cache for so many rows of prompts, or None where that would take too much of the memory."""
    needed = rows * SearchCost(model, SearchSize(1, 1)).row_bytes
    most = CACHE_BYTES if memory_budget is None else parse_bytes("memory_budget", memory_budget) // 4
    return pk.UserCache(model, needed) if 0 < needed <= most else None


def shared_rows(model: TrainableModel, histories: pk.Histories, policy: AnyPolicy, pairs: int = 200) -> float:
    """The share of a prompt's rows that the prompt of the sample before it begins with, but for the prompt's prefix.

    Of some pairs of successive samples, evenly spread. The prefix is computed once for all users in any case.
    """
    firsts = np.unique(np.linspace(0, len(histories) - 2, min(pairs, len(histories) - 1)).astype(np.int64))
    both = histories.take(np.stack([firsts, firsts + 1], axis=1).reshape(-1))
    layout = pk.build_layout(model.catalog, both, policy, model.prompt)
    rows = np.split(pk.row_hashes(layout), layout.cu_seqlens[1:-1].numpy())
    prefix = len(model.prompt.prefix)
    shared = total = 0
    for before, after in zip(rows[::2], rows[1::2], strict=True):
        size = min(before.size, after.size)
        same = np.append(before[:size] == after[:size], False)
        shared += int(same.argmin()) - prefix
        total += after.size - prefix
    return shared / max(total, 1)


class ScoredItems:
    """Rankings and likelihoods from scores of every item, given part by part.

    Args:
        data, samples: whose targets are ranked.
        catalog: the items, in the order of the scores.
        k: length of the lists.
        unseen: leave items of the whole history out of the lists.
    """

    def __init__(self, data: Interactions, samples: Samples, catalog: pk.Catalog, k: int, unseen: bool) -> None:
        self.data, self.samples, self.catalog, self.unseen = data, samples, catalog, unseen
        self._items = np.zeros((samples.users.size, k), np.int64)
        self._scores = np.zeros((samples.users.size, k))
        self.nll = np.zeros(samples.users.size)
        """``(S,)`` minus the log-probability of each target, the scores being those of all items up to a constant"""

    def add(self, chosen: NDArray[np.int64], scores: NDArray[np.floating[Any]]) -> None:
        """``(n, n_items)`` scores of some of the samples."""
        part = self.samples.take(chosen)
        targets = self.catalog.index_of(self.data.targets(part))
        largest = scores.max(axis=1)
        total = np.log(np.exp(scores - largest[:, None]).sum(axis=1, dtype=np.float64)) + largest
        self.nll[chosen] = total - scores[np.arange(chosen.size), targets]
        if self.unseen:
            past = self.data.before(part)
            scores = np.array(scores)
            scores[np.repeat(np.arange(len(past)), past.lengths), self.catalog.index_of(past.items)] = -np.inf
        best = top(scores, self._items.shape[1])
        self._items[chosen] = best
        self._scores[chosen] = np.take_along_axis(scores, best, axis=1)

    @property
    def ranking(self) -> Ranking:
        """The best items of each sample, equal ones in catalogue order."""
        return Ranking(self.catalog.item_ids[self._items], self._scores)


def by_prior(
    data: Interactions, catalog: pk.Catalog, samples: Samples, prior: Any, k: int = 20, *, unseen: bool = True
) -> ScoredItems:
    """What a prior finds likeliest, without those of the whole history if ``unseen``."""
    scored = ScoredItems(data, samples, catalog, k, unseen)
    for chosen in parts_of(samples, catalog):
        scored.add(chosen, prior_scores(prior, data, samples.take(chosen)))
    return scored


def by_item_head(
    model: TrainableModel,
    data: Interactions,
    samples: Samples,
    policy: AnyPolicy,
    k: int,
    rows: Mapping[str, Mapping[str, float]],
    priors: Mapping[str, Any],
    *,
    unseen: bool,
) -> dict[str, ScoredItems]:
    """What the model's item head ranks first in every row: alone, or with some priors by their weights.

    After the rows, each prior on its own (`prior_alone`). Model and priors are asked once about every sample.
    """
    names = [*rows, *map(prior_alone, priors)]
    found = {name: ScoredItems(data, samples, model.catalog, k, unseen) for name in names}
    for chosen in parts_of(samples, model.catalog):
        part = samples.take(chosen)
        own = head_scores(model, data, part, policy, unseen=False)
        tables = {name: prior_scores(prior, data, part) for name, prior in priors.items()}
        for begin in range(0, chosen.size, USERS_AT_ONCE):  # so few that they stay in a processor's cache
            some = slice(begin, begin + USERS_AT_ONCE)
            for row, weights in rows.items():
                total = own[some] + sum(weight * tables[name][some] for name, weight in weights.items())
                found[row].add(chosen[some], total)
            for name, table in tables.items():
                found[prior_alone(name)].add(chosen[some], table[some])
    return found


def prior_alone(name: str) -> str:
    """What a prior on its own is called."""
    return f"{name} prior alone"


def parts_of(samples: Samples, catalog: pk.Catalog) -> Iterator[NDArray[np.int64]]:
    """Consecutive samples, as many at once as there is room for scores of all items."""
    step = max(SCORES_AT_ONCE // max(len(catalog), 1), 1)
    for begin in range(0, samples.users.size, step):
        yield np.arange(begin, min(begin + step, samples.users.size))


def prior_scores(prior: Any, data: Interactions, samples: Samples) -> NDArray[np.floating[Any]]:
    """``(S, n_items)`` what a prior says; a model's item head computes a user's history once where it can."""
    if isinstance(prior, pk.ItemHeadPrior):
        model: Any = prior.model
        return head_scores(model, data, samples, prior.policy, unseen=False)
    begins = range(0, samples.users.size, USERS_AT_ONCE)
    parts = (samples.take(np.arange(begin, min(begin + USERS_AT_ONCE, samples.users.size))) for begin in begins)
    return np.concatenate([prior(data.before(part)) for part in parts])


def head_scores(
    model: TrainableModel, data: Interactions, samples: Samples, policy: AnyPolicy, *, unseen: bool
) -> NDArray[np.floating[Any]]:
    """``(S, n_items)`` log-probabilities of the item head; -inf for items of the whole history if ``unseen``."""
    dtype = np.float64 if model.dtype == torch.float64 else np.float32
    scores = np.zeros((samples.users.size, len(model.catalog)), dtype)
    for chosen, log_probs in item_log_probs(model, data.histories, samples, policy):
        scores[chosen] = log_probs
    if unseen:
        past = data.before(samples)
        scores[np.repeat(np.arange(len(past)), past.lengths), model.catalog.index_of(past.items)] = -np.inf
    return scores
