# SPDX-License-Identifier: Apache-2.0
"""Branches that several targets read: what each reads is its own items, and nobody shares a patch that goes on."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import cases
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import patchkern as pk
from patchkern.batch.branches import Branches, numbered

T, P, J, D = pk.Level.TEXT, pk.Level.PATCH, pk.Level.JOIN, pk.Level.DROP
CATALOG = cases.make_catalog(cases.make_titles(8))


def branches_of(items: list[list[int]], levels: list[list[int]], *trunks: list[int], head: str = "items") -> Branches:
    """Of samples' own items and their levels."""
    flat = np.array([level for sample in levels for level in sample], np.uint8)
    keys = [np.array(trunk, np.int64) for trunk in trunks]
    return Branches.behind(CATALOG, pk.Histories.from_sequences(items), flat, *keys, head=head)


@pytest.mark.parametrize(
    ("levels", "of"),
    [
        ([[], [P], [P, P], [P, P, P]], [-1, 0, 0, 0]),
        ([[P], [P, J], [P, J, P], [P, J, P, P]], [0, 1, 1, 1]),  # the first one's patch goes on
        ([[P], [T, P], [T, P, T]], [0, 1, 1]),
        ([[P], [P, T], [T, P, T]], [0, 1, 2]),
        ([[P], [P, D, J], [D]], [0, 1, 2]),  # what joins behind the item that is left out
        ([[T, T], [T], [T, T, T], []], [0, 0, 0, -1]),
    ],
)
def test_by_hand(levels: list[list[int]], of: list[int]) -> None:
    items = [list(range(len(sample))) for sample in levels]
    trunk = [0] * len(levels)
    branches = branches_of(items, levels, trunk)
    assert branches.of.tolist() == of and branches.own.tolist() == [len(sample) for sample in levels]
    assert [list(run) for run in branches.runs.items] == [items[sample] for sample in branches.sample]
    for head in ("titles", "both"):
        assert branches_of(items, levels, trunk, head=head).of.tolist() == list(range(len(levels)))


def test_only_what_is_read_before_them_alike_is_shared() -> None:
    items, levels = [[3], [3, 4], [3, 4, 5], [3, 4, 5, 6]], [[P] * n for n in range(1, 5)]
    assert branches_of(items, levels, [0, 0, 1, 1], [5, 5, 5, 5]).of.tolist() == [0, 0, 1, 1]
    assert branches_of(items, levels, [0, 0, 0, 0], [5, 7, 5, 7]).of.tolist() == [0, 1, 0, 1]
    assert branches_of([], [], []).of.tolist() == []


def test_numbers_are_ranks() -> None:
    assert numbered(np.array([2, 0, 2, 0]), np.array([1, 9, 0, 9])).tolist() == [2, 0, 1, 0]


@st.composite
def samples(draw: st.DrawFn) -> tuple[list[list[int]], list[list[int]], list[int]]:
    """Users whose own items begin one item sequence each, with any levels, most of them nested."""
    items, levels, trunks = [], [], []
    for trunk in range(draw(st.integers(1, 4))):
        whole = draw(st.lists(st.integers(0, 7), max_size=8))
        form = [draw(st.sampled_from([T, P, D] if place == 0 else [T, P, P, J, D])) for place in range(len(whole))]
        for place in range(1, len(form)):
            if form[place] == J and form[place - 1] not in (P, J):
                form[place] = P
        for length in sorted(draw(st.sets(st.integers(0, len(whole)), max_size=5))):
            own = list(form[:length])
            if length and draw(st.integers(0, 3)) == 0:
                own[-1] = draw(st.sampled_from([T, P]))
            items.append(whole[:length])
            levels.append(own)
            trunks.append(trunk)
    return items, levels, trunks


@given(samples(), st.integers(0, 2), st.booleans())
def test_every_sample_reads_its_own_items(drawn: Any, separator: int, led: bool) -> None:
    items, levels, trunks = drawn
    branches = branches_of(items, levels, trunks)
    flat, offsets = branches.runs.levels.tolist(), branches.runs.items.offsets.tolist()
    leads = branches.leads(np.full(len(items), int(led)))
    rows = branches.rows(leads, separator)
    longest: dict[int, int] = defaultdict(int)
    for own, trunk in zip(items, trunks, strict=True):
        longest[trunk] = max(longest[trunk], len(own))
    for sample, (own, form, trunk) in enumerate(zip(items, levels, trunks, strict=True)):
        branch = branches.of[sample]
        if not own:
            assert branch == -1 and rows[sample] == 0
            continue
        held, has = list(branches.runs.items[branch]), flat[offsets[branch] : offsets[branch + 1]]
        assert trunks[branches.sample[branch]] == trunk
        assert held[: len(own)] == own and has[: len(own)] == form
        after = [level for level in has[len(own) :] if level != D]
        assert not after or after[0] != J, "no patch goes on behind what a sample reads"
        entries = sum(level in (T, P) for level in form)
        expected = sum(
            CATALOG.lengths[item] if level == T else level == P for item, level in zip(own, form, strict=True)
        )
        own_separators = max(entries - 1, 0) + (led and entries > 0)
        assert rows[sample] == expected + own_separators * separator
        if len(has) < longest[trunk]:
            assert branches.sample[branch] == sample, "those that do not begin the longest read alone"
    assert sorted(set(branches.of.tolist()) - {-1}) == list(range(len(branches.sample)))
