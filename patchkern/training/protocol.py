# SPDX-License-Identifier: Apache-2.0
"""What training asks of a model: it knows this protocol, and no model."""

from __future__ import annotations

import os
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from patchkern.batch.histories import HistoriesLike
from patchkern.batch.layout import PatchLayout
from patchkern.batch.policy_kinds import AnyPolicy
from patchkern.search.protocol import SearchModel


class TrainableModel(SearchModel, Protocol):
    """A module that learns from layouts and recommends: `patchkern.PatchedCausalLM`, `patchkern.ItemModel`, and
    `patchkern.RecurrentMemory` around one of them, which learns from a `patchkern.batch.memory_layout.MemoryBatch`.

    Its ``hf_model`` is a transformers model, into which checkpoints are loaded, and its ``item_head``, where it has
    one, a `patchkern.models.item_head.CatalogHead`.
    """

    policy: AnyPolicy | None
    """how histories are compressed; the trainer sets it"""

    tokenizer: Any
    """saved along; the trainer sets it where it has one"""

    learned: tuple[str, ...]
    """what its last training was for; the trainer sets it"""

    training: bool
    """as of a module"""

    def __call__(self, layout: PatchLayout, **options: Any) -> Any:
        """Something with the ``loss`` of a layout with targets.

        ``options`` are ``num_items_in_batch``, by which a sum of losses is divided, ``labels``, ``smoothing``,
        ``title_weight``, ``item_weight``, and ``vectors``, what the layout's ``vector_rows`` are.
        """

    def item_states(self, layout: PatchLayout, vectors: Tensor | None = None) -> Tensor:
        """``(M, D)`` hidden states of a layout's item rows."""

    def recommend(
        self, histories: HistoriesLike, policy: AnyPolicy | None = None, k: int = 20, **options: Any
    ) -> list[list[tuple[Any, float]]]:
        """Per user ``(item_id, score)``, the ``k`` best first."""

    def score_items(
        self, histories: HistoriesLike, policy: AnyPolicy | None = None, items: Any = None, **options: Any
    ) -> NDArray[np.floating[Any]]:
        """``(B, n)`` score of every item for every user."""

    def save_pretrained(self, folder: str | os.PathLike[str], **options: Any) -> None:
        """Write a folder from which checkpoints are loaded."""

    @property
    def takes_branches(self) -> bool:
        """Can it be given layouts with spans that share a prefix?"""

    def train(self, mode: bool = True) -> Any:
        """As of a module."""

    def eval(self) -> Any:
        """As of a module."""
