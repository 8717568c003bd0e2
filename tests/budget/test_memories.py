# SPDX-License-Identifier: Apache-2.0
"""What users behind a recurrent memory take: the passes that absorb items first, then the prompts that are read."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import memory_cases
import numpy as np
import pytest
import torch
from cases import make_catalog, make_titles

import patchkern as pk
from patchkern.batch.memory_layout import MemoryPlanner
from patchkern.budget.live_bytes import peak_memory
from patchkern.budget.search import SearchCost, UserTooLarge
from patchkern.ops.span_attention_native import forward_scratch
from patchkern.search.item_search import size_of_items

N_ITEMS, SLOTS, BLOCK = 300, 4, 20
ITEMS = pk.ItemPatches(keep_text=0, max_items=None)
RECENT = pk.ItemPatches(keep_text=5, max_items=None)

LENGTHS = {"alone": (430,), "mixed": (130, 60, 300, 10), "alike": (90,) * 16}
AXES = ["sasrec", "hstu", "llama", "gpt2"], [torch.float32, torch.bfloat16], ["overwrite", "append"], [False, True]
QUICK = {0, 2, 22, 29, 30, 37, 49, 51, 68, 73, 74, 93}  # in which every two values of two axes meet


def case(place: int, values: tuple[Any, ...]) -> Any:
    marks = () if place in QUICK else pytest.mark.slow
    name = "-".join(str(value).removeprefix("torch.") for value in values)
    return pytest.param(*values[:-1], LENGTHS[values[-1]], id=name, marks=marks)


GRID = [case(place, values) for place, values in enumerate(itertools.product(*AXES, LENGTHS))]


def of_ids(
    block: str, mode: str, one_time: bool = False, dtype: torch.dtype = torch.float32, **shape: Any
) -> pk.RecurrentMemory:
    catalog = pk.Catalog.from_token_ids(range(N_ITEMS), range(N_ITEMS + 1))
    prompt = pk.Prompt(prefix=[N_ITEMS]).with_special(experts=range(N_ITEMS + 1, N_ITEMS + 1 + SLOTS))
    policy = pk.PreferenceMemory(ITEMS, SLOTS, BLOCK, mode)
    model = pk.ItemModel(catalog, policy, block=block, prompt=prompt, max_positions=1000, **shape)
    return pk.RecurrentMemory(model.to(dtype).eval(), one_time=one_time)


def of_text(
    family: str, mode: str, one_time: bool = False, dtype: torch.dtype = torch.float32, policy: Any = RECENT
) -> pk.RecurrentMemory:
    prompt = memory_cases.PROMPT.with_special(experts=range(4000, 4000 + SLOTS))
    titles = make_catalog(make_titles(60))
    memory = pk.PreferenceMemory(policy, SLOTS, BLOCK, mode)
    hf_model = copy.deepcopy(memory_cases.hf_model(family, dtype))
    model = pk.PatchedCausalLM(hf_model, titles, prompt, memory, item_head=True).to(dtype).eval()
    return pk.RecurrentMemory(model, one_time=one_time)


def users(model: pk.RecurrentMemory, *lengths: int) -> list[list[Any]]:
    if isinstance(model.model, pk.ItemModel):
        return [np.random.default_rng(i).integers(0, N_ITEMS, n).tolist() for i, n in enumerate(lengths)]
    return memory_cases.users(*lengths)


def rows_of(model: pk.RecurrentMemory, histories: Any, head: str = "items") -> Any:
    return pk.memory_row_counts(model.catalog, histories, model.policy, model.prompt, head, one_time=model.one_time)


def unseen(model: pk.RecurrentMemory) -> int:
    """Bytes that are planned for the kernels and that torch knows nothing of."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    group = heads // (getattr(config, "num_key_value_heads", None) or heads)
    return torch.get_num_threads() * forward_scratch(group, config.hidden_size // heads, 4)


# ------------------------------------------------------------------ predicted and measured


@pytest.mark.parametrize(("kind", "dtype", "mode", "one_time", "lengths"), GRID)
def test_the_prediction_is_close_and_never_low(
    kind: str, dtype: torch.dtype, mode: str, one_time: bool, lengths: tuple[int, ...]
) -> None:
    model = (of_ids if kind in ("sasrec", "hstu") else of_text)(kind, mode, one_time, dtype)
    histories = users(model, *lengths)
    for search in model.learns if kind == "llama" else ["items"]:
        rows = rows_of(model, histories, search)
        plan = pk.plan_memory(model, rows, None, num_beams=4) if search == "titles" else planned_items(model, rows)
        options = {"search": "beam" if search == "titles" else "items"}
        found = memory_cases.measured(model, histories, None, 4, **options)
        assert found <= plan.peak <= 1.15 * found + unseen(model)


def planned_items(model: pk.RecurrentMemory, rows: Any) -> Any:
    return SearchCost(model, size_of_items(model, None, None)).plan(rows, None)


@pytest.mark.parametrize("one_time", [False, True], ids=["by segment", "one time"])
@pytest.mark.parametrize("policy", [pk.TextOnly(None), RECENT, pk.SessionPatches(5, None, align="start")])
@pytest.mark.parametrize("mode", ["overwrite", "append"])
def test_rows_are_those_of_the_passes(mode: str, policy: Any, one_time: bool) -> None:
    model = of_text("llama", mode, one_time, policy=policy)
    histories = pk.Histories.coerce(users(model, 65, 3, 21, 20, 0, 120))
    rows, planner = rows_of(model, histories, "titles"), MemoryPlanner(model.catalog, model.policy, model.prompt)
    assert rows.read.tolist() == pk.row_counts(model.catalog, histories, model.policy, model.prompt).tolist()
    for user, length in enumerate(histories.lengths.tolist()):
        absorbed = max(length - 1, 0) // BLOCK * BLOCK
        passes = [0]
        if one_time and absorbed:
            passes.append(planner.once(histories.between([user], [0], [absorbed])).layout.num_rows)
        for begin in range(0, 0 if one_time else absorbed, BLOCK):
            segment = histories.between([user], [begin], [begin + BLOCK])
            passes.append(planner.update(segment, np.array([begin])).layout.num_rows)
        assert rows.absorbed[user] == max(passes)
        layout = pk.build_layout(model.catalog, histories.take([user]), model.policy, model.prompt)
        assert rows.vectors[user] == layout.vector_rows.shape[0]
    assert rows_of(model, histories, "items").read.tolist() == (rows.read - 2).tolist()


# ------------------------------------------------------------------ budgets


@pytest.mark.parametrize("one_time", [False, True], ids=["by segment", "one time"])
@pytest.mark.parametrize("mode", ["overwrite", "append"])
def test_a_budget_is_kept(mode: str, one_time: bool) -> None:
    model = of_text("llama", mode, one_time)
    histories = users(model, *[90] * 6, 50, 7)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    alone = max(planned_items(model, rows_of(model, [history])).peak for history in histories)
    options = {"k": 3, "search": "items"}
    expected, memories = model.recommend(histories, **options), model.compress(histories)
    for budget in (alone, 3 * alone - 2 * weights):
        with peak_memory("cpu") as peak:
            lists = model.recommend(histories, memory_budget=budget, **options)
        assert weights + peak.bytes <= budget
        assert [[item for item, _ in user] for user in lists] == [[item for item, _ in user] for user in expected]
        budget += 2 * memories.vectors.nbytes  # which are all made here before any is read
        with peak_memory("cpu") as peak:
            bound = model.compress(histories, memory_budget=budget)
        assert weights + peak.bytes <= budget
        torch.testing.assert_close(bound.vectors, memories.vectors, rtol=0, atol=2e-5)
    if not one_time:
        message = r"beams of user \d+, whose prompt has \d+ rows, .*; behind a memory of smaller segments"
        with pytest.raises(UserTooLarge, match=message):
            model.recommend(histories, memory_budget=alone - 1, **options)


def test_who_cannot_be_absorbed_is_told_what_would_help() -> None:
    model = of_ids("sasrec", "overwrite", one_time=True)
    histories = users(model, 10, 900)
    rows = rows_of(model, histories)
    assert rows.absorbed.tolist() == [0, 885]
    model.one_time = False
    by_segment = planned_items(model, rows_of(model, histories)).peak
    model.one_time = True
    message = (
        r"memory_budget: expected at least \d+ bytes for the memory of user {}, which reads all old items at once "
        r"\(one_time\) in 885 rows, got \d+, enough for \d+ rows; one_time=False takes them segment by segment"
    )
    with pytest.raises(UserTooLarge, match=message.format(1)) as caught:
        pk.plan_memory(model, rows, by_segment)
    assert caught.value.user == 1 and caught.value.absorbing
    # what it says is so, to the byte and to the row
    for budget in (caught.value.needed, caught.value.needed - 1):
        kept = rows._replace(absorbed=np.array([0, caught.value.max_rows]))
        assert pk.plan_memory(model, kept, by_segment).peak <= by_segment
        if budget < caught.value.needed:
            with pytest.raises(UserTooLarge):
                pk.plan_memory(model, rows, budget)
        else:
            assert pk.plan_memory(model, rows, budget).peak == budget
    for asked in (
        lambda: model.recommend(histories, k=3, memory_budget=by_segment, user_ids=["ada", "bob"]),
        lambda: model.compress(histories, memory_budget=by_segment),
    ):
        with pytest.raises(UserTooLarge, match=message.format("(1|'bob')")):
            asked()
    model.one_time = False
    model.recommend(histories, k=3, memory_budget=by_segment)
    model.compress(histories, memory_budget=by_segment)
    with pytest.raises(
        UserTooLarge, match=r"a segment of items in 29 rows, .*; a memory of smaller segments \(block\)"
    ):
        model.compress(histories, memory_budget=planned_items(model, rows).needed.weights + 1000)


def test_nothing_is_absorbed_of_who_is_kept() -> None:
    model = of_ids("sasrec", "append", one_time=True)
    rows = rows_of(model, users(model, 430, 60))
    kept = rows._replace(absorbed=0 * rows.absorbed)
    needed = [pk.plan_memory(model, counts, None).needed for counts in (rows, kept)]
    assert needed[0].absorbing > needed[1].absorbing == 0
    assert needed[0].store == needed[1].store and needed[0].peak > needed[1].peak
    histories = users(model, 430, 60)
    assert model.compress(histories, model.compress(histories), one_time=False, memory_budget=needed[1].peak)


def test_refused() -> None:
    model = of_ids("sasrec", "overwrite")
    rows = rows_of(model, users(model, 50, 60))
    with pytest.raises(ValueError, match="row_counts: expected those of memory_row_counts for RecurrentMemory, which"):
        pk.plan_memory(model, rows.read, None)
    with pytest.raises(ValueError, match="compressed: expected None with the rows of a memory"):
        pk.plan_memory(model, rows, None, compressed=rows.absorbed)
    with pytest.raises(ValueError, match="row_counts: expected as many of each kind, got 2, 1, 2"):
        pk.plan_memory(model, rows._replace(absorbed=rows.absorbed[:1]), None)
    with pytest.raises(ValueError, match=r"row_counts.vectors: expected a 1-D array of integers"):
        pk.plan_memory(model, rows._replace(vectors=rows.vectors / 2), None)
    with pytest.raises(TypeError, match="policy: expected a PreferenceMemory, got ItemPatches"):
        pk.memory_row_counts(model.catalog, [[1, 2]], ITEMS, model.prompt)
    with pytest.raises(ValueError, match="memory_budget: expected bytes, such as"):
        model.compress([[1, 2]], memory_budget="much")
