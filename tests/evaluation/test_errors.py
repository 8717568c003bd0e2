# SPDX-License-Identifier: Apache-2.0
"""Errors over users against the formula written out, and against resampling users."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from patchkern.evaluation import estimate, paired_difference, standard_error


def by_loop(values: list[float], users: list[Any]) -> float:
    """The sandwich, user by user."""
    mean = sum(values) / len(values)
    groups = sorted(set(users))
    total = 0.0
    for group in groups:
        total += sum(value - mean for value, user in zip(values, users, strict=True) if user == group) ** 2
    return math.sqrt(len(groups) / (len(groups) - 1) * total) / len(values)


@given(st.data())
def test_against_the_formula(data: st.DataObject) -> None:
    size = data.draw(st.integers(2, 30))
    values = data.draw(st.lists(st.floats(-5, 5), min_size=size, max_size=size))
    users = data.draw(st.lists(st.sampled_from(["a", "b", "c", "d"]), min_size=size, max_size=size))
    got = standard_error(values, users)
    if len(set(users)) == 1:
        assert math.isnan(got)
    else:
        assert got == pytest.approx(by_loop(values, users), rel=1e-12, abs=1e-15)


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=30))
def test_one_sample_per_user_is_the_ordinary_error(values: list[float]) -> None:
    expected = np.std(values, ddof=1) / math.sqrt(len(values))
    for users in (None, np.arange(len(values))[::-1], [f"user {number}" for number in range(len(values))]):
        assert standard_error(values, users) == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_against_resampled_users() -> None:
    """A bootstrap of whole users: the spread of the mean, up to what so many draws leave open.

    The linearised variance leaves out terms of relative order 1 / users; the spread of ``draws`` means is known to one
    part in ``sqrt(2 draws)``. Four of these, and twice the former.
    """
    rng = np.random.default_rng(0)
    users, draws = 400, 4000
    sizes = rng.integers(1, 12, users)
    own = rng.normal(0, 1, users)
    values = np.repeat(own, sizes) + rng.normal(0, 0.5, sizes.sum())
    of = np.repeat(np.arange(users), sizes)
    sums = np.bincount(of, values)
    picked = rng.integers(0, users, (draws, users))
    spread = (sums[picked].sum(axis=1) / sizes[picked].sum(axis=1)).std(ddof=1)
    bound = 4 / math.sqrt(2 * draws) + 2 / users
    assert standard_error(values, of) == pytest.approx(spread, rel=bound)
    assert standard_error(values) < 0.6 * spread  # what samples would say


def test_users_who_share_everything_count_once() -> None:
    once, users = np.array([0.0, 1.0, 1.0, 0.0, 1.0]), np.arange(5)
    assert standard_error(np.repeat(once, 7), np.repeat(users, 7)) == pytest.approx(standard_error(once))


def test_little_or_nothing() -> None:
    assert all(math.isnan(x) for x in estimate([]))
    mean, error = estimate([0.5, 0.7], ["a", "a"])
    assert mean == 0.6 and math.isnan(error)
    assert str(estimate([1, 0], [3, 4])) == "0.5000 ± 0.5000"
    assert all(math.isnan(x) for x in paired_difference([], []))
    assert str(estimate([])) == "nan ± nan" and str(paired_difference([], [])) == "+nan ± nan"
    assert all(math.isnan(x) for x in paired_difference([1.0, math.nan], [0.0, 1.0]))


@pytest.mark.parametrize("samples", [1, 2, 50])
@pytest.mark.parametrize("kind", [int, str])
def test_one_user_has_no_error_and_is_said_to_be_one(samples: int, kind: type) -> None:
    values, users = np.linspace(0.25, 0.75, samples + 2)[1:-1], [kind(7)] * samples
    found, difference = estimate(values, users), paired_difference(np.zeros(samples), values, users)
    assert str(found) == "0.5000 (one user)" and str(difference) == "-0.5000 (one user)"
    assert math.isnan(found.error) and math.isnan(difference.error) and difference.p == 1
    others = [kind(7 + at) for at in range(samples)]  # one sample, whoever's it is
    assert ("(one user)" in str(estimate(values, others))) == ("(one user)" in str(estimate(values))) == (samples == 1)


@pytest.mark.parametrize(
    ("users", "error", "message"),
    [
        ([1, 2], ValueError, r"users: expected one per sample \(3\), got shape \(2,\)"),
        ([0.5, 1.0, 2.0], TypeError, "users: expected all integers or all strings, got float"),
        (["a", 1, "1"], TypeError, "users: expected all integers or all strings, got int, str"),
    ],
)
def test_errors_name_the_argument(users: list[Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        standard_error([1.0, 2.0, 3.0], users)


def test_a_table_is_no_column() -> None:
    for of in (standard_error, estimate):
        with pytest.raises(ValueError, match=r"values: expected one number per sample, got shape \(2, 1\)"):
            of([[1.0], [2.0]])


# ------------------------------------------------------------------ two recommenders


def test_pairs_by_hand() -> None:
    one, other, users = [1, 1, 0, 1, 1, 0], [0, 1, 0, 0, 1, 0], ["a", "a", "b", "c", "c", "d"]
    found = paired_difference(one, other, users)
    assert found.mean == pytest.approx(2 / 6)
    assert found.error == pytest.approx(by_loop([1, 0, 0, 1, 0, 0], users))
    assert str(found).startswith("+0.3333 ± ")


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=6))
def test_p_is_the_share_of_sign_changes(differences: list[int]) -> None:
    """Every way to exchange the two, counted; the draws are within five of their standard deviations of that."""
    sums = np.array(differences, float)
    signs = np.array(np.meshgrid(*[[-1, 1]] * sums.size)).reshape(sums.size, -1)
    exact = float((np.abs(sums @ signs) >= abs(sums.sum())).mean())
    draws = 2000
    halves = np.repeat(sums / 2, 2), np.repeat(np.arange(sums.size), 2)  # two samples a user
    found = paired_difference(halves[0], np.zeros(2 * sums.size), halves[1], draws=draws)
    assert found.p == pytest.approx(exact, abs=5 * math.sqrt(exact * (1 - exact) / draws) + 1 / draws)


def test_equal_recommenders_differ_by_chance() -> None:
    found = paired_difference([1, 0, 1], [1, 0, 1], [1, 1, 2])
    assert found.mean == 0 and found.error == 0 and found.p == 1


def test_many_users_that_agree() -> None:
    """As in a fair test p has its smallest value, whatever the number of samples a user has."""
    found = paired_difference(np.ones(300), np.zeros(300), np.repeat(np.arange(30), 10), draws=500)
    assert found.p == pytest.approx(1 / 501)
    few = paired_difference(np.ones(300), np.zeros(300), np.repeat([0, 1], 150), draws=500)
    assert few.p == pytest.approx(0.5, abs=0.12)  # two users that agree: the other way round half of the time


def test_other_samples_are_refused() -> None:
    with pytest.raises(ValueError, match=r"other: expected one value per sample of one, .* got shape \(3,\)"):
        paired_difference([1, 2], [1, 2, 3])
    with pytest.raises(ValueError, match="draws: expected an integer in 1"):
        paired_difference([1, 2], [1, 2], draws=0)
