# SPDX-License-Identifier: Apache-2.0
"""Filters: each takes `Interactions` and returns the smaller ones."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np

from patchkern.batch.arguments import check_count, check_number
from patchkern.data.interactions import Interactions, check_interactions, positions_of


def rating_above(interactions: Interactions, threshold: float) -> Interactions:
    """Interactions rated strictly above ``threshold``; the catalogue stays whole.

    Raises:
        ValueError: a data set without ratings.
    """
    check_interactions(interactions)
    check_number("threshold", threshold)
    return interactions.keep(_ratings_of(interactions) > threshold)


def rating_at_least(interactions: Interactions, minimum: float) -> Interactions:
    """Interactions rated ``minimum`` or better; the catalogue stays whole.

    Raises:
        ValueError: a data set without ratings.
    """
    check_interactions(interactions)
    check_number("minimum", minimum)
    return interactions.keep(_ratings_of(interactions) >= minimum)


def min_interactions(interactions: Interactions, count: int) -> Interactions:
    """Users with at least ``count`` interactions; the catalogue stays whole."""
    check_interactions(interactions)
    check_count("count", count, minimum=0)
    lengths = interactions.histories.lengths
    return interactions.keep(np.repeat(lengths >= count, lengths))


def k_core(interactions: Interactions, k: int, *, item_k: int | None = None) -> Interactions:
    """The largest part in which every user has at least ``k`` interactions and every item at least ``item_k`` (``k``).

    Removing users can push an item below its threshold and the other way round, so it repeats until nothing falls.
    The catalogue loses the items that go.
    """
    check_interactions(interactions)
    item_k = k if item_k is None else item_k
    check_count("k", k, minimum=0)
    check_count("item_k", item_k, minimum=0)
    user, item = interactions.user_index, positions_of(interactions.item_ids, interactions.histories.items)
    chosen = np.ones(interactions.num_interactions, bool)
    while True:
        per_user = np.bincount(user[chosen], minlength=interactions.num_users)
        per_item = np.bincount(item[chosen], minlength=interactions.num_items)
        smaller = chosen & (per_user[user] >= k) & (per_item[item] >= item_k)
        if smaller.sum() == chosen.sum():
            break
        chosen = smaller
    return _with_catalog(interactions.keep(chosen), per_item >= max(item_k, 1))


def most_frequent_items(interactions: Interactions, count: int) -> Interactions:
    """The ``count`` items with the most interactions (ties: catalogue order) and the interactions with them."""
    check_interactions(interactions)
    check_count("count", count, minimum=0)
    item = positions_of(interactions.item_ids, interactions.histories.items)
    frequency = np.bincount(item, minlength=interactions.num_items)
    kept = np.zeros(interactions.num_items, bool)
    kept[np.argsort(-frequency, kind="stable")[:count]] = True
    return _with_catalog(interactions.keep(kept[item]), kept)


def latest(interactions: Interactions, max_items: int) -> Interactions:
    """Every history cut to its latest ``max_items`` interactions; the catalogue stays whole."""
    check_interactions(interactions)
    check_count("max_items", max_items, minimum=0)
    first = interactions.histories.lengths - max_items
    return interactions.keep(interactions.positions >= first[interactions.user_index])


def hold_out_items(interactions: Interactions, share: float, *, seed: int = 0) -> Interactions:
    """Without a share of the items: neither in histories, nor as targets, nor in the catalogue.

    To a model that is trained on the rest they are items that nobody has taken yet. They are drawn among those that
    occur in training (of data without splits: that occur), and are the same for the same interactions, in whatever
    order users and catalogue come.

    Args:
        share: of these items, at least 0 and below 1, rounded down.
        seed: of the draw.

    Raises:
        ValueError: another share.
    """
    check_interactions(interactions)
    check_number("share", share, minimum=0, below=1)
    item = positions_of(interactions.item_ids, interactions.histories.items)
    training = interactions.in_split("train") if interactions.ranges else np.ones(item.size, bool)
    taken = np.unique(item[training])
    taken = taken[np.argsort(interactions.item_ids[taken], kind="stable")]
    kept = np.ones(interactions.num_items, bool)
    kept[np.random.default_rng(seed).permutation(taken)[: int(Fraction(str(share)) * taken.size)]] = False
    return _with_catalog(interactions.keep(kept[item]), kept)


def _ratings_of(interactions: Interactions) -> np.ndarray:
    if interactions.ratings is None:
        raise ValueError(f"interactions: expected ratings to filter by, got none in {interactions.name!r}")
    return interactions.ratings


def _with_catalog(interactions: Interactions, kept: np.ndarray) -> Interactions:
    titles = {item: title for (item, title), keep in zip(interactions.titles.items(), kept, strict=True) if keep}
    texts = None if interactions.texts is None else {item: interactions.texts[item] for item in titles}
    return replace(interactions, titles=titles, texts=texts)
