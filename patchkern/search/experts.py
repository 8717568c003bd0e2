# SPDX-License-Identifier: Apache-2.0
"""Users' pasts compressed to experts, and searches that begin with them: what is old is not read again.

`compress` runs ``[prompt | old | U]`` and keeps the keys and values of the experts U: the `State` of a user, a tensor
of keys and one of values for every layer, ``(Hkv, n * count, d)`` each, in the order of the layers. A search places it
between the prompt and what is recent. Where states come from, a search does not ask: `UserStates` is what it needs of
an object that keeps them; without one they are computed on the way. Both give the same lists.

The next block's experts are computed from the ones before (``parts="blocks"``): ``compress(model, old, policy,
known=states)`` reads the new blocks alone and returns longer states.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from patchkern.batch.arguments import check_count
from patchkern.batch.arrangement import spread
from patchkern.batch.expert_layout import compress_layout, compressed_row_counts, expert_hashes, read_layout
from patchkern.batch.experts import Experts
from patchkern.batch.hashes import UInt64, row_hashes
from patchkern.batch.histories import Histories, HistoriesLike
from patchkern.batch.layout import PatchLayout
from patchkern.batch.planning import Int64
from patchkern.batch.policy_kinds import AnyPolicy
from patchkern.budget.batch_rows import ASIDE_ROWS
from patchkern.search.prefill import Pass, packed, plan_spans, with_beginnings
from patchkern.search.prefix_cache import Layers, PrefixCache
from patchkern.search.protocol import SearchModel

State = tuple[Tensor, ...]
"""Of one user: keys and values of the first layer's experts, of the second's, and so on; or a memory's vectors."""


class UserStates(Protocol):
    """Users' states, kept: what ``recommend(..., user_states=...)`` takes."""

    def check(self, model: SearchModel, policy: AnyPolicy, seen: Any) -> None:
        """Raise a ValueError unless the states are of this policy and this model, as it is now.

        Args:
            seen: what `patchkern.search.model_state.model_state` says of it inside its ``searching()``.
        """

    def reading(
        self, names: Sequence[Hashable], histories: Histories
    ) -> AbstractContextManager[Sequence[State | None]]:
        """The state of every user whose old items are those of the history, on any device; inside the context.

        None: there is none, or it is of other items; it is then computed, and not kept.

        Args:
            names: ``B`` users.
            histories: whole ones.
        """


def compress(
    model: SearchModel,
    old: HistoriesLike,
    policy: Experts,
    known: Sequence[State | None] | None = None,
    *,
    chunk_rows: int | None = None,
    store_rows: int | None = None,
) -> list[State]:
    """Compress users' old items.

    Args:
        model: what reads them; it runs in evaluation mode and is left as it was.
        old: B pasts, each of whole blocks and not empty: the first `Experts.cuts` items of a history.
        policy: says into how many parts.
        known: with blocks, the state after the first blocks of each, or None; only the blocks after are read. None:
            there are none.
        chunk_rows: rows that go through the model together, at most.
        store_rows: users are computed together as long as their keys and values have no more rows than that.

    Returns:
        ``B`` states, on the model's device.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Examples:
        >>> import patchkern as pk
        >>> from patchkern.search.experts import compress
        >>> policy = pk.Experts(pk.ItemPatches(keep_text=0, max_items=None), count=2, keep=1, block=3)
        >>> catalog = pk.Catalog.from_token_ids(range(9), range(10))
        >>> model = pk.ItemModel(catalog, policy, width=8, heads=2, prompt=pk.Prompt(prefix=[9], experts=[10, 11]))
        >>> (state,) = compress(model, [[1, 2, 3, 4, 5, 6]], policy)
        >>> [tuple(tensor.shape) for tensor in state]
        [(2, 2, 4), (2, 2, 4), (2, 2, 4), (2, 2, 4)]
    """
    if not isinstance(policy, Experts):
        raise TypeError(f"policy: expected Experts, got {type(policy).__name__}")
    for name, most in (("chunk_rows", chunk_rows), ("store_rows", store_rows)):
        if most is not None:
            check_count(name, most, minimum=1)
    old = Histories.coerce(old)
    parts = _known_parts(policy, known, old.lengths)
    rows = compressed_row_counts(model.catalog, old, policy, model.prompt)
    states: list[State] = []
    searching = model.searching()
    try:
        with searching:
            for users in _together(rows, store_rows):
                before = [None] * users.size if known is None else [known[user] for user in users.tolist()]
                states += _compressed(model, old.take(users), policy, before, parts[users], chunk_rows)
    finally:
        searching.close()
    return states


class ExpertPrompts:
    """The prompts of a batch of users under `Experts`, as a search takes them in the place of a layout.

    Args:
        model: what reads them.
        histories: whole ones, of B users.
        policy: under which they are compressed.
        head: what the prompts are for, as in `patchkern.build_layout`.
        states: asked for the experts of what is old; without, or where it has none, they are computed.
        names: ``B``, of the users in ``states``; 0, 1, 2, ... where not given.

    Attributes:
        layout: ``[prompt | U | recent | suffix]`` of every user.
        kept: ``(B,)`` rows of each that are there before anything is read: the prompt and U.
    """

    def __init__(
        self,
        model: SearchModel,
        histories: Histories,
        policy: Experts,
        head: str,
        states: UserStates | None = None,
        names: Sequence[Hashable] | None = None,
    ) -> None:
        policy.check_head(head)
        self._histories, self._policy, self._states = histories, policy, states
        self._names = range(len(histories)) if names is None else names
        self._cuts = policy.cuts(histories.lengths)
        self._experts = policy.count * policy.compressed_parts(self._cuts)
        self._beginning = len(model.prompt.prefix)
        self.layout = read_layout(model.catalog, histories, policy, model.prompt, head)
        self.kept = self._beginning + self._experts

    def past(self, model: SearchModel) -> PatchLayout:
        """What is read for the experts of these users, who all have old items, where there are no states."""
        return compress_layout(model.catalog, self._old(np.arange(self._cuts.size)), self._policy, model.prompt)

    def hashes(self, model: SearchModel) -> UInt64:
        """``(T,)`` of the layout's rows, see `patchkern.row_hashes`; experts' are those of what they have read."""
        by_item = model.item_embedding is not None
        hashes = row_hashes(self.layout, by_item)
        learned = expert_hashes(model.catalog, self._histories, self._policy, model.prompt, by_item)
        hashes[self._rows(np.arange(self._cuts.size))] = learned
        return hashes

    def load(
        self,
        model: SearchModel,
        cache: PrefixCache,
        users: Int64,
        chunk_rows: int | None,
        seen: Callable[[], Any],
    ) -> None:
        """Bring the experts of some of the users to where the prompts are stored; inside the model's ``searching()``.

        What is computed takes room for the largest past, or for `ASIDE_ROWS` where the prompts have as many. ``seen``
        says what `UserStates.check` asks for.
        """
        users = users[self._experts[users] > 0]
        if users.size == 0:
            return
        if self._states is None:
            self._compute(model, cache, users, chunk_rows)
            return
        self._states.check(model, self._policy, seen())
        with self._states.reading([self._names[user] for user in users], self._histories.take(users)) as found:
            there = [(user, state) for user, state in zip(users, found, strict=True) if state is not None]
            self._place(cache, np.array([user for user, _ in there], np.int64), [state for _, state in there])
            lacking = np.array([state is None for state in found], np.bool_)
        self._compute(model, cache, users[lacking], chunk_rows)

    def _compute(self, model: SearchModel, cache: PrefixCache, users: Int64, chunk_rows: int | None) -> None:
        if users.size:
            most = min(cache.num_rows, ASIDE_ROWS)  # `compress` computes a user who has more alone
            states = compress(model, self._old(users), self._policy, chunk_rows=chunk_rows, store_rows=most)
            self._place(cache, users, states)

    def _rows(self, users: Int64) -> Int64:
        """The experts' rows in the layout, user by user."""
        return spread(self.layout.cu_seqlens.numpy()[users] + self._beginning, self._experts[users])

    def _old(self, users: Int64) -> Histories:
        return self._histories.between(users, np.zeros_like(users), self._cuts[users])

    def _place(self, cache: PrefixCache, users: Int64, states: Sequence[State]) -> None:
        if users.size == 0:
            return
        device = cache.positions.device
        places = torch.from_numpy(self._rows(users)).to(device, non_blocking=True)
        for layer, pair in enumerate(zip(*[iter(zip(*states, strict=True))] * 2, strict=True)):
            new = [torch.cat([part.to(device, non_blocking=True) for part in parts], dim=1) for parts in pair]
            stored = cache.layers_like({layer: (new[0], new[1])})[layer]
            for kept, loaded in zip(stored, new, strict=True):
                kept[:, places] = loaded.to(kept.dtype)


# ------------------------------------------------------------------ computing


def _known_parts(policy: Experts, known: Sequence[State | None] | None, lengths: Int64) -> Int64:
    """``(B,)`` how many parts of each user are compressed, of pasts of these lengths."""
    n_users = lengths.size
    if known is None:
        return np.zeros(n_users, np.int64)
    if policy.parts != "blocks":
        raise ValueError('known: expected None with parts="one", whose experts read all old items anew')
    if len(known) != n_users:
        raise ValueError(f"known: expected one per user ({n_users}), got {len(known)}")
    rows = np.array([0 if state is None else state[0].shape[1] for state in known], np.int64)
    wrong = np.flatnonzero(rows % policy.count)
    if wrong.size:
        raise ValueError(f"known[{wrong[0]}]: expected a multiple of {policy.count} experts, got {rows[wrong[0]]}")
    parts = rows // policy.count
    wrong = np.flatnonzero(parts > policy.compressed_parts(lengths))
    if wrong.size:
        user = wrong[0]
        raise ValueError(
            f"known[{user}]: expected experts of at most {lengths[user]} items, got those of "
            f"{parts[user] * policy.block}"
        )
    return parts


def _together(rows: Int64, most: int | None) -> Iterator[Int64]:
    """Consecutive users with at most so many rows together, at least one."""
    begin, filled = 0, 0
    for user, count in enumerate(rows.tolist()):
        if most is not None and user > begin and filled + count > most:
            yield np.arange(begin, user)
            begin, filled = user, 0
        filled += count
    if rows.size:
        yield np.arange(begin, rows.size)


def _compressed(
    model: SearchModel,
    old: Histories,
    policy: Experts,
    known: Sequence[State | None],
    parts: Int64,
    chunk_rows: int | None,
) -> list[State]:
    """States of users who are computed together; inside the model's ``searching()``."""
    every = policy.compressed_parts(old.lengths)
    longer = np.flatnonzero(parts < every)
    if longer.size < parts.size:
        # those who have all their experts are not read
        before = [known[user] for user in longer.tolist()]
        new = iter(_compressed(model, old.take(longer), policy, before, parts[longer], chunk_rows))
        kept = [next(new) if parts[user] < every[user] else known[user] for user in range(parts.size)]
        return [state for state in kept if state is not None]
    if longer.size == 0:
        return []
    layout = compress_layout(model.catalog, old, policy, model.prompt, parts)
    model.check_search(layout, 1)
    begins = layout.prompts.numpy().astype(np.int64)[:-1]
    beginning, count = len(model.prompt.prefix), policy.count
    is_expert = np.isin(-1 - layout.lo.numpy(), model.prompt.experts)
    places = np.split(np.flatnonzero(is_expert), np.cumsum(every * count)[:-1])
    cache = PrefixCache(layout.cu_seqlens.to(model.device), layout.num_rows, 0)
    for user in np.flatnonzero(parts).tolist():
        state, at = known[user], torch.from_numpy(places[user][: parts[user] * count]).to(model.device)
        for layer in range(len(state or ()) // 2):
            keys, values = (tensor.to(model.device) for tensor in (state or ())[2 * layer : 2 * layer + 2])
            for rows, loaded in zip(cache.layers_like({layer: (keys, values)})[layer], (keys, values), strict=True):
                rows[:, at] = loaded.to(rows.dtype)
    for spans in with_beginnings(
        _passes(layout, is_expert, places, parts * count, chunk_rows), begins, beginning, chunk_rows
    ):
        cache.prefill(spans)
        asked: tuple[Any, ...] = (packed(layout, spans), torch.zeros(0, dtype=torch.int64, device="cpu"), cache)
        _ = model.prompt_logits(*asked) if "titles" in model.learns else model.prompt_states(*asked)
    return [_state(cache.layers, int(own[0]), int(own[-1]) + 1) for own in places]


def _passes(
    layout: PatchLayout, is_expert: np.ndarray[Any, Any], places: list[Int64], known: Int64, chunk_rows: int | None
) -> list[Pass]:
    """The passes over all but prompts and known experts, block by block."""
    cu_seqlens = layout.cu_seqlens.numpy().astype(np.int64)
    ranges = layout.ranges
    none = np.zeros((cu_seqlens.size - 1, 1, 2), np.int64)
    seen = none if ranges is None else ranges.numpy().astype(np.int64)
    there = np.zeros(is_expert.size + 1, np.bool_)
    for own, count in zip(places, known, strict=True):
        there[own[:count]] = True
    wanted = ~there[cu_seqlens[:-1]]
    wanted[np.searchsorted(cu_seqlens, layout.prompts.numpy()[:-1])] = False
    spans = np.flatnonzero(wanted)
    first = layout.position_ids.numpy()[cu_seqlens[spans]]
    user = np.searchsorted(layout.prompts.numpy(), cu_seqlens[spans], side="right")
    return plan_spans(cu_seqlens, seen, spans[np.lexsort((first, user))], chunk_rows)


def _state(layers: Layers, begin: int, end: int) -> State:
    return tuple(rows[:, begin:end].clone() for layer in sorted(layers) for rows in layers[layer])
