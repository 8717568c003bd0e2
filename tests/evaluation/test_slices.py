# SPDX-License-Identifier: Apache-2.0
"""Slices of samples, counts of training, and what lists show beside hits."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest

import patchkern as pk
from patchkern.data import Interactions, leave_one_out, synthetic
from patchkern.evaluation import (
    HISTORY_LENGTHS,
    TRAINING_COUNTS,
    coverage,
    estimate,
    evaluate,
    log_popularity,
    slices,
    training_counts,
)

CATALOG = pk.Catalog.from_token_ids([5, 6, 7, 8], [0, 1, 2, 3, 4], item_ids=["a", "b", "c", "d"])


def test_borders() -> None:
    found = slices([0, 1, 4, 5, 19, 20, 9000], TRAINING_COUNTS)
    assert {name: np.flatnonzero(chosen).tolist() for name, chosen in found.items()} == {
        "0": [0], "1-4": [1, 2], "5-19": [3, 4], "20+": [5, 6],
    }  # fmt: skip
    assert list(slices([], HISTORY_LENGTHS)) == ["0-19", "20-49", "50-99", "100-199", "200-499", "500+"]


def test_every_sample_is_in_one_slice() -> None:
    values = np.random.default_rng(0).integers(0, 700, 500)
    members = np.stack(list(slices(values, HISTORY_LENGTHS).values()))
    assert (members.sum(axis=0) == 1).all()
    one = members[np.searchsorted(HISTORY_LENGTHS, values[7], side="right") - 1]
    assert one[7]


@pytest.mark.parametrize(
    ("values", "begins", "message"),
    [
        ([1], (), "begins: expected ascending numbers, at least one, got"),
        ([1], (5, 1), r"begins: expected ascending numbers, at least one, got \[5, 1\]"),
        ([1, 7], (3, 5), "values: expected at least 3, the first of begins, got 1"),
    ],
)
def test_errors_name_the_argument(values: list[int], begins: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        slices(values, begins)


def test_what_is_no_count() -> None:
    with pytest.raises(TypeError, match="values: expected integers, got dtype float64"):
        slices([0.5, math.nan], (0, 1))
    for counts, message in (([-1, 0, 0, 0], "at least 0, got -1"), ([math.nan, 0, 0, 0], "a finite number, got nan")):
        with pytest.raises(ValueError, match=f"counts.*: expected .*{message}"):
            log_popularity([["a"]], 1, counts, catalog=CATALOG)


def test_an_evaluation_by_slices() -> None:
    """Hit rates of slices, weighted, are that of all; errors are of the slice's own users."""
    lists, targets, users = [["a", "b"], ["b"], ["c"], ["d"]], ["a", "a", "c", "b"], [7, 7, 8, 9]
    found = evaluate(lists, targets, [1], catalog=CATALOG, users=users)
    parts = slices([0, 3, 3, 50], TRAINING_COUNTS)
    assert found.take(parts["1-4"]).ranks.tolist() == [0, 1]
    assert found.take(parts["1-4"]).num_users == 2 and found.num_users == 3
    assert found.take(parts["1-4"]).as_dict()["HR@1 ±"] == estimate([0, 1], [7, 8]).error
    assert math.isnan(found.take(parts["5-19"]).hr(1))
    assert sum(chosen.sum() * found.take(chosen).hr(1) for chosen in parts.values() if chosen.any()) == 2
    assert found.take([0, 2]).ranks.tolist() == [1, 1]


def test_training_counts() -> None:
    data = leave_one_out(synthetic(30, 25, mean_length=12.0, num_genres=3))
    catalog = pk.Catalog.from_titles(data.titles, lambda title: list(title.encode()))
    trained = [
        item
        for user in range(data.num_users)
        for item in data.histories[user][: data.ranges["train"][user, 1]].tolist()
    ]
    expected = Counter(trained)
    assert training_counts(data, catalog).tolist() == [expected[item] for item in catalog.item_ids.tolist()]
    titles = {7: "seven", 8: "eight", 9: "nine"}
    data = leave_one_out(Interactions.from_columns([1, 1, 1], [7, 7, 8], None, titles))
    assert training_counts(data, pk.Catalog.from_titles(titles, lambda title: [ord(title[0])])).tolist() == [1, 0, 0]


def test_coverage_and_popularity_by_hand() -> None:
    lists: list[list[Any]] = [["a", "b", "c"], [("b", -1.0), ("a", -2.0)], []]
    assert coverage(lists, 1, catalog=CATALOG) == 0.5 and coverage(lists, 3, catalog=CATALOG) == 0.75
    counts = [0, 9, 99, 5]
    means = log_popularity(lists, 2, counts, catalog=CATALOG)
    assert means[:2] == pytest.approx([math.log(10) / 2] * 2) and math.isnan(means[2])
    assert log_popularity(lists, 3, counts, catalog=CATALOG)[0] == pytest.approx((math.log(10) + math.log(100)) / 3)
    assert coverage([], 5, catalog=CATALOG) == 0
    with pytest.raises(ValueError, match=r"counts: expected one per item \(4\), got shape \(3,\)"):
        log_popularity(lists, 2, [1, 2, 3], catalog=CATALOG)
    with pytest.raises(ValueError, match=r"recommendations\[1\]: .*'e'"):
        coverage([["a"], ["e"]], 1, catalog=CATALOG)
