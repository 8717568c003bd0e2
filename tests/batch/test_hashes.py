# SPDX-License-Identifier: Apache-2.0
"""Row hashes: equal exactly where the content is equal."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from cases import Batch, batches, make_catalog, make_prompt, make_titles
from hypothesis import given

import patchkern as pk
from patchkern.batch.hashes import row_hashes

PROMPT = pk.Prompt(prefix=[91, 92], separator=[93], suffix=[94], response_end=[95])


def contents(layout: pk.PatchLayout) -> list[Any]:
    """What each row stands for, spelled out."""
    tokens, offsets = layout.token_ids.tolist(), layout.offsets.tolist()
    titles = [tuple(tokens[begin:end]) for begin, end in zip(offsets[:-1], offsets[1:], strict=True)]
    items = layout.items.tolist()
    return [
        -1 - lo if lo < 0 else tuple(titles[i] for i in items[lo:hi])
        for lo, hi in zip(layout.lo.tolist(), layout.hi.tolist(), strict=True)
    ]


@given(batches())
def test_equal_where_contents_are(batch: Batch) -> None:
    prompt = make_prompt(batch.prompt)
    layout = pk.build_layout(make_catalog(batch.titles), batch.histories, batch.policy, prompt, batch.targets)
    hashes = row_hashes(layout)
    assert hashes.dtype == np.uint64 and hashes.shape == (layout.num_rows,)
    spelled = contents(layout)
    of_content: dict[Any, int] = {}
    for content, number in zip(spelled, hashes.tolist(), strict=True):
        assert of_content.setdefault(content, number) == number
    assert len(set(of_content.values())) == len(of_content)


def row(titles: list[list[int]], history: list[int], policy: Any) -> int:
    """The hash of the first row of the history."""
    catalog = pk.Catalog.from_token_ids(
        np.concatenate(titles), np.cumsum([0, *map(len, titles)]), item_ids=np.arange(len(titles))
    )
    return int(row_hashes(pk.build_layout(catalog, [history], policy, PROMPT))[2])


def test_neither_ids_nor_neighbours_matter_and_order_does() -> None:
    patches, sessions = pk.ItemPatches(keep_text=0), pk.SessionPatches(group_size=2)
    one = row([[7, 8], [9]], [0, 1], patches)
    assert one == row([[5], [9, 9], [7, 8]], [2, 0, 1], patches)
    different = {
        "title": one,
        "its tokens in another order": row([[8, 7]], [0], patches),
        "one token more": row([[7, 8, 8]], [0], patches),
        "its first token": row([[7]], [0], patches),
        "that token as text": row([[7]], [0], pk.TextOnly()),
        "a session": row([[7], [8], [1]], [0, 1, 2, 2, 2, 2], sessions),
        "in another order": row([[7], [8], [1]], [1, 0, 2, 2, 2, 2], sessions),
        "cut elsewhere": row([[7, 8], [8], [1]], [0, 1, 2, 2, 2, 2], sessions),
        "repeated": row([[7], [8], [1]], [0, 0, 2, 2, 2, 2], sessions),
    }
    assert len(set(different.values())) == len(different)


def test_the_same_in_every_process_and_version() -> None:
    """Written down, for a cache may outlive the process: a session, patches and text of titles (7, 8) and (9,)."""
    program = (
        "import patchkern as pk\n"
        "from patchkern.batch.hashes import row_hashes\n"
        "catalog = pk.Catalog.from_token_ids([7, 8, 9], [0, 2, 3])\n"
        "prompt = pk.Prompt([1, 2], [3], [4], [5])\n"
        "layout = pk.build_layout(catalog, [[0, 1, 0, 1, 1, 1]], pk.SessionPatches(2, None), prompt)\n"
        "print(*row_hashes(layout))\n"
    )
    printed = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    prefix, separator, suffix = [1579577368183927815, 4236606528465621624], 1172589142636058004, 12049194450167112629
    session, patch, shorter_patch, text = (
        102531299080280697,
        12879269025888141587,
        4565299672635202448,
        14844489325600731553,
    )
    history = [session, separator, patch, separator, shorter_patch, separator, text, separator, text]
    assert [int(number) for number in printed.split()] == [*prefix, *history, suffix]


def test_linear_time() -> None:
    """No loop over rows: 200,000 of them take a fraction of what a loop would."""
    titles = make_titles(50)
    layout = pk.build_layout(
        make_catalog(titles), [list(titles) * 4000], pk.SessionPatches(group_size=5, max_items=None), PROMPT
    )
    hashes = row_hashes(layout)
    assert hashes.shape == (layout.num_rows,) and layout.num_rows > 50_000


@pytest.mark.parametrize("histories", [[], [[]]])
def test_nothing_to_hash(histories: Any) -> None:
    titles = make_titles(3)
    layout = pk.build_layout(make_catalog(titles), histories, pk.TextOnly(), pk.Prompt())
    assert row_hashes(layout).shape == (0,)
