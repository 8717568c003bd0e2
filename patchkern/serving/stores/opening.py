# SPDX-License-Identifier: Apache-2.0
"""Which store is meant by a path or a server's address."""

from __future__ import annotations

import os
from os import PathLike
from pathlib import Path
from typing import Any

from patchkern.serving.stores.lmdb_store import LmdbStore
from patchkern.serving.stores.memory import MemoryStore
from patchkern.serving.stores.protocol import UserStore
from patchkern.serving.stores.redis_store import RedisStore
from patchkern.serving.stores.sqlite_store import SqliteStore

SERVERS = "redis://", "rediss://", "unix://"
_METHODS = "claim", "put", "reading", "delete", "__iter__", "__len__", "close"


def open_store(store: UserStore | str | PathLike[str] | None) -> UserStore:
    """The store that is meant.

    Args:
        store: None: a new `MemoryStore`; an address ``redis://...``: a `RedisStore`; a path that ends in ``.sqlite``: a
            `SqliteStore`; another path: an `LmdbStore`. One that is open is returned.

    Raises:
        ImportError: the package that the store needs is missing.
        StoreError: it cannot be opened.
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    if store is None:
        return MemoryStore()
    if isinstance(store, str) and store.startswith(SERVERS):
        return RedisStore(store)
    if isinstance(store, (str, PathLike)):
        path = Path(os.fspath(store))
        return SqliteStore(path) if path.suffix == ".sqlite" else LmdbStore(path)
    unknown: Any = store
    lacking = [name for name in _METHODS if not hasattr(unknown, name)]
    if lacking:
        raise TypeError(
            f"store: expected a path, the address of a server or a store, got {type(unknown).__name__}, which has no "
            f"{lacking[0]}"
        )
    return store
