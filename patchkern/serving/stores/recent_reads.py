# SPDX-License-Identifier: Apache-2.0
"""Which values were read, until the next write writes it down: reading itself writes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from threading import Lock

_MOST = 1 << 16


class RecentReads:
    """The latest keys that were read, each once, in the order of their last use. Threads may share it."""

    def __init__(self) -> None:
        self._keys: dict[bytes, None] = {}
        self._lock = Lock()

    def add(self, keys: Sequence[bytes]) -> None:
        with self._lock:
            for key in keys:
                self._keys.pop(key, None)
                self._keys[key] = None
            while len(self._keys) > _MOST:
                del self._keys[next(iter(self._keys))]

    def take(self) -> list[bytes]:
        """All of them, which are then forgotten."""
        with self._lock:
            keys, self._keys = self._keys, {}
        return list(keys)
