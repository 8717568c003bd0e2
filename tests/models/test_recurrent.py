# SPDX-License-Identifier: Apache-2.0
"""Recurrent memories: both stages against dense masks in float64, iterating against parallel, gradients, errors."""

from __future__ import annotations

import copy
from typing import Any

import memory_model_cases as cases
import numpy as np
import pytest
import torch
from item_model_cases import ITEM_IDS, N_ITEMS
from memory_model_cases import BLOCK, HISTORIES, INNER, LENGTHS, RANGES, SLOTS, make_memory

import patchkern as pk
from patchkern.models.memories import Memories

KINDS = [("sasrec", "overwrite", "items"), ("hstu", "append", "items"), ("sasrec", "append", "sessions")]
EXACT = {"rtol": 0, "atol": 1e-12}


def sessions_of(inner: str) -> int:
    return 2 if inner == "sessions" else 1


# ------------------------------------------------------------------ stage 1


@pytest.mark.parametrize(("kind", "mode", "inner"), KINDS)
def test_references_are_those_of_the_interleaved_mask(kind: str, mode: str, inner: str) -> None:
    memory = make_memory(kind, mode, inner)
    ranges = np.stack([np.zeros(len(LENGTHS), np.int64), RANGES[:, 1]], axis=1)
    batch = memory.planner.training(HISTORIES, ranges, head="items")
    got = memory.model.row_states(batch.stage1)[batch.queries]
    expected = torch.cat(
        [
            cases.reference(memory, HISTORIES[user][:last].tolist(), sessions_of(inner))
            for user, (_, last) in enumerate(RANGES)
            if last >= BLOCK
        ]
    )
    torch.testing.assert_close(got, expected, **EXACT)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ours, theirs = (
        torch.autograd.grad((x * weights).sum(), memory.hf_model.parameters(), allow_unused=True)
        for x in (got, expected)
    )
    for (name, _), own, other in zip(memory.hf_model.named_parameters(), ours, theirs, strict=True):
        torch.testing.assert_close(own, other, **EXACT, msg=name)
        assert own.abs().max() > 0, name


@pytest.mark.parametrize("mode", ["overwrite", "append"])
def test_one_time_memories_are_the_references_of_each_prefix_alone(mode: str) -> None:
    memory = make_memory(mode=mode)
    found = memory.compress(HISTORIES, one_time=True)
    for user, items in enumerate(HISTORIES):
        vectors, absorbed = found[user]
        assert absorbed == max(len(items) - 1, 0) // BLOCK * BLOCK
        expected = cases.reference(memory, items[:absorbed].tolist()).flatten(0, 1)
        expected = expected[-SLOTS:] if mode == "overwrite" else expected
        torch.testing.assert_close(vectors, expected.detach(), **EXACT)
    split = memory.compress(HISTORIES, one_time=True, rows_per_pass=9)
    torch.testing.assert_close(split.vectors, found.vectors, **EXACT)


def test_items_of_stage_1_never_see_a_query_row() -> None:
    """Bit for bit."""
    memory = make_memory()
    batch = memory.planner.training(HISTORIES, RANGES, head="items")
    before = memory.model.row_states(batch.stage1).detach()
    with torch.no_grad():
        memory.hf_model.get_input_embeddings().weight[list(memory.prompt.experts)] += 1.0
    changed = (memory.model.row_states(batch.stage1) != before).any(dim=1)
    is_query = torch.zeros_like(changed)
    is_query[batch.queries.flatten()] = True
    assert torch.equal(changed, is_query)


# ------------------------------------------------------------------ stage 2


@pytest.mark.parametrize(("kind", "mode", "inner"), KINDS)
def test_every_target_is_read_as_its_prompt_alone(kind: str, mode: str, inner: str) -> None:
    """From the references: states and gradients of stage 2 are those of a causal sequence for each target."""
    memory = make_memory(kind, mode, inner)
    batch = memory.planner.training(HISTORIES, RANGES, head="items")
    references = memory.model.row_states(batch.stage1)[batch.queries]
    got = memory.model.item_states(batch.stage2, references.flatten(0, 1)[batch.memories])
    expected = []
    for user, (first, last) in enumerate(RANGES):
        items = HISTORIES[user].tolist()
        for position in range(first, last + 1):
            absorbed = max(position - 1, 0) // BLOCK * BLOCK
            vectors = cases.reference(memory, items[:absorbed], sessions_of(inner)).flatten(0, 1)
            vectors = vectors[-SLOTS:] if mode == "overwrite" else vectors
            groups = cases.groups_of(items[absorbed:position], INNER[inner])
            recent = [cases.rows_of(memory, group).mean(0, keepdim=True) for group in groups]
            rows = torch.cat([cases.special(memory, N_ITEMS), vectors, *recent])
            begin = 1 + len(vectors)
            positions = [0] + [-1] * len(vectors) + list(range(begin, len(rows)))
            expected.append(cases.dense(memory, rows, positions, cases.causal(len(rows)))[-1])
    torch.testing.assert_close(got, torch.stack(expected), **EXACT)
    weights = torch.randn(got.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ours, theirs = (
        torch.autograd.grad((x * weights).sum(), memory.hf_model.parameters()) for x in (got, torch.stack(expected))
    )
    for (name, _), own, other in zip(memory.hf_model.named_parameters(), ours, theirs, strict=True):
        torch.testing.assert_close(own, other, **EXACT, msg=name)


@pytest.mark.parametrize("mode", ["overwrite", "append"])
def test_a_memory_is_seen_by_its_segment_alone(mode: str) -> None:
    """Bit for bit; with "append" by every later segment of its user too."""
    memory = make_memory(mode=mode)
    batch = memory.planner.training(HISTORIES, [[0, 16], *[[0, -1]] * 7], head="items")
    vectors = torch.randn(batch.memories.shape[0], 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    before = memory.model.row_states(batch.stage2, vectors).detach()
    segment = torch.tensor([max(position - 1, 0) // BLOCK for position in range(17)])
    for h in range(1, 4):  # the memory of segments before h
        changed = vectors.clone()
        changed[(h - 1) * SLOTS : h * SLOTS] += 1.0
        after = memory.model.row_states(batch.stage2, changed)
        different = (after != before).any(dim=1)[batch.stage2.item_rows]
        seen = segment == h if mode == "overwrite" else segment >= h
        assert torch.equal(different, seen)


@pytest.mark.parametrize("kind", ["sasrec", "hstu"])
def test_segments_permuted_are_segments_permuted(kind: str) -> None:
    """What stands before a segment is in its memory, if it is one that is overwritten, and in nothing else."""
    memory, items = make_memory(kind), HISTORIES[0].tolist()
    first, *others = (items[begin : begin + BLOCK] for begin in range(0, 16, BLOCK))
    vectors = torch.randn(3, SLOTS, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def states(order: list[int]) -> torch.Tensor:
        history = [*first, *(item for h in order for item in others[h]), items[16]]
        batch = memory.planner.training(pk.Histories.from_sequences([history]), [[0, 16]], head="items")
        found = memory.model.item_states(batch.stage2, vectors[order].flatten(0, 1))
        return found[1 + BLOCK :].view(3, BLOCK, 8)

    torch.testing.assert_close(states([2, 0, 1]), states([0, 1, 2])[[2, 0, 1]], **EXACT)


@pytest.mark.parametrize("mode", ["overwrite", "append"])
def test_users_permuted_are_users_permuted(mode: str) -> None:
    """And a change of one user is none of any other, bit for bit."""
    memory = make_memory("hstu", mode)

    def states(order: list[int], histories: pk.Histories) -> list[torch.Tensor]:
        batch = memory.planner.training(histories.take(order), RANGES[order], head="items")
        references = memory.model.row_states(batch.stage1)[batch.queries]
        found = memory.model.item_states(batch.stage2, references.flatten(0, 1)[batch.memories]).detach()
        parts = found.split([max(RANGES[user][1] - RANGES[user][0] + 1, 0) for user in order])
        return [parts[order.index(user)] for user in range(len(order))]

    before = states(list(range(8)), HISTORIES)
    for ours, theirs in zip(before, states([5, 3, 0, 7, 1, 6, 4, 2], HISTORIES), strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)
    changed = [items.tolist() for items in HISTORIES]
    changed[3][1] = ITEM_IDS[(ITEM_IDS.index(changed[3][1]) + 1) % N_ITEMS]
    after = states(list(range(8)), pk.Histories.from_sequences(changed))
    assert [torch.equal(ours, theirs) for ours, theirs in zip(before, after, strict=True)] == [
        user != 3 for user in range(8)
    ]


# ------------------------------------------------------------------ iterated and one-time


@pytest.mark.parametrize(("kind", "mode", "inner"), KINDS)
def test_iterating_is_the_parallel_pass(kind: str, mode: str, inner: str) -> None:
    memory = make_memory(kind, mode, inner)
    found = memory.compress(HISTORIES)
    for user, items in enumerate(HISTORIES):
        expected = cases.iterated(memory, items[: found.absorbed[user]].tolist(), sessions_of(inner))
        torch.testing.assert_close(found[user][0], expected.detach(), **EXACT)
    # the loop's memories in one pass of stage 2: its query rows are the loop's next memory
    items = HISTORIES[0].tolist()
    batch = memory.planner.training(HISTORIES.take([0]), [[0, 16]], head="items")
    steps = [cases.iterated(memory, items[: h * BLOCK], sessions_of(inner)) for h in range(1, 5)]
    given = torch.cat(steps[:3]) if mode == "overwrite" else steps[2]
    with torch.no_grad():
        states = memory.model.row_states(batch.stage2, given)
        for h, update in enumerate(states[batch.updates], 1):
            torch.testing.assert_close(update, steps[h][-SLOTS:].detach(), **EXACT)
        # and a read after an update is the next segment's row
        layout = pk.build_layout(memory.catalog, [items[:position] for position in range(17)], memory.policy,
                                 memory.prompt, head="items")  # fmt: skip
        reads = memory.compress([items[:position] for position in range(17)])
        got = memory.item_states(layout, reads.vectors)
    torch.testing.assert_close(got, states[batch.stage2.item_rows], **EXACT)


@pytest.mark.parametrize("mode", ["overwrite", "append"])
def test_memories_go_on_from_what_was_absorbed(mode: str) -> None:
    memory = make_memory(mode=mode)
    whole = memory.compress(HISTORIES)
    before = memory.compress([items[:7] for items in HISTORIES])
    assert before.absorbed.tolist() == [4, 0, 4, 4, 4, 0, 4, 0]
    kept = Memories.of([before[user] for user in range(len(before))])
    after = memory.compress(HISTORIES, kept)
    torch.testing.assert_close(after.vectors, whole.vectors, **EXACT)
    assert after.rows.tolist() == whole.rows.tolist() and after.absorbed.tolist() == whole.absorbed.tolist()
    again = memory.compress(HISTORIES, after)
    assert torch.equal(again.vectors, after.vectors), "nothing new is nothing computed"


def test_prompts_of_one_past_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = make_memory(mode="append")
    histories = HISTORIES.before([0, 3, 0, 1, 0], [17, 9, 15, 1, 14])
    expected = memory.compress(histories)
    counted: list[int] = []
    compress = memory.compress
    monkeypatch.setattr(
        memory, "compress", lambda given, **options: counted.append(len(given)) or compress(given, **options)
    )
    torch.testing.assert_close(memory.prompt_vectors(histories, memory.policy), expected.vectors, **EXACT)
    assert counted == [4], "16 and 12 items of user 0, 8 of user 3, none of user 1"


@pytest.mark.parametrize(("kind", "mode"), [("sasrec", "append"), ("hstu", "overwrite")])
def test_a_perfect_student_is_its_teacher(kind: str, mode: str) -> None:
    memory = make_memory(kind, mode)
    with torch.no_grad():
        for layer in memory.hf_model.layers:
            output = layer.attention_output if kind == "sasrec" else layer.output
            output.weight.zero_()
            output.bias.zero_()
    batch = memory.planner.training(HISTORIES, RANGES, head="items")
    assert memory(batch).consistency.item() == pytest.approx(0.0, abs=1e-24)
    torch.testing.assert_close(
        memory.compress(HISTORIES).vectors, memory.compress(HISTORIES, one_time=True).vectors, **EXACT
    )


def test_an_empty_memory_is_no_memory() -> None:
    """Bit for bit."""
    memory = make_memory()
    short = [items[:BLOCK].tolist() for items in HISTORIES]
    layouts = [
        pk.build_layout(memory.catalog, short, policy, memory.prompt, head="items")
        for policy in (memory.policy, INNER["items"])
    ]
    ours, theirs = (memory.item_states(layout) for layout in layouts)
    assert layouts[0].vector_rows is not None and torch.equal(ours, theirs)


# ------------------------------------------------------------------ losses


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_losses_are_what_they_say(reduction: str) -> None:
    memory = make_memory(consistency=0.5, reduction=reduction, reference_loss=2.0)
    batch = memory.planner.training(HISTORIES, RANGES, head="items", reference=True)
    output = memory(batch)
    references = memory.model.row_states(batch.stage1)[batch.queries]
    vectors = references.flatten(0, 1)[batch.memories]
    states = memory.model.row_states(batch.stage2, vectors)
    apart = [
        (states[rows] - references[of]).square().sum() / (SLOTS * 8 if reduction == "mean" else 1)
        for rows, of in zip(batch.updates, batch.updated, strict=True)
    ]
    torch.testing.assert_close(output.consistency, torch.stack(apart).mean(), **EXACT)
    torch.testing.assert_close(output.next_item, memory.model(batch.stage2, vectors=vectors).loss, **EXACT)
    torch.testing.assert_close(output.reference, memory.model(batch.stage1).loss, **EXACT)
    torch.testing.assert_close(
        output.loss, output.next_item + 0.5 * output.consistency + 2.0 * output.reference, **EXACT
    )
    # the same targets as one sample each, in whole histories
    plain = pk.build_training_layout(memory.catalog, HISTORIES, INNER["items"], memory.prompt, RANGES, head="items")
    torch.testing.assert_close(output.reference, memory.model(plain).loss, **EXACT)
    # a step of several passes: each counts as its targets do
    count = batch.stage2.item_labels.shape[0]
    torch.testing.assert_close(memory(batch, num_items_in_batch=4 * count).loss, output.loss / 4, **EXACT)


def gradients(memory: pk.RecurrentMemory, part: str) -> torch.Tensor:
    """Of the query tokens' embeddings, of which stage 2's items see nothing but through memories."""
    batch = memory.planner.training(HISTORIES, RANGES, head="items")
    weight: Any = memory.hf_model.get_input_embeddings().weight
    (gradient,) = torch.autograd.grad(getattr(memory(batch), part), weight)
    return gradient[list(memory.prompt.experts)]


def test_what_is_detached_has_no_gradient() -> None:
    assert gradients(make_memory(), "next_item").abs().min() > 0
    assert gradients(make_memory(detach_memory=True, detach_reference=False), "next_item").abs().max() == 0
    memory = make_memory()
    batch = memory.planner.training(HISTORIES, RANGES, head="items")
    for detach in (True, False):
        memory.detach_reference = detach
        references = memory.model.row_states(batch.stage1)[batch.queries].detach().requires_grad_()
        monkeyed = copy.copy(memory)
        monkeyed._references = lambda *_, references=references: (references, None)  # type: ignore[method-assign]
        (through_both,) = torch.autograd.grad(monkeyed(batch).consistency, references)
        last = [int(batch.updated[at]) for at in range(len(batch.updated))]
        never_read = sorted(set(last) - set((batch.memories // SLOTS).tolist()))
        assert never_read and bool((through_both[never_read] == 0).all()) == detach


def test_passes_with_the_models_own_memories(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = make_memory(rollout=0.5)
    items = pk.Histories.from_sequences([HISTORIES[0]])
    batch = memory.planner.training(items, [[0, 16]], head="items")
    draws = iter([0.6, 0.4, 0.4])
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.tensor(next(draws)))
    evaluated = memory.eval()(batch).next_item
    memory.train()
    for module in memory.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    assert torch.equal(memory(batch).next_item, evaluated), "evaluation and most passes read the references"
    got = memory(batch).next_item
    references = cases.reference(memory, items[0][:16].tolist())
    # a second pass from references: segment 1 from the first reference, which is an update from nothing
    second = cases.updated(memory, references[0], items[0][4:8].tolist())
    third = cases.updated(memory, references[1], items[0][8:12].tolist())
    vectors = torch.cat([references[0], second, third])
    torch.testing.assert_close(got, memory.model(batch.stage2, vectors=vectors).loss, **EXACT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"detach_memory": True}, "detach_memory: expected False with detach_reference"),
        ({"detach_memory": True, "detach_reference": False, "consistency": 0}, "detach_memory: expected False"),
        ({"consistency": -1.0}, "consistency: expected a number of at least 0, finite, got -1.0"),
        ({"rollout": 1.0}, "rollout: .*below 1, got 1.0"),
        ({"reduction": "max"}, "reduction: expected one of mean, sum, got 'max'"),
        ({"inner": "sessions", "reference_loss": 1.0}, "reference_loss: expected 0 with sessions"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_memory(**options)


def test_models_and_layouts_that_cannot_be() -> None:
    memory = make_memory()
    with pytest.raises(ValueError, match="policy is a PreferenceMemory, got ItemPatches"):
        pk.RecurrentMemory(pk.ItemModel(memory.catalog, INNER["items"], width=8))
    with pytest.raises(ValueError, match="prompt: expected 2 experts, a token for each of the memory's slots"):
        pk.RecurrentMemory(pk.ItemModel(memory.catalog, memory.policy, width=8))
    layout = pk.build_layout(memory.catalog, HISTORIES, memory.policy, memory.prompt, head="items")
    for model in (memory, memory.model):
        with pytest.raises(ValueError, match=r"vectors: expected 10, for the vector rows of the layout, got None"):
            model(layout)
        with pytest.raises(ValueError, match=r"vectors: expected shape \(10, 8\), one per vector row, got \(3, 8\)"):
            model(layout, vectors=torch.zeros(3, 8))
    plain = pk.build_layout(memory.catalog, HISTORIES, INNER["items"], memory.prompt, head="items")
    with pytest.raises(ValueError, match="vectors: expected None for a layout without vector rows"):
        memory(plain, vectors=torch.zeros(1, 8))
    found = memory.compress(HISTORIES)
    with pytest.raises(ValueError, match="memories: expected those of 2 users, as histories, got 8"):
        memory.compress(HISTORIES.take([0, 1]), found)
    with pytest.raises(ValueError, match=r"memories: expected at most 0 items of user 0, .* got 16 in 2"):
        memory.compress([items[:3] for items in HISTORIES], found)
    with pytest.raises(ValueError, match="memories: expected vectors of width 8, got 5"):
        memory.compress(HISTORIES, pk.Memories(found.vectors[:, :5], found.rows, found.absorbed))
    same = pk.Memories(found.vectors, found.rows.tolist(), found.absorbed.tolist())
    assert torch.equal(memory.compress(HISTORIES, same).vectors, found.vectors)
    with pytest.raises(ValueError, match=r"vectors: expected shape \(10, D\), as many as rows say, got \(9, 8\)"):
        pk.Memories(found.vectors[:-1], found.rows, found.absorbed)
    with pytest.raises(ValueError, match=r"absorbed: expected one per user \(8\), got 7"):
        pk.Memories(found.vectors, found.rows, found.absorbed[:-1])
    with pytest.raises(ValueError, match="rows: expected a 1-D array of counts"):
        pk.Memories(found.vectors, -found.rows, found.absorbed)
    with pytest.raises(TypeError, match="vectors: expected a tensor of floating-point numbers, got ndarray"):
        pk.Memories(found.vectors.numpy(), found.rows, found.absorbed)
    with pytest.raises(ValueError, match="users: expected at least one"):
        pk.Memories.of([])
    vectors, absorbed = found[0]
    for wrong, got in ((None, "NoneType"), (vectors[0], r"\(8,\)"), (vectors[:, :5], r"\(2, 5\)")):
        with pytest.raises(ValueError, match=rf"users\[1\]: expected vectors of shape \(n, D\), .* got {got}"):
            pk.Memories.of([(vectors, absorbed), (wrong, absorbed)])
    with pytest.raises(ValueError, match="absorbed: expected a 1-D array of counts, got float64"):
        pk.Memories.of([(vectors, 4.5)])
    with pytest.raises(TypeError, match="one_time: expected a bool or None, got str"):
        memory.compress(HISTORIES, one_time="no")
    with pytest.raises(TypeError, match="layout: expected a MemoryBatch or a PatchLayout, got list"):
        memory([])
