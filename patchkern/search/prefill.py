# SPDX-License-Identifier: Apache-2.0
"""Which rows of the prompts are computed when: integers only, on the CPU.

All prompts stand in one store, packed as in their layout. A pass computes some rows of some users; a user's rows in it
are a span, whose prefix are the user's rows that are in the store already, from an earlier pass, a cache, or a copy.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Int64 = NDArray[np.int64]

# Rows that all users share are computed once where that saves at least this part of the work; attention to a prefix
# costs about twice as much as attention without.
_WORTH_SHARING = 1 / 8


class Pass(NamedTuple):
    """Rows that go through the model together.

    Attributes:
        rows: ``(n,)`` rows of the layout, and of the store.
        cu_seqlens: ``(S + 1,)`` the spans among them.
        prefix: ``(S, 2)`` what each span sees besides itself: rows of the store.
        last: ``(k,)`` which of the ``n`` end a prompt, and users: ``(k,)`` whose.
        copied_from: ``(m,)`` rows of the store that are copied as soon as these rows are in it, and copied_to:
            ``(f, m)`` where to.
    """

    rows: Int64
    cu_seqlens: Int64
    prefix: Int64
    last: Int64
    users: Int64
    copied_from: Int64
    copied_to: Int64

    @property
    def max_seqlen(self) -> int:
        """Rows of the longest span."""
        return int(np.diff(self.cu_seqlens).max(initial=0))

    @property
    def max_prefix(self) -> int:
        """Rows of the longest prefix."""
        return int((self.prefix[:, 1] - self.prefix[:, 0]).max(initial=0))


def plan_passes(cu_seqlens: Int64, stored: Int64, shared: int = 0, chunk_rows: int | None = None) -> list[Pass]:
    """Plan the computation of the prompts of B users.

    Args:
        cu_seqlens: ``(B + 1,)`` where each user's rows begin; at least one row each.
        stored: ``(B,)`` how many of a user's first rows are in the store; fewer than the user has.
        shared: how many first rows are the same for all users; fewer than any user has.
        chunk_rows: rows of a pass, at most. None: no bound.
    """
    stored = np.minimum(stored, np.diff(cu_seqlens) - 1)
    begin, order = stored.copy(), np.arange(stored.size)
    lacking = np.flatnonzero(stored < shared)
    copied_from, copied_to = np.zeros(0, np.int64), np.zeros((0, 0), np.int64)
    copied_at = -1
    work = int((np.diff(cu_seqlens) - stored).sum())
    if int((shared - stored[lacking]).sum()) - shared >= _WORTH_SHARING * work:
        leader = int(lacking[stored[lacking].argmax()])
        followers = lacking[lacking != leader]
        begin[followers] = shared
        order = np.append(leader, np.delete(order, leader))
        copied_from = cu_seqlens[leader] + np.arange(shared)
        copied_to = cu_seqlens[followers, None] + np.arange(shared)
        copied_at = shared - 1 - int(stored[leader])  # among all rows to compute, of which the leader's come first

    rows = (np.diff(cu_seqlens) - begin)[order]
    ends = np.cumsum(rows)
    total = int(rows.sum())
    chunk = max(total, 1) if chunk_rows is None else chunk_rows
    starts = np.union1d(ends - rows, np.arange(0, total, chunk))  # of the spans, numbering all rows to compute
    stops = np.append(starts, total)[1:]
    owner = np.searchsorted(ends, starts, side="right")
    user = order[owner]
    first = cu_seqlens[user] + begin[user] + starts - (ends - rows)[owner]  # row of the layout
    passes = []
    for at in range(0, total, chunk):
        spans = slice(*np.searchsorted(starts, [at, at + chunk]))
        cuts = np.append(starts[spans], stops[spans][-1:]) - at
        ending = np.flatnonzero(stops[spans] == ends[owner[spans]])
        copies = at <= copied_at < at + chunk
        passes.append(
            Pass(
                rows=np.arange(cuts[-1]) + np.repeat(first[spans] - cuts[:-1], np.diff(cuts)),
                cu_seqlens=cuts,
                prefix=np.stack([cu_seqlens[user[spans]], first[spans]], axis=1),
                last=cuts[1:][ending] - 1,
                users=user[spans][ending],
                copied_from=copied_from if copies else copied_from[:0],
                copied_to=copied_to if copies else copied_to[:, :0],
            )
        )
    return passes


def shared_literals(lo: Int64, cu_seqlens: Int64) -> int:
    """How many first rows are the same tokens for all users: every user's last row stays apart.

    Args:
        lo: ``(T,)`` `PatchLayout.lo`.
        cu_seqlens: ``(B + 1,)``.
    """
    if cu_seqlens.size < 3:
        return 0
    first = lo[: np.diff(cu_seqlens).min() - 1]
    literals = int(np.append(first >= 0, True).argmax())
    same = lo[cu_seqlens[:-1, None] + np.arange(literals)] == first[:literals]
    return int(np.append(same.all(axis=0), False).argmin())
