# SPDX-License-Identifier: Apache-2.0
"""`pool_rows` in C++ on the CPU."""

from __future__ import annotations

from torch import Tensor


def unusable_reason() -> str | None:
    """Why this backend cannot be used here, or None."""
    return "patchkern was built without its C++ extension"


def isa() -> str:
    """The instruction set that the kernels use."""
    return "none"


def pool_rows(
    weight: Tensor, lo: Tensor, hi: Tensor, items: Tensor, token_ids: Tensor, offsets: Tensor, out: Tensor
) -> None:
    raise RuntimeError(unusable_reason())


def pool_rows_grad(
    grad_rows: Tensor, tokens: Tensor, token_offsets: Tensor, rows: Tensor, divisors: Tensor, out: Tensor, scatter: bool
) -> None:
    raise RuntimeError(unusable_reason())
