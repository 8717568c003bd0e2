# SPDX-License-Identifier: Apache-2.0
"""The forward kernel of `span_attention` in Triton, and what the gradients' kernels share with it.

Names follow flash-linear-attention: ``i_`` an index, ``o_`` a vector of indices, ``m_`` a mask, ``p_`` a pointer,
``s_`` a stride, ``b_`` a loaded block. Addresses are computed in int64.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
FAR = tl.constexpr(2**31 - 1)
SIZES = ["n_rows", "n_spans"]
INTEGERS = ["p_cu_seqlens", "p_prefix"]


@triton.jit
def span_of(p_cu_seqlens: tl.tensor, n_spans: tl.tensor, o_row: tl.tensor, m_row: tl.tensor) -> tl.tensor:
    """The last span that begins at or before each row: an empty span begins where the next one does."""
    b_low = tl.zeros_like(o_row)
    b_high = b_low + n_spans
    i_left = n_spans
    while i_left > 0:
        b_middle = (b_low + b_high) // 2
        m_after = tl.load(p_cu_seqlens + b_middle, mask=m_row, other=0) <= o_row
        m_open = b_high - b_low > 1
        b_low = tl.where(m_open & m_after, b_middle, b_low)
        b_high = tl.where(m_open & ~m_after, b_middle, b_high)
        i_left = i_left // 2
    return b_low


@triton.jit
def dot(b_a: tl.tensor, b_b: tl.tensor, PRECISION: tl.constexpr) -> tl.tensor:
    """Product in float32; "interpreted" because Triton's interpreter would multiply the bits of bfloat16."""
    if PRECISION == "interpreted":
        return tl.dot(b_a.to(tl.float32), b_b.to(tl.float32))
    return tl.dot(b_a, b_b, input_precision=PRECISION)


@triton.jit
def load_rows(
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
    factor: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    ACTIVATION: tl.constexpr,
) -> tl.tensor:
    """Stream keys ``i_begin..i_end - 1`` past the queries; row m sees ``b_lo[m]..b_hi[m] - 1``.

    Of "silu" the peaks and totals stay what they are.
    """
    for i_n in range(i_begin, i_end, BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N)
        m_n = o_n < i_end
        # [BLOCK_M, BLOCK_N]
        b_k = load_rows(p_k, o_n, m_n, s_k, WIDTH, BLOCK_D)
        b_s = dot(b_q, tl.trans(b_k), PRECISION) * factor
        m_seen = (o_n[None, :] >= b_lo[:, None]) & (o_n[None, :] < b_hi[:, None])
        if ACTIVATION == "silu":
            b_p = tl.where(m_seen, b_s * tl.sigmoid(b_s), 0.0)
        else:
            b_s = tl.where(m_seen, b_s, -float("inf"))
            b_new = tl.maximum(b_peak, tl.max(b_s, axis=1))
            # a row that has seen nothing yet: minus infinity minus itself would be NaN
            b_safe = tl.where(b_new == -float("inf"), 0.0, b_new)
            b_p = tl.exp2(b_s - b_safe[:, None])
            b_decay = tl.exp2(b_peak - b_safe)
            b_total = b_total * b_decay + tl.sum(b_p, axis=1)
            b_peak = b_new
        b_v = load_rows(p_v, o_n, m_n, s_v, WIDTH, BLOCK_D)
        if ACTIVATION == "softmax":
            b_acc = b_acc * b_decay[:, None]
        b_acc += dot(b_p.to(b_v.dtype), b_v, PRECISION)
    return b_acc, b_peak, b_total


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=INTEGERS)
def forward_kernel(
    p_q: tl.tensor,
    p_k: tl.tensor,
    p_v: tl.tensor,
    p_prefix_k: tl.tensor,
    p_prefix_v: tl.tensor,
    p_cu_seqlens: tl.tensor,
    p_prefix: tl.tensor,
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
    n_spans: tl.tensor,
    factor: tl.tensor,
    normalizer: tl.tensor,
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
    i_head = tl.program_id(1).to(tl.int64)
    o_m = tl.arange(0, BLOCK_M)
    i_first = tl.program_id(0) * (BLOCK_M // GROUPS)
    o_row = i_first + o_m // GROUPS
    o_head = i_head * GROUPS + o_m % GROUPS
    m_m = (o_m < BLOCK_M // GROUPS * GROUPS) & (o_row < n_rows)
    i_last = tl.minimum(i_first + BLOCK_M // GROUPS, n_rows)

    b_q = load_rows(p_q + o_head[:, None] * s_q_head, o_row, m_m, s_q, WIDTH, BLOCK_D)
    b_span = span_of(p_cu_seqlens, n_spans, o_row, m_m)
    b_begin = tl.load(p_cu_seqlens + b_span, mask=m_m, other=0)
    p_range = p_prefix + b_span.to(tl.int64) * (2 * RANGES)
    b_acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    b_peak = tl.full([BLOCK_M], -float("inf"), dtype=tl.float32)
    b_total = tl.zeros([BLOCK_M], dtype=tl.float32)

    p_prefix_k += i_head * s_prefix_k_head
    p_prefix_v += i_head * s_prefix_v_head
    for i_range in range(RANGES):
        b_lo = tl.load(p_range + 2 * i_range, mask=m_m, other=0)
        b_hi = tl.load(p_range + 2 * i_range + 1, mask=m_m, other=0)
        b_todo = tl.where(b_hi > b_lo, b_lo, FAR)
        i_lo = tl.min(b_todo, axis=0)
        while i_lo < FAR:
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
                factor,
                WIDTH,
                BLOCK_N,
                BLOCK_D,
                PRECISION,
                ACTIVATION,
            )
            b_todo = tl.where(b_todo == i_lo, FAR, b_todo)
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

    o_out = o_row.to(tl.int64) * HEADS + o_head
    o_d = tl.arange(0, BLOCK_D)
    m_out = m_m[:, None] & (o_d < WIDTH)[None, :]
    if ACTIVATION == "silu":
        b_total = tl.zeros([BLOCK_M], dtype=tl.float32) + normalizer
    b_total = tl.where(m_m, b_total, 1.0)
    tl.store(
        p_out + o_out[:, None] * WIDTH + o_d[None, :], (b_acc / b_total[:, None]).to(p_out.dtype.element_ty), m_out
    )
    if ACTIVATION == "softmax":
        b_peak = tl.where(m_m, b_peak, 0.0)
        tl.store(p_lse + o_out, (b_peak + tl.log2(b_total)) / LOG2E, mask=m_m)
