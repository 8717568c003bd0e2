# SPDX-License-Identifier: Apache-2.0
"""What a model's item head says of a user, as a prior for its search among titles."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from patchkern.batch.catalog import Catalog
from patchkern.batch.histories import Histories
from patchkern.batch.policy_kinds import AnyPolicy
from patchkern.search.arguments import check_batching
from patchkern.search.fingerprints import model_fingerprint
from patchkern.search.protocol import SearchModel, check_model, policy_of
from patchkern.search.scoring import score_items


class ItemHeadPrior:
    """The log-probabilities of a model's item head, for ``recommend(search="beam"|"exact", prior=...)``.

    Titles and items are scored from the same history, one token by token and the other at once, and the two err
    differently; `patchkern.fit_prior_weight` finds how much of the head to add. The model may also be another than the
    one that is searched, of the same catalogue. Every call costs a pass over the users' histories.

    Args:
        model: with an item head.
        policy: how histories are compressed for the head; the model's own where None.
        batch_size: users computed at once, at most.
        memory_budget: bytes or a text, for what that takes; as in ``recommend``.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Examples:
        >>> import patchkern as pk
        >>> from patchkern.models.scratch import from_scratch
        >>> titles = {7: "Alien", 8: "Aliens", 9: "The Third Man"}
        >>> scratch = from_scratch(titles, hidden_size=16, intermediate_size=32)
        >>> model = pk.PatchedCausalLM(*scratch, pk.ItemPatches(0), item_head=True)
        >>> lists = model.recommend([[7, 8], [9]], k=1, prior=pk.ItemHeadPrior(model), prior_weight=0.5, num_beams=3)
        >>> len(lists)
        2
    """

    def __init__(
        self,
        model: SearchModel,
        policy: AnyPolicy | None = None,
        *,
        batch_size: int = 64,
        memory_budget: int | str | None = None,
    ) -> None:
        check_model(model)
        if model.item_head is None:
            raise ValueError("model: expected one with an item head (item_head=True), got one without")
        check_batching(memory_budget, batch_size)
        self.model, self.policy = model, policy_of(model, policy)
        self.batch_size, self.memory_budget = batch_size, memory_budget

    @property
    def catalog(self) -> Catalog:
        """In whose order it answers."""
        return self.model.catalog

    def __call__(self, histories: Histories) -> NDArray[np.floating[Any]]:
        """``(B, n_items)`` log-probabilities, float32 or, of a float64 model, float64."""
        return score_items(
            self.model,
            histories,
            self.policy,
            memory_budget=self.memory_budget,
            batch_size=self.batch_size,
            head="items",
        )

    @property
    def fingerprint(self) -> str:
        """A hash of what decides what it returns: catalogue, prompt, policy, and a sample of every parameter."""
        model = self.model
        parts = (model.catalog.fingerprint, repr(model.prompt), repr(self.policy), model_fingerprint(model))
        return hashlib.blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()
