# SPDX-License-Identifier: Apache-2.0
"""Prompts with memories, and layouts of a memory's passes: whole, counted, joined and refused by name."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from typing import Any

import cases
import numpy as np
import pytest
import torch
from model_cases import CATALOG, PROMPT, VOCABULARY

import patchkern as pk
from patchkern.batch.layout_checks import check_layout
from patchkern.batch.memory_layout import MemoryPlanner
from patchkern.batch.policy_dict import policy_from_dict, policy_to_dict

LEARNED = PROMPT.with_special(experts=[VOCABULARY, VOCABULARY + 1, VOCABULARY + 2])
INNER: dict[str, Any] = {
    "text": pk.TextOnly(None),
    "items": pk.ItemPatches(keep_text=2, max_items=None),
    "sessions": pk.SessionPatches(3, max_items=None, align="start"),
    "sessions without text": pk.SessionPatches(3, max_items=None, align="start", keep_text=0, keep_items=1),
}


def histories_of(seed: int, users: int = 7) -> pk.Histories:
    draw = np.random.default_rng(seed)
    return pk.Histories.from_sequences([draw.integers(0, len(CATALOG), n) for n in draw.integers(0, 30, users)])


@pytest.mark.parametrize("head", ["titles", "items", "both"])
@pytest.mark.parametrize("mode", ["overwrite", "append"])
@pytest.mark.parametrize("inner", INNER)
def test_prompts_are_prefix_memory_recent_items_and_suffix(inner: str, mode: str, head: str) -> None:
    policy = pk.PreferenceMemory(INNER[inner], 2, 6, mode)
    histories = histories_of(1)
    targets = np.arange(len(histories))
    for given in (None, targets):
        layout = pk.build_layout(CATALOG, histories, policy, LEARNED, given, head=head)
        check_layout(layout)
        absorbed = [max(n - 1, 0) // 6 for n in histories.lengths]
        rows = [2 * (n if mode == "append" else min(n, 1)) for n in absorbed]
        recent = [items[6 * n :].tolist() for items, n in zip(histories, absorbed, strict=True)]
        plain = pk.build_layout(CATALOG, recent, INNER[inner], LEARNED, given, head=head)
        expected, positions, vectors = [], [], []
        for user, count in enumerate(rows):
            own = plain.lo[plain.cu_seqlens[user] : plain.cu_seqlens[user + 1]].tolist()
            begin = len(expected)
            memory = [-1 - LEARNED.experts[slot % 2] for slot in range(count)]
            expected += own[:3] + memory + own[3:]
            positions += range(len(own) + count)
            vectors += range(begin + 3, begin + 3 + count)
        assert layout.lo.tolist() == expected and layout.position_ids.tolist() == positions
        assert layout.vector_rows.tolist() == vectors
        labels = [name for name in ("logit_labels", "item_labels") if getattr(plain, name) is not None]
        assert all(torch.equal(getattr(layout, name), getattr(plain, name)) for name in labels)
        if layout.item_rows is not None:
            assert (layout.lo[layout.item_rows] == plain.lo[plain.item_rows]).all()
        if given is None and head == "titles":
            assert np.diff(layout.cu_seqlens).tolist() == pk.row_counts(CATALOG, histories, policy, LEARNED).tolist()


@pytest.mark.parametrize("head", ["titles", "items", "both"])
@pytest.mark.parametrize("placed", [True, False])
@pytest.mark.parametrize("mode", ["overwrite", "append"])
@pytest.mark.parametrize("inner", INNER)
def test_layouts_of_random_users_are_whole_and_counted(inner: str, mode: str, placed: bool, head: str) -> None:
    planner = MemoryPlanner(CATALOG, pk.PreferenceMemory(INNER[inner], 3, 6, mode), LEARNED, placed)
    for seed in range(6):
        histories = histories_of(seed)
        draw = np.random.default_rng(seed)
        last = np.array([draw.integers(-1, n) if n else -1 for n in histories.lengths])
        ranges = np.stack([[draw.integers(0, max(end, 0) + 1) for end in last], last], axis=1)
        batch = planner.training(histories, ranges, head=head)
        for layout in (batch.stage1, batch.stage2):
            check_layout(layout)
        assert planner.rows(histories, ranges, head=head).sum() == batch.num_rows
        targets = np.maximum(ranges[:, 1] - ranges[:, 0] + 1, 0).sum()
        if head != "titles":
            assert batch.stage2.item_labels.shape[0] == targets
        queries = batch.stage1.lo[batch.queries]
        assert (queries == torch.tensor([-1 - token for token in LEARNED.experts])).all()
        assert (batch.stage2.lo[batch.updates] == queries[:1]).all()
        assert batch.memories.shape == batch.stage2.vector_rows.shape
        assert batch.memories.shape[0] == 0 or int(batch.memories.max()) < batch.queries.numel()
        learned = torch.cat([batch.stage2.vector_rows, batch.updates.flatten()])
        unplaced = torch.zeros(batch.stage2.num_rows, dtype=torch.bool)
        unplaced[learned] = not placed
        assert torch.equal(batch.stage2.position_ids < 0, unplaced)


def read_by(layout: pk.PatchLayout, row: int) -> list[Any]:
    """All rows that one sees, the last of them itself: what each is the mean of, and its position."""
    span = int(np.searchsorted(layout.cu_seqlens.numpy(), row, side="right")) - 1
    seen = [*cases.rows_before(layout, span), *range(int(layout.cu_seqlens[span]), row + 1)]
    lo, hi, titles = layout.lo.tolist(), layout.hi.tolist(), layout.title_index[layout.items.long()].tolist()
    return [(lo[at] if lo[at] < 0 else tuple(titles[lo[at] : hi[at]]), int(layout.position_ids[at])) for at in seen]


@pytest.mark.parametrize("head", ["titles", "items", "both"])
@pytest.mark.parametrize("mode", ["overwrite", "append"])
@pytest.mark.parametrize("inner", INNER)
def test_targets_are_read_as_they_are_served(inner: str, mode: str, head: str) -> None:
    policy = pk.PreferenceMemory(INNER[inner], 3, 6, mode)
    histories = histories_of(2)
    ranges = _ranges(histories)
    layout = MemoryPlanner(CATALOG, policy, LEARNED).training(histories, ranges, head=head).stage2
    users = np.repeat(np.arange(len(histories)), histories.lengths)
    places = np.concatenate([np.arange(n) for n in histories.lengths])
    served = pk.build_layout(
        CATALOG, histories.before(users, places), policy, LEARNED, histories.at(users, places), head=head
    )
    for name in ("item_rows", "logit_rows"):
        rows, alone = getattr(layout, name), getattr(served, name)
        assert (rows is None) == (alone is None)
        if rows is not None:
            assert [read_by(layout, row) for row in rows.tolist()] == [read_by(served, row) for row in alone.tolist()]
    for name in ("item_labels", "logit_labels"):
        labels, alone = getattr(layout, name), getattr(served, name)
        assert labels is alone is None or torch.equal(labels, alone)


def test_batches_move_and_are_pickled() -> None:
    planner = MemoryPlanner(CATALOG, pk.PreferenceMemory(INNER["items"], 3, 6), LEARNED)
    histories = histories_of(3)
    batch = planner.training(histories, _ranges(histories)).planned()
    again = pickle.loads(pickle.dumps(batch))
    assert torch.equal(again.stage2.vector_rows, batch.stage2.vector_rows)
    assert again.stage1.transpose is not None and again.to("cpu").num_rows == batch.num_rows
    meta = batch.to("meta")
    assert {part.device.type for part in vars(meta).values()} == {"meta"}


def _ranges(histories: pk.Histories) -> np.ndarray:
    return np.stack([np.zeros(len(histories), np.int64), histories.lengths - 1], axis=1)


def test_vector_rows_of_layouts() -> None:
    policy = pk.PreferenceMemory(INNER["items"], 2, 6)
    layouts = [pk.build_layout(CATALOG, histories_of(seed), policy, LEARNED) for seed in (1, 2)]
    plain = pk.build_layout(CATALOG, [[1, 2]], INNER["items"], LEARNED)
    joined = pk.join_layouts([layouts[0], plain, layouts[1]])
    check_layout(joined)
    at = [0, layouts[0].num_rows + plain.num_rows]
    expected = [row + begin for layout, begin in zip(layouts, at, strict=True) for row in layout.vector_rows.tolist()]
    assert joined.vector_rows.tolist() == expected and pk.join_layouts([plain]).vector_rows is None
    assert "vectors" in repr(joined)
    supervised = joined.supervise_literals()
    assert (supervised.labels[joined.vector_rows] == -100).all()
    for rows, message in (
        ([3, 3], r"vector_rows: expected ascending rows without repeats"),
        ([-1], r"vector_rows\[0\]: expected a value in 0\.\."),
        ([10**6], r"vector_rows\[0\]: expected a value in 0\.\."),
    ):
        with pytest.raises(ValueError, match=message):
            replace(plain, vector_rows=torch.tensor(rows))
    with pytest.raises(TypeError, match=r"vector_rows: expected dtype torch.int64"):
        replace(plain, vector_rows=torch.tensor([1], dtype=torch.int32))


def test_it_is_written_down() -> None:
    policy = pk.PreferenceMemory(INNER["sessions"], np.int64(3), 6, "append")
    assert policy_from_dict(json.loads(json.dumps(policy_to_dict(policy)))) == policy


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((INNER["text"], 0), r"slots: expected an integer in 1\.\."),
        ((INNER["text"], 4, 0), r"block: expected an integer in 1\.\."),
        ((INNER["text"], 4, 50, "replace"), "mode: expected one of overwrite, append, got 'replace'"),
        (
            (pk.RandomItemPatches(0.5, None),),
            "policy: expected TextOnly, .* got RandomItemPatches, which draws at random",
        ),
        (
            (pk.ItemDropout(0.5, max_items=None),),
            "policy: expected TextOnly, .* got ItemDropout, which draws at random",
        ),
        ((pk.TextOnly(100),), "policy: expected max_items=None, .* got 100"),
        ((pk.SessionPatches(5, None),), 'policy: expected SessionPatches\\(align="start"\\), .* got align="end"'),
        ((INNER["sessions"], 4, 50), "block: expected a multiple of 3, .* got 50"),
    ],
)
def test_what_cannot_be_a_memory(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        pk.PreferenceMemory(*arguments)


def test_prompts_and_passes_that_cannot_be() -> None:
    policy = pk.PreferenceMemory(INNER["sessions"], 4, 6)
    with pytest.raises(ValueError, match=r"prompt: expected 4 experts, a token for each of the memory's slots .*got 3"):
        pk.build_layout(CATALOG, [[1]], policy, LEARNED)
    with pytest.raises(ValueError, match="policy: expected one of the history's items alone, got PreferenceMemory"):
        policy.levels(pk.Histories.from_sequences([[1]]))
    with pytest.raises(ValueError, match="a TrunkPolicy"):
        pk.build_training_layout(CATALOG, [[1]], policy, LEARNED, [[0, 0]])
    used = pk.Catalog.from_token_ids([VOCABULARY], [0, 1])
    with pytest.raises(ValueError, match=r"catalog: expected titles without token .* a learned row of the prompt"):
        pk.build_layout(used, [[0]], replace(policy, slots=2), LEARNED)
    planner = MemoryPlanner(CATALOG, replace(policy, slots=2), LEARNED)
    histories = pk.Histories.from_sequences([[1, 2, 3]])
    with pytest.raises(ValueError, match="reference: expected an item head, and a policy with a row for every item"):
        planner.training(histories, [[0, 2]], head="items", reference=True)
    with pytest.raises(ValueError, match=r"target_ranges\[0\]: expected positions in 0\.\.2, got \[0, 3\]"):
        planner.training(histories, [[0, 3]], head="items")
    bare = replace(LEARNED, prefix=(), suffix=())
    with pytest.raises(ValueError, match="prompt: expected a prefix, from which the item head scores an empty history"):
        MemoryPlanner(CATALOG, replace(policy, slots=2), bare).training(histories, [[0, 2]], head="items")
    with pytest.raises(ValueError, match="prompt: expected a suffix, which a branch without text of its own begins"):
        items = pk.PreferenceMemory(pk.ItemPatches(0, None), 2, 6)
        MemoryPlanner(CATALOG, items, bare).training(histories, [[1, 2]], head="titles")
