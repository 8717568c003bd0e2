# SPDX-License-Identifier: Apache-2.0
"""Yardsticks against loops written from their definitions, and the synthetic data they are tried on."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from patchkern.data import Interactions, Samples, leave_one_out, synthetic
from patchkern.evaluation import Ranking, most_popular, transitions


def toy(histories: list[list[int]]) -> Interactions:
    rows = [(user, item, time) for user, items in enumerate(histories) for time, item in enumerate(items)]
    table = np.array(rows, np.int64).reshape(-1, 3)
    titles = {item: f"Title {item}" for item in range(8)}
    return leave_one_out(Interactions.from_columns(table[:, 0], table[:, 1], table[:, 2], titles))


def trained(data: Interactions) -> list[list[int]]:
    return [data.histories[user][: data.ranges["train"][user, 1]].tolist() for user in range(data.num_users)]


def transitions_by_loop(
    data: Interactions, past: list[int], recent: int, unseen: bool, max_items: int
) -> dict[int, float]:
    popularity = Counter(item for items in trained(data) for item in items)
    follows: dict[tuple[int, int], int] = defaultdict(int)
    for items in trained(data):
        for later in range(len(items)):
            for earlier in range(max(later - recent, 0), later):
                follows[items[earlier], items[later]] += 1
    scores = {}
    for item in data.titles:
        if unseen and item in past[-max_items:]:
            continue
        scores[item] = 0.0
        for age, before in enumerate(reversed(past[-recent:]), 1):
            if follows[before, item]:
                scores[item] += follows[before, item] / math.sqrt(popularity[before] * popularity[item]) / age
    return scores


@given(
    st.lists(st.lists(st.integers(0, 7), max_size=12), min_size=1, max_size=6),
    st.integers(1, 4),
    st.booleans(),
    st.integers(1, 5),
)
def test_transitions_equal_the_loop(histories: list[list[int]], recent: int, unseen: bool, max_items: int) -> None:
    data = toy(histories)
    samples = data.samples("test", min_history=0)
    ranking = transitions(data, samples, k=8, recent=recent, unseen=unseen, max_items=max_items)
    for row, (user, position) in enumerate(zip(*samples, strict=True)):
        past = data.histories[user][:position].tolist()
        expected = transitions_by_loop(data, past, recent, unseen, max_items)
        got = ranking.as_lists()[row]
        assert {item for item, _ in got} == set(expected)
        for item, score in got:
            assert score == pytest.approx(expected[item], rel=1e-12)
        assert (np.diff([score for _, score in got]) <= 0).all()


def test_most_popular_by_hand() -> None:
    data = toy([[3, 5, 1, 0, 0], [5, 3, 2, 0, 0], [5, 4, 4]])
    # Training: 3 5 1 | 5 3 2 | 5. Ties by first occurrence: 1 before 2, then never seen ones in catalogue order.
    test = data.samples("test")
    ranking = most_popular(data, test, k=5)
    assert ranking.items.tolist() == [[5, 3, 1, 2, 0]] * 2
    assert ranking.scores.tolist() == [[3, 2, 1, 1, 0]] * 2
    assert repr(ranking) == "Ranking(2 samples, 5 items each)"
    # The first user has seen 3 5 1 0, the second 5 3 2 0.
    assert most_popular(data, test, k=3, unseen=True).items.tolist() == [[2, 4, 6], [1, 4, 6]]
    assert most_popular(data, test, k=2, unseen=True, max_items=2).items.tolist() == [[5, 3], [5, 3]]
    assert ranking.hit_rate(data.targets(test), 4) == 0.0 and ranking.hit_rate(data.targets(test), 5) == 1.0


def test_fewer_items_left_than_asked_for() -> None:
    data = toy([[0, 1, 2, 3, 4, 5]])
    test = data.samples("test")
    ranking = most_popular(data, test, k=8, unseen=True)
    assert [[item for item, _ in row] for row in ranking.as_lists()] == [[5, 6, 7]]
    # Places after the last item left are no hits.
    assert ranking.hit_rate([2], 8) == 0.0


def test_no_samples_and_bad_arguments() -> None:
    data = toy([[0, 1, 2, 3, 4, 5]])
    nothing = Samples(np.zeros(0, np.int64), np.zeros(0, np.int64))
    for yardstick in (most_popular, transitions):
        ranking = yardstick(data, nothing, k=3)
        assert ranking.items.shape == (0, 3) and ranking.as_lists() == [] and ranking.hit_rate([], 3) == 0.0
        for k in (0, 9):
            with pytest.raises(ValueError, match=rf"k: expected an integer in 1\.\.8, got {k}"):
                yardstick(data, data.samples("test"), k=k)
    with pytest.raises(ValueError, match="recent: expected an integer in 1"):
        transitions(data, data.samples("test"), k=3, recent=0)
    for yardstick in (most_popular, transitions):
        assert yardstick(data, Samples([0], [3]), k=3).items.shape == (1, 3)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"positions\[0\]: expected below "):
            yardstick(data, Samples(np.array([0]), data.histories.lengths[:1]), k=3)


@pytest.mark.parametrize(
    ("targets", "k", "error", "message"),
    [
        ([2], 2, ValueError, r"targets: expected one per sample \(2\), got shape \(1,\)"),
        (["2", "3"], 2, TypeError, "targets: expected ids of dtype int64, as the items, got"),
        ([2, 3], 4, ValueError, r"k: expected an integer in 1\.\.3, got 4"),
        ([2, 3], 0, ValueError, r"k: expected an integer in 1\.\.3, got 0"),
    ],
)
def test_hit_rates_of_other_samples(targets: Any, k: int, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Ranking(np.array([[1, 2, 3], [3, 2, 1]]), np.zeros((2, 3))).hit_rate(targets, k)


# ------------------------------------------------------------------ synthetic


def test_synthetic_is_deterministic() -> None:
    one, same, other = (synthetic(40, 100, seed) for seed in (1, 1, 2))
    assert np.array_equal(one.histories.items, same.histories.items) and one.titles == same.titles
    assert one.histories.timestamps is not None and same.histories.timestamps is not None
    assert np.array_equal(one.histories.timestamps, same.histories.timestamps)
    assert one.titles != other.titles


def test_synthetic_looks_like_data() -> None:
    data = synthetic(200, 400, seed=0)
    assert data.num_users == 200 and data.num_items == 400 and set(data.ranges) == {"train", "val", "test"}
    assert len(set(data.titles.values())) == 400
    assert all(np.unique(history).size == history.size >= 12 for history in data.histories)
    sequels = [title for title in data.titles.values() if title.endswith(" II")]
    assert len(sequels) > 20 and all(title.removesuffix(" II") in data.titles.values() for title in sequels)
    frequency = np.sort(np.bincount(data.histories.items, minlength=400))[::-1]
    assert frequency[:40].sum() > frequency[-120:].sum()  # the top tenth outweighs the rarest third
    assert data.samples("test").users.size > 100


def test_synthetic_taste_can_be_learnt() -> None:
    data = synthetic(seed=0)
    samples = data.samples("test")
    targets = data.targets(samples)
    popular = most_popular(data, samples, unseen=True).hit_rate(targets, 20)
    assert transitions(data, samples).hit_rate(targets, 20) > 4 * popular > 0


def test_synthetic_titles_tell_the_taste() -> None:
    """A recommender that only sees words beats popularity too: items that share words with the latest titles."""
    data = synthetic(seed=0)
    samples = data.samples("test")
    words = {item: set(title.split()) - {"The", "of", "the", "and"} for item, title in data.titles.items()}
    vocabulary = {word: i for i, word in enumerate(sorted(set().union(*words.values())))}
    has = np.zeros((data.num_items, len(vocabulary)))
    for item, own in words.items():
        has[item, [vocabulary[word] for word in own]] = 1
    has /= np.sqrt(has.sum(axis=0))  # rare words tell more
    hits = 0
    for user, position, target in zip(*samples, data.targets(samples), strict=True):
        past = data.histories[user][:position]
        score = has @ has[past[-5:]].sum(axis=0)
        score[past] = -1
        hits += int((score > score[target]).sum() < 20)
    popular = most_popular(data, samples, unseen=True).hit_rate(data.targets(samples), 20)
    assert hits / samples.users.size > 3 * popular


@pytest.mark.parametrize("arguments", [(1, 1), (3, 5), (2, 13)])
def test_tiny_synthetic(arguments: tuple[int, int]) -> None:
    data = synthetic(*arguments, num_genres=1)
    assert data.num_users == arguments[0] and data.num_items == arguments[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_users": 0}, "num_users: expected an integer in 1"),
        ({"num_items": 5}, r"num_genres: expected at most num_items \(5\), got 12"),
        ({"num_genres": 17}, r"num_genres: expected at most 16 \(those with words\), got 17"),
        ({"sequel_rate": 1.5}, r"sequel_rate: expected 0\.\.1, got 1\.5"),
        ({"mean_length": 0}, "mean_length: expected above 0, got 0"),
    ],
)
def test_bad_synthetic(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        synthetic(**arguments)
