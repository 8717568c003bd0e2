# SPDX-License-Identifier: Apache-2.0
"""Closed forms against least squares on explicit rows, in float64."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prior_cases import toy

import patchkern as pk
from patchkern.data import Interactions, open_dataset, prepare, synthetic
from patchkern.evaluation import evaluate, linear, most_popular
from patchkern.evaluation.linear import ItemRegression

Rows = np.ndarray


def least_squares(x: Rows, y: Rows, penalty: float) -> Rows:
    """The ridge regression as an ordinary one, with a row ``sqrt(penalty)`` for every weight."""
    n = x.shape[1]
    rows = np.concatenate([x, math.sqrt(penalty) * np.eye(n)])
    found: Rows = np.linalg.lstsq(rows, np.concatenate([y, np.zeros((n, y.shape[1]))]), rcond=None)[0]
    return found


def decayed(past: list[int], n: int, half_life: float, recent: int) -> Rows:
    row = np.zeros(n)
    for age, item in enumerate(reversed(past[-recent:])):
        row[item] += 0.5 ** (age / half_life)
    return row


def expected_weights(histories: list[list[int]], n: int, form: str, penalty: float, half_life: float, k: int) -> Rows:
    if form == "ridge":
        samples = [(past[:t], past[t]) for past in histories for t in range(1, len(past))]
        x = np.array([decayed(past, n, half_life, k) for past, _ in samples]).reshape(-1, n)
        return least_squares(x, np.eye(n)[[target for _, target in samples]].reshape(-1, n), penalty)
    x = np.array([np.bincount(past, minlength=n) > 0 for past in histories if past]).reshape(-1, n).astype(float)
    weights = np.zeros((n, n))
    for item in range(n):  # the others alone: what the Lagrange multiplier of a zero diagonal comes to
        others = np.arange(n) != item
        weights[others, item] = least_squares(x[:, others], x[:, [item]], penalty)[:, 0]
    return weights


@given(
    st.lists(st.lists(st.integers(0, 7), max_size=12), min_size=1, max_size=6),
    st.sampled_from(["ridge", "ease"]),
    st.sampled_from([0.3, 5.0]),
    st.sampled_from([0.7, 4.0]),
    st.integers(1, 5),
)
def test_closed_forms_are_least_squares(
    histories: list[list[int]], form: str, penalty: float, half_life: float, recent: int
) -> None:
    """Repeats, users of one item and of none, items that nobody took; ``recent`` cuts the rows and what is asked."""
    users = np.repeat(np.arange(len(histories)), [len(past) for past in histories])
    items = np.array([item for past in histories for item in past], np.int64)
    model = ItemRegression.fit(users, items, form, penalty, half_life, recent)
    assert model.items.tolist() == sorted(set(items.tolist()))
    expected = expected_weights(histories, 8, form, penalty, half_life, recent)
    np.testing.assert_allclose(model.weights, expected[np.ix_(model.items, model.items)], rtol=1e-5, atol=1e-6)

    asked = [[], [7], [0, 1, 2, 0, 3], *histories]
    offsets = np.cumsum([0, *map(len, asked)])
    scores = model.score(np.array([item for past in asked for item in past], np.int64), offsets, 9)
    known = [[item if item in model.items else 8 for item in past] for past in asked]  # 8: none
    wide = np.zeros((9, 9))
    wide[:8, :8] = expected
    rows = np.array([decayed(past, 9, half_life, recent) for past in known])
    untrained = ~np.isin(np.arange(9), model.items)
    wide[untrained] = wide[:, untrained] = 0
    np.testing.assert_allclose(scores, rows @ wide, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["ridge", "ease"])
def test_the_yardstick_ranks_by_the_scores(form: str) -> None:
    data, _ = toy([[3, 5, 1, 0, 2, 6], [5, 3, 2, 0, 1, 4], [5, 4, 4, 3, 0, 1]])
    samples = data.samples("test", min_history=0)
    settings: dict[str, Any] = {"form": form, "penalty": 0.5, "half_life": 2.0, "recent": 3}
    ranking = linear(data, samples, k=8, max_items=2, **settings)
    trained = [data.histories[user][: data.ranges["train"][user, 1]].tolist() for user in range(data.num_users)]
    weights = expected_weights(trained, 8, form, 0.5, 2.0, 3)
    count = Counter(item for past in trained for item in past)
    for row, (user, position) in zip(ranking.as_lists(), zip(*samples, strict=True), strict=True):
        past = data.histories[user][:position].tolist()
        scores = decayed(past, 8, 2.0, 3) @ weights
        assert {item for item, _ in row} == set(range(8)) - set(past[-2:])
        np.testing.assert_allclose([score for _, score in row], scores[[item for item, _ in row]], atol=1e-5)
        ties = [count[item] for item, score in row if score == 0]
        assert ties == sorted(ties, reverse=True)


def test_the_order_of_a_history_is_what_ridge_learns() -> None:
    """Synthetic users go from item to item; a regression finds more of them than popularity does."""
    data = synthetic(150, 200, seed=0)
    samples = data.samples("test")
    targets = data.targets(samples)
    popular = most_popular(data, samples, unseen=True).hit_rate(targets, 20)
    assert linear(data, samples, penalty=10.0).hit_rate(targets, 20) > 1.5 * popular


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"form": "svd"}, ValueError, "form: expected one of ridge, ease, got 'svd'"),
        ({"penalty": 0}, ValueError, "penalty: expected a finite number above 0, got 0"),
        ({"penalty": math.nan}, ValueError, "penalty: expected a finite number above 0, got nan"),
        ({"half_life": math.inf}, ValueError, "half_life: expected a finite number above 0, got inf"),
        ({"recent": 0}, ValueError, "recent: expected an integer in 1"),
        ({"k": 9}, ValueError, r"k: expected an integer in 1\.\.8"),
        ({"memory_budget": "a lot"}, ValueError, "memory_budget: expected bytes"),
        (
            {"memory_budget": 799},
            ValueError,
            r"memory_budget: expected at least 800 bytes .* 5 items that occur in training .* got 799",
        ),
    ],
)
def test_closed_forms_refuse_by_name(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    data, _ = toy([[0, 1, 2, 3, 4, 5, 6]])
    with pytest.raises(error, match=message):
        linear(data, data.samples("test"), **{"k": 3, **arguments})


def test_a_data_set_without_training_split_is_refused() -> None:
    data, _ = toy([[0, 1, 2, 3, 4, 5, 6]])
    unsplit = Interactions(data.user_ids, data.histories, data.titles)
    with pytest.raises(ValueError, match="split: expected one of the data set's splits"):
        linear(unsplit, data.samples("test"), 3)


@pytest.mark.parametrize(("form", "hits", "gain"), [("ridge", 0.265, 0.109), ("ease", 0.265, 0.105)])
def test_real_users(shared_data: Path, form: str, hits: float, gain: float) -> None:
    pytest.importorskip("pyarrow", reason="needs pyarrow")
    data = prepare(open_dataset(shared_data / "ml-100k"))
    samples = data.samples("test")
    catalog = pk.Catalog.from_titles(data.titles, lambda title: list(title.encode()))
    lists = linear(data, samples, form=form, max_items=None).as_lists()
    found = evaluate(lists, data.targets(samples), catalog=catalog)
    assert found.hr(20) == pytest.approx(hits, abs=0.001) and found.ndcg(20) == pytest.approx(gain, abs=0.001)
