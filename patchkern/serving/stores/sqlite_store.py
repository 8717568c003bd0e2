# SPDX-License-Identifier: Apache-2.0
"""Compressed users in a file of this machine, with nothing to install: SQLite, which comes with Python."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from threading import RLock
from typing import Any

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

_APPLICATION = 0x706B7573  # "pkus"
_WAIT = 60.0  # seconds for another process to finish its write
# A use is a row of its own: to change a column beside a value would write the value again.
_TABLES = """
CREATE TABLE users (key BLOB PRIMARY KEY, value BLOB NOT NULL);
CREATE TABLE uses (key BLOB PRIMARY KEY, number INTEGER NOT NULL UNIQUE, bytes INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE about (name TEXT PRIMARY KEY, content BLOB NOT NULL) WITHOUT ROWID;
INSERT INTO about VALUES ('bytes', 0);
"""


class SqliteStore:
    """A `UserStore` in one file: one process writes at a time, others read beside it, without waiting.

    A write is on the disk when `put` returns. The file never shrinks, but is used again where something was deleted.
    What is read is a copy. Not for network file systems. Threads may share a store, in turns; a process that was forked
    needs one of its own.

    With ``max_bytes`` the least recently used users make room. Reading writes nothing: reads of this object count as
    uses from its next write on, those of others do not count.

    Args:
        path: of the file, made where there is none; beside it lie others of its name with ``-wal`` and ``-shm``.
        max_bytes: of keys and values. None: no limit.

    Raises:
        StoreError: there is no store in the file, or one of another version, or a torn one; naming the file.
        TypeError, ValueError: naming the argument, what was expected and what came.
    """

    def __init__(self, path: str | PathLike[str], max_bytes: int | None = None) -> None:
        check_max_bytes(max_bytes)
        self.path = Path(path)
        self.max_bytes = max_bytes
        self._lock = RLock()
        self._reads = RecentReads()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._failing():
            self._connection = sqlite3.connect(
                os.fspath(self.path), timeout=_WAIT, isolation_level=None, check_same_thread=False
            )
        try:
            with self._failing():
                self._open()
        except BaseException:
            self._connection.close()
            raise

    def _open(self) -> None:
        if self._one("SELECT count(*) FROM sqlite_master") == 0 and self._one("PRAGMA application_id") == 0:
            with self._transaction("EXCLUSIVE"):
                if self._one("SELECT count(*) FROM sqlite_master") == 0:  # else another process was first
                    for statement in filter(str.strip, _TABLES.split(";")):
                        self._connection.execute(statement)
                    self._connection.execute(f"PRAGMA application_id = {_APPLICATION}")
                    self._connection.execute(f"PRAGMA user_version = {FORMAT_VERSION}")
        if self._one("PRAGMA application_id") != _APPLICATION:
            raise StoreError(f"{self.path}: expected a store of compressed users, got another SQLite file")
        if (version := self._one("PRAGMA user_version")) != FORMAT_VERSION:
            raise StoreError(f"{self.path}: expected a store of format version {FORMAT_VERSION}, got {version}")
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.execute("PRAGMA synchronous = FULL")

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        """Name the file in what SQLite raises."""
        try:
            yield
        except sqlite3.OperationalError as error:
            if "full" in str(error):
                raise StoreFullError(f"{self.path}: no room; nothing was stored of this call: {error}") from error
            raise StoreError(f"{self.path}: {error}") from error
        except sqlite3.ProgrammingError as error:  # such as a closed one
            raise StoreError(f"{self.path}: {error}") from error
        except sqlite3.DatabaseError as error:
            raise StoreError(
                f"{self.path}: expected a store of compressed users, got a torn file or another kind: {error}"
            ) from error

    # ------------------------------------------------------------------ the store

    def claim(self, identity: bytes) -> bytes:
        with self._failing(), self._transaction():
            self._connection.execute("INSERT OR IGNORE INTO about VALUES ('identity', ?)", (identity,))
            return bytes(self._one("SELECT content FROM about WHERE name = 'identity'"))

    def put(self, values: Mapping[bytes, Value]) -> int:
        given = check_values(values, self.max_bytes)
        kept = last_that_fit(given, self.max_bytes)
        dropped = len(given) - len(kept)
        with self._failing(), self._transaction():
            self._write_down_reads()
            num_bytes = self._num_bytes()
            for key in given:
                num_bytes -= self._remove(key) or 0
            needed = sum(len(key) + value.nbytes for key, value in kept.items())
            while self.max_bytes is not None and num_bytes + needed > self.max_bytes:
                num_bytes -= self._remove(self._one("SELECT key FROM uses ORDER BY number LIMIT 1")) or 0
                dropped += 1
            number = self._next_use()
            for at, (key, value) in enumerate(kept.items()):
                self._connection.execute("INSERT INTO users VALUES (?, ?)", (key, value))
                self._connection.execute(
                    "INSERT INTO uses VALUES (?, ?, ?)", (key, number + at, len(key) + value.nbytes)
                )
            self._set_num_bytes(num_bytes + needed)
        return dropped

    @contextlib.contextmanager
    def reading(self, keys: Sequence[bytes]) -> Iterator[list[memoryview | None]]:
        check_keys(keys)
        with self._failing(), self._transaction("DEFERRED"):
            rows = [
                self._connection.execute("SELECT value FROM users WHERE key = ?", (key,)).fetchone() for key in keys
            ]
            if self.max_bytes is not None:
                self._reads.add(keys)
        yield [None if row is None else memoryview(row[0]) for row in rows]

    def delete(self, keys: Sequence[bytes]) -> int:
        check_keys(keys)
        with self._failing(), self._transaction():
            sizes = [size for size in map(self._remove, keys) if size is not None]
            self._set_num_bytes(self._num_bytes() - sum(sizes))
        return len(sizes)

    def __iter__(self) -> Iterator[bytes]:
        with self._failing(), self._lock:
            rows = self._connection.execute("SELECT key FROM uses").fetchall()
        return (bytes(key) for (key,) in rows)

    def __len__(self) -> int:
        with self._failing(), self._lock:
            return int(self._one("SELECT count(*) FROM uses"))

    @property
    def num_bytes(self) -> int:
        """Bytes of all keys and values."""
        with self._failing(), self._lock:
            return self._num_bytes()

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    # ------------------------------------------------------------------ inside a transaction

    @contextlib.contextmanager
    def _transaction(self, kind: str = "IMMEDIATE") -> Iterator[None]:
        with self._lock:
            self._connection.execute(f"BEGIN {kind}")
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def _one(self, statement: str) -> Any:
        """The first column of the first row; None without one."""
        row = self._connection.execute(statement).fetchone()
        return None if row is None else row[0]

    def _write_down_reads(self) -> None:
        number = self._next_use()
        for at, key in enumerate(self._reads.take()):
            self._connection.execute("UPDATE uses SET number = ? WHERE key = ?", (number + at, key))

    def _next_use(self) -> int:
        """Uses are numbered, not timed: clocks of several processes need not agree."""
        return int(self._one("SELECT coalesce(max(number) + 1, 0) FROM uses"))

    def _remove(self, key: bytes) -> int | None:
        """Remove a user; returns its bytes, None where there was none."""
        row = self._connection.execute("SELECT bytes FROM uses WHERE key = ?", (key,)).fetchone()
        if row is None:
            return None
        self._connection.execute("DELETE FROM uses WHERE key = ?", (key,))
        self._connection.execute("DELETE FROM users WHERE key = ?", (key,))
        return int(row[0])

    def _num_bytes(self) -> int:
        return int(self._one("SELECT content FROM about WHERE name = 'bytes'"))

    def _set_num_bytes(self, num_bytes: int) -> None:
        self._connection.execute("UPDATE about SET content = ? WHERE name = 'bytes'", (num_bytes,))


def forget_log(path: Path) -> None:
    """Remove what a process that was killed has left beside a file that is about to be replaced."""
    for ending in ("-wal", "-shm"):
        path.with_name(path.name + ending).unlink(missing_ok=True)
