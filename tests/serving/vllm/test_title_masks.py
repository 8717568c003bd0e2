# SPDX-License-Identifier: Apache-2.0
"""Masks over a batch of titles that are being written, against a loop over all titles of each request."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import patchkern as pk
from patchkern.search.trie import Trie
from patchkern.serving.vllm.title_masks import TitleMasks, Writing, mask_items

END = [9, 8]
# titles that begin others, two that are equal, one of a single token
TITLES = [[1, 2], [1, 2, 3], [4], [1, 2], [5, 1], [5, 2, 2], [0, 0], [7]]
CATALOG = pk.Catalog.from_token_ids([x for title in TITLES for x in title], np.cumsum([0, *map(len, TITLES)]))
V = 12


def masks() -> TitleMasks:
    return TitleMasks(Trie.from_catalog(CATALOG, END), END[-1], "cpu")


def expected(items: set[int], tokens: list[int]) -> set[int]:
    """What may follow: the next token of every title that begins so, of an item that the request may get."""
    sequences = [[*TITLES[item], *END] for item in sorted(items)]
    following = {s[len(tokens)] for s in sequences if len(s) > len(tokens) and s[: len(tokens)] == tokens}
    return following or {END[-1]}


@given(st.data())
def test_a_batch_of_requests(data: st.DataObject) -> None:
    """Requests come and go, some with the beginning of a title in their prompt, each with items of its own."""
    made = masks()
    running: dict[int, tuple[Writing, set[int]]] = {}
    for _ in range(data.draw(st.integers(1, 12))):
        for row in data.draw(st.lists(st.integers(0, 5), max_size=2)):
            listed = data.draw(st.sets(st.integers(0, len(TITLES) - 1)))
            is_allowed = data.draw(st.booleans())
            begun = data.draw(st.sampled_from([[], [1], [1, 2], [5], [6]]))
            writing = Writing(np.array(sorted(listed), np.int64), is_allowed, [], begun)
            made.begin(writing)
            running[row] = (writing, listed if is_allowed else set(range(len(TITLES))) - listed)
        logits = torch.randn(6, V)
        given = logits.clone()
        rows = list(running)
        writings = [running[row][0] for row in rows]
        made.advance(writings)
        assert made.apply(logits, rows, writings) is logits
        for row in range(6):
            if row not in running:
                assert torch.equal(logits[row], given[row])
                continue
            writing, items = running[row]
            tokens = [*writing.begun, *writing.output]
            may = expected(items, tokens)
            assert set(logits[row].isfinite().nonzero()[:, 0].tolist()) == may, tokens
            if may != {END[-1]}:
                assert all(logits[row, token] == given[row, token] for token in may)
            writing.output.append(data.draw(st.sampled_from(sorted(may))))  # type: ignore[attr-defined]
        for row in data.draw(st.lists(st.integers(0, 5), max_size=1)):
            running.pop(row, None)


def test_a_request_that_goes_on_after_it_was_put_off() -> None:
    """A preempted request comes again with all that it had written; tokens not known yet are waited for."""
    made = masks()
    writing = Writing(np.zeros(0, np.int64), False, [5, 2])
    made.begin(writing)
    made.advance([writing])
    logits = made.apply(torch.zeros(1, V), [0], [writing])
    assert logits[0].isfinite().nonzero()[:, 0].tolist() == [2]
    writing.output[:] = [5, 2, -1]  # type: ignore[index]
    made.advance([writing])
    writing.output[2] = 2  # type: ignore[index]
    made.advance([writing])
    logits = made.apply(torch.zeros(1, V), [0], [writing])
    assert logits[0].isfinite().nonzero()[:, 0].tolist() == [9]


@pytest.mark.parametrize(
    ("writing", "why"),
    [
        (Writing(np.zeros(0, np.int64), True), "nothing is allowed"),
        (Writing(np.arange(len(TITLES)), False), "everything is excluded"),
        (Writing(np.array([500]), True), "no such item"),
        (Writing(np.zeros(0, np.int64), False, [11]), "no title begins so"),
        (Writing(np.zeros(0, np.int64), False, [9]), "another token of a title's end"),
        (Writing(np.zeros(0, np.int64), False, [4, 9, 8]), "a title has ended"),
        (Writing(np.zeros(0, np.int64), False, [4, 9, 8, 8, 3]), "and went on"),
    ],
)
def test_what_leads_nowhere_ends(writing: Writing, why: str) -> None:
    made = masks()
    made.begin(writing)
    made.advance([writing])
    other = Writing(np.zeros(0, np.int64), False)
    made.begin(other)
    logits = made.apply(torch.zeros(3, V), [2, 0], [writing, other])
    assert logits[2].isfinite().nonzero()[:, 0].tolist() == [END[-1]], why
    assert logits[0].isfinite().nonzero()[:, 0].tolist() == [0, 1, 4, 5, 7]
    assert bool(logits[1].isfinite().all())


def test_no_requests() -> None:
    made, logits = masks(), torch.zeros(2, V)
    made.advance([])
    assert bool(made.apply(logits, [], []).isfinite().all())
    assert bool(mask_items(logits, 4, [], []).isfinite().all())


@given(st.data())
def test_items(data: st.DataObject) -> None:
    n_items, first = 6, 4
    rows = data.draw(st.lists(st.integers(0, 4), unique=True))
    lists: Any = [data.draw(st.sets(st.integers(0, n_items + 1))) for _ in rows]
    kinds = [data.draw(st.booleans()) for _ in rows]
    writings = [Writing(np.array(sorted(one), np.int64), kind) for one, kind in zip(lists, kinds, strict=True)]
    given = torch.randn(5, first + n_items)
    given[:, :first] = float("-inf")
    logits = mask_items(given.clone(), first, rows, writings)
    for row in range(5):
        if row not in rows:
            assert torch.equal(logits[row], given[row])
            continue
        listed, kind = lists[rows.index(row)], kinds[rows.index(row)]
        may = [first + item for item in range(n_items) if (item in listed) == kind]
        assert logits[row].isfinite().nonzero()[:, 0].tolist() == (may or [0])
        assert all(logits[row, place] == given[row, place] for place in may)
