# SPDX-License-Identifier: Apache-2.0
"""What every store of compressed users does in one process: whole values, budgets, wrong arguments."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from store_cases import Opener, read

from patchkern.serving.stores import (
    LmdbStore,
    MemoryStore,
    StoreError,
)

with_files = pytest.mark.parametrize("kind", ["lmdb", "sqlite"], indirect=True)
with_budgets = pytest.mark.parametrize("kind", ["memory", "lmdb", "sqlite"], indirect=True)


# ------------------------------------------------------------------ one process


def test_what_is_put_is_read(open_one: Opener) -> None:
    store = open_one()
    big = np.random.default_rng(0).bytes(3_000_001)
    assert len(store) == 0 and list(store) == [] and read(store, b"ada") == [None]
    values = {
        b"ada": b"1",
        b"empty": b"",
        b"big": big,
        bytes(range(256)): bytearray(b"2"),
        b"k" * 480: memoryview(b"3"),
    }
    assert store.put(values) == 0
    assert read(store, b"big", b"nobody", b"ada", b"empty", b"ada") == [big, None, b"1", b"", b"1"]
    assert read(store, *values) == [bytes(value) for value in values.values()]
    assert len(store) == 5 and set(store) == set(values)
    store.put({b"ada": b"another", b"new": b"4"})
    assert read(store, b"ada", b"new", b"big") == [b"another", b"4", big] and len(store) == 6
    assert store.delete([b"ada", b"nobody", b"big", b"ada"]) == 2
    assert read(store, b"ada", b"big", b"new") == [None, None, b"4"] and len(store) == 4
    assert store.put({}) == 0 and store.delete([]) == 0 and read(store) == []


def test_many_keys(open_one: Opener) -> None:
    store = open_one()
    values = {f"user {number}".encode(): str(number).encode() * (number % 7) for number in range(3000)}
    store.put(values)
    assert len(store) == 3000 and set(store) == set(values)
    assert read(store, *values) == list(values.values())
    assert store.delete(list(values)[::2]) == 1500 and set(store) == set(list(values)[1::2])


def test_a_store_is_claimed_once(open_one: Opener) -> None:
    store = open_one()
    assert store.claim(b"one model") == b"one model" and store.claim(b"another") == b"one model"


@pytest.mark.parametrize(
    ("keys", "error", "message"),
    [
        (b"ada", TypeError, "keys: expected a sequence of bytes, got bytes"),
        (["ada"], TypeError, "keys: expected bytes, got 'ada'"),
        ([b""], ValueError, "keys: expected 1 to 480 bytes, got 0"),
        ([b"k" * 481], ValueError, "keys: expected 1 to 480 bytes, got 481"),
    ],
)
def test_wrong_keys(open_one: Opener, keys: Any, error: type[Exception], message: str) -> None:
    store = open_one()
    with pytest.raises(error, match=message), store.reading(keys):
        pass
    with pytest.raises(error, match=message):
        store.delete(keys)
    if isinstance(keys, list):
        with pytest.raises(error, match=message):
            store.put({b"before": b"", keys[0]: b""})
    assert len(store) == 0


def test_wrong_values(open_one: Opener) -> None:
    store = open_one()
    with pytest.raises(TypeError, match=r"values\[b'ada'\]: expected bytes, got str"):
        store.put({b"before": b"", b"ada": "text"})
    with pytest.raises(ValueError, match=r"values\[b'ada'\]: expected bytes without gaps, got strides \(2,\)"):
        store.put({b"before": b"", b"ada": memoryview(b"1234")[::2]})
    with pytest.raises(TypeError, match="values: expected a mapping of keys to bytes, got list"):
        store.put([(b"ada", b"")])
    assert len(store) == 0


@with_files
def test_what_is_closed_is_there_when_opened_again(open_one: Opener) -> None:
    store = open_one()
    store.claim(b"a model")
    store.put({b"ada": b"1", b"bob": b"2"})
    store.close()
    store.close()
    with pytest.raises(StoreError):
        store.put({b"ada": b"3"})
    store = open_one(max_bytes=100)
    assert store.claim(b"another") == b"a model" and read(store, b"ada", b"bob") == [b"1", b"2"]
    assert store.num_bytes == 8


def test_views_of_lmdb_are_the_file_itself(tmp_path: Path) -> None:
    pytest.importorskip("lmdb", reason="the package lmdb is not installed")
    store = LmdbStore(tmp_path / "users.lmdb")
    store.put({b"ada": bytes(100_000)})
    with store.reading([b"ada"]) as first, store.reading([b"ada"]) as second:
        addresses = [np.frombuffer(views[0], np.uint8).ctypes.data for views in (first, second)]
        view = first[0]
        assert view is not None and view.readonly and addresses[0] == addresses[1] and addresses[0] % 16 == 0
    with pytest.raises(ValueError, match="released"):
        view[0]
    store.close()


def test_threads_share_a_store(open_one: Opener) -> None:
    store = open_one()

    def work(number: int) -> list[list[bytes | None]]:
        users = [f"{number} {turn}".encode() for turn in range(10)]
        for user in users:
            store.put({user: user * 1000, b"all": user})
        return [read(store, user) for user in users]

    with ThreadPoolExecutor(4) as threads:
        for number, found in enumerate(threads.map(work, range(4))):
            assert found == [[f"{number} {turn}".encode() * 1000] for turn in range(10)]
    assert len(store) == 41 and store.delete(list(store)) == 41


# ------------------------------------------------------------------ budgets


@with_budgets
def test_the_least_recently_used_make_room(open_one: Opener) -> None:
    store = open_one(max_bytes=3 * 101)
    users = [b"a", b"b", b"c"]
    assert store.put({user: bytes(100) for user in users}) == 0 and store.num_bytes == 303
    read(store, b"a")
    assert store.put({b"d": bytes(100)}) == 1  # b
    assert set(store) == {b"a", b"c", b"d"}
    assert store.put({b"c": bytes(90)}) == 0 and store.num_bytes == 293  # now the latest
    assert store.put({b"e": bytes(100), b"f": bytes(10)}) == 2  # a and d
    assert set(store) == {b"c", b"e", b"f"} and store.num_bytes == 91 + 101 + 11
    assert store.put({user: bytes(100) for user in (b"1", b"2", b"3", b"4", b"c")}) == 4  # e, f, 1 and 2
    assert set(store) == {b"3", b"4", b"c"} and store.num_bytes == 303
    assert store.delete([b"4"]) == 1 and store.num_bytes == 202


@with_budgets
def test_a_budget_below_one_value_is_an_error(open_one: Opener) -> None:
    store = open_one(max_bytes=100)
    store.put({b"a": bytes(50)})
    with pytest.raises(ValueError, match=r"values\[b'b'\]: expected what fits in max_bytes=100 .* got 100 \+ 1 bytes"):
        store.put({b"a": bytes(1), b"b": bytes(100)})
    assert read(store, b"a", b"b") == [bytes(50), None]
    store.put({b"b": bytes(99)})
    assert read(store, b"a", b"b") == [None, bytes(99)]
    for wrong, error in ((0, ValueError), (True, TypeError), ("1GiB", TypeError)):
        with pytest.raises(error, match="max_bytes: expected an integer"):
            type(store)(*(() if isinstance(store, MemoryStore) else ("never",)), max_bytes=wrong)


@with_files
def test_a_file_does_not_grow_with_what_was_deleted(open_one: Opener) -> None:
    budget = 1 << 20
    store = open_one(max_bytes=budget)
    random = np.random.default_rng(0)
    for number in range(250):  # ten times the budget, of values that differ in size
        user = f"{random.integers(1000)}".encode()
        store.put({user: random.bytes(int(random.integers(1, 80_000)))})
        assert store.num_bytes <= budget, number
    files = sum(path.stat().st_blocks * 512 for path in store.path.parent.iterdir())
    kept = {user: read(store, user)[0] for user in store}
    assert sum(len(user) + len(value or b"") for user, value in kept.items()) == store.num_bytes > budget - 80_000
    assert files < 7 * budget  # SQLite's log alone has four
