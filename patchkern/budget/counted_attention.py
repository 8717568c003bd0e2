# SPDX-License-Identifier: Apache-2.0
"""Span attention in a training step that is counted: on fake tensors, what it keeps and what it takes for a while.

Nothing here computes. Kernels allocate more than they return, in calls that a count does not look into; so each route
of `patchkern.ops.span_attention` is written down as the tensors that it makes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchkern.budget.live_bytes import LiveBytes
from patchkern.ops import native
from patchkern.ops.span_attention_flash import repeats_keys
from patchkern.ops.span_attention_native import forward_scratch

PART = "attention"

_TILE_ROWS = 128  # of `patchkern.ops.span_attention_tiles`
_FLASH_SCRATCH = 160 << 10  # of PyTorch's flash attention on the CPU, for each thread

# of a query, key and value (T, heads, d): what a backward pass takes beside their gradients
Scratch = Callable[[Tensor, Tensor, Tensor], list[Tensor]]


class CountedAttention:
    """Stands in for `patchkern_varlen`, as the ``span_cache`` of a forward pass.

    Args:
        counter: told what belongs to attention.
        prefixes: whether spans have prefixes, as the branches of a trunk.
        longest: rows of the longest prefix.
        on_cuda: which kernels run.
    """

    def __init__(self, counter: LiveBytes, prefixes: bool, longest: int, on_cuda: bool) -> None:
        self._counter, self._prefixes, self._longest, self._on_cuda = counter, prefixes, longest, on_cuda

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """``query`` (1, H, T, d), ``key`` and ``value`` (1, Hkv, T, d) to (1, T, H, d)."""
        with self._counter.within(PART):
            if torch.is_autocast_enabled("cpu"):
                dtype = torch.get_autocast_dtype("cpu")
                query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
            has_kernels = self._on_cuda or native.unusable_reason() is None
            if not self._prefixes and not has_kernels:  # a call per span, of which all together keep what one would
                groups = query.shape[1] != key.shape[1]
                out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=groups)
                return out.transpose(1, 2).clone(memory_format=torch.contiguous_format)
            on_cuda = _triton if self._prefixes or query.dtype == torch.float32 else _varlen
            scratch = on_cuda if self._on_cuda else _native if has_kernels else self._tiles
            if scratch is _varlen and query.shape[1] != key.shape[1] and repeats_keys():
                key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
            rows = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
            packed: Tensor = _Kernel.apply(*rows, scratch, self._counter)
            return packed.unsqueeze(0)

    def _tiles(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        wide = torch.promote_types(query.dtype, torch.float32)
        rows = min(len(query), _TILE_ROWS)
        made = [query.new_empty(8, rows, *query.shape[1:], dtype=wide)]
        made += [query.new_empty(torch.get_num_threads() * _FLASH_SCRATCH, dtype=torch.uint8)]
        made += [query.new_empty(3, len(query), dtype=torch.int64)]
        narrow = query.dtype != wide
        if narrow:
            made += [x.new_empty(x.shape, dtype=wide) for x in (key, value)]
        for x in (key, value):  # the gradient of one prefix, and the prefix itself where it had to be widened
            made += [x.new_empty(1 + narrow, self._longest, *x.shape[1:], dtype=wide)]
        return made


def _native(query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    """What each thread holds, twice that of a forward pass, and gradients of keys and values in float32."""
    wide = torch.promote_types(query.dtype, torch.float32)
    held = 2 * forward_scratch(query.shape[1] // key.shape[1], query.shape[2], wide.itemsize)
    made = [query.new_empty(torch.get_num_threads() * held, dtype=torch.uint8)]
    return made if query.dtype == wide else [*made, *(x.new_empty(x.shape, dtype=wide) for x in (key, value))]


def _triton(query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    """The output's gradient by row, every row's balance and what it sees, of two ranges at most, as experts have."""
    n_rows, n_heads = query.shape[:2]
    return [
        query.new_empty(n_rows, n_heads, value.shape[2]),
        query.new_empty(n_rows, n_heads, dtype=torch.float32),
        query.new_empty(n_rows, 3 + 2 * 2, dtype=torch.int32),
    ]


def _varlen(query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    """Flash attention: the query's gradient in float32 in widths of 32, and a key's once per head of the queries."""
    n_rows, n_heads, width = query.shape
    made = [
        query.new_empty(n_rows, n_heads, -(-width // 32) * 32, dtype=torch.float32),
        query.new_empty(n_rows, n_heads, dtype=torch.float32),
    ]
    if n_heads != key.shape[1]:
        made += [query.new_empty(n_rows, n_heads, x.shape[2]) for x in (key, value)]
    return made


class _Kernel(torch.autograd.Function):
    """Keeps what all of them keep: query, key, value, output and the log-sum-exp of every row."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scratch: Scratch, counter: LiveBytes) -> Tensor:
        wide = torch.promote_types(query.dtype, torch.float32)
        out = query.new_empty(*query.shape[:2], value.shape[2])
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:2], dtype=wide))
        ctx.scratch, ctx.counter = scratch, counter
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, _, _ = ctx.saved_tensors
        with ctx.counter.within(PART):
            scratch = ctx.scratch(query, key, value)
            grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value)]
            del scratch
        return (*grads, None, None)
