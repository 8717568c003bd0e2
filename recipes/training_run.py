# SPDX-License-Identifier: Apache-2.0
"""A training run: its folder, and what is printed of it."""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

import patchkern as pk
from patchkern.ops.backends import describe as describe_backend
from patchkern.training import PatchTrainer, checkpoints
from patchkern.training.only_writer import only_writer
from patchkern.training.passes import PassDataset
from recipes.commands import check_writable

ARGUMENTS = "arguments.json"


def read_arguments(folder: Path) -> dict[str, Any]:
    """The arguments of the run in a folder, or of the run that the folder is a checkpoint of; none where no run was."""
    for path in (folder / ARGUMENTS, folder.parent / ARGUMENTS):
        if path.is_file():
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return found
    return {}


def write_arguments(folder: Path, arguments: dict[str, Any]) -> None:
    """Under a temporary name first, into a folder that no other process trains into."""
    with only_writer(folder):
        unfinished = (folder / ARGUMENTS).with_suffix(".part")
        unfinished.write_text(json.dumps(arguments, indent=2) + "\n", encoding="utf-8")
        unfinished.replace(folder / ARGUMENTS)


def check_output(folder: Path, arguments: dict[str, Any], resume: bool) -> Path | None:
    """The checkpoint to start from; refuses to mix two runs in one folder.

    Args:
        arguments: what the run must share with the one it continues.
    """
    check_writable(folder / ARGUMENTS, "--output_dir")
    found = checkpoints(folder)
    if not found:
        return None
    if not resume:
        raise ValueError(f"--output_dir: expected a folder without checkpoints, or --resume, got {os.fspath(folder)!r}")
    before = read_arguments(folder)
    now = json.loads(json.dumps(arguments))
    changed = [
        f"{key} {before.get(key)!r} -> {now[key]!r}"
        for key in now
        # a flag that the run did not have yet was off
        if (now[key] != before[key] if key in before else bool(now[key]))
    ]
    if changed:
        raise ValueError(f"--resume: expected the arguments of the run so far, got other {'; '.join(changed)}")
    return found[-1]


# ------------------------------------------------------------------ what is printed


def banner(device: torch.device) -> str:
    """Versions, and the backend that pools."""
    return (
        f"patchkern {pk.__version__}, torch {torch.__version__}, transformers {transformers.__version__}\n"
        f"BACKEND {describe_backend(device)}"
    )


def describe(trainer: PatchTrainer, stage: str, settings: str) -> str:
    """Size of the model, of the run, of its steps and of its first batch."""
    arguments, dataset = trainer.args, trainer.train_dataset
    parameters = list(trainer.model.parameters())
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    of_all = (
        "" if all(parameter.requires_grad for parameter in parameters) else f", {trained / 1e6:.1f} M of them trained"
    )
    collate: Any = trainer.data_collator
    batch = collate([dataset[number] for number in range(arguments.train_batch_size)])["layout"]
    steps = f"{dataset.num_targets / arguments.max_steps:,.0f}"
    if isinstance(dataset, PassDataset):
        each = dataset.step_targets()
        steps += (
            f" ({each.min():,} to {each.max():,}) in {dataset.passes_per_step} passes, {dataset.fullness():.0%} full"
        )
    return (
        f"{sum(map(torch.numel, parameters)) / 1e6:.1f} M parameters{of_all}, {dataset.num_targets:,} targets in "
        f"{arguments.max_steps:,} steps of {steps}\n"
        f"settings {settings}, learning rate {arguments.learning_rate:g}, "
        f"bfloat16 {'on' if arguments.bf16 else 'off'}\n"
        f"stage {stage}, {trainer.model.policy}: {batch.num_rows:,} rows, compression ratio "
        f"{batch.compression_ratio:.2f} in the first batch"
    )


def peak_memory() -> int:
    """Bytes: of the GPU, or of the process where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
