# SPDX-License-Identifier: Apache-2.0
"""The op `pool_rows`: gather, pool on two levels and write the packed batch, in one pass, with its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from patchkern.layout import PatchLayout, Transpose
from patchkern.ops import backends

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_library = torch.library.Library("patchkern", "DEF")
_library.define(
    "pool_rows(Tensor weight, Tensor lo, Tensor hi, Tensor items, Tensor token_ids, Tensor offsets, "
    "Tensor(a!) out, str backend) -> ()"
)
_library.define(
    "pool_rows_grad(Tensor grad_rows, Tensor tokens, Tensor token_offsets, Tensor rows, Tensor divisors, "
    "Tensor(a!) out, bool scatter, str backend) -> ()"
)


def _pool_rows(
    weight: Tensor,
    lo: Tensor,
    hi: Tensor,
    items: Tensor,
    token_ids: Tensor,
    offsets: Tensor,
    out: Tensor,
    backend: str,
) -> None:
    backends.module(backend).pool_rows(weight, lo, hi, items, token_ids, offsets, out)


def _pool_rows_grad(
    grad_rows: Tensor,
    tokens: Tensor,
    token_offsets: Tensor,
    rows: Tensor,
    divisors: Tensor,
    out: Tensor,
    scatter: bool,
    backend: str,
) -> None:
    backends.module(backend).pool_rows_grad(grad_rows, tokens, token_offsets, rows, divisors, out, scatter)


for _device in ("CPU", "CUDA"):
    _library.impl("pool_rows", _pool_rows, _device)
    _library.impl("pool_rows_grad", _pool_rows_grad, _device)


@torch.library.register_fake("patchkern::pool_rows")
def _(*args: Any) -> None:
    return None


@torch.library.register_fake("patchkern::pool_rows_grad")
def _(*args: Any) -> None:
    return None


class _PoolRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        lo: Tensor,
        hi: Tensor,
        items: Tensor,
        token_ids: Tensor,
        offsets: Tensor,
        tokens: Tensor,
        token_offsets: Tensor,
        rows: Tensor,
        divisors: Tensor,
        backend: str,
        sparse_grad: bool,
    ) -> Tensor:
        ctx.save_for_backward(tokens, token_offsets, rows, divisors)
        ctx.num_embeddings, ctx.backend, ctx.sparse_grad = weight.shape[0], backend, sparse_grad
        out = weight.new_empty(lo.shape[0], weight.shape[1])
        torch.ops.patchkern.pool_rows(weight, lo, hi, items, token_ids, offsets, out, backend)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_rows: Tensor) -> tuple[Tensor | None, ...]:
        transpose: tuple[Tensor, ...] = ctx.saved_tensors
        grad = _weight_grad(grad_rows, transpose, ctx.num_embeddings, not ctx.sparse_grad, ctx.backend)
        return (grad, *[None] * 11)


def _weight_grad(
    grad_rows: Tensor, transpose: tuple[Tensor, ...], num_embeddings: int, dense: bool, backend: str
) -> Tensor:
    width = grad_rows.shape[1]
    if width > 1 and grad_rows.stride(1) != 1:
        grad_rows = grad_rows.contiguous()
    tokens = transpose[0]
    if dense:
        grad = grad_rows.new_zeros(num_embeddings, width)
        torch.ops.patchkern.pool_rows_grad(grad_rows, *transpose, grad, True, backend)
        return grad
    values = grad_rows.new_empty(tokens.shape[0], width)
    torch.ops.patchkern.pool_rows_grad(grad_rows, *transpose, values, False, backend)
    size = (num_embeddings, width)
    # Tokens are ascending and distinct by construction, which is what coalesced means.
    return torch.sparse_coo_tensor(tokens.long()[None], values, size, is_coalesced=True, check_invariants=False)


def pool_rows(
    weight: Tensor, layout: PatchLayout, backend: str = "auto", out: Tensor | None = None, sparse_grad: bool = False
) -> Tensor:
    """Write every row of a layout: literals, item patches and session patches (section 3.2 of the paper).

    Sums and means are taken in float32 (float64 for float64 weights) and rounded once, at the store.

    Args:
        weight: ``(V, D)`` input embeddings; float32, bfloat16, float16 or float64, contiguous in the last dimension.
        layout: on ``weight``'s device.
        backend: "auto", or one of `backends`.
        out: ``(T, D)`` of ``weight``'s dtype and device to write into, contiguous in the last dimension; only where no
            gradient is recorded.
        sparse_grad: give ``weight`` a coalesced ``torch.sparse_coo`` gradient that holds the batch's tokens only.

    Returns:
        ``(T, D)`` in ``weight``'s dtype, differentiable in ``weight``; the gradient is the same bit for bit from run
        to run and for any number of threads.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came; nothing has been written then.
    """
    check_weight(weight)
    if not isinstance(layout, PatchLayout):
        raise TypeError(f"layout: expected a PatchLayout, got {type(layout).__name__}")
    if layout.device != weight.device:
        raise ValueError(f"layout: expected it on weight's device, {weight.device}, got {layout.device}")
    if layout.max_token_id >= weight.shape[0]:
        raise ValueError(
            f"weight: expected more than {layout.max_token_id} rows for the layout's tokens, got {weight.shape[0]}"
        )
    _check_flag("sparse_grad", sparse_grad)
    name = backends.choose(backend, weight.device)
    rows = (layout.lo, layout.hi, layout.items, layout.token_ids, layout.offsets)
    if torch.is_grad_enabled() and weight.requires_grad:
        if out is not None:
            raise ValueError("out: expected None where a gradient is recorded, got a tensor; use torch.no_grad()")
        columns = _columns(layout.with_transpose().transpose)
        pooled: Tensor = _PoolRows.apply(weight, *rows, *columns, name, sparse_grad)
        return pooled
    if out is None:
        out = weight.new_empty(layout.num_rows, weight.shape[1])
    else:
        _check_out(out, weight, layout.num_rows)
    torch.ops.patchkern.pool_rows(weight, *rows, out, name)
    return out


def pool_rows_grad(
    grad_rows: Tensor, layout: PatchLayout, num_embeddings: int, *, dense: bool = True, backend: str = "auto"
) -> Tensor:
    """The gradient of `pool_rows` in its weight, for those who call it without autograd.

    Args:
        grad_rows: ``(T, D)`` gradient of the rows, contiguous in the last dimension.
        layout: with its transpose (``layout.with_transpose()``).
        num_embeddings: V, the rows of the weight.
        dense: ``(V, D)`` if true; else a coalesced ``torch.sparse_coo`` of that size, whose ``indices()`` and
            ``values()`` are the batch's ``(U,)`` tokens and their ``(U, D)`` gradients.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    if not isinstance(layout, PatchLayout):
        raise TypeError(f"layout: expected a PatchLayout, got {type(layout).__name__}")
    _check_matrix("grad_rows", grad_rows)
    transpose = _columns(layout.transpose)
    if grad_rows.shape[0] != layout.num_rows:
        raise ValueError(f"grad_rows: expected one row per layout row ({layout.num_rows}), got {grad_rows.shape[0]}")
    if grad_rows.device != layout.device:
        raise ValueError(f"grad_rows: expected it on the layout's device, {layout.device}, got {grad_rows.device}")
    if isinstance(num_embeddings, bool) or not isinstance(num_embeddings, int):
        raise TypeError(f"num_embeddings: expected an integer, got {type(num_embeddings).__name__}")
    if num_embeddings >= 1 << 31:
        raise ValueError(f"num_embeddings: expected less than 2^31, as token ids are int32, got {num_embeddings}")
    _check_flag("dense", dense)
    if num_embeddings <= layout.max_token_id:
        raise ValueError(
            f"num_embeddings: expected more than the largest token id, {layout.max_token_id}, got {num_embeddings}"
        )
    name = backends.choose(backend, grad_rows.device)
    return _weight_grad(grad_rows, transpose, num_embeddings, dense, name)


def _columns(transpose: Transpose | None) -> tuple[Tensor, ...]:
    if transpose is None:
        raise ValueError("layout: expected one with a transpose, got none; use layout.with_transpose()")
    return transpose.tokens, transpose.offsets, transpose.rows, transpose.divisors


def check_weight(weight: Any) -> None:
    """Raise unless ``weight`` is an embedding matrix that `pool_rows` can read."""
    _check_matrix("weight", weight)


def _check_flag(name: str, flag: Any) -> None:
    if not isinstance(flag, bool):
        raise TypeError(f"{name}: expected a bool, got {type(flag).__name__}")


def _check_matrix(name: str, matrix: Any) -> None:
    if not isinstance(matrix, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(matrix).__name__}")
    if matrix.dtype not in DTYPES:
        raise TypeError(f"{name}: expected float32, bfloat16, float16 or float64, got {matrix.dtype}")
    if matrix.layout != torch.strided:
        raise ValueError(f"{name}: expected a dense tensor, got layout {matrix.layout}")
    if matrix.dim() != 2 or matrix.shape[1] == 0:
        raise ValueError(f"{name}: expected shape (rows, D) with D >= 1, got {tuple(matrix.shape)}")
    if matrix.shape[1] > 1 and matrix.stride(1) != 1:
        raise ValueError(
            f"{name}: expected contiguous rows (stride 1 in the last dimension), got stride {matrix.stride()}"
        )


def _check_out(out: Any, weight: Tensor, rows: int) -> None:
    _check_matrix("out", out)
    if out.shape != (rows, weight.shape[1]):
        raise ValueError(f"out: expected shape {(rows, weight.shape[1])}, got {tuple(out.shape)}")
    if out.dtype != weight.dtype:
        raise TypeError(f"out: expected weight's dtype, {weight.dtype}, got {out.dtype}")
    if out.device != weight.device:
        raise ValueError(f"out: expected weight's device, {weight.device}, got {out.device}")
    if out.requires_grad:
        raise ValueError("out: expected a tensor that requires no gradient")
    if rows > 1 and out.stride(0) < out.shape[1]:
        raise ValueError(f"out: expected rows that do not overlap, got stride {out.stride()}")
    if rows and out.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr():
        raise ValueError("out: expected memory of its own, got weight's")
