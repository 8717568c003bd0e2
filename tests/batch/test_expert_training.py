# SPDX-License-Identifier: Apache-2.0
"""Passes of many targets under `Experts`: every target is read as it is served, in rows that are counted beforehand."""

from __future__ import annotations

import pickle
from dataclasses import replace

import expert_cases as cases
import numpy as np
import pytest
from expert_cases import CATALOG, N_ITEMS, POLICIES, prompt_of

import patchkern as pk

HISTORIES = [np.random.default_rng(n).integers(0, N_ITEMS, n).tolist() for n in (14, 1, 5, 11, 9)]
RANGES = np.array([[0, 13], [0, 0], [3, 2], [4, 10], [8, 8]])
TARGETS = [(user, at) for user, (first, last) in enumerate(RANGES) for at in range(first, last + 1)]


def served(kind: str, user: int, position: int, ending: list[int], full: bool = False) -> list[int]:
    policy = POLICIES[kind]
    items = HISTORIES[user][:position]
    return cases.signatures(cases.rows_of(items, policy, CATALOG, prompt_of(policy), ending, full))


@pytest.mark.parametrize("head", ["titles", "both"])
@pytest.mark.parametrize("kind", [kind for kind in POLICIES if "drawn" not in kind])
def test_every_target_is_read_as_it_is_served(kind: str, head: str) -> None:
    policy = POLICIES[kind]
    prompt = prompt_of(policy)
    layout = pk.build_training_layout(CATALOG, HISTORIES, policy, prompt, RANGES, head=head)
    signs = np.array(cases.layout_signatures(pickle.loads(pickle.dumps(layout))))
    at = 0
    for nth, (user, position) in enumerate(TARGETS):
        title = cases.TITLES[HISTORIES[user][position]]
        response = [*title, *prompt.response_end]
        expected = served(kind, user, position, [*prompt.suffix, *response])
        rows = layout.logit_rows[at : at + len(response)]
        assert layout.logit_labels[at : at + len(response)].tolist() == response
        assert signs[rows].tolist() == expected[-1 - len(response) : -1]
        at += len(response)
        if head == "both":
            assert signs[layout.item_rows[nth]] == expected[-1 - len(response) - len(prompt.suffix)]
            assert layout.item_labels[nth] == HISTORIES[user][position]
    assert at == layout.logit_rows.shape[0]
    assert pk.training_rows(CATALOG, HISTORIES, policy, prompt, RANGES, head=head).sum() == layout.num_rows


@pytest.mark.parametrize("kind", [kind for kind in POLICIES if "drawn" not in kind])
def test_items_are_predicted_as_they_are_served_and_from_what_is_compressed(kind: str) -> None:
    policy = POLICIES[kind]
    prompt = prompt_of(policy)
    layout = pk.build_training_layout(CATALOG, HISTORIES, policy, prompt, RANGES, head="items")
    assert layout.logit_rows is None
    signs = np.array(cases.layout_signatures(pickle.loads(pickle.dumps(layout))))
    for nth, (user, position) in enumerate(TARGETS):
        assert signs[layout.item_rows[nth]] == served(kind, user, position, [])[-1]
        assert layout.item_labels[nth] == HISTORIES[user][position]
    rows = pk.training_rows(CATALOG, HISTORIES, policy, prompt, RANGES, head="items")
    assert rows.sum() == layout.num_rows
    more = list(zip(signs[layout.item_rows].tolist(), layout.item_labels.tolist(), strict=True))[len(TARGETS) :]
    assert sorted(more) == sorted(more_labels(kind))
    assert policy.least_recent == 0 or len(set(layout.item_rows.tolist())) == len(layout.item_rows), "no row twice"


def more_labels(kind: str) -> list[tuple[int, int]]:
    """Signatures of rows and items of what is learned beside the targets."""
    policy = POLICIES[kind]
    prompt, found = prompt_of(policy), []
    tail = isinstance(policy.recents, pk.SessionPatches) or getattr(policy.recents, "keep_text", 0)

    def cut(position: int) -> int:
        return int(policy.cuts(np.array([position]))[0])

    for user, (first, last) in enumerate(RANGES.tolist()):
        items, asked = HISTORIES[user], range(first, last + 1)
        borders = sorted({cut(position) for position in asked} - {0})
        if policy.parts == "blocks" and borders:
            borders = list(range(policy.block, borders[-1] + 1, policy.block))
        for border in borders if policy.count else []:
            # the last of the experts predicts what follows, and so does the last row that they see
            rows = cases.rows_of([*items, *items][: border + policy.least_recent], policy, CATALOG, prompt, [])
            signs = cases.signatures(rows)
            expert = max(n for n, row in enumerate(rows) if row.content == ("token", prompt.experts[-1]))
            if border in asked:
                found += [(signs[expert], border)] if policy.least_recent else []
                is_served = policy.has_one_form and not tail and (policy.parts == "blocks" or cut(border) == 0)
                found += [] if is_served else [(signs[expert - policy.count], border)]
        found = [(sign, at if isinstance(at, tuple) else (user, at)) for sign, at in found]
        if policy.parts == "blocks" or tail:
            continue
        for border in borders:
            latest = max(position for position in asked if cut(position) == border)
            for position in range(border + 1, latest + 1):
                if position in asked and cut(position) != border:
                    # behind these experts, but served behind others
                    early = replace(policy, keep=position - border)
                    rows = cases.rows_of(items[:position], early, CATALOG, prompt, [])
                    found.append((cases.signatures(rows)[-1], (user, position)))
        for position in asked if policy.has_one_form else []:
            if cut(position) and not (policy.count and position in borders):
                rows = cases.rows_of(items[:position], policy, CATALOG, prompt, [], full=True)
                found.append((cases.signatures(rows)[-1], (user, position)))
    return [(sign, HISTORIES[user][position]) for sign, (user, position) in found]


@pytest.mark.parametrize("head", ["titles", "items"])
@pytest.mark.parametrize("kind", ["one, items", "one, text last", "one, sessions", "one, sessions without text"])
def test_no_draw_takes_more_rows_than_are_counted(kind: str, head: str) -> None:
    policy = replace(POLICIES[kind], boundaries=1)
    counted = pk.training_rows(CATALOG, HISTORIES, policy, prompt_of(policy), RANGES, head=head)
    for user, (history, most) in enumerate(zip(HISTORIES, counted.tolist(), strict=True)):
        taken = {
            pk.build_training_layout(
                *(CATALOG, [history], replace(policy, seed=seed), prompt_of(policy), RANGES[user : user + 1]),
                head=head,
                transpose=False,
            ).num_rows
            for seed in range(12)
        }
        assert max(taken) == most if len(taken) > 1 else max(taken) <= most


@pytest.mark.parametrize("head", ["titles", "items"])
def test_borders_are_drawn_anew_with_every_seed(head: str) -> None:
    policy = POLICIES["one, drawn"]
    prompt = prompt_of(policy)
    most = pk.training_rows(CATALOG, HISTORIES, policy, prompt, RANGES, head=head)
    seen: set[tuple[int, ...]] = set()
    rows = []
    for seed in range(40):
        layout = pk.build_training_layout(
            CATALOG, HISTORIES, replace(policy, seed=seed), prompt, RANGES, head=head, transpose=False
        )
        is_expert = -1 - layout.lo == prompt.experts[0]
        assert int(is_expert.sum()) == 3, "one border for each of three users"
        seen.add(tuple(layout.position_ids[is_expert].tolist()))
        rows.append(layout.num_rows)
        # what is not cut there is served with its whole history
        signs = np.array(cases.layout_signatures(layout))
        if head == "items":
            for nth, (user, position) in enumerate(TARGETS):
                ways = {served("one, drawn", user, position, [], full)[-1] for full in (False, True)}
                assert signs[layout.item_rows[nth]] in ways
    assert len(seen) == 6 and max(rows) <= most.sum()
    assert max(rows) > 0.9 * most.sum()
    every = replace(policy, boundaries=9)
    layout = pk.build_training_layout(CATALOG, HISTORIES, every, prompt, RANGES, head=head)
    all_of_them = pk.training_rows(CATALOG, HISTORIES, replace(policy, boundaries=None), prompt, RANGES, head=head)
    assert layout.num_rows == all_of_them.sum()
