# SPDX-License-Identifier: Apache-2.0
"""`pool_rows` in Triton: the portable GPU backend. Needs no build; any GPU that Triton compiles for runs it.

Results are those of `reference`. Nothing here waits for the device, and a kernel is compiled once per width, dtype and
row alignment: what changes from batch to batch takes no part in it. After its first call a launch can be captured in a
CUDA graph. With ``TRITON_INTERPRET=1`` set before triton is imported, the same kernels run on CPU tensors; so they are
tested without a GPU.

Budget. The least traffic and the time it takes an A100 and an H200, per policy, stand in csrc/pool_rows_fwd.cu and
csrc/pool_rows_bwd.cu; they hold for any kernel. What Triton's add to it is said at each of them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from patchkern.ops.pool_rows_triton_forward import pool_rows_kernel
from patchkern.ops.pool_rows_triton_gradients import cut_sums_kernel, tile_sums_kernel

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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
    rows = _rows_per_program(n_rows, -(-width // blocks.columns))
    with torch.cuda.device_of(weight):
        pool_rows_kernel[-(-n_rows // rows), -(-width // blocks.columns)](
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
            rows,
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
        tile_sums_kernel[n_tiles, -(-width // blocks.columns)](
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
        cut_sums_kernel[n_tiles, -(-width // columns)](
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


def unusable_reason() -> str | None:
    """Why this backend cannot be used here, or None."""
    return _UNUSABLE


def _find_unusable_reason() -> str | None:
    if not isinstance(pool_rows_kernel, triton.JITFunction):
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
# Forward: 4 slots of 2 x 16 bytes per thread hold an item patch's tokens (ml-1m: 4) in one round, and 80 registers let
# 24 warps run. 8 slots would need 128: 16 warps, half of whose slots an item patch leaves empty. Two warps per program
# keep the barriers of a round cheap, and as both do the same rows neither waits for the other. Of a dozen other choices
# tried on an H100 none is more than 1 % better for item or session patches in a batch of 512.
#
# 4 rows per program, and 2 where programs are few: there the batch waits for the one with two long sessions. A row's
# bits do not depend on it. On an H100, D = 2048, bfloat16, with 4 and with 2 rows: items 170 and 192 us, sessions 115
# and 119 in a batch of 512 (28,320 programs of 4 rows, and more); items 34 and 33, sessions 30 and 27, a few sessions
# of 100 among text 174 and 107 in one of 64 (13,222 programs, and fewer).
#
# Backward: 8 slots of 16 bytes per thread, held in float32 while the runs among them are summed. At most 128 registers
# make that 4 programs of 4 warps, 64 KB in flight.
_FORWARD_ROWS = 4
_MANY_PROGRAMS = 1 << 14


def _forward_blocks(width: int, itemsize: int) -> _Blocks:
    columns = min(_power_of_two(width), 2048 // itemsize)
    return _Blocks(4, columns, max(1, min(2, columns * itemsize // 512)), 80)


def _rows_per_program(n_rows: int, column_blocks: int) -> int:
    """Rows of one program of the forward pass."""
    return _FORWARD_ROWS if -(-n_rows // _FORWARD_ROWS) * column_blocks > _MANY_PROGRAMS else _FORWARD_ROWS // 2


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
