# SPDX-License-Identifier: Apache-2.0
"""What a recurrent memory is because of the model inside it: a search and a trainer see that model's."""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from patchkern.batch.catalog import Catalog
from patchkern.batch.catalog_diff import CatalogDiff
from patchkern.batch.layout import PatchLayout
from patchkern.batch.policy_kinds import AnyPolicy
from patchkern.batch.prompt import Prompt
from patchkern.models import wrapped
from patchkern.models.item_model import ItemModel
from patchkern.models.patched_lm import PatchedCausalLM
from patchkern.search.protocol import SpanCache


class MemoryWrapper(wrapped.WrappedLM):
    """A module around a model of this library, which has what that has."""

    model: PatchedCausalLM | ItemModel
    """the model that reads and writes memories"""

    @property
    def placed(self) -> bool:
        """Whether memory and query rows have positions; not in a model of item ids, whose positions are a table."""
        return not isinstance(self.model, ItemModel)

    def _unplaced(self, layout: PatchLayout) -> PatchLayout:
        """A layout of prompts whose memory rows have no positions, where the model's are a table."""
        if self.placed or layout.vector_rows is None:
            return layout
        positions = layout.position_ids.index_fill(0, layout.vector_rows, -1)
        return PatchLayout._trusted({**layout.__dict__, "position_ids": positions})

    def get_input_embeddings(self) -> nn.Module | None:  # type: ignore[override]
        """As of the model."""
        return self.model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module | None:
        """As of the model."""
        return self.model.get_output_embeddings()

    def embed(self, layout: PatchLayout, vectors: Tensor | None = None) -> Tensor:
        """As of the model."""
        return self.model.embed(layout, vectors)

    def item_states(self, layout: PatchLayout, vectors: Tensor | None = None) -> Tensor:
        """As of the model."""
        return self.model.item_states(self._unplaced(layout), vectors)

    @property
    def takes_branches(self) -> bool:
        """As of the model."""
        return self.model.takes_branches

    def check_search(self, layout: PatchLayout, depth: int) -> None:
        """As of the model."""
        self.model.check_search(layout, depth)

    def prompt_logits(
        self, layout: PatchLayout, rows: Tensor, cache: SpanCache, vectors: Tensor | None = None
    ) -> Tensor:
        """As of the model."""
        return self.model.prompt_logits(self._unplaced(layout), rows, cache, vectors)

    def prompt_states(
        self, layout: PatchLayout, rows: Tensor, cache: SpanCache, vectors: Tensor | None = None
    ) -> Tensor:
        """As of the model."""
        return self.model.prompt_states(self._unplaced(layout), rows, cache, vectors)

    def item_scores(self, states: Tensor) -> Tensor:
        """As of the model."""
        return self.model.item_scores(states)

    def token_logits(self, tokens: Tensor, positions: Tensor, cache: SpanCache) -> Tensor:
        """As of the model."""
        return self.model.token_logits(tokens, positions, cache)

    @property
    def hf_model(self) -> PreTrainedModel:  # type: ignore[override]
        """The network."""
        return self.model.hf_model

    @property
    def catalog(self) -> Catalog:  # type: ignore[override]
        """The titles."""
        return self.model.catalog

    @property
    def catalog_diff(self) -> CatalogDiff | None:
        """How the catalogue differs from the one that the model was saved with."""
        return self.model.catalog_diff

    @property
    def prompt(self) -> Prompt:  # type: ignore[override]
        """The fixed tokens."""
        return self.model.prompt

    @property
    def policy(self) -> AnyPolicy | None:
        """How histories are read."""
        return self.model.policy

    @policy.setter
    def policy(self, policy: AnyPolicy | None) -> None:
        self.model.policy = policy

    @property
    def tokenizer(self) -> Any:
        """Saved along."""
        return self.model.tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any) -> None:
        self.model.tokenizer = tokenizer

    @property
    def learns(self) -> tuple[str, ...]:  # type: ignore[override]
        """As of the model."""
        return self.model.learns

    @property
    def learned(self) -> tuple[str, ...]:
        """As of the model."""
        return self.model.learned

    @learned.setter
    def learned(self, learned: tuple[str, ...]) -> None:
        self.model.learned = learned

    @property
    def vector_dropout(self) -> float:  # type: ignore[override]
        """As of the model."""
        return self.model.vector_dropout

    @property
    def item_head(self) -> Any:
        """As of the model."""
        return self.model.item_head

    @property
    def item_embedding(self) -> nn.Parameter | None:
        """As of the model."""
        return self.model.item_embedding

    def load_item_embeddings(self, folder: str | os.PathLike[str]) -> None:
        """As of the model, if that is a language model: others have none."""
        if isinstance(self.model, ItemModel):
            raise ValueError("item_embeddings: expected a model that was made with item_embeddings=True")
        self.model.load_item_embeddings(folder)
