# SPDX-License-Identifier: Apache-2.0
"""Row planning in NumPy: from items and levels to the integers of a packed batch.

`planning_native` holds the same two functions in C++; their results are equal integer for integer. This one is the
oracle, the documentation, and the way without a compiler.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from patchkern.batch.catalog import Catalog
from patchkern.batch.policy_kinds import Level, Levels
from patchkern.batch.prompt import Prompt

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]


class Head(IntEnum):
    """What a span begins with."""

    PREFIX = 0
    SEPARATOR = 1
    NOTHING = 2


class Spans(NamedTuple):
    """What makes B spans of B users: not every one is a prompt of its own."""

    heads: NDArray[np.uint8]
    """``(B,)`` one `Head` per span"""
    hidden: Int64
    """``(B,)`` rows that stand before the span in its prompt; its positions go on from there"""


class RowPlan(NamedTuple):
    """The planned batch: `PatchLayout`'s integers, field by field."""

    lo: Int32
    hi: Int32
    items: Int32
    token_ids: Int32
    offsets: Int32
    title_index: Int32
    cu_seqlens: Int32
    max_seqlen: int
    position_ids: Int64
    labels: Int64 | None
    logit_rows: Int64 | None
    logit_labels: Int64 | None
    history_tokens: int
    history_rows: int
    max_token_id: int


class TransposePlan(NamedTuple):
    """Who contributes to which token's gradient: `Transpose`'s integers, field by field."""

    tokens: Int32
    offsets: Int32
    rows: Int32
    divisors: Int32


def plan_rows(
    catalog: Catalog,
    items: Int32,
    user_offsets: Int64,
    levels: Levels,
    prompt: Prompt,
    targets: Int32 | None,
    spans: Spans | None = None,
) -> RowPlan:
    """Plan every row of a packed batch.

    Args:
        catalog: the titles.
        items: ``(N,)`` catalogue positions of the (already cut) histories.
        user_offsets: ``(B + 1,)`` where each user's items begin.
        levels: ``(N,)`` one `Level` per item; the caller has checked that no JOIN lacks a patch before it.
        prompt: the fixed parts.
        targets: ``(B,)`` catalogue positions of the next items, or None; with ``spans``, -1 makes a span end with its
            last entry, without suffix and response.
        spans: None where every user is a prompt of its own.

    Raises:
        ValueError: more than 2^31 - 1 rows.
    """
    n_users = user_offsets.size - 1
    users = np.repeat(np.arange(n_users), np.diff(user_offsets))
    title_lengths = np.diff(catalog.offsets)

    # An entry is a text item or a patch; every item but a JOIN begins one.
    first = np.flatnonzero(levels != Level.JOIN)
    entry_user, entry_item = users[first], items[first]
    is_patch = levels[first] != Level.TEXT
    entry_rows = np.where(is_patch, 1, title_lengths[entry_item])
    entries = np.bincount(entry_user, minlength=n_users)

    # All literals come from one pool: the prompt's parts, then the titles.
    parts = [
        np.asarray(part, np.int32) for part in (prompt.prefix, prompt.separator, prompt.suffix, prompt.response_end)
    ]
    pool = np.concatenate([*parts, catalog.token_ids])
    prefix, separator, suffix, response_end, titles = np.cumsum([0, *(part.size for part in parts)])

    # The batch as segments (user, where in the pool, rows), ordered within a user by `rank`.
    every_user = np.arange(n_users)
    heads = np.full(n_users, Head.PREFIX) if spans is None else spans.heads
    head_rows = np.array([parts[0].size, parts[1].size, 0])[heads]
    closed = every_user if targets is None else np.flatnonzero(targets >= 0)
    nth = np.arange(first.size) - np.repeat(np.cumsum(entries) - entries, entries)
    behind = np.flatnonzero(nth + 1 < entries[entry_user])
    after = 2 * entries + 1
    segments = [
        (every_user, np.array([prefix, separator, 0])[heads], head_rows, np.zeros(n_users, np.int64)),
        (entry_user, titles + catalog.offsets[entry_item], entry_rows, 2 * nth + 1),
        (entry_user[behind], np.full(behind.size, separator), np.full(behind.size, parts[1].size), 2 * nth[behind] + 2),
        (closed, np.full(closed.size, suffix), np.full(closed.size, parts[2].size), after[closed]),
    ]
    if targets is not None:
        title = targets[closed]
        segments += [
            (closed, titles + catalog.offsets[title], title_lengths[title], after[closed] + 1),
            (closed, np.full(closed.size, response_end), np.full(closed.size, parts[3].size), after[closed] + 2),
        ]
    user, source, rows, rank = (np.concatenate(column).astype(np.int64) for column in zip(*segments, strict=True))
    kind = np.repeat(np.arange(len(segments)), [segment[0].size for segment in segments])
    order = np.lexsort((rank, user))
    user, source, rows, kind = user[order], source[order], rows[order], kind[order]
    total = int(rows.sum())
    if total > np.iinfo(np.int32).max:
        raise ValueError(f"histories: expected a batch of at most 2^31 - 1 rows, got {total}")

    starts = np.cumsum(rows) - rows
    literal = pool[np.arange(total) - np.repeat(starts - source, rows)]
    lo, hi = -1 - literal, np.zeros(total, np.int32)

    # Pooled items keep the order of the histories; titles are numbered by first appearance.
    pooled = np.flatnonzero(levels != Level.TEXT)
    title_index, first_seen, inverse = np.unique(items[pooled], return_index=True, return_inverse=True)
    by_appearance = np.argsort(first_seen)
    number = np.empty(by_appearance.size, np.int32)
    number[by_appearance] = np.arange(by_appearance.size)
    title_index = title_index[by_appearance].astype(np.int32)
    patch_rows = starts[kind == 1][is_patch]
    patch_starts = np.flatnonzero(levels[pooled] == Level.PATCH)
    lo[patch_rows] = patch_starts
    hi[patch_rows] = np.append(patch_starts[1:], pooled.size)
    offsets = np.zeros(title_index.size + 1, np.int64)
    np.cumsum(title_lengths[title_index], out=offsets[1:])
    spread = np.arange(offsets[-1]) + np.repeat(catalog.offsets[title_index] - offsets[:-1], title_lengths[title_index])
    token_ids = catalog.token_ids[spread]

    per_user = np.zeros(n_users, np.int64)
    np.add.at(per_user, user, rows)
    cu_seqlens = np.zeros(n_users + 1, np.int64)
    np.cumsum(per_user, out=cu_seqlens[1:])
    place = np.arange(total) - np.repeat(cu_seqlens[:-1], per_user)
    position_ids = place if spans is None else place + np.repeat(spans.hidden, per_user)

    labels = logit_rows = logit_labels = None
    if targets is not None:
        # Nothing stands before a user's first row, so nothing can predict it.
        supervised = np.repeat(kind >= 4, rows) & (place > 0)
        labels = np.where(supervised, -1 - lo.astype(np.int64), -100)
        logit_rows = np.flatnonzero(supervised) - 1
        logit_labels = labels[supervised]

    literals = lo[lo < 0]
    return RowPlan(
        lo=lo,
        hi=hi,
        items=number[inverse],
        token_ids=token_ids,
        offsets=offsets.astype(np.int32),
        title_index=title_index,
        cu_seqlens=cu_seqlens.astype(np.int32),
        max_seqlen=int(per_user.max(initial=0)),
        position_ids=position_ids,
        labels=labels,
        logit_rows=logit_rows,
        logit_labels=logit_labels,
        history_tokens=int(title_lengths[items].sum(dtype=np.int64)),
        history_rows=int(entry_rows.sum()),
        max_token_id=int(max(-1 - literals.min(initial=0), token_ids.max(initial=-1))),
    )


def transpose_rows(lo: Int32, hi: Int32, items: Int32, token_ids: Int32, offsets: Int32) -> TransposePlan:
    """Turn rows that read tokens into tokens that collect rows, for the gradient.

    Contributions are ordered by token, then by row, then by place within the row. A contribution of weight
    ``1 / (title length x items of the session)`` is stored as that integer divisor.
    """
    literal = np.flatnonzero(lo < 0)
    patch = np.flatnonzero(lo >= 0)
    sizes = (hi[patch] - lo[patch]).astype(np.int64)
    pooled = _spans(lo[patch], sizes)
    title = items[pooled]
    lengths = np.diff(offsets)[title].astype(np.int64)
    token = np.concatenate([-1 - lo[literal], token_ids[_spans(offsets[title], lengths)]])
    row = np.concatenate([literal, np.repeat(np.repeat(patch, sizes), lengths)])
    divisor = np.concatenate([np.ones(literal.size, np.int64), np.repeat(lengths * np.repeat(sizes, sizes), lengths)])
    if divisor.max(initial=0) > np.iinfo(np.int32).max:
        raise ValueError("histories: expected title length times session size below 2^31")
    order = np.lexsort((row, token))
    tokens, counts = np.unique(token, return_counts=True)
    ends = np.zeros(tokens.size + 1, np.int64)
    np.cumsum(counts, out=ends[1:])
    return TransposePlan(*(column.astype(np.int32) for column in (tokens, ends, row[order], divisor[order])))


def _spans(starts: NDArray[Any], lengths: Int64) -> Int64:
    """The integers ``starts[i] .. starts[i] + lengths[i] - 1`` of all i, one after the other."""
    ends = np.cumsum(lengths)
    return np.arange(lengths.sum()) + np.repeat(starts - (ends - lengths), lengths)
