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
from patchkern.ops.span_rows import attend_rows
from patchkern.search.protocol import SpanCache


class Spans(NamedTuple):
    """Who sees whom in a packed batch, as `patchkern.ops.span_attention` takes it; or a search's cache, which knows.

    ``wanted``, (M,) int64, are the rows that a layer gives, where they are not all.
    """

    cu_seqlens: Tensor | None = None
    max_seqlen: int | None = None
    prefix: Tensor | None = None
    max_prefix: int | None = None
    cache: SpanCache | None = None
    wanted: Tensor | None = None


class ItemBlock(GradientCheckpointingLayer):
    """A layer: ``forward(rows, spans)`` takes rows (1, T, D) and returns them, or those of `Spans.wanted` alone."""

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
        """Attention of rows (1, M, D), all or those that are wanted, over all (1, T, D); returns as many."""
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (query, key, value))
        if spans.cache is not None:
            wanted = {} if spans.wanted is None else {"wanted": spans.wanted}
            return spans.cache.attend(self, query, key, value, None, **wanted).flatten(2)
        if spans.cu_seqlens is None:
            raise ValueError("cu_seq_lens_q: expected where the spans of the batch begin, got None")
        if spans.wanted is not None:
            where = (spans.wanted, spans.cu_seqlens, spans.prefix)
            return attend_rows(self.span_attention, query, key, value, *where).flatten(2)
        prefix = {"prefix": spans.prefix, "max_prefix": spans.max_prefix}
        return self.span_attention(query, key, value, spans.cu_seqlens, spans.max_seqlen, **prefix).flatten(2)


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
        normed = self.attention_norm(rows)
        query, key, value = _projected(self.query_key_value, normed, spans.wanted, few=(True, False, False))
        rows = _chosen(rows, spans.wanted)
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
        parts = _projected(self.projection, self.norm(rows), spans.wanted, few=(True, False, True, False))
        gate, value, query, key = map(F.silu, parts)
        seen = self.output_norm(self.attend(query, key, value, spans))
        return _chosen(rows, spans.wanted) + self.output(self.dropout(gate * seen))

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


def _chosen(rows: Tensor, wanted: Tensor | None) -> Tensor:
    """Of ``(1, T, D)``."""
    return rows if wanted is None else rows[:, wanted]


def _projected(linear: nn.Linear, rows: Tensor, wanted: Tensor | None, few: tuple[bool, ...]) -> list[Tensor]:
    """The parts of a projection of rows ``(1, T, D)``; those that are ``few`` of the wanted rows alone."""
    if wanted is None or type(linear) is not nn.Linear:  # an adapter around it is more than its weight
        every = linear(rows).chunk(len(few), dim=-1)
        return [_chosen(part, wanted) if is_few else part for part, is_few in zip(every, few, strict=True)]
    chosen = _chosen(rows, wanted)
    biases = [None] * len(few) if linear.bias is None else linear.bias.chunk(len(few))
    parts = zip(linear.weight.chunk(len(few)), biases, few, strict=True)
    return [F.linear(chosen if is_few else rows, weight, bias) for weight, bias, is_few in parts]


def _by_row(heads: Tensor) -> Tensor:
    """``(1, H, T, d)`` as ``(T, H, d)``."""
    return heads.squeeze(0).transpose(0, 1)


BLOCKS: dict[str, type[ItemBlock]] = {"sasrec": SASRecBlock, "hstu": HSTUBlock}
"""The kinds of `patchkern.ItemModel`."""
