# SPDX-License-Identifier: Apache-2.0
"""Users' prompts, computed once and kept: what is new since a user's last visit is all that is computed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from threading import RLock
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from patchkern.batch.arguments import check_count
from patchkern.batch.columns import is_sequence
from patchkern.batch.hashes import UInt64, row_hashes
from patchkern.batch.layout import PatchLayout
from patchkern.search.prefix_cache import Layers, PrefixCache
from patchkern.search.protocol import SearchModel, check_model

Int64 = NDArray[np.int64]


class _Entry(NamedTuple):
    """A user's prompt: row t has this content and lies in this place of the pool."""

    hashes: UInt64
    places: Int64


class UserCache:
    """Keys and values of users' prompts, kept between calls of ``recommend(..., user_cache=...)``.

    Each user has an entry with the prompt as it was last computed, and the content hash of each of its rows
    (`patchkern.row_hashes`). A later prompt of the user reuses all rows up to the first that differs; the entry then
    holds the later prompt. Where a history grows, that is nearly all of it under ``SessionPatches(align="start",
    max_items=None)``, whose sessions never move; with other policies it ends at the first row that became another.
    Since content decides, a wrong or repeated user id costs time and never gives a wrong result.

    The least recently used users make room. Memory for ``max_bytes`` is reserved at first use, on the model's device. A
    change of the model empties the cache: `patchkern.search.model_state` says what is seen. Threads may share a cache;
    a copy of one is empty.

    Args:
        model: whose prompts these are.
        max_bytes: for keys and values; 2 x layers x key-value heads x head width x bytes per element a row.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """

    def __init__(self, model: SearchModel, max_bytes: int) -> None:
        check_model(model)
        check_count("max_bytes", max_bytes, minimum=1, maximum=2**63 - 1)
        self.max_bytes = max_bytes
        self._model = model
        self._lock = RLock()
        self.clear()

    def clear(self) -> None:
        """Forget all users and release the memory."""
        with self._lock:
            self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()  # the least recently used first
            self._era: object = object()  # what was computed in an earlier one is not kept
            self._model_state: Any = None
            self._pool: Layers = {}  # per layer keys and values, (Hkv, capacity, d)
            self._row_bytes = 0
            self._free, self._n_free = np.zeros(0, np.int64), 0  # places without a row: the first n_free of the array

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._model, self.max_bytes)

    def __len__(self) -> int:
        """Users that have an entry."""
        return len(self._entries)

    def __contains__(self, user_id: Hashable) -> bool:
        return user_id in self._entries

    @property
    def num_bytes(self) -> int:
        """Bytes of the keys and values of all users."""
        with self._lock:
            return self._row_bytes * sum(entry.places.size for entry in self._entries.values())

    def begin(
        self,
        model: SearchModel,
        layout: PatchLayout,
        user_ids: Sequence[Any] | None,
        seen: Any,
        hashes: UInt64 | None = None,
        vectors: Tensor | None = None,
    ) -> CachedPrompts:
        """Look up the prompts of a batch.

        Args:
            model: must be the cache's.
            layout: the prompts of B users, on the CPU.
            user_ids: ``B`` hashable names; None: 0, 1, 2, ...
            seen: what `model_state` says of the model inside its ``searching()``.
            hashes: ``(T,)`` of its rows, where they stand for more than what is in the layout.
            vectors: what the layout's ``vector_rows`` are.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came.
        """
        if model is not self._model:
            raise ValueError("user_cache: expected one made for this model, got another model's")
        names = _names(user_ids, layout.num_users)
        if hashes is None:
            hashes = row_hashes(layout, model.item_embedding is not None, vectors)
        of_users = np.split(hashes, layout.cu_seqlens[1:-1].numpy())
        with self._lock:
            if seen != self._model_state:
                self.clear()
                self._model_state = seen
            return CachedPrompts(self, self._era, names, of_users)

    # ------------------------------------------------------------------ for CachedPrompts

    def _known(self, name: Hashable, hashes: UInt64) -> Int64:
        """Places of the first rows of a prompt that are in the pool; the user is now the most recently used."""
        entry = self._entries.get(name)
        if entry is None:
            return np.zeros(0, np.int64)
        self._entries.move_to_end(name)
        size = min(hashes.size, entry.hashes.size)
        same = np.append(entry.hashes[:size] == hashes[:size], False)
        return entry.places[: int(same.argmin())]

    def _reserve(self, layers: Layers) -> None:
        """Make the pool, for rows like these."""
        if self._pool:
            return
        rows = [x for pair in layers.values() for x in pair]
        self._row_bytes = sum(x.shape[0] * x.shape[2] * x.element_size() for x in rows)
        capacity = self.max_bytes // self._row_bytes
        self._free, self._n_free = np.arange(capacity), capacity
        pool: Layers = {}
        with torch.inference_mode(False):  # or calls outside of it could not write there
            for layer, pair in layers.items():
                keys, values = (x.new_empty(x.shape[0], capacity, x.shape[2]) for x in pair)
                pool[layer] = keys, values
        self._pool = pool

    def _replace(self, name: Hashable, hashes: UInt64) -> Int64 | None:
        """Make a user's entry that of this prompt.

        Returns:
            The places of its last rows, which are not in the pool yet; None where the prompt does not fit.
        """
        known = self._known(name, hashes)
        old = self._entries.pop(name, None)
        if old is not None:
            self._release(old.places[known.size :])
        lacking = hashes.size - known.size
        while lacking > self._n_free and self._entries:
            _, oldest = self._entries.popitem(last=False)
            self._release(oldest.places)
        if lacking > self._n_free:
            self._release(known)
            return None
        self._n_free -= lacking
        new = self._free[self._n_free : self._n_free + lacking].copy()
        self._entries[name] = _Entry(hashes, np.append(known, new))
        return new

    def _release(self, places: Int64) -> None:
        self._free[self._n_free : self._n_free + places.size] = places
        self._n_free += places.size


class CachedPrompts:
    """The prompts of a batch and what a `UserCache` knows of them: `load` before computing, `save` after."""

    def __init__(self, cache: UserCache, era: object, names: list[Hashable], hashes: list[UInt64]) -> None:
        self._cache = cache
        self._era = era
        self._names = names
        self._hashes = hashes
        self._ends = np.cumsum([x.size for x in hashes])  # of each user's rows, where the prompts are stored

    def load(self, prompts: PrefixCache) -> Int64:
        """Copy the known rows to where the prompts are stored; returns ``(B,)`` how many of each user's first rows."""
        cache = self._cache
        with cache._lock:
            if cache._era is not self._era:
                return np.zeros(len(self._names), np.int64)
            known = [cache._known(*user) for user in zip(self._names, self._hashes, strict=True)]
            rows = [
                np.arange(places.size) + end - hashes.size
                for places, end, hashes in zip(known, self._ends, self._hashes, strict=True)
            ]
            pool = cache._pool
            self._copy(pool, np.concatenate(known), prompts.layers_like(pool), np.concatenate(rows))
            return np.array([places.size for places in known])

    def save(self, prompts: PrefixCache) -> None:
        """Keep the prompts, now that all rows are computed."""
        cache = self._cache
        with cache._lock:
            if cache._era is not self._era:
                return
            try:
                self._keep(prompts)
            except BaseException:
                cache.clear()  # an entry must not be there without its rows
                raise

    def _keep(self, prompts: PrefixCache) -> None:
        cache = self._cache
        cache._reserve(prompts.layers)
        last = {name: user for user, name in enumerate(self._names)}  # of equal names, the last
        new = {name: cache._replace(name, self._hashes[user]) for name, user in last.items()}
        # a user of the batch may have pushed out those before it
        kept = {last[name]: places for name, places in new.items() if places is not None and name in cache}
        rows = [np.arange(self._ends[user] - places.size, self._ends[user]) for user, places in kept.items()]
        nothing = np.zeros(0, np.int64)
        source, target = (np.concatenate([nothing, *x]) for x in (rows, kept.values()))
        self._copy(prompts.layers, source, cache._pool, target)

    @staticmethod
    def _copy(source: Layers, source_rows: Int64, target: Layers, target_rows: Int64) -> None:
        if source_rows.size == 0:
            return
        device = next(iter(source.values()))[0].device
        read, written = (torch.from_numpy(x).to(device, non_blocking=True) for x in (source_rows, target_rows))
        for layer, pair in source.items():
            for rows, kept in zip(pair, target[layer], strict=True):
                kept.index_copy_(1, written, rows.index_select(1, read))


def _names(user_ids: Sequence[Any] | None, n_users: int) -> list[Hashable]:
    if user_ids is None:
        return list(range(n_users))
    if not is_sequence(user_ids):
        raise TypeError(f"user_ids: expected one per user, got {type(user_ids).__name__}")
    if len(user_ids) != n_users:
        raise ValueError(f"user_ids: expected one per user ({n_users}), got {len(user_ids)}")
    names: list[Hashable] = list(user_ids)
    for place, name in enumerate(names):
        try:
            hash(name)
        except TypeError as error:
            raise TypeError(f"user_ids[{place}]: expected something hashable, got {type(name).__name__}") from error
    return names
