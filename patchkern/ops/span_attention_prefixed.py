# SPDX-License-Identifier: Apache-2.0
"""The op `span_attention`: causal attention inside each span, plus ranges of rows that it sees fully.

Three routes give the same results: Triton kernels on CUDA, C++ kernels on the CPU, and, where neither serves, tiles of
matrix products (see the modules beside this one); `forward` decides which runs. Two calls of a variable-length kernel,
merged by their log-sum-exps, would do too for a forward pass: they read a shared prefix once per span, and only newer
versions of torch take ranges that overlap. FlexAttention expresses the mask, but wants it as blocks, built anew for
every batch; on the CPU it has no backward pass (bench/bench_attention.py, docs/benchmarks.md).
"""

from __future__ import annotations

import functools
import importlib
import warnings
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from patchkern.ops import span_attention_native as native
from patchkern.ops import span_attention_tiles as tiles
from patchkern.ops.checks import records_gradient

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


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    prefix: Tensor,
    prefix_key: Tensor | None,
    prefix_value: Tensor | None,
    scale: float,
    dropout: float,
    seed: int,
    normalizer: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The output, and the log-sum-exps; with a ``normalizer`` that of `patchkern.ops.hstu_attention`, and no rows."""
    rows = (query, key, value, cu_seqlens, prefix, prefix_key, prefix_value)
    if (module := kernels(query, value, dropout)) is not None:
        result: tuple[Tensor, Tensor] = module.forward(*rows, scale, normalizer)
        return result
    if native.serves(query, dropout):
        return native.forward(*rows, scale, normalizer)
    with torch.autocast(query.device.type, enabled=False):
        return tiles.forward(*rows, scale, dropout, seed, normalizer)


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
    dropout: float,
    seed: int,
    normalizer: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, prefix_key and prefix_value, from what `forward` gave."""
    rows = (grad_out, query, key, value, out, lse, cu_seqlens, prefix, prefix_key, prefix_value)
    if (module := kernels(query, value, dropout)) is not None:
        result: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = module.backward(*rows, scale, normalizer)
        return result
    if native.serves(query, dropout):
        return native.backward(*rows, scale, normalizer)
    with torch.autocast(query.device.type, enabled=False):
        return tiles.backward(*rows, scale, dropout, seed, normalizer)


def serves(query: Tensor, value: Tensor, dropout: float) -> bool:
    """Whether compiled kernels, of whichever kind, take these rows; else tiles would."""
    if query.is_cuda:
        return _unusable_reason(query, value, dropout) is None
    return native.serves(query, dropout)


def kernels(query: Tensor, value: Tensor, dropout: float) -> ModuleType | None:
    """The Triton kernels where they serve: on CUDA, all but float64, dropout and unequal or very wide heads.

    Elsewhere on CUDA the tiles run, which wait for the device once per call; one warning says why.
    """
    if not query.is_cuda:
        return None
    reason = _unusable_reason(query, value, dropout)
    if reason is not None:
        _warn_once(reason)
        return None
    from patchkern.ops import span_attention_triton

    return span_attention_triton


def _unusable_reason(query: Tensor, value: Tensor, dropout: float) -> str | None:
    if query.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the kernels have no {query.dtype}"
    if not query.shape[-1] == value.shape[-1] <= 256:
        return f"the kernels have heads of at most 256, not {query.shape[-1]} for keys and {value.shape[-1]} for values"
    if dropout > 0:
        return "the kernels have no attention dropout; set the model's to 0"
    return _unusable_device(query.device)


@functools.cache
def _unusable_device(device: torch.device) -> str | None:
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return "the kernels need a device of compute capability 8.0"
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"triton does not load: {error}"
    return None


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(f"attention over prefixes runs without kernels, slowly: {reason}", stacklevel=2)


for _device in ("CPU", "CUDA"):
    _library.impl("span_attention", forward, _device)
    _library.impl("span_attention_grad", backward, _device)


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
    return empty_gradients(query, key, value, prefix_key, prefix_value)


def empty_gradients(
    query: Tensor, key: Tensor, value: Tensor, prefix_key: Tensor | None, prefix_value: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of the shapes that `backward` gives."""

    def rows(like: Tensor | None) -> Tensor:
        return query.new_empty(0 if like is None else like.shape)

    return rows(query), rows(key), rows(value), rows(prefix_key), rows(prefix_value)


class _SpanAttention(torch.autograd.Function):
    """Of heads (1, H, T, d): were they made rows out here, autograd would follow each of those views."""

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
        own = (by_row(query), by_row(key), by_row(value))
        seen = (cu_seqlens, prefix, *_by_row_if_given(prefix_key, prefix_value))
        out, lse = torch.ops.patchkern.span_attention(*own, *seen, *options)
        ctx.save_for_backward(*own, out, lse, *seen)
        ctx.options = options
        result: Tensor = out.unsqueeze(0)
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        rows = torch.ops.patchkern.span_attention_grad(grad_out.squeeze(0), *ctx.saved_tensors, *ctx.options)
        needed = (True, True, True, *ctx.needs_input_grad[5:7])
        grads = [x.transpose(0, 1).unsqueeze(0) if wanted else None for x, wanted in zip(rows, needed, strict=True)]
        return (*grads[:3], None, None, *grads[3:], *[None] * len(ctx.options))


def by_row(heads: Tensor) -> Tensor:
    """(1, H, T, d) as (T, H, d)."""
    return heads.squeeze(0).transpose(0, 1)


def _by_row_if_given(*heads: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else by_row(x) for x in heads]


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
    """Span attention of heads; `patchkern.ops.span_attention` checks the arguments.

    Args:
        query: (1, H, T, d); key: (1, Hkv, T, d); value: (1, Hkv, T, dv).
        cu_seqlens: (S + 1,) int32, and prefix: (S, R, 2) int32, ranges of rows of ``prefix_key`` (1, Hkv, P, d) and
            ``prefix_value`` (1, Hkv, P, dv), or of ``key`` and ``value`` where those are None.

    Returns:
        (1, T, H, dv), differentiable once.
    """
    seed = int(torch.randint(1 << 62, ())) if dropout > 0 else 0
    options = (scale, dropout, seed)
    if records_gradient(query=query, key=key, value=value, prefix_key=prefix_key, prefix_value=prefix_value):
        seen = (cu_seqlens, prefix, prefix_key, prefix_value)
        out: Tensor = _SpanAttention.apply(query, key, value, *seen, *options)
        return out
    own, stored = (by_row(query), by_row(key), by_row(value)), _by_row_if_given(prefix_key, prefix_value)
    out, _ = torch.ops.patchkern.span_attention(*own, cu_seqlens, prefix, *stored, *options)
    return out.unsqueeze(0)


def dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    prefix: Tensor,
    prefix_key: Tensor | None,
    prefix_value: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """All scores (H, T, P + T), which of them a row sees (T, P + T), and the values (P + T, H, dv)."""
    prefix_key = key if prefix_key is None else prefix_key
    prefix_value = value if prefix_value is None else prefix_value
    span = torch.repeat_interleave(cu_seqlens.diff().long())
    row, place = (torch.arange(len(rows), device=rows.device) for rows in (query, prefix_key))
    own = (span[:, None] == span) & (row[:, None] >= row)
    begin, end = prefix[span, :, :, None].unbind(2)  # (T, R, 1)
    seen = ((place >= begin) & (place < end)).any(dim=1)
    keys, values = torch.cat([prefix_key, key]), torch.cat([prefix_value, value])
    groups = query.shape[1] // key.shape[1]
    keys, values = keys.repeat_interleave(groups, dim=1), values.repeat_interleave(groups, dim=1)
    scores = torch.einsum("qhd,khd->hqk", query, keys) * scale
    return scores, torch.cat([seen, own], dim=1), values


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
    scores, seen, values = dense(query, key, value, cu_seqlens, prefix, prefix_key, prefix_value, scale)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, float("-inf")).softmax(dim=-1), values)
