# SPDX-License-Identifier: Apache-2.0
"""Filters one after the other, what they say, and the flags of the recipes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from patchkern.data import Interactions, leave_one_out, prepare, samples_of, temporal_split, write_parquet
from patchkern.data.preparation import add_arguments, load


def interactions(lengths: list[int], ratings: list[float] | None = None, items: int = 10) -> Interactions:
    """Users with so many interactions with items 0, 1, 2, ..., one a second."""
    users = np.repeat(np.arange(len(lengths)), lengths)
    taken = np.concatenate([np.arange(n) % items for n in lengths])
    titles = {item: f"Title {item}" for item in range(items)}
    return Interactions.from_columns(users, taken, np.arange(users.size), titles, ratings, name="toy")


def test_the_papers_filters_and_split_by_default() -> None:
    lines: list[str] = []
    data = prepare(interactions([40, 20], [4] * 40 + [5] * 20), report=lines.append)
    assert data.user_ids.tolist() == [0] and set(data.ranges) == {"train", "val", "test"}
    assert lines == [
        "rated above 3: 60 of 60 interactions and 2 of 2 users kept (min_rating)",
        "users with 21 interactions: 40 of 60 interactions and 1 of 2 users kept (min_interactions)",
    ]


def test_each_filter_as_given() -> None:
    data = interactions([30, 30, 4], [3] * 30 + [3.5] * 30 + [1] * 4)
    assert prepare(data).user_ids.tolist() == [1]
    assert prepare(data, min_rating=3).user_ids.tolist() == [0, 1]
    assert prepare(data, min_rating=3.5).user_ids.tolist() == [1]
    assert prepare(data, min_rating=-1, min_interactions=1).user_ids.tolist() == [0, 1, 2]
    assert prepare(data, min_rating=0, min_interactions=5).user_ids.tolist() == [0, 1]
    # a core instead of the default length; users of four items have to be with four users' items
    assert prepare(data, min_rating=0, k_core=3).user_ids.tolist() == [0, 1, 2]
    assert prepare(data, min_rating=0, k_core=5).user_ids.tolist() == [0, 1]
    assert prepare(data, min_rating=0, k_core=3, min_interactions=30).user_ids.tolist() == [0, 1]


def test_without_ratings_none_are_asked_for() -> None:
    assert prepare(interactions([30])).num_users == 1
    with pytest.raises(ValueError, match="expected ratings to filter by, got none in 'toy'"):
        prepare(interactions([30]), min_rating=4)


def test_data_with_splits_keeps_them() -> None:
    data = leave_one_out(interactions([30, 5], [1] * 35))
    assert prepare(data) is data
    kept = prepare(data, min_interactions=6)
    assert kept.user_ids.tolist() == [0] and kept.ranges["test"].tolist() == [[29, 30]]


@pytest.mark.parametrize(
    ("lengths", "rating", "options", "message"),
    [
        (
            [30, 30],
            1,
            {},
            r"no interaction is left of 'toy': rated above 3: 0 of 60 interactions and 0 of 2 users kept "
            r"\(min_rating\)\. The best rating is 1; another min_rating \(--min_rating\) keeps more",
        ),
        (
            [8, 5],
            5,
            {},
            r"rated above 3: 13 of 13 .* kept \(min_rating\); users with 21 interactions: 0 of 13 interactions and 0 "
            r"of 2 users kept \(min_interactions\)\. The most of a user is 8; another min_interactions "
            r"\(--min_interactions\)",
        ),
        ([8, 5], 5, {"k_core": 3}, r"users and items with 3 interactions: 0 of 13 .*another k_core \(--k_core\)"),
    ],
)
def test_nothing_left_says_which_filter_took_it(
    lengths: list[int], rating: float, options: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        prepare(interactions(lengths, [rating] * sum(lengths)), **options)


def test_nothing_to_begin_with_is_no_error() -> None:
    data = prepare(interactions([0], []))
    assert data.num_interactions == 0 and set(data.ranges) == {"train", "val", "test"}


def test_a_split_without_samples_says_so() -> None:
    data = temporal_split(interactions([30]), (1, 0, 0))
    assert samples_of(data, "train").users.size == 27
    with pytest.raises(
        ValueError, match=r"samples: expected some in the test split of 'toy', got none: .*up to 30 items"
    ):
        samples_of(data, "test")


def test_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pyarrow", reason="needs pyarrow")
    write_parquet(interactions([30, 22, 4], [5] * 30 + [4] * 22 + [2] * 4), tmp_path / "toy")
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    with pytest.raises(SystemExit):
        parser.parse_args([])
    data = ["--data", str(tmp_path / "toy")]
    assert load(parser.parse_args(data)).num_users == 2
    assert load(parser.parse_args([*data, "--min_rating", "4.5"])).num_users == 1
    assert load(parser.parse_args([*data, "--min_rating", "1", "--min_interactions", "4"])).num_users == 3
    capsys.readouterr()
    assert load(parser.parse_args([*data, "--min_rating", "1", "--k_core", "5"])).num_users == 2
    assert capsys.readouterr().out == (
        "rated 1 or better: 56 of 56 interactions and 3 of 3 users kept (min_rating)\n"
        "users and items with 5 interactions: 52 of 56 interactions and 2 of 3 users kept (k_core)\n"
    )
    synthetic = argparse.ArgumentParser()
    add_arguments(synthetic.add_argument_group("data"), default="synthetic")
    assert load(synthetic.parse_args([]), num_users=20, num_items=30).num_users == 20
    assert load(synthetic.parse_args(["--min_interactions", "40"]), num_users=20, num_items=300).num_users < 20


def test_splits_by_name() -> None:
    data = interactions([30, 25])
    assert prepare(data, split_by="time").ranges["test"].tolist() == temporal_split(data).ranges["test"].tolist()
    assert prepare(data, split_by="leave_one_out").ranges["test"].tolist() == [[29, 30], [24, 25]]
    two = prepare(data, split_by="leave_two_out")
    assert two.ranges["val"].tolist() == [[26, 28], [21, 23]] and two.ranges["test"].tolist() == [[28, 30], [23, 25]]
    # splits that the data has give way to those that are asked for, and only to these
    assert prepare(two).ranges["test"].tolist() == two.ranges["test"].tolist()
    assert prepare(two, split_by="leave_one_out").ranges["test"].tolist() == [[29, 30], [24, 25]]
    with pytest.raises(ValueError, match="split_by: expected one of time, leave_one_out, leave_two_out, got 'user'"):
        prepare(data, split_by="user")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"min_rating": "a lot"}, TypeError, "min_rating: expected a number, got str"),
        ({"min_rating": float("nan")}, ValueError, "min_rating: expected a finite number, got nan"),
        ({"min_interactions": "5"}, TypeError, "min_interactions: expected an integer, got str"),
        ({"k_core": -1}, ValueError, "k_core: expected an integer in 0"),
    ],
)
def test_filters_are_named_as_they_are_given(options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        prepare(interactions([5]), **options)
