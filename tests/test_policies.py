# SPDX-License-Identifier: Apache-2.0
"""The four policies: the level of every item, the random draws, their JSON form, their errors."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import cases
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import patchkern as pk
from patchkern.policies import Level, policy_from_dict, policy_to_dict


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


def test_defaults() -> None:
    assert pk.TextOnly() == pk.TextOnly(max_items=100)
    assert pk.ItemPatches() == pk.ItemPatches(keep_text=5, max_items=100)
    assert pk.SessionPatches() == pk.SessionPatches(group_size=5, max_items=100, align="end")
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
