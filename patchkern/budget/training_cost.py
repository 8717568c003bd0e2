# SPDX-License-Identifier: Apache-2.0
"""How much memory a training step needs.

The peak of a step that computes T rows, K of them with logits::

    peak = weights + optimizer + gathered + workspace + max(pass, gradients + temporaries)

- ``weights``, ``gradients``, ``optimizer``: of the parameters; under LoRA adapters alone have the latter two.
- ``pass``: activations, what attention keeps, logits, and the gradients that are there by then, at the worst moment of
  the forward and the backward pass. It is counted, in steps of the very model on fake tensors
  (`patchkern.budget.counted_step`): autocast's copies of the weights, recomputed layers, dropout's masks and adapters
  are in it as they are, whatever the architecture. A hundredth is added for what operators take while they run.
  A step of a recurrent memory is two of these passes with vectors between them, and keeps both until the second is
  differentiated (`patchkern.budget.counted_memory`).
- ``gathered``: layers and gradients on their way between processes: an upper bound, not counted.
- ``workspace``: that hundredth, what cuBLAS has on CUDA, and the temporaries of the optimiser's own step.

All of it is what `torch` allocates (``torch.cuda.max_memory_allocated``). What a CUDA context takes, about half a
gibibyte, and what the allocator loses to fragmentation come on top: plan with nine tenths of a card. Not covered is
attention dropout.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import nn

from patchkern.budget.counted_items import Chunks
from patchkern.budget.counted_step import FakeModel
from patchkern.budget.step import Lora, PassShape, StepBytes, StepKind

_CUBLAS_WORKSPACE = 64 << 20  # of cuBLAS and of cuBLASLt on Hopper, from the memory that PyTorch counts; less before
_MARGIN = 0.01
_EIGHT_BIT_BLOCK = 256  # numbers that share a factor of four bytes
_EIGHT_BIT_LEAST = 4096  # numbers of a parameter, below which its state stays in float32
_ROUND = 64  # rows per pass are planned in steps of so many

OPTIMIZERS = {
    "adamw": "fused",
    "adamw_torch_fused": "fused",
    "adamw_torch": "unfused",
    "adamw_8bit": "8bit",
    "adamw_bnb_8bit": "8bit",
    "sgd": "none",
}
"""Names that `plan_training` takes, those of `transformers.TrainingArguments.optim` among them."""


@dataclass(frozen=True)
class TrainingBytes:
    """Predicted bytes at the worst moment of a step, see this module."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    attention: int
    logits: int
    gathered: int
    workspace: int

    @property
    def peak(self) -> int:
        """The most that is allocated at once."""
        return sum(vars(self).values())


class Choice(NamedTuple):
    """How to train."""

    checkpointing: bool
    optimizer: str
    lora: Lora | None

    def __str__(self) -> str:
        adapted = "all parameters" if self.lora is None else f"LoRA of rank {self.lora.rank}"
        recomputed = ", activation checkpointing" if self.checkpointing else ""
        return f"{adapted}, {self.optimizer}{recomputed}"


class TrainingCost:
    """The formula of this module, for one model and ``shape``; other arguments as of `plan_training`."""

    def __init__(
        self,
        model: Any,
        shape: PassShape,
        *,
        dtype: torch.dtype | None = None,
        autocast: torch.dtype | None = None,
        accumulates: bool = False,
        smoothing: bool = False,
        n_items: int | None = None,
        prefixes: bool = True,
        world_size: int = 1,
        sharded: bool = False,
        on_cuda: bool = False,
    ) -> None:
        memory = shape.memory
        self._fake = lru_cache(maxsize=None)(lambda lora: FakeModel(model, dtype, lora, n_items, memory is not None))
        item_rows = max(shape.item_rows, memory.reference_items if memory is not None else 0)
        self._shape, self._world_size = shape, world_size
        self._kind = StepKind(
            autocast,
            accumulates=accumulates,
            sharded=sharded,
            smoothing=smoothing,
            on_cuda=on_cuda,
            prefixes=prefixes,
            chunks=Chunks.of(item_rows, n_items, on_cuda) if item_rows and n_items else None,
        )
        self._counted: dict[tuple[Lora | None, StepKind], StepBytes] = {}

    def needed(self, rows: int, choice: Choice) -> TrainingBytes:
        """Of a step of so many rows, logits and the longest prefix in proportion."""
        held = self._step(choice, rows).peak(rows)
        fake = self._fake(choice.lora)
        trainable = [parameter for parameter in fake.parameters() if parameter.requires_grad]
        gradients = sum(parameter.nbytes for parameter in trainable)
        state = self._state(fake, choice.optimizer)
        weights, gathered = fake.weights, 0
        if self._kind.sharded:
            gathered = self._gathered(fake)
            weights, state, gradients = (-(-x // self._world_size) for x in (weights, state, gradients))
            held = held._replace(gradients=gradients)
        elif self._world_size > 1:
            gathered = gradients
        workspace = _CUBLAS_WORKSPACE if self._kind.on_cuda else 0
        margin = math.ceil((held.total - held.gradients) * _MARGIN)
        in_pass = TrainingBytes(weights, held.gradients, state, *held[1:], gathered, workspace + margin)
        temporaries = self._temporaries(trainable, choice.optimizer)
        in_step = TrainingBytes(weights, gradients, state, 0, 0, 0, gathered, workspace + temporaries)
        return max(in_pass, in_step, key=lambda needed: needed.peak)

    def most_rows(self, choice: Choice, budget: int, least: int, most: int) -> int:
        """The most rows that fit, in steps of `_ROUND` from the fewest; 0 where those do not."""
        candidates = [*range(least, most, _ROUND), most]
        count = bisect_right(candidates, budget, key=lambda rows: self.needed(rows, choice).peak)
        return candidates[count - 1] if count else 0

    def row_bytes(self, choice: Choice) -> int:
        """What a row keeps from the forward to the backward pass."""
        kind = self._kind_of(choice, self._shape.rows)
        counted = self._counted.get((choice.lora, kind))
        if counted is not None:
            return counted.kept_per_row
        fake: FakeModel = self._fake(choice.lora)
        return fake.kept_per_row(self._shape, kind)

    def _step(self, choice: Choice, rows: int) -> StepBytes:
        kind = self._kind_of(choice, rows)
        key = (choice.lora, kind)
        if key not in self._counted:
            self._counted[key] = self._fake(choice.lora).count_step(self._shape, kind)
        return self._counted[key]

    def _kind_of(self, choice: Choice, rows: int) -> StepKind:
        labelled_alone = self._fake(choice.lora).chooses(self._shape, rows)
        return replace(self._kind, checkpointing=choice.checkpointing, labelled_alone=labelled_alone)

    def _state(self, fake: FakeModel, optimizer: str) -> int:
        kind = OPTIMIZERS[optimizer]
        if kind == "none":
            return 0
        trainable = [parameter for parameter in fake.parameters() if parameter.requires_grad]
        if kind != "8bit":
            return sum(2 * parameter.nbytes + 4 for parameter in trainable)
        embeddings = {
            id(parameter)
            for module in fake.hf_model.modules()
            if isinstance(module, nn.Embedding)
            for parameter in module.parameters()
        }  # whose state the Trainer keeps in float32
        total = 0
        for parameter in trainable:
            count = parameter.numel()
            if count < _EIGHT_BIT_LEAST or id(parameter) in embeddings:
                total += 8 * count
            else:
                total += 2 * (count + 4 * -(-count // _EIGHT_BIT_BLOCK))
        return total

    def _temporaries(self, trainable: list[nn.Parameter], optimizer: str) -> int:
        """Of an unfused step, a denominator for every parameter: one at a time on a CPU, all at once on CUDA."""
        if OPTIMIZERS[optimizer] != "unfused" or not trainable:
            return 0
        sizes = [parameter.nbytes for parameter in trainable]
        return math.ceil((1 + _MARGIN) * (sum(sizes) if self._kind.on_cuda else 2 * max(sizes)))

    def _gathered(self, fake: FakeModel) -> int:
        """Everything outside the layers and two of those, once more while they are copied out, and their gradients."""
        layers = next((m for m in fake.hf_model.modules() if isinstance(m, nn.ModuleList) and len(m)), None)
        sizes = [sum(p.nbytes for p in layer.parameters()) for layer in layers or []]
        largest, root = max(sizes, default=0), fake.weights - sum(sizes)
        trainable = sum(p.nbytes for p in fake.parameters() if p.requires_grad) / max(fake.weights, 1)
        return math.ceil(2 * root + 3 * largest + trainable * (root + 2 * largest))
