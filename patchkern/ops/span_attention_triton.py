# SPDX-License-Identifier: Apache-2.0
"""`span_attention` in Triton: online softmax over the prefix and the own rows, forward and backward.

A program of the forward kernel, and of the one for the query's gradient, has one key head and a fixed block of
consecutive rows: all query heads of the key head, of all these rows, are the rows of its matrices. Blocks do not stop
at the ends of spans, so that many short spans (hypotheses of a search, branches of a trunk) fill a block together and
read their common prefix once. What a row sees is two ranges of keys, ``lo..hi - 1`` each: its prefix, and its own span
up to itself. A block streams the keys of its own rows once and those of each distinct prefix begin once.

A program of the kernel for the gradients of key and value has one block of keys, and collects from all rows that see
them, in their order: no atomics, the same bits from run to run. Rows between the first and the last span that sees the
block are visited too, which is little where branches follow their trunk.

Nothing waits for the device, nothing is tuned at run time, and no size that changes with the batch takes part in the
compilation. The device's integers are trusted; they were checked when the layout was built. Finite rows cannot reach
those who do not see them; a NaN in a row can, within its block.

Names follow flash-linear-attention: ``i_`` an index, ``o_`` a vector of indices, ``m_`` a mask, ``p_`` a pointer,
``s_`` a stride, ``b_`` a loaded block. Addresses are computed in int64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_LOG2E = tl.constexpr(1.4426950408889634)
_FAR = tl.constexpr(2**31 - 1)
_SPANS = tl.constexpr(128)  # spans that the key gradient's search for its rows reads at once
_SIZES = ["n_rows", "n_spans"]


class Blocks(NamedTuple):
    """Rows of the matrices (``queries`` x ``keys``) of one program, its warps, and the key blocks in flight."""

    queries: int
    keys: int
    warps: int
    stages: int


def _forward_blocks(width: int, itemsize: int) -> Blocks:
    """By padded head width and bytes per element: the largest that were seen to compile without spilling, or nearly.

    All three tables are such; measuring them on a GPU is still to be done.
    """
    if itemsize == 4:
        return Blocks(64, 32, 4, 1) if width <= 64 else Blocks(32, 32, 4, 1) if width <= 128 else Blocks(16, 32, 8, 1)
    return Blocks(64, 64, 4, 2) if width <= 128 else Blocks(64, 32, 8, 1)


def _query_gradient_blocks(width: int, itemsize: int) -> Blocks:
    if itemsize == 4:
        return Blocks(32, 32, 4, 1) if width <= 64 else Blocks(16, 32, 4, 1) if width <= 128 else Blocks(16, 16, 4, 1)
    return Blocks(64, 32, 4, 2) if width <= 64 else Blocks(64, 32, 8, 1) if width <= 128 else Blocks(32, 32, 8, 1)


def _key_gradient_blocks(width: int, itemsize: int) -> Blocks:
    if itemsize == 4:
        return Blocks(32, 32, 4, 1) if width <= 64 else Blocks(16, 16, 4, 1)
    return Blocks(64, 64, 4, 2) if width <= 64 else Blocks(32, 64, 8, 1) if width <= 128 else Blocks(32, 32, 8, 1)


# ------------------------------------------------------------------ kernels


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=["p_cu_seqlens", "p_prefix"])
def _rows_kernel(
    p_cu_seqlens: tl.tensor,
    p_prefix: tl.tensor,
    p_rows: tl.tensor,
    n_rows: tl.tensor,
    n_spans: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """What each row sees, (T, 4) int32: begin and end of its span, begin and end of its prefix."""
    o_row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_row = o_row < n_rows
    # the last span that begins at or before the row: an empty span begins where the next one does
    b_low = tl.zeros([BLOCK], dtype=tl.int32)
    b_high = b_low + n_spans
    i_left = n_spans
    while i_left > 0:
        b_middle = (b_low + b_high) // 2
        b_begin = tl.load(p_cu_seqlens + b_middle, mask=m_row, other=0)
        m_after = b_begin <= o_row
        m_open = b_high - b_low > 1
        b_low = tl.where(m_open & m_after, b_middle, b_low)
        b_high = tl.where(m_open & ~m_after, b_middle, b_high)
        i_left = i_left // 2
    p_row = p_rows + o_row.to(tl.int64) * 4
    tl.store(p_row, tl.load(p_cu_seqlens + b_low, mask=m_row), mask=m_row)
    tl.store(p_row + 1, tl.load(p_cu_seqlens + b_low + 1, mask=m_row), mask=m_row)
    tl.store(p_row + 2, tl.load(p_prefix + b_low.to(tl.int64) * 2, mask=m_row), mask=m_row)
    tl.store(p_row + 3, tl.load(p_prefix + b_low.to(tl.int64) * 2 + 1, mask=m_row), mask=m_row)


@triton.jit
def _dot(b_a: tl.tensor, b_b: tl.tensor, PRECISION: tl.constexpr) -> tl.tensor:
    """Product in float32; "interpreted" because Triton's interpreter would multiply the bits of bfloat16."""
    if PRECISION == "interpreted":
        return tl.dot(b_a.to(tl.float32), b_b.to(tl.float32))
    return tl.dot(b_a, b_b, input_precision=PRECISION)


@triton.jit
def _load(
    p_x: tl.tensor, o_row: tl.tensor, m_row: tl.tensor, s_row: tl.tensor, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr
) -> tl.tensor:
    """(rows, BLOCK_D), zeros beyond the width."""
    o_d = tl.arange(0, BLOCK_D)
    return tl.load(
        p_x + o_row.to(tl.int64)[:, None] * s_row + o_d[None, :],
        mask=m_row[:, None] & (o_d < WIDTH)[None, :],
        other=0.0,
    )


@triton.jit
def _attend(
    b_acc: tl.tensor,
    b_peak: tl.tensor,
    b_total: tl.tensor,
    b_q: tl.tensor,
    p_k: tl.tensor,
    p_v: tl.tensor,
    s_k: tl.tensor,
    s_v: tl.tensor,
    i_begin: tl.tensor,
    i_end: tl.tensor,
    b_lo: tl.tensor,
    b_hi: tl.tensor,
    scale_log2: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """Stream keys ``i_begin..i_end - 1`` past the queries; row m sees ``b_lo[m]..b_hi[m] - 1``."""
    for i_n in range(i_begin, i_end, BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N)
        m_n = o_n < i_end
        # [BLOCK_M, BLOCK_N]
        b_k = _load(p_k, o_n, m_n, s_k, WIDTH, BLOCK_D)
        b_s = _dot(b_q, tl.trans(b_k), PRECISION) * scale_log2
        m_seen = (o_n[None, :] >= b_lo[:, None]) & (o_n[None, :] < b_hi[:, None])
        b_s = tl.where(m_seen, b_s, -float("inf"))
        b_new = tl.maximum(b_peak, tl.max(b_s, axis=1))
        # a row that has seen nothing yet: minus infinity minus itself would be NaN
        b_safe = tl.where(b_new == -float("inf"), 0.0, b_new)
        b_p = tl.exp2(b_s - b_safe[:, None])
        b_decay = tl.exp2(b_peak - b_safe)
        b_total = b_total * b_decay + tl.sum(b_p, axis=1)
        b_v = _load(p_v, o_n, m_n, s_v, WIDTH, BLOCK_D)
        b_acc = b_acc * b_decay[:, None] + _dot(b_p.to(b_v.dtype), b_v, PRECISION)
        b_peak = b_new
    return b_acc, b_peak, b_total


@triton.jit(do_not_specialize=_SIZES)
def _forward_kernel(
    p_q: tl.tensor,
    p_k: tl.tensor,
    p_v: tl.tensor,
    p_prefix_k: tl.tensor,
    p_prefix_v: tl.tensor,
    p_rows: tl.tensor,
    p_out: tl.tensor,
    p_lse: tl.tensor,
    s_q: tl.tensor,
    s_q_head: tl.tensor,
    s_k: tl.tensor,
    s_k_head: tl.tensor,
    s_v: tl.tensor,
    s_v_head: tl.tensor,
    s_prefix_k: tl.tensor,
    s_prefix_k_head: tl.tensor,
    s_prefix_v: tl.tensor,
    s_prefix_v_head: tl.tensor,
    n_rows: tl.tensor,
    scale_log2: tl.tensor,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    i_head = tl.program_id(1).to(tl.int64)
    o_m = tl.arange(0, BLOCK_M)
    i_first = tl.program_id(0) * (BLOCK_M // GROUPS)
    o_row = i_first + o_m // GROUPS
    o_head = i_head * GROUPS + o_m % GROUPS
    m_m = (o_m < BLOCK_M // GROUPS * GROUPS) & (o_row < n_rows)
    i_last = tl.minimum(i_first + BLOCK_M // GROUPS, n_rows)

    b_q = _load(p_q + o_head[:, None] * s_q_head, o_row, m_m, s_q, WIDTH, BLOCK_D)
    p_row = p_rows + o_row.to(tl.int64) * 4
    b_begin = tl.load(p_row, mask=m_m, other=0)
    b_lo = tl.load(p_row + 2, mask=m_m, other=0)
    b_hi = tl.load(p_row + 3, mask=m_m, other=0)
    b_acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    b_peak = tl.full([BLOCK_M], -float("inf"), dtype=tl.float32)
    b_total = tl.zeros([BLOCK_M], dtype=tl.float32)

    p_prefix_k += i_head * s_prefix_k_head
    p_prefix_v += i_head * s_prefix_v_head
    b_todo = tl.where(b_hi > b_lo, b_lo, _FAR)
    i_lo = tl.min(b_todo, axis=0)
    while i_lo < _FAR:
        b_end = tl.where(b_todo == i_lo, b_hi, 0)
        b_acc, b_peak, b_total = _attend(
            b_acc,
            b_peak,
            b_total,
            b_q,
            p_prefix_k,
            p_prefix_v,
            s_prefix_k,
            s_prefix_v,
            i_lo,
            tl.max(b_end, axis=0),
            b_lo,
            b_end,
            scale_log2,
            WIDTH,
            BLOCK_N,
            BLOCK_D,
            PRECISION,
        )
        b_todo = tl.where(b_todo == i_lo, _FAR, b_todo)
        i_lo = tl.min(b_todo, axis=0)

    b_acc, b_peak, b_total = _attend(
        b_acc,
        b_peak,
        b_total,
        b_q,
        p_k + i_head * s_k_head,
        p_v + i_head * s_v_head,
        s_k,
        s_v,
        tl.min(tl.where(m_m, b_begin, _FAR), axis=0),
        i_last,
        b_begin,
        tl.where(m_m, o_row + 1, 0),
        scale_log2,
        WIDTH,
        BLOCK_N,
        BLOCK_D,
        PRECISION,
    )

    b_total = tl.where(m_m, b_total, 1.0)
    b_peak = tl.where(m_m, b_peak, 0.0)
    o_out = o_row.to(tl.int64) * HEADS + o_head
    o_d = tl.arange(0, BLOCK_D)
    m_out = m_m[:, None] & (o_d < WIDTH)[None, :]
    tl.store(
        p_out + o_out[:, None] * WIDTH + o_d[None, :], (b_acc / b_total[:, None]).to(p_out.dtype.element_ty), m_out
    )
    tl.store(p_lse + o_out, (b_peak + tl.log2(b_total)) / _LOG2E, mask=m_m)


@triton.jit
def _query_gradient(
    b_acc: tl.tensor,
    b_q: tl.tensor,
    b_do: tl.tensor,
    b_lse: tl.tensor,
    b_balance: tl.tensor,
    p_k: tl.tensor,
    p_v: tl.tensor,
    s_k: tl.tensor,
    s_v: tl.tensor,
    i_begin: tl.tensor,
    i_end: tl.tensor,
    b_lo: tl.tensor,
    b_hi: tl.tensor,
    scale_log2: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """What keys ``i_begin..i_end - 1`` give to the gradient of the queries, unscaled."""
    for i_n in range(i_begin, i_end, BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N)
        m_n = o_n < i_end
        # [BLOCK_M, BLOCK_N]
        b_k = _load(p_k, o_n, m_n, s_k, WIDTH, BLOCK_D)
        b_s = _dot(b_q, tl.trans(b_k), PRECISION) * scale_log2
        m_seen = (o_n[None, :] >= b_lo[:, None]) & (o_n[None, :] < b_hi[:, None])
        b_p = tl.exp2(tl.where(m_seen, b_s - b_lse[:, None], -float("inf")))
        b_v = _load(p_v, o_n, m_n, s_v, WIDTH, BLOCK_D)
        b_ds = b_p * (_dot(b_do, tl.trans(b_v), PRECISION) - b_balance[:, None])
        b_acc += _dot(b_ds.to(b_k.dtype), b_k, PRECISION)
    return b_acc


@triton.jit(do_not_specialize=_SIZES)
def _query_gradient_kernel(
    p_q: tl.tensor,
    p_k: tl.tensor,
    p_v: tl.tensor,
    p_prefix_k: tl.tensor,
    p_prefix_v: tl.tensor,
    p_rows: tl.tensor,
    p_out: tl.tensor,
    p_lse: tl.tensor,
    p_do: tl.tensor,
    p_balance: tl.tensor,
    p_dq: tl.tensor,
    s_q: tl.tensor,
    s_q_head: tl.tensor,
    s_k: tl.tensor,
    s_k_head: tl.tensor,
    s_v: tl.tensor,
    s_v_head: tl.tensor,
    s_prefix_k: tl.tensor,
    s_prefix_k_head: tl.tensor,
    s_prefix_v: tl.tensor,
    s_prefix_v_head: tl.tensor,
    n_rows: tl.tensor,
    scale_log2: tl.tensor,
    scale: tl.tensor,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Also writes every row's ``balance``, the product of output and its gradient, for the key gradient's kernel."""
    i_head = tl.program_id(1).to(tl.int64)
    o_m = tl.arange(0, BLOCK_M)
    i_first = tl.program_id(0) * (BLOCK_M // GROUPS)
    o_row = i_first + o_m // GROUPS
    o_head = i_head * GROUPS + o_m % GROUPS
    m_m = (o_m < BLOCK_M // GROUPS * GROUPS) & (o_row < n_rows)
    i_last = tl.minimum(i_first + BLOCK_M // GROUPS, n_rows)

    o_out = o_row.to(tl.int64) * HEADS + o_head
    b_q = _load(p_q + o_head[:, None] * s_q_head, o_row, m_m, s_q, WIDTH, BLOCK_D)
    b_do = _load(p_do, o_out, m_m, WIDTH, WIDTH, BLOCK_D)
    b_out = _load(p_out, o_out, m_m, WIDTH, WIDTH, BLOCK_D)
    b_balance = tl.sum(b_do.to(tl.float32) * b_out.to(tl.float32), axis=1)
    tl.store(p_balance + o_out, b_balance, mask=m_m)
    b_lse = tl.load(p_lse + o_out, mask=m_m, other=0.0) * _LOG2E
    p_row = p_rows + o_row.to(tl.int64) * 4
    b_begin = tl.load(p_row, mask=m_m, other=0)
    b_lo = tl.load(p_row + 2, mask=m_m, other=0)
    b_hi = tl.load(p_row + 3, mask=m_m, other=0)
    b_acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)

    p_prefix_k += i_head * s_prefix_k_head
    p_prefix_v += i_head * s_prefix_v_head
    b_todo = tl.where(b_hi > b_lo, b_lo, _FAR)
    i_lo = tl.min(b_todo, axis=0)
    while i_lo < _FAR:
        b_end = tl.where(b_todo == i_lo, b_hi, 0)
        b_acc = _query_gradient(
            b_acc,
            b_q,
            b_do,
            b_lse,
            b_balance,
            p_prefix_k,
            p_prefix_v,
            s_prefix_k,
            s_prefix_v,
            i_lo,
            tl.max(b_end, axis=0),
            b_lo,
            b_end,
            scale_log2,
            WIDTH,
            BLOCK_N,
            BLOCK_D,
            PRECISION,
        )
        b_todo = tl.where(b_todo == i_lo, _FAR, b_todo)
        i_lo = tl.min(b_todo, axis=0)

    b_acc = _query_gradient(
        b_acc,
        b_q,
        b_do,
        b_lse,
        b_balance,
        p_k + i_head * s_k_head,
        p_v + i_head * s_v_head,
        s_k,
        s_v,
        tl.min(tl.where(m_m, b_begin, _FAR), axis=0),
        i_last,
        b_begin,
        tl.where(m_m, o_row + 1, 0),
        scale_log2,
        WIDTH,
        BLOCK_N,
        BLOCK_D,
        PRECISION,
    )

    o_d = tl.arange(0, BLOCK_D)
    m_out = m_m[:, None] & (o_d < WIDTH)[None, :]
    tl.store(p_dq + o_out[:, None] * WIDTH + o_d[None, :], (b_acc * scale).to(p_dq.dtype.element_ty), m_out)


@triton.jit
def _key_gradient(
    b_dk: tl.tensor,
    b_dv: tl.tensor,
    b_k: tl.tensor,
    b_v: tl.tensor,
    o_n: tl.tensor,
    i_begin: tl.tensor,
    i_end: tl.tensor,
    i_head: tl.tensor,
    p_q: tl.tensor,
    p_do: tl.tensor,
    p_lse: tl.tensor,
    p_balance: tl.tensor,
    p_rows: tl.tensor,
    s_q: tl.tensor,
    s_q_head: tl.tensor,
    scale_log2: tl.tensor,
    OWN: tl.constexpr,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """What query rows ``i_begin..i_end - 1`` give to the gradients of a block of keys and values.

    The keys are the rows' own (``OWN``) or those of their prefixes.
    """
    o_m = tl.arange(0, BLOCK_M)
    for i_first in range(i_begin, i_end, BLOCK_M // GROUPS):
        o_row = i_first + o_m // GROUPS
        o_head = i_head * GROUPS + o_m % GROUPS
        m_m = (o_m < BLOCK_M // GROUPS * GROUPS) & (o_row < i_end)
        p_row = p_rows + o_row.to(tl.int64) * 4
        if OWN:
            b_lo = tl.load(p_row, mask=m_m, other=0)
            b_hi = tl.where(m_m, o_row + 1, 0)
        else:
            b_lo = tl.load(p_row + 2, mask=m_m, other=0)
            b_hi = tl.load(p_row + 3, mask=m_m, other=0)
        o_out = o_row.to(tl.int64) * HEADS + o_head
        b_lse = tl.load(p_lse + o_out, mask=m_m, other=0.0) * _LOG2E
        b_balance = tl.load(p_balance + o_out, mask=m_m, other=0.0)
        b_q = _load(p_q + o_head[:, None] * s_q_head, o_row, m_m, s_q, WIDTH, BLOCK_D)
        b_do = _load(p_do, o_out, m_m, WIDTH, WIDTH, BLOCK_D)
        # [BLOCK_N, BLOCK_M]
        b_s = _dot(b_k, tl.trans(b_q), PRECISION) * scale_log2
        m_seen = (o_n[:, None] >= b_lo[None, :]) & (o_n[:, None] < b_hi[None, :])
        b_p = tl.exp2(tl.where(m_seen, b_s - b_lse[None, :], -float("inf")))
        b_dv += _dot(b_p.to(b_do.dtype), b_do, PRECISION)
        b_ds = b_p * (_dot(b_v, tl.trans(b_do), PRECISION) - b_balance[None, :])
        b_dk += _dot(b_ds.to(b_q.dtype), b_q, PRECISION)
    return b_dk, b_dv


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=["p_cu_seqlens", "p_prefix"])
def _key_gradient_kernel(
    p_q: tl.tensor,
    p_k: tl.tensor,
    p_v: tl.tensor,
    p_do: tl.tensor,
    p_lse: tl.tensor,
    p_balance: tl.tensor,
    p_rows: tl.tensor,
    p_cu_seqlens: tl.tensor,
    p_prefix: tl.tensor,
    p_dk: tl.tensor,
    p_dv: tl.tensor,
    s_q: tl.tensor,
    s_q_head: tl.tensor,
    s_k: tl.tensor,
    s_k_head: tl.tensor,
    s_v: tl.tensor,
    s_v_head: tl.tensor,
    n_rows: tl.tensor,
    n_spans: tl.tensor,
    scale_log2: tl.tensor,
    scale: tl.tensor,
    OWN: tl.constexpr,
    PREFIX: tl.constexpr,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Keys that rows see as their own (``OWN``), as a prefix (``PREFIX``), or both; ``n_rows`` counts keys."""
    i_head = tl.program_id(1).to(tl.int64)
    i_n = tl.program_id(0) * BLOCK_N
    o_n = i_n + tl.arange(0, BLOCK_N)
    m_n = o_n < n_rows
    i_end = tl.minimum(i_n + BLOCK_N, n_rows)
    b_k = _load(p_k + i_head * s_k_head, o_n, m_n, s_k, WIDTH, BLOCK_D)
    b_v = _load(p_v + i_head * s_v_head, o_n, m_n, s_v, WIDTH, BLOCK_D)
    b_dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    b_dv = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    if OWN:
        # the last key's span ends after all rows that see any of the block
        i_until = tl.load(p_rows + (i_end - 1).to(tl.int64) * 4 + 1)
        b_dk, b_dv = _key_gradient(
            b_dk,
            b_dv,
            b_k,
            b_v,
            o_n,
            i_n,
            i_until,
            i_head,
            p_q,
            p_do,
            p_lse,
            p_balance,
            p_rows,
            s_q,
            s_q_head,
            scale_log2,
            True,
            HEADS,
            GROUPS,
            WIDTH,
            BLOCK_M,
            BLOCK_D,
            PRECISION,
        )
    if PREFIX:
        i_from = _FAR + 0 * i_n
        i_until = 0 * i_n
        for i_span in range(0, n_spans, _SPANS):
            o_span = i_span + tl.arange(0, _SPANS)
            m_span = o_span < n_spans
            b_lo = tl.load(p_prefix + o_span.to(tl.int64) * 2, mask=m_span, other=0)
            b_hi = tl.load(p_prefix + o_span.to(tl.int64) * 2 + 1, mask=m_span, other=0)
            b_begin = tl.load(p_cu_seqlens + o_span, mask=m_span, other=0)
            b_until = tl.load(p_cu_seqlens + o_span + 1, mask=m_span, other=0)
            m_sees = (tl.maximum(b_lo, i_n) < tl.minimum(b_hi, i_end)) & (b_begin < b_until)
            i_from = tl.minimum(i_from, tl.min(tl.where(m_sees, b_begin, _FAR), axis=0))
            i_until = tl.maximum(i_until, tl.max(tl.where(m_sees, b_until, 0), axis=0))
        b_dk, b_dv = _key_gradient(
            b_dk,
            b_dv,
            b_k,
            b_v,
            o_n,
            i_from,
            i_until,
            i_head,
            p_q,
            p_do,
            p_lse,
            p_balance,
            p_rows,
            s_q,
            s_q_head,
            scale_log2,
            False,
            HEADS,
            GROUPS,
            WIDTH,
            BLOCK_M,
            BLOCK_D,
            PRECISION,
        )
    o_out = o_n.to(tl.int64) * (HEADS // GROUPS) + i_head
    o_d = tl.arange(0, BLOCK_D)
    o_store = o_out[:, None] * WIDTH + o_d[None, :]
    m_store = m_n[:, None] & (o_d < WIDTH)[None, :]
    tl.store(p_dk + o_store, (b_dk * scale).to(p_dk.dtype.element_ty), mask=m_store)
    tl.store(p_dv + o_store, b_dv.to(p_dv.dtype.element_ty), mask=m_store)


# ------------------------------------------------------------------ launches


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    prefix: Tensor,
    prefix_key: Tensor | None,
    prefix_value: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output (T, H, d), and the log-sum-exp of every row's scores, (T, H) float32, that `backward` starts from."""
    n_rows, n_heads = query.shape[:2]
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = query.new_empty(n_rows, n_heads, dtype=torch.float32)
    if n_rows == 0:
        return out, lse
    stored = (key, value) if prefix_key is None or prefix_value is None else (prefix_key, prefix_value)
    groups = n_heads // key.shape[1]
    constants = _constants(query, groups, _forward_blocks)
    query, key, value = _readable(query), _readable(key), _readable(value)
    seen_key, seen_value = map(_readable, stored)
    with torch.cuda.device_of(query):
        rows = _rows(cu_seqlens, prefix, n_rows)
        _forward_kernel[_grid(n_rows, constants["BLOCK_M"] // groups, key)](
            *(query, key, value, seen_key, seen_value, rows, out, lse),
            *(x.stride(dim) for x in (query, key, value, seen_key, seen_value) for dim in (0, 1)),
            n_rows,
            scale * _LOG2E.value,
            **constants,
        )
    return out, lse


def backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    prefix: Tensor,
    prefix_key: Tensor | None,
    prefix_value: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, prefix_key and prefix_value; of the last two without rows where they are None."""
    stored = (key, value) if prefix_key is None or prefix_value is None else (prefix_key, prefix_value)
    separate = prefix_key is not None
    n_rows, n_heads = query.shape[:2]
    groups = n_heads // key.shape[1]
    query, key, value = _readable(query), _readable(key), _readable(value)
    seen_key, seen_value = map(_readable, stored)
    grad_query, grad_key, grad_value = (query.new_empty(x.shape) for x in (query, key, value))
    grad_seen_key, grad_seen_value = (query.new_empty(x.shape if separate else 0) for x in stored)
    grads = (grad_query, grad_key, grad_value, grad_seen_key, grad_seen_value)
    if n_rows == 0:
        for grad in grads:
            grad.zero_()
        return grads
    grad_out, balance, scale_log2 = grad_out.contiguous(), torch.empty_like(lse), scale * _LOG2E.value
    with torch.cuda.device_of(query):
        rows = _rows(cu_seqlens, prefix, n_rows)
        constants = _constants(query, groups, _query_gradient_blocks)
        _query_gradient_kernel[_grid(n_rows, constants["BLOCK_M"] // groups, key)](
            *(query, key, value, seen_key, seen_value, rows, out, lse, grad_out, balance, grad_query),
            *(x.stride(dim) for x in (query, key, value, seen_key, seen_value) for dim in (0, 1)),
            n_rows,
            scale_log2,
            scale,
            **constants,
        )
        sides = [(key, value, grad_key, grad_value, True, not separate)]
        if separate and seen_key.shape[0]:
            sides.append((seen_key, seen_value, grad_seen_key, grad_seen_value, False, True))
        constants = _constants(query, groups, _key_gradient_blocks)
        for k, v, grad_k, grad_v, is_own, is_prefix in sides:
            _key_gradient_kernel[_grid(k.shape[0], constants["BLOCK_N"], k)](
                *(query, k, v, grad_out, lse, balance, rows, cu_seqlens, prefix, grad_k, grad_v),
                *(x.stride(dim) for x in (query, k, v) for dim in (0, 1)),
                k.shape[0],
                prefix.shape[0],
                scale_log2,
                scale,
                is_own,
                is_prefix,
                **constants,
            )
    return grads


def _rows(cu_seqlens: Tensor, prefix: Tensor, n_rows: int) -> Tensor:
    rows = cu_seqlens.new_empty(n_rows, 4)
    block = 256
    grid = (triton.cdiv(n_rows, block),)
    _rows_kernel[grid](cu_seqlens, prefix.contiguous(), rows, n_rows, prefix.shape[0], block)
    return rows


def _readable(rows: Tensor) -> Tensor:
    """Heads are read as contiguous vectors; rows and heads may lie at any stride."""
    return rows if rows.stride(2) == 1 or rows.shape[2] == 1 else rows.contiguous()


def _precision(dtype: torch.dtype) -> str:
    """Of `tl.dot`. float32 is multiplied as three products of tf32, which keep all its digits but the last or two."""
    if dtype == torch.bfloat16 and triton.knobs.runtime.interpret:
        return "interpreted"
    return "tf32x3" if dtype == torch.float32 else "tf32"


def _constants(query: Tensor, groups: int, table: Callable[[int, int], Blocks]) -> dict[str, Any]:
    width = max(triton.next_power_of_2(query.shape[2]), 16)
    blocks = table(width, query.itemsize)
    return {
        "HEADS": query.shape[1],
        "GROUPS": groups,
        "WIDTH": query.shape[2],
        "BLOCK_M": max(blocks.queries, triton.next_power_of_2(groups)),
        "BLOCK_N": blocks.keys,
        "BLOCK_D": width,
        "PRECISION": _precision(query.dtype),
        "num_warps": blocks.warps,
        "num_stages": blocks.stages,
    }


def _grid(n_rows: int, block: int, key: Tensor) -> tuple[int, int]:
    return triton.cdiv(n_rows, block), key.shape[1]
