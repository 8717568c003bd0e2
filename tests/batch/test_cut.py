# SPDX-License-Identifier: Apache-2.0
"""Cuts that move several items at a time: what is kept, what prompts then share, and training on the same histories."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from cases import make_catalog, make_histories, make_titles
from hypothesis import given
from hypothesis import strategies as st
from prompt_cases import compute, computed_rows
from search_oracle import PROMPT, make_model
from training_cases import make_data
from training_cases import make_model as make_trained

import patchkern as pk
from patchkern.batch.policy_dict import policy_from_dict, policy_to_dict
from patchkern.search.user_cache import UserCache
from patchkern.training import target_nll
from patchkern.training.collators import LayoutCollator, PassCollator
from patchkern.training.passes import Pass, SlotDataset

TITLES = make_titles(23)
CATALOG = make_catalog(dict(TITLES))


def begin(length: int, max_items: int, every: int) -> int:
    """The first item that stays: the cut goes on, ``every`` items at a time, while ``max_items`` are left behind it."""
    first = 0
    while length - (first + every) >= max_items:
        first += every
    return first


@given(st.lists(st.integers(0, 90), max_size=6), st.integers(1, 40), st.integers(1, 25))
def test_what_is_kept(lengths: list[int], max_items: int, every: int) -> None:
    users = [list(range(length)) for length in lengths]
    kept = pk.Histories.coerce(users).latest(max_items, every)
    assert [user.tolist() for user in kept] == [user[begin(len(user), max_items, every) :] for user in users]
    long = np.array(lengths, np.int64) >= max_items
    assert (kept.lengths[long] >= max_items).all() and (kept.lengths[long] < max_items + every).all()
    again = kept.latest(max_items, every)
    assert again.items.tolist() == kept.items.tolist() and again.offsets.tolist() == kept.offsets.tolist()
    index = np.arange(len(users))
    before = pk.Histories.coerce(users).before(index, np.array(lengths, np.int64), max_items, every)
    assert before.items.tolist() == kept.items.tolist()


def test_the_times_are_cut_with_the_items() -> None:
    histories = pk.Histories(range(10), [0, 10], timestamps=range(100, 110))
    kept = histories.latest(4, 3)
    np.testing.assert_array_equal(kept.timestamps, np.arange(106, 110))


@pytest.mark.parametrize(
    "make",
    [
        lambda **cut: pk.TextOnly(12, **cut),
        lambda **cut: pk.ItemPatches(2, 12, **cut),
        lambda **cut: pk.SessionPatches(3, 12, "start", **cut),
        lambda **cut: pk.RandomItemPatches(0.5, 12, 7, **cut),
        lambda **cut: pk.ItemDropout(0.5, 2, 12, 7, **cut),
        lambda **cut: pk.FitRows(500, max_items=12, **cut),
    ],
)
def test_every_policy_has_it(make: Callable[..., Any]) -> None:
    (history,) = make_histories(TITLES, [31])
    policy, plain = make(cut_every=5), make()
    layout = pk.build_layout(CATALOG, [history], policy, PROMPT)
    # 31 - 12 = 19: three times five items are gone
    expected = pk.build_layout(CATALOG, [history[15:]], make(cut_every=5), PROMPT)
    assert layout.lo.tolist() == expected.lo.tolist() and layout.history_tokens == expected.history_tokens
    assert pk.row_counts(CATALOG, [history], policy, PROMPT).tolist() == [layout.num_rows]
    assert policy != plain and policy_from_dict(json.loads(json.dumps(policy_to_dict(policy)))) == policy
    assert "cut_every" not in policy_to_dict(plain) and policy_from_dict(policy_to_dict(plain)) == plain


def shared(policy: Any, history: list[Any]) -> float:
    """Of the rows of each prompt, how many it has in common with the one before, an item ago: beginnings alone."""
    hashes = [
        pk.row_hashes(pk.build_layout(CATALOG, [history[:end]], policy, PROMPT)) for end in range(200, len(history) + 1)
    ]
    common = 0
    for one, two in pairwise(hashes):
        size = min(one.size, two.size)
        common += int(np.append(one[:size] == two[:size], False).argmin())
    return common / sum(x.size for x in hashes[1:])


def test_prompts_share_their_beginnings_while_the_cut_stays() -> None:
    """Items 0 to 19 of every 20 move the text alone, sessions the patches before it too; the 20th moves all."""
    (history,) = make_histories(TITLES, [260])
    items, sessions = pk.ItemPatches(keep_text=2), pk.SessionPatches(group_size=5, align="start")
    assert shared(items, history) < 0.05 and shared(sessions, history) < 0.05
    assert shared(replace(items, cut_every=20), history) > 0.85
    assert shared(replace(sessions, cut_every=20), history) > 0.6


def test_a_users_cache_finds_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(TITLES)
    (history,) = make_histories(TITLES, [80])
    rows = computed_rows(monkeypatch)
    computed = {}
    for every in (1, 10):
        policy = pk.ItemPatches(keep_text=1, max_items=40, cut_every=every)
        cache = UserCache(model, 1 << 24)
        compute(model, [history[:60]], policy, user_cache=cache)
        rows.clear()
        for end in range(61, 80):
            compute(model, [history[:end]], policy, user_cache=cache)
        computed[every] = sum(rows)
    assert computed[10] < computed[1] / 3


def test_the_likelihood_in_one_pass_is_that_of_samples() -> None:
    """Training layouts begin histories where `build_layout` cuts them: beyond max_items too."""
    model = make_model(TITLES)
    policy = pk.ItemPatches(keep_text=2, max_items=12, cut_every=5)
    (history,) = make_histories(TITLES, [40])
    samples = (np.zeros(30, np.int64), np.arange(10, 40))
    nll = target_nll(model, [history], samples, policy)
    for position, value in zip(samples[1].tolist(), nll.tolist(), strict=True):
        table = model.score_items([history[:position]], policy, items=[history[position]])
        assert value == pytest.approx(-float(table[0, 0]), abs=1e-10)
    layout = pk.build_training_layout(CATALOG, [history], policy, PROMPT, [[30, 39]])
    rows = pk.training_rows(CATALOG, [history], policy, PROMPT, [[30, 39]])
    assert rows.tolist() == [layout.num_rows]
    assert layout.num_users == 2 + 10 + 1  # trunks that begin at items 15, 20 and 25, and the branches


@pytest.mark.parametrize("pretrain_steps", [None, 4])
def test_samples_are_trained_as_they_are_served(pretrain_steps: int | None) -> None:
    histories, (users, positions) = make_data()
    model, _ = make_trained()
    policy = pk.ItemPatches(2, max_items=6, cut_every=4)
    collator = LayoutCollator(model.catalog, histories, policy, model.prompt, pretrain_steps, seed=5)
    slots = [SlotDataset(users, positions, steps=5, samples_per_step=8, seed=0)[number] for number in range(8)]
    layout = collator(slots)["layout"]
    whole = [histories[slot.user][: slot.position] for slot in slots] * (1 if pretrain_steps is None else 2)
    kept = [len(user) - begin(len(user), 6, 4) for user in whole]
    assert max(kept) > 6
    left = [user[len(user) - n :] for user, n in zip(whole, kept, strict=True)]
    assert layout.history_tokens == sum(int(model.catalog.lengths[model.catalog.index_of(user)].sum()) for user in left)
    one = Pass(0, 0, np.array([0]), np.array([[0, len(histories[0]) - 1]]))
    trunks = PassCollator(model.catalog, histories, policy, model.prompt, pretrain_steps, seed=5)([one])["layout"]
    assert trunks.num_rows <= int(
        PassCollator(model.catalog, histories, policy, model.prompt, pretrain_steps).rows(one.users, one.ranges)[0]
    )


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: pk.TextOnly(cut_every=0), ValueError, r"cut_every: expected an integer in 1.*got 0"),
        (lambda: pk.SessionPatches(cut_every=2.0), TypeError, r"cut_every: expected an integer, got float"),
        (lambda: pk.ItemDropout(cut_every=-1), ValueError, r"cut_every: .*got -1"),
        (lambda: pk.Histories([1], [0, 1]).latest(1, 0), ValueError, r"cut_every: .*got 0"),
        (lambda: pk.Histories([1], [0, 1]).before([0], [1], 1, True), TypeError, r"cut_every: .*got bool"),
    ],
)
def test_refused(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
