# SPDX-License-Identifier: Apache-2.0
"""The kernels of `span_attention`'s gradients in Triton; names as in the forward kernel's module."""

from __future__ import annotations

import triton
import triton.language as tl

from patchkern.ops.span_attention_triton_forward import FAR, INTEGERS, LOG2E, SIZES, dot, load_rows, span_of

_SPANS = tl.constexpr(128)  # spans that the key gradient's search for its rows reads at once


@triton.jit
def _silu_slope(b_s: tl.tensor) -> tl.tensor:
    b_gate = tl.sigmoid(b_s)
    return b_gate * (1.0 + b_s * (1.0 - b_gate))


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
    factor: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    ACTIVATION: tl.constexpr,
) -> tl.tensor:
    """What keys ``i_begin..i_end - 1`` give to the gradient of the queries, unscaled."""
    for i_n in range(i_begin, i_end, BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N)
        m_n = o_n < i_end
        # [BLOCK_M, BLOCK_N]
        b_k = load_rows(p_k, o_n, m_n, s_k, WIDTH, BLOCK_D)
        b_s = dot(b_q, tl.trans(b_k), PRECISION) * factor
        m_seen = (o_n[None, :] >= b_lo[:, None]) & (o_n[None, :] < b_hi[:, None])
        b_v = load_rows(p_v, o_n, m_n, s_v, WIDTH, BLOCK_D)
        b_dp = dot(b_do, tl.trans(b_v), PRECISION)
        if ACTIVATION == "silu":
            b_ds = tl.where(m_seen, b_dp * _silu_slope(b_s), 0.0)
        else:
            b_p = tl.exp2(tl.where(m_seen, b_s - b_lse[:, None], -float("inf")))
            b_ds = b_p * (b_dp - b_balance[:, None])
        b_acc += dot(b_ds.to(b_k.dtype), b_k, PRECISION)
    return b_acc


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=INTEGERS)
def query_gradient_kernel(
    p_q: tl.tensor,
    p_k: tl.tensor,
    p_v: tl.tensor,
    p_prefix_k: tl.tensor,
    p_prefix_v: tl.tensor,
    p_cu_seqlens: tl.tensor,
    p_prefix: tl.tensor,
    p_out: tl.tensor,
    p_lse: tl.tensor,
    p_do: tl.tensor,
    p_balance: tl.tensor,
    p_rows: tl.tensor,
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
    n_spans: tl.tensor,
    factor: tl.tensor,
    scale: tl.tensor,
    RANGES: tl.constexpr,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    ACTIVATION: tl.constexpr,
) -> None:
    """Writes for the next kernel too: what each row sees and, of softmax, its ``balance`` of output and its gradient.

    The former is (T, 3 + 2 RANGES) int32: begin and end of the row's own keys, then of each of its ranges, and where
    its span ends.
    """
    i_head = tl.program_id(1).to(tl.int64)
    o_m = tl.arange(0, BLOCK_M)
    i_first = tl.program_id(0) * (BLOCK_M // GROUPS)
    o_row = i_first + o_m // GROUPS
    o_head = i_head * GROUPS + o_m % GROUPS
    m_m = (o_m < BLOCK_M // GROUPS * GROUPS) & (o_row < n_rows)
    i_last = tl.minimum(i_first + BLOCK_M // GROUPS, n_rows)

    o_out = o_row.to(tl.int64) * HEADS + o_head
    b_q = load_rows(p_q + o_head[:, None] * s_q_head, o_row, m_m, s_q, WIDTH, BLOCK_D)
    b_do = load_rows(p_do, o_out, m_m, WIDTH, WIDTH, BLOCK_D)
    b_balance = tl.zeros([BLOCK_M], dtype=tl.float32)
    b_lse = tl.zeros([BLOCK_M], dtype=tl.float32)
    if ACTIVATION == "softmax":
        b_out = load_rows(p_out, o_out, m_m, WIDTH, WIDTH, BLOCK_D)
        b_balance = tl.sum(b_do.to(tl.float32) * b_out.to(tl.float32), axis=1)
        tl.store(p_balance + o_out, b_balance, mask=m_m)
        b_lse = tl.load(p_lse + o_out, mask=m_m, other=0.0) * LOG2E
    b_span = span_of(p_cu_seqlens, n_spans, o_row, m_m)
    b_begin = tl.load(p_cu_seqlens + b_span, mask=m_m, other=0)
    p_range = p_prefix + b_span.to(tl.int64) * (2 * RANGES)
    p_row = p_rows + o_row.to(tl.int64) * (3 + 2 * RANGES)
    m_row = m_m & (o_head == 0)
    tl.store(p_row, b_begin, mask=m_row)
    tl.store(p_row + 1, o_row + 1, mask=m_row)
    tl.store(p_row + 2 + 2 * RANGES, tl.load(p_cu_seqlens + b_span + 1, mask=m_row), mask=m_row)
    b_acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)

    p_prefix_k += i_head * s_prefix_k_head
    p_prefix_v += i_head * s_prefix_v_head
    for i_range in range(RANGES):
        b_lo = tl.load(p_range + 2 * i_range, mask=m_m, other=0)
        b_hi = tl.load(p_range + 2 * i_range + 1, mask=m_m, other=0)
        tl.store(p_row + 2 + 2 * i_range, b_lo, mask=m_row)
        tl.store(p_row + 3 + 2 * i_range, b_hi, mask=m_row)
        b_todo = tl.where(b_hi > b_lo, b_lo, FAR)
        i_lo = tl.min(b_todo, axis=0)
        while i_lo < FAR:
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
                factor,
                WIDTH,
                BLOCK_N,
                BLOCK_D,
                PRECISION,
                ACTIVATION,
            )
            b_todo = tl.where(b_todo == i_lo, FAR, b_todo)
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
        tl.min(tl.where(m_m, b_begin, FAR), axis=0),
        i_last,
        b_begin,
        tl.where(m_m, o_row + 1, 0),
        factor,
        WIDTH,
        BLOCK_N,
        BLOCK_D,
        PRECISION,
        ACTIVATION,
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
    i_range: tl.tensor,
    p_q: tl.tensor,
    p_do: tl.tensor,
    p_lse: tl.tensor,
    p_balance: tl.tensor,
    p_rows: tl.tensor,
    s_q: tl.tensor,
    s_q_head: tl.tensor,
    factor: tl.tensor,
    RANGES: tl.constexpr,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    ACTIVATION: tl.constexpr,
) -> tl.tensor:
    """What query rows ``i_begin..i_end - 1`` give to the gradients of a block of keys and values.

    The keys are the rows' own if ``i_range`` is 0, else those of their range ``i_range - 1``.
    """
    o_m = tl.arange(0, BLOCK_M)
    for i_first in range(i_begin, i_end, BLOCK_M // GROUPS):
        o_row = i_first + o_m // GROUPS
        o_head = i_head * GROUPS + o_m % GROUPS
        m_m = (o_m < BLOCK_M // GROUPS * GROUPS) & (o_row < i_end)
        p_bounds = p_rows + o_row.to(tl.int64) * (3 + 2 * RANGES) + 2 * i_range
        b_lo = tl.load(p_bounds, mask=m_m, other=0)
        b_hi = tl.load(p_bounds + 1, mask=m_m, other=0)
        o_out = o_row.to(tl.int64) * HEADS + o_head
        b_q = load_rows(p_q + o_head[:, None] * s_q_head, o_row, m_m, s_q, WIDTH, BLOCK_D)
        b_do = load_rows(p_do, o_out, m_m, WIDTH, WIDTH, BLOCK_D)
        # [BLOCK_N, BLOCK_M]
        b_s = dot(b_k, tl.trans(b_q), PRECISION) * factor
        m_seen = (o_n[:, None] >= b_lo[None, :]) & (o_n[:, None] < b_hi[None, :])
        if ACTIVATION == "silu":
            b_p = tl.where(m_seen, b_s * tl.sigmoid(b_s), 0.0)
            b_dv += dot(b_p.to(b_do.dtype), b_do, PRECISION)
            b_ds = tl.where(m_seen, dot(b_v, tl.trans(b_do), PRECISION) * _silu_slope(b_s), 0.0)
        else:
            b_lse = tl.load(p_lse + o_out, mask=m_m, other=0.0) * LOG2E
            b_balance = tl.load(p_balance + o_out, mask=m_m, other=0.0)
            b_p = tl.exp2(tl.where(m_seen, b_s - b_lse[None, :], -float("inf")))
            b_dv += dot(b_p.to(b_do.dtype), b_do, PRECISION)
            b_ds = b_p * (dot(b_v, tl.trans(b_do), PRECISION) - b_balance[None, :])
        b_dk += dot(b_ds.to(b_q.dtype), b_q, PRECISION)
    return b_dk, b_dv


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=INTEGERS)
def key_gradient_kernel(
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
    factor: tl.tensor,
    scale: tl.tensor,
    normalizer: tl.tensor,
    OWN: tl.constexpr,
    PREFIX: tl.constexpr,
    RANGES: tl.constexpr,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    ACTIVATION: tl.constexpr,
) -> None:
    """Keys that rows see as their own (``OWN``), as a prefix (``PREFIX``), or both; ``n_rows`` counts keys."""
    i_head = tl.program_id(1).to(tl.int64)
    i_n = tl.program_id(0) * BLOCK_N
    o_n = i_n + tl.arange(0, BLOCK_N)
    m_n = o_n < n_rows
    i_end = tl.minimum(i_n + BLOCK_N, n_rows)
    b_k = load_rows(p_k + i_head * s_k_head, o_n, m_n, s_k, WIDTH, BLOCK_D)
    b_v = load_rows(p_v + i_head * s_v_head, o_n, m_n, s_v, WIDTH, BLOCK_D)
    b_dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    b_dv = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    for i_range in range(0 if OWN else 1, RANGES + 1 if PREFIX else 1):
        if i_range == 0:
            # the last key's span ends after all rows that see any of the block
            i_from = i_n
            i_until = tl.load(p_rows + (i_end - 1).to(tl.int64) * (3 + 2 * RANGES) + 2 + 2 * RANGES)
        else:
            p_bounds = p_prefix + 2 * (i_range - 1)
            i_from = FAR + 0 * i_n
            i_until = 0 * i_n
            for i_span in range(0, n_spans, _SPANS):
                o_span = i_span + tl.arange(0, _SPANS)
                m_span = o_span < n_spans
                b_lo = tl.load(p_bounds + o_span.to(tl.int64) * (2 * RANGES), mask=m_span, other=0)
                b_hi = tl.load(p_bounds + o_span.to(tl.int64) * (2 * RANGES) + 1, mask=m_span, other=0)
                b_begin = tl.load(p_cu_seqlens + o_span, mask=m_span, other=0)
                b_until = tl.load(p_cu_seqlens + o_span + 1, mask=m_span, other=0)
                m_sees = (tl.maximum(b_lo, i_n) < tl.minimum(b_hi, i_end)) & (b_begin < b_until)
                i_from = tl.minimum(i_from, tl.min(tl.where(m_sees, b_begin, FAR), axis=0))
                i_until = tl.maximum(i_until, tl.max(tl.where(m_sees, b_until, 0), axis=0))
            # where no span sees the block: a pipeline looks ahead from a loop's begin, and FAR plus a step is negative
            i_from = tl.minimum(i_from, i_until)
        b_dk, b_dv = _key_gradient(
            b_dk,
            b_dv,
            b_k,
            b_v,
            o_n,
            i_from,
            i_until,
            i_head,
            i_range,
            p_q,
            p_do,
            p_lse,
            p_balance,
            p_rows,
            s_q,
            s_q_head,
            factor,
            RANGES,
            HEADS,
            GROUPS,
            WIDTH,
            BLOCK_M,
            BLOCK_D,
            PRECISION,
            ACTIVATION,
        )
    o_out = o_n.to(tl.int64) * (HEADS // GROUPS) + i_head
    o_d = tl.arange(0, BLOCK_D)
    o_store = o_out[:, None] * WIDTH + o_d[None, :]
    m_store = m_n[:, None] & (o_d < WIDTH)[None, :]
    tl.store(p_dk + o_store, (b_dk * scale).to(p_dk.dtype.element_ty), mask=m_store)
    tl.store(p_dv + o_store, (b_dv / normalizer).to(p_dv.dtype.element_ty), mask=m_store)
