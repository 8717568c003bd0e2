# SPDX-License-Identifier: Apache-2.0
"""What a run decides before its first step: the precision that is faster, and the passes that fit into memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

import patchkern as pk
from patchkern.batch.memory_layout import MemoryBatch
from patchkern.budget.counted_memory import MemoryRows
from patchkern.budget.search import parse_bytes
from patchkern.budget.training import TrainingTooLarge
from patchkern.data import Interactions, samples_of
from patchkern.training.collators import MemoryCollator, PassCollator
from patchkern.training.passes import Pass, PassDataset
from patchkern.training.precision import measure_autocast, product_ratio
from patchkern.training.protocol import TrainableModel

CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in TrainingArguments.__dataclass_fields__
)
"""The flag's name, which transformers 5.23 has changed."""

_PROBE_ROWS = 256
_TRIED_PASSES = 4
_HOPELESS = 2.0  # products that take so many times as long make no pass faster


def choose_bf16(
    model: TrainableModel,
    data: Interactions,
    arguments: TrainingArguments,
    collator: PassCollator | MemoryCollator,
) -> bool:
    """Whether autocast is faster on this CPU: measured by the first process, for all."""
    chosen = [False]
    ratio = product_ratio(model.device) if arguments.process_index == 0 else 0.0
    if ratio > _HOPELESS:
        print(f"bfloat16 products take {ratio:.1f} times as long as float32's here: bfloat16 off", flush=True)
    elif arguments.process_index == 0:
        users, positions = samples_of(data, "train")
        spread = np.linspace(0, users.size - 1, 2 + _PROBE_ROWS).astype(int)[1:-1]
        users, ranges = users[spread], np.stack([positions[spread]] * 2, axis=1)
        count = max(1, int(np.searchsorted(np.cumsum(collator.rows(users, ranges)), _PROBE_ROWS)))
        speed = measure_autocast(model, collator([Pass(0, 0, users[:count], ranges[:count])])["layout"])
        chosen = [speed.bfloat16_pays]
        decided = "on" if speed.bfloat16_pays else "off"
        print(f"{speed}: bfloat16 {decided} (--bf16 true or false decides without measuring)", flush=True)
    if arguments.world_size > 1:
        broadcast_object_list(chosen)
    return chosen[0]


@dataclass(frozen=True)
class Place:
    """Where a run is, as of `patchkern.plan_training`."""

    device: str
    autocast: torch.dtype | None
    world_size: int
    sharded: bool

    @classmethod
    def of(cls, arguments: TrainingArguments) -> Place:
        """Where it is when it starts."""
        autocast = torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else None
        return cls(arguments.device.type, autocast, arguments.world_size, bool(arguments.fsdp))


class DoesNotFit(ValueError):
    """No pass fits the memory that there is."""


def plan_passes(
    budget: str | None,
    rows_per_pass: int,
    model: TrainableModel,
    data: Interactions,
    arguments: TrainingArguments,
    collator: PassCollator | MemoryCollator,
    accumulates: bool,
    place: Place,
) -> pk.TrainingPlan:
    """The most rows a pass, up to ``rows_per_pass``, with which training needs no more than the budget.

    Recomputed activations are the only other thing that it changes.

    Args:
        budget: such as "40GiB"; None: no limit.
        arguments: of the run, with its optimiser and precision.
        collator: makes the run's passes.
        accumulates: whether a step has several of them.

    Raises:
        DoesNotFit: no such pass does; the message says what would help.
        ValueError: naming the argument that cannot be planned.
    """
    limit = None if budget is None else parse_bytes("--memory_budget", budget)
    while True:
        try:
            plan = pk.plan_training(
                model,
                rows_per_pass,
                limit,
                optimizer=OptimizerNames(arguments.optim).value,
                checkpointing=getattr(arguments, CHECKPOINTING),
                accumulates=accumulates,
                label_smoothing=arguments.label_smoothing_factor,
                head=collator.head,
                **_of_passes(rows_per_pass, data, collator),
                **vars(place),
            )
        except TrainingTooLarge as error:
            raise DoesNotFit(f"--memory_budget: {error}") from error
        if plan.choice._replace(checkpointing=False) != plan.asked[1]._replace(checkpointing=False):
            raise DoesNotFit(f"--memory_budget: expected {budget} to be enough with what was asked for, got\n{plan}")
        if plan.rows_per_pass == rows_per_pass:
            return plan
        rows_per_pass = plan.rows_per_pass  # whose passes may have other shares of logits, and longer prefixes


def _of_passes(rows_per_pass: int, data: Interactions, collator: PassCollator | MemoryCollator) -> dict[str, Any]:
    """Rows with logits, rows that predict an item, rows of the longest user and of a memory, in passes of so many."""
    dataset = PassDataset(
        *samples_of(data, "train"), collator.rows, rows_per_pass, 1.0, _TRIED_PASSES, 1, collator.seed
    )
    if isinstance(collator, PassCollator) and collator.pretrain_steps is not None:
        collator = replace(collator, pretrain_steps=dataset.steps)
    batches = [collator([dataset[number]])["layout"] for number in range(len(dataset))]
    labelled = [batch.stage2 if isinstance(batch, MemoryBatch) else batch for batch in batches]
    sizes = [rows_per_pass / batch.num_rows for batch in batches]

    def most(name: str) -> int | None:
        if getattr(labelled[0], name) is None:
            return None
        return round(max(len(getattr(layout, name)) * size for layout, size in zip(labelled, sizes, strict=True)))

    memories = [
        MemoryRows.of(batch).times(size)
        for batch, size in zip(batches, sizes, strict=True)
        if isinstance(batch, MemoryBatch)
    ]
    first = [batch.stage1 for batch in batches if isinstance(batch, MemoryBatch)]
    longest = max(layout.max_seqlen + layout.max_prefix for layout in (*labelled, *first))
    return {
        "logit_rows": most("logit_rows"),
        "item_rows": most("item_rows"),
        "longest": min(longest, rows_per_pass),
        "memory": _largest(memories) if memories else None,
    }


def _largest(memories: list[MemoryRows]) -> MemoryRows:
    """Of any pass the most rows of each kind; of stage 1 the fewest, as the others are of the pass that is dearer."""
    most = MemoryRows(*map(max, zip(*memories, strict=True)))
    return most._replace(reference=min(rows.reference for rows in memories))
