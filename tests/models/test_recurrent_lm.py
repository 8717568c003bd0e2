# SPDX-License-Identifier: Apache-2.0
"""Recurrent memories on language models: every target against its prompt alone, searches, files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import memory_model_cases as cases
import numpy as np
import pytest
import torch
from model_cases import CATALOG, PROMPT, VOCABULARY, tiny

import patchkern as pk
from patchkern.models.memories import Memories
from patchkern.search.item_search import item_log_probs
from patchkern.search.prompts import MemoryPrompts
from patchkern.training import target_nll

SLOTS, BLOCK = 2, 4
HISTORIES = pk.Histories.from_sequences(
    [np.random.default_rng(n).integers(0, len(CATALOG), n).tolist() for n in (14, 3, 9, 5)]
)
RANGES = np.array([[0, 13], [1, 2], [5, 8], [4, 4]])
INNER: dict[str, Any] = {
    "text": pk.TextOnly(None),
    "patches and text": pk.ItemPatches(keep_text=2, max_items=None),
    "sessions": pk.SessionPatches(2, max_items=None, align="start"),
}


def make_memory(inner: str, mode: str, kind: str = "llama", item_head: bool = False) -> pk.RecurrentMemory:
    policy = pk.PreferenceMemory(INNER[inner], SLOTS, BLOCK, mode)
    prompt = PROMPT.with_special(experts=[VOCABULARY - 1, VOCABULARY - 2])
    catalog = pk.Catalog.from_token_ids(np.minimum(CATALOG.token_ids, VOCABULARY - 3), CATALOG.offsets)
    model = pk.PatchedCausalLM(tiny(kind).double().eval(), catalog, prompt, policy, item_head=item_head)
    return pk.RecurrentMemory(model)


def single(memory: pk.RecurrentMemory, references: torch.Tensor, user: int, position: int, head: str) -> Any:
    """A target's prompt alone, and its memory: the references of the segments before."""
    layout = pk.build_layout(
        memory.catalog, [HISTORIES[user][:position].tolist()], memory.policy, memory.prompt,
        targets=[int(HISTORIES[user][position])], head=head,
    )  # fmt: skip
    segments = max(position - 1, 0) // BLOCK
    vectors = references[:segments].flatten(0, 1)
    vectors = vectors[-SLOTS:] if memory.policy.mode == "overwrite" else vectors
    return layout, memory.map(vectors)


@pytest.mark.parametrize(
    ("inner", "mode", "head"),
    [("text", "overwrite", "titles"), ("patches and text", "append", "titles"), ("sessions", "overwrite", "both")],
)
def test_every_target_is_read_as_its_prompt_alone(inner: str, mode: str, head: str) -> None:
    memory = make_memory(inner, mode, item_head=head == "both")
    batch = memory.planner.training(HISTORIES, RANGES, head=head)
    got = memory(batch)
    losses, labels = [], 0
    for user, (first, last) in enumerate(RANGES):
        items = HISTORIES.between([user], [0], [last // BLOCK * BLOCK])
        layout, rows = memory.planner_of(pk.PreferenceMemory(INNER[inner], SLOTS, BLOCK, "append")).once(items)
        states = memory.model.row_states(layout)
        references = states[rows]
        for position in range(first, last + 1):
            alone, vectors = single(memory, references, user, position, head)
            count = alone.logit_labels.shape[0]
            titles = memory(alone, vectors=vectors, title_weight=1.0, item_weight=0.0).loss * count
            items_loss = 0.0
            if head == "both":
                items_loss = memory(alone, vectors=vectors, title_weight=0.0, item_weight=1.0).loss
            losses.append((titles, items_loss))
            labels += count
    expected = sum(loss for loss, _ in losses) / labels + sum(loss for _, loss in losses) / len(losses)
    # norms of this model round to float32 on the way
    torch.testing.assert_close(got.next_item, expected, rtol=0, atol=2e-6)
    parameters = [*memory.map.parameters(), memory.hf_model.get_input_embeddings().weight]
    ours, theirs = (torch.autograd.grad(loss, parameters) for loss in (got.next_item, expected))
    for own, other in zip(ours, theirs, strict=True):
        assert own.abs().max() > 0
        torch.testing.assert_close(own, other, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("mode", ["overwrite", "append"])
def test_iterating_is_the_parallel_pass(mode: str) -> None:
    memory = make_memory("patches and text", mode)
    batch = memory.planner.training(HISTORIES.take([0]), [[0, 13]])
    steps = [memory.compress(HISTORIES.between([0], [0], [h * BLOCK + 1])) for h in (1, 2, 3)]
    given = torch.cat([step.vectors for step in steps[:3]]) if mode == "overwrite" else steps[2].vectors
    with torch.no_grad():
        states = memory.model.row_states(batch.stage2, given)
        for h, update in enumerate(memory.map(states[batch.updates]), 1):
            torch.testing.assert_close(update, steps[h].vectors[-SLOTS:], rtol=0, atol=2e-6)


def test_searches_read_the_memories() -> None:
    memory = make_memory("patches and text", "append", item_head=True)
    histories = HISTORIES
    scores = memory.score_items(histories)
    for user, items in enumerate(histories):
        for target in (3, 17):
            vectors = memory.compress(histories.take([user])).vectors
            layout = pk.build_layout(memory.catalog, [items.tolist()], memory.policy, memory.prompt, targets=[target])
            expected = -memory(layout, vectors=vectors).loss.item() * layout.logit_labels.shape[0]
            assert scores[user, target] == pytest.approx(expected, abs=2e-5)
    for search in ("exact", "items"):
        lists = memory.recommend(histories, k=3, search=search, num_beams=5)
        table = scores if search == "exact" else memory.score_items(histories, head="items")
        for user, found in enumerate(lists):
            np.testing.assert_allclose([score for _, score in found], np.sort(table[user])[::-1][:3], atol=2e-5)
    # in chunks that cut a memory in two, and from a cache
    layout = pk.build_layout(memory.catalog, histories, memory.policy, memory.prompt, head="items")
    with memory.searching():
        chunked = item_log_probs(memory, MemoryPrompts(layout, histories, memory.policy), 3)
    np.testing.assert_allclose(chunked.numpy(), memory.score_items(histories, head="items"), atol=2e-5)
    cache = pk.UserCache(memory, 1 << 20)
    for _ in range(2):
        found = memory.recommend(histories, k=3, search="items", user_cache=cache)
        assert [[item for item, _ in user] for user in found] == [[item for item, _ in user] for user in lists]
    users, positions = np.array([0, 0, 2]), np.array([13, 2, 8])
    nll = target_nll(memory, histories, (users, positions))
    before = memory.score_items(histories.before(users, positions))
    np.testing.assert_allclose(nll, -before[np.arange(3), histories.at(users, positions)], atol=2e-5)


@pytest.mark.parametrize("mode", ["overwrite", "append"])
def test_budgets_count_what_is_read(mode: str) -> None:
    memory = make_memory("patches and text", mode, item_head=True)
    counts = pk.row_counts(memory.catalog, HISTORIES, memory.policy, memory.prompt)
    layout = pk.build_layout(memory.catalog, HISTORIES, memory.policy, memory.prompt)
    assert counts.tolist() == layout.cu_seqlens.diff().tolist()
    whole = pk.row_counts(memory.catalog, HISTORIES, INNER["patches and text"], memory.prompt)
    long = HISTORIES.lengths > BLOCK + SLOTS * 3
    assert long.any() and (counts[long] < whole[long]).all()
    rows = pk.memory_row_counts(memory.catalog, HISTORIES, memory.policy, memory.prompt)
    assert rows.read.tolist() == counts.tolist()
    plan = pk.plan_memory(memory, rows, "64MiB")
    assert sum(batch.users.size for batch in plan.batches) == len(HISTORIES)
    free = memory.recommend(HISTORIES, k=3, search="items")
    bound = memory.recommend(HISTORIES, k=3, search="items", memory_budget="64MiB")
    assert [[item for item, _ in user] for user in bound] == [[item for item, _ in user] for user in free]


def test_a_cache_never_mistakes_one_memory_for_another() -> None:
    memory = make_memory("text", "overwrite", item_head=True)
    layout = pk.build_layout(memory.catalog, HISTORIES, memory.policy, memory.prompt, head="items")
    vectors = memory.compress(HISTORIES).vectors
    hashes = [pk.row_hashes(layout, vectors=x) for x in (vectors, vectors.clone(), vectors + 1e-9)]
    assert (hashes[0] == hashes[1]).all()
    changed = np.flatnonzero(hashes[0] != hashes[2])
    assert changed.tolist() == layout.vector_rows.tolist()
    assert len(set(hashes[0][changed].tolist())) == len(changed)
    with pytest.raises(ValueError, match="vectors: expected 6, one per vector row of the layout, got None"):
        pk.row_hashes(layout)


@pytest.mark.parametrize("kind", ["llama tied", "ids"])
def test_files(tmp_path: Path, kind: str) -> None:
    if kind == "ids":
        memory = cases.make_memory(consistency=2.0, rollout=0.25)
    else:
        memory = make_memory("text", "append", kind, item_head=True)
        memory.one_time = True
        with torch.no_grad():
            memory.map.scale.mul_(3.0)
    memory.save_pretrained(tmp_path)
    again = pk.RecurrentMemory.from_pretrained(tmp_path, dtype=torch.float64)
    assert again.options == memory.options and again.policy == memory.policy and again.prompt == memory.prompt
    histories = cases.HISTORIES if kind == "ids" else HISTORIES
    options = {"search": "items", "k": 3}
    assert again.eval().recommend(histories, **options) == memory.recommend(histories, **options)
    gathered = memory.state_dict()
    memory.save_pretrained(tmp_path, state_dict=gathered)
    third = pk.RecurrentMemory.from_pretrained(tmp_path, dtype=torch.float64)
    assert third.eval().recommend(histories, **options) == memory.recommend(histories, **options)
    # what is inside is a model of its own, which has no memory and says so
    inner = type(memory.model).from_pretrained(tmp_path, dtype=torch.float64)
    with pytest.raises(ValueError, match="policy: expected one of the history's items alone"):
        inner.recommend(histories, **options)
    inner.save_pretrained(tmp_path)
    assert not (tmp_path / "memory.safetensors").exists()
    with pytest.raises(ValueError, match=r"folder: expected a RecurrentMemory in .*, got a model without memory"):
        pk.RecurrentMemory.from_pretrained(tmp_path)


def test_states_are_kept_by_whoever_likes() -> None:
    memory = make_memory("text", "append")
    found = memory.compress(HISTORIES)
    kept = {user: (vectors.clone(), absorbed) for user, (vectors, absorbed) in enumerate(found)}
    assert [vectors.shape[0] for vectors, _ in kept.values()] == [6, 0, 4, 2]
    later = memory.compress(HISTORIES, Memories.of(list(kept.values())))
    assert torch.equal(later.vectors, found.vectors)
