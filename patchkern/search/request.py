# SPDX-License-Identifier: Apache-2.0
"""What is asked of a search, and for whom: all that can be checked before the model runs is checked here."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from patchkern.batch.histories import Histories
from patchkern.search.arguments import (
    check_batching,
    check_cache,
    check_lengths,
    check_leniency,
    check_positive,
    check_prior,
    check_search,
    check_states,
    known_histories,
    users_named,
)
from patchkern.search.filters import ItemFilter, ItemPrior
from patchkern.search.protocol import SearchModel, check_model, check_titles, policy_of, usual_search
from patchkern.search.summary import Summary, first_few

EXPANSIONS_PER_BEAM = 50
"""Without ``max_expansions``, an exact search may expand this many prefixes per user for each of ``num_beams``."""


class Request:
    """The arguments of `patchkern.search.recommend.recommend`, checked, and the users as the search takes them.

    Attributes:
        k: items per user, at most as many as the catalogue has.
        histories: without the items that the catalogue does not hold, where those are dropped.
        names: what the caller calls the users.
        items: which items each may get.
        known: the prior of those, or None.
        dtype: of scores.

    Raises:
        TypeError, ValueError: naming the argument, the user as the caller does, what was expected and what came.
    """

    def __init__(
        self,
        model: SearchModel,
        histories: Any,
        policy: Any,
        k: Any,
        num_beams: Any,
        search: Any,
        exclude_seen: Any,
        memory_budget: Any,
        batch_size: Any,
        *,
        allowed_items: Any,
        length_penalty: Any,
        normalize: Any,
        prior: Any,
        prior_weight: Any,
        max_expansions: Any,
        user_cache: Any,
        user_states: Any,
        user_ids: Any,
        short: Any,
        unknown: Any,
        progress: Any,
    ) -> None:
        check_model(model)
        self.model = model
        self.policy = policy_of(model, policy)
        for name, value in (("k", k), ("num_beams", num_beams)):
            check_positive(name, value)
        check_batching(memory_budget, batch_size)
        if not isinstance(exclude_seen, bool):
            raise TypeError(f"exclude_seen: expected a bool, got {exclude_seen!r}")
        search = usual_search(model) if search is None else search
        check_search(search, length_penalty, normalize, max_expansions)
        if search != "items":
            check_titles(model, "search", search)
        check_prior(search, prior, prior_weight)
        check_leniency(short, unknown)
        check_cache(user_cache)
        check_states(user_states, self.policy)
        n_items = len(model.catalog)
        if k > n_items and short == "error":
            raise ValueError(f"k: expected at most {n_items}, the items of the catalog, got {k}")
        self.asked, self.k, self.num_beams, self.search = k, min(k, n_items), num_beams, search
        if search == "items" and model.item_head is None:
            raise ValueError('search: expected a model with an item head (item_head=True) for "items", got one without')
        if num_beams < self.k and search not in ("beam", "items"):
            raise ValueError(
                f"num_beams: expected at least k={self.k}, to find that many titles, got {num_beams}; fewer are for "
                'search="beam"'
            )
        self.memory_budget, self.batch_size, self.progress = memory_budget, batch_size, progress
        self.length_penalty, self.normalize, self.short, self.user_cache = length_penalty, normalize, short, user_cache
        self.user_states = user_states
        self.max_expansions = max_expansions
        if search == "exact" and max_expansions is None:
            self.max_expansions = EXPANSIONS_PER_BEAM * num_beams

        given = Histories.coerce(histories)
        self.names = users_named(histories, len(given), user_ids)
        self.histories, self._unknown = known_histories(model.catalog, given, unknown, self.names)
        drops = unknown == "drop"
        self.items = ItemFilter(model.catalog, self.histories, allowed_items, exclude_seen, self.names, drops)
        left = self.k if short == "error" else 0
        self.items.check(left)
        self.dtype = torch.promote_types(model.dtype, torch.float32)
        longest = int(model.catalog.lengths.max(initial=1)) + len(model.prompt.response_end)
        check_lengths(length_penalty, longest, self.dtype)
        self.known: ItemPrior | None = None
        if prior is not None:
            self.known = ItemPrior(model.catalog, self.histories, self.items, prior, prior_weight, left, self.dtype)

    def summary(self, lists: list[list[tuple[Any, float]]], unproven: int) -> Summary:
        """What these lists lack."""
        lengths = np.array([len(user) for user in lists], np.int64)
        short, unknown = np.flatnonzero(lengths < self.asked), np.flatnonzero(self._unknown)
        return Summary(
            users=len(lists),
            short_lists=short.size,
            empty_lists=int((lengths == 0).sum()),
            unknown_items=int(self._unknown.sum()),
            users_with_unknown_items=unknown.size,
            unknown_allowed_items=self.items.num_unknown,
            unproven_lists=unproven,
            short_examples=first_few(self.names[user] for user in short),
            unknown_examples=first_few(self.names[user] for user in unknown),
        )

    def warn(self, summary: Summary) -> None:
        """Tell the caller of `recommend` what the summary has to say."""
        narrow = self.num_beams if self.num_beams < self.k and self.search != "items" else None
        summary.warn(self.asked, narrow, self.short == "allow", self.max_expansions, stacklevel=4)
