# SPDX-License-Identifier: Apache-2.0
"""A Redis server of the tests' own, and every kind of store in turn."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from store_cases import Opener, RedisServer

from patchkern.serving.stores import LmdbStore, MemoryStore, RedisStore, SqliteStore

KINDS = ["memory", "lmdb", "sqlite", "redis"]


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server on the loopback, which ends with the tests."""
    server = RedisServer(tmp_path_factory.mktemp("redis"), "--appendonly", "no")
    server.start()
    try:
        yield server.url
    finally:
        server.end()


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def open_one(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Opener]:
    """Opens the test's store of this kind, also again and in another process; closed at the end."""
    opened: list[Any] = []
    if kind == "lmdb":
        pytest.importorskip("lmdb", reason="the package lmdb is not installed")
    url = request.getfixturevalue("redis_url") if kind == "redis" else ""
    prefix = f"test*{uuid.uuid4().hex}"

    def open_one(**options: Any) -> Any:
        if kind == "memory":
            store: Any = MemoryStore(**options)
        elif kind == "lmdb":
            store = LmdbStore(tmp_path / "users.lmdb", **options)
        elif kind == "sqlite":
            store = SqliteStore(tmp_path / "users.sqlite", **options)
        else:
            store = RedisStore(url, prefix=prefix, **options)
        opened.append(store)
        return store

    yield open_one
    for store in opened:
        store.close()
