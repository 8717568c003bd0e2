# SPDX-License-Identifier: Apache-2.0
"""Planned rows in another order, with learned rows between them: the spans of policies that compress a past."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from patchkern.batch.layout import PatchLayout
from patchkern.batch.planning import Int64


class Pieces(NamedTuple):
    """Runs of rows, in the order that they get.

    Attributes:
        begin: ``(N,)`` the first row of each in the planned layout; its number of rows, for the learned ones.
        rows: ``(N,)`` how many.
        position: ``(N,)`` of the first row; those after it have the next ones; -1 where none of them has a position.
        opens: ``(N,)`` whether a span begins with it.
    """

    begin: Int64
    rows: Int64
    position: Int64
    opens: NDArray[np.bool_]

    @property
    def at(self) -> Int64:
        """``(N,)`` where each one begins."""
        return np.cumsum(self.rows) - self.rows

    @property
    def total(self) -> int:
        """Rows of all."""
        return int(self.rows.sum())


class Table:
    """Pieces as they are added, kind by kind; each then gets its place by user and rank."""

    def __init__(self) -> None:
        self._columns: list[tuple[NDArray[Any], ...]] = []

    def add(
        self, begin: Int64, rows: ArrayLike, position: ArrayLike, opens: ArrayLike, user: ArrayLike, rank: ArrayLike
    ) -> slice:
        """Pieces of users, see `Pieces`; those of a user stand by rank. Returns where they are among those added."""
        before = sum(columns[0].size for columns in self._columns)
        columns = np.broadcast_arrays(begin, rows, position, opens, user, rank)
        self._columns.append(tuple(columns))
        return slice(before, before + begin.size)

    def ordered(self) -> tuple[Pieces, Int64, Int64]:
        """The pieces in their order; that order; and where each one begins, in the order in which they were added."""
        *columns, user, rank = (np.concatenate(parts) for parts in zip(*self._columns, strict=True))
        order = np.lexsort((rank, user))
        pieces = Pieces(*(column[order] for column in columns))
        at = np.empty(order.size, np.int64)
        at[order] = pieces.at
        return pieces, order, at


def arranged(
    layout: PatchLayout,
    learned: Sequence[int],
    pieces: Pieces,
    ranges: Int64,
    cu_users: Int64 | None = None,
    vector_rows: Int64 | None = None,
) -> PatchLayout:
    """The rows of the pieces, with labels of tokens where they had some, without transpose and item rows.

    Args:
        layout: as planned; rows that no piece has are left out.
        learned: token ids of the rows after the planned ones.
        pieces: no row twice, but for learned ones.
        ranges: ``(R, 2, N)`` for each range the first row that the N pieces see besides their own span, and the row
            after the last; of those that open a span it is read.
        cu_users: ``(B + 1,)`` where users of several spans begin.
        vector_rows: of the arranged rows, ascending, those that are vectors.
    """
    index = spread(pieces.begin, pieces.rows)
    extra = np.asarray(learned, np.int64)

    def taken(column: torch.Tensor, after: NDArray[Any]) -> NDArray[Any]:
        numbers = column.numpy()
        return np.concatenate([numbers, after.astype(numbers.dtype)])[index]

    cu_seqlens = np.append(pieces.at[pieces.opens], pieces.total).astype(np.int32)
    position_ids = spread(pieces.position, pieces.rows)
    position_ids[np.repeat(pieces.position < 0, pieces.rows)] = -1
    lo = taken(layout.lo, -1 - extra)
    values: dict[str, Any] = {
        "lo": torch.from_numpy(lo),
        "hi": torch.from_numpy(taken(layout.hi, np.zeros(extra.size))),
        "position_ids": torch.from_numpy(position_ids),
        "max_position": int(position_ids.max(initial=-1)),
        "cu_seqlens": torch.from_numpy(cu_seqlens),
        "max_seqlen": int(np.diff(cu_seqlens).max(initial=0)),
        "cu_users": None if cu_users is None else torch.from_numpy(cu_users.astype(np.int32)),
        "max_token_id": max(layout.max_token_id, -1 - int(lo.min(initial=0))),
        "vector_rows": None if vector_rows is None else torch.from_numpy(vector_rows),
        "transpose": None,
        "identities": None,
        **_prefixes(pieces, ranges),
    }
    if layout.labels is not None:
        labels = taken(layout.labels, np.full(extra.size, -100))
        supervised = np.flatnonzero(labels != -100)
        values["labels"] = torch.from_numpy(labels)
        values["logit_rows"] = torch.from_numpy(supervised - 1)
        values["logit_labels"] = torch.from_numpy(labels[supervised])
    return PatchLayout._trusted({**layout.__dict__, **values})


def _prefixes(pieces: Pieces, ranges: Int64) -> dict[str, Any]:
    """With as many ranges as are needed: none, one, or all."""
    seen = [np.where(low < high, (low, high), 0).T for low, high in ranges[:, :, pieces.opens]]
    used = [bounds for bounds in seen if bounds.any()]
    if not used:
        return {"prefix": None, "max_prefix": 0}
    prefix = np.ascontiguousarray(np.stack(used, axis=1), np.int32)
    longest = int((prefix[:, :, 1] - prefix[:, :, 0]).sum(axis=1).max())
    return {"prefix": torch.from_numpy(prefix if len(used) > 1 else prefix[:, 0].copy()), "max_prefix": longest}


def spread(begins: Int64, lengths: Int64) -> Int64:
    """The integers ``begins[i] .. begins[i] + lengths[i] - 1`` of all i, one after the other."""
    ends = np.cumsum(lengths)
    return np.arange(int(lengths.sum())) + np.repeat(begins - (ends - lengths), lengths)


def running(counts: NDArray[Any]) -> Int64:
    """``(N + 1,)`` sums of the first 0..N counts."""
    sums = np.zeros(counts.size + 1, np.int64)
    np.cumsum(counts, out=sums[1:])
    return sums
