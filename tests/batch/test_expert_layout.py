# SPDX-License-Identifier: Apache-2.0
"""Layouts under `Experts` against the rule, row by row: what each row is, where it stands, and what it sees."""

from __future__ import annotations

import pickle

import expert_cases as cases
import numpy as np
import pytest
import torch
from expert_cases import CATALOG, N_ITEMS, POLICIES, prompt_of

import patchkern as pk
from patchkern.batch.expert_layout import compress_layout, expert_hashes, read_layout

HISTORIES = [np.random.default_rng(n).integers(0, N_ITEMS, n).tolist() for n in (13, 0, 3, 8, 1, 7)]
PROMPTS = {
    "marked": cases.PROMPT,
    "bare": pk.Prompt(suffix=[103], response_end=[105]),
}


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("head", ["titles", "items", "both"])
@pytest.mark.parametrize("kind", POLICIES)
def test_reading(kind: str, head: str, prompt: str) -> None:
    policy = POLICIES[kind]
    marked = prompt_of(policy, PROMPTS[prompt])
    histories = HISTORIES if prompt == "marked" else [items for items in HISTORIES if items]
    targets = [3] * len(histories)
    layout = pk.build_layout(CATALOG, histories, policy, marked, targets, head=head)
    ending = [] if head == "items" else [*marked.suffix, *cases.TITLES[3], *marked.response_end]
    expected = [cases.signatures(cases.rows_of(items, policy, CATALOG, marked, ending)) for items in histories]
    found = np.split(np.array(cases.layout_signatures(layout)), layout.prompts[1:-1].numpy())
    for ours, theirs in zip(found, expected, strict=True):
        assert sorted(ours) == sorted(theirs) and ours[-len(ending or "1") :].tolist() == theirs[-len(ending or "1") :]
    if head != "items":
        size = len(cases.TITLES[3]) + len(marked.response_end)
        assert layout.logit_labels.tolist() == [*cases.TITLES[3], *marked.response_end] * len(histories)
        ends = layout.prompts.numpy()[1:, None] - 1 - np.arange(size, 0, -1)
        assert layout.logit_rows.tolist() == ends.flatten().tolist()
    if head != "titles":
        history_ends = [row[-1 - len(ending)] for row in expected]
        assert np.array(cases.layout_signatures(layout))[layout.item_rows].tolist() == history_ends
        assert layout.item_labels.tolist() == targets
    checked = pickle.loads(pickle.dumps(layout))
    assert checked.max_prefix == layout.max_prefix and layout.transpose is not None


@pytest.mark.parametrize("kind", [kind for kind, policy in POLICIES.items() if policy.count])
def test_what_is_compressed_and_what_is_read_later_are_the_whole(kind: str) -> None:
    policy = POLICIES[kind]
    prompt = prompt_of(policy)
    whole = pk.build_layout(CATALOG, HISTORIES, policy, prompt)
    olds = [items[: int(policy.cuts(np.array([len(items)]))[0])] for items in HISTORIES]
    number = np.cumsum([len(old) > 0 for old in olds]) - 1  # of a user among those with a past
    before, after = (
        compress_layout(CATALOG, pk.Histories.coerce([old for old in olds if old]), policy, prompt),
        read_layout(CATALOG, pk.Histories.coerce(HISTORIES), policy, prompt, "titles"),
    )
    pickle.loads(pickle.dumps(before)), pickle.loads(pickle.dumps(after))
    signs = [np.split(np.array(cases.layout_signatures(x)), x.prompts[1:-1].numpy()) for x in (whole, before)]
    contents = [[(row.content, row.position) for row in cases.rows_in(x)] for x in (whole, after)]
    experts = {("token", token) for token in prompt.experts}
    for user, items in enumerate(HISTORIES):
        every, computed = signs[0][user].tolist(), signs[1][number[user]].tolist() if olds[user] else []
        assert set(computed) <= set(every)
        rows = [contents[0][row] for row in range(*whole.prompts[user : user + 2].tolist())]
        left = [contents[1][row] for row in range(*after.cu_seqlens[user : user + 2].tolist())]
        own = [row for row in rows if row[0] in experts]
        assert len(own) == policy.count * int(policy.compressed_parts(policy.cuts(np.array([len(items)])))[0])
        if not olds[user]:
            assert not computed and left == rows
            continue
        # without the old items, in their order
        n_old = len(computed) - len(own) - len(prompt.prefix)
        assert sorted(left, key=lambda row: row[1]) == left and len(left) == len(rows) - n_old
        assert set(own) <= set(left) and left[: len(prompt.prefix)] == rows[: len(prompt.prefix)]
        recents = len(left) - len(prompt.prefix) - len(own)
        assert left[-recents:] == rows[-recents:]


def test_without_old_items_it_is_the_inner_policy() -> None:
    for policy in (POLICIES["one, text last"], POLICIES["blocks, items"]):
        histories = [items[: policy.block] for items in HISTORIES]
        prompt = prompt_of(policy)
        ours = pk.build_layout(CATALOG, histories, policy, prompt, [1] * 6)
        theirs = pk.build_layout(CATALOG, histories, policy.recents, prompt, [1] * 6)
        assert ours.prefix is None
        for name in ("lo", "hi", "cu_seqlens", "position_ids", "logit_rows", "logit_labels"):
            assert getattr(ours, name).tolist() == getattr(theirs, name).tolist()


def test_without_experts_it_is_the_recent_items() -> None:
    policy = POLICIES["one, none"]
    recent = [items[policy.cuts(np.array([len(items)]))[0] :] for items in HISTORIES]
    ours = pk.build_layout(CATALOG, HISTORIES, policy, cases.PROMPT)
    theirs = pk.build_layout(CATALOG, recent, policy.policy, cases.PROMPT)
    assert ours.lo.tolist() == theirs.lo.tolist() and ours.position_ids.tolist() == theirs.position_ids.tolist()


@pytest.mark.parametrize("kind", sorted(kind for kind in POLICIES if POLICIES[kind].count))
def test_an_experts_hash_is_that_of_what_it_has_read(kind: str) -> None:
    policy = POLICIES[kind]
    prompt = prompt_of(policy)
    history = HISTORIES[0]

    def hashes(items: list[int], prompt: pk.Prompt = prompt) -> list[int]:
        both = pk.Histories.from_sequences([[1] * 9, items])
        others = expert_hashes(CATALOG, pk.Histories.from_sequences([[1] * 9]), policy, prompt)
        found = expert_hashes(CATALOG, both, policy, prompt)
        assert found[: others.size].tolist() == others.tolist()
        return found[others.size :].tolist()

    before = hashes(history)
    assert len(set(before)) == len(before) == (pk.build_layout(CATALOG, [history], policy, prompt).lo < -110).sum()
    cut = int(policy.cuts(np.array([len(history)]))[0])
    assert hashes([*history[:cut], *[7] * (len(history) - cut)]) == before, "what is recent, nobody has read"
    for at in range(cut):
        changed = [*history[:at], (history[at] + 1) % N_ITEMS, *history[at + 1 :]]
        # those of blocks before stay; all that have read it, also through others, are new
        same = at // policy.block * policy.count if policy.parts == "blocks" else 0
        after = hashes(changed)
        assert after[:same] == before[:same] and not set(after[same:]) & set(before)
    others = (
        pk.Prompt([99], [102], [103], [105], experts=prompt.experts),
        prompt.with_special(experts=[token + 10 for token in prompt.experts]),
    )
    for other in others:
        assert not set(hashes(history, other)) & set(before)


def test_hashes_of_many_blocks_are_made_in_linear_time() -> None:
    """As many blocks as items read one after the other would be 2 * 10**9 items."""
    policy = pk.Experts(pk.ItemPatches(0, None), count=1, block=1, parts="blocks")
    prompt = pk.Prompt((100,), (101,), (103,), (105,), experts=(110,))
    items = np.random.default_rng(0).integers(0, N_ITEMS, 65_536)
    hashes = expert_hashes(CATALOG, pk.Histories.coerce([items, items[:1000]]), policy, prompt)
    assert hashes.size == 65_535 + 999 and np.array_equal(hashes[65_535:], hashes[:999])
    assert np.unique(hashes).size == 65_535


def test_items_read_in_another_way_give_other_experts() -> None:
    prompt = pk.Prompt((100,), (101,), (103,), (105,), experts=(110,))
    old = pk.Histories.from_sequences([[1, 2, 3, 4, 5, 6, 7]])
    inner = {
        "text": pk.TextOnly(None),
        "patches": pk.ItemPatches(0, None),
        "sessions": pk.SessionPatches(3, align="start", max_items=None),
    }
    found = [
        tuple(
            expert_hashes(CATALOG, old, pk.Experts(policy, count=1, keep=1, block=block, parts=parts), prompt, by_item)
        )
        for policy in inner.values()
        for parts, block in (("one", 3), ("blocks", 3), ("blocks", 6))
        for by_item in (False, True)
    ]
    assert len(set(found)) == len(found) == 18


def test_a_user_without_text_needs_no_suffix_where_nothing_is_old() -> None:
    policy = POLICIES["one, text"]
    prompt = pk.Prompt(prefix=[100], response_end=[105], experts=[110])
    layout = pk.build_layout(CATALOG, [[1] * 9, []], policy, prompt, [3, 3])
    assert layout.logit_labels is not None and layout.logit_labels.shape[0] == 2 * (len(cases.TITLES[3]) + 1)


def test_joined_layouts_know_whose_their_spans_are() -> None:
    catalog = pk.Catalog.from_token_ids(range(9), range(10))
    prompt = pk.Prompt(prefix=[9], separator=[12], suffix=[13]).with_special(experts=[10, 11])
    policy = pk.Experts(pk.ItemPatches(0, None), count=2, keep=1, block=3, parts="blocks")
    batches = [[range(8), range(2)], [], [[3]], [range(9)]]
    layouts = [pk.build_layout(catalog, batch, policy, prompt) for batch in batches]
    joined = pk.join_layouts(layouts)
    pk.PatchLayout(**vars(joined))
    whole = pk.build_layout(catalog, [user for batch in batches for user in batch], policy, prompt)
    assert joined.prompts.tolist() == whole.prompts.tolist()
    assert torch.equal(joined.cu_seqlens, whole.cu_seqlens)
    assert pk.join_layouts(layouts[1:3]).cu_users is None
