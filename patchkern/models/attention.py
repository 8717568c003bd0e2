# SPDX-License-Identifier: Apache-2.0
"""Span attention, registered with transformers as ``attn_implementation="patchkern_varlen"``.

Its mask function is registered with it: an attention without one silently gets no mask, even for padded batches. Three
kinds of call arrive here:

- a packed batch, recognised by ``cu_seq_lens_q``: span attention;
- a search step, recognised by ``span_cache``: the cache knows which keys each row may see, and attends itself;
- anything else (padding with a 2-D mask, ``generate`` with a key-value cache): ordinary SDPA, with an ordinary mask.

The mask function cannot see which of the three it serves, so where no padding and no cache is involved it returns a
`DeferredMask`: the (T, T) mask is only built if ordinary SDPA turns out to need it.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from patchkern.ops.span_attention import span_attention
from patchkern.search.protocol import SpanCache

NAME = "patchkern_varlen"

# what some models hand to attention, and would change its result
_NOT_IMPLEMENTED = ("softcap", "s_aux", "sinks", "position_bias", "indices", "block_indices")


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
    wanted_rows: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function for `patchkern_varlen`.

    ``query`` (B, H, L, d), ``key`` and ``value`` (B, Hkv, Lkv, d). Returns the output (B, L, H, d) and no weights.
    ``span_prefix``, of one range per span or several, and ``max_span_prefix`` are the ``prefix`` and ``max_prefix`` of
    `span_attention`. With a ``span_cache``, ``wanted_rows`` (M,) are those whose output in the last layer is read: the
    others have zeros there.
    """
    for name in _NOT_IMPLEMENTED:
        if kwargs.get(name) is not None:
            raise ValueError(f"{NAME} attention does not implement `{name}`, which {type(module).__name__} uses")
    if span_cache is not None:
        if wanted_rows is not None and _is_last(module):
            wanted_rows = wanted_rows.to(query.device)
            found = span_cache.attend(module, query[:, :, wanted_rows], key, value, scaling, wanted_rows)
            out = found.new_zeros(1, query.shape[2], *found.shape[2:])
            return out.index_copy_(1, wanted_rows, found), None
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


def _is_last(module: nn.Module) -> bool:
    config: Any = getattr(module, "config", None)  # which attention of other people's code need not have
    return config is not None and bool(module.layer_idx == config.get_text_config().num_hidden_layers - 1)


def _covers(sliding_window: int | None, max_seqlen: int | None, max_prefix: int | None) -> bool:
    """Whether a window is so wide that it hides nothing of any prefix and span."""
    if sliding_window is None or max_seqlen is None or max_prefix is None:
        return False
    return max_seqlen + max_prefix <= sliding_window


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
            "(chunked or overlaid)"
        )
    if not getattr(module, "is_causal", True):
        raise ValueError(f"{NAME} attention is causal within a span, but {type(module).__name__} is bidirectional")
