# SPDX-License-Identifier: Apache-2.0
"""Arguments of the ops, checked once, by name, before anything is written."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def records_gradient(**inputs: Tensor | None) -> bool:
    """Whether a gradient is recorded of an op with these inputs.

    Raises:
        NotImplementedError: an input with a tangent. Ops know of none, and would give outputs that seem constant.
    """
    for name, tensor in inputs.items():
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(f"{name}: expected no tangent, as there is no forward-mode derivative, got one")
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs.values())


def check_weight(weight: Any) -> None:
    """Raise unless ``weight`` is an embedding matrix that `pool_rows` can read."""
    check_matrix("weight", weight)


def check_flag(name: str, flag: Any) -> None:
    if not isinstance(flag, bool):
        raise TypeError(f"{name}: expected a bool, got {type(flag).__name__}")


def check_scale(scale: Any, dtype: torch.dtype) -> None:
    if type(scale) is float and scale == 1.0:
        return
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale: expected a number, got {type(scale).__name__}")
    largest = torch.finfo(torch.promote_types(dtype, torch.float32)).max
    if not -largest <= scale <= largest:
        raise ValueError(f"scale: expected a finite number, at most {largest:.4g} for {dtype}, got {scale}")


def check_backend(backend: Any) -> None:
    """Raise unless ``backend`` may be the name of one; the op itself sees whether it is."""
    if not isinstance(backend, str):
        raise TypeError(f"backend: expected a string, got {type(backend).__name__}")


def check_matrix(name: str, matrix: Any) -> None:
    if not isinstance(matrix, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(matrix).__name__}")
    if matrix.dtype not in DTYPES:
        raise TypeError(f"{name}: expected float32, bfloat16, float16 or float64, got {matrix.dtype}")
    if matrix.layout != torch.strided or matrix.is_nested:
        got = "a nested one" if matrix.is_nested else f"layout {matrix.layout}"
        raise ValueError(f"{name}: expected a dense tensor, got {got}")
    if matrix.dim() != 2 or matrix.shape[1] == 0:
        raise ValueError(f"{name}: expected shape (rows, D) with D >= 1, got {tuple(matrix.shape)}")
    if matrix.shape[1] > 1 and matrix.stride(1) != 1:
        raise ValueError(
            f"{name}: expected contiguous rows (stride 1 in the last dimension), got stride {matrix.stride()}"
        )


def check_out(out: Any, rows: int, name: str, like: Tensor) -> None:
    """Raise unless ``out`` can take ``rows`` rows as wide as those of ``like``, the argument ``name``."""
    check_matrix("out", out)
    if out.shape != (rows, like.shape[1]):
        raise ValueError(f"out: expected shape {(rows, like.shape[1])}, got {tuple(out.shape)}")
    if out.dtype != like.dtype:
        raise TypeError(f"out: expected {name}'s dtype, {like.dtype}, got {out.dtype}")
    if out.device != like.device:
        raise ValueError(f"out: expected {name}'s device, {like.device}, got {out.device}")
    if out.requires_grad:
        raise ValueError("out: expected a tensor that requires no gradient")
    if rows > 1 and out.stride(0) < out.shape[1]:
        raise ValueError(f"out: expected rows that do not overlap, got stride {out.stride()}")
