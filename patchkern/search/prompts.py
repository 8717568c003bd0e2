# SPDX-License-Identifier: Apache-2.0
"""The model's part of a search: the prompts of a batch of users, and one more token of every hypothesis."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from patchkern.batch.histories import Histories
from patchkern.batch.layout import PatchLayout
from patchkern.batch.policy_kinds import AnyPolicy
from patchkern.search.experts import ExpertPrompts, UserStates
from patchkern.search.model_state import model_state
from patchkern.search.prefill import Pass, packed, plan_passes, shared_literals, with_beginnings
from patchkern.search.prefix_cache import PrefixCache, StepShape
from patchkern.search.protocol import SearchModel
from patchkern.search.user_cache import UserCache


@dataclass(frozen=True)
class MemoryPrompts:
    """The prompts of a batch of users in whose layout some rows are memories, as a search takes them in its place.

    Attributes:
        layout: the prompts, on the CPU, with ``vector_rows``.
        histories: whole ones, of B users.
        policy: under which the prompts were planned.
        states: asked for the memories; without, or where it has none, they are made.
        names: ``B``, of the users in ``states``.
    """

    layout: PatchLayout
    histories: Histories
    policy: AnyPolicy
    states: UserStates | None = None
    names: Sequence[Hashable] = ()

    def vectors(self, model: SearchModel, chunk_rows: int | None, seen: Callable[[], Any]) -> Tensor | None:
        """``(V, D)`` what the vector rows are; inside the model's ``searching()``. As of `vectors_of`.

        Args:
            seen: says what `UserStates.check` asks for.
        """
        rows = self.layout.vector_rows
        if self.states is None or rows is None or rows.shape[0] == 0:
            return vectors_of(model, self.layout, self.histories, self.policy, chunk_rows)
        self.states.check(model, self.policy, seen())
        counts = np.diff(np.searchsorted(rows.numpy(), self.layout.cu_seqlens.numpy())).tolist()
        with self.states.reading(self.names, self.histories) as found:
            lacking = [user for user, state in enumerate(found) if state is None and counts[user]]
            made: Iterator[Tensor] = iter(())
            if lacking:
                vectors = vectors_of(model, self.layout, self.histories.take(lacking), self.policy, chunk_rows)
                if vectors is not None:
                    made = iter(vectors.split([counts[user] for user in lacking]))
            own = [next(made) if state is None else state[0] for user, state in enumerate(found) if counts[user]]
            return torch.cat([part.to(model.device, model.dtype) for part in own])


SearchPrompts = PatchLayout | ExpertPrompts | MemoryPrompts
"""What a search begins with: the prompts of a batch of users."""


def layout_of(prompts: SearchPrompts) -> PatchLayout:
    """The rows that a search keeps of the prompts."""
    return prompts if isinstance(prompts, PatchLayout) else prompts.layout


class Prompts:
    """The prompts of a batch of users, computed, and what follows them, token by token or in whole trees.

    Args:
        model: inside its ``searching()``.
        layout: the prompts; a layout is copied to the CPU.
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
        seen = cache(partial(model_state, model))  # looked at once, by whoever asks first
        experts = layout if isinstance(layout, ExpertPrompts) else None
        self._vectors = layout.vectors(model, chunk_rows, seen) if isinstance(layout, MemoryPrompts) else None
        layout = layout_of(layout).to("cpu")
        self.num_users = layout.num_users
        self._model = model
        cu_seqlens = layout.cu_seqlens.numpy().astype(np.int64)
        on_device = layout.cu_seqlens.to(model.device, non_blocking=True)
        positions = layout.position_ids[layout.cu_seqlens[1:].long() - 1] + 1
        self._cache = PrefixCache(on_device, layout.num_rows, max_rows, positions.to(model.device, non_blocking=True))
        cached = None
        stored = np.zeros(self.num_users, np.int64)
        if user_cache is not None:
            hashes = None if experts is None else experts.hashes(model)
            cached = user_cache.begin(model, layout, user_ids, seen(), hashes, self._vectors)
            stored = cached.load(self._cache)
        if experts is None:
            shared = shared_literals(_literals(layout), cu_seqlens)
            passes = plan_passes(cu_seqlens, stored, shared, chunk_rows)
        else:
            passes = self._behind_experts(experts, cu_seqlens, stored, chunk_rows, seen)
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
        self,
        experts: ExpertPrompts,
        cu_seqlens: NDArray[np.int64],
        stored: NDArray[np.int64],
        chunk_rows: int | None,
        seen: Callable[[], Any],
    ) -> list[Pass]:
        """The passes over what follows the experts, who are loaded where a cache does not have them."""
        beginning = len(self._model.prompt.prefix)
        lacking = np.flatnonzero(stored < experts.kept)
        experts.load(self._model, self._cache, lacking, chunk_rows, seen)
        passes = plan_passes(cu_seqlens, np.maximum(stored, experts.kept), 0, chunk_rows)
        return with_beginnings(passes, cu_seqlens[lacking], beginning, chunk_rows)

    def _prefill(self, layout: PatchLayout, spans: Pass) -> Tensor:
        """Compute rows of the prompts; returns the logits (k, V), or states (k, D), of those that end one."""
        self._cache.prefill(spans)
        own, vectors = packed(layout, spans), None
        if own.vector_rows is not None and layout.vector_rows is not None and self._vectors is not None:
            rows = torch.from_numpy(spans.rows)[own.vector_rows]
            vectors = self._vectors[torch.searchsorted(layout.vector_rows, rows)]
        asked = (own, torch.from_numpy(spans.last), self._cache, vectors)
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
        """``(N, V)`` logits after one more token of N hypotheses, in the model's dtype.

        Args:
            parent: ``(N,)`` the row that each token continues, -1 the prompt. Rows are numbered over all steps, in the
                order in which they were fed; a row of this step may be continued too.
            user: ``(N,)``, ascending. A user that is left out may be dropped, and must not come back.
            token: ``(N,)``.
            shape: of this step; computed, with host synchronisations, where not given.
        """
        position = self._cache.advance(parent, user, shape)
        return self._model.token_logits(token, position, self._cache)

    @property
    def max_rows(self) -> int:
        """Tokens that there is room for."""
        return self._cache.suffixes.max_rows

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


def vectors_of(
    model: SearchModel, layout: PatchLayout, histories: Histories, policy: AnyPolicy, chunk_rows: int | None = None
) -> Tensor | None:
    """``(V, D)`` what the vector rows of users' prompts are, which a model with memories makes; None without any.

    Args:
        model: of the prompts.
        layout: the prompts.
        histories: the users that they are of, in that order.
        policy: by which they were planned.
        chunk_rows: rows that are computed together to make them, at most, unless a user alone has more; None: as many
            as are fast.

    Raises:
        ValueError: the layout has such rows, and the model makes none.
    """
    if layout.vector_rows is None:
        return None
    if not hasattr(model, "prompt_vectors"):
        raise ValueError(
            f"policy: expected one of the history's items alone for {type(model).__name__}, which has no memory, got "
            f"{type(policy).__name__}; wrap the model in a RecurrentMemory"
        )
    vectors: Tensor = model.prompt_vectors(histories, policy, chunk_rows)
    return vectors


def _literals(layout: PatchLayout) -> NDArray[Any]:
    """``lo`` of the layout, where rows that are vectors are no literals."""
    lo: NDArray[Any] = layout.lo.numpy()
    if layout.vector_rows is not None:
        lo = lo.copy()
        lo[layout.vector_rows.numpy()] = 0
    return lo


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
