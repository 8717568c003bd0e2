# SPDX-License-Identifier: Apache-2.0
"""The network of a model that reads item ids: a table of vectors, learned positions, blocks, and a last norm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from patchkern.models import attention
from patchkern.models.item_blocks import BLOCKS, ItemBlock, Spans
from patchkern.ops.span_rows import worthwhile

attention.register()

INIT_STD = 0.02


class ItemNetworkConfig(PretrainedConfig):
    """What an `ItemNetwork` is made of; transformers saves it as ``config.json``.

    Args:
        block: "sasrec" or "hstu".
        vocab_size: items and special rows.
        hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, layer_norm_eps: as of any transformer.
        max_position_embeddings: rows of the longest history.
        dropout: of input rows and of what blocks add.
        item_scores: "dot" or "cosine", what the head makes of a state and an item's vector.
        normalizer: by which pointwise attention divides.
    """

    model_type = "patchkern_items"

    def __init__(
        self,
        block: str = "sasrec",
        vocab_size: int = 1,
        hidden_size: int = 64,
        intermediate_size: int = 64,
        num_hidden_layers: int = 2,
        num_attention_heads: int = 2,
        max_position_embeddings: int = 512,
        dropout: float = 0.2,
        item_scores: str = "dot",
        normalizer: float = 1.0,
        layer_norm_eps: float = 1e-6,
        **kwargs: Any,
    ) -> None:
        self.block, self.vocab_size, self.item_scores = block, vocab_size, item_scores
        self.hidden_size, self.intermediate_size = hidden_size, intermediate_size
        self.num_hidden_layers, self.num_attention_heads = num_hidden_layers, num_attention_heads
        self.max_position_embeddings, self.dropout = max_position_embeddings, dropout
        self.normalizer, self.layer_norm_eps = normalizer, layer_norm_eps
        super().__init__(**kwargs)


class ItemNetwork(PreTrainedModel):
    """Rows of a packed batch, or tokens of a search's step, to hidden states.

    It has one attention, over spans; ``attn_implementation`` changes nothing.
    """

    config_class = ItemNetworkConfig
    base_model_prefix = "items"
    supports_gradient_checkpointing = True
    _no_split_modules = [kind.__name__ for kind in BLOCKS.values()]  # noqa: RUF012

    def __init__(self, config: ItemNetworkConfig) -> None:
        config._attn_implementation = attention.NAME
        super().__init__(config)
        self.items = nn.Embedding(config.vocab_size, config.hidden_size)
        self.positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        kind = BLOCKS[config.block]
        self.dropout = nn.Dropout(config.dropout if kind.input_dropout else 0.0)
        self.layers = nn.ModuleList([kind(config, n) for n in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.post_init()

    def forward(
        self,
        inputs_embeds: Tensor | None = None,
        input_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        max_length_q: int | None = None,
        span_prefix: Tensor | None = None,
        max_span_prefix: int | None = None,
        span_cache: Any = None,
        wanted_rows: Tensor | None = None,
        **_: Any,
    ) -> BaseModelOutput:
        """Arguments of a transformers model for a packed batch, see `patchkern.ops.packed.packed_kwargs`.

        ``wanted_rows``, (M,) int64, are the rows whose states are wanted, in any order; all where not given. Of the
        others the last layer computes no more than keys and values, where that is less work.
        """
        rows = self.items(input_ids) if inputs_embeds is None else inputs_embeds
        if position_ids is None:
            raise ValueError("position_ids: expected one per row, -1 where a row has none, got None")
        # a table has no entry for rows without a position, such as a memory's
        placed = (position_ids >= 0)[..., None]
        rows = self.dropout(rows + (self.positions(position_ids.clamp(min=0)) * placed).to(rows.dtype))
        spans = Spans(cu_seq_lens_q, max_length_q, span_prefix, max_span_prefix, span_cache)
        *layers, last = self.layers
        for layer in layers:
            rows = layer(rows, spans)
        if wanted_rows is None:
            return BaseModelOutput(last_hidden_state=self.norm(last(rows, spans)))
        if worthwhile(rows, wanted_rows.shape[0]):
            rows = last(rows, spans._replace(wanted=wanted_rows))
        else:
            rows = last(rows, spans)[:, wanted_rows]
        return BaseModelOutput(last_hidden_state=self.norm(rows))

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=INIT_STD)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.LayerNorm) and module.elementwise_affine:
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        if isinstance(module, ItemBlock):
            module.reset()  # after its parts

    def set_attn_implementation(self, attn_implementation: Any, *_: Any, **__: Any) -> None:
        """Take the name and keep to the attention over spans."""
        self.config._attn_implementation = attn_implementation

    def get_input_embeddings(self) -> nn.Module:
        return self.items

    def get_output_embeddings(self) -> nn.Module:
        """The table again: outputs are tied to it."""
        return self.items

    def get_decoder(self) -> nn.Module:
        return self
