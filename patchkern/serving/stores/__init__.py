# SPDX-License-Identifier: Apache-2.0
"""Stores of compressed users, behind one small interface.

MemoryStore()                           # ends with its process
LmdbStore("users.lmdb", max_bytes=...)  # a file; many readers beside one writer, views without a copy
SqliteStore("users.sqlite")             # a file; nothing to install
RedisStore("redis://localhost:6379")    # a server, for many machines
"""

from patchkern.serving.stores.lmdb_store import LmdbStore
from patchkern.serving.stores.memory import MemoryStore
from patchkern.serving.stores.opening import open_store
from patchkern.serving.stores.protocol import StoreError, StoreFullError, UserStore
from patchkern.serving.stores.redis_store import RedisStore
from patchkern.serving.stores.sqlite_store import SqliteStore

__all__ = [
    "LmdbStore",
    "MemoryStore",
    "RedisStore",
    "SqliteStore",
    "StoreError",
    "StoreFullError",
    "UserStore",
    "open_store",
]
