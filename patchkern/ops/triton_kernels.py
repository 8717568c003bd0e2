# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""`pool_rows` in Triton: the portable GPU backend. Needs no build; any GPU that Triton compiles for runs it.

Results are those of `reference`. Nothing here waits for the device, and a kernel is compiled once per width, dtype and
row alignment: what changes from batch to batch takes no part in it. After its first call a launch can be captured in a
CUDA graph. With ``TRITON_INTERPRET=1`` set before triton is imported, the same kernels run on CPU tensors; so they are
tested without a GPU.

Names in the kernels: ``i_`` an index, ``o_`` a vector of indices, ``m_`` a mask, ``p_`` a pointer, ``b_`` a block of
values, with its shape above it. Token ids, offsets and row numbers are int32, addresses int64. Row strides count
``VEC`` elements, 16 bytes where all rows are aligned so and one element elsewhere: the compiler then knows that an
address is a multiple of 16 bytes without a specialisation on the stride. Sums start from -0.0, and -0.0 stands for what
is masked: unlike 0.0 it changes no number that is added to it.

Budget. The least traffic and the time it takes an A100 and an H200, per policy, stand in csrc/pool_rows_fwd.cu and
csrc/pool_rows_bwd.cu; they hold for any kernel. What Triton's add to it is said at each of them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# ------------------------------------------------------------------ forward


@triton.jit
def _row_block(rows, b_row, row_stride, o_d, m_row, m_d, VEC: tl.constexpr):
    """Rows ``b_row`` of a matrix, as float32 ``[len(b_row), len(o_d)]``; -0.0 where masked."""
    b_at = b_row.to(tl.int64) * row_stride * VEC
    return tl.load(rows + b_at[:, None] + o_d[None, :], mask=m_row[:, None] & m_d[None, :], other=-0.0).to(tl.float32)


@triton.jit(
    do_not_specialize=["n_rows", "scale", "weight_stride", "table_stride", "out_stride"],
    do_not_specialize_on_alignment=["lo", "hi", "items", "token_ids", "offsets", "title_index"],
)
def _pool_rows_kernel(
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
    """``ROWS`` rows x ``BLOCK_D`` columns: first all literals at once, then patch by patch.

    A patch's tokens, those of up to ``TITLES`` items in a row, are dealt out to ``SLOTS`` slots that are loaded
    together: short titles fill them up as well as long ones do, and a session of hundreds of items keeps as many loads
    in flight as an item patch. The partial order of the sum depends on the row alone, not on the batch around it.

    Beyond the budget: every column block reads the layout again, from the cache. A patch's tokens are read as often as
    they occur, from the second-level cache for the most part: in the budget's batch with item patches 62 MB beside the
    52 MB that are written, so there the cache and its latency set the pace rather than memory.
    """
    i_row = tl.program_id(0).to(tl.int64) * ROWS
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D

    # [ROWS, BLOCK_D]; unscaled, a literal is never converted: that would lose the sign of -0.0 and a NaN's payload
    o_row = i_row + tl.arange(0, ROWS)
    b_lo = tl.load(lo + o_row, mask=o_row < n_rows, other=0)
    m_literal = (b_lo < 0)[:, None] & m_d[None, :]
    b_from = (-1 - b_lo).to(tl.int64) * weight_stride * VEC
    b_to = o_row * out_stride * VEC
    b_literal = tl.load(weight + b_from[:, None] + o_d[None, :], mask=m_literal)
    if SCALED:
        b_literal = (b_literal.to(tl.float32) * scale).to(out.dtype.element_ty)
    tl.store(out + b_to[:, None] + o_d[None, :], b_literal, mask=m_literal, cache_modifier=".cs")

    for i in range(i_row, tl.minimum(i_row + ROWS, n_rows)):
        i_lo = tl.load(lo + i)
        if i_lo >= 0:
            i_hi = tl.load(hi + i)
            # [BLOCK_D]
            b_sum = tl.full([BLOCK_D], -0.0, tl.float32)
            if table is not None:
                for i_item in range(i_lo, i_hi, SLOTS):
                    o_item = i_item + tl.arange(0, SLOTS)
                    m_item = o_item < i_hi
                    b_title = tl.load(items + o_item, mask=m_item, other=0)
                    b_entry = tl.load(title_index + b_title, mask=m_item, other=0)
                    b_sum += tl.sum(_row_block(table, b_entry, table_stride, o_d, m_item, m_d, VEC), 0)
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
                        b_x = _row_block(weight, b_token, weight_stride, o_d, m_slot, m_d, VEC)
                        b_sum += tl.sum(b_x * b_weight[:, None], 0)
            b_mean = b_sum * tl.div_rn(scale, (i_hi - i_lo).to(tl.float32))
            p_out = out + i * out_stride * VEC + o_d
            tl.store(p_out, b_mean.to(out.dtype.element_ty), mask=m_d, cache_modifier=".cs")


def pool_rows(
    weight: Tensor,
    lo: Tensor,
    hi: Tensor,
    items: Tensor,
    token_ids: Tensor,
    offsets: Tensor,
    table: Tensor | None,
    title_index: Tensor | None,
    scale: float,
    out: Tensor,
) -> None:
    """Write every row of the packed batch into ``out`` ``(T, D)``; see `reference.pool_rows`.

    Raises:
        ValueError: a dtype without a kernel.
    """
    _check_dtype("weight", weight)
    n_rows, width = out.shape
    if n_rows == 0:
        return
    vector = _vector_length(width, weight, out, *(() if table is None else (table,)))
    blocks = _forward_blocks(width, weight.element_size())
    with torch.cuda.device_of(weight):
        _pool_rows_kernel[-(-n_rows // _FORWARD_ROWS), -(-width // blocks.columns)](
            weight,
            lo,
            hi,
            items,
            token_ids,
            offsets,
            table,
            title_index if table is not None else None,
            out,
            n_rows,
            scale,
            weight.stride(0) // vector,
            0 if table is None else table.stride(0) // vector,
            out.stride(0) // vector,
            D=width,
            VEC=vector,
            SCALED=scale != 1.0,
            ROWS=_FORWARD_ROWS,
            SLOTS=blocks.slots,
            TITLES=16,
            BLOCK_D=blocks.columns,
            **_options(blocks, vector),
        )


# ------------------------------------------------------------------ backward


@triton.jit
def _share_block(grad_rows, rows, divisors, o_c, m_c, grad_stride, o_d, m_d, VEC: tl.constexpr):
    """What contributions ``o_c`` add to their tokens, ``[len(o_c), len(o_d)]``; -0.0 where masked."""
    b_row = tl.load(rows + o_c, mask=m_c, other=0)
    b_divisor = tl.load(divisors + o_c, mask=m_c, other=1)
    b_share = tl.div_rn(1.0, b_divisor.to(tl.float32))
    return _row_block(grad_rows, b_row, grad_stride, o_d, m_c, m_d, VEC) * b_share[:, None]


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
        b_out += tl.load(p_out, mask=m_d, other=-0.0).to(tl.float32)
    tl.store(p_out, b_out.to(out.dtype.element_ty), mask=m_d)


@triton.jit(
    do_not_specialize=["n_tokens", "n_contributions", "scale", "grad_stride", "out_stride"],
    do_not_specialize_on_alignment=["tokens", "token_offsets", "rows", "divisors"],
)
def _tile_sums_kernel(
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
    in the others), its first tile its token in ``cut_tokens``, and `_cut_sums_kernel` adds them up. So no program sums
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
    b_sum = tl.full([BLOCK_D], -0.0, tl.float32)
    for i in range(tl.maximum(i_begin, i_from), i_end, SLOTS):
        # [SLOTS, BLOCK_D]
        o_c = i + tl.arange(0, SLOTS)
        b_x = _share_block(grad_rows, rows, divisors, o_c, o_c < i_end, grad_stride, o_d, m_d, VEC)
        while i_to <= tl.minimum(i + SLOTS, i_end):
            m_run = (o_c >= i_from) & (o_c < i_to)
            b_sum += tl.sum(tl.where(m_run[:, None], b_x, -0.0), 0)
            if i_from < i_begin:
                tl.store(parts + 2 * i_tile * D + o_d, b_sum, mask=m_d)
            else:
                _store_gradient(b_sum, i_token, tokens, out, scale, out_stride, o_d, m_d, VEC, SCATTER, ACCUMULATE)
            b_sum = tl.full([BLOCK_D], -0.0, tl.float32)
            i_token += 1
            i_from = i_to
            i_to = _run_end(token_offsets, i_token, n_tokens)
        b_sum += tl.sum(tl.where((o_c >= i_from)[:, None], b_x, -0.0), 0)

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
def _cut_sums_kernel(
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
        b_sum = tl.full([BLOCK_D], -0.0, tl.float32)
        for i in range(i_tile, i_last + 1, SLOTS):
            # [SLOTS, BLOCK_D]
            o_tile = i + tl.arange(0, SLOTS)
            o_part = 2 * o_tile + (o_tile == i_tile).to(tl.int64)
            b_sum += tl.sum(_row_block(parts, o_part, D, o_d, o_tile <= i_last, m_d, 1), 0)
        _store_gradient(b_sum, i_token, tokens, out, scale, out_stride, o_d, m_d, VEC, SCATTER, ACCUMULATE)


def pool_rows_grad(
    grad_rows: Tensor,
    tokens: Tensor,
    token_offsets: Tensor,
    rows: Tensor,
    divisors: Tensor,
    scale: float,
    out: Tensor,
    scatter: bool,
    accumulate: bool,
) -> None:
    """Write each token's gradient into its row of ``out``; see `reference.pool_rows_grad`.

    Bit for bit the same from run to run: every sum has one order, fixed by the layout alone.

    Raises:
        ValueError: a dtype without a kernel.
    """
    _check_dtype("grad_rows", grad_rows)
    n_tokens, n_contributions, width = tokens.shape[0], rows.shape[0], out.shape[1]
    if n_contributions == 0:
        return
    vector = _vector_length(width, grad_rows, out)
    blocks = _gradient_blocks(width, grad_rows.element_size())
    n_tiles = -(-n_contributions // _TILE)
    parts = torch.empty(2 * n_tiles, width, dtype=torch.float32, device=out.device)
    cut_tokens = torch.empty(n_tiles, dtype=torch.int32, device=out.device)
    with torch.cuda.device_of(out):
        _tile_sums_kernel[n_tiles, -(-width // blocks.columns)](
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
            grad_rows.stride(0) // vector,
            out.stride(0) // vector,
            D=width,
            VEC=vector,
            SCATTER=scatter,
            ACCUMULATE=accumulate,
            TILE=_TILE,
            SLOTS=blocks.slots,
            FANOUT=128,
            BLOCK_D=blocks.columns,
            **_options(blocks, vector),
        )
        if n_tiles < 3:
            return  # no run is cut
        columns = min(_power_of_two(width), 256)
        _cut_sums_kernel[n_tiles, -(-width // columns)](
            parts,
            cut_tokens,
            tokens,
            token_offsets,
            out,
            scale,
            out.stride(0) // vector,
            D=width,
            VEC=vector,
            SCATTER=scatter,
            ACCUMULATE=accumulate,
            TILE=_TILE,
            SLOTS=32,
            BLOCK_D=columns,
            num_warps=8,
            enable_fp_fusion=True,
        )


# ------------------------------------------------------------------ launches


def unusable_reason() -> str | None:
    """Why this backend cannot be used here, or None."""
    return _UNUSABLE


def _find_unusable_reason() -> str | None:
    if not isinstance(_pool_rows_kernel, triton.JITFunction):
        if isinstance(tl.sum, triton.JITFunction):
            return "TRITON_INTERPRET was set after triton was imported"
        return None
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    try:
        _ = triton.runtime.driver.active.get_current_device
    except Exception as error:  # whatever Triton meets: no C compiler, no headers, a driver that is too old
        return f"triton cannot launch kernels here: {error}"
    return None


# Found once: torch.compile cannot trace the search.
_UNUSABLE = _find_unusable_reason()

# Contributions per tile: one program's work. Long enough that a cut run's parts stay a few percent of the traffic,
# short enough that the 24,000 contributions of a batch of 64 ml-1m users give every multiprocessor several programs.
_TILE = 64


class _Blocks(NamedTuple):
    """How a program is cut: the rows that it loads together, of how many columns, on how many warps.

    ``registers`` bounds those of a thread where the vector path is taken.
    """

    slots: int
    columns: int
    warps: int
    registers: int


# A patch is a chain of dependent reads (row, item, title, token, embedding) of 1 to 2 us, so throughput is bytes in
# flight per multiprocessor, and registers decide how many: each has 65,536 of them on sm_80, sm_90 and sm_100 alike,
# which is why one table serves all. The bounds are those that ptxas meets without a spill.
#
# Forward: 4 slots of 2 x 16 bytes per thread hold an item patch's tokens (ml-1m: 4) in one round, and 72 registers let
# 28 warps run. 8 slots would need 128: 16 warps, half of whose slots an item patch leaves empty. Two warps per program
# keep the barriers of a round cheap; 4 rows per program give short batches several waves.
#
# Backward: 8 slots of 16 bytes per thread, held in float32 while the runs among them are summed. At most 128 registers
# make that 4 programs of 4 warps, 64 KB in flight.
_FORWARD_ROWS = 4


def _forward_blocks(width: int, itemsize: int) -> _Blocks:
    columns = min(_power_of_two(width), 2048 // itemsize)
    return _Blocks(4, columns, max(1, min(2, columns * itemsize // 512)), 72)


def _gradient_blocks(width: int, itemsize: int) -> _Blocks:
    columns = min(_power_of_two(width), 2048 // itemsize)
    return _Blocks(8, columns, max(1, min(4, columns * itemsize // 512)), 128)


def _options(blocks: _Blocks, vector: int) -> dict[str, Any]:
    options: dict[str, Any] = {"num_warps": blocks.warps, "enable_fp_fusion": True}
    if vector > 1 and torch.version.hip is None:
        options["maxnreg"] = blocks.registers
    return options


def _power_of_two(number: int) -> int:
    """The smallest power of two that is not less."""
    return 1 << (number - 1).bit_length()


def _vector_length(width: int, *matrices: Tensor) -> int:
    """Elements in 16 bytes if every row of every matrix begins at a multiple of 16 bytes and is one long, else 1."""
    vector = 16 // matrices[0].element_size()
    aligned = all(matrix.data_ptr() % 16 == 0 and matrix.stride(0) % vector == 0 for matrix in matrices)
    return vector if aligned and width % vector == 0 else 1


def _check_dtype(name: str, matrix: Tensor) -> None:
    if matrix.dtype not in DTYPES:
        raise ValueError(f"{name}: expected float32, bfloat16 or float16 for the triton backend, got {matrix.dtype}")
