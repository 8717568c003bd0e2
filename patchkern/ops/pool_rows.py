# SPDX-License-Identifier: Apache-2.0
"""The op `pool_rows`: gather, pool on two levels and write the packed batch, in one pass, with its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from patchkern.batch.layout import PatchLayout, Transpose
from patchkern.ops import dispatch as _ops  # noqa: F401  (torch.ops.patchkern.pool_rows)
from patchkern.ops.checks import (
    check_backend,
    check_flag,
    check_matrix,
    check_out,
    check_scale,
    check_weight,
    records_gradient,
)
from patchkern.ops.item_table import ItemTable


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
        scale: float,
        backend: str,
        sparse_grad: bool,
    ) -> Tensor:
        ctx.save_for_backward(tokens, token_offsets, rows, divisors)
        ctx.num_embeddings, ctx.sparse_grad = weight.shape[0], sparse_grad
        ctx.scale, ctx.backend = scale, backend
        out = weight.new_empty(lo.shape[0], weight.shape[1])
        torch.ops.patchkern.pool_rows(weight, lo, hi, items, token_ids, offsets, None, None, scale, out, backend)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_rows: Tensor) -> tuple[Tensor | None, ...]:
        transpose: tuple[Tensor, ...] = ctx.saved_tensors
        grad = _weight_grad(grad_rows, transpose, ctx.num_embeddings, not ctx.sparse_grad, ctx.scale, ctx.backend)
        return (grad, *[None] * 12)


def _weight_grad(
    grad_rows: Tensor, transpose: tuple[Tensor, ...], num_embeddings: int, dense: bool, scale: float, backend: str
) -> Tensor:
    width = grad_rows.shape[1]
    if width > 1 and grad_rows.stride(1) != 1:
        grad_rows = grad_rows.contiguous()
    tokens = transpose[0]
    if dense:
        grad = grad_rows.new_zeros(num_embeddings, width)
        torch.ops.patchkern.pool_rows_grad(grad_rows, *transpose, scale, grad, True, False, backend)
        return grad
    values = grad_rows.new_empty(tokens.shape[0], width)
    torch.ops.patchkern.pool_rows_grad(grad_rows, *transpose, scale, values, False, False, backend)
    size = (num_embeddings, width)
    # Tokens are ascending and distinct by construction, which is what coalesced means.
    return torch.sparse_coo_tensor(tokens.long()[None], values, size, is_coalesced=True, check_invariants=False)


def pool_rows(
    weight: Tensor,
    layout: PatchLayout,
    backend: str = "auto",
    out: Tensor | None = None,
    sparse_grad: bool = False,
    *,
    table: ItemTable | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Write every row of a layout: literals, item patches and session patches (section 3.2 of the paper).

    Sums, means and products are taken in float32 (float64 for float64 weights) and rounded once, at the store.

    Args:
        weight: ``(V, D)`` input embeddings; float32, bfloat16, float16 or float64, contiguous in the last dimension.
        layout: on ``weight``'s device.
        backend: "auto", or one of `backends`.
        out: ``(T, D)`` of ``weight``'s dtype and device to write into, contiguous in the last dimension; only where no
            gradient is recorded.
        sparse_grad: give ``weight`` a coalesced ``torch.sparse_coo`` gradient that holds the batch's tokens only.
        table: item patches pooled beforehand by `patchkern.item_table`, from this weight, which must be frozen, and the
            layout's catalogue. Item patches are the same bit for bit (with ``scale`` 1 and the backend that
            made the table); a session patch is the mean of rounded item patches.
        scale: multiplies every row; Gemma scales its embeddings by ``sqrt(D)``.

    Returns:
        ``(T, D)`` in ``weight``'s dtype, differentiable in ``weight``; the gradient is the same bit for bit from run
        to run and for any number of threads.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came; nothing has been written then.

    Examples:
        An item patch, a separator, and a title of three tokens as text, between prefix and suffix.

        >>> import torch
        >>> import patchkern as pk
        >>> catalog = pk.Catalog.from_token_ids([5, 6, 7, 8, 9], [0, 2, 5])
        >>> prompt = pk.Prompt(prefix=[1], separator=[2], suffix=[3])
        >>> layout = pk.build_layout(catalog, [[0, 1]], pk.ItemPatches(keep_text=1), prompt)
        >>> weight = torch.arange(10.0)[:, None]  # the embedding of token t is the number t
        >>> pk.pool_rows(weight, layout).flatten().tolist()
        [1.0, 5.5, 2.0, 7.0, 8.0, 9.0, 3.0]
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
    check_flag("sparse_grad", sparse_grad)
    check_scale(scale, weight.dtype)
    check_backend(backend)
    if table is not None:
        _check_table(table, weight, layout)
    rows = (layout.lo, layout.hi, layout.items, layout.token_ids, layout.offsets)
    if records_gradient(weight=weight):
        if out is not None:
            raise ValueError("out: expected None where a gradient is recorded, got a tensor; use torch.no_grad()")
        columns = _columns(layout.with_transpose().transpose)
        pooled: Tensor = _PoolRows.apply(weight, *rows, *columns, float(scale), backend, sparse_grad)
        return pooled
    if out is None:
        out = weight.new_empty(layout.num_rows, weight.shape[1])
    else:
        check_out(out, layout.num_rows, "weight", weight)
    means = (None, None) if table is None else (table.rows, layout.title_index)
    torch.ops.patchkern.pool_rows(weight, *rows, *means, float(scale), out, backend)
    return out


def pool_rows_grad(
    grad_rows: Tensor,
    layout: PatchLayout,
    num_embeddings: int,
    *,
    dense: bool = True,
    backend: str = "auto",
    scale: float = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    """The gradient of `pool_rows` in its weight, for those who call it without autograd.

    Args:
        grad_rows: ``(T, D)`` gradient of the rows, contiguous in the last dimension.
        layout: with its transpose (``layout.with_transpose()``).
        num_embeddings: V, the rows of the weight.
        dense: ``(V, D)`` if true; else a coalesced ``torch.sparse_coo`` of that size, whose ``indices()`` and
            ``values()`` are the batch's ``(U,)`` tokens and their ``(U, D)`` gradients.
        scale: as in `pool_rows`.
        out: ``(V, D)`` gradient of ``grad_rows``' dtype and device, such as ``weight.grad``, to add to and return; each
            of the batch's rows is rounded once, and no other is touched. Only with ``dense``.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Examples:
        >>> import torch
        >>> import patchkern as pk
        >>> catalog = pk.Catalog.from_token_ids([0, 1, 2], [0, 2, 3])  # a title of two tokens, and one of one
        >>> layout = pk.build_layout(catalog, [[0, 1]], pk.ItemPatches(keep_text=1), pk.Prompt(separator=[3]))
        >>> grad_rows = torch.ones(layout.num_rows, 1)
        >>> pk.pool_rows_grad(grad_rows, layout.with_transpose(), num_embeddings=5).flatten().tolist()
        [0.5, 0.5, 1.0, 1.0, 0.0]
    """
    if not isinstance(layout, PatchLayout):
        raise TypeError(f"layout: expected a PatchLayout, got {type(layout).__name__}")
    check_matrix("grad_rows", grad_rows)
    transpose = _columns(layout.transpose)
    if grad_rows.shape[0] != layout.num_rows:
        raise ValueError(f"grad_rows: expected one row per layout row ({layout.num_rows}), got {grad_rows.shape[0]}")
    if grad_rows.device != layout.device:
        raise ValueError(f"grad_rows: expected it on the layout's device, {layout.device}, got {grad_rows.device}")
    if isinstance(num_embeddings, bool) or not isinstance(num_embeddings, int):
        raise TypeError(f"num_embeddings: expected an integer, got {type(num_embeddings).__name__}")
    if num_embeddings >= 1 << 31:
        raise ValueError(f"num_embeddings: expected less than 2^31, as token ids are int32, got {num_embeddings}")
    check_flag("dense", dense)
    if num_embeddings <= layout.max_token_id:
        raise ValueError(
            f"num_embeddings: expected more than the largest token id, {layout.max_token_id}, got {num_embeddings}"
        )
    check_scale(scale, grad_rows.dtype)
    check_backend(backend)
    if out is None:
        return _weight_grad(grad_rows, transpose, num_embeddings, dense, float(scale), backend)
    if not dense:
        raise ValueError("out: expected None for a compact gradient (dense=False), got a tensor")
    check_out(out, num_embeddings, "grad_rows", grad_rows)
    torch.ops.patchkern.pool_rows_grad(grad_rows, *transpose, float(scale), out, True, True, backend)
    return out


def _columns(transpose: Transpose | None) -> tuple[Tensor, ...]:
    if transpose is None:
        raise ValueError("layout: expected one with a transpose, got none; use layout.with_transpose()")
    return transpose.tokens, transpose.offsets, transpose.rows, transpose.divisors


def _check_table(table: Any, weight: Tensor, layout: PatchLayout) -> None:
    if not isinstance(table, ItemTable):
        raise TypeError(f"table: expected an ItemTable or None, got {type(table).__name__}")
    if torch.compiler.is_compiling():
        raise ValueError("table: expected None under torch.compile, which cannot see whether a table is stale")
    table.check(weight, layout)
