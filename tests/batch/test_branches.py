# SPDX-License-Identifier: Apache-2.0
"""Branches: what each sample reads there is its own items; what several read alike stands once; no patch goes on."""

from __future__ import annotations

from typing import Any

import cases
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import patchkern as pk
from patchkern.batch.branches import Branches, numbered
from patchkern.batch.planning import Head

T, P, J, D = pk.Level.TEXT, pk.Level.PATCH, pk.Level.JOIN, pk.Level.DROP
CATALOG = cases.make_catalog(cases.make_titles(8))
SEPARATOR = "|"


def branches_of(
    items: list[list[int]],
    levels: list[list[int]],
    *trunks: list[int],
    head: str = "items",
    before: int = 0,
    separator: int = 1,
    suffix: int = 1,
) -> Branches:
    """Of samples' own items and their levels, behind so many rows of entries."""
    flat = np.array([level for sample in levels for level in sample], np.uint8)
    keys = tuple(np.array(trunk, np.int64) for trunk in trunks)
    prompt = pk.Prompt(prefix=[90], separator=[91] * separator, suffix=[92] * suffix)
    histories, rows = pk.Histories.from_sequences(items), np.full(len(items), before)
    return Branches.of_samples(CATALOG, prompt, histories, flat, keys, rows, head)


def rows_of(items: list[int], levels: list[int], led: bool, separator: int) -> list[Any]:
    """The rows of items, each as what it is the mean of."""
    entries: list[list[Any]] = []
    for item, level in zip(items, levels, strict=True):
        if level == T:
            entries.append([(item, token) for token in range(CATALOG.lengths[item])])
        elif level == P:
            entries.append([(item,)])
        elif level == J:
            entries[-1][0] += (item,)
    rows = []
    for number, entry in enumerate(entries):
        rows += [SEPARATOR] * (separator if led or number else 0) + entry
    return rows


def rows_read(branches: Branches, separator: int) -> list[list[Any]]:
    """Of each sample all rows behind its trunk."""
    levels, offsets = branches.runs.levels.tolist(), branches.runs.items.offsets.tolist()
    held = [
        rows_of(list(items), levels[begin:end], bool(head == Head.SEPARATOR), separator)
        for items, begin, end, head in zip(branches.runs.items, offsets, offsets[1:], branches.heads, strict=False)
    ]
    assert [len(rows) for rows in held] == branches.rows.tolist()
    read = []
    for of, count in zip(branches.of.tolist(), branches.read.tolist(), strict=True):
        if of < 0:
            read.append([])
            continue
        behind = branches.behind[of]
        read.append((held[behind][: branches.ahead[of]] if behind >= 0 else []) + held[of][:count])
    return read


@pytest.mark.parametrize(
    ("levels", "of", "behind"),
    [
        ([[], [P], [P, P], [P, P, P]], [-1, 0, 0, 0], [-1]),
        ([[P], [P, J], [P, J, P], [P, J, P, P]], [1, 0, 0, 0], [-1, -1]),  # the first one's patch goes on
        ([[P], [T, P], [T, P, T]], [1, 0, 0], [-1, -1]),
        ([[P], [P, T], [T, P, T]], [0, 1, 2], [-1, -1, -1]),
        ([[P], [P, D, J], [D]], [0, 1, 2], [-1, -1, -1]),  # what joins behind the item that is left out
        ([[T, T], [T], [T, T, T], []], [0, 0, 0, -1], [-1]),
        ([[T], [P, T], [P, P, T], [P, P, P, T]], [1, 2, 3, 0], [-1, -1, 0, 0]),  # the latest is text
        ([[P, J, T], [P, J, P, T]], [1, 0], [-1, 0]),
        ([[P, T], [P, J, P]], [0, 1], [-1, -1]),
    ],
)
def test_by_hand(levels: list[list[int]], of: list[int], behind: list[int]) -> None:
    items = [list(range(len(sample))) for sample in levels]
    trunk = [0] * len(levels)
    branches = branches_of(items, levels, trunk)
    assert branches.of.tolist() == of and branches.behind.tolist() == behind and not branches.titles.any()
    expected = [rows_of(*sample, False, 1) for sample in zip(items, levels, strict=True)]
    assert rows_read(branches, 1) == expected
    for head in ("titles", "both"):
        titled = branches_of(items, levels, trunk, head=head)
        shared = len(titled.sample) - len(items)
        assert titled.of.tolist() == [shared + sample for sample in range(len(items))]
        assert titled.titles.tolist() == [False] * shared + [True] * len(items)
        assert rows_read(titled, 1) == expected


def test_only_what_is_read_before_them_alike_is_shared() -> None:
    items, levels = [[3], [3, 4], [3, 4, 5], [3, 4, 5, 6]], [[P] * n for n in range(1, 5)]
    assert branches_of(items, levels, [0, 0, 1, 1], [5, 5, 5, 5]).of.tolist() == [0, 0, 1, 1]
    assert branches_of(items, levels, [0, 0, 0, 0], [5, 7, 5, 7]).of.tolist() == [0, 1, 0, 1]
    assert branches_of([], [], []).of.tolist() == []


def test_a_title_follows_a_row_of_its_branch() -> None:
    """Without a suffix an entry is left for it, and one that has none is refused."""
    items, levels = [[3], [3, 4], [3, 4, 5]], [[P], [P, P], [P, P, P]]
    branches = branches_of(items, levels, [0, 0, 0], head="titles", suffix=0, before=1)
    assert branches.behind.tolist() == [-1, -1, 0, 0] and branches.ahead.tolist() == [0, 0, 2, 4]
    assert branches.rows.tolist() == [4, 2, 2, 2]
    with pytest.raises(ValueError, match="prompt: expected a suffix, which a branch without text of its own begins"):
        branches_of([[3], []], [[D], []], [0, 1], head="titles", suffix=0)
    assert branches_of([[3], []], [[D], []], [0, 1], head="items", suffix=0).rows.tolist() == [0]


def test_last_rows() -> None:
    items, levels = [[], [1], [1, 2], [1, 2, 3]], [[], [T], [P, T], [P, P, T]]
    branches = branches_of(items, levels, [0] * 4, before=1)
    assert branches.of.tolist() == [-1, 1, 2, 0] and branches.behind.tolist() == [-1, -1, 0]
    last = branches.last_rows(np.array([100, 200, 300]), np.array([7, 7, 7, 7]))
    texts = CATALOG.lengths[[1, 2, 3]]
    assert last.tolist() == [7, 200 + texts[0], 300 + texts[1], 100 + 4 + texts[2]]
    titled = branches_of(items, [[P] * n for n in range(4)], [0] * 4, head="titles")
    assert titled.last_rows(np.arange(100, 600, 100), np.full(4, 7)).tolist() == [7, 100, 102, 104]


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
            for place in range(length - draw(st.integers(0, length)), length):
                own[place] = draw(st.sampled_from([T, P]))
            items.append(whole[:length])
            levels.append(own)
            trunks.append(trunk)
    return items, levels, trunks


@given(samples(), st.integers(0, 2), st.booleans(), st.sampled_from(["items", "titles"]), st.integers(0, 1))
def test_every_sample_reads_its_own_items(drawn: Any, separator: int, led: bool, head: str, suffix: int) -> None:
    items, levels, trunks = drawn
    titled = head == "titles"
    expected = [rows_of(*sample, led, separator) for sample in zip(items, levels, strict=True)]
    options: dict[str, Any] = {"head": head, "before": int(led), "separator": separator, "suffix": suffix}
    if titled and not suffix and not all(expected):
        with pytest.raises(ValueError, match="expected a suffix"):
            branches_of(items, levels, trunks, **options)
        return
    branches = branches_of(items, levels, trunks, **options)
    assert rows_read(branches, separator) == expected
    # none takes more rows than it would on its own
    assert branches.rows.sum() <= sum(map(len, expected))
    assert branches.titles.sum() == len(items) * titled
    for of, sample in zip(branches.of.tolist(), range(len(items)), strict=True):
        if branches.titles.any():
            assert branches.titles[of] and branches.sample[of] == sample
            assert suffix or branches.read[sample], "a row that the title follows"
        if of >= 0 and branches.behind[of] >= 0:
            assert trunks[branches.sample[branches.behind[of]]] == trunks[sample]
