# SPDX-License-Identifier: Apache-2.0
"""A layout's rows from a language model's own input embedding, and the vectors that items have besides their titles."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from patchkern.batch.catalog import Catalog
from patchkern.batch.layout import PatchLayout
from patchkern.batch.prompt import Prompt
from patchkern.models import files, wrapped
from patchkern.models.embedding import EmbeddingScale, add_item_vectors, with_vectors
from patchkern.models.merging import check_merged
from patchkern.models.searching import recompute_without_searches
from patchkern.ops.pool_rows import pool_rows
from patchkern.ops.vector_dropout import check_vector_dropout


class LayoutEmbedder(wrapped.WrappedLM):
    """A wrapped language model that makes the rows that it reads."""

    item_embedding: nn.Parameter | None
    """``(n_items, D)``, a vector per item in catalogue order; None without ``item_embeddings``"""

    def __init__(
        self, hf_model: PreTrainedModel, catalog: Catalog, prompt: Prompt, item_embeddings: bool, vector_dropout: float
    ) -> None:
        super().__init__()
        wrapped.check_model(hf_model)
        for name, value, kind in (
            ("catalog", catalog, Catalog),
            ("prompt", prompt, Prompt),
            ("item_embeddings", item_embeddings, bool),
        ):
            if not isinstance(value, kind):
                raise TypeError(f"{name}: expected a {kind.__name__}, got {type(value).__name__}")
        self.vector_dropout = check_vector_dropout(vector_dropout, item_embeddings)
        self.hf_model = hf_model
        recompute_without_searches(hf_model)
        self.catalog = catalog
        self.prompt = prompt
        for name, largest in (("catalog", catalog.max_token_id), ("prompt", prompt.max_token_id)):
            self._check_token_ids(name, largest)
        self.watch_embedding()
        self.register_parameter("item_embedding", None)
        if item_embeddings:
            weight: Any = self.get_input_embeddings().weight
            self.item_embedding = nn.Parameter(weight.new_zeros(len(catalog), weight.shape[1]))
            self._items_of = catalog.fingerprint

    def watch_embedding(self) -> None:
        """Look at the embedding anew, which has another size or a prompt with other tokens than before."""
        prompt = self.prompt
        fixed = (prompt.prefix, prompt.separator, prompt.suffix, prompt.response_end, prompt.experts)
        self._scale = EmbeddingScale(self.catalog.distinct_tokens.union(*fixed))

    def embed(self, layout: PatchLayout, vectors: Tensor | None = None) -> Tensor:
        """The rows of a layout, (T, D), as the model's input embedding makes them; differentiable.

        An embedding that is only its weight, or that times a number as Gemma's, is pooled directly. One that does more
        (LoRA, hooks, sharding) is called on the batch's distinct tokens, and its output is pooled. Item embeddings are
        added to the patches as they come out of that, all of them, in training too.

        Args:
            layout: on the model's device or the CPU; on a GPU it needs its transpose where the embedding does more, and
                its identities where there are item embeddings.
            vectors: ``(V, D)`` what the layout's ``vector_rows`` are, which `patchkern.RecurrentMemory` gives.

        Raises:
            ValueError: a token id beyond the embedding, vector rows and no vectors, an embedding that is sharded and
                not gathered here, an adapter that was merged into tied embeddings, or, with item embeddings, a layout
                of another catalogue.
        """
        return with_vectors(self._embed(layout, self.item_embedding), layout, vectors)

    def _embed(self, layout: PatchLayout, own: Tensor | None) -> Tensor:
        """`embed` with ``own`` (n_items, D) as the items' vectors."""
        self._check_token_ids("layout", layout.max_token_id)
        rows = self._pool(layout)
        if own is None:
            return rows
        if layout.catalog_fingerprint != self._items_of:
            raise ValueError(
                "layout: expected one of the model's catalog, whose items the item embeddings belong to, got another's"
            )
        return add_item_vectors(rows, layout, own)

    def _pool(self, layout: PatchLayout) -> Tensor:
        """The rows of a layout from the model's input embedding alone."""
        check_merged(self.hf_model)
        embedding = self.get_input_embeddings()
        if isinstance(embedding, nn.Embedding) and (scale := self._scale.of(embedding)) is not None:
            weight = embedding.weight
            layout = layout.to(weight.device, non_blocking=True)
            return pool_rows(weight, layout, sparse_grad=embedding.sparse, scale=scale)
        tokens, compact = layout.compact()
        table = embedding(tokens[None].to(self.device, non_blocking=True))[0]
        return pool_rows(table, compact.to(table.device, non_blocking=True))

    def _check_token_ids(self, name: str, largest: int) -> None:
        rows = self._text_config.vocab_size
        if largest >= rows:
            raise ValueError(
                f"{name}: expected token ids below {rows}, the rows of the model's embedding, got {largest}; if tokens "
                f"were added, call hf_model.resize_token_embeddings({largest + 1}) first"
            )

    def load_item_embeddings(self, folder: str | os.PathLike[str]) -> None:
        """Take the item embeddings that `save_pretrained` wrote, each by its item's id.

        The catalogue may be another than it was then: items that are new in it have zeros, and are as good as without
        item embeddings until they are trained; those that it no longer has are dropped.

        Raises:
            FileNotFoundError: the folder has no item embeddings.
            ValueError: the model has none, they have another width, or none is of an item of the catalogue.
        """
        if self.item_embedding is None:
            raise ValueError("item_embeddings: expected a model that was made with item_embeddings=True")
        vectors = files.read_item_embeddings(files.current(folder), self.catalog, self.item_embedding.shape[1])
        with torch.no_grad():
            self.item_embedding.copy_(vectors)
