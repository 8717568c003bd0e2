# SPDX-License-Identifier: Apache-2.0
"""Stores that cannot be opened or are full: files of another kind or version, torn ones, servers, missing packages."""

from __future__ import annotations

import shutil
import sqlite3
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from store_cases import read

from patchkern.serving.stores import (
    LmdbStore,
    MemoryStore,
    RedisStore,
    SqliteStore,
    StoreError,
    StoreFullError,
    open_store,
)


def opened(kind: str, path: Path, **options: Any) -> Any:
    if kind == "lmdb":
        pytest.importorskip("lmdb", reason="the package lmdb is not installed")
        return LmdbStore(path, **options)
    return SqliteStore(path)


@pytest.mark.parametrize("kind", ["lmdb", "sqlite"])
def test_files_of_another_kind_are_refused_and_left_alone(kind: str, tmp_path: Path) -> None:
    import_lmdb = pytest.importorskip("lmdb", reason="the package lmdb is not installed")
    texts, other_lmdb, other_sqlite = tmp_path / "notes.txt", tmp_path / "other.lmdb", tmp_path / "other.db"
    texts.write_bytes(b"These are notes, not users. " * 500)
    with import_lmdb.open(str(other_lmdb), subdir=False) as environment, environment.begin(write=True) as transaction:
        transaction.put(b"key", b"value")
    with sqlite3.connect(other_sqlite) as connection:
        connection.execute("CREATE TABLE notes (text)")
    connection.close()
    for path in (texts, other_lmdb, other_sqlite):
        before = path.read_bytes()
        with pytest.raises(StoreError, match=f"{path.name}: expected a store of compressed users, got a"):
            opened(kind, path)
        assert path.read_bytes() == before
    with pytest.raises((StoreError, OSError), match=tmp_path.name):
        opened(kind, tmp_path)


@pytest.mark.parametrize("kind", ["lmdb", "sqlite"])
def test_another_format_version_is_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "users"
    opened(kind, path).close()
    if kind == "lmdb":
        lmdb = pytest.importorskip("lmdb")
        with lmdb.open(str(path), subdir=False, max_dbs=4) as environment, environment.begin(write=True) as transaction:
            transaction.put(b"format", b"patchkern users 7", db=environment.open_db(b"about", transaction))
    else:
        with sqlite3.connect(path) as connection:
            connection.execute("PRAGMA user_version = 7")
        connection.close()
    with pytest.raises(StoreError, match="users: expected a store of format version 1, got 7"):
        opened(kind, path)


@pytest.mark.parametrize("kind", ["lmdb", "sqlite"])
def test_a_file_cut_short_is_an_error_not_a_fault(kind: str, tmp_path: Path) -> None:
    """At whatever length: it opens and says of its values what is torn, or it does not open."""
    path, users = tmp_path / "users", [str(number).encode() for number in range(40)]
    store = opened(kind, path)
    store.put({user: np.random.default_rng(0).bytes(100_000) for user in users})
    store.close()
    whole, torn = path.read_bytes(), 0
    for share in (0.001, 0.01, 0.5, 0.9, 0.999):
        cut = tmp_path / f"cut {share}"
        cut.write_bytes(whole[: int(share * len(whole))])
        try:
            store = opened(kind, cut)
        except StoreError as error:
            assert cut.name in str(error)
            torn += 1
            continue
        try:
            torn += read(store, *users) != 40 * [np.random.default_rng(0).bytes(100_000)]
        except StoreError as error:
            assert cut.name in str(error)
            torn += 1
        store.close()
    assert torn == 5


def test_a_full_map_loses_nothing(tmp_path: Path) -> None:
    pytest.importorskip("lmdb", reason="the package lmdb is not installed")
    store = LmdbStore(tmp_path / "users.lmdb", map_size=1 << 20)
    store.put({b"ada": bytes(300_000)})
    with pytest.raises(StoreFullError, match="no room in map_size=1048576 bytes; nothing was stored of this call"):
        store.put({b"bob": b"1", b"eve": bytes(900_000)})
    assert read(store, b"ada", b"bob", b"eve") == [bytes(300_000), None, None] and store.num_bytes == 300_003
    store.put({b"bob": b"2"})
    store.close()
    store = LmdbStore(tmp_path / "users.lmdb", map_size=1 << 22)
    store.put({b"eve": bytes(900_000)})
    assert read(store, b"ada", b"bob", b"eve") == [bytes(300_000), b"2", bytes(900_000)]
    with pytest.raises(StoreError, match="already open in this process"):
        LmdbStore(tmp_path / "users.lmdb")
    store.close()


def test_a_full_disk_of_sqlite_loses_nothing(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "users.sqlite")
    store.put({b"ada": bytes(300_000)})
    store._connection.execute("PRAGMA max_page_count = 150")
    with pytest.raises(StoreFullError, match=r"users\.sqlite: no room; nothing was stored of this call"):
        store.put({b"bob": b"1", b"eve": bytes(900_000)})
    assert read(store, b"ada", b"bob", b"eve") == [bytes(300_000), None, None] and store.num_bytes == 300_003
    store.close()


def test_a_full_server_loses_nothing(redis_url: str) -> None:
    store = RedisStore(redis_url, prefix="full")
    store.put({b"ada": b"1"})
    try:
        store._client.config_set("maxmemory", 1)
        with pytest.raises(StoreFullError, match=r"127\.0\.0\.1:\d+, prefix 'full': no room; nothing was stored"):
            store.put({b"ada": b"2", b"eve": bytes(1000)})
        assert read(store, b"ada", b"eve") == [b"1", None]
    finally:
        store._client.config_set("maxmemory", 0)


def test_a_server_that_is_not_there_or_is_of_another_version(redis_url: str) -> None:
    with pytest.raises(StoreError, match=r"Redis server at 127\.0\.0\.1:1, prefix 'patchkern': .*refused"):
        RedisStore("redis://:secret@127.0.0.1:1/0")
    with pytest.raises(ValueError, match="url: expected one such as redis://host:6379/0, got 'http://host'"):
        RedisStore("http://host")
    with pytest.raises(TypeError, match="url: expected a string, got int"):
        RedisStore(6379)  # type: ignore[arg-type]
    store = RedisStore(redis_url, prefix="old")
    store._client.hset("old:about", "format", "7")
    with pytest.raises(StoreError, match="expected a store of format version 1, got b'7'"):
        RedisStore(redis_url, prefix="old")


def test_missing_packages_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lmdb", None)
    monkeypatch.setitem(sys.modules, "redis", None)
    with pytest.raises(ImportError, match=r"needs lmdb \(pip install 'patchkern\[states\]'\); SqliteStore"):
        LmdbStore(tmp_path / "users.lmdb")
    with pytest.raises(ImportError, match=r"needs redis \(pip install 'patchkern\[redis\]'\)"):
        RedisStore("redis://localhost")
    assert list(tmp_path.iterdir()) == []


def test_which_store_is_meant(tmp_path: Path, redis_url: str) -> None:
    pytest.importorskip("lmdb", reason="the package lmdb is not installed")
    assert isinstance(memory := open_store(None), MemoryStore) and open_store(memory) is memory
    for where, kind in (
        (tmp_path / "deep" / "users", LmdbStore),
        (str(tmp_path / "users.lmdb"), LmdbStore),
        (tmp_path / "users.sqlite", SqliteStore),
        (redis_url, RedisStore),
    ):
        store = open_store(where)
        assert type(store) is kind
        store.close()
    with pytest.raises(TypeError, match=r"store: expected a path, .* or a store, got dict, which has no claim"):
        open_store({})  # type: ignore[arg-type]
    shutil.rmtree(tmp_path / "deep")
