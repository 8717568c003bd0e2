# SPDX-License-Identifier: Apache-2.0
"""Compressed users on a server that speaks the Redis protocol, for many machines at once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import cast

from patchkern.serving.stores.protocol import (
    FORMAT_VERSION,
    StoreError,
    StoreFullError,
    Value,
    check_keys,
    check_values,
)

_AT_ONCE = 64  # keys in one MGET: a server answers others in between
_SCANNED = 1000


class RedisStore:
    """A `UserStore` on a Redis or Valkey server.

    The budget is the server's: ``maxmemory`` with ``maxmemory-policy allkeys-lru`` lets the least recently used users
    make room, and without such a policy a full server refuses. What is on its disk when `put` returns is the server's
    ``appendonly`` too. Values are best below some 256 KB. Threads may share a store.

    Args:
        url: ``redis://host:port/database``, ``rediss://`` with TLS, ``unix://path``.
        prefix: in front of every key. Stores of different models have different ones.
        timeout: seconds to wait for the server.

    Raises:
        ImportError: redis is missing.
        StoreError: the server cannot be reached, or holds a store of another version under this prefix.
        TypeError, ValueError: naming the argument, what was expected and what came.
    """

    def __init__(self, url: str, *, prefix: str = "patchkern", timeout: float = 30.0) -> None:
        for name, text in (("url", url), ("prefix", prefix)):
            if not isinstance(text, str):
                raise TypeError(f"{name}: expected a string, got {type(text).__name__}")
        try:
            import redis
        except ImportError as error:
            raise ImportError("store: a store on a server needs redis (pip install 'patchkern[redis]')") from error
        self._redis = redis
        self._about, self._prefix = f"{prefix}:about".encode(), f"{prefix}:user:".encode()
        try:
            self._client: redis.Redis = redis.Redis.from_url(
                url, socket_timeout=timeout, socket_connect_timeout=timeout
            )
        except ValueError as error:
            raise ValueError(f"url: expected one such as redis://host:6379/0, got {url!r}: {error}") from error
        given = self._client.connection_pool.connection_kwargs  # a URL may have a password
        place = given.get("path") or f"{given.get('host', 'localhost')}:{given.get('port', 6379)}"
        self.name = f"Redis server at {place}, prefix {prefix!r}"
        with self._failing():
            self._client.hsetnx(self._about, "format", str(FORMAT_VERSION))
            version = self._client.hget(self._about, "format")
            if version != str(FORMAT_VERSION).encode():
                raise StoreError(f"{self.name}: expected a store of format version {FORMAT_VERSION}, got {version!r}")

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        """Name the server in what redis raises."""
        try:
            yield
        except self._redis.exceptions.OutOfMemoryError as error:
            raise StoreFullError(f"{self.name}: no room; nothing was stored of this call: {error}") from error
        except self._redis.exceptions.RedisError as error:
            raise StoreError(f"{self.name}: {error}") from error

    def claim(self, identity: bytes) -> bytes:
        with self._failing():
            self._client.hsetnx(self._about, "identity", identity)
            claimed = self._client.hget(self._about, "identity")
        return identity if claimed is None else cast(bytes, claimed)  # a full server may have dropped it at once

    def put(self, values: Mapping[bytes, Value]) -> int:
        given = check_values(values)
        if given:
            with self._failing():
                self._client.mset({self._prefix + key: view for key, view in given.items()})
        return 0

    @contextlib.contextmanager
    def reading(self, keys: Sequence[bytes]) -> Iterator[list[memoryview | None]]:
        check_keys(keys)
        found: list[memoryview | None] = []
        with self._failing():
            for first in range(0, len(keys), _AT_ONCE):
                some = self._client.mget([self._prefix + key for key in keys[first : first + _AT_ONCE]])
                found += (None if value is None else memoryview(cast(bytes, value)) for value in some)
        yield found

    def delete(self, keys: Sequence[bytes]) -> int:
        check_keys(keys)
        with self._failing():
            return self._client.delete(*(self._prefix + key for key in keys)) if keys else 0

    def __iter__(self) -> Iterator[bytes]:
        """All keys that there are from the first to the last, found by a scan of the whole database."""
        seen = set()
        with self._failing():
            for key in self._client.scan_iter(match=_literally(self._prefix) + b"*", count=_SCANNED):
                if key not in seen:  # a scan may meet a key twice
                    seen.add(key)
                    yield key[len(self._prefix) :]

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def close(self) -> None:
        self._client.close()


def _literally(text: bytes) -> bytes:
    """A pattern that matches this and nothing else."""
    special = b"\\*?[]^-"
    return b"".join(b"\\" + bytes([byte]) if byte in special else bytes([byte]) for byte in text)
