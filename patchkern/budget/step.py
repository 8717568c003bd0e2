# SPDX-License-Identifier: Apache-2.0
"""A training step as its memory is counted: its rows, how it is computed, and what it holds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from patchkern.budget.counted_items import Chunks
from patchkern.budget.counted_memory import MemoryRows


class Lora(NamedTuple):
    """Adapters of low rank, as `peft.LoraConfig` has them."""

    rank: int = 16
    targets: str | tuple[str, ...] = "all-linear"


class PassShape(NamedTuple):
    """Of the rows that are computed together."""

    rows: int
    logit_rows: int
    """those with logits: whose next token is supervised"""
    item_rows: int
    """those that predict an item, with an item head"""
    longest: int
    """of the longest prefix"""
    memory: MemoryRows | None = None
    """of a recurrent memory, both of whose passes have the rows together"""

    def times(self, factor: int) -> PassShape:
        """So many passes as one."""
        rows, logit_rows, item_rows, longest, memory = self
        memory = None if memory is None else memory.times(factor)
        return PassShape(factor * rows, factor * logit_rows, factor * item_rows, factor * longest, memory)


@dataclass(frozen=True)
class StepKind:
    """How a step is computed, whatever its rows.

    Attributes:
        autocast: dtype; None: that of the weights.
        checkpointing: whether activations are recomputed.
        accumulates: whether gradients of a pass before are there.
        sharded: whether gradients go elsewhere as soon as they are made.
        smoothing: whether labels are smoothed.
        on_cuda: whose kernels run.
        prefixes: whether spans have prefixes, as the branches of a trunk do.
        labelled_alone: whether the last layer computes the rows with a label alone, see `FakeModel.chooses`.
        chunks: of the item head's loss; None where items are not learned.
    """

    autocast: torch.dtype | None = None
    checkpointing: bool = False
    accumulates: bool = False
    sharded: bool = False
    smoothing: bool = False
    on_cuda: bool = False
    prefixes: bool = True
    labelled_alone: bool = False
    chunks: Chunks | None = None


class HeldBytes(NamedTuple):
    """What a step holds beside weights and the optimiser's state, by what made it."""

    gradients: int
    activations: int
    attention: int
    logits: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self)


class StepBytes:
    """A step's memory after each of its operators, by part, for every number of rows.

    The operators are the same whatever the rows, and a tensor has a size that is a constant or grows with them: two
    counted steps say all.

    Args:
        rows: of the first counted step; the second has twice as many.
        first, second: ``(operators, 4)`` bytes.
        layers_end: after how many operators the forward pass of the layers ends.
    """

    def __init__(self, rows: int, first: NDArray[np.int64], second: NDArray[np.int64], layers_end: int) -> None:
        self._rows, self._first, self._per_row = rows, first, (second - first) / rows
        self._layers_end = layers_end

    def peak(self, rows: int) -> HeldBytes:
        """At the worst moment."""
        held = self._first + (rows - self._rows) * self._per_row
        return HeldBytes(*map(math.ceil, held[held.sum(1).argmax()]))

    @property
    def kept_per_row(self) -> int:
        """Of activations and attention, from the forward to the backward pass."""
        return math.ceil(self._per_row[self._layers_end].sum())
