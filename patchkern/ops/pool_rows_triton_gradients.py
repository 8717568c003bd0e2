# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""The gradient's kernels of `pool_rows` in Triton. Names are as in the forward kernel's module."""

from __future__ import annotations

import triton
import triton.language as tl

from patchkern.ops.pool_rows_triton_forward import negative_zero, row_block


@triton.jit
def _share_block(grad_rows, rows, divisors, o_c, m_c, grad_stride, o_d, m_d, VEC: tl.constexpr):
    """What contributions ``o_c`` add to their tokens, ``[len(o_c), len(o_d)]``; -0.0 where masked."""
    b_row = tl.load(rows + o_c, mask=m_c, other=0)
    b_divisor = tl.load(divisors + o_c, mask=m_c, other=1)
    b_share = tl.div_rn(1.0, b_divisor.to(tl.float32))
    return row_block(grad_rows, b_row, grad_stride, o_d, m_c, m_d, VEC) * b_share[:, None]


@triton.jit
def _run_end(token_offsets, i_token, n_tokens):
    """Where the token's contributions end; past all of them for the token after the last."""
    return tl.load(token_offsets + i_token + 1, mask=i_token < n_tokens, other=2147483647).to(tl.int64)


@triton.jit
def _store_gradient(
    b_sum,
    i_token,
    tokens,
    out,
    scale,
    out_stride,
    o_d,
    m_d,
    VEC: tl.constexpr,
    SCATTER: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    i_out = i_token
    if SCATTER:
        i_out = tl.load(tokens + i_token)
    p_out = out + i_out.to(tl.int64) * out_stride * VEC + o_d
    b_out = b_sum * scale
    if ACCUMULATE:
        b_out += tl.load(p_out, mask=m_d, other=negative_zero()).to(tl.float32)
    tl.store(p_out, b_out.to(out.dtype.element_ty), mask=m_d)


@triton.jit(
    do_not_specialize=["n_tokens", "n_contributions", "scale", "grad_stride", "out_stride"],
    do_not_specialize_on_alignment=["tokens", "token_offsets", "rows", "divisors"],
)
def tile_sums_kernel(
    grad_rows,
    tokens,
    token_offsets,
    rows,
    divisors,
    out,
    parts,
    cut_tokens,
    n_tokens,
    n_contributions,
    scale,
    grad_stride,
    out_stride,
    D: tl.constexpr,
    VEC: tl.constexpr,
    SCATTER: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    TILE: tl.constexpr,
    SLOTS: tl.constexpr,
    FANOUT: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The tokens whose runs of contributions begin in tile ``program_id(0)``, x ``BLOCK_D`` columns.

    A run that ends in its first tile or in the next one is summed here whole. A longer one is cut at the tiles'
    borders: each of its tiles leaves a float32 sum in ``parts`` (row ``2 * tile + 1`` in its first tile, ``2 * tile``
    in the others), its first tile its token in ``cut_tokens``, and `cut_sums_kernel` adds them up. So no program sums
    more than ``2 * TILE`` contributions, however often a token occurs.

    Beyond the budget: one float32 row written and read per ``TILE`` gradient rows of a long run, at most 2 x 2 / 64 = 6
    % of a 16-bit gradient's bytes, and a search in ``token_offsets``, two or three dependent reads per program.
    """
    i_tile = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    i_begin = i_tile * TILE
    i_end = tl.minimum(i_begin + TILE, n_contributions)

    # the token whose run holds contribution i_begin: the last one that does not begin after it
    i_token = tl.full([], 0, tl.int32)
    i_after = n_tokens
    while i_after - i_token > 1:
        i_step = (i_after - i_token + FANOUT - 1) // FANOUT
        o_token = i_token + tl.arange(0, FANOUT) * i_step
        b_offset = tl.load(token_offsets + o_token, mask=o_token < i_after, other=2147483647)
        i_token += (tl.sum((b_offset <= i_begin).to(tl.int32), 0) - 1) * i_step
        i_after = tl.minimum(i_token + i_step, i_after)
    i_from = tl.load(token_offsets + i_token).to(tl.int64)
    i_to = _run_end(token_offsets, i_token, n_tokens)
    if (i_from < i_begin) & (i_from >= i_begin - TILE) & (i_to <= i_begin + TILE):
        # the previous tile sums it
        i_token += 1
        i_from = i_to
        i_to = _run_end(token_offsets, i_token, n_tokens)

    # [BLOCK_D]: the run at work, as far as it has been read
    b_sum = tl.full([BLOCK_D], negative_zero(), tl.float32)
    for i in range(tl.maximum(i_begin, i_from), i_end, SLOTS):
        # [SLOTS, BLOCK_D]
        o_c = i + tl.arange(0, SLOTS)
        b_x = _share_block(grad_rows, rows, divisors, o_c, o_c < i_end, grad_stride, o_d, m_d, VEC)
        while i_to <= tl.minimum(i + SLOTS, i_end):
            m_run = (o_c >= i_from) & (o_c < i_to)
            b_sum += tl.sum(tl.where(m_run[:, None], b_x, negative_zero()), 0)
            if i_from < i_begin:
                tl.store(parts + 2 * i_tile * D + o_d, b_sum, mask=m_d)
            else:
                _store_gradient(b_sum, i_token, tokens, out, scale, out_stride, o_d, m_d, VEC, SCATTER, ACCUMULATE)
            b_sum = tl.full([BLOCK_D], negative_zero(), tl.float32)
            i_token += 1
            i_from = i_to
            i_to = _run_end(token_offsets, i_token, n_tokens)
        b_sum += tl.sum(tl.where((o_c >= i_from)[:, None], b_x, negative_zero()), 0)

    i_cut = tl.full([], -1, tl.int32)
    if i_from < i_end:
        if i_from < i_begin:
            tl.store(parts + 2 * i_tile * D + o_d, b_sum, mask=m_d)
        elif i_to > i_begin + 2 * TILE:
            i_cut = i_token
            tl.store(parts + (2 * i_tile + 1) * D + o_d, b_sum, mask=m_d)
        else:
            for i in range(i_end, i_to, SLOTS):
                o_c = i + tl.arange(0, SLOTS)
                b_x = _share_block(grad_rows, rows, divisors, o_c, o_c < i_to, grad_stride, o_d, m_d, VEC)
                b_sum += tl.sum(b_x, 0)
            _store_gradient(b_sum, i_token, tokens, out, scale, out_stride, o_d, m_d, VEC, SCATTER, ACCUMULATE)
    if tl.program_id(1) == 0:
        tl.store(cut_tokens + i_tile, i_cut)


@triton.jit(
    do_not_specialize=["scale", "out_stride"],
    do_not_specialize_on_alignment=["tokens", "token_offsets"],
)
def cut_sums_kernel(
    parts,
    cut_tokens,
    tokens,
    token_offsets,
    out,
    scale,
    out_stride,
    D: tl.constexpr,
    VEC: tl.constexpr,
    SCATTER: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    TILE: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The token whose cut run begins in tile ``program_id(0)``, if there is one: its parts, ``SLOTS`` at a time."""
    i_tile = tl.program_id(0).to(tl.int64)
    i_token = tl.load(cut_tokens + i_tile)
    if i_token >= 0:
        o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        m_d = o_d < D
        i_last = (tl.load(token_offsets + i_token + 1).to(tl.int64) - 1) // TILE
        b_sum = tl.full([BLOCK_D], negative_zero(), tl.float32)
        for i in range(i_tile, i_last + 1, SLOTS):
            # [SLOTS, BLOCK_D]
            o_tile = i + tl.arange(0, SLOTS)
            o_part = 2 * o_tile + (o_tile == i_tile).to(tl.int64)
            b_sum += tl.sum(row_block(parts, o_part, D, o_d, o_tile <= i_last, m_d, 1), 0)
        _store_gradient(b_sum, i_token, tokens, out, scale, out_stride, o_d, m_d, VEC, SCATTER, ACCUMULATE)
