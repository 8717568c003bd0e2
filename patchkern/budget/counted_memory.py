# SPDX-License-Identifier: Apache-2.0
"""A recurrent memory in a training step that is counted: how its two passes share the rows, and what lies between."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from patchkern.batch.memory_layout import MemoryBatch
from patchkern.budget.counted_items import IndexedRows


class MemoryRows(NamedTuple):
    """Of the rows of a training pass of `patchkern.RecurrentMemory`, both stages together, those of each kind."""

    reference: int
    """of stage 1, which reads whole histories"""
    reference_items: int
    """of stage 1, those that predict an item; none without a ``reference_loss``"""
    queries: int
    """of stage 1, the query rows, whose states are the references"""
    memories: int
    """of stage 2, those that hold a memory"""
    updates: int
    """of stage 2, the query rows that must come to a reference"""

    @classmethod
    def of(cls, batch: MemoryBatch) -> MemoryRows:
        """Of a pass, see `patchkern.batch.memory_layout.MemoryPlanner.training`."""
        labels = batch.stage1.item_labels
        return cls(
            batch.stage1.num_rows,
            0 if labels is None else labels.shape[0],
            batch.queries.numel(),
            batch.memories.shape[0],
            batch.updates.numel(),
        )

    def times(self, factor: float) -> MemoryRows:
        """Of a pass with so many times the rows."""
        return MemoryRows(*(round(factor * rows) for rows in self))


class CountedMap(nn.Module):
    """The map of a language model's states to rows, as of `patchkern.models.memory_loss`."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(width, dtype=dtype))

    def forward(self, states: Tensor) -> Tensor:
        """``(..., D)``."""
        wide = states.to(torch.promote_types(states.dtype, torch.float32))
        normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + 1e-6)
        return normed.to(states.dtype) * self.scale


class CountedMemory:
    """What a step makes of the first pass's states, and of the second's.

    Args:
        map: None in a model of item ids, which reads states as they are.
    """

    def __init__(self, map: CountedMap | None) -> None:
        self.map = map

    def references(self, states: Tensor, rows: MemoryRows) -> Tensor:
        """The query rows' states, of ``states`` (T, D)."""
        return IndexedRows.apply(states, rows.queries)

    def read(self, references: Tensor, rows: MemoryRows) -> Tensor:
        """The memories that the second pass reads."""
        memories: Tensor = IndexedRows.apply(references, rows.memories)
        return memories if self.map is None else self.map(memories)

    def placed(self, rows: Tensor, memories: Tensor) -> Tensor:
        """Rows (T, D) with the memories in their places."""
        places = torch.empty(memories.shape[0], dtype=torch.int64)
        return rows.index_copy(0, places, memories.to(rows.dtype))

    def distance(self, states: Tensor, references: Tensor, rows: MemoryRows) -> Tensor:
        """Between updates and references, which are constants."""
        updates, wanted = IndexedRows.apply(states, rows.updates), IndexedRows.apply(references.detach(), rows.updates)
        wide = torch.promote_types(updates.dtype, torch.float32)
        return (updates.to(wide) - wanted.to(wide)).square().sum()
