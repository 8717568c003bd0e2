# SPDX-License-Identifier: Apache-2.0
"""What the tests of `pool_rows` and of its gradient share: hard shapes, and the oracle's verdict by backend."""

from __future__ import annotations

import contextlib
from typing import Any

import cases
import oracle
import pytest
import torch

import patchkern as pk
from patchkern.ops import backends

WIDTHS = [1, 41, 64, 1000, 4096]
HARD_LENGTHS = [0, 1, 23, 2, 0, 40]

by_dtype = pytest.mark.parametrize("dtype", cases.DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
in_double = pytest.mark.parametrize("dtype", [torch.float64], ids=["float64"])
by_policy = pytest.mark.parametrize("name", cases.POLICIES)
# How a narrow dtype is loaded and stored depends on no policy: one of each structure.
by_policy_and_dtype = pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(name, dtype, id=f"{name}-{str(dtype).removeprefix('torch.')}")
        for name in cases.POLICIES
        for dtype in cases.DTYPES
        if dtype.itemsize > 2 or name in ("text", "items", "sessions-end", "sessions-start-cut", "random")
    ],
)


def hard_lengths(backend: str, dtype: torch.dtype) -> list[int]:
    """Items of each user. Triton's interpreter, at milliseconds a row, gets one user with patches of every kind beside
    short ones; in float32 one whom every policy cuts, as loads and stores of narrow dtypes depend on no policy."""
    if not cases.interpreted(backend):
        return HARD_LENGTHS
    return [0, 17, 1, 0] if dtype in (torch.bfloat16, torch.float16) else [0, 1, 2, 0, 33]


def few_lengths(backend: str) -> list[int]:
    """Items of each user where no more is asked of a layout than sessions, item patches and text."""
    return [0, 8, 1] if cases.interpreted(backend) else [0, 17, 1]


def gradient(weight: torch.Tensor, layout: pk.PatchLayout, grad_rows: torch.Tensor, **options: Any) -> torch.Tensor:
    """What autograd gives `weight`."""
    leaf = weight.detach().requires_grad_()
    pk.pool_rows(leaf, layout, **options).backward(grad_rows)
    assert leaf.grad is not None
    return leaf.grad


def takers(names: list[str], dtype: torch.dtype) -> list[str]:
    """Those of the backends that take CPU tensors of this dtype."""
    found = []
    for name in names:
        with contextlib.suppress(ValueError):
            found.append(backends.choose(name, torch.device("cpu"), dtype))
    return found


def assert_pooled(
    backend: str, got: torch.Tensor, weight: torch.Tensor, rows: list[oracle.Row], **options: Any
) -> None:
    oracle.assert_pooled(got, weight, rows, truncates=cases.truncates(backend, weight.dtype), **options)


def assert_gradient(
    backend: str, got: torch.Tensor, grad_rows: torch.Tensor, rows: list[oracle.Row], vocabulary: int, **options: Any
) -> None:
    truncates = cases.truncates(backend, grad_rows.dtype)
    oracle.assert_gradient(got, grad_rows, rows, vocabulary, truncates=truncates, **options)
