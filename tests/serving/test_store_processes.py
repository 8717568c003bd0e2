# SPDX-License-Identifier: Apache-2.0
"""Stores that several processes use at once, and processes that are killed while they write."""

from __future__ import annotations

import os
import signal
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from store_cases import Opener, RedisServer, ended, in_child, read, rest_of, with_processes

from patchkern.serving.stores import (
    LmdbStore,
    RedisStore,
    StoreError,
)

with_files = pytest.mark.parametrize("kind", ["lmdb", "sqlite"], indirect=True)


@with_processes
def test_two_processes_write(open_one: Opener) -> None:
    """Neither waits for ever, and nothing of either is lost."""

    def writer(name: bytes) -> Callable[[Callable[[bytes], None]], None]:
        def write(say: Callable[[bytes], None]) -> None:
            store = open_one()
            for number in range(20):
                store.put({name + str(number).encode(): name * 1000, b"both": name * 5000})
                say(store.claim(name))

        return write

    children = [in_child(writer(name)) for name in (b"x", b"y")]
    claims = {ended(*child) for child in children}
    assert claims in ({20 * b"x"}, {20 * b"y"})
    store = open_one()
    assert len(store) == 41 and read(store, b"x7", b"y19") == [b"x" * 1000, b"y" * 1000]
    assert read(store, b"both")[0] in (b"x" * 5000, b"y" * 5000)


def generation(number: int, size: int = 30_000) -> dict[bytes, bytes]:
    """Three users whose values are of one write: its number, then bytes that follow from it."""
    value = struct.pack("<Q", number) + np.random.default_rng(number).bytes(size + number % 4096)
    return dict.fromkeys((b"ada", b"bob", b"eve"), value)


def written(store: Any) -> int:
    """The number of the write that all three users are of."""
    with store.reading([b"ada", b"bob", b"eve"]) as views:
        ada, bob, eve = (None if view is None else bytes(view) for view in views)
    assert ada is not None and ada == bob == eve
    (number,) = struct.unpack_from("<Q", ada)
    assert ada == generation(number)[b"ada"]
    return int(number)


@with_processes
def test_readers_beside_a_writer(open_one: Opener) -> None:
    """Each sees all of a write or nothing of it, and never an older one than before."""

    def write(say: Callable[[bytes], None]) -> None:
        store = open_one()
        for number in range(1, 60):
            store.put(generation(number))
            say(b".")

    def watch(say: Callable[[bytes], None]) -> None:
        store, last = open_one(), 0
        while last < 59:
            number = written(store)
            assert number >= last
            last = number

    writer, said = in_child(write)
    assert os.read(said, 1) == b"."
    readers = [in_child(watch) for _ in range(2)]
    ended(writer, said)
    for reader in readers:
        ended(*reader)


def kill_during_writes(open_one: Opener, kills: int, budget: dict[str, int]) -> None:
    last = 0
    for kill in range(kills):

        def write(say: Callable[[bytes], None], first: int = last + 1) -> None:
            store = open_one(**budget)
            for number in range(first, first + 100_000):
                store.put(generation(number))
                say(b".")

        child, said = in_child(write)
        assert os.read(said, 1) == b"."
        time.sleep(0.01 + 0.037 * kill)
        os.kill(child, signal.SIGKILL)
        acknowledged = last + 1 + len(rest_of(said))
        os.waitpid(child, 0)
        store = open_one(**budget)
        last = written(store)
        assert acknowledged <= last <= acknowledged + 1
        store.close()


@with_processes
def test_what_was_acknowledged_survives_a_kill(open_one: Opener) -> None:
    kill_during_writes(open_one, 2, {})


@pytest.mark.slow
@with_processes
def test_what_was_acknowledged_survives_ten_kills(open_one: Opener) -> None:
    kill_during_writes(open_one, 10, {})


@pytest.mark.slow
@with_files
def test_a_budget_survives_ten_kills(open_one: Opener) -> None:
    kill_during_writes(open_one, 10, {"max_bytes": 200_000})


@pytest.mark.slow
def test_what_a_server_acknowledged_survives_its_kill(tmp_path: Path) -> None:
    """Where it writes down every command before it answers, as its configuration says."""
    server, last = RedisServer(tmp_path, "--appendonly", "yes", "--appendfsync", "always"), 0
    for kill in range(5):
        server.start()

        def write(say: Callable[[bytes], None], first: int = last + 1) -> None:
            store = loaded(server.url)
            with pytest.raises(StoreError, match=r"Redis server at 127\.0\.0\.1"):
                for number in range(first, first + 100_000):
                    store.put(generation(number))
                    say(b".")

        child, said = in_child(write)
        assert os.read(said, 1) == b"."
        time.sleep(0.01 + 0.037 * kill)
        server.end(signal.SIGKILL)
        acknowledged = last + 1 + len(ended(child, said))
        server.start()
        last = written(loaded(server.url))
        assert acknowledged <= last <= acknowledged + 1
        server.end()


def loaded(url: str) -> RedisStore:
    """A store of a server that may still be reading its file."""
    for _ in range(100):
        try:
            return RedisStore(url)
        except StoreError as error:
            if "loading" not in str(error):
                raise
            time.sleep(0.05)
    raise AssertionError("the server is still loading")


def test_readers_of_lmdb_see_one_moment(tmp_path: Path) -> None:
    """Views stay what they were while the file is written, and a process that only reads writes nothing."""
    pytest.importorskip("lmdb", reason="the package lmdb is not installed")
    path = tmp_path / "users.lmdb"
    said, saying = os.pipe()

    def watch(say: Callable[[bytes], None]) -> None:
        store = LmdbStore(path, readonly=True)
        with store.reading([b"ada"]) as (view,):
            assert view is not None
            before = bytes(view)
            say(b"r")
            os.read(said, 1)
            assert bytes(view) == before
        assert read(store, b"ada") == [bytes(100_000)]
        with pytest.raises(StoreError, match="expected a store open for writing, got one with readonly=True"):
            store.put({b"ada": b""})
        say(store.claim(b"another"))

    with pytest.raises(StoreError, match=r"users\.lmdb: expected a store of compressed users, found no such file"):
        LmdbStore(path, readonly=True)

    def create(say: Callable[[bytes], None]) -> None:
        store = LmdbStore(path)
        store.claim(b"model")
        store.put({b"ada": np.random.default_rng(0).bytes(100_000)})

    ended(*in_child(create))
    reader, words = in_child(watch)
    assert os.read(words, 1) == b"r"
    store = LmdbStore(path)
    for number in range(20):
        store.put({b"ada": bytes(100_000), str(number).encode(): b""})
    os.write(saying, b".")
    assert ended(reader, words) == b"model"
    store.close()
