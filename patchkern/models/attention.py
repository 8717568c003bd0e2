# SPDX-License-Identifier: Apache-2.0
"""Span attention: causal attention inside each span of a packed batch, without a mask and without padding.

A span may have a prefix: one more run of rows, which all of its rows see fully. A user's history is then computed once,
as a span, and each of many continuations is a span whose prefix it is (`PatchLayout.prefix`).

Registered with transformers as ``attn_implementation="patchkern_varlen"``, together with its mask function (an
attention without one silently gets no mask, even for padded batches). Three kinds of call arrive here:

- a packed batch, recognised by ``cu_seq_lens_q``: span attention;
- a search step, recognised by ``span_cache``: the cache knows which keys each row may see, and attends itself;
- anything else (padding with a 2-D mask, ``generate`` with a key-value cache): ordinary SDPA, with an ordinary mask.

The mask function cannot see which of the three it serves, so where no padding and no cache is involved it returns a
`DeferredMask`: the (T, T) mask is only built if ordinary SDPA turns out to need it.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import warnings
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from patchkern.ops import span_attention_prefixed as prefixed

NAME = "patchkern_varlen"


class SpanCache(Protocol):
    """Key-value storage of a search; `attention` hands every layer's new rows to it."""

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """Attention of the new rows over what is stored and themselves.

        ``query`` (B, H, L, d), ``key`` and ``value`` (B, Hkv, L, d), heads not expanded; ``module.layer_idx`` is the
        layer. Returns (B, L, H, d).
        """


class DeferredMask:
    """The arguments of a mask that span attention does without; `build` makes it, once, for ordinary SDPA."""

    def __init__(self, **arguments: Any) -> None:
        self.arguments = arguments
        self.local_size: int | None = arguments.get("local_size")
        self.is_custom: bool = arguments.get("use_vmap", False)

    @functools.cached_property
    def build(self) -> Tensor | None:
        """Boolean (B, 1, T, T) mask, or None where plain causal attention needs none."""
        return sdpa_mask(**self.arguments)

    def contiguous(self) -> Tensor | None:
        """The mask itself: with a static cache, `generate` prepares masks ahead of the model, and asks for this."""
        return self.build


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | DeferredMask | None:
    """transformers' mask function for `patchkern_varlen` (arguments as `transformers.masking_utils.sdpa_mask`)."""
    kwargs.update(batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset)
    kwargs.update(attention_mask=attention_mask)
    may_be_packed = attention_mask is None and isinstance(q_offset, int) and q_offset == 0 and q_length == kv_length
    return DeferredMask(**kwargs) if may_be_packed else sdpa_mask(**kwargs)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | DeferredMask | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    span_prefix: Tensor | None = None,
    max_span_prefix: int | None = None,
    span_cache: SpanCache | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function for `patchkern_varlen`.

    ``query`` (B, H, L, d), ``key`` and ``value`` (B, Hkv, Lkv, d). Returns the output (B, L, H, d) and no weights.
    ``span_prefix`` and ``max_span_prefix`` are the ``prefix`` and ``max_prefix`` of `span_attention`.
    """
    for name in ("softcap", "s_aux"):
        if kwargs.get(name) is not None:
            raise ValueError(
                f"{NAME} attention does not implement `{name}`, which {type(module).__name__} uses; "
                'choose another attn_implementation, such as "eager" or "flash_attention_2"'
            )
    if span_cache is not None:
        return span_cache.attend(module, query, key, value, scaling), None
    if cu_seq_lens_q is None:
        if span_prefix is not None:
            raise ValueError("got span_prefix without cu_seq_lens_q, which says where the spans begin")
        mask = attention_mask.build if isinstance(attention_mask, DeferredMask) else attention_mask
        return sdpa_attention_forward(
            module, query, key, value, mask, dropout=dropout, scaling=scaling, sliding_window=sliding_window, **kwargs
        )
    _check_packed(module, query, key, attention_mask, sliding_window, max_length_q, kwargs.get("max_length_k"))
    if span_prefix is not None and _covers(sliding_window, max_length_q, max_span_prefix):
        sliding_window = None
    out = span_attention(
        query,
        key,
        value,
        cu_seq_lens_q,
        max_length_q,
        scaling,
        dropout,
        sliding_window,
        prefix=span_prefix,
        max_prefix=max_span_prefix,
    )
    return out, None


def _covers(sliding_window: int | None, max_seqlen: int | None, max_prefix: int | None) -> bool:
    """Whether a window is so wide that it hides nothing of any prefix and span."""
    if sliding_window is None or max_seqlen is None or max_prefix is None:
        return False
    return max_seqlen + max_prefix <= sliding_window


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
        prefix: (S, 2) int32: span s sees, besides itself, all of rows ``prefix[s, 0] .. prefix[s, 1] - 1`` of
            ``prefix_key`` and ``prefix_value``; none where the two are equal.
        prefix_key, prefix_value: (1, Hkv, P, d); where not given, ``key`` and ``value`` themselves.
        max_prefix: rows of the longest prefix, where known.

    Returns:
        (1, T, H, d), differentiable in all five tensors. A prefix is read where it lies, not copied per span, and its
        gradient collects from all spans that see it.

        Without prefixes this is ``flash_attn`` or torch's ``varlen_attn`` on CUDA in bfloat16 and float16, which wait
        for the device only where ``max_seqlen`` is missing, and one `scaled_dot_product_attention` per span elsewhere,
        which waits for ``cu_seqlens`` once a call. With prefixes it is `patchkern.ops.span_attention_prefixed`: kernels
        on CUDA, which never wait and whose gradients are the same bit for bit from run to run, tiles of rows elsewhere.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    device = query.device.type
    if torch.is_autocast_enabled(device):
        # rotary embeddings promote to float32 under autocast; the kernels below are not autocast operators
        dtype = torch.get_autocast_dtype(device)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        prefix_key, prefix_value = (None if x is None else x.to(dtype) for x in (prefix_key, prefix_value))
    if prefix is not None:
        _check_prefix(query, key, value, cu_seqlens, sliding_window, prefix, prefix_key, prefix_value)
        rows = (_by_row(query), _by_row(key), _by_row(value))
        stored_key = None if prefix_key is None else _by_row(prefix_key)
        stored_value = None if prefix_value is None else _by_row(prefix_value)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        out = prefixed.span_attention(*rows, cu_seqlens, prefix, stored_key, stored_value, scale, dropout)
        return out.unsqueeze(0)
    if prefix_key is not None or prefix_value is not None:
        raise ValueError("prefix: expected the rows that each span sees of prefix_key and prefix_value, got None")
    kernel = _cuda_kernel(query, key, value, dropout)
    if kernel is None:
        return _span_sdpa(query, key, value, cu_seqlens.tolist(), scaling, dropout, sliding_window)
    if max_seqlen is None:
        max_seqlen = int(cu_seqlens.diff().max())
    window = (-1 if sliding_window is None else sliding_window - 1, 0)
    q, k, v = _by_row(query), _by_row(key), _by_row(value)
    return kernel(q, k, v, cu_seqlens, max_seqlen, scaling, dropout, window).unsqueeze(0)


def _by_row(heads: Tensor) -> Tensor:
    """(1, H, T, d) as (T, H, d)."""
    return heads.squeeze(0).transpose(0, 1)


def register() -> None:
    """Make ``attn_implementation="patchkern_varlen"`` known to transformers. Repeating it changes nothing."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, attention_mask)


def _check_packed(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    mask: Tensor | DeferredMask | None,
    sliding_window: int | None,
    max_length_q: int | None,
    max_length_k: int | None,
) -> None:
    """Everything that would make span attention silently wrong; host integers only."""
    if query.shape[0] != 1:
        raise ValueError(f"cu_seq_lens_q describes one packed row of users, but the batch size is {query.shape[0]}")
    if query.shape[2] != key.shape[2] or (max_length_k is not None and max_length_k != max_length_q):
        raise ValueError(
            f"cu_seq_lens_q with {query.shape[2]} queries and {key.shape[2]} keys (max_length_q={max_length_q}, "
            f"max_length_k={max_length_k}): a packed batch has no earlier keys; pass use_cache=False"
        )
    if isinstance(mask, Tensor):
        raise ValueError("got both attention_mask and cu_seq_lens_q; a packed batch takes no attention_mask")
    if mask is not None and (mask.is_custom or mask.local_size not in (None, sliding_window)):
        raise ValueError(
            f"{NAME} attention knows causal and sliding-window spans; {type(module).__name__} asks for another pattern "
            '(chunked or overlaid); choose attn_implementation="sdpa"'
        )
    if not getattr(module, "is_causal", True):
        raise ValueError(f"{NAME} attention is causal within a span, but {type(module).__name__} is bidirectional")


def _check_prefix(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    sliding_window: int | None,
    prefix: Tensor,
    prefix_key: Tensor | None,
    prefix_value: Tensor | None,
) -> None:
    """All that can be seen without waiting for the device; the ranges themselves are checked where they are made."""
    if sliding_window is not None:
        raise ValueError(f"sliding_window: expected None with a prefix, which is seen fully, got {sliding_window}")
    if (prefix_key is None) != (prefix_value is None):
        raise ValueError("prefix_key: expected prefix_key and prefix_value together or neither of them, got one")
    if not isinstance(prefix, Tensor):
        raise TypeError(f"prefix: expected a tensor, got {type(prefix).__name__}")
    for name, integers in (("cu_seqlens", cu_seqlens), ("prefix", prefix)):
        if integers.dtype != torch.int32:
            raise TypeError(f"{name}: expected dtype torch.int32, got {integers.dtype}")
    spans = cu_seqlens.shape[0] - 1
    if prefix.shape != (spans, 2):
        raise ValueError(f"prefix: expected shape {(spans, 2)}, one range per span, got {tuple(prefix.shape)}")
    rows, width = query.shape[2:]
    heads = key.shape[1]
    if query.shape[0] != 1 or heads == 0 or query.shape[1] % heads:
        raise ValueError(f"query: expected shape (1, a multiple of {heads}, T, d), got {tuple(query.shape)}")
    expected = {"key": (key, (1, heads, rows, width)), "value": (value, (1, heads, rows, value.shape[3]))}
    if prefix_key is not None and prefix_value is not None:
        stored = prefix_key.shape[2]
        expected["prefix_key"] = (prefix_key, (1, heads, stored, width))
        expected["prefix_value"] = (prefix_value, (1, heads, stored, value.shape[3]))
    for name, (tensor, shape) in expected.items():
        if tensor.shape != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
        if tensor.dtype != query.dtype:
            raise TypeError(f"{name}: expected query's dtype, {query.dtype}, got {tensor.dtype}")
    for name, tensor in (("cu_seqlens", cu_seqlens), ("prefix", prefix), *((n, t) for n, (t, _) in expected.items())):
        if tensor.device != query.device:
            raise ValueError(f"{name}: expected query's device, {query.device}, got {tensor.device}")


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


# q (T, H, d), k and v (T, Hkv, d), cu_seqlens, max_seqlen, scaling, dropout, window (left, right) -> (T, H, d)
_Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, int, "float | None", float, tuple[int, int]], Tensor]


def _cuda_kernel(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> _Kernel | None:
    """The variable-length kernel that can run these tensors, or None."""
    supported = (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.dtype == key.dtype == value.dtype
        and query.shape[-1] == value.shape[-1] <= 256
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )
    if not supported:
        return None
    if (kernel := _flash_attn_kernel()) is not None:
        return kernel
    kernel = _torch_varlen_kernel() if query.shape[-1] % 8 == 0 else None  # flash_attn pads such heads, torch refuses
    if kernel is not None and dropout > 0:
        warnings.warn(
            "torch's varlen_attn has no attention dropout, so each user is attended separately, which is slow; "
            "set the model's attention dropout to 0 or install flash-attn",
            stacklevel=2,
        )
        return None
    return kernel


@functools.cache
def _flash_attn_kernel() -> _Kernel | None:
    try:
        from flash_attn import flash_attn_varlen_func
    except ModuleNotFoundError:
        return None
    except ImportError as error:
        warnings.warn(f"flash_attn is installed but does not load, torch's varlen_attn is used: {error}", stacklevel=2)
        return None

    def kernel(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu: Tensor,
        longest: int,
        scaling: float | None,
        dropout: float,
        window: tuple[int, int],
    ) -> Tensor:
        out: Tensor = flash_attn_varlen_func(
            q, k, v, cu, cu, longest, longest, dropout, softmax_scale=scaling, causal=True, window_size=window
        )
        return out

    return kernel


@functools.cache
def _torch_varlen_kernel() -> _Kernel | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ModuleNotFoundError:
        return None
    parameters = inspect.signature(varlen_attn).parameters
    if not {"scale", "window_size"} <= parameters.keys():  # torch 2.10: neither scale nor window
        return None
    takes_gqa = "enable_gqa" in parameters  # not yet in torch 2.11

    def kernel(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu: Tensor,
        longest: int,
        scaling: float | None,
        dropout: float,
        window: tuple[int, int],
    ) -> Tensor:
        options: dict[str, Any] = {"scale": scaling, "window_size": window}
        groups = q.shape[1] // k.shape[1]
        if takes_gqa:
            options["enable_gqa"] = groups > 1
        else:
            k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
        out = varlen_attn(q, k, v, cu, cu, longest, longest, **options)
        return out if isinstance(out, Tensor) else out[0]

    return kernel
