# SPDX-License-Identifier: Apache-2.0
"""The model's part of a search: the prompts of a batch of users, and one more token of every hypothesis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from patchkern.batch.layout import PatchLayout
from patchkern.search.experts import ExpertPrompts, SearchPrompts
from patchkern.search.prefill import Pass, packed, plan_passes, shared_literals, with_beginnings
from patchkern.search.prefix_cache import PrefixCache, StepShape
from patchkern.search.protocol import SearchModel
from patchkern.search.user_cache import UserCache


class Prompts:
    """The prompts of a batch of users, computed, and what follows them, token by token or in whole trees.

    Args:
        model: inside its ``searching()``.
        layout: the prompts, on the CPU unless they are there already; or such that keep experts of what is old.
        max_rows: tokens that all steps together may feed, until `forget`.
        chunk_rows: rows of the prompts that go through the model together, at most; bounds the memory of activations.
        user_cache: keeps the prompts' keys and values for later calls, and is asked for them first.
        user_ids: ``B`` hashable names of the users in ``user_cache``.
        head: "titles", for `logits`; or "items", for `states`.

    Attributes:
        logits: ``(B, V)``, what follows each prompt; float32 or float64.
        states: ``(B, D)``, the hidden states of each prompt's last row.
    """

    logits: Tensor
    states: Tensor

    def __init__(
        self,
        model: SearchModel,
        layout: SearchPrompts,
        max_rows: int,
        *,
        chunk_rows: int | None = None,
        user_cache: UserCache | None = None,
        user_ids: Sequence[Any] | None = None,
        head: str = "titles",
    ) -> None:
        self._head = head
        experts = layout if isinstance(layout, ExpertPrompts) else None
        layout = layout.layout if isinstance(layout, ExpertPrompts) else layout.to("cpu")
        self.num_users = layout.num_users
        self._model = model
        cu_seqlens = layout.cu_seqlens.numpy().astype(np.int64)
        on_device = layout.cu_seqlens.to(model.device, non_blocking=True)
        positions = layout.position_ids[layout.cu_seqlens[1:].long() - 1] + 1
        self._cache = PrefixCache(on_device, layout.num_rows, max_rows, positions.to(model.device, non_blocking=True))
        cached = None
        stored = np.zeros(self.num_users, np.int64)
        if user_cache is not None:
            cached = user_cache.begin(model, layout, user_ids, None if experts is None else experts.hashes(model))
            stored = cached.load(self._cache)
        if experts is None:
            shared = shared_literals(layout.lo.numpy(), cu_seqlens)
            passes = plan_passes(cu_seqlens, stored, shared, chunk_rows)
        else:
            passes = self._behind_experts(experts, cu_seqlens, stored, chunk_rows)
        for number, spans in enumerate(passes):
            ending = self._prefill(layout, spans)
            if number == 0:
                endings = ending.new_empty(self.num_users, ending.shape[1])
            endings[torch.from_numpy(spans.users).to(model.device, non_blocking=True)] = ending
            del ending  # or it would stay beside the next pass
        if head == "items":
            self.states = endings
        else:
            self.logits = endings
        self._check_layers()
        if cached is not None:
            cached.save(self._cache)

    def _behind_experts(
        self, experts: ExpertPrompts, cu_seqlens: NDArray[np.int64], stored: NDArray[np.int64], chunk_rows: int | None
    ) -> list[Pass]:
        """The passes over what follows the experts, who are loaded where a cache does not have them."""
        beginning = len(self._model.prompt.prefix)
        lacking = np.flatnonzero(stored < experts.kept)
        experts.load(self._model, self._cache, lacking, chunk_rows)
        passes = plan_passes(cu_seqlens, np.maximum(stored, experts.kept), 0, chunk_rows)
        return with_beginnings(passes, cu_seqlens[lacking], beginning, chunk_rows)

    def _prefill(self, layout: PatchLayout, spans: Pass) -> Tensor:
        """Compute rows of the prompts; returns the logits (k, V), or states (k, D), of those that end one."""
        self._cache.prefill(spans)
        asked = (packed(layout, spans), torch.from_numpy(spans.last), self._cache)
        if self._head == "items":
            return self._model.prompt_states(*asked)
        return _wide(self._model.prompt_logits(*asked))

    def _check_layers(self) -> None:
        config = self._model.config
        n_layers = config.get_text_config().num_hidden_layers
        if len(self._cache.layers) != n_layers:
            raise ValueError(
                f"model: search needs span attention in all {n_layers} layers of {config.model_type}, got it in "
                f"{len(self._cache.layers)}"
            )

    def step(self, parent: Tensor, user: Tensor, token: Tensor, shape: StepShape | None = None) -> Tensor:
        """``(N, V)`` logits after one more token of N hypotheses.

        Args:
            parent: ``(N,)`` the row that each token continues, -1 the prompt. Rows are numbered over all steps, in the
                order in which they were fed; a row of this step may be continued too.
            user: ``(N,)``, ascending. A user that is left out may be dropped, and must not come back.
            token: ``(N,)``.
            shape: of this step; computed, with host synchronisations, where not given.
        """
        position = self._cache.advance(parent, user, shape)
        return _wide(self._model.token_logits(token, position, self._cache))

    @property
    def num_rows(self) -> int:
        """Tokens fed so far; the number of the next row."""
        return self._cache.suffixes.num_rows

    def live(self, rows: Tensor, depth: int) -> Tensor:
        """The given rows and all on their way to the prompt; see `Suffixes.live`."""
        return self._cache.suffixes.live(rows, depth)

    def keep(self, is_live: Tensor, count: int) -> Tensor:
        """Drop the other rows and number those that stay anew; see `Suffixes.keep`."""
        return self._cache.suffixes.keep(is_live, count)

    def forget(self) -> None:
        """Drop all rows fed after the prompts and number from 0 again."""
        self._cache.suffixes.forget()


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
