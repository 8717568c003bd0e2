# SPDX-License-Identifier: Apache-2.0
"""`pool_rows` in CUDA C++ (csrc/pool_rows_fwd.cu, csrc/pool_rows_bwd.cu).

A call allocates nothing but the backward's workspace, never waits for the device, and can be captured in a CUDA graph.
The kernels trust the layout: its indices were checked when it was built.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from patchkern._build import build_info, load

_cuda: ModuleType | None
try:
    _cuda, _missing = load("_cuda"), ""
except ImportError as error:
    _cuda, _missing = None, str(error)

# DType in csrc/pool_rows.h
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def unusable_reason() -> str | None:
    """Why this backend cannot be used here, or None."""
    if _cuda is None:
        return _missing
    # Asking a device what it is would start CUDA in this process, and forbid it to fork.
    return _no_cuda() or (_no_kernel(torch.cuda.current_device()) if torch.cuda.is_initialized() else None)


@cache
def _no_cuda() -> str | None:
    """Why CUDA kernels cannot run in this process, or None."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    needed, served = _module().runtime_version(), _module().driver_version()
    if served // 1000 < needed // 1000:
        return f"it was built for CUDA {_version(needed)}, but the driver serves CUDA {_version(served)}"
    return None


@cache
def _no_kernel(device: int) -> str | None:
    """Why the kernels that were built do not run on the device, or None."""
    capability = torch.cuda.get_device_capability(device)
    built = [int(arch) for arch in build_info().get("archs", [])]
    same_family = any(divmod(arch, 10) <= capability and arch // 10 == capability[0] for arch in built)
    if same_family or not built or capability >= divmod(built[-1], 10):  # the newest is there as PTX, too
        return None
    archs = ", ".join(f"sm_{arch}" for arch in built)
    return f"it was built for {archs}, but cuda:{device} is sm_{capability[0]}{capability[1]}"


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


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
        ValueError: float64.
        RuntimeError: CUDA refused the launch.
    """
    if table is None or title_index is None:
        means = (0, 0, 0)
    else:
        means = (table.data_ptr(), table.stride(0), title_index.data_ptr())
    _launch(
        "pool_rows",
        weight,
        weight.data_ptr(),
        weight.shape[1],
        weight.stride(0),
        lo.data_ptr(),
        hi.data_ptr(),
        lo.shape[0],
        items.data_ptr(),
        token_ids.data_ptr(),
        offsets.data_ptr(),
        *means,
        scale,
        out.data_ptr(),
        out.stride(0),
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
    """Write each token's gradient into its row of ``out``, or add it; see `reference.pool_rows_grad`.

    Bit for bit the same from run to run.

    Raises:
        ValueError: float64.
        RuntimeError: CUDA refused the launch.
    """
    width, contributions = grad_rows.shape[1], rows.shape[0]
    tiles = -(-contributions // _module().TILE_CONTRIBUTIONS)
    partials = torch.empty(2, tiles, width, dtype=torch.float32, device=grad_rows.device)
    tails = torch.empty(tiles, dtype=torch.int32, device=grad_rows.device)
    _launch(
        "pool_rows_grad",
        grad_rows,
        grad_rows.data_ptr(),
        width,
        grad_rows.stride(0),
        tokens.data_ptr(),
        tokens.shape[0],
        token_offsets.data_ptr(),
        rows.data_ptr(),
        divisors.data_ptr(),
        contributions,
        scale,
        scatter,
        accumulate,
        out.data_ptr(),
        out.stride(0),
        partials.data_ptr(),
        tails.data_ptr(),
    )


def _launch(op: str, matrix: Tensor, *arguments: int | float) -> None:
    """Launch the op on ``matrix``'s dtype and device."""
    dtype, device = matrix.dtype, matrix.device
    if dtype not in _DTYPES:
        raise ValueError(f"{op}: expected float32, bfloat16 or float16 for the cuda backend, got {dtype}")
    status = _call_on(device, getattr(_module(), op), _DTYPES[dtype], *arguments)
    if status != 0:
        reason = _module().error_string(status)
        raise RuntimeError(f"{op}: {reason} (CUDA error {status}) on {device}, dtype={dtype}, D={matrix.shape[1]}")


def _call_on(device: torch.device, function: Callable[..., int], *arguments: int | float) -> int:
    """Call it with the device and its current stream.

    The kernels' CUDA runtime is not torch's: each remembers a current device of its own for a thread, and the driver
    another. Torch's guard is what puts the driver's back in accordance with torch's.
    """
    with torch.cuda.device(device):
        return function(*arguments, device.index, torch.cuda.current_stream(device).cuda_stream)


def _module() -> ModuleType:
    if _cuda is None:
        raise RuntimeError(_missing)
    return _cuda
