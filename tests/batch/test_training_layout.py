# SPDX-License-Identifier: Apache-2.0
"""Trunks and branches: every branch reads exactly what a sample of its own would, in loss, gradients and rows."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from typing import Any

import cases
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import patchkern as pk
from patchkern import build_training_layout, join_layouts, training_rows
from patchkern.batch.planning import Spans
from patchkern.batch.policy_kinds import TrunkPolicy

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


def rows_seen(layout: pk.PatchLayout, span: int) -> list[Any]:
    """A span's rows with its prefix's, as the tokens that they pool."""
    cu = layout.cu_seqlens.tolist()
    rows = [*cases.rows_before(layout, span), *range(cu[span], cu[span + 1])]
    offsets, tokens = layout.offsets.tolist(), layout.token_ids.tolist()
    titles = [tuple(tokens[offsets[item] : offsets[item + 1]]) for item in layout.items.tolist()]
    pairs = zip(layout.lo[rows].tolist(), layout.hi[rows].tolist(), strict=True)
    return [lo if lo < 0 else titles[lo:hi] for lo, hi in pairs]


def branches_of(layout: pk.PatchLayout) -> dict[tuple[Any, ...], list[Any]]:
    """What a model is taught by each branch: rows, positions, labels."""
    assert layout.labels is not None and layout.prefix is not None
    cu = layout.cu_seqlens.tolist()
    seen = {}
    for span in range(layout.num_users):
        own = slice(cu[span], cu[span + 1])
        if not (layout.labels[own] >= 0).any():
            continue
        hidden = len(cases.rows_before(layout, span))
        rows = rows_seen(layout, span)
        assert layout.position_ids[own].tolist() == list(range(hidden, len(rows)))
        labels = [-100] * hidden + layout.labels[own].tolist()
        seen[repr((rows, labels))] = 1 + seen.get(repr((rows, labels)), 0)
    return seen


def samples_of(batch: cases.Batch, ranges: list[list[int]], starts: list[list[int]] | None = None) -> pk.PatchLayout:
    """The same samples, each packed with its own history."""
    histories, targets = [], []
    for user, (first, last) in enumerate(ranges):
        for position in range(first, last + 1):
            start = 0 if starts is None else starts[user][position]
            histories.append(batch.histories[user][start:position])
            targets.append(batch.histories[user][position])
    layout = pk.build_layout(batch.catalog, histories, batch.policy, cases.make_prompt(batch.prompt), targets)
    values = {**layout.__dict__, "prefix": torch.zeros(layout.num_users, 2, dtype=torch.int32)}
    return pk.PatchLayout._trusted(values)


def plan(batch: cases.Batch, ranges: Any, **options: Any) -> pk.PatchLayout:
    catalog, histories, policy, prompt, _ = batch.arguments()
    return build_training_layout(catalog, histories, policy, prompt, ranges, **options)


@pytest.mark.parametrize("name", POLICIES)
def test_branches_are_the_samples(planner: str, name: str) -> None:
    batch = cases.make_batch(POLICIES[name], [1, 2, 40, 0, 13], with_targets=False)
    ranges = [[0, 0], [1, 1], [0, 39], [0, -1], [3, 11]]
    layout = plan(batch, ranges)
    assert branches_of(layout) == branches_of(samples_of(batch, ranges))
    checked = pk.PatchLayout(**vars(layout))  # keeps all that a layout promises
    assert checked.transpose is not None and checked.max_token_id == 96


@settings(max_examples=60)
@given(data=st.data(), name=st.sampled_from(sorted(POLICIES)), separator=st.integers(0, 2), prefix=st.integers(0, 2))
def test_branches_are_the_samples_of_random_batches(
    planner: str, data: st.DataObject, name: str, separator: int, prefix: int
) -> None:
    lengths = data.draw(st.lists(st.integers(0, 20), min_size=1, max_size=4))
    batch = cases.make_batch(POLICIES[name], lengths, with_targets=False)
    batch.prompt = replace(batch.prompt, separator=[92, 89][:separator], prefix=[90, 91][:prefix])
    ranges = []
    for length in lengths:
        first = data.draw(st.integers(1, length)) if length > 1 else 0
        ranges.append([first, data.draw(st.integers(first - 1, length - 1))] if length > 1 else [0, -1])
    assert branches_of(plan(batch, ranges)) == branches_of(samples_of(batch, ranges))


@pytest.mark.parametrize(
    ("heads", "targets", "message"),
    [([0, 3], [-1, 0], "status 19 at position 1"), ([0, 2], [-1, -2], "status 15 at position 1")],
)
def test_spans_that_make_no_sense(heads: list[int], targets: list[int], message: str) -> None:
    native = pytest.importorskip("patchkern.batch.planning_native", reason="the native module is not built")
    batch = cases.make_batch(pk.ItemPatches(3), [2, 1], with_targets=False)
    catalog, histories, policy, prompt, _ = batch.arguments()
    kept = pk.Histories.coerce(histories)
    spans = Spans(np.array(heads, np.uint8), np.zeros(2, np.int64))
    index, levels = catalog.index_of(kept.items, "histories"), policy.levels(kept)
    with pytest.raises(ValueError, match=message):
        native.plan_rows(catalog, index, kept.offsets, levels, prompt, np.array(targets, np.int32), spans)


@pytest.mark.parametrize("name", POLICIES)
def test_trunks_promise_what_levels_keep(name: str) -> None:
    """Before the split the levels of the longest, after it those of a history of its own."""
    policy = POLICIES[name]
    assert isinstance(policy, TrunkPolicy)
    lengths = np.arange(60)
    keys, splits = policy.trunks(lengths)
    levels = [policy.levels(pk.Histories(np.arange(n), [0, n])) for n in lengths]
    for key in np.unique(keys):
        members = np.flatnonzero(keys == key)
        longest = members[splits[members].argmax()]
        for length in members:
            split = splits[length]
            tail = policy.levels(pk.Histories(np.arange(length - split), [0, length - split]))
            assert levels[length][:split].tolist() == levels[longest][:split].tolist()
            assert levels[length][split:].tolist() == tail.tolist()


@pytest.mark.parametrize("block_size", [1, 4, 7, 50])
def test_long_histories_begin_at_block_borders(block_size: int) -> None:
    batch = cases.make_batch(pk.ItemPatches(3, max_items=10), [40, 8], with_targets=False)
    ranges = [[0, 39], [2, 7]]
    starts = [[max(position - 10, 0) // block_size * block_size for position in range(40)], [0] * 8]
    assert all(10 <= p - s < 10 + block_size for p, s in enumerate(starts[0]) if p >= 10)
    layout = plan(batch, ranges, block_size=block_size)
    uncut = cases.Batch(batch.titles, batch.histories, pk.ItemPatches(3, None), batch.prompt)
    assert branches_of(layout) == branches_of(samples_of(uncut, ranges, starts))


@pytest.mark.parametrize("name", [*POLICIES, "random"])
def test_training_rows(name: str) -> None:
    policy = POLICIES.get(name, pk.RandomItemPatches(0.5, 8))
    batch = cases.make_batch(policy, [1, 2, 40, 0, 13], with_targets=False)
    catalog, histories, _, prompt, _ = batch.arguments()
    ranges = np.array([[0, 0], [1, 1], [5, 39], [0, -1], [3, 11]])
    counted = training_rows(catalog, histories, policy, prompt, ranges)
    assert counted[3] == 0
    if name == "random":  # the draws depend on who else is in the batch
        return
    for user in range(5):
        alone = build_training_layout(catalog, [histories[user]], policy, prompt, ranges[user : user + 1])
        assert alone.num_rows == counted[user]
    assert plan(batch, ranges, max_rows=int(counted.sum())).num_rows == counted.sum()
    with pytest.raises(ValueError, match=rf"max_rows: expected at least {counted.sum()} for these users and targets"):
        plan(batch, ranges, max_rows=int(counted.sum()) - 1)


def test_random_patches_are_drawn_once_per_trunk() -> None:
    batch = cases.make_batch(pk.RandomItemPatches(0.5, None, seed=3), [30], with_targets=False)
    layout = plan(batch, [[10, 29]])
    assert layout.prefix is not None and layout.num_users == 21
    assert layout.prefix[0].tolist() == [0, 0] and (layout.prefix[1:, 0] == 0).all()
    assert (layout.prefix[1:, 1].diff() > 0).all() and int(layout.prefix[-1, 1]) <= int(layout.cu_seqlens[1])
    assert 0 < (layout.lo[: int(layout.cu_seqlens[1])] >= 0).sum() < 30


def test_a_line_says_that_spans_have_prefixes() -> None:
    catalog = pk.Catalog.from_token_ids([5, 6], [0, 1, 2])
    prompt = pk.Prompt(prefix=[1], separator=[2], suffix=[3], response_end=[4])
    layout = build_training_layout(catalog, [[0, 1, 1, 0]], pk.TextOnly(), prompt, [[1, 3]])
    # a trunk of the prompt's prefix and three items, and three branches of suffix, target and response end
    assert repr(layout) == (
        "PatchLayout(4 spans, 15 rows, longest 6, longest prefix 6, 0 items in patches, compression 1.00, 6 labels, "
        "on cpu)"
    )


def test_fewer_rows_than_samples_of_their_own() -> None:
    batch = cases.make_batch(pk.ItemPatches(3, None), [100], with_targets=False)
    assert plan(batch, [[3, 99]]).num_rows * 3 < samples_of(batch, [[3, 99]]).num_rows


def test_joined_layouts_pool_and_learn_the_same() -> None:
    one = cases.make_batch(pk.SessionPatches(3), [17, 0, 2]).layout()
    two = cases.make_batch(pk.ItemPatches(3), [9], seed=1, with_targets=False).layout()
    three = plan(cases.make_batch(pk.ItemPatches(2, None), [12], with_targets=False), [[4, 11]])
    joined = join_layouts([one, two, three])
    pk.PatchLayout(**vars(joined))
    weight = cases.make_weight(cases.VOCABULARY, 8)
    parts = torch.cat([pk.pool_rows(weight, layout) for layout in (one, two, three)])
    assert torch.equal(pk.pool_rows(weight, joined), parts)
    assert joined.labels is not None and joined.logit_rows is not None and joined.logit_labels is not None
    assert torch.equal(joined.labels[joined.logit_rows + 1], joined.logit_labels)
    assert joined.prefix is not None and three.prefix is not None
    assert torch.equal(joined.prefix[-three.num_users :] - one.num_rows - two.num_rows, three.prefix)
    with pytest.raises(ValueError, match="layouts: expected at least one, got none"):
        join_layouts([])


def test_joined_layouts_have_as_many_ranges_as_any() -> None:
    none = cases.make_batch(pk.SessionPatches(3), [17, 0]).layout()
    one = plan(cases.make_batch(pk.ItemPatches(2, None), [12], with_targets=False), [[4, 11]])
    assert none.prefix is None and one.prefix is not None
    prefix = torch.zeros(one.num_users, 2, 2, dtype=torch.int32)
    prefix[-1] = torch.tensor([[0, 1], [2, 4]])
    two = dataclasses.replace(one, prefix=prefix, max_prefix=3)
    joined = join_layouts([none, two, one])
    checked = pk.PatchLayout(**vars(joined))
    assert checked.prefix is not None and checked.prefix.shape == (joined.num_users, 2, 2)
    sees = [[[a, b] for a, b in span if a < b] for span in checked.prefix.tolist()]
    first, second = none.num_rows, none.num_rows + two.num_rows
    assert sees[:2] == [[], []]
    assert sees[one.num_users + 1] == [[first, first + 1], [first + 2, first + 4]]
    assert sees[one.num_users + 2 :] == [[[a + second, b + second]] if a < b else [] for a, b in one.prefix.tolist()]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"policy": pk.FitRows(99)}, ValueError, r"policy: expected one whose prompts share .*, got FitRows"),
        ({"policy": "text"}, TypeError, r"policy: expected a policy"),
        (
            {"target_ranges": [[0, 1]]},
            ValueError,
            r"target_ranges: expected integers of shape \(2, 2\), got int64 \(1, 2\)",
        ),
        ({"target_ranges": [[0.0, 1.0]] * 2}, ValueError, r"target_ranges: expected integers .* got float64"),
        (
            {"target_ranges": [[0, 1], [3, 9]]},
            ValueError,
            r"target_ranges\[1\]: expected positions in 0..8, got \[3, 9\]",
        ),
        ({"target_ranges": [[-1, 1], [3, 8]]}, ValueError, r"target_ranges\[0\]: expected positions in 0..4"),
        ({"block_size": 0}, ValueError, r"block_size: expected an integer in 1"),
        ({"max_rows": 0}, ValueError, r"max_rows: expected an integer in 1"),
        ({"prompt": pk.Prompt([90], [92], [], [96])}, ValueError, r"prompt: expected a suffix"),
        ({"prompt": [1, 2]}, TypeError, r"prompt: expected a Prompt, got list"),
        ({"catalog": None}, TypeError, r"catalog: expected a Catalog, got NoneType"),
        ({"histories": [[0, 12_345, 1, 2, 3, 4, 5, 6, 7]] * 2}, ValueError, r"histories: .* 12345"),
        ({"transpose": 1}, TypeError, r"transpose: expected a bool, got int"),
    ],
)
def test_errors(options: dict[str, Any], error: type[Exception], message: str) -> None:
    batch = cases.make_batch(pk.TextOnly(None), [5, 9], with_targets=False)
    catalog, histories, policy, prompt, _ = batch.arguments()
    defaults = {"catalog": catalog, "histories": histories, "policy": policy, "prompt": prompt}
    with pytest.raises(error, match=message):
        build_training_layout(**{**defaults, "target_ranges": [[1, 4], [3, 8]], **options})


# ------------------------------------------------------------------ through a model


def tiny_model(batch: cases.Batch) -> pk.PatchedCausalLM:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=cases.VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
    )
    model = LlamaForCausalLM(config).double()
    return pk.PatchedCausalLM(model, batch.catalog, cases.make_prompt(batch.prompt))


@pytest.fixture
def float64_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers normalises in float32, which turns differences of 1e-16 into some of 1e-8."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)


@pytest.mark.usefixtures("float64_norms")
@pytest.mark.parametrize("name", POLICIES)
def test_loss_and_gradients_are_those_of_the_samples(name: str) -> None:
    batch = cases.make_batch(POLICIES[name], [1, 40, 0, 23], with_targets=False)
    ranges = [[0, 0], [0, 39], [0, -1], [9, 22]]
    model = tiny_model(batch)
    results = []
    for layout in (plan(batch, ranges), pk.PatchLayout._trusted({**vars(samples_of(batch, ranges)), "prefix": None})):
        model.zero_grad()
        logits = model(layout).logits  # its loss is float32
        assert logits is not None and layout.logit_labels is not None
        loss = torch.nn.functional.cross_entropy(logits, layout.logit_labels)
        loss.backward()
        results.append((loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-10, atol=0)
    for got, expected in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10 * float(expected.abs().max()))


@pytest.mark.parametrize("name", POLICIES)
def test_targets_see_neither_themselves_nor_the_future(name: str) -> None:
    """Another later item, and nothing earlier moves, bit for bit."""
    batch = cases.make_batch(POLICIES[name], [40], with_targets=False)
    model = tiny_model(batch).eval()
    history = batch.histories[0]
    lengths = {item: len(title) for item, title in batch.titles.items()}
    # another item with a title of the same length, so that the batches have the same shape
    at, other = next(
        (position, item)
        for position in range(20, 40)
        for item in lengths
        if item != history[position] and lengths[item] == lengths[history[position]]
    )
    changed = cases.Batch(batch.titles, [[*history[:at], other, *history[at + 1 :]]], batch.policy, batch.prompt)
    with torch.no_grad():
        one, two = (model(plan(b, [[1, 39]])) for b in (batch, changed))
    assert one.logits is not None and two.logits is not None
    moved = set()
    start = 0
    for position in range(1, 40):
        end = start + lengths[history[position]] + len(batch.prompt.response_end)
        if position < at:
            assert torch.equal(one.logits[start:end], two.logits[start:end])
        elif position == at:  # the first logits are read before the target
            assert torch.equal(one.logits[start], two.logits[start])
        elif not torch.equal(one.logits[start:end], two.logits[start:end]):
            moved.add(position)
        start = end
    assert start == len(one.logits) and moved == set(range(at + 1, 40))


def test_no_users_in_any_form() -> None:
    batch = cases.Batch({0: [1]}, [], pk.TextOnly(None))
    for nobody in ([], np.zeros((0, 2), np.int64)):
        layout = build_training_layout(*batch.arguments()[:4], nobody)
        assert layout.num_rows == 0 and layout.num_users == 0


@pytest.mark.parametrize(
    ("layouts", "error", "message"),
    [
        ([], ValueError, "layouts: expected at least one"),
        ([5], TypeError, r"layouts\[0\]: expected a PatchLayout, got int"),
    ],
)
def test_what_cannot_be_joined(layouts: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        join_layouts(layouts)
