# SPDX-License-Identifier: Apache-2.0
"""Span attention: causal attention inside each span of a packed batch, without a mask and without padding.

A span may have a prefix: more rows, in one range or several, which all of its rows see fully. A user's history is then
computed once, as a span, and each of many continuations is a span whose prefix it is (`PatchLayout.prefix`).
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from patchkern.batch.arguments import check_count, check_number
from patchkern.ops import span_attention_prefixed as prefixed
from patchkern.ops.span_attention_flash import cuda_kernel
from patchkern.ops.span_checks import check_spans


def span_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    *,
    prefix: Tensor | None = None,
    prefix_key: Tensor | None = None,
    prefix_value: Tensor | None = None,
    max_prefix: int | None = None,
) -> Tensor:
    """Causal attention inside each span of a packed batch, and over a span's prefix where it has one.

    Args:
        query: (1, H, T, d).
        key, value: (1, Hkv, T, d), H a multiple of Hkv.
        cu_seqlens: (S + 1,) int32 on the same device; span s is rows ``cu_seqlens[s]:cu_seqlens[s + 1]``.
        max_seqlen: length of the longest span; computed, with a host synchronisation, where not given.
        scaling: factor of the scores; 1 / sqrt(d) where not given.
        dropout: probability of dropping an attention weight.
        sliding_window: a row sees at most this many rows, itself included. Not with ``prefix``.
        prefix: (S, 2) int32, or (S, R, 2) with R ranges for each span: span s sees, besides itself, all of rows
            ``prefix[s, r, 0] .. prefix[s, r, 1] - 1`` of ``prefix_key`` and ``prefix_value``; none where the two are
            equal. The ranges of a span overlap neither each other nor the span, which the CPU checks.
        prefix_key, prefix_value: (1, Hkv, P, d); where not given, ``key`` and ``value`` themselves.
        max_prefix: rows of the longest prefix, all of its ranges together, where known.

    Returns:
        (1, T, H, d), differentiable in all five tensors. A prefix is read where it lies, not copied per span, and its
        gradient collects from all spans that see it.

        On the CPU this is one call of the native kernels, with prefixes or without, unless there is dropout or a window
        that hides something. On CUDA spans without prefixes take ``flash_attn`` or torch's ``varlen_attn`` in bfloat16
        and float16, which wait for the device only where ``max_seqlen`` is missing, and those with prefixes, or in
        float32, kernels of our own, which never wait and whose gradients are the same bit for bit from run to run.
        What none of these takes goes over tiles of rows (`patchkern.ops.span_attention_prefixed`) where there are
        prefixes, else through one `scaled_dot_product_attention` per span, which waits for ``cu_seqlens`` once a call.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    if dropout:
        check_number("dropout", dropout, minimum=0, below=1)
    if scaling is not None:
        check_number("scaling", scaling)
    if sliding_window is not None:
        check_count("sliding_window", sliding_window, minimum=1)
    for name, rows in (("query", query), ("key", key), ("value", value)):
        if not isinstance(rows, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(rows).__name__}")
    device = query.device.type
    if torch.is_autocast_enabled(device):
        # rotary embeddings promote to float32 under autocast; the kernels below are not autocast operators
        dtype = torch.get_autocast_dtype(device)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        prefix_key, prefix_value = (None if x is None else x.to(dtype) for x in (prefix_key, prefix_value))
    if prefix is not None:
        if sliding_window is not None:
            raise ValueError(f"sliding_window: expected None with a prefix, which is seen fully, got {sliding_window}")
        check_spans(query, key, value, cu_seqlens, prefix, prefix_key, prefix_value, packed=False)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        ranges = prefix if prefix.dim() == 3 else prefix[:, None]
        return prefixed.span_attention(query, key, value, cu_seqlens, ranges, prefix_key, prefix_value, scale, dropout)
    if prefix_key is not None or prefix_value is not None:
        raise ValueError("prefix: expected the rows that each span sees of prefix_key and prefix_value, got None")
    kernel = cuda_kernel(query, key, value, dropout)
    if kernel is None:
        check_spans(query, key, value, cu_seqlens, None, None, None, packed=False)
    if kernel is None and _prefixed_serves(query, value, max_seqlen, dropout, sliding_window):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        none = cu_seqlens.new_empty(cu_seqlens.shape[0] - 1, 0, 2)
        return prefixed.span_attention(query, key, value, cu_seqlens, none, None, None, scale)
    if kernel is None:
        return _span_sdpa(query, key, value, cu_seqlens.tolist(), scaling, dropout, sliding_window)
    if max_seqlen is None:
        max_seqlen = int(cu_seqlens.diff().max())
    window = (-1 if sliding_window is None else sliding_window - 1, 0)
    q, k, v = prefixed.by_row(query), prefixed.by_row(key), prefixed.by_row(value)
    return kernel(q, k, v, cu_seqlens, max_seqlen, scaling, dropout, window).unsqueeze(0)


def _prefixed_serves(
    query: Tensor, value: Tensor, max_seqlen: int | None, dropout: float, sliding_window: int | None
) -> bool:
    """Whether spans without prefixes are attended in one call of the kernels for prefixes, which know no window."""
    if sliding_window is not None and (max_seqlen is None or max_seqlen > sliding_window):
        return False
    return prefixed.serves(query, value, dropout)


def _span_sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: list[int],
    scaling: float | None,
    dropout: float,
    sliding_window: int | None,
) -> Tensor:
    # split, not slices: the backward of a split is one concatenation, that of S slices is S full-size additions
    lengths = [end - start for start, end in itertools.pairwise(cu_seqlens)]
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != query.shape[2] or min(lengths, default=0) < 0:
        raise ValueError(
            f"cu_seqlens: expected non-decreasing offsets from 0 to {query.shape[2]}, got {cu_seqlens[0]} to "
            f"{cu_seqlens[-1]}"
        )
    spans = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    out = [
        F.scaled_dot_product_attention(
            q, k, v, **_causal(q, sliding_window), dropout_p=dropout, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
        )
        for q, k, v in spans
    ]
    return torch.cat([o.transpose(1, 2) for o in out], dim=1) if out else query.transpose(1, 2)


def _causal(query: Tensor, sliding_window: int | None) -> dict[str, Any]:
    length = query.shape[2]
    if sliding_window is None or length <= sliding_window:
        return {"is_causal": True}
    visible = torch.ones(length, length, dtype=torch.bool, device=query.device)
    return {"attn_mask": visible.tril_().triu_(1 - sliding_window)}
