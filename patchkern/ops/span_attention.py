# SPDX-License-Identifier: Apache-2.0
"""The op `span_attention`: causal attention inside each span, plus one fully visible prefix run of rows each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from patchkern.ops import span_attention_tiles as tiles

_library = torch.library.Library("patchkern", "FRAGMENT")
_library.define(
    "span_attention(Tensor query, Tensor key, Tensor value, Tensor cu_seqlens, Tensor prefix, Tensor? prefix_key, "
    "Tensor? prefix_value, float scale, float dropout, int seed) -> (Tensor, Tensor)"
)
_library.define(
    "span_attention_grad(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, "
    "Tensor cu_seqlens, Tensor prefix, Tensor? prefix_key, Tensor? prefix_value, float scale, float dropout, int seed) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _forward(query: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    with torch.autocast(query.device.type, enabled=False):
        return tiles.forward(query, *args)


def _backward(grad_out: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    with torch.autocast(grad_out.device.type, enabled=False):
        return tiles.backward(grad_out, *args)


for _device in ("CPU", "CUDA"):
    _library.impl("span_attention", _forward, _device)
    _library.impl("span_attention_grad", _backward, _device)


@torch.library.register_fake("patchkern::span_attention")
def _(query: Tensor, key: Tensor, value: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty(*query.shape[:2], value.shape[2]), query.new_empty(query.shape[:2], dtype=wide)


@torch.library.register_fake("patchkern::span_attention_grad")
def _(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    prefix: Tensor,
    prefix_key: Tensor | None,
    prefix_value: Tensor | None,
    *args: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    def by_head(like: Tensor | None) -> Tensor:
        if like is None:
            return key.new_empty(0)
        return like.new_empty(like.shape[1], like.shape[0], like.shape[2]).transpose(0, 1)

    return query.new_empty(query.shape), by_head(key), by_head(value), by_head(prefix_key), by_head(prefix_value)


class _SpanAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seqlens: Tensor,
        prefix: Tensor,
        prefix_key: Tensor | None,
        prefix_value: Tensor | None,
        *options: Any,
    ) -> Tensor:
        rows = (cu_seqlens, prefix, prefix_key, prefix_value)
        out, lse = torch.ops.patchkern.span_attention(query, key, value, *rows, *options)
        ctx.save_for_backward(query, key, value, out, lse, *rows)
        ctx.options = options
        result: Tensor = out
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        grads = torch.ops.patchkern.span_attention_grad(grad_out, *ctx.saved_tensors, *ctx.options)
        stored = [x if needed else None for x, needed in zip(grads[3:], ctx.needs_input_grad[5:7], strict=True)]
        return (*grads[:3], None, None, *stored, *[None] * len(ctx.options))


def span_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    prefix: Tensor,
    prefix_key: Tensor | None,
    prefix_value: Tensor | None,
    scale: float,
    dropout: float = 0.0,
) -> Tensor:
    """Span attention in packed form; `patchkern.attention.span_attention` checks the arguments.

    Args:
        query: (T, H, d); key: (T, Hkv, d); value: (T, Hkv, dv).
        cu_seqlens: (S + 1,) int32, and prefix: (S, 2) int32, rows of ``prefix_key`` (P, Hkv, d) and ``prefix_value``
            (P, Hkv, dv), or of ``key`` and ``value`` where those are None.

    Returns:
        (T, H, dv), differentiable once.
    """
    seed = int(torch.randint(1 << 62, ())) if dropout > 0 else 0
    arguments = (query, key, value, cu_seqlens, prefix, prefix_key, prefix_value, scale, dropout, seed)
    floats = (query, key, value, prefix_key, prefix_value)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in floats):
        out: Tensor = _SpanAttention.apply(*arguments)
        return out
    out, _ = torch.ops.patchkern.span_attention(*arguments)
    return out


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    prefix: Tensor,
    prefix_key: Tensor | None,
    prefix_value: Tensor | None,
    scale: float,
) -> Tensor:
    """The same in plain PyTorch, with the mask written out: the oracle and the documentation."""
    prefix_key = key if prefix_key is None else prefix_key
    prefix_value = value if prefix_value is None else prefix_value
    span = torch.repeat_interleave(cu_seqlens.diff().long())
    row, place = torch.arange(len(query)), torch.arange(len(prefix_key))
    own = (span[:, None] == span) & (row[:, None] >= row)
    seen = (place >= prefix[span, :1]) & (place < prefix[span, 1:])
    keys, values = torch.cat([prefix_key, key]), torch.cat([prefix_value, value])
    groups = query.shape[1] // key.shape[1]
    keys, values = keys.repeat_interleave(groups, dim=1), values.repeat_interleave(groups, dim=1)
    scores = torch.einsum("qhd,khd->hqk", query, keys) * scale
    weights = scores.masked_fill(~torch.cat([seen, own], dim=1), float("-inf")).softmax(dim=-1)
    return torch.einsum("hqk,khd->qhd", weights, values)
