# SPDX-License-Identifier: Apache-2.0
"""Runs of items that stand together in a layout, with how many rows they take, up to any item."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from patchkern.batch.arrangement import running
from patchkern.batch.catalog import Catalog
from patchkern.batch.histories import Histories
from patchkern.batch.planning import Int32, Int64
from patchkern.batch.policy_kinds import Level, Levels


class Runs(NamedTuple):
    """Runs of items, the ``(N,)`` catalogue positions and levels of these, and ``(N + 1,)`` sums of what they take.

    Attributes:
        rows: of the entries of the first 0..N items, without separators.
        entries: how many entries these are.
    """

    items: Histories
    of_catalog: Int32
    levels: Levels
    rows: Int64
    entries: Int64

    @classmethod
    def of(cls, catalog: Catalog, items: Histories, levels: Levels) -> Runs:
        """Items of a catalogue, each of a level."""
        index = catalog.index_of(items.items, "histories")
        rows = np.where(levels == Level.TEXT, catalog.inputs.lengths[index], levels == Level.PATCH)
        entries = (levels != Level.JOIN) & (levels != Level.DROP)
        return cls(items, index, levels, running(rows), running(entries))

    def counted(self, sums: Int64, run: Int64, count: Int64) -> Int64:
        """Of the first ``count`` items of each of some runs."""
        begin = self.items.offsets[run]
        return sums[begin + count] - sums[begin]

    def before(self, run: Int64, count: Int64, separator: int) -> Int64:
        """Rows of the first ``count`` items of each of some runs, and of the separators between them."""
        entries = self.counted(self.entries, run, count)
        return self.counted(self.rows, run, count) + np.maximum(entries - 1, 0) * separator

    def whole(self, separator: int) -> Int64:
        """Rows of each run."""
        return self.before(np.arange(len(self.items)), self.items.lengths, separator)

    def then(self, other: Runs) -> Runs:
        """These and then others."""
        items = Histories._owned(
            np.concatenate([self.items.items, other.items.items]),
            np.append(self.items.offsets[:-1], self.items.items.size + other.items.offsets),
        )
        return Runs(
            items,
            np.concatenate([self.of_catalog, other.of_catalog]),
            np.concatenate([self.levels, other.levels]),
            np.append(self.rows[:-1], self.rows[-1] + other.rows),
            np.append(self.entries[:-1], self.entries[-1] + other.entries),
        )
