# SPDX-License-Identifier: Apache-2.0
"""Compressed users in a file of this machine, mapped into memory: lmdb."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchkern.batch.arguments import check_count
from patchkern.serving.stores.protocol import (
    FORMAT_VERSION,
    StoreError,
    StoreFullError,
    Value,
    check_keys,
    check_max_bytes,
    check_values,
    last_that_fit,
)
from patchkern.serving.stores.recent_reads import RecentReads

if TYPE_CHECKING:
    import lmdb

_ABOUT, _VALUES, _LAST_USE, _USERS = b"about", b"values", b"last use", b"users by last use"
_FORMAT, _IDENTITY, _NUM_BYTES = b"format", b"identity", b"bytes"
_SIGNED = b"patchkern users "
_READERS = 1024  # threads of all processes that read at one moment
# What the last commit allocated and gave up again may never have been written, so a sound file may lack this much.
_UNWRITTEN = 1 << 20


class LmdbStore:
    """A `UserStore` in one file: one process writes at a time, any number reads beside it, without waiting.

    What is read are views of the mapped file, without a copy. A write is on the disk when `put` returns. The file is of
    ``map_size`` in name only: it grows with what is stored, is used again where something was deleted, and never
    shrinks. Not for network file systems. Threads may share a store; a process that was forked needs one of its own.

    With ``max_bytes`` the least recently used users make room. Reading writes nothing: reads of this object count as
    uses from its next write on, those of others do not count.

    Args:
        path: of the file, made where there is none; beside it lies one with ``-lock`` at its end.
        max_bytes: of keys and values. On the disk a value takes whole pages, of 4096 bytes in general, where it is
            larger than half of one. None: no limit.
        map_size: bytes of addresses set aside, the most that the file can have; the same for all processes.
        readonly: only read what is there.

    Raises:
        ImportError: lmdb is missing.
        StoreError: there is no store in the file, or one of another version, or a torn one; naming the file.
        TypeError, ValueError: naming the argument, what was expected and what came.
    """

    def __init__(
        self,
        path: str | PathLike[str],
        max_bytes: int | None = None,
        *,
        map_size: int = 1 << 40,
        readonly: bool = False,
    ) -> None:
        check_max_bytes(max_bytes)
        check_count("map_size", map_size, minimum=1 << 16, maximum=2**46)
        try:
            import lmdb
        except ImportError as error:
            raise ImportError(
                "store: a store in a file needs lmdb (pip install 'patchkern[states]'); SqliteStore needs nothing"
            ) from error
        self.path = Path(path)
        self.max_bytes = max_bytes
        self._lmdb = lmdb
        self._map_size = map_size
        self._readonly = readonly
        self._reads = RecentReads()
        if not readonly:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        elif not self.path.is_file():
            raise StoreError(f"{self.path}: expected a store of compressed users, found no such file")
        with self._failing():
            self._environment = lmdb.open(
                os.fspath(self.path),
                map_size=map_size,
                subdir=False,
                max_dbs=4,
                max_readers=_READERS,
                readonly=readonly,
                create=not readonly,
                readahead=False,
            )
        try:
            with self._failing():
                self._check_size()
                self._environment.reader_check()
                self._open()
        except BaseException:
            self._environment.close()
            raise

    # ------------------------------------------------------------------ opening

    def _check_size(self) -> None:
        """Pages beyond the end of the file would be a fault of memory, not an error."""
        least = (self._environment.info()["last_pgno"] + 1) * self._environment.stat()["psize"]
        size = self.path.stat().st_size
        if size >= least:
            return
        if size < least - _UNWRITTEN:
            raise StoreError(f"{self.path}: expected at least {least} bytes, got {size}: the file is torn")
        try:
            with self.path.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, least)
        except OSError as error:
            raise StoreError(f"{self.path}: expected at least {least} bytes, got {size}, and {error}") from error

    def _open(self) -> None:
        environment = self._environment
        with environment.begin() as transaction:
            is_new = transaction.stat()["entries"] == 0
        if is_new and not self._readonly:
            with environment.begin(write=True) as transaction:
                if transaction.stat()["entries"] == 0:  # else another process was first
                    for name in (_ABOUT, _VALUES, _LAST_USE, _USERS):
                        environment.open_db(name, transaction)
                    about = environment.open_db(_ABOUT, transaction)
                    transaction.put(_FORMAT, _SIGNED + str(FORMAT_VERSION).encode(), db=about)
                    transaction.put(_NUM_BYTES, _number(0), db=about)
        try:
            about = environment.open_db(_ABOUT, create=False)
            with environment.begin() as transaction:
                signed = bytes(transaction.get(_FORMAT, b"", db=about))
        except (self._lmdb.NotFoundError, self._lmdb.IncompatibleError):
            signed = b""
        if not signed.startswith(_SIGNED):
            raise StoreError(f"{self.path}: expected a store of compressed users, got another lmdb file")
        version = signed.removeprefix(_SIGNED).decode(errors="replace")
        if version != str(FORMAT_VERSION):
            raise StoreError(f"{self.path}: expected a store of format version {FORMAT_VERSION}, got {version}")
        self._about = about
        self._values = environment.open_db(_VALUES, create=False)
        self._last_use = environment.open_db(_LAST_USE, create=False)  # key -> number of its last use
        self._users = environment.open_db(_USERS, create=False)  # and back

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        """Name the file in what lmdb raises."""
        try:
            yield
        except self._lmdb.MapFullError as error:
            raise StoreFullError(
                f"{self.path}: no room in map_size={self._map_size} bytes; nothing was stored of this call. Give it "
                "more, or max_bytes"
            ) from error
        except self._lmdb.DiskError as error:
            raise StoreFullError(f"{self.path}: the disk is full; nothing was stored of this call: {error}") from error
        except self._lmdb.ReadonlyError as error:
            raise StoreError(f"{self.path}: expected a store open for writing, got one with readonly=True") from error
        except (self._lmdb.InvalidError, self._lmdb.CorruptedError, self._lmdb.PageNotFoundError) as error:
            raise StoreError(
                f"{self.path}: expected a store of compressed users, got a torn file or another kind: {error}"
            ) from error
        except self._lmdb.Error as error:
            raise StoreError(f"{self.path}: {error}") from error

    # ------------------------------------------------------------------ the store

    def claim(self, identity: bytes) -> bytes:
        with self._failing():
            with self._environment.begin() as transaction:
                claimed = transaction.get(_IDENTITY, db=self._about)
            if claimed is None and not self._readonly:
                with self._writing() as writing:
                    writing.put(_IDENTITY, identity, db=self._about, overwrite=False)
                    claimed = writing.get(_IDENTITY, db=self._about)
            return identity if claimed is None else bytes(claimed)

    def put(self, values: Mapping[bytes, Value]) -> int:
        given = check_values(values, self.max_bytes)
        kept = last_that_fit(given, self.max_bytes)
        dropped = len(given) - len(kept)
        with self._failing(), self._writing() as transaction:
            num_bytes = self._num_bytes(transaction)
            for key in given:
                num_bytes -= self._remove(transaction, key) or 0
            needed = sum(len(key) + value.nbytes for key, value in kept.items())
            while self.max_bytes is not None and num_bytes + needed > self.max_bytes:
                num_bytes -= self._remove(transaction, self._least_recently_used(transaction)) or 0
                dropped += 1
            number = self._next_use(transaction)
            for at, (key, value) in enumerate(kept.items()):
                transaction.put(key, value, db=self._values)
                transaction.put(key, _number(number + at), db=self._last_use)
                transaction.put(_number(number + at), key, db=self._users, append=True)
            transaction.put(_NUM_BYTES, _number(num_bytes + needed), db=self._about)
        return dropped

    @contextlib.contextmanager
    def reading(self, keys: Sequence[bytes]) -> Iterator[list[memoryview | None]]:
        check_keys(keys)
        with self._failing():
            transaction = self._environment.begin(buffers=True)
        views: list[memoryview | None] = []
        try:
            with self._failing():
                views += (transaction.get(key, db=self._values) for key in keys)
            if self.max_bytes is not None and not self._readonly:
                self._reads.add(keys)
            yield views
        finally:
            for view in views:
                with contextlib.suppress(BufferError):  # somebody looks at it still
                    if view is not None:
                        view.release()
            transaction.abort()

    def delete(self, keys: Sequence[bytes]) -> int:
        check_keys(keys)
        with self._failing(), self._writing() as transaction:
            removed = [self._remove(transaction, key) for key in keys]
            sizes = [size for size in removed if size is not None]
            transaction.put(_NUM_BYTES, _number(self._num_bytes(transaction) - sum(sizes)), db=self._about)
        return len(sizes)

    def __iter__(self) -> Iterator[bytes]:
        with self._failing(), self._environment.begin() as transaction:
            for key in transaction.cursor(db=self._values).iternext(values=False):
                yield bytes(key)

    def __len__(self) -> int:
        with self._failing(), self._environment.begin() as transaction:
            return int(transaction.stat(self._values)["entries"])

    @property
    def num_bytes(self) -> int:
        """Bytes of all keys and values."""
        with self._failing(), self._environment.begin() as transaction:
            return self._num_bytes(transaction)

    def close(self) -> None:
        self._environment.close()

    # ------------------------------------------------------------------ the order of uses

    @contextlib.contextmanager
    def _writing(self) -> Iterator[lmdb.Transaction[bytes]]:
        """A transaction that first writes down what was read."""
        with self._environment.begin(write=True) as transaction:
            number = self._next_use(transaction)
            for key in self._reads.take():
                last = transaction.get(key, db=self._last_use)
                if last is not None:
                    transaction.delete(last, db=self._users)
                    transaction.put(key, _number(number), db=self._last_use)
                    transaction.put(_number(number), key, db=self._users, append=True)
                    number += 1
            yield transaction

    def _next_use(self, transaction: Any) -> int:
        """Uses are numbered, not timed: clocks of several processes need not agree."""
        with transaction.cursor(db=self._users) as cursor:
            return int.from_bytes(cursor.key(), "big") + 1 if cursor.last() else 0

    def _least_recently_used(self, transaction: Any) -> bytes:
        with transaction.cursor(db=self._users) as cursor:
            if not cursor.first():
                raise StoreError(f"{self.path}: expected a user for every value, got fewer: the file is torn")
            return bytes(cursor.value())

    def _remove(self, transaction: Any, key: bytes) -> int | None:
        """Remove a user; returns its bytes, None where there was none."""
        last = transaction.pop(key, db=self._last_use)
        if last is None:
            return None
        transaction.delete(last, db=self._users)
        value = transaction.pop(key, db=self._values)
        return len(key) + len(value)

    def _num_bytes(self, transaction: Any) -> int:
        return int.from_bytes(transaction.get(_NUM_BYTES, db=self._about), "big")


def _number(number: int) -> bytes:
    """In an order that lmdb has too."""
    return number.to_bytes(8, "big")
