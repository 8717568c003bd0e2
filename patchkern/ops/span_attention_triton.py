# SPDX-License-Identifier: Apache-2.0
"""`span_attention` in Triton: online softmax over the ranges of the prefix and the own rows, forward and backward.

A program of the forward kernel, and of the one for the query's gradient, has one key head and a fixed block of
consecutive rows: all query heads of the key head, of all these rows, are the rows of its matrices. Blocks do not stop
at the ends of spans, so that many short spans (hypotheses of a search, branches of a trunk) fill a block together and
read their common prefix once. What a row sees are ranges of keys, ``lo..hi - 1`` each: those of its prefix, one after
the other, and its own span up to itself. A block streams the keys of its own rows once, and for each range of the
prefix those of each distinct begin once.

A program of the kernel for the gradients of key and value has one block of keys, and collects from all rows that see
them, in their order: no atomics, the same bits from run to run. Rows between the first and the last span that sees the
block are visited too, which is little where branches follow their trunk.

Small calls take as long as the host needs to launch them: one kernel forward, two or three backward. So every program
finds the spans of its rows itself, and the query's gradient leaves what they see to the kernel after it.

Nothing waits for the device, nothing is tuned at run time, and no size that changes with the batch takes part in the
compilation. The device's integers are trusted; they were checked when the layout was built. Finite rows cannot reach
those who do not see them; a NaN in a row can, within its block.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from patchkern.ops.span_attention_triton_forward import LOG2E, forward_kernel
from patchkern.ops.span_attention_triton_gradients import key_gradient_kernel, query_gradient_kernel


class Blocks(NamedTuple):
    """Rows of the matrices (``queries`` x ``keys``) of one program, its warps, and the key blocks in flight.

    ``registers`` is given where ptxas would rather spill a few than have more of them.
    """

    queries: int
    keys: int
    warps: int
    stages: int
    registers: int | None = None


def _forward_blocks(width: int, itemsize: int, ranges: int, silu: bool) -> Blocks:
    """By padded head width, bytes per element, ranges and activation.

    bfloat16's softmax over one range, at widths 64 and 128, has those that were within a few percent of the fastest on
    an H100 (trunks of 1,000 rows with 50 branches of 40, each kernel varied alone); nothing else was timed. All compile
    without spilling by Triton 3.6 and 3.9 for sm_80, sm_90 and sm_100.
    """
    if itemsize == 4:
        return Blocks(64, 32, 4, 1) if width <= 64 else Blocks(32, 32, 4, 1) if width <= 128 else Blocks(16, 32, 8, 1)
    if width > 128:
        return Blocks(64, 32, 8, 1)
    if width <= 64:
        return Blocks(64, 64, 8 if silu or ranges > 1 else 4, 2)
    return Blocks(64, 32, 4, 3, 255)


def _query_gradient_blocks(width: int, itemsize: int, ranges: int, silu: bool) -> Blocks:
    if itemsize == 4:
        return Blocks(32, 32, 4, 1) if width <= 64 else Blocks(16, 32, 4, 1) if width <= 128 else Blocks(16, 16, 4, 1)
    if width > 128:
        return Blocks(32, 32, 8, 1)
    if width > 64:
        return Blocks(64, 32, 8, 1, 255) if silu or ranges > 1 else Blocks(64, 32, 4, 3, 255)
    return Blocks(64, 32, 8, 1, 255) if ranges > 1 else Blocks(64, 32, 4, 2)


def _key_gradient_blocks(width: int, itemsize: int, ranges: int, silu: bool) -> Blocks:
    if itemsize == 4:
        return Blocks(32, 32, 4, 1) if width <= 64 else Blocks(16, 16, 4, 1)
    if width > 128:
        return Blocks(32, 32, 8, 1, 255)
    if silu:
        return Blocks(32, 64, 4, 2) if width <= 64 else Blocks(32, 32, 8, 1, 255)
    return Blocks(32, 64, 4, 2) if width <= 64 and ranges > 1 else Blocks(32, 64, 4, 3)


# ------------------------------------------------------------------ launches


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
    """Output (T, H, d), and the log-sum-exp of every row's scores, (T, H) float32, that `backward` starts from.

    With a ``normalizer`` the weights are silu of the scores, divided by it, and there is no log-sum-exp.
    """
    n_rows, n_heads = query.shape[:2]
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = query.new_empty((n_rows, n_heads) if normalizer is None else 0, dtype=torch.float32)
    if n_rows == 0:
        return out, lse
    stored = (key, value) if prefix_key is None or prefix_value is None else (prefix_key, prefix_value)
    groups = n_heads // key.shape[1]
    constants = _constants(_forward_blocks, *_shape(query, key, prefix, normalizer))
    query, key, value = _readable(query), _readable(key), _readable(value)
    seen_key, seen_value = map(_readable, stored)
    with torch.cuda.device_of(query):
        forward_kernel[_grid(n_rows, constants["BLOCK_M"] // groups, key)](
            *(query, key, value, seen_key, seen_value, cu_seqlens.contiguous(), prefix.contiguous(), out, lse),
            *_strides(query, key, value, seen_key, seen_value),
            n_rows,
            prefix.shape[0],
            *_numbers(scale, normalizer),
            **constants,
        )
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

    With a ``normalizer`` neither ``out`` nor ``lse`` is read.
    """
    stored = (key, value) if prefix_key is None or prefix_value is None else (prefix_key, prefix_value)
    separate = prefix_key is not None
    n_rows, n_heads = query.shape[:2]
    groups = n_heads // key.shape[1]
    query, key, value = _readable(query), _readable(key), _readable(value)
    seen_key, seen_value = map(_readable, stored)
    grad_query, grad_key, grad_value = (query.new_empty(x.shape) for x in (query, key, value))
    grad_seen_key, grad_seen_value = (query.new_empty(x.shape if separate else 0) for x in stored)
    grads = (grad_query, grad_key, grad_value, grad_seen_key, grad_seen_value)
    if n_rows == 0:
        for grad in grads:
            grad.zero_()
        return grads
    grad_out = grad_out.contiguous()
    if out is None or lse is None:
        out, lse = grad_out, grad_out.new_empty(0, dtype=torch.float32)  # nothing is read of them
    balance = torch.empty_like(lse)
    seen = query.new_empty(n_rows, 3 + 2 * prefix.shape[1], dtype=torch.int32)
    integers = (cu_seqlens.contiguous(), prefix.contiguous())
    shape = _shape(query, key, prefix, normalizer)
    factor, divisor = _numbers(scale, normalizer)
    with torch.cuda.device_of(query):
        constants = _constants(_query_gradient_blocks, *shape)
        query_gradient_kernel[_grid(n_rows, constants["BLOCK_M"] // groups, key)](
            *(query, key, value, seen_key, seen_value, *integers, out, lse, grad_out, balance, seen, grad_query),
            *_strides(query, key, value, seen_key, seen_value),
            n_rows,
            prefix.shape[0],
            factor,
            scale / divisor,
            **constants,
        )
        sides = [(key, value, grad_key, grad_value, True, not separate)]
        if separate and seen_key.shape[0]:
            sides.append((seen_key, seen_value, grad_seen_key, grad_seen_value, False, True))
        constants = _constants(_key_gradient_blocks, *shape)
        for k, v, grad_k, grad_v, is_own, is_prefix in sides:
            key_gradient_kernel[_grid(k.shape[0], constants["BLOCK_N"], k)](
                *(query, k, v, grad_out, lse, balance, seen, *integers, grad_k, grad_v),
                *_strides(query, k, v),
                k.shape[0],
                prefix.shape[0],
                factor,
                scale / divisor,
                divisor,
                is_own,
                is_prefix,
                **constants,
            )
    return grads


def _numbers(scale: float, normalizer: float | None) -> tuple[float, float]:
    """What products of queries and keys are multiplied with, and what sums of values are divided by in the end."""
    return (scale * LOG2E.value, 1.0) if normalizer is None else (scale, normalizer)


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:2]]


def _readable(rows: Tensor) -> Tensor:
    """Heads are read as contiguous vectors; rows and heads may lie at any stride."""
    return rows if rows.stride(2) == 1 or rows.shape[2] == 1 else rows.contiguous()


def _precision(dtype: torch.dtype) -> str:
    """Of `tl.dot`. float32 is multiplied as three products of tf32, which keep all its digits but the last or two."""
    if dtype == torch.bfloat16 and triton.knobs.runtime.interpret:
        return "interpreted"
    return "tf32x3" if dtype == torch.float32 else "tf32"


def _shape(
    query: Tensor, key: Tensor, prefix: Tensor, normalizer: float | None
) -> tuple[int, int, int, torch.dtype, int, bool]:
    """What the kernels are compiled for."""
    return query.shape[1], key.shape[1], query.shape[2], query.dtype, prefix.shape[1], normalizer is not None


@functools.cache
def _constants(
    table: Callable[[int, int, int, bool], Blocks],
    heads: int,
    key_heads: int,
    width: int,
    dtype: torch.dtype,
    ranges: int,
    silu: bool,
) -> Mapping[str, Any]:
    padded = max(triton.next_power_of_2(width), 16)
    blocks = table(padded, dtype.itemsize, ranges, silu)
    constants = {
        "RANGES": ranges,
        "HEADS": heads,
        "GROUPS": heads // key_heads,
        "WIDTH": width,
        "BLOCK_M": max(blocks.queries, triton.next_power_of_2(heads // key_heads)),
        "BLOCK_N": blocks.keys,
        "BLOCK_D": padded,
        "PRECISION": _precision(dtype),
        "ACTIVATION": "silu" if silu else "softmax",
        "num_warps": blocks.warps,
        "num_stages": blocks.stages,
    }
    if blocks.registers is not None and torch.version.hip is None:
        constants["maxnreg"] = blocks.registers
    return constants


def _grid(n_rows: int, block: int, key: Tensor) -> tuple[int, int]:
    return -(-n_rows // block), key.shape[1]
