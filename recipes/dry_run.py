# SPDX-License-Identifier: Apache-2.0
"""What a run of recipes/train.py would be in so many processes: its steps, and the bytes that each process holds."""

from __future__ import annotations

import argparse

import torch
from transformers import TrainingArguments

from patchkern.data import Interactions, samples_of
from patchkern.training.collators import MemoryCollator, PassCollator
from patchkern.training.passes import PassDataset
from patchkern.training.protocol import TrainableModel
from recipes.training_choices import DoesNotFit, Place, plan_passes

WAYS = {False: "data parallel: every process has the whole model", True: "fully sharded, --fsdp: they share it"}


def dry_run(
    args: argparse.Namespace,
    model: TrainableModel,
    data: Interactions,
    arguments: TrainingArguments,
    collator: PassCollator | MemoryCollator,
    accumulates: bool,
) -> str:
    """The plan by data parallelism and, with several processes, by FSDP2.

    Args:
        args: the recipe's flags, ``dry_run`` and ``processes`` among them.
        arguments: of the run, with its optimiser and precision.
        collator: makes the run's passes.
        accumulates: whether a process computes several in a step.
    """
    processes = args.processes or arguments.world_size
    on_gpus = args.dry_run == "cuda"
    bf16 = on_gpus and not arguments.fp16 if args.bf16 is None else args.bf16
    autocast = torch.bfloat16 if bf16 else torch.float16 if arguments.fp16 else None
    what = f"{processes} process{'es' if processes > 1 else ''} on {'a GPU each' if on_gpus else 'CPUs'}"
    lines = [f"dry run: {what}, autocast {str(autocast).removeprefix('torch.')}; nothing is trained or written"]
    for sharded in (False, True) if processes > 1 else (False,):
        if processes > 1:
            lines.append(f"\n{WAYS[sharded]}")
        place = Place(args.dry_run, autocast, processes, sharded)
        try:
            plan = plan_passes(
                args.memory_budget, args.rows_per_pass, model, data, arguments, collator, accumulates, place
            )
        except DoesNotFit as error:
            lines.append(f"does not fit: {error}")
        else:
            lines += [str(plan), _steps(args, data, arguments, collator, plan.rows_per_pass, processes)]
    return "\n".join(lines)


def _steps(
    args: argparse.Namespace,
    data: Interactions,
    arguments: TrainingArguments,
    collator: PassCollator | MemoryCollator,
    rows_per_pass: int,
    processes: int,
) -> str:
    """Made as `patchkern.training.PatchTrainer` makes them."""
    passes = (1 if args.targets_per_step else arguments.gradient_accumulation_steps) * processes
    steps = arguments.max_steps if arguments.max_steps > 0 else None
    dataset = PassDataset(
        *samples_of(data, "train"),
        collator.rows,
        rows_per_pass,
        arguments.num_train_epochs,
        steps,
        passes,
        collator.seed,
        args.targets_per_step,
    )
    each = dataset.step_targets()
    return (
        f"  {dataset.num_targets:,} targets in {dataset.steps:,} steps of {each.mean():,.0f} ({each.min():,} to "
        f"{each.max():,}): {dataset.passes_per_step} passes a step, {dataset.passes_per_step // processes} by each "
        f"process, {dataset.fullness():.0%} full"
    )
