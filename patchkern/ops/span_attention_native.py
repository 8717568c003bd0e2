# SPDX-License-Identifier: Apache-2.0
"""`span_attention` in C++ on the CPU (csrc/span_attention_cpu.cpp): one call for all spans of a layer, either way.

Rows are cut into blocks of one span, or of branches of one trunk; what becomes of a row depends on the spans of its
trunk and on nothing else in the batch, nor on the number of threads. A trunk's keys and values are read where they
lie, and what a thread holds is a few hundred kilobytes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
from torch import Tensor

from patchkern.batch.span_ranges import overlap_error, range_error
from patchkern.ops import native

_SPAN_OFFSETS, _SPAN_PREFIX, _SPAN_OVERLAP = 21, 22, 23  # Status in csrc/pool_rows.h

_LANES, _KEYS, _VECTOR = 192, 64, 16  # of a block, and of a vector at most: csrc/span_attention.h and its kernels


def forward_scratch(group: int, width: int, item: int) -> int:
    """Bytes that each thread holds in the forward pass, for ``group`` heads per key head and sums of ``item`` bytes."""
    lanes = max(_LANES // group, 1) * group + _VECTOR
    width += _VECTOR
    return item * (lanes * (3 * width + _KEYS + 6) + 2 * _KEYS * width)


def serves(query: Tensor, dropout: float) -> bool:
    """Whether these tensors are attended here; attention dropout is not."""
    return query.device.type == "cpu" and dropout == 0 and native.unusable_reason() is None


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    prefix: Tensor,
    prefix_key: Tensor | None,
    prefix_value: Tensor | None,
    scale: float,
    normalizer: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Output (T, H, dv), and the log-sum-exp of every row's scores, (T, H), that `backward` starts from.

    With a ``normalizer`` the weights are silu of the scores, divided by it, and there is no log-sum-exp.
    """
    call = _Call(query, key, value, cu_seqlens, prefix, prefix_key, prefix_value, scale, normalizer)
    out = query.new_empty(*query.shape[:2], value.shape[2])
    wide = torch.promote_types(query.dtype, torch.float32)
    lse = query.new_empty(query.shape[:2] if normalizer is None else 0, dtype=wide)
    status, position = native.module().span_attention(*call.arguments(out, lse), *_threads())
    call.check(status, position)
    return out, lse


def backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor | None,
    lse: Tensor | None,
    cu_seqlens: Tensor,
    prefix: Tensor,
    prefix_key: Tensor | None,
    prefix_value: Tensor | None,
    scale: float,
    normalizer: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, prefix_key and prefix_value; of the last two without rows where they are None.

    A key's gradient is summed in at least float32, block after block in the order of the rows, and rounded once. With a
    ``normalizer`` neither ``out`` nor ``lse`` is read.
    """
    call = _Call(query, key, value, cu_seqlens, prefix, prefix_key, prefix_value, scale, normalizer)
    wide = torch.promote_types(query.dtype, torch.float32)
    out, lse = (query.new_empty(0) if x is None else x.contiguous() for x in (out, lse))
    grad_out = _by_head(grad_out)
    grad_query = torch.empty(query.shape, dtype=query.dtype)
    own = [torch.zeros(x.shape, dtype=wide) for x in (key, value)]
    stored = [
        x if y is None else torch.zeros(y.shape, dtype=wide)
        for x, y in zip(own, (prefix_key, prefix_value), strict=True)
    ]
    grads = [x.data_ptr() for x in (grad_query, *own, *stored)]
    arguments = call.arguments(out, lse, grad_out)
    status, position = native.module().span_attention_grad(*arguments, *grads, *_threads())
    call.check(status, position)
    results = [grad_query, *(x.to(query.dtype) for x in own)]
    for given, total in zip((prefix_key, prefix_value), stored, strict=True):
        results.append(query.new_empty(0) if given is None else total.to(query.dtype))
    return results[0], results[1], results[2], results[3], results[4]


def _threads() -> tuple[int, str]:
    return torch.get_num_threads(), os.environ.get(native.ENVIRONMENT, "auto")


def _by_head(rows: Tensor) -> Tensor:
    """As the kernels take them: each head's numbers side by side."""
    return rows if rows.stride(2) == 1 or rows.shape[2] == 1 else rows.contiguous()


class _Call:
    """What both directions pass on; holds the tensors whose addresses it gives away."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seqlens: Tensor,
        prefix: Tensor,
        prefix_key: Tensor | None,
        prefix_value: Tensor | None,
        scale: float,
        normalizer: float | None,
    ) -> None:
        self.query, self.key, self.value = _by_head(query), _by_head(key), _by_head(value)
        self.apart = prefix_key is not None
        self.prefix_key = self.key if prefix_key is None else _by_head(prefix_key)
        self.prefix_value = self.value if prefix_value is None else _by_head(prefix_value)
        self.cu_seqlens, self.prefix = cu_seqlens.contiguous(), prefix.contiguous()
        self.numbers = (scale, normalizer is not None, 1.0 if normalizer is None else normalizer)

    def arguments(self, out: Tensor, lse: Tensor, *grads: Tensor) -> Iterable[object]:
        rows, heads, width = self.query.shape
        tensors = (self.query, self.key, self.value, self.prefix_key, self.prefix_value, *grads)
        self.strided = torch.tensor([(x.data_ptr(), x.stride(0), x.stride(1)) for x in tensors])
        return (
            *(native.DTYPES[self.query.dtype], rows, *self.prefix.shape[:2], heads, self.key.shape[1]),
            *(width, self.value.shape[2]),
            *(self.cu_seqlens.data_ptr(), self.prefix.data_ptr(), *self.numbers, self.strided.data_ptr()),
            *(len(self.prefix_key), self.apart, out.data_ptr(), lse.data_ptr()),
        )

    def check(self, status: int, position: int) -> None:
        """Say what was wrong with the integers: before that, nothing was written."""
        rows, stored = len(self.query), len(self.prefix_key)
        if status == _SPAN_OFFSETS:
            first, last = int(self.cu_seqlens[0]), int(self.cu_seqlens[-1])
            raise ValueError(f"cu_seqlens: expected non-decreasing offsets from 0 to {rows}, got {first} to {last}")
        if status == _SPAN_PREFIX:
            raise range_error(self.prefix, position, stored)
        if status == _SPAN_OVERLAP:
            raise overlap_error(self.prefix, position)
        if status:
            raise RuntimeError(f"span_attention: the native kernel failed with status {status}")
