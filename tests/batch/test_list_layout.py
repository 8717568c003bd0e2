# SPDX-License-Identifier: Apache-2.0
"""Prompts that are lists: a trunk of text teaches what samples of their own would, for no row more."""

from __future__ import annotations

import cases
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import patchkern as pk

LIST = pk.Prompt(prefix=[90, 91, 92], separator=[92], suffix=[92], response_end=[92])
LONG = pk.Prompt(prefix=[90], separator=[92, 89], suffix=[92, 89], response_end=[92, 89])
BATCH = cases.make_batch(pk.TextOnly(None), [5, 2, 40, 0, 13], with_targets=False)
CATALOG, HISTORIES = BATCH.arguments()[:2]


def taught(layout: pk.PatchLayout) -> list[tuple[list[int], int]]:
    """All rows before a label, and the label; in order of their text."""
    assert layout.logit_rows is not None and layout.logit_labels is not None and layout.prefix is None
    starts = layout.cu_seqlens[torch.searchsorted(layout.cu_seqlens, layout.logit_rows, right=True) - 1].tolist()
    rows = (-1 - layout.lo).tolist()
    pairs = zip(layout.logit_rows.tolist(), layout.logit_labels.tolist(), starts, strict=True)
    return sorted((rows[start : row + 1], label) for row, label, start in pairs)


def samples(ranges: list[list[int]], prompt: pk.Prompt, cut: int | None = None, block: int = 1) -> pk.PatchLayout:
    histories, targets = [], []
    for items, (first, last) in zip(BATCH.histories, ranges, strict=True):
        for position in range(first, last + 1):
            start = 0 if cut is None else max(position - cut, 0) // block * block
            histories.append(items[start:position])
            targets.append(items[position])
    return pk.build_layout(CATALOG, histories, pk.TextOnly(None), prompt, targets)


@pytest.mark.parametrize("prompt", [LIST, LONG], ids=["one token", "two tokens"])
def test_targets_of_a_trunk_are_the_samples(planner: str, prompt: pk.Prompt) -> None:
    ranges = [[1, 4], [1, 1], [7, 39], [0, -1], [3, 11]]
    layout = pk.build_training_layout(CATALOG, HISTORIES, pk.TextOnly(None), prompt, ranges)
    assert layout.num_users == 4 and layout.transpose is not None
    assert taught(layout) == taught(samples(ranges, prompt))
    pk.PatchLayout(**vars(layout))  # keeps all that a layout promises
    read = [BATCH.histories[user][: last + 1] for user, (_, last) in enumerate(ranges) if last >= 0]
    assert layout.num_rows == sum(
        len(prompt.prefix) + sum(len(BATCH.titles[item]) + len(prompt.separator) for item in items) for items in read
    )


@settings(max_examples=40)
@given(data=st.data(), cut=st.integers(1, 12), block=st.integers(1, 9))
def test_cut_histories_and_counted_rows(data: st.DataObject, cut: int, block: int) -> None:
    ranges = []
    for items in BATCH.histories:
        first = data.draw(st.integers(1, max(len(items), 1)))
        ranges.append([first, data.draw(st.integers(first - 1, max(len(items) - 1, first - 1)))])
    arguments = (CATALOG, HISTORIES, pk.TextOnly(cut), LIST, ranges)
    layout = pk.build_training_layout(*arguments, block_size=block, transpose=False)
    rows = pk.training_rows(*arguments, block_size=block)
    assert rows.sum() == layout.num_rows and (rows[np.diff(ranges)[:, 0] < 0] == 0).all()
    if layout.num_rows:
        assert taught(layout) == taught(samples(ranges, LIST, cut, block))


def test_a_target_without_a_history_follows_the_prefix() -> None:
    layout = pk.build_training_layout(CATALOG, HISTORIES[:1], pk.TextOnly(None), LIST, [[0, 0]])
    title = BATCH.titles[BATCH.histories[0][0]]
    assert (-1 - layout.lo).tolist() == [90, 91, 92, *title, 92]
    assert layout.labels is not None and layout.labels.tolist() == [-100] * 3 + [*title, 92]
    bare = pk.Prompt((), (92,), (92,), (92,))
    with pytest.raises(ValueError, match="prompt: expected a prefix"):
        pk.build_training_layout(CATALOG, HISTORIES[:1], pk.TextOnly(None), bare, [[0, 0]])


def test_rows_are_limited_and_patches_have_branches() -> None:
    arguments = (CATALOG, HISTORIES[:1], pk.TextOnly(None), LIST, [[2, 4]])
    with pytest.raises(ValueError, match="max_rows: expected at least"):
        pk.build_training_layout(*arguments, max_rows=3)
    patches = pk.build_training_layout(CATALOG, HISTORIES[:1], pk.ItemPatches(0, None), LIST, [[2, 4]])
    assert patches.prefix is not None and patches.num_users == 4
    assert not pk.Prompt((1,), (2,), (2,), (3,)).is_list and not pk.Prompt((1,)).is_list and LIST.is_list


def test_items_are_predicted_from_the_same_rows() -> None:
    ranges = [[1, 4], [1, 1], [7, 39], [0, -1], [0, 11]]
    both = pk.build_training_layout(CATALOG, HISTORIES, pk.TextOnly(None), LIST, ranges, head="both")
    titles = pk.build_training_layout(CATALOG, HISTORIES, pk.TextOnly(None), LIST, ranges)
    items = pk.build_training_layout(CATALOG, HISTORIES, pk.TextOnly(None), LIST, ranges, head="items")
    assert both.labels is not None and titles.labels is not None and torch.equal(both.labels, titles.labels)
    assert torch.equal(both.lo, titles.lo) and both.prefix is None
    assert both.item_labels is not None and items.item_labels is not None
    assert torch.equal(both.item_labels, items.item_labels)
    # the row before the separator that the target's title follows
    read = [(layout.position_ids[layout.item_rows], layout.lo[layout.item_rows]) for layout in (both, items)]
    assert all(torch.equal(*pair) for pair in zip(*read, strict=True))
    counts = [pk.training_rows(CATALOG, HISTORIES, pk.TextOnly(None), LIST, ranges, head=h) for h in ("both", "titles")]
    assert counts[0].tolist() == counts[1].tolist() and counts[0].sum() == both.num_rows
