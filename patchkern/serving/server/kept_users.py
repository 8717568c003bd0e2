# SPDX-License-Identifier: Apache-2.0
"""Where the compressed users of each served model are kept: a store of its own for every model."""

from __future__ import annotations

from pathlib import Path

from patchkern.search.protocol import SearchModel
from patchkern.serving.identity import model_identity
from patchkern.serving.stores.lmdb_store import LmdbStore
from patchkern.serving.stores.opening import SERVERS
from patchkern.serving.stores.protocol import UserStore
from patchkern.serving.stores.redis_store import RedisStore
from patchkern.serving.user_states import UserStates, compressor_of


class KeptUsers:
    """Opens a model's store, once: a reload that brings the same model goes on with the users that there are.

    Args:
        place: a folder, in which every model has an lmdb file, or the address of a Redis server, on which it has a
            prefix; both are named by what the model compresses.
        max_bytes: of a file; the least recently used users make room. None: no limit. A server has its own.

    Raises:
        ValueError: ``max_bytes`` for a server.
    """

    def __init__(self, place: str, max_bytes: int | None = None) -> None:
        self._place, self._max_bytes = place, max_bytes
        self._stores: dict[str, UserStore] = {}
        if place.startswith(SERVERS) and max_bytes is not None:
            raise ValueError("states_bytes: expected none for a server, which has a maxmemory of its own")

    def of(self, model: SearchModel) -> UserStates:
        """The users of a model.

        Raises:
            ImportError, OSError, StoreError: the store cannot be opened.
            TypeError: the model's policy does not compress what is old.
        """
        name = model_identity(model, compressor_of(model, None).policy).hex()
        if name not in self._stores:
            self._stores[name] = self._open(name)
        return UserStates(model, store=self._stores[name])

    def _open(self, name: str) -> UserStore:
        if self._place.startswith(SERVERS):
            return RedisStore(self._place, prefix=f"patchkern:{name}")
        folder = Path(self._place)
        folder.mkdir(parents=True, exist_ok=True)
        return LmdbStore(folder / f"{name}.lmdb", self._max_bytes)
