# SPDX-License-Identifier: Apache-2.0
"""Steps that learn a compressed past: what is predicted of a memory's two passes, and of experts, against measured."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import pytest
import torch
from cases import make_catalog, make_titles
from memory_cases import PROMPT, hf_model, users
from peft import LoraConfig, get_peft_model
from step_cases import Step, measured_step

import patchkern as pk
from patchkern.batch.memory_layout import MemoryBatch
from patchkern.budget.counted_memory import MemoryRows

TOKENS = range(4000, 4004)


class Memory(NamedTuple):
    """How to train a memory, and on what: ``users`` with ``items`` each, of which all but three are targets."""

    kind: str = "llama"
    head: str = "items"
    block: int = 10
    mode: str = "overwrite"
    users: int = 8
    items: int = 40
    n_items: int = 60
    lora: bool = False
    item_embeddings: bool = False
    reference_loss: float = 0.0
    step: Step = Step()


def model_of(case: Memory, policy: Any) -> Any:
    catalog = make_catalog(make_titles(case.n_items))
    if case.kind in ("sasrec", "hstu"):
        model: Any = pk.ItemModel(catalog, policy, block=case.kind, width=64, layers=3, heads=4, max_positions=200)
        pk.add_experts(model, len(TOKENS))
        return model
    inner = copy.deepcopy(hf_model(case.kind, torch.float32))
    if case.lora:
        rest: dict[str, Any] = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
        inner = get_peft_model(inner, LoraConfig(r=8, trainable_token_indices=[*TOKENS], **rest))
    own = {"item_embeddings": case.item_embeddings, "item_head": case.head != "titles"}
    return pk.PatchedCausalLM(inner, catalog, PROMPT.with_special(experts=TOKENS), policy, **own)


def memory_of(case: Memory) -> pk.RecurrentMemory:
    inner: Any = pk.TextOnly(None) if case.head == "titles" else pk.ItemPatches(0, None)
    policy = pk.PreferenceMemory(inner, len(TOKENS), case.block, case.mode)
    memory = pk.RecurrentMemory(model_of(case, policy), reference_loss=case.reference_loss).train()
    if case.step.checkpointing:
        memory.activation_checkpointing_enable()
    return memory


def batch_of(case: Memory, memory: pk.RecurrentMemory) -> MemoryBatch:
    histories = pk.Histories.coerce(users(*[case.items] * case.users, n_items=case.n_items))
    ranges = [[3, case.items - 1]] * case.users
    batch = memory.planner.training(histories, ranges, head=case.head, reference=case.reference_loss > 0)
    return batch.planned(identities=case.item_embeddings)


def planned(case: Memory, memory: pk.RecurrentMemory, batch: MemoryBatch, **options: Any) -> pk.TrainingPlan:
    labelled = batch.stage2
    return pk.plan_training(
        memory,
        batch.num_rows,
        autocast=torch.bfloat16 if case.step.autocast else None,
        checkpointing=case.step.checkpointing,
        accumulates=case.step.accumulates,
        label_smoothing=case.step.smoothing,
        head=case.head,
        logit_rows=None if labelled.logit_labels is None else len(labelled.logit_labels),
        item_rows=None if labelled.item_labels is None else len(labelled.item_labels),
        memory=MemoryRows.of(batch),
        longest=max(stage.max_seqlen + stage.max_prefix for stage in (batch.stage1, labelled)),
        **options,
    )


def check(case: Memory) -> None:
    memory = memory_of(case)
    batch = batch_of(case, memory)
    found = measured_step(case.step, memory, batch)  # type: ignore[arg-type]
    assert found <= planned(case, memory, batch).peak <= 1.1 * found


@pytest.mark.parametrize(
    "case",
    [
        Memory(head="titles", users=2),
        Memory("qwen3", lora=True, step=Step(autocast=True, checkpointing=True)),
        Memory(head="both", users=3, item_embeddings=True, reference_loss=0.5),
        Memory("sasrec", mode="append", block=4, step=Step(autocast=True, accumulates=True)),
        Memory("sasrec", block=100),
        Memory(mode="append", users=2, items=60, lora=True, step=Step(checkpointing=True)),
        Memory(mode="append", users=2, items=60, step=Step(checkpointing=True)),
    ],
    ids=["titles", "an adapter", "both, and references", "item ids", "no past", "titles' integers", "sums in place"],
)
def test_the_prediction_is_close_and_never_low(case: Memory) -> None:
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("size", [(2, 60, 10), (12, 40, 4), (4, 160, 50)], ids=["2 of 60", "12 of 40", "4 of 160"])
@pytest.mark.parametrize("head", ["titles", "items", "both"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
def test_a_grid(autocast: bool, checkpointing: bool, lora: bool, head: str, size: tuple[int, int, int]) -> None:
    n_users, items, block = size
    step = Step(autocast=autocast, checkpointing=checkpointing)
    mode = "append" if items == 60 else "overwrite"
    check(Memory("llama", head, block, mode, n_users, items, lora=lora, step=step))


@pytest.mark.slow
@pytest.mark.parametrize("size", [(12, 60, 10), (20, 40, 4), (8, 160, 50)], ids=["12 of 60", "20 of 40", "8 of 160"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["sasrec", "hstu"])
def test_a_grid_of_item_ids(kind: str, autocast: bool, checkpointing: bool, size: tuple[int, int, int]) -> None:
    n_users, items, block = size
    step = Step(autocast=autocast, checkpointing=checkpointing)
    check(Memory(kind, block=block, mode="append", users=n_users, items=items, step=step))


def test_a_budget_is_kept() -> None:
    case = Memory("sasrec", users=12)
    memory = memory_of(case)
    batch = batch_of(case, memory)
    whole = planned(case, memory, batch)
    fixed = whole.needed.weights + whole.needed.optimizer + whole.needed.gradients
    budget = fixed + (whole.peak - fixed) * 6 // 10
    plan = planned(case, memory, batch, budget=budget, least_rows=batch.num_rows // 4)
    assert not plan.choice.checkpointing and plan.peak <= budget
    fewer = case._replace(users=case.users * plan.rows_per_pass // batch.num_rows)
    assert 4 <= fewer.users <= 8
    assert measured_step(case.step, memory, batch_of(fewer, memory)) <= budget  # type: ignore[arg-type]


@pytest.mark.parametrize(("kind", "parts"), [("llama", "one"), ("sasrec", "blocks")])
def test_experts_are_trained_in_what_is_predicted(kind: str, parts: str) -> None:
    keep = 6 if parts == "one" else None
    policy = pk.Experts(pk.ItemPatches(0, None), count=len(TOKENS), keep=keep, block=10, parts=parts, boundaries=None)
    model = model_of(Memory(kind), policy).train()
    histories = users(*[40] * 8)
    layout = pk.build_training_layout(model.catalog, histories, policy, model.prompt, [[3, 39]] * 8, head="items")
    found = measured_step(Step(), model, layout)
    plan = pk.plan_training(
        model,
        layout.num_rows,
        head="items",
        item_rows=len(layout.item_labels),
        longest=layout.max_seqlen + layout.max_prefix,
    )
    assert found <= plan.peak <= 1.1 * found


def test_wrong_arguments() -> None:
    memory = memory_of(Memory("sasrec"))
    with pytest.raises(ValueError, match=r"memory: expected the rows of each kind .*MemoryRows.of.*, got None"):
        pk.plan_training(memory, 100, head="items")
    with pytest.raises(TypeError, match="memory: expected MemoryRows or None, got tuple"):
        pk.plan_training(memory, 100, head="items", memory=(1, 0, 0, 0, 0))
    for rows, message in (
        (MemoryRows(100, 0, 4, 4, 4), "memory: expected fewer reference rows than rows_per_pass, 100, got 100"),
        (MemoryRows(50, 0, -4, 4, 4), "memory.queries: expected an integer in 0"),
    ):
        with pytest.raises(ValueError, match=message):
            pk.plan_training(memory, 100, head="items", memory=rows)
