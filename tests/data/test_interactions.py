# SPDX-License-Identifier: Apache-2.0
"""Interactions, filters and splits: examples by hand, and properties over random data."""

from __future__ import annotations

import copy
import logging
import pickle
from dataclasses import FrozenInstanceError
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from patchkern import Histories
from patchkern.data import (
    Interactions,
    Samples,
    k_core,
    latest,
    leave_last_out,
    leave_one_out,
    min_interactions,
    most_frequent_items,
    rating_above,
    temporal_split,
)


def interactions(rows: list[tuple[int, int, int]], ratings: list[float] | None = None, **about: Any) -> Interactions:
    """From ``(user, item, time)`` rows, with a title for items 0..9."""
    table = np.array(rows, np.int64).reshape(-1, 3)
    titles = {item: f"Title {item}" for item in range(10)}
    return Interactions.from_columns(table[:, 0], table[:, 1], table[:, 2], titles, ratings, **about)


random_rows = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 9), st.integers(0, 30)), min_size=0, max_size=120)


# ------------------------------------------------------------------ the type


def test_from_columns_sorts_by_user_and_time() -> None:
    rows = [(5, 1, 9), (2, 7, 4), (5, 3, 2), (5, 0, 9), (5, 2, 9), (2, 6, 4)]
    data = interactions(rows, tie_seed=None)
    assert data.user_ids.tolist() == [2, 5]
    assert [history.tolist() for history in data.histories] == [[7, 6], [3, 1, 0, 2]]
    assert data.user_index.tolist() == [0, 0, 1, 1, 1, 1]
    assert data.positions.tolist() == [0, 1, 0, 1, 2, 3]
    assert (data.num_users, data.num_items, data.num_interactions) == (2, 10, 6)
    assert "2 users, 10 items, 6 interactions, splits: none" in repr(data)


def test_the_order_within_one_instant_is_drawn_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    """Not that of the rows, which is often one of ids: the same whatever that is, another for another user or seed."""
    rows = [(user, item, 7) for user in range(200) for item in range(9)] + [(user, 9, 8) for user in range(200)]
    with caplog.at_level(logging.WARNING, logger="patchkern.data"):
        data = interactions(rows, name="toy")
    assert "toy: 90.0% of interactions share their instant with another of the same user; their order is drawn" in (
        caplog.text
    )
    histories = [history.tolist() for history in data.histories]
    assert all(sorted(history) == list(range(10)) and history[-1] == 9 for history in histories)
    assert len(set(map(tuple, histories))) > 195
    # each item is as likely at each place: 200 draws of one in nine
    first = np.bincount([history[0] for history in histories], minlength=9)
    assert first.min() > 8 and first.max() < 40
    shuffled = [rows[i] for i in np.random.default_rng(1).permutation(len(rows))]
    assert [history.tolist() for history in interactions(shuffled).histories] == histories
    assert [history.tolist() for history in interactions(rows, tie_seed=1).histories] != histories
    kept = interactions(rows, tie_seed=None)
    assert all(history.tolist() == list(range(10)) for history in kept.histories)


def test_a_tie_here_and_there_is_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    rows = [(0, item % 10, item) for item in range(500)] + [(0, 0, 499), (0, 1, 499)]
    with caplog.at_level(logging.INFO, logger="patchkern.data"):
        data = interactions(rows)
    assert [record.levelname for record in caplog.records] == ["INFO"] and "0.6% of interactions" in caplog.text
    assert sorted(data.histories[0][-3:].tolist()) == [0, 1, 9]
    with caplog.at_level(logging.INFO, logger="patchkern.data"):
        caplog.clear()
        interactions([(user, 0, 5) for user in range(9)])  # one instant, but each its own user
    assert not caplog.records


def test_ratings_go_with_their_interactions_through_ties() -> None:
    rows = [(user, item, item // 5) for user in range(20) for item in range(10)]
    data = interactions(rows, [10 * user + item for user, item, _ in rows])
    assert data.ratings is not None
    assert data.ratings.tolist() == (10 * data.user_index + data.histories.items).tolist()


def test_text_ids_and_exact_times() -> None:
    titles = {"007": "Bond", "7": "Seven", "x": "X"}
    data = Interactions.from_columns(["1", "01", "1"], ["7", "007", "x"], [0.5, 1, 0.25], titles)
    assert data.user_ids.tolist() == ["01", "1"]
    assert [history.tolist() for history in data.histories] == [["007"], ["x", "7"]]
    assert data.histories.timestamps is not None and data.histories.timestamps.tolist() == [1, 0.25, 0.5]
    split = temporal_split(data, (1, 1, 1))
    assert [split.ranges[name].tolist() for name in split.ranges] == [
        [[0, 0], [0, 1]],
        [[0, 0], [1, 2]],
        [[0, 1], [2, 2]],
    ]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"users": [1.0, 2.0]}, TypeError, "users: expected all integers or all strings, got float"),
        ({"users": [1, "a"]}, TypeError, "users: expected all integers or all strings, got int, str"),
        ({"items": np.array([1.0, 2.0])}, TypeError, "items: expected integer or string item ids, got dtype float64"),
        ({"timestamps": ["5", "6"]}, TypeError, "timestamps: expected numbers or datetimes"),
        ({"timestamps": [5, float("nan")]}, ValueError, r"timestamps\[1\]: expected a time, got nan"),
        ({"timestamps": [5]}, ValueError, r"timestamps: expected one per interaction \(2\), got shape \(1,\)"),
        ({"items": [1, 2, 1]}, ValueError, r"items: expected one per interaction \(2\), got shape \(3,\)"),
        ({"users": np.ones((2, 1), int)}, ValueError, r"users: expected one per interaction \(2\), got shape \(2, 1\)"),
        ({"ratings": [5, float("nan")]}, ValueError, r"ratings\[1\]: expected a finite number, got nan"),
        ({"ratings": ["5", "4"]}, TypeError, "ratings: expected numbers"),
        ({"items": ["1", "2"]}, ValueError, "histories: expected items with a title, got '1' and 1 more without one"),
    ],
)
def test_columns_are_checked_not_converted(change: dict[str, Any], error: type[Exception], message: str) -> None:
    good: dict[str, Any] = {"users": [1, 1], "items": [1, 2], "timestamps": [5, 6], "titles": {1: "A", 2: "B"}}
    Interactions.from_columns(**good)
    with pytest.raises(error, match=message):
        Interactions.from_columns(**{**good, **change})


@pytest.mark.parametrize("copied", [lambda data: pickle.loads(pickle.dumps(data)), copy.deepcopy, copy.copy])
def test_copies_are_equal_and_read_only(copied: Any) -> None:
    data = leave_one_out(interactions([(0, item, item) for item in range(5)], [1.5] * 5, name="toy", system="Be kind."))
    again = copied(data)
    assert (again.name, again.system, again.instruction) == ("toy", "Be kind.", None)
    assert again.titles == data.titles and again.user_ids.tolist() == [0]
    assert again.ratings.tolist() == data.ratings.tolist()
    for name in ("items", "offsets", "timestamps"):
        array = getattr(again.histories, name)
        assert np.array_equal(array, getattr(data.histories, name)) and not array.flags.writeable
    assert {name: bounds.tolist() for name, bounds in again.ranges.items()} == {
        name: bounds.tolist() for name, bounds in data.ranges.items()
    }


def test_samples_history_and_targets() -> None:
    data = interactions([(0, item, item) for item in range(6)] + [(1, 9, 0), (1, 8, 100)])
    data = leave_one_out(data)
    train, test = data.samples("train"), data.samples("test")
    assert repr(train) == "Samples(1 targets)"
    assert list(zip(*train, strict=True)) == [(0, 3)]
    assert data.targets(train).tolist() == [3]
    assert data.before(train)[0].tolist() == [0, 1, 2]
    assert data.before(train, max_items=2)[0].tolist() == [1, 2]
    assert data.targets(test).tolist() == [5]
    assert list(zip(*data.samples("train", min_history=0), strict=True)) == [
        (0, 0),
        (0, 1),
        (0, 2),
        (0, 3),
        (1, 0),
        (1, 1),
    ]
    assert set(data.splits) == {"train", "val", "test"} and isinstance(data.splits["val"], Samples)


def test_empty() -> None:
    data = temporal_split(interactions([]))
    assert data.num_users == 0 and data.samples("test").users.size == 0
    assert len(data.before(data.samples("test"))) == 0
    assert k_core(data, 2).num_items == 0
    assert leave_one_out(data).samples("train").users.size == 0


def test_immutable() -> None:
    items = np.array([1, 2])
    data = Interactions(np.array([0]), Histories(items, [0, 2]), {1: "A", 2: "B"})
    with pytest.raises(FrozenInstanceError):
        data.name = "other"  # type: ignore[misc]
    with pytest.raises(ValueError, match="read-only"):
        data.histories.items[0] = 2
    with pytest.raises(TypeError):
        data.titles[1] = "C"  # type: ignore[index]
    items[0] = 1  # the caller's own array stays writable


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"histories": [[1, 2]]}, TypeError, "histories: expected Histories, got list"),
        ({"titles": ["A"]}, TypeError, "titles: expected a mapping"),
        ({"titles": {1: "A", 2: 5}}, TypeError, r"titles\[2\]: expected a string, got int"),
        ({"titles": {1: "A", 2: " "}}, ValueError, r"titles\[2\]: expected a title, got ' '"),
        ({"titles": {1: "A", "2": "B"}}, TypeError, "expected keys that are all integers or all strings, got int, str"),
        ({"titles": {1: "A"}}, ValueError, "expected items with a title, got 2 without one"),
        ({"user_ids": [1]}, ValueError, r"user_ids: expected one per history \(2\), got shape \(1,\)"),
        ({"user_ids": [1, 1]}, ValueError, "user_ids: expected distinct ids"),
        ({"ratings": [1.0]}, ValueError, r"ratings: expected one per interaction \(3\)"),
        ({"ranges": [[0, 1]]}, TypeError, "ranges: expected a mapping of split to bounds, got list"),
        ({"ranges": {"train": [[0, 1.5], [0, 1]]}}, TypeError, r"ranges\['train'\]: expected integers, got dtype floa"),
        ({"ranges": {"train": [[0, 1]]}}, ValueError, r"ranges\['train'\]: expected shape \(2, 2\)"),
        ({"ranges": {"train": [[0, 1], [0, 2]]}}, ValueError, r"ranges\['train'\]\[1\]: expected 0 <= begin"),
        (
            {"ranges": {"train": [[0, 1], [0, 1]], "test": [[1, 2], [0, 1]]}},
            ValueError,
            "expected disjoint splits, got 'train' and 'test' overlap for user 1",
        ),
        ({"histories": Histories([1, 2, 1], [0, 2, 3], [5, 4, 0])}, ValueError, "got falling timestamps in history 0"),
        ({"instruction": "Next?"}, ValueError, r"instruction: expected a text that holds \[HISTORY_SEQUENCE\]"),
    ],
)
def test_invalid(change: dict[str, Any], error: type[Exception], message: str) -> None:
    good: dict[str, Any] = {
        "user_ids": [7, 8],
        "histories": Histories([1, 2, 1], [0, 2, 3], [4, 5, 0]),
        "titles": {1: "A", 2: "B"},
    }
    Interactions(**good)
    with pytest.raises(error, match=message):
        Interactions(**{**good, **change})


def test_unknown_split() -> None:
    with pytest.raises(ValueError, match="none: apply temporal_split or leave_one_out first"):
        interactions([(0, 1, 2)]).samples("train")
    with pytest.raises(ValueError, match=r"\(train, val, test\), got 'valid'"):
        leave_one_out(interactions([(0, 1, 2)])).samples("valid")
    with pytest.raises(ValueError, match="min_history: expected an integer in 0"):
        leave_one_out(interactions([(0, 1, 2)])).samples("train", min_history=-1)


# ------------------------------------------------------------------ splits


def test_temporal_split_by_hand() -> None:
    data = interactions([(0, 1, 10), (0, 2, 20), (0, 3, 40), (1, 1, 20), (1, 4, 30), (1, 5, 50)])
    split = temporal_split(data, (2, 2, 2))  # number 2 in time is at 20, and so is number 3
    assert split.ranges["train"].tolist() == [[0, 2], [0, 1]]
    assert split.ranges["val"].tolist() == [[2, 2], [1, 2]]
    assert split.ranges["test"].tolist() == [[2, 3], [2, 3]]


@pytest.mark.parametrize("ratio", [(1, 1), (0, 1, 1), (1, -1, 1), (1, 1, 1, 1)])
def test_bad_ratio(ratio: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="ratio: expected three shares >= 0 with a training share above 0"):
        temporal_split(interactions([(0, 1, 2)]), ratio)


def test_temporal_split_needs_timestamps() -> None:
    data = Interactions(np.array([0]), Histories([1], [0, 1]), {1: "A"}, name="toy")
    with pytest.raises(ValueError, match="interactions: expected timestamps for a split by time, got none in 'toy'"):
        temporal_split(data)


def check_partition(data: Interactions) -> None:
    """Every interaction is in exactly one split, in the order train, val, test within a history."""
    number = sum(index * data.in_split(split).astype(int) for index, split in enumerate(("train", "val", "test")))
    assert sum(data.in_split(split).astype(int) for split in data.ranges).tolist() == [1] * data.num_interactions
    same_user = np.diff(data.user_index) == 0
    assert (np.diff(number)[same_user] >= 0).all()


@given(random_rows, st.tuples(st.integers(1, 50), st.integers(0, 5), st.integers(0, 5)))
def test_temporal_split_never_leaks(rows: list[tuple[int, int, int]], ratio: tuple[int, int, int]) -> None:
    data = temporal_split(interactions(rows), ratio)
    check_partition(data)
    times = data.histories.timestamps
    assert times is not None
    parts = [times[data.in_split(split)] for split in ("train", "val", "test")]
    for earlier, later in ((0, 1), (0, 2), (1, 2)):
        if parts[earlier].size and parts[later].size:
            assert parts[earlier].max() < parts[later].min()
    # No share is short of what the ratio asks, but for what an instant at an earlier border takes along.
    assert parts[0].size >= len(rows) * ratio[0] // sum(ratio)
    for split in data.ranges:
        samples = data.samples(split)
        assert (samples.positions >= 3).all()
        past = data.before(samples)
        assert past.timestamps is not None
        target_time = times[data.histories.offsets[samples.users] + samples.positions]
        assert (np.repeat(target_time, past.lengths) >= past.timestamps).all()


@given(random_rows)
def test_leave_one_out_holds_out_the_last_two(rows: list[tuple[int, int, int]]) -> None:
    data = leave_one_out(interactions(rows))
    check_partition(data)
    for user, length in enumerate(data.histories.lengths.tolist()):
        expected = [[0, length - 2], [length - 2, length - 1], [length - 1, length]]
        if length < 3:
            expected = [[0, length], [length, length], [length, length]]
        assert [data.ranges[split][user].tolist() for split in ("train", "val", "test")] == expected


# ------------------------------------------------------------------ filters


def test_rating_and_length() -> None:
    data = interactions([(0, 1, 1), (0, 2, 2), (0, 3, 3), (1, 1, 1)], [5, 3, 3.5, 1])
    liked = rating_above(data, 3)
    assert [history.tolist() for history in liked.histories] == [[1, 3]]
    assert liked.user_ids.tolist() == [0] and liked.num_items == 10
    assert liked.ratings is not None and liked.ratings.tolist() == [5, 3.5]
    assert min_interactions(data, 2).user_ids.tolist() == [0]
    assert min_interactions(data, 4).num_users == 0
    with pytest.raises(ValueError, match="expected ratings to filter by, got none"):
        rating_above(interactions([(0, 1, 2)]), 3)


def test_latest_and_most_frequent() -> None:
    data = interactions([(0, 1, 1), (0, 2, 2), (0, 3, 3), (1, 3, 1), (1, 2, 9)])
    assert [history.tolist() for history in latest(data, 2).histories] == [[2, 3], [3, 2]]
    top = most_frequent_items(data, 2)
    assert list(top.titles) == [2, 3] and [history.tolist() for history in top.histories] == [[2, 3], [3, 2]]


def test_filters_keep_the_split() -> None:
    data = leave_one_out(interactions([(0, item, item) for item in range(8)] + [(1, 1, 1)]))
    kept = data.keep(data.histories.items != 2)
    assert kept.ranges["train"].tolist() == [[0, 5], [0, 1]]
    assert kept.targets(kept.samples("test")).tolist() == [7]
    assert latest(data, 1).ranges["test"].tolist() == [[0, 1], [1, 1]]
    assert data.keep([True] * 9).num_interactions == 9
    with pytest.raises(ValueError, match="chosen: expected 9 booleans"):
        data.keep(np.ones(3, bool))


def k_core_by_loop(rows: list[tuple[int, int]], k_user: int, k_item: int) -> list[tuple[int, int]]:
    while True:
        kept = [
            (user, item)
            for user, item in rows
            if sum(u == user for u, _ in rows) >= k_user and sum(i == item for _, i in rows) >= k_item
        ]
        if kept == rows:
            return kept
        rows = kept


@given(random_rows, st.integers(1, 5), st.integers(1, 5))
def test_k_core_equals_the_loop(rows: list[tuple[int, int, int]], k: int, item_k: int) -> None:
    core = k_core(interactions(rows), k, item_k=item_k)
    expected = k_core_by_loop([(user, item) for user, item, _ in rows], k, item_k)
    got = list(zip(core.user_ids[core.user_index].tolist(), core.histories.items.tolist(), strict=True))
    assert sorted(got) == sorted(expected)
    assert sorted(core.titles) == sorted({item for _, item in expected})


def test_samples_are_spread() -> None:
    samples = Samples(np.repeat(np.arange(5), 4), np.tile(np.arange(3, 7), 5))
    assert samples.spread(None) is samples and samples.spread(20) is samples
    few = samples.spread(5)
    assert few.users.tolist() == [0, 1, 2, 3, 4] and few.positions.tolist() == [3, 3, 4, 5, 6]
    assert samples.spread(1).users.tolist() == [0]
    assert samples.take(samples.positions == 6).users.tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="limit: expected an integer in 1"):
        samples.spread(0)


def test_the_last_two_are_left_out() -> None:
    data = leave_last_out(
        interactions([(user, item, item) for user, count in enumerate((4, 5, 6)) for item in range(count)]), 2
    )
    assert {split: bounds.tolist() for split, bounds in data.ranges.items()} == {
        "train": [[0, 4], [0, 1], [0, 2]], "val": [[4, 4], [1, 3], [2, 4]], "test": [[4, 4], [3, 5], [4, 6]],
    }  # fmt: skip
    for count in (0, 1.5, True):
        with pytest.raises((ValueError, TypeError), match="count: expected"):
            leave_last_out(data, count)  # type: ignore[arg-type]


def test_all_targets_of_a_user_in_one() -> None:
    rows = [(user, item, item) for user, count in enumerate((5, 3, 8)) for item in range(count)]
    data = leave_last_out(interactions(rows), 2)
    samples, targets = data.target_sets("test")
    assert (samples.users.tolist(), samples.positions.tolist()) == ([0, 2], [3, 6])
    assert [row.tolist() for row in targets] == [[3, 4], [6, 7]]
    samples, targets = data.target_sets("test", min_history=7)
    assert samples.positions.tolist() == [7] and [row.tolist() for row in targets] == [[7]]
    samples, targets = data.target_sets("test", min_history=9)
    assert samples.users.size == 0 and len(targets) == 0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"tie_seed": "x"}, TypeError, "tie_seed: expected an integer, got str"),
        ({"tie_seed": -1}, ValueError, "tie_seed: expected an integer in 0"),
        ({"name": 5}, TypeError, "name: expected a string, got int"),
        ({"system": []}, TypeError, "system: expected a string, got list"),
        ({"instruction": 5}, TypeError, "instruction: expected a string, got int"),
        ({"titles": {"a": "A", "a\0": "B"}}, ValueError, "titles: expected ids that do not end in a NUL character"),
    ],
)
def test_what_is_wrong_also_where_it_would_not_matter(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    given: dict[str, Any] = {"users": [1], "items": ["a"], "timestamps": [1], "titles": {"a": "A"}}
    with pytest.raises(error, match=message):
        Interactions.from_columns(**given | change)


def test_titles_and_texts_of_pandas() -> None:
    class Series:
        """As much of that of pandas as is asked for."""

        def __init__(self, values: dict[Any, str]) -> None:
            self.values, self.index, self.ndim = values, list(values), 1

        def __len__(self) -> int:
            return len(self.values)

        def to_dict(self) -> dict[Any, str]:
            return dict(self.values)

    titles, texts = {7: "Alien", 5: "Heat"}, {7: "Alien (Fox)", 5: "Heat (W)"}
    data = Interactions.from_columns([1], [7], None, Series(titles), texts=Series(texts))  # type: ignore[arg-type]
    assert list(data.titles.items()) == list(titles.items()) and data.texts == texts


@pytest.mark.parametrize("ask", ["before", "targets"])
def test_samples_are_samples(ask: str) -> None:
    data = leave_one_out(interactions([(0, 1, 2)]))
    with pytest.raises(TypeError, match="samples: expected Samples, got list"):
        getattr(data, ask)([0, 1])
