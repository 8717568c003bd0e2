# SPDX-License-Identifier: Apache-2.0
"""`pool_rows` in C++ on the CPU (csrc/pool_rows_cpu.cpp).

The kernels check every index before they write, so that even a layout whose tensors were overwritten after it was
built is a ``ValueError`` and never a crash. ``PATCHKERN_ISA`` forces an instruction set: one of
`isa_levels`, for tests and bug reports.
"""

from __future__ import annotations

import os
from types import ModuleType

import torch
from torch import Tensor

from patchkern._build import load

_native: ModuleType | None
try:
    _native, _missing = load("_native"), ""
except ImportError as error:
    _native, _missing = None, str(error)

ENVIRONMENT = "PATCHKERN_ISA"

# DType in csrc/pool_rows.h
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}

# Status in csrc/pool_rows.h: the argument at fault, and what was expected of it
_FAULTS = {
    2: ("lo", "a literal's token below the number of embeddings"),
    3: ("hi", "0 for a literal"),
    4: ("lo", "a patch's range 0 <= lo < hi <= number of items"),
    5: ("items", "an index of one of the titles"),
    6: ("offsets", "rising offsets from 0 to the number of title tokens"),
    7: ("token_ids", "a token below the number of embeddings"),
    8: ("tokens", "ascending tokens below the number of embeddings"),
    9: ("token_offsets", "rising offsets from 0 to the number of contributions"),
    10: ("rows", "an index of one of the rows"),
    11: ("divisors", "a divisor of at least 1"),
    18: ("title_index", "a row of the table"),
}


def isa_levels() -> list[str]:
    """The instruction sets that were built and that this CPU has, slowest first."""
    return [] if _native is None else _native.isa_levels()


def unusable_reason() -> str | None:
    """Why this backend cannot be used here, or None."""
    if _native is None:
        return _missing
    forced = os.environ.get(ENVIRONMENT, "auto")
    if forced != "auto" and forced not in isa_levels():
        return f"{ENVIRONMENT}: expected auto, {' or '.join(isa_levels())} on this CPU, got {forced!r}"
    return None


def isa() -> str:
    """The instruction set that the kernels use."""
    forced = os.environ.get(ENVIRONMENT, "auto")
    return forced if forced != "auto" else (isa_levels() or ["none"])[-1]


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
        ValueError: an index out of its range; ``out`` is untouched then.
    """
    if table is None or title_index is None:
        means = (0, 0, 0, 0)
    else:
        means = (table.data_ptr(), table.shape[0], table.stride(0), title_index.data_ptr())
    status, position = module().pool_rows(
        DTYPES[weight.dtype],
        weight.data_ptr(),
        weight.shape[0],
        weight.shape[1],
        weight.stride(0),
        lo.data_ptr(),
        hi.data_ptr(),
        lo.numel(),
        items.data_ptr(),
        items.numel(),
        token_ids.data_ptr(),
        token_ids.numel(),
        offsets.data_ptr(),
        offsets.numel() - 1,
        *means,
        scale,
        out.data_ptr(),
        out.stride(0),
        torch.get_num_threads(),
        os.environ.get(ENVIRONMENT, "auto"),
    )
    _check(status, position)


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

    Bit for bit the same for any number of threads.

    Raises:
        ValueError: an index out of its range; ``out`` is untouched then.
    """
    status, position = module().pool_rows_grad(
        DTYPES[grad_rows.dtype],
        grad_rows.data_ptr(),
        grad_rows.shape[0],
        grad_rows.shape[1],
        grad_rows.stride(0),
        tokens.data_ptr(),
        tokens.numel(),
        token_offsets.data_ptr(),
        rows.data_ptr(),
        divisors.data_ptr(),
        rows.numel(),
        scale,
        scatter,
        accumulate,
        out.data_ptr(),
        out.shape[0],
        out.stride(0),
        torch.get_num_threads(),
        os.environ.get(ENVIRONMENT, "auto"),
    )
    _check(status, position)


def module() -> ModuleType:
    """The compiled module, or a RuntimeError that says why there is none."""
    if _native is None:
        raise RuntimeError(_missing)
    return _native


def _check(status: int, position: int) -> None:
    if status == 0:
        return
    if status not in _FAULTS:
        raise ValueError(unusable_reason() or f"pool_rows: the native kernel failed with status {status}")
    argument, expected = _FAULTS[status]
    raise ValueError(f"{argument}[{position}]: expected {expected}")
