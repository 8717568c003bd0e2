# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""The forward kernel of `pool_rows` in Triton, and what the gradient's kernels share with it.

Names: ``i_`` an index, ``o_`` a vector of indices, ``m_`` a mask, ``p_`` a pointer, ``b_`` a block of values, with its
shape above it. Token ids, offsets and row numbers are int32, addresses int64. Row strides count ``VEC`` elements, 16
bytes where all rows are aligned so and one element elsewhere: the compiler then knows that an address is a multiple of
16 bytes without a specialisation on the stride. Sums start from -0.0, and -0.0 stands for what is masked: unlike 0.0 it
changes no number that is added to it.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def negative_zero():
    """-0.0, float32. Where a number is made a tensor, Triton 3.6 and 3.7 take the literal for 0.0."""
    return tl.full([], -(2**31), tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def row_block(rows, b_row, row_stride, o_d, m_row, m_d, VEC: tl.constexpr):
    """Rows ``b_row`` of a matrix, as float32 ``[len(b_row), len(o_d)]``; -0.0 where masked."""
    b_at = b_row.to(tl.int64) * row_stride * VEC
    m_block = m_row[:, None] & m_d[None, :]
    return tl.load(rows + b_at[:, None] + o_d[None, :], mask=m_block, other=negative_zero()).to(tl.float32)


@triton.jit(
    do_not_specialize=["n_rows", "rows", "scale", "weight_stride", "table_stride", "out_stride"],
    do_not_specialize_on_alignment=["lo", "hi", "items", "token_ids", "offsets", "title_index"],
)
def pool_rows_kernel(
    weight,
    lo,
    hi,
    items,
    token_ids,
    offsets,
    table,
    title_index,
    out,
    n_rows,
    rows,
    scale,
    weight_stride,
    table_stride,
    out_stride,
    D: tl.constexpr,
    VEC: tl.constexpr,
    SCALED: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    TITLES: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``rows`` rows, at most ``ROWS``, x ``BLOCK_D`` columns: first all literals at once, then patch by patch.

    A patch's tokens, those of up to ``TITLES`` items in a row, are dealt out to ``SLOTS`` slots that are loaded
    together: short titles fill them up as well as long ones do, and a session of hundreds of items keeps as many loads
    in flight as an item patch. The partial order of the sum depends on the row alone, not on the batch around it.

    Beyond the budget: every column block reads the layout again, from the cache. A patch's tokens are read as often as
    they occur, from the second-level cache for the most part: in the budget's batch with item patches 62 MB beside the
    52 MB that are written, so there the cache and its latency set the pace rather than memory.
    """
    i_row = tl.program_id(0).to(tl.int64) * rows
    i_end = tl.minimum(i_row + rows, n_rows)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D

    # [ROWS, BLOCK_D]; unscaled, a literal is never converted: that would lose the sign of -0.0 and a NaN's payload
    o_row = i_row + tl.arange(0, ROWS)
    b_lo = tl.load(lo + o_row, mask=o_row < i_end, other=0)
    m_literal = (b_lo < 0)[:, None] & m_d[None, :]
    b_from = (-1 - b_lo).to(tl.int64) * weight_stride * VEC
    b_to = o_row * out_stride * VEC
    b_literal = tl.load(weight + b_from[:, None] + o_d[None, :], mask=m_literal)
    if SCALED:
        b_literal = (b_literal.to(tl.float32) * scale).to(out.dtype.element_ty)
    tl.store(out + b_to[:, None] + o_d[None, :], b_literal, mask=m_literal, cache_modifier=".cs")

    for i in range(i_row, i_end):
        i_lo = tl.load(lo + i)
        if i_lo >= 0:
            i_hi = tl.load(hi + i)
            # [BLOCK_D]
            b_sum = tl.full([BLOCK_D], negative_zero(), tl.float32)
            if table is not None:
                for i_item in range(i_lo, i_hi, SLOTS):
                    o_item = i_item + tl.arange(0, SLOTS)
                    m_item = o_item < i_hi
                    b_title = tl.load(items + o_item, mask=m_item, other=0)
                    b_entry = tl.load(title_index + b_title, mask=m_item, other=0)
                    b_sum += tl.sum(row_block(table, b_entry, table_stride, o_d, m_item, m_d, VEC), 0)
            else:
                for i_item in range(i_lo, i_hi, TITLES):
                    # [TITLES]
                    o_item = i_item + tl.arange(0, TITLES)
                    m_item = o_item < i_hi
                    b_title = tl.load(items + o_item, mask=m_item, other=0)
                    b_bos = tl.load(offsets + b_title, mask=m_item, other=0)
                    b_len = tl.load(offsets + b_title + 1, mask=m_item, other=0) - b_bos
                    b_end = tl.cumsum(b_len, 0)
                    b_begin = b_end - b_len
                    b_shift = b_bos - b_begin
                    b_share = tl.div_rn(1.0, tl.maximum(b_len, 1).to(tl.float32))
                    n_tokens = tl.sum(b_len, 0)
                    for i_slot in range(0, n_tokens, SLOTS):
                        # [SLOTS, TITLES]: whose token a slot holds
                        o_slot = i_slot + tl.arange(0, SLOTS)
                        m_slot = o_slot < n_tokens
                        m_owner = (b_begin[None, :] <= o_slot[:, None]) & (o_slot[:, None] < b_end[None, :])
                        b_at = o_slot + tl.sum(tl.where(m_owner, b_shift[None, :], 0), 1)
                        b_weight = tl.sum(tl.where(m_owner, b_share[None, :], 0.0), 1)
                        # [SLOTS, BLOCK_D]
                        b_token = tl.load(token_ids + b_at, mask=m_slot, other=0)
                        b_x = row_block(weight, b_token, weight_stride, o_d, m_slot, m_d, VEC)
                        b_sum += tl.sum(b_x * b_weight[:, None], 0)
            b_mean = b_sum * tl.div_rn(scale, (i_hi - i_lo).to(tl.float32))
            p_out = out + i * out_stride * VEC + o_d
            tl.store(p_out, b_mean.to(out.dtype.element_ty), mask=m_d, cache_modifier=".cs")
