# SPDX-License-Identifier: Apache-2.0
"""What torch knows of `pool_rows`: the ops ``torch.ops.patchkern.pool_rows`` and its gradient, on every backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from patchkern.ops import backends
from patchkern.ops.call_checks import check_backward, check_forward

_library = torch.library.Library("patchkern", "DEF")
_library.define(
    "pool_rows(Tensor weight, Tensor lo, Tensor hi, Tensor items, Tensor token_ids, Tensor offsets, Tensor? table, "
    "Tensor? title_index, float scale, Tensor(a!) out, str backend) -> ()"
)
_library.define(
    "pool_rows_grad(Tensor grad_rows, Tensor tokens, Tensor token_offsets, Tensor rows, Tensor divisors, float scale, "
    "Tensor(a!) out, bool scatter, bool accumulate, str backend) -> ()"
)


# The backend is chosen inside the ops, where torch.compile does not look: its reasons lie in extension modules, in
# drivers and in the environment.


def _pool_rows(
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
    backend: str,
) -> None:
    check_forward(weight, lo, hi, items, token_ids, offsets, table, title_index, out)
    kernels = backends.module(backends.choose(backend, weight.device, weight.dtype))
    kernels.pool_rows(weight, lo, hi, items, token_ids, offsets, table, title_index, scale, out)


def _pool_rows_grad(
    grad_rows: Tensor,
    tokens: Tensor,
    token_offsets: Tensor,
    rows: Tensor,
    divisors: Tensor,
    scale: float,
    out: Tensor,
    scatter: bool,
    accumulate: bool,
    backend: str,
) -> None:
    check_backward(grad_rows, tokens, token_offsets, rows, divisors, out, scatter)
    kernels = backends.module(backends.choose(backend, grad_rows.device, grad_rows.dtype, "pool_rows_grad"))
    kernels.pool_rows_grad(grad_rows, tokens, token_offsets, rows, divisors, scale, out, scatter, accumulate)


for _device in ("CPU", "CUDA"):
    _library.impl("pool_rows", _pool_rows, _device)
    _library.impl("pool_rows_grad", _pool_rows_grad, _device)


def _fake(*args: Any) -> None:
    # real tensors come here too, if one among them is on the meta device
    devices = {x.device for x in args if isinstance(x, Tensor)}
    if len(devices) > 1:
        raise ValueError(f"layout: expected all tensors on one device, got {', '.join(sorted(map(str, devices)))}")


for _op in ("pool_rows", "pool_rows_grad"):
    torch.library.register_fake(f"patchkern::{_op}", _fake)
