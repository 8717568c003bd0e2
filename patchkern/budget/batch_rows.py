# SPDX-License-Identifier: Apache-2.0
"""Rows of the first users of an order: what they keep together, and what is computed before their prompts."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from patchkern.batch.memory_layout import MemoryRowCounts

Int64 = NDArray[np.int64]

ASIDE_ROWS = 4096
"""Rows of old items whose keys and values stand beside a batch's prompts while experts are made of them; more where a
single user has more."""

ABSORBED_ROWS = 16384
"""Rows that are absorbed together into memories, at most, where not said; more where a single user has more."""


class Absorbed(NamedTuple):
    """What memories are made of, and take."""

    rows: int = 0
    """of the largest pass that absorbs items"""
    vectors: int = 0
    """of all users"""
    one_time: bool = False
    """the pass is over all items, whose rows the query rows see"""


class BatchRows(NamedTuple):
    """Of a batch of users."""

    users: int
    stored: int
    """whose keys and values are there at once"""
    longest: int
    """of one user"""
    absorbed: Absorbed = Absorbed()


class OrderedRows:
    """Rows of users in the order in which they are put into batches.

    Args:
        read: ``(B,)`` rows of every user's prompt; or what `memory_row_counts` says of users behind a memory.
        aside: ``(B,)`` rows that are computed for experts and dropped; None: there are no experts.
    """

    def __init__(self, read: Int64 | MemoryRowCounts, aside: Int64 | None = None) -> None:
        self._memory = read if isinstance(read, MemoryRowCounts) else None
        counts = read.read if isinstance(read, MemoryRowCounts) else read
        self.num_users = counts.size
        self._stored = _stored_rows(counts, aside)
        if self._memory is not None:
            self._largest = np.maximum.accumulate(self._memory.absorbed)
            self._absorbed = np.cumsum(self._memory.absorbed)
            self._vectors = np.cumsum(self._memory.vectors)

    def first(self, count: int, chunk_rows: int | None) -> BatchRows:
        """Of the first so many users, at least one, whose rows are computed so many at a time."""
        longest, stored = (int(self._stored[n]) for n in (1, count))
        if self._memory is None:
            return BatchRows(count, stored, longest)
        at_once = min(ABSORBED_ROWS if chunk_rows is None else chunk_rows, int(self._absorbed[count - 1]))
        rows = max(at_once, int(self._largest[count - 1]))
        return BatchRows(count, stored, longest, Absorbed(rows, int(self._vectors[count - 1]), self._memory.one_time))

    def is_cut(self, count: int, chunk_rows: int) -> bool:
        """Whether so small a chunk changes anything for the first users."""
        absorbed = 0 if self._memory is None else min(int(self._absorbed[count - 1]), ABSORBED_ROWS)
        return chunk_rows < max(int(self._stored[count]), absorbed)


def taken(rows: Int64 | MemoryRowCounts, users: Int64) -> Int64 | MemoryRowCounts:
    """Those of some users."""
    if isinstance(rows, MemoryRowCounts):
        return MemoryRowCounts(rows.read[users], rows.absorbed[users], rows.vectors[users], rows.one_time)
    return rows[users]


def _stored_rows(row_counts: Int64, aside: Int64 | None) -> Int64:
    """``(n + 1,)`` rows whose keys and values the first 0..n users have in memory at once."""
    rows = np.append(0, np.cumsum(row_counts))
    if aside is None:
        return rows
    largest = np.append(0, np.maximum.accumulate(aside))
    return rows + np.where(largest > 0, np.maximum(largest, np.minimum(rows, ASIDE_ROWS)), 0)
