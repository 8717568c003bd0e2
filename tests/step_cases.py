# SPDX-License-Identifier: Apache-2.0
"""Training steps whose memory counts: what they take at most, and what was predicted."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from cases import make_catalog, make_titles
from memory_cases import PROMPT, hf_model, users
from peft import LoraConfig, get_peft_model

import patchkern as pk
from patchkern.budget.live_bytes import peak_memory


class Step(NamedTuple):
    """How to train, and on what: ``users`` with 20 items each and the last ``targets`` of them as targets."""

    family: str = "llama"
    dtype: torch.dtype = torch.float32
    autocast: bool = False
    lora: bool = False
    checkpointing: bool = False
    users: int = 4
    targets: int = 4
    items: int = 20
    branches: bool = True
    """all targets of a user in one pass, else a sample for each"""
    accumulates: bool = False
    smoothing: float = 0.0
    optimizer: str = "adamw"
    item_embeddings: bool = False
    vector_dropout: float = 0.0
    head: Any = "titles"
    n_items: int = 60


def layout_of(step: Step, model: pk.PatchedCausalLM) -> pk.PatchLayout:
    histories = users(*[step.items] * step.users, n_items=step.n_items)
    policy = pk.TextOnly(None) if step.head == "titles" else pk.ItemPatches(0, None)
    if step.branches:
        ranges = [(step.items - step.targets, step.items - 1)] * step.users
        layout = pk.build_training_layout(model.catalog, histories, policy, model.prompt, ranges, head=step.head)
    else:
        layout = pk.build_layout(
            model.catalog,
            [history[:-1] for history in histories],
            policy,
            model.prompt,
            [history[-1] for history in histories],
        )
    return layout.with_identities() if step.item_embeddings else layout


def model_of(step: Step) -> pk.PatchedCausalLM:
    inner = copy.deepcopy(hf_model(step.family, step.dtype))
    if step.lora:
        inner = get_peft_model(inner, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    catalog, head = make_catalog(make_titles(step.n_items)), step.head != "titles"
    own = {"item_embeddings": step.item_embeddings, "vector_dropout": step.vector_dropout}
    model = pk.PatchedCausalLM(inner, catalog, PROMPT, **own, item_head=head).train()
    if step.checkpointing:
        model.activation_checkpointing_enable()
    return model


def measured_step(step: Step, model: pk.PatchedCausalLM, layout: pk.PatchLayout) -> int:
    """Bytes that a step takes at most, weights and optimiser included; one before it made the optimiser's state."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if step.optimizer == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(trained)
    else:
        optimizer = torch.optim.AdamW(trained, fused=step.optimizer == "adamw")
    for _ in range(2):
        weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
        state = sum(tensor.nbytes for values in optimizer.state.values() for tensor in values.values())
        with peak_memory("cpu") as peak:
            for _ in range(1 + step.accumulates):
                with torch.autocast("cpu", torch.bfloat16, enabled=step.autocast):
                    loss = model(layout, smoothing=step.smoothing).loss
                loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            del loss
    return weights + state + peak.bytes


def planned_step(step: Step, model: pk.PatchedCausalLM, layout: pk.PatchLayout, **options: Any) -> pk.TrainingPlan:
    logit_rows = 0 if layout.logit_labels is None else len(layout.logit_labels)
    return pk.plan_training(
        model,
        layout.num_rows,
        autocast=torch.bfloat16 if step.autocast else None,
        checkpointing=step.checkpointing,
        accumulates=step.accumulates,
        label_smoothing=step.smoothing,
        head=step.head,
        logit_rows=logit_rows or None,
        item_rows=None if layout.item_labels is None else len(layout.item_labels),
        prefixes=layout.prefix is not None,
        longest=layout.max_seqlen + layout.max_prefix,
        optimizer=step.optimizer,
        **options,
    )
