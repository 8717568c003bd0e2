# SPDX-License-Identifier: Apache-2.0
"""What the ops see of their tensors before a kernel reads them by address: shapes, dtypes, devices and memory.

It takes no time and never waits for a device. A layout was checked when it was made, but its tensors may have been
resized, exchanged or aliased since; the indices in them are looked at by the native kernels alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from patchkern.batch.layout_checks import check_memory, check_vector

_ROWS = ("lo", "hi", "items", "token_ids", "offsets", "title_index")
_TRANSPOSE = ("tokens", "token_offsets", "rows", "divisors")


def check_forward(
    weight: Tensor,
    lo: Tensor,
    hi: Tensor,
    items: Tensor,
    token_ids: Tensor,
    offsets: Tensor,
    table: Tensor | None,
    title_index: Tensor | None,
    out: Tensor,
) -> None:
    """Raise a TypeError or ValueError that names it unless every tensor of `pool_rows` can be read or written."""
    count, titles = lo.numel(), offsets.numel() - 1
    if hi.numel() != count:
        raise ValueError(f"hi: expected one per row ({count}), got {hi.numel()}")
    if out.shape[0] != count:
        raise ValueError(f"out: expected one per row ({count}), got {out.shape[0]}")
    if titles < 0:
        raise ValueError("offsets: expected at least one entry, got none")
    if table is None or title_index is None:
        _check(_ROWS, (lo, hi, items, token_ids, offsets), "weight", weight, out)
        return
    if title_index.numel() != titles:
        raise ValueError(f"title_index: expected one per title ({titles}), got {title_index.numel()}")
    _check((), (), "table", table, out)
    _check(_ROWS, (lo, hi, items, token_ids, offsets, title_index), "weight", weight, out)


def check_backward(
    grad_rows: Tensor, tokens: Tensor, token_offsets: Tensor, rows: Tensor, divisors: Tensor, out: Tensor, scatter: bool
) -> None:
    """As `check_forward`, of `pool_rows_grad`."""
    count = tokens.numel()
    if token_offsets.numel() != count + 1:
        raise ValueError(f"token_offsets: expected one more than tokens ({count}), got {token_offsets.numel()}")
    if divisors.numel() != rows.numel():
        raise ValueError(f"divisors: expected one per contribution ({rows.numel()}), got {divisors.numel()}")
    if not scatter and out.shape[0] != count:
        raise ValueError(f"out: expected one row per token ({count}), got {out.shape[0]}")
    _check(_TRANSPOSE, (tokens, token_offsets, rows, divisors), "grad_rows", grad_rows, out, of_gradients=True)


def _check(
    names: Sequence[str], vectors: Sequence[Tensor], name: str, matrix: Tensor, out: Tensor, of_gradients: bool = False
) -> None:
    # a call of the op takes the host about 12 us: written to be 2 of them, it finds out what is wrong in a second look
    device, item, int32 = out.get_device(), out.itemsize, torch.int32
    (rows, width), (out_rows, out_width) = matrix.shape, out.shape
    begin, at = out.data_ptr(), matrix.data_ptr()
    end = begin + item * ((out_rows - 1) * out.stride(0) + out_width) if out_rows else begin
    until = at + item * ((rows - 1) * matrix.stride(0) + width) if rows else at
    if matrix.dtype is not out.dtype or matrix.get_device() != device or width != out_width:
        raise ValueError(f"{name}: expected {out.dtype} on {out.device} with {out_width} columns, as out")
    for which, tensor, first, last in (("out", out, begin, end), (name, matrix, at, until)):
        if first == last:
            continue
        if of_gradients:
            there = _has_memory(tensor, (last - first) // item)
        else:
            storage = tensor.untyped_storage()
            there = last <= storage.data_ptr() + storage.nbytes()
        if first % item or not there:
            check_memory(which, tensor, (last - first) // item)
    if at < end and begin < until:
        raise ValueError(f"out: expected memory of its own, got {name}'s")
    for number, vector in enumerate(vectors):
        at, size = vector.data_ptr(), 4 * vector.numel()
        if (
            vector.dtype is not int32
            or vector.dim() != 1
            or not vector.is_contiguous()
            or vector.get_device() != device
            or 4 * vector.storage_offset() + size > vector.untyped_storage().nbytes()
            or at & 3
            or (at < end and begin < at + size)
        ):
            check_vector(names[number], vector, torch.int32, out.device)
            if size:
                raise ValueError(f"out: expected memory of its own, got {names[number]}'s")


def _has_memory(tensor: Tensor, elements: int) -> bool:
    """Whether there is memory behind so many elements from a gradient's first one.

    What `Tensor.untyped_storage` returns lives on with the storage, and autograd takes that for one that somebody else
    needs: the gradient would then be summed with another of its parameter in a third tensor.
    """
    try:
        tensor.as_strided((elements,), (1,))
    except RuntimeError:
        return False
    return True
