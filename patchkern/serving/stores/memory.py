# SPDX-License-Identifier: Apache-2.0
"""Compressed users in this process's memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import RLock

from patchkern.serving.stores.protocol import Value, check_keys, check_max_bytes, check_values, last_that_fit


class MemoryStore:
    """A `UserStore` that ends with its process. Threads may share it.

    Args:
        max_bytes: of keys and values; the least recently used make room. None: no limit.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """

    def __init__(self, max_bytes: int | None = None) -> None:
        check_max_bytes(max_bytes)
        self.max_bytes = max_bytes
        self._values: OrderedDict[bytes, bytes] = OrderedDict()  # the least recently used first
        self._identity: bytes | None = None
        self._num_bytes = 0
        self._lock = RLock()

    def claim(self, identity: bytes) -> bytes:
        with self._lock:
            if self._identity is None:
                self._identity = identity
            return self._identity

    def put(self, values: Mapping[bytes, Value]) -> int:
        given = check_values(values, self.max_bytes)
        copies = {key: bytes(view) for key, view in last_that_fit(given, self.max_bytes).items()}
        dropped = len(given) - len(copies)
        with self._lock:
            for key in given:
                self._drop(key)
            for key, value in copies.items():
                self._values[key] = value
                self._num_bytes += len(key) + len(value)
            while self.max_bytes is not None and self._num_bytes > self.max_bytes:
                self._drop(next(iter(self._values)))
                dropped += 1
        return dropped

    @contextmanager
    def reading(self, keys: Sequence[bytes]) -> Iterator[list[memoryview | None]]:
        check_keys(keys)
        with self._lock:
            found = [self._values.get(key) for key in keys]
            for key, value in zip(keys, found, strict=True):
                if value is not None:
                    self._values.move_to_end(key)
        yield [None if value is None else memoryview(value) for value in found]

    def delete(self, keys: Sequence[bytes]) -> int:
        check_keys(keys)
        with self._lock:
            return sum(self._drop(key) for key in keys)

    def _drop(self, key: bytes) -> bool:
        value = self._values.pop(key, None)
        if value is None:
            return False
        self._num_bytes -= len(key) + len(value)
        return True

    def __iter__(self) -> Iterator[bytes]:
        with self._lock:
            return iter([*self._values])

    def __len__(self) -> int:
        return len(self._values)

    @property
    def num_bytes(self) -> int:
        """Bytes of all keys and values."""
        return self._num_bytes

    def close(self) -> None:
        """Nothing to let go of: the values stay."""
