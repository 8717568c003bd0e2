# SPDX-License-Identifier: Apache-2.0
"""Items that are held out: which, and what is left without them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from patchkern.data import (
    Interactions,
    hold_out_items,
    k_core,
    latest,
    leave_last_out,
    leave_one_out,
    min_interactions,
    most_frequent_items,
    prepare,
    rating_above,
    rating_at_least,
    synthetic,
    temporal_split,
    write_parquet,
)


def make_data() -> Interactions:
    return synthetic(num_users=40, num_items=50, mean_length=12.0)


def gone(data: Interactions, kept: Interactions) -> set[int]:
    return set(data.titles) - set(kept.titles)


def test_what_is_held_out_is_nowhere() -> None:
    data = make_data()
    kept = hold_out_items(data, 0.2)
    taken = np.unique(data.histories.items[data.in_split("train")])
    out = gone(data, kept)
    assert len(out) == int(0.2 * taken.size) > 3 and out <= set(taken.tolist())
    assert not out & set(kept.histories.items.tolist())
    assert kept.num_interactions == np.isin(data.histories.items, list(out), invert=True).sum()
    # each split has the others of its targets, in their order
    for split in data.ranges:
        targets = data.targets(data.samples(split, 0))
        np.testing.assert_array_equal(
            kept.targets(kept.samples(split, 0)), targets[np.isin(targets, list(out), invert=True)]
        )
    assert list(kept.titles.items()) == [pair for pair in data.titles.items() if pair[0] not in out]


def test_the_same_items_whatever_the_order() -> None:
    data = make_data()
    out = gone(data, hold_out_items(data, 0.3))
    titles = dict(reversed(data.titles.items()))
    users = np.arange(data.num_users)[::-1]
    other = Interactions(
        data.user_ids[users],
        data.histories.take(users),
        titles,
        ranges={split: bounds[users] for split, bounds in data.ranges.items()},
    )
    assert gone(other, hold_out_items(other, 0.3)) == out
    assert gone(data, hold_out_items(data, 0.3, seed=1)) != out
    assert gone(data, hold_out_items(data, 0.1)) < out, "more are more of the same"
    unsplit = Interactions(data.user_ids, data.histories, data.titles)
    assert gone(unsplit, hold_out_items(unsplit, 0.3)) and hold_out_items(leave_one_out(unsplit), 0.3).ranges


def test_a_share_is_rounded_down_as_it_is_written() -> None:
    """0.29 times 100 is 28.999999999999996 in binary."""
    data = Interactions.from_columns(range(100), range(100), None, {item: f"Title {item}" for item in range(100)})
    assert hold_out_items(data, 0.29).num_items == 71


@pytest.mark.parametrize(
    "apply",
    [
        hold_out_items, k_core, latest, leave_last_out, min_interactions, most_frequent_items, rating_above,
        rating_at_least, temporal_split, write_parquet, prepare,
    ],
)  # fmt: skip
def test_a_path_is_no_data(apply: Callable[..., Any], tmp_path: Path) -> None:
    further = {write_parquet: [tmp_path], prepare: [], temporal_split: [], leave_last_out: []}.get(apply, [1])
    with pytest.raises(TypeError, match="interactions: expected Interactions, got str"):
        apply("ml-100k", *further)


@pytest.mark.parametrize("share", [1.0, -0.1, float("nan")])
def test_shares(share: float) -> None:
    data = make_data()
    assert gone(data, hold_out_items(data, 0.0)) == set()
    with pytest.raises(ValueError, match="share: expected a finite number of at least 0 and below 1, got"):
        hold_out_items(data, share)


@pytest.mark.parametrize(
    ("apply", "error", "message"),
    [
        (lambda data: most_frequent_items(data, -1), ValueError, "count: expected an integer in 0"),
        (lambda data: latest(data, -1), ValueError, "max_items: expected an integer in 0"),
        (lambda data: k_core(data, 2.5), TypeError, "k: expected an integer, got float"),
        (lambda data: k_core(data, 2, item_k="3"), TypeError, "item_k: expected an integer, got str"),
        (lambda data: min_interactions(data, "3"), TypeError, "count: expected an integer, got str"),
        (lambda data: hold_out_items(data, "0.1"), TypeError, "share: expected a number, got str"),
        (lambda data: rating_above(data, float("nan")), ValueError, "threshold: expected a finite number, got nan"),
        (lambda data: rating_at_least(data, "4"), TypeError, "minimum: expected a number, got str"),
        (lambda data: temporal_split(data, "811"), TypeError, "ratio: expected three shares, got str"),
        (lambda data: temporal_split(data, (float("nan"), 1, 1)), ValueError, "ratio: expected a finite number"),
    ],
)
def test_wrong_arguments(apply: Callable[[Interactions], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        apply(make_data())
