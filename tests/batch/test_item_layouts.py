# SPDX-License-Identifier: Apache-2.0
"""Layouts for an item head: every item row sees exactly the rows that it sees in a sample of its own."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import cases
import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import patchkern as pk
from patchkern import build_training_layout, join_layouts, training_rows

POLICIES = {
    "text": pk.TextOnly(None),
    "items": pk.ItemPatches(3, None),
    "items-no-text": pk.ItemPatches(0, None),
    "sessions-end": pk.SessionPatches(3, None),
    "sessions-start": pk.SessionPatches(3, None, align="start"),
    "sessions-of-one": pk.SessionPatches(1, None),
    "sessions-no-text": pk.SessionPatches(3, None, align="start", keep_text=0, keep_items=5),
    "sessions-alone": pk.SessionPatches(3, None, keep_text=0, keep_items=0),
}
TRUNK_ALONE = {"text", "items-no-text"}
LENGTHS = [1, 2, 40, 0, 13]
RANGES = [[0, 0], [1, 1], [0, 39], [0, -1], [3, 11]]

Seen = list[list[list[int]]]  # rows of titles of tokens, as the oracle has them


def seen_by_item_rows(layout: pk.PatchLayout) -> list[tuple[Seen, int]]:
    """Per item row all rows that it sees, its own the last, and its label."""
    assert layout.item_rows is not None and layout.item_labels is not None
    rows = [row for user in oracle.decode(layout) for row in user]
    cu = layout.cu_seqlens.tolist()
    found = []
    for at, label in zip(layout.item_rows.tolist(), layout.item_labels.tolist(), strict=True):
        span = int(np.searchsorted(cu, at, side="right")) - 1
        seen = [rows[row] for row in [*cases.rows_before(layout, span), *range(cu[span], at + 1)]]
        assert layout.position_ids[at] == len(seen) - 1
        found.append((seen, label))
    return found


def by_definition(batch: cases.Batch, history: list[Any], target: Any) -> tuple[Seen, int]:
    """``prefix | history`` and the place of what comes next."""
    entries = cases.oracle_entries(batch.policy, len(history))
    parts = replace(batch.prompt, suffix=[], response_end=[])
    rows = oracle.user_rows([batch.titles[item] for item in history], entries, parts).rows
    return rows, list(batch.titles).index(target)


def expected(batch: cases.Batch, ranges: Any, starts: Any = None) -> list[tuple[Seen, int]]:
    return [
        by_definition(batch, history[0 if starts is None else starts(at) : at], history[at])
        for history, (first, last) in zip(batch.histories, ranges, strict=True)
        for at in range(first, last + 1)
    ]


def make_batch(policy: Any, lengths: list[int] = LENGTHS, separator: int = 1, **options: Any) -> cases.Batch:
    batch = cases.make_batch(policy, lengths, with_targets=False, **options)
    batch.prompt = replace(batch.prompt, separator=[92, 89][:separator])
    return batch


def plan(batch: cases.Batch, ranges: Any, **options: Any) -> pk.PatchLayout:
    catalog, histories, policy, prompt, _ = batch.arguments()
    return build_training_layout(catalog, histories, policy, prompt, ranges, **{"head": "items", **options})


# ------------------------------------------------------------------ samples


@pytest.mark.parametrize("head", ["items", "both"])
@pytest.mark.parametrize("policy", cases.POLICIES.values(), ids=cases.POLICIES.keys())
def test_samples_end_with_their_histories(planner: str, policy: Any, head: str) -> None:
    batch = cases.make_batch(policy, [0, 1, 23, 2, 40])
    layout = batch.layout(head=head)
    pk.PatchLayout(**vars(layout))  # keeps all that a layout promises
    titles = batch.layout()
    assert layout.item_rows is not None and layout.item_labels is not None
    places = [list(batch.titles).index(target) for target in batch.targets or []]
    assert layout.item_labels.tolist() == places
    ends = layout.item_rows.tolist()
    after = len(batch.prompt.suffix) * (head == "both")
    users = oracle.decode(layout)
    starts = layout.cu_seqlens.tolist()
    for number, user in enumerate(batch.users()):
        response = 0 if batch.targets is None else len(batch.titles[batch.targets[number]]) + 1
        history = user.rows[: len(user.rows) - len(batch.prompt.suffix) - response]
        assert users[number][: len(history)] == history and ends[number] == starts[number] + len(history) - 1
        assert len(users[number]) - len(history) == after + response * (head == "both")
    if head == "both":
        assert torch.equal(layout.labels, titles.labels) and torch.equal(layout.lo, titles.lo)
    else:
        assert layout.labels is layout.logit_rows is layout.logit_labels is None
    assert layout.transpose is not None


@pytest.mark.parametrize("head", ["items", "both"])
def test_samples_without_targets(planner: str, head: str) -> None:
    batch = cases.make_batch(cases.POLICIES["items"], [0, 1, 23], with_targets=False)
    layout = batch.layout(head=head)
    labelled = cases.make_batch(cases.POLICIES["items"], [0, 1, 23]).layout(head="items")
    assert layout.item_labels is None and layout.transpose is None and layout.labels is None
    ends = layout.cu_seqlens[1:].long() - 1 - (len(batch.prompt.suffix) if head == "both" else 0)
    assert torch.equal(layout.item_rows, ends)
    if head == "items":
        assert torch.equal(layout.lo, labelled.lo) and torch.equal(layout.item_rows, labelled.item_rows)


def test_titles_are_as_without_the_argument(planner: str) -> None:
    layout = cases.make_batch(cases.POLICIES["items"], [4, 9]).layout(head="titles")
    assert layout.item_rows is layout.item_labels is None and layout.logit_rows is not None


@pytest.mark.parametrize("head", ["items", "both"])
def test_empty_histories_need_a_prefix(planner: str, head: str) -> None:
    batch = cases.make_batch(cases.POLICIES["items"], [3, 0, 0])
    assert batch.layout(head=head).item_rows.tolist()[1:] == [
        int(start) + len(batch.prompt.prefix) - 1 for start in batch.layout(head=head).cu_seqlens[1:3]
    ]
    batch.prompt = replace(batch.prompt, prefix=[])
    with pytest.raises(ValueError, match=r"prompt: expected a prefix, .* got none and 2 histories without items"):
        batch.layout(head=head)
    catalog, _, policy, prompt, _ = batch.arguments()
    with pytest.raises(ValueError, match=r"prompt: expected a prefix, .* got none and 1 histories without items"):
        build_training_layout(catalog, [[3, 4]], policy, prompt, [[0, 1]], head=head)
    assert build_training_layout(catalog, [[3, 4]], policy, prompt, [[1, 1]], head=head).item_labels.tolist() == [4]


@pytest.mark.parametrize("call", [lambda batch: batch.layout(head="item"), lambda batch: plan(batch, [[0, 1]], head=1)])
def test_wrong_heads(call: Any) -> None:
    with pytest.raises(ValueError, match=r"head: expected one of titles, items, both, got (1|'item')"):
        call(make_batch(pk.TextOnly(), [2]))
    batch = make_batch(pk.TextOnly(), [2])
    with pytest.raises(ValueError, match="head: expected one of titles, items, both, got None"):
        training_rows(batch.catalog, batch.histories, batch.policy, pk.Prompt(), [[0, 1]], head=None)


# ------------------------------------------------------------------ trunks and branches


@pytest.mark.parametrize("separator", [0, 1, 2])
@pytest.mark.parametrize("head", ["items", "both"])
@pytest.mark.parametrize("name", POLICIES)
def test_item_rows_see_what_their_samples_see(planner: str, name: str, head: str, separator: int) -> None:
    batch = make_batch(POLICIES[name], separator=separator)
    layout = plan(batch, RANGES, head=head)
    assert seen_by_item_rows(layout) == expected(batch, RANGES)
    checked = pk.PatchLayout(**vars(layout))
    assert checked.transpose is not None
    if head == "items":
        assert layout.labels is layout.logit_rows is layout.logit_labels is None
        assert (layout.prefix is None) == (name in {*TRUNK_ALONE, "sessions-alone"})
        if name in TRUNK_ALONE:
            assert layout.num_users == 4
    else:
        titles = plan(batch, RANGES, head="titles")
        for field in ("lo", "cu_seqlens", "prefix", "labels", "logit_rows"):
            assert torch.equal(getattr(layout, field), getattr(titles, field)), field


@pytest.mark.parametrize("name", POLICIES)
def test_they_see_the_rows_of_layouts_of_samples(planner: str, name: str) -> None:
    batch = make_batch(POLICIES[name])
    catalog, _, policy, prompt, _ = batch.arguments()
    pairs = [(h, p) for h, (first, last) in zip(batch.histories, RANGES, strict=True) for p in range(first, last + 1)]
    samples = pk.build_layout(
        catalog, [h[:p] for h, p in pairs], policy, prompt, [h[p] for h, p in pairs], head="items"
    )
    assert seen_by_item_rows(plan(batch, RANGES)) == seen_by_item_rows(samples)


@settings(max_examples=30)
@given(data=st.data(), name=st.sampled_from(sorted(POLICIES)), separator=st.integers(0, 2), prefix=st.integers(0, 2))
def test_random_batches(planner: str, data: st.DataObject, name: str, separator: int, prefix: int) -> None:
    lengths = data.draw(st.lists(st.integers(0, 20), min_size=1, max_size=4))
    batch = make_batch(POLICIES[name], lengths, separator)
    batch.prompt = replace(batch.prompt, prefix=[90, 91][:prefix])
    ranges, least = [], 0 if prefix else 1
    for length in lengths:
        first = data.draw(st.integers(least, length)) if length > least else least
        ranges.append([first, data.draw(st.integers(first - 1, length - 1)) if first < length else first - 1])
    head = data.draw(st.sampled_from(["items", "both"]))
    layout = plan(batch, ranges, head=head)
    assert seen_by_item_rows(layout) == expected(batch, ranges)
    catalog, histories, policy, prompt, _ = batch.arguments()
    assert training_rows(catalog, histories, policy, prompt, ranges, head=head).sum() == layout.num_rows


@pytest.mark.parametrize("block_size", [1, 7, 10, 50])
@pytest.mark.parametrize("head", ["items", "both"])
@pytest.mark.parametrize("name", ["text", "items", "items-no-text", "sessions-start"])
def test_histories_that_are_cut_begin_at_blocks(planner: str, name: str, head: str, block_size: int) -> None:
    batch = make_batch(replace(POLICIES[name], max_items=10), [5, 60, 23])
    ranges = [[1, 4], [0, 59], [14, 22]]
    whole = cases.Batch(batch.titles, batch.histories, POLICIES[name], batch.prompt)

    def start(position: int) -> int:
        return max(position - 10, 0) // block_size * block_size

    layout = plan(batch, ranges, block_size=block_size, head=head)
    assert seen_by_item_rows(layout) == expected(whole, ranges, start)
    catalog, histories, policy, prompt, _ = batch.arguments()
    rows = training_rows(catalog, histories, policy, prompt, ranges, block_size=block_size, head=head)
    assert rows.sum() == layout.num_rows


def test_blocks_as_long_as_histories_read_each_item_twice() -> None:
    batch = make_batch(pk.ItemPatches(0, 50), [1000], separator=0)
    catalog, histories, policy, prompt, _ = batch.arguments()
    rows = training_rows(catalog, histories, policy, prompt, [[0, 999]], block_size=50, head="items")
    assert 1900 < rows[0] < 2100


@pytest.mark.parametrize("head", ["items", "both"])
def test_random_patches_see_their_trunks_draw(planner: str, head: str) -> None:
    """Of one draw: every target sees the beginning of what the last one sees."""
    batch = make_batch(pk.RandomItemPatches(0.5, None, seed=3), [30, 8])
    layout = plan(batch, [[0, 29], [2, 7]], head=head)
    found = seen_by_item_rows(layout)
    longest = [found[29][0], found[35][0]]
    titles = list(batch.titles.values())
    for number, (seen, label) in enumerate(found):
        user = int(number >= 30)
        position = number if user == 0 else number - 28
        assert seen == longest[user][: len(seen)] and label == batch.histories[user][position]
        # item by item: the one before the target stands at the end, whole
        if position:
            title = titles[batch.histories[user][position - 1]]
            assert seen[-1] == [title] or seen[-len(title) :] == [[[token]] for token in title]
    assert (layout.lo >= 0).any() and (layout.prefix is None) == (head == "items")


@pytest.mark.parametrize("head", ["items", "both"])
@pytest.mark.parametrize("name", POLICIES)
def test_training_rows(planner: str, name: str, head: str) -> None:
    batch = make_batch(POLICIES[name])
    catalog, histories, policy, prompt, _ = batch.arguments()
    counted = training_rows(catalog, histories, policy, prompt, RANGES, head=head)
    for user in range(5):
        alone = build_training_layout(
            catalog,
            [histories[user]],
            policy,
            prompt,
            RANGES[user : user + 1],
            head=head,
            max_rows=max(counted[user], 1),
        )
        assert alone.num_rows == counted[user]
    with pytest.raises(ValueError, match=rf"max_rows: expected at least {counted.sum()} "):
        plan(batch, RANGES, head=head, max_rows=int(counted.sum()) - 1)


def test_targets_behind_the_same_sessions_share_a_branch(planner: str) -> None:
    """Three of them where sessions are of three items: five to seven rows for three targets, instead of for one."""
    policy = POLICIES["sessions-no-text"]
    batch = make_batch(policy, [60], separator=0)
    layout = plan(batch, [[7, 59]])
    assert layout.prefix is not None
    # behind the prefix and 1 to 17 sessions; and two that have a single target each
    prefix = len(batch.prompt.prefix)
    assert layout.prefix[1:, 1].tolist() == [prefix + n for n in [*range(1, 18), 0, 18]]
    assert np.diff(layout.cu_seqlens).tolist() == [prefix + 18, *[7] * 18, 5]


def test_titles_and_text_follow_shared_rows(planner: str) -> None:
    """Of five to seven items as patches, and of what is patches before three items of text."""
    policy, ranges = POLICIES["sessions-no-text"], [[8, 58]]
    batch = make_batch(policy, [60], separator=0)
    suffix, end = len(batch.prompt.suffix), len(batch.prompt.response_end)
    titles = [len(batch.titles[item]) for item in batch.histories[0][8:59]]
    layout = plan(batch, ranges, head="titles")
    n_trunk, items = len(batch.prompt.prefix) + 17, 17 * 7
    assert layout.num_rows == n_trunk + items + sum(titles) + 51 * (suffix + end)
    assert layout.ranges.shape == (1 + 17 + 51, 2, 2)
    assert [len(cases.rows_before(layout, span)) - len(batch.prompt.prefix) for span in range(18, 24)] == [
        6, 7, 8, 7, 8, 9
    ]  # fmt: skip
    text = plan(make_batch(replace(policy, keep_text=3, keep_items=2), [60], separator=0), ranges)
    alone = sum(len(batch.titles[item]) for at in range(8, 59) for item in batch.histories[0][at - 3 : at])
    # the latest target of each group reads its text in the branch that they share, and needs none of its own
    assert text.num_rows == n_trunk + 17 * 4 + alone and text.num_users == 1 + 17 + 51 - 17


@pytest.mark.parametrize("name", POLICIES)
def test_no_targets(planner: str, name: str) -> None:
    batch = make_batch(POLICIES[name], [3, 0])
    layout = plan(batch, [[0, -1], [0, -1]])
    assert layout.num_rows == 0 and layout.item_rows.shape == layout.item_labels.shape == (0,)
    pk.PatchLayout(**vars(layout))


# ------------------------------------------------------------------ what else is done with layouts


def test_joined_layouts_have_the_item_rows_of_all(planner: str) -> None:
    """Of trunks alone, of trunks with branches, and of samples; before and after layouts of titles."""
    batches = [make_batch(POLICIES[name]) for name in ("text", "sessions-end")]
    layouts = [plan(batch, RANGES, transpose=False) for batch in batches]
    layouts.append(cases.make_batch(POLICIES["items"], [9, 0]).layout(transpose=False, head="items"))
    joined = join_layouts(layouts)
    pk.PatchLayout(**vars(joined))
    parts = [pair for layout in layouts for pair in seen_by_item_rows(layout)]
    assert seen_by_item_rows(joined) == parts and joined.labels is None
    titles = cases.make_batch(POLICIES["items"], [9, 0]).layout(transpose=False)
    for order in ([titles, *layouts], [*layouts, titles]):
        mixed = join_layouts(order)
        pk.PatchLayout(**vars(mixed))
        assert seen_by_item_rows(mixed) == parts
        assert torch.equal(mixed.labels[mixed.logit_rows + 1], titles.logit_labels)
    unlabelled = cases.make_batch(POLICIES["items"], [9, 0], with_targets=False).layout(head="items")
    assert join_layouts([layouts[0], unlabelled]).item_labels is None
    assert join_layouts([titles]).item_rows is None


@pytest.mark.parametrize("head", ["items", "both"])
def test_layouts_pickle_and_move(head: str) -> None:
    layout = plan(make_batch(POLICIES["items"]), RANGES, head=head)
    copied = pickle.loads(pickle.dumps(layout))
    assert torch.equal(copied.item_rows, layout.item_rows) and torch.equal(copied.item_labels, layout.item_labels)
    moved = layout.to("meta")
    assert moved.item_rows.device.type == moved.item_labels.device.type == "meta"


def test_a_line_says_how_many_item_rows_there_are() -> None:
    catalog = pk.Catalog.from_token_ids([5, 6], [0, 1, 2])
    prompt = pk.Prompt(prefix=[1], separator=[2], suffix=[3], response_end=[4])
    layout = build_training_layout(catalog, [[0, 1, 1, 0]], pk.ItemPatches(0), prompt, [[1, 3]], head="items")
    assert "3 item rows" in repr(layout) and "labels" not in repr(layout)


def test_layouts_are_checked() -> None:
    layout = plan(make_batch(POLICIES["items"]), RANGES)
    rows, labels = layout.item_rows, layout.item_labels
    for changed, error, message in (
        ({"item_rows": rows.int()}, TypeError, "item_rows: expected dtype torch.int64, got torch.int32"),
        ({"item_rows": rows + layout.num_rows}, ValueError, r"item_rows\[0\]: expected"),
        ({"item_labels": labels[1:]}, ValueError, "item_labels: expected"),
        ({"item_labels": labels - 1000}, ValueError, r"item_labels\[0\]: expected"),
        ({"item_rows": None}, ValueError, "item_labels: expected"),
        ({"item_rows": rows.to("meta")}, ValueError, "item_rows: expected a dense tensor with values"),
    ):
        with pytest.raises(error, match=message):
            replace(layout, **changed)
