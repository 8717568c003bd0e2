# SPDX-License-Identifier: Apache-2.0
"""What a store of compressed users is: bytes by key, each value whole or not there at all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from patchkern.batch.arguments import check_count

Value = bytes | bytearray | memoryview

FORMAT_VERSION = 1
MAX_KEY_BYTES = 480  # lmdb's 511, less what a store may put in front
MAX_VALUE_BYTES = 1 << 29  # a Redis server's


class StoreError(RuntimeError):
    """A store cannot be opened, read or written: it is torn, of another kind or version, or cannot be reached."""


class StoreFullError(StoreError):
    """There is no room for what was to be stored. What had been stored before is unchanged."""


class UserStore(Protocol):
    """Keeps values by key. What `put` has returned from is there after the process was killed, whole.

    Keys are 1 to 480 bytes, values up to 512 MiB, also empty. Wrong ones raise a TypeError or ValueError that names
    them; a store that fails raises a `StoreError`.
    """

    def claim(self, identity: bytes) -> bytes:
        """Whose values these are: ``identity`` if nobody has claimed the store, else what it was claimed with."""
        ...

    def put(self, values: Mapping[bytes, Value]) -> int:
        """Store all values or none, in place of those with the same keys.

        Returns:
            How many others were deleted to make room, as far as the store knows.
        """
        ...

    def reading(self, keys: Sequence[bytes]) -> AbstractContextManager[list[memoryview | None]]:
        """The values of some keys, None where there is none, all of one moment. They are valid inside the context."""
        ...

    def delete(self, keys: Sequence[bytes]) -> int:
        """Delete what there is of these; returns how many that were."""
        ...

    def __iter__(self) -> Iterator[bytes]:
        """All keys, in no order that means anything."""
        ...

    def __len__(self) -> int:
        """Values stored."""
        ...

    def close(self) -> None:
        """Let go of files and connections; again is harmless."""
        ...


def check_keys(keys: Sequence[bytes]) -> None:
    """Raise unless these can be keys."""
    if isinstance(keys, (str, bytes, bytearray, memoryview)):
        raise TypeError(f"keys: expected a sequence of bytes, got {type(keys).__name__}")
    for key in keys:
        if type(key) is not bytes:
            raise TypeError(f"keys: expected bytes, got {key!r}")
        if not 1 <= len(key) <= MAX_KEY_BYTES:
            raise ValueError(f"keys: expected 1 to {MAX_KEY_BYTES} bytes, got {len(key)}: {key[:40]!r}")


def check_values(values: Mapping[bytes, Value], max_bytes: int | None = None) -> dict[bytes, memoryview]:
    """The values as bytes in memory, of keys that can be keys.

    Raises:
        TypeError: naming the argument, what was expected and what came.
        ValueError: likewise; a value that is larger than ``max_bytes`` with its key.
    """
    if not isinstance(values, Mapping):
        raise TypeError(f"values: expected a mapping of keys to bytes, got {type(values).__name__}")
    check_keys(list(values))
    buffers: dict[bytes, memoryview] = {}
    for key, value in values.items():
        if not isinstance(value, Value):
            raise TypeError(f"values[{key!r}]: expected bytes, got {type(value).__name__}")
        view = memoryview(value)
        if not view.c_contiguous:
            raise ValueError(f"values[{key!r}]: expected bytes without gaps, got strides {view.strides}")
        view = view.cast("B")
        if view.nbytes > MAX_VALUE_BYTES:
            raise ValueError(f"values[{key!r}]: expected at most {MAX_VALUE_BYTES} bytes, got {view.nbytes}")
        if max_bytes is not None and len(key) + view.nbytes > max_bytes:
            raise ValueError(
                f"values[{key!r}]: expected what fits in max_bytes={max_bytes} with its key, got "
                f"{view.nbytes} + {len(key)} bytes"
            )
        buffers[key] = view
    return buffers


def last_that_fit(values: dict[bytes, memoryview], max_bytes: int | None) -> dict[bytes, memoryview]:
    """Of values that are too many for a budget the last, as if they had been stored one after the other."""
    if max_bytes is None:
        return values
    total, kept = 0, dict[bytes, memoryview]()
    for key, value in reversed(values.items()):
        total += len(key) + value.nbytes
        if total > max_bytes:
            break
        kept[key] = value
    return dict(reversed(kept.items()))


def check_max_bytes(max_bytes: int | None) -> None:
    """Raise unless this can be a byte budget; None is none."""
    if max_bytes is not None:
        check_count("max_bytes", max_bytes, minimum=1, maximum=2**63 - 1)
