# SPDX-License-Identifier: Apache-2.0
"""Which rows of the prompts are computed when: integers only, on the CPU.

All prompts stand in one store, packed as in their layout. A pass computes some rows of some users; a user's rows in it
are a span, whose prefix are the user's rows that are in the store already, from an earlier pass, a cache, or a copy.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from patchkern.batch.layout import PatchLayout

Int64 = NDArray[np.int64]

# Rows that all users share are computed once where that saves at least this part of the work; attention to a prefix
# costs about twice as much as attention without.
_WORTH_SHARING = 1 / 8


class Pass(NamedTuple):
    """Rows that go through the model together.

    Attributes:
        rows: ``(n,)`` rows of the layout, and of the store.
        cu_seqlens: ``(S + 1,)`` the spans among them.
        prefix: ``(S, 2)`` what each span sees besides itself: rows of the store; or ``(S, R, 2)``, several ranges.
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
        sizes = self.prefix[..., 1] - self.prefix[..., 0]
        return int((sizes if sizes.ndim == 1 else sizes.sum(axis=1)).max(initial=0))


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


def plan_spans(cu_seqlens: Int64, ranges: Int64, order: Int64, chunk_rows: int | None = None) -> list[Pass]:
    """Plan the computation of spans that see each other's rows, none of which ends a prompt.

    Args:
        cu_seqlens: ``(S + 1,)`` the spans, in the store.
        ranges: ``(S, R, 2)`` rows of the store that each one sees besides itself.
        order: which spans to compute, each after all that it sees; what is left out is in the store.
        chunk_rows: rows of a pass, at most. None: no bound.
    """
    order = order[np.diff(cu_seqlens)[order] > 0]
    rows = np.diff(cu_seqlens)[order]
    ends = np.cumsum(rows)
    total = int(rows.sum())
    chunk = max(total, 1) if chunk_rows is None else chunk_rows
    starts = np.union1d(ends - rows, np.arange(0, total, chunk))  # of the pieces, numbering all rows to compute
    sizes = np.diff(np.append(starts, total))
    owner = np.searchsorted(ends, starts, side="right")
    span = order[owner]
    first = cu_seqlens[span] + starts - (ends - rows)[owner]  # row of the store
    before = np.stack([cu_seqlens[span], first], axis=1)[:, None]  # of its own span
    seen = np.concatenate([ranges[span], np.where(before[..., :1] < before[..., 1:], before, 0)], axis=1)
    used = (seen[..., 0] < seen[..., 1]).any(axis=0)
    seen = seen[:, used] if used.any() else seen[:, :1]
    passes = []
    for at in range(0, total, chunk):
        which = slice(*np.searchsorted(starts, [at, at + chunk]))
        cuts = np.append(0, np.cumsum(sizes[which]))
        passes.append(
            Pass(
                rows=np.arange(cuts[-1]) + np.repeat(first[which] - cuts[:-1], sizes[which]),
                cu_seqlens=cuts,
                prefix=seen[which] if seen.shape[1] > 1 else seen[which][:, 0],
                last=cuts[:0],
                users=cuts[:0],
                copied_from=cuts[:0],
                copied_to=np.zeros((0, 0), np.int64),
            )
        )
    return passes


def with_beginnings(passes: list[Pass], begins: Int64, shared: int, chunk_rows: int | None = None) -> list[Pass]:
    """Passes over rows after users' first ones, behind what puts these into the store: computed for one, copied to all.

    Args:
        passes: over other rows.
        begins: where these users begin, in the store.
        shared: how many first rows all of them have in common.
        chunk_rows: rows of a pass, at most. None: no bound.
    """
    if shared == 0 or begins.size == 0:
        return passes
    leader = begins[:1]
    beginning = plan_spans(
        np.append(leader, leader + shared), np.zeros((1, 1, 2), np.int64), np.zeros(1, np.int64), chunk_rows
    )
    copies = {"copied_from": leader + np.arange(shared), "copied_to": begins[1:, None] + np.arange(shared)}
    beginning[-1] = beginning[-1]._replace(**copies)
    if len(beginning) > 1 or not passes or (chunk_rows is not None and shared + passes[0].rows.size > chunk_rows):
        return beginning + passes
    return [_together(beginning[0], passes[0]), *passes[1:]]


def _together(one: Pass, other: Pass) -> Pass:
    """Two passes as one; the second copies nothing."""
    most = max(pass_.prefix[0].size // 2 for pass_ in (one, other))
    prefixes = [pass_.prefix.reshape(len(pass_.prefix), -1, 2) for pass_ in (one, other)]
    prefixes = [np.pad(prefix, ((0, 0), (0, most - prefix.shape[1]), (0, 0))) for prefix in prefixes]
    prefix = np.concatenate(prefixes)
    return Pass(
        rows=np.append(one.rows, other.rows),
        cu_seqlens=np.append(one.cu_seqlens, one.rows.size + other.cu_seqlens[1:]),
        prefix=prefix if most > 1 else prefix[:, 0],
        last=one.rows.size + other.last,
        users=other.users,
        copied_from=one.copied_from,
        copied_to=one.copied_to,
    )


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


def packed(layout: PatchLayout, spans: Pass) -> PatchLayout:
    """The rows of a pass as a layout of their own, which has the titles of all; what they see, a cache knows."""
    rows = torch.from_numpy(spans.rows)
    values = {
        "lo": layout.lo[rows],
        "hi": layout.hi[rows],
        "position_ids": layout.position_ids[rows],
        "cu_seqlens": torch.from_numpy(spans.cu_seqlens).int(),
        "max_seqlen": spans.max_seqlen,
        "prefix": None,
        "max_prefix": 0,
        **dict.fromkeys(
            ("labels", "logit_rows", "logit_labels", "transpose", "identities", "item_rows", "item_labels")
        ),
        "cu_users": None,
    }
    if layout.vector_rows is not None:
        first, end = (np.searchsorted(layout.vector_rows.numpy(), spans.rows, side) for side in ("left", "right"))
        own = np.flatnonzero(first < end)
        values["vector_rows"] = torch.from_numpy(own) if own.size else None
    return PatchLayout._trusted({**layout.__dict__, **values})
