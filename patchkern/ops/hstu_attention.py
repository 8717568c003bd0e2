# SPDX-License-Identifier: Apache-2.0
"""HSTU's attention over spans: every weight is silu of its score, divided by a constant of the model; no softmax.

    out_t = sum over s that t sees of silu(scale * q_t . k_s) * v_s / normalizer

The constant is the same however many rows are computed at once: rows come out alike in training, compressed, and
served. Spans, ranges and kernels are those of `patchkern.ops.span_attention`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from patchkern.batch.arguments import check_number
from patchkern.ops import span_attention_prefixed as prefixed
from patchkern.ops.checks import records_gradient
from patchkern.ops.span_checks import check_spans

_library = torch.library.Library("patchkern", "FRAGMENT")
_library.define(
    "hstu_attention(Tensor query, Tensor key, Tensor value, Tensor cu_seqlens, Tensor prefix, Tensor? prefix_key, "
    "Tensor? prefix_value, float scale, float normalizer) -> Tensor"
)
_library.define(
    "hstu_attention_grad(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor cu_seqlens, Tensor prefix, "
    "Tensor? prefix_key, Tensor? prefix_value, float scale, float normalizer) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def hstu_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    *,
    normalizer: float,
    scale: float | None = None,
    prefix: Tensor | None = None,
    prefix_key: Tensor | None = None,
    prefix_value: Tensor | None = None,
) -> Tensor:
    """Pointwise attention inside each span of a packed batch, causal, and over a span's prefix where it has one.

    Args:
        query: (T, H, d).
        key: (T, Hkv, d), value: (T, Hkv, dv), H a multiple of Hkv.
        cu_seqlens: (S + 1,) int32 on the same device; span s is rows ``cu_seqlens[s]:cu_seqlens[s + 1]``.
        normalizer: what the sum is divided by: a constant, such as the rows of the longest sequence in training.
        scale: factor of the scores; 1 / sqrt(d) where not given.
        prefix, prefix_key, prefix_value: as in `patchkern.ops.span_attention.span_attention`; the last two are
            (P, Hkv, d) and (P, Hkv, dv).

    Returns:
        (T, H, dv), differentiable once in all five tensors, of which nothing but themselves is kept for that. Gradients
        are the same bit for bit from run to run, and on the CPU a user's rows are, whoever else is in the batch.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Examples:
        >>> import torch
        >>> from patchkern.ops.hstu_attention import hstu_attention
        >>> rows, spans = torch.ones(3, 1, 4), torch.tensor([0, 3], dtype=torch.int32)
        >>> hstu_attention(rows, rows, rows, spans, normalizer=3.0)[:, 0, 0]  # silu(4 / 2) of one, two and three rows
        tensor([0.5872, 1.1744, 1.7616])
    """
    check_number("normalizer", normalizer, above=0)
    if scale is not None:
        check_number("scale", scale)
    if prefix is None and (prefix_key is not None or prefix_value is not None):
        raise ValueError("prefix: expected the rows that each span sees of prefix_key and prefix_value, got None")
    check_spans(query, key, value, cu_seqlens, prefix, prefix_key, prefix_value, packed=True)
    if prefix is None:
        ranges = cu_seqlens.new_empty(cu_seqlens.shape[0] - 1, 0, 2)
    else:
        ranges = prefix if prefix.dim() == 3 else prefix[:, None]
    scale = query.shape[2] ** -0.5 if scale is None else scale
    arguments = (query, key, value, cu_seqlens, ranges, prefix_key, prefix_value, float(scale), float(normalizer))
    if records_gradient(query=query, key=key, value=value, prefix_key=prefix_key, prefix_value=prefix_value):
        out: Tensor = _HstuAttention.apply(*arguments)
    else:
        out = torch.ops.patchkern.hstu_attention(*arguments)
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
    normalizer: float,
) -> Tensor:
    """The same in plain PyTorch, with the mask written out: the oracle and the documentation."""
    scores, seen, values = prefixed.dense(query, key, value, cu_seqlens, prefix, prefix_key, prefix_value, scale)
    return torch.einsum("hqk,khd->qhd", F.silu(scores).masked_fill(~seen, 0.0), values) / normalizer


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    prefix: Tensor,
    prefix_key: Tensor | None,
    prefix_value: Tensor | None,
    scale: float,
    normalizer: float,
) -> Tensor:
    rows = (query, key, value, cu_seqlens, prefix, prefix_key, prefix_value)
    return prefixed.forward(*rows, scale, 0.0, 0, normalizer)[0]


def _backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    prefix: Tensor,
    prefix_key: Tensor | None,
    prefix_value: Tensor | None,
    scale: float,
    normalizer: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows = (grad_out, query, key, value, None, None, cu_seqlens, prefix, prefix_key, prefix_value)
    return prefixed.backward(*rows, scale, 0.0, 0, normalizer)


for _device in ("CPU", "CUDA"):
    _library.impl("hstu_attention", _forward, _device)
    _library.impl("hstu_attention_grad", _backward, _device)


@torch.library.register_fake("patchkern::hstu_attention")
def _(query: Tensor, key: Tensor, value: Tensor, *args: Any) -> Tensor:
    return query.new_empty(*query.shape[:2], value.shape[2])


@torch.library.register_fake("patchkern::hstu_attention_grad")
def _(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    prefix: Tensor,
    prefix_key: Tensor | None,
    prefix_value: Tensor | None,
    *args: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return prefixed.empty_gradients(query, key, value, prefix_key, prefix_value)


class _HstuAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        ctx.save_for_backward(*arguments[:7])
        ctx.options = arguments[7:]
        out: Tensor = torch.ops.patchkern.hstu_attention(*arguments)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        grads = torch.ops.patchkern.hstu_attention_grad(grad_out, *ctx.saved_tensors, *ctx.options)
        stored = [x if needed else None for x, needed in zip(grads[3:], ctx.needs_input_grad[5:7], strict=True)]
        return (*grads[:3], None, None, *stored, None, None)
