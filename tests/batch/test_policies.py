# SPDX-License-Identifier: Apache-2.0
"""The four policies: the level of every item, the random draws, their JSON form, their errors."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import cases
import numpy as np
import pytest
from error_cases import OwnPolicy, refused
from hypothesis import given
from hypothesis import strategies as st

import patchkern as pk
from patchkern.batch.policy_dict import policy_from_dict, policy_to_dict
from patchkern.batch.policy_kinds import Level


def histories_of(lengths: list[int]) -> pk.Histories:
    return pk.Histories(np.arange(sum(lengths)), np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))


def expected_levels(policy: Any, length: int) -> list[Level]:
    levels: list[Level] = []
    for kind, positions in cases.oracle_entries(policy, length):
        levels += [Level.TEXT] if kind == "text" else [Level.PATCH] + [Level.JOIN] * (len(positions) - 1)
    return levels


DETERMINISTIC = {name: policy for name, policy in cases.POLICIES.items() if not name.startswith("random")}


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_levels_of_every_length(name: str) -> None:
    policy = DETERMINISTIC[name]
    lengths = [*range(80), 0, 500, 0]
    levels = policy.levels(histories_of(lengths))
    assert levels.dtype == np.uint8
    assert levels.tolist() == [level for length in lengths for level in expected_levels(policy, length)]


@given(policy=cases.policies(), lengths=st.lists(st.integers(0, 40), max_size=8))
def test_levels_of_random_batches(policy: Any, lengths: list[int]) -> None:
    levels = policy.levels(histories_of(lengths))
    assert levels.shape == (sum(lengths),) and levels.dtype == np.uint8
    if isinstance(policy, pk.RandomItemPatches):
        assert set(levels.tolist()) <= {Level.TEXT, Level.PATCH}
    else:
        assert levels.tolist() == [level for length in lengths for level in expected_levels(policy, length)]


def test_by_hand() -> None:
    text, patch, join = Level.TEXT, Level.PATCH, Level.JOIN
    histories = histories_of([0, 1, 3, 7])
    assert pk.TextOnly().levels(histories).tolist() == [text] * 11
    assert pk.ItemPatches(keep_text=2).levels(histories).tolist() == [
        *(text,),
        *(patch, text, text),
        *(patch, patch, patch, patch, patch, text, text),
    ]
    assert pk.SessionPatches(group_size=2).levels(histories).tolist() == [
        *(text,),
        *(patch, text, text),
        *(patch, patch, join, patch, patch, text, text),
    ]
    assert pk.SessionPatches(group_size=2, align="start").levels(histories).tolist() == [
        *(text,),
        *(patch, text, text),
        *(patch, join, patch, patch, patch, text, text),
    ]
    assert pk.SessionPatches(group_size=2, keep_text=0, keep_items=1).levels(histories).tolist() == [
        *(patch,),
        *(patch, join, patch),
        *(patch, join, patch, join, patch, join, patch),
    ]
    assert pk.SessionPatches(group_size=3, align="start", keep_text=1, keep_items=0).levels(histories).tolist() == [
        *(text,),
        *(patch, patch, text),
        *(patch, join, join, patch, join, join, text),
    ]


def test_defaults() -> None:
    assert pk.TextOnly() == pk.TextOnly(max_items=100)
    assert pk.ItemPatches() == pk.ItemPatches(keep_text=5, max_items=100)
    assert pk.SessionPatches() == pk.SessionPatches(group_size=5, max_items=100, align="end")
    histories = histories_of(range(30))
    for align in ("end", "start"):
        said = pk.SessionPatches(4, None, align, keep_text=4, keep_items=4)
        assert np.array_equal(said.levels(histories), pk.SessionPatches(4, None, align).levels(histories))
    assert pk.RandomItemPatches() == pk.RandomItemPatches(probability=0.3, max_items=100, seed=0)


# ------------------------------------------------------------------ random draws


def test_random_is_the_stated_probability() -> None:
    histories = histories_of([50_000, 0, 50_000])
    for probability in (0.05, 0.3, 0.5, 0.95):
        drawn = pk.RandomItemPatches(probability, None, seed=3).levels(histories) == Level.PATCH
        # Four standard deviations of a binomial share.
        assert abs(drawn.mean() - probability) < 4 * (probability * (1 - probability) / 100_000) ** 0.5
        # Independent of the neighbour: the share of adjacent pairs is the square.
        pairs = (drawn[1:] & drawn[:-1]).mean()
        assert abs(pairs - probability**2) < 0.01


def test_random_extremes() -> None:
    histories = histories_of([1000])
    assert not pk.RandomItemPatches(0.0, None).levels(histories).any()
    assert not pk.RandomItemPatches(0, None).levels(histories).any()
    assert (pk.RandomItemPatches(1.0, None).levels(histories) == Level.PATCH).all()


def test_random_depends_on_its_seed_only() -> None:
    histories = histories_of([300, 200])
    one = pk.RandomItemPatches(0.5, None, seed=1)
    np.random.seed(1)
    first = one.levels(histories)
    np.random.seed(2)
    assert np.array_equal(one.levels(histories), first)
    assert not np.array_equal(pk.RandomItemPatches(0.5, None, seed=2).levels(histories), first)


# ------------------------------------------------------------------ values


@given(policy=cases.policies())
def test_json_round_trip(policy: Any) -> None:
    assert policy_from_dict(json.loads(json.dumps(policy_to_dict(policy)))) == policy


def test_numpy_arguments_reach_json() -> None:
    policy = pk.SessionPatches(group_size=np.int64(4), max_items=np.int32(9))  # type: ignore[arg-type]
    assert policy_from_dict(json.loads(json.dumps(policy_to_dict(policy)))) == pk.SessionPatches(4, 9)
    random = pk.RandomItemPatches(probability=np.float32(0.5), seed=np.int64(3))  # type: ignore[arg-type]
    assert policy_from_dict(json.loads(json.dumps(policy_to_dict(random)))) == pk.RandomItemPatches(0.5, seed=3)


def test_policies_are_frozen_and_comparable() -> None:
    policy = pk.ItemPatches(keep_text=3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.keep_text = 4  # type: ignore[misc]
    assert policy == pk.ItemPatches(keep_text=3) and hash(policy) == hash(pk.ItemPatches(keep_text=3))
    assert policy != pk.ItemPatches(keep_text=4)


class EveryOtherItem:
    """A user's own policy: nothing but `max_items` and `levels`."""

    max_items = 6

    def levels(self, histories: pk.Histories) -> np.ndarray:
        return (np.arange(histories.items.size) % 2).astype(np.uint8)


def test_own_policy() -> None:
    titles: dict[Any, list[int]] = {0: [1, 2], 1: [3, 4]}
    layout = cases.Batch(titles, [[0, 0, 1, 0, 1, 1, 0]], EveryOtherItem(), cases.NO_PROMPT).layout()
    # The first item is cut off; of the other six every second one is a patch.
    assert layout.lo.tolist() == [-2, -3, 0, -2, -3, 1, -4, -5, 2]
    assert layout.history_rows == 9


# ------------------------------------------------------------------ sessions by time


def timed(*users: list[int]) -> pk.Histories:
    times = [time for user in users for time in user]
    return pk.Histories(np.arange(len(times)), np.cumsum([0, *map(len, users)]), times)


def test_time_sessions_by_hand() -> None:
    text, patch, join = Level.TEXT, Level.PATCH, Level.JOIN
    policy = pk.TimeSessions(gap=10, keep_text=1, keep_items=2)
    users = timed([0, 10, 21, 22, 30, 100, 100, 100], [], [5], [5, 5, 5, 5])
    assert policy.levels(users).tolist() == [
        *(patch, join, patch, join, join, patch, patch, text),
        *(text,),
        *(patch, patch, patch, text),
    ]
    narrow = pk.TimeSessions(gap=10, keep_text=0, keep_items=0, max_size=2)
    assert narrow.levels(timed([0, 1, 2, 3, 50, 51], [52])).tolist() == [patch, join, patch, join, patch, join, patch]
    assert pk.TimeSessions(gap=0, keep_text=0, keep_items=0).levels(timed([1, 1, 2])).tolist() == [patch, join, patch]


@given(
    times=st.lists(st.lists(st.integers(0, 300).map(lambda t: t * t), max_size=30).map(sorted), max_size=4),
    gap=st.integers(0, 5000),
    keep_text=st.integers(0, 4),
    keep_items=st.integers(0, 4),
    max_size=st.none() | st.integers(1, 6),
)
def test_time_sessions_item_by_item(
    times: list[list[int]], gap: int, keep_text: int, keep_items: int, max_size: int | None
) -> None:
    expected = []
    for user in times:
        size = 0
        for place, time in enumerate(user):
            joins = place > 0 and time - user[place - 1] <= gap and (max_size is None or size < max_size)
            size = size + 1 if joins else 1
            left = len(user) - place
            old = Level.JOIN if joins else Level.PATCH
            expected.append(Level.TEXT if left <= keep_text else Level.PATCH if left <= keep_text + keep_items else old)
    policy = pk.TimeSessions(gap, keep_text, keep_items, max_size)
    assert policy.levels(timed(*times)).tolist() == expected


def test_time_sessions_keep_their_borders_while_a_history_grows() -> None:
    policy = pk.TimeSessions(gap=60, keep_text=2, keep_items=3, max_size=4)
    times = np.cumsum(np.random.default_rng(0).integers(0, 120, 80)).tolist()
    before = policy.levels(timed(times[:60])).tolist()
    youngest = max(place for place in range(55) if before[place] == Level.PATCH)
    assert policy.levels(timed(times)).tolist()[:youngest] == before[:youngest]


def test_time_sessions_need_rising_timestamps() -> None:
    with pytest.raises(ValueError, match=r"histories: expected timestamps, which TimeSessions goes by, got none"):
        pk.TimeSessions().levels(histories_of([3]))
    with pytest.raises(ValueError, match=r"timestamps that never fall within a user, got 9 then 8 at 3"):
        pk.TimeSessions().levels(timed([7, 5 + 2], [9, 8]))


@pytest.mark.parametrize(("factor", "unit"), [(1000, "milliseconds"), (10**6, "microseconds"), (10**9, "nanoseconds")])
def test_time_sessions_notice_other_units_than_seconds(factor: int, unit: str) -> None:
    seconds = [978_300_019, 978_300_055, 4_102_444_800]  # of 2001 and of 2100
    assert pk.TimeSessions(keep_text=0, keep_items=0).levels(timed(seconds)).tolist() == [1, 2, 1]
    with pytest.raises(ValueError, match=rf"timestamps in seconds, got \d+, .* like {unit}; divide by {factor:,}"):
        pk.TimeSessions().levels(timed([factor * t for t in seconds]))


# ------------------------------------------------------------------ a budget of rows


def granularities(length: int, keep_text: int, group_size: int) -> list[list[Level]]:
    """Every choice that `FitRows` has for one user, the finest first."""
    old = max(length - keep_text, 0)
    text = [Level.TEXT] * (length - old)
    choices = [[Level.PATCH] * m + [Level.TEXT] * (old - m) + text for m in range(old + 1)]
    size = group_size
    while old > 1:
        size = min(size, old)
        session = [Level.PATCH] + [Level.JOIN] * (size - 1)
        choices += [session * q + [Level.PATCH] * (old - q * size) + text for q in range(1, old // size + 1)]
        if size == old:
            break
        size *= 2
    return choices


def rows_of(levels: list[Level], title_lengths: list[int], prompt: pk.Prompt) -> int:
    entries = [n if level == Level.TEXT else 1 for level, n in zip(levels, title_lengths, strict=True)]
    entries = [n for level, n in zip(levels, entries, strict=True) if level != Level.JOIN]
    separators = len(prompt.separator) * max(len(entries) - 1, 0)
    return len(prompt.prefix) + sum(entries) + separators + len(prompt.suffix)


@given(
    titles=st.lists(st.lists(st.integers(1, 7), max_size=40), min_size=1, max_size=4),
    max_rows=st.integers(1, 120),
    keep_text=st.integers(0, 4),
    group_size=st.integers(2, 6),
    separator=st.integers(0, 2),
)
def test_fit_rows_is_the_finest_choice_that_fits(
    titles: list[list[int]], max_rows: int, keep_text: int, group_size: int, separator: int
) -> None:
    prompt = pk.Prompt(prefix=[1] * 3, separator=[2] * separator, suffix=[3] * 2)
    policy = pk.FitRows(max_rows, keep_text, group_size)
    flat = np.array([n for user in titles for n in user], np.int64)
    expected, refusals = [], []
    for number, user in enumerate(titles):
        choices = granularities(len(user), keep_text, group_size)
        least = min(rows_of(levels, user, prompt) for levels in choices)
        if least > max_rows:
            refusals.append(f"max_rows: expected at least {least} for user {number}, ")
        else:
            expected += next(levels for levels in choices if rows_of(levels, user, prompt) <= max_rows)
    histories = histories_of([*map(len, titles)])
    if refusals:
        with pytest.raises(ValueError, match="|".join(refusals)):
            policy.fit(histories, flat, prompt)
    else:
        assert policy.fit(histories, flat, prompt).tolist() == expected


def test_fit_rows_reaches_the_layout() -> None:
    """`build_layout` hands over the titles' lengths, and the prompt that comes out has the rows asked for."""
    batch = cases.make_batch(pk.TextOnly(None), [60, 5, 0, 23], with_targets=False)
    catalog, histories, _, prompt, _ = batch.arguments()
    text = pk.build_layout(catalog, histories, pk.TextOnly(None), prompt).cu_seqlens.diff()
    previous = text
    for max_rows in (300, 100, 70, 40, 30):
        rows = pk.build_layout(catalog, histories, pk.FitRows(max_rows, keep_text=2), prompt).cu_seqlens.diff()
        assert int(rows.max()) <= max_rows and (rows <= previous).all()
        assert (rows[text <= max_rows] == text[text <= max_rows]).all()
        previous = rows


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: pk.FitRows(0), ValueError, "max_rows: expected an integer in 1.."),
        (lambda: pk.FitRows(9, group_size=1), ValueError, "group_size: expected an integer in 2.."),
        (lambda: pk.FitRows(9, keep_text=-1), ValueError, "keep_text: expected an integer in 0.."),
        (lambda: pk.FitRows("9"), TypeError, "max_rows: expected an integer, got str"),
        (lambda: pk.TimeSessions(gap=-1), ValueError, "gap: expected an integer in 0.."),
        (lambda: pk.TimeSessions(gap=1.5), TypeError, "gap: expected an integer, got float"),
        (lambda: pk.TimeSessions(max_size=0), ValueError, "max_size: expected an integer in 1.."),
        (lambda: pk.TimeSessions(keep_items=True), TypeError, "keep_items: expected an integer, got bool"),
    ],
)
def test_arguments_of_policies_for_long_histories(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_policies_for_long_histories_have_a_json_form() -> None:
    for policy in (pk.TimeSessions(60, 1, 2, 3, 4), pk.FitRows(100, 1, 2, None)):
        assert policy_from_dict(json.loads(json.dumps(policy_to_dict(policy)))) == policy


# ------------------------------------------------------------------ wrong arguments


def test_nan_probability() -> None:
    refused(pk.RandomItemPatches, ValueError, r"probability: expected a number in 0\.\.1, got nan", float("nan"))
    refused(pk.RandomItemPatches, ValueError, r"probability: .*got nan", np.float32("nan"))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: pk.TextOnly(max_items=0), ValueError, r"max_items: .*got 0"),
        (lambda: pk.TextOnly(max_items=-5), ValueError, r"max_items: .*got -5"),
        (lambda: pk.TextOnly(max_items=1.5), TypeError, r"max_items: expected an integer, got float"),
        (lambda: pk.TextOnly(max_items="all"), TypeError, r"max_items: expected an integer, got str"),
        (lambda: pk.TextOnly(max_items=True), TypeError, r"max_items: expected an integer, got bool"),
        (lambda: pk.TextOnly(max_items=10**30), ValueError, r"max_items: .*got 10{30}"),
        (lambda: pk.ItemPatches(keep_text=-1), ValueError, r"keep_text: .*got -1"),
        (lambda: pk.ItemPatches(keep_text=None), TypeError, r"keep_text: expected an integer, got NoneType"),
        (lambda: pk.ItemPatches(keep_text=2.0), TypeError, r"keep_text: expected an integer, got float"),
        (lambda: pk.ItemPatches(keep_text=10**30), ValueError, r"keep_text: .*got 10{30}"),
        (lambda: pk.ItemPatches(max_items=0), ValueError, r"max_items: .*got 0"),
        (lambda: pk.SessionPatches(group_size=0), ValueError, r"group_size: .*got 0"),
        (lambda: pk.SessionPatches(group_size="5"), TypeError, r"group_size: expected an integer, got str"),
        (lambda: pk.SessionPatches(group_size=10**30), ValueError, r"group_size: .*got 10{30}"),
        (lambda: pk.SessionPatches(max_items=0), ValueError, r"max_items: .*got 0"),
        (lambda: pk.SessionPatches(align="middle"), ValueError, r'align: expected "end" or "start", got \'middle\''),
        (lambda: pk.SessionPatches(align=None), ValueError, r"align: .*got None"),
        (lambda: pk.SessionPatches(keep_text=-1), ValueError, r"keep_text: .*got -1"),
        (lambda: pk.SessionPatches(keep_items=1.0), TypeError, r"keep_items: expected an integer, got float"),
        (lambda: pk.RandomItemPatches(probability=1.5), ValueError, r"probability: expected .* 0\.\.1, got 1.5"),
        (lambda: pk.RandomItemPatches(probability=-0.1), ValueError, r"probability: .*got -0.1"),
        (lambda: pk.RandomItemPatches(probability=float("inf")), ValueError, r"probability: .*got inf"),
        (lambda: pk.RandomItemPatches(probability="half"), TypeError, r"probability: expected a number, got str"),
        (lambda: pk.RandomItemPatches(probability=None), TypeError, r"probability: expected a number, got NoneType"),
        (lambda: pk.RandomItemPatches(probability=True), TypeError, r"probability: expected a number, got bool"),
        (lambda: pk.RandomItemPatches(seed=-1), ValueError, r"seed: .*got -1"),
        (lambda: pk.RandomItemPatches(seed=0.5), TypeError, r"seed: expected an integer, got float"),
        (lambda: policy_from_dict({"name": "Patches"}), ValueError, r"description: .* TextOnly.*, got 'Patches'"),
        (lambda: policy_from_dict({}), ValueError, r"description: .*got None"),
        (lambda: policy_from_dict({"name": "TextOnly", "keep": 5}), TypeError, r"keep"),
        (lambda: policy_to_dict(OwnPolicy(None)), TypeError, r"policy: expected one of TextOnly.*, got OwnPolicy"),
    ],
)
def test_policies_refuse(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    refused(make, error, message)
