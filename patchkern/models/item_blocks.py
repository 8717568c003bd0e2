# SPDX-License-Identifier: Apache-2.0
"""The layers of models that read item ids: attention over the spans of a packed batch, and what follows it."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from patchkern.ops.hstu_attention import hstu_attention
from patchkern.ops.span_attention import span_attention
from patchkern.search.protocol import SpanCache


class Spans(NamedTuple):
    """Who sees whom in a packed batch, as `patchkern.ops.span_attention` takes it; or a search's cache, which knows."""

    cu_seqlens: Tensor | None = None
    max_seqlen: int | None = None
    prefix: Tensor | None = None
    max_prefix: int | None = None
    cache: SpanCache | None = None


class ItemBlock(GradientCheckpointingLayer):
    """A layer: ``forward(rows, spans)`` takes and returns rows (1, T, D), or (N, 1, D) of a search's step."""

    input_dropout: ClassVar[bool]
    """whether the network drops out of its input rows, too"""

    def __init__(self, config: PretrainedConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx, self.heads = layer_idx, config.num_attention_heads
        self.dropout = nn.Dropout(config.dropout)

    def reset(self) -> None:
        """Initialise what the network does not as it does everything."""

    def span_attention(self, *rows: Any, **spans: Any) -> Tensor:
        """Attention of rows by head over spans: arguments of `patchkern.ops.span_attention.span_attention`."""
        raise NotImplementedError

    def attend(self, query: Tensor, key: Tensor, value: Tensor, spans: Spans) -> Tensor:
        """Attention of rows (B, L, D); returns as many."""
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (query, key, value))
        if spans.cache is not None:
            return spans.cache.attend(self, query, key, value, None).flatten(2)
        if spans.cu_seqlens is None:
            raise ValueError("cu_seq_lens_q: expected where the spans of the batch begin, got None")
        where = {"prefix": spans.prefix, "max_prefix": spans.max_prefix}
        return self.span_attention(query, key, value, spans.cu_seqlens, spans.max_seqlen, **where).flatten(2)


class SASRecBlock(ItemBlock):
    """Softmax attention and a feed-forward layer, each on normalised rows and added to what came in.

    The release normalises after adding instead.
    """

    input_dropout = True

    def __init__(self, config: PretrainedConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        width, inner = config.hidden_size, config.intermediate_size
        self.attention_norm = nn.LayerNorm(width, config.layer_norm_eps)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.attention_output = nn.Linear(width, width)
        self.inner_norm = nn.LayerNorm(width, config.layer_norm_eps)
        self.inner = nn.Linear(width, inner)
        self.inner_output = nn.Linear(inner, width)

    def forward(self, rows: Tensor, spans: Spans) -> Tensor:
        """See `ItemBlock`."""
        query, key, value = self.query_key_value(self.attention_norm(rows)).chunk(3, dim=-1)
        rows = rows + self.dropout(self.attention_output(self.attend(query, key, value, spans)))
        inner = self.dropout(F.gelu(self.inner(self.inner_norm(rows))))
        return rows + self.dropout(self.inner_output(inner))

    def span_attention(self, *rows: Any, **spans: Any) -> Tensor:
        """See `ItemBlock`."""
        return span_attention(*rows, **spans)


class HSTUBlock(ItemBlock):
    """Pointwise attention, ``silu(q k) v`` divided by a constant, gated by what else is made of the same rows.

    As released, scores are not scaled by the width of heads, norms have no weights, and there is no feed-forward layer;
    unlike there, the divisor is the same in training and serving, whatever the batch.
    """

    input_dropout = False

    def __init__(self, config: PretrainedConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        width = config.hidden_size
        self.normalizer = config.normalizer
        self.norm = nn.LayerNorm(width, config.layer_norm_eps, elementwise_affine=False)
        self.projection = nn.Linear(width, 4 * width, bias=False)
        self.output_norm = nn.LayerNorm(width, config.layer_norm_eps, elementwise_affine=False)
        self.output = nn.Linear(width, width)

    def reset(self) -> None:
        """The output as Xavier has it."""
        nn.init.xavier_uniform_(self.output.weight)

    def forward(self, rows: Tensor, spans: Spans) -> Tensor:
        """See `ItemBlock`."""
        gate, value, query, key = F.silu(self.projection(self.norm(rows))).chunk(4, dim=-1)
        seen = self.output_norm(self.attend(query, key, value, spans))
        return rows + self.output(self.dropout(gate * seen))

    def span_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int | None = None,
        scaling: float | None = None,
        *,
        prefix: Tensor | None = None,
        prefix_key: Tensor | None = None,
        prefix_value: Tensor | None = None,
        max_prefix: int | None = None,
    ) -> Tensor:
        """See `ItemBlock`; ``max_seqlen`` and ``max_prefix`` are not needed."""
        query, key, value = (_by_row(x) for x in (query, key, value))
        out = hstu_attention(
            query,
            key,
            value,
            cu_seqlens,
            normalizer=self.normalizer,
            scale=1.0 if scaling is None else scaling,
            prefix=prefix,
            prefix_key=None if prefix_key is None else _by_row(prefix_key),
            prefix_value=None if prefix_value is None else _by_row(prefix_value),
        )
        return out[None]


def _by_row(heads: Tensor) -> Tensor:
    """``(1, H, T, d)`` as ``(T, H, d)``."""
    return heads.squeeze(0).transpose(0, 1)


BLOCKS: dict[str, type[ItemBlock]] = {"sasrec": SASRecBlock, "hstu": HSTUBlock}
"""The kinds of `patchkern.ItemModel`."""
