# SPDX-License-Identifier: Apache-2.0
"""The log-probability of every item, or of some, for every user: no search, and nothing left out."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from patchkern.batch.histories import Histories, HistoriesLike
from patchkern.batch.policy_kinds import AnyPolicy
from patchkern.budget.search import SearchSize
from patchkern.search.arguments import (
    check_batching,
    check_leniency,
    check_positive,
    check_states,
    known_histories,
    users_named,
)
from patchkern.search.batching import in_batches
from patchkern.search.experts import UserStates
from patchkern.search.item_search import item_log_probs, size_of_items
from patchkern.search.prompts import Prompts, SearchPrompts
from patchkern.search.protocol import SearchModel, check_model, check_titles, policy_of, usual_head
from patchkern.search.summary import Summary, first_few
from patchkern.search.title_search import score_titles
from patchkern.search.trie import Trie
from patchkern.search.trie_cache import catalog_trie

__all__ = ["score_items"]

Scorer = Callable[[NDArray[np.int64], SearchPrompts, "int | None"], Tensor]


def score_items(
    model: SearchModel,
    histories: HistoriesLike,
    policy: AnyPolicy | None = None,
    items: Sequence[Any] | NDArray[Any] | None = None,
    memory_budget: int | str | None = None,
    batch_size: int = 64,
    nodes_per_pass: int = 64,
    progress: bool = False,
    *,
    user_ids: Sequence[Hashable] | None = None,
    unknown: str = "error",
    head: str | None = None,
    user_states: UserStates | None = None,
) -> NDArray[np.floating[Any]]:
    """The log-probability of every item for every user: forced decoding, with all that titles share computed once.

    The titles are fed as trees after each user's prompt, a part of the catalogue at a time. For full rankings,
    calibration or one's own normalisation; to find the best few, ``recommend(search="exact")`` computes less.

    Args:
        model, histories, policy, memory_budget, batch_size, progress: as in `recommend`.
        user_ids, user_states: as in `recommend`; scores are the same with states as without, but for rounding.
        unknown: ``"error"`` or ``"drop"``, as in `recommend`, of items in ``histories``.
        items: the item ids to score; the whole catalogue where not given.
        nodes_per_pass: tokens per user in one forward pass; the more, the fewer passes and the more memory.
        head: "titles", or "items" for the log-probabilities that the model's item head gives, in one pass; where not
            given, items for a model that learned no titles.

    Returns:
        ``(B, n)`` float32, or float64 for a float64 model; columns in the order of ``items`` or of the catalogue.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    check_model(model)
    policy = policy_of(model, policy)
    check_positive("nodes_per_pass", nodes_per_pass)
    check_batching(memory_budget, batch_size)
    check_leniency("error", unknown)
    check_states(user_states, policy)
    head = usual_head(model) if head is None else head
    if head not in ("titles", "items"):
        raise ValueError(f"head: expected titles or items, got {head!r}")
    if head == "titles":
        check_titles(model, "head", head)
    if head == "items" and model.item_head is None:
        raise ValueError('head: expected a model with an item head (item_head=True) for "items", got one without')
    given = Histories.coerce(histories)
    names = users_named(histories, len(given), user_ids)
    histories, dropped = known_histories(model.catalog, given, unknown, names)
    every = np.arange(len(model.catalog))
    wanted: NDArray[np.int64] = (every if items is None else model.catalog.index_of(items, "items")).astype(np.int64)
    double = model.dtype == torch.float64
    scores = np.zeros((len(histories), wanted.size), np.float64 if double else np.float32)
    if scores.size:
        make = _item_scorer if head == "items" else _title_scorer
        compute, size, depth = make(model, wanted, nodes_per_pass)
        for users, found in in_batches(
            model,
            histories,
            policy,
            size,
            depth,
            lambda users: partial(compute, users),
            memory_budget,
            batch_size,
            progress,
            names,
            head,
            user_states,
        ):
            scores[users] = found.cpu().numpy()
    of_users = np.flatnonzero(dropped)
    examples = first_few(names[user] for user in of_users)
    Summary(
        len(histories),
        unknown_items=int(dropped.sum()),
        users_with_unknown_items=of_users.size,
        unknown_examples=examples,
    ).warn()
    return scores


def _title_scorer(model: SearchModel, wanted: NDArray[np.int64], nodes_per_pass: int) -> tuple[Scorer, SearchSize, int]:
    distinct, column = np.unique(wanted, return_inverse=True)
    if distinct.size == len(model.catalog):
        trie = catalog_trie(model.catalog, model.prompt.response_end, model.device)
    else:
        trie = Trie.from_catalog(model.catalog, model.prompt.response_end, items=distinct).to(model.device)
    passes = trie.passes(nodes_per_pass)
    rows = max(len(tree.fed) for tree in passes)
    title = trie.title_of_item[torch.from_numpy(column).to(model.device)]
    itemsize = torch.promote_types(model.dtype, torch.float32).itemsize
    size = SearchSize(rows, rows, itemsize * (len(trie.titles) + wanted.size), trie.num_bytes)

    def compute(users: NDArray[np.int64], layout: SearchPrompts, chunk_rows: int | None) -> Tensor:
        prompts = Prompts(model, layout, users.size * rows, chunk_rows=chunk_rows)
        return score_titles(prompts, trie, passes)[:, title]

    return compute, size, trie.depth


def _item_scorer(model: SearchModel, wanted: NDArray[np.int64], _: int) -> tuple[Scorer, SearchSize, int]:
    column = torch.from_numpy(wanted).to(model.device)

    def compute(users: NDArray[np.int64], layout: SearchPrompts, chunk_rows: int | None) -> Tensor:
        return item_log_probs(model, layout, chunk_rows)[:, column]

    return compute, size_of_items(model, None, None), 0
