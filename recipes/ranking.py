# SPDX-License-Identifier: Apache-2.0
"""Recommending to the samples of a data set: prompts that samples share are computed once; priors on their own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

import patchkern as pk
from patchkern.batch.policies import AnyPolicy
from patchkern.budget.search import SearchCost, SearchSize, parse_bytes
from patchkern.data import Interactions, Samples
from patchkern.evaluation import Ranking

SHARED_ENOUGH = 0.5  # of a prompt's rows; with fewer in common there was no gain to be measured
CACHE_BYTES = 2 << 30  # at most, where no budget is given; of a budget a quarter
USERS_AT_ONCE = 256

Lists = list[list[tuple[Any, float]]]


def recommend(
    model: pk.PatchedCausalLM,
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
    model: pk.PatchedCausalLM,
    histories: pk.Histories,
    policy: AnyPolicy,
    batch_size: int,
    memory_budget: int | str | None,
) -> pk.UserCache | None:
    """A cache for the prompts of a batch, if successive samples share enough of theirs and there is room for it."""
    if len(histories) <= batch_size or shared_rows(model, histories, policy) < SHARED_ENOUGH:
        return None
    longest = int(pk.row_counts(model.catalog, histories, policy, model.prompt).max())
    return cache_of(model, batch_size * longest, memory_budget)


def cache_of(model: pk.PatchedCausalLM, rows: int, memory_budget: int | str | None) -> pk.UserCache | None:
    """A cache for so many rows of prompts, or None where that would take too much of the memory."""
    needed = rows * SearchCost(model, SearchSize(1, 1)).row_bytes
    most = CACHE_BYTES if memory_budget is None else parse_bytes("memory_budget", memory_budget) // 4
    return pk.UserCache(model, needed) if 0 < needed <= most else None


def shared_rows(model: pk.PatchedCausalLM, histories: pk.Histories, policy: AnyPolicy, pairs: int = 200) -> float:
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


def likeliest(
    data: Interactions,
    catalog: pk.Catalog,
    samples: Samples,
    prior: Any,
    k: int = 20,
    *,
    unseen: bool = True,
) -> Ranking:
    """The ``k`` items that a prior alone gives the highest values, without those of the whole history if ``unseen``."""
    best, scores = [], []
    for begin in range(0, samples.users.size, USERS_AT_ONCE):
        past = data.before(samples.take(np.arange(begin, min(begin + USERS_AT_ONCE, samples.users.size))))
        table = np.array(prior(past))
        if unseen:
            table[np.repeat(np.arange(len(past)), past.lengths), catalog.index_of(past.items)] = -np.inf
        best.append(np.argsort(-table, axis=1, kind="stable")[:, :k])
        scores.append(np.take_along_axis(table, best[-1], axis=1))
    return Ranking(catalog.item_ids[np.concatenate(best)], np.concatenate(scores))
