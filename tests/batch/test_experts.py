# SPDX-License-Identifier: Apache-2.0
"""The policy `Experts`: where it cuts, what it takes, how it is described, and what it refuses."""

from __future__ import annotations

import json
from typing import Any

import expert_cases as cases
import numpy as np
import pytest
from expert_cases import CATALOG, POLICIES, PROMPT, prompt_of

import patchkern as pk
from patchkern.batch.experts import settled_levels
from patchkern.batch.policy_dict import policy_from_dict, policy_to_dict

ITEMS = pk.ItemPatches(0, None)


def test_borders_never_move_while_a_history_grows() -> None:
    policy = pk.Experts(ITEMS, keep=3, block=4)
    cuts = policy.cuts(np.arange(40))
    assert (np.diff(cuts) >= 0).all() and set(np.diff(cuts)) == {0, 4} and (cuts % 4 == 0).all()
    recent = np.arange(40) - cuts
    assert recent[3:].min() == 3 and recent.max() == 6 and (recent[:3] == np.arange(3)).all()


def test_what_is_kept_where_nothing_is_said() -> None:
    assert pk.Experts(ITEMS).keep == 20 and pk.Experts(ITEMS, parts="blocks").keep == 1
    assert pk.Experts(ITEMS).max_items is None and pk.Experts(ITEMS, recent=pk.TextOnly(None)).recents == pk.TextOnly(
        None
    )
    assert pk.Experts(ITEMS).recents is ITEMS


@pytest.mark.parametrize("kind", POLICIES)
def test_a_description_gives_the_policy_back(kind: str) -> None:
    policy = POLICIES[kind]
    assert policy_from_dict(json.loads(json.dumps(policy_to_dict(policy)))) == policy


@pytest.mark.parametrize("inner", [cases.TEXT, cases.TAIL, pk.SessionPatches(3, None, align="start")])
def test_old_items_have_the_form_that_they_keep(inner: Any) -> None:
    """As in any history that is so long that none of them is recent."""
    longer = pk.Histories.from_sequences([range(40)])
    expected = inner.levels(longer)[:24]
    assert settled_levels(inner, np.arange(24)).tolist() == expected.tolist()
    assert settled_levels(inner, np.arange(6, 24)).tolist() == expected[6:].tolist(), "from the border of a session"


def test_sessions_never_cross_a_border() -> None:
    policy = pk.Experts(pk.SessionPatches(3, None, align="start"), count=1, keep=4, block=6, boundaries=None)
    prompt = prompt_of(policy)
    history = [item % cases.N_ITEMS for item in range(31)]
    layouts = [pk.build_layout(CATALOG, [history[:n]], policy, prompt) for n in range(32)]
    layouts.append(pk.build_training_layout(CATALOG, [history], policy, prompt, [[0, 30]]))
    for layout in layouts:
        for low, high in zip(layout.lo.tolist(), layout.hi.tolist(), strict=True):
            if low >= 0 and high - low > 1:
                first = layout.title_index[layout.items[low:high].long()].tolist()
                assert high - low == 3 and first[0] % 3 == 0, "whole sessions, from multiples of their size on"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"policy": pk.RandomItemPatches(0.5, None)},
            TypeError,
            "policy: .*RandomItemPatches, which draws at random",
        ),
        ({"policy": pk.ItemDropout(0.5, 1, None)}, TypeError, "policy: .*got ItemDropout, which draws at random"),
        ({"recent": pk.RandomItemPatches(0.5, None)}, TypeError, "recent: .*which draws at random"),
        ({"policy": pk.TimeSessions()}, TypeError, "policy: expected TextOnly.*got TimeSessions$"),
        ({"policy": None}, TypeError, "policy: .*got NoneType"),
        ({"policy": pk.SessionPatches(5, None)}, ValueError, 'policy: .*got align="end"'),
        ({"policy": pk.ItemPatches(0)}, ValueError, "policy: expected max_items=None.*got 100"),
        ({"recent": pk.TextOnly(9)}, ValueError, "recent: expected max_items=None.*got 9"),
        (
            {"policy": pk.SessionPatches(4, None, align="start")},
            ValueError,
            "block: expected a multiple of 4, the items of a session of policy.*got 50",
        ),
        ({"count": -1}, ValueError, "count: expected an integer in 0"),
        ({"count": 1.5}, TypeError, "count: expected an integer, got float"),
        ({"keep": -1}, ValueError, "keep: expected an integer in 0"),
        ({"block": 0}, ValueError, "block: expected an integer in 1"),
        ({"boundaries": 0}, ValueError, "boundaries: expected an integer in 1"),
        ({"seed": -1}, ValueError, "seed: expected an integer in 0"),
        ({"parts": "two"}, ValueError, "parts: expected one of one, blocks, got 'two'"),
        ({"parts": "blocks", "keep": 20}, ValueError, 'keep: expected 1 with parts="blocks", got 20'),
    ],
)
def test_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pk.Experts(**{"policy": ITEMS, **arguments})


def test_the_prompt_has_as_many_experts() -> None:
    policy = pk.Experts(ITEMS, count=2, keep=1, block=1)
    for prompt, got in ((PROMPT, "none"), (PROMPT.with_special(experts=[110]), "1 of them")):
        with pytest.raises(ValueError, match=rf"prompt: expected the token ids of 2 experts \(.*\), got {got}"):
            pk.build_layout(CATALOG, [[1, 2, 3]], policy, prompt)
        with pytest.raises(ValueError, match=r"prompt: expected the token ids of 2 experts"):
            pk.build_training_layout(CATALOG, [[1, 2, 3]], policy, prompt, [[0, 2]])
        with pytest.raises(ValueError, match=r"prompt: expected the token ids of 2 experts"):
            pk.training_rows(CATALOG, [[1, 2, 3]], policy, prompt, [[0, 2]])


def test_a_title_cannot_be_an_expert() -> None:
    policy = pk.Experts(ITEMS, count=1, keep=1, block=1)
    with pytest.raises(ValueError, match=r"catalog: expected titles without token 20, a learned row of the prompt"):
        pk.build_layout(CATALOG, [[1, 2, 3]], policy, PROMPT.with_special(experts=[20]))


def test_a_prompt_must_say_what_follows_the_experts() -> None:
    policy = pk.Experts(ITEMS, count=1, keep=0, block=2)
    prompt = pk.Prompt(prefix=[100], response_end=[105], experts=[110])
    with pytest.raises(ValueError, match="prompt: expected a suffix, which follows the experts"):
        pk.build_layout(CATALOG, [[1, 2]], policy, prompt, [3])
    with pytest.raises(ValueError, match="prompt: expected a suffix, which a branch"):
        pk.build_training_layout(CATALOG, [[1, 2, 3]], policy, prompt, [[0, 2]])


def test_errors_of_training_layouts_name_the_argument() -> None:
    policy = POLICIES["one, items"]
    prompt = prompt_of(policy)
    with pytest.raises(ValueError, match=r"target_ranges\[0\]: expected positions in 0..2, got \[0, 3\]"):
        pk.build_training_layout(CATALOG, [[1, 2, 3]], policy, prompt, [[0, 3]])
    with pytest.raises(ValueError, match=r"max_rows: expected at least \d+ for these users and targets, got 3"):
        pk.build_training_layout(CATALOG, [[1, 2, 3]], policy, prompt, [[0, 2]], max_rows=3)
    with pytest.raises(ValueError, match=r"histories: .*77"):
        pk.build_training_layout(CATALOG, [[1, 77, 3]], policy, prompt, [[0, 2]])


def test_empty_batches() -> None:
    for policy in POLICIES.values():
        prompt = prompt_of(policy)
        assert pk.build_layout(CATALOG, [], policy, prompt).num_rows == 0
        for head in ("titles", "items", "both"):
            layout = pk.build_training_layout(CATALOG, [[], [1]], policy, prompt, [[0, -1], [1, 0]], head=head)
            assert layout.num_rows == 0
            assert pk.training_rows(CATALOG, [[1]], policy, prompt, [[0, -1]], head=head).tolist() == [0]
