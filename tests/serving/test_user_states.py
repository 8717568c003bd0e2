# SPDX-License-Identifier: Apache-2.0
"""Compressed users: kept, gone on from, compressed anew, refused."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from store_cases import Opener, in_child, rest_of, with_processes

import patchkern as pk
from patchkern.batch.segments import cuts
from patchkern.serving.compressor import Known, Tensors
from patchkern.serving.records import unpack
from patchkern.serving.stores import MemoryStore, SqliteStore, StoreError
from patchkern.serving.user_states import Updated, UserStates

pytest.importorskip("transformers", reason="transformers is not installed")
from model_cases import CATALOG, PROMPT, TITLES, tiny

KEEP, BLOCK, ROWS = 2, 3, 2


class Sums:
    """Compresses a past to sums of its items' embeddings: exactly, and as one sees at once."""

    def __init__(self, model: pk.PatchedCausalLM, parts: str) -> None:
        self.model, self.extends, self.block = model, parts == "blocks", BLOCK
        self.policy = {"name": "Sums", "parts": parts}
        self.read: list[int] = []  # items of every call

    def cuts(self, lengths: np.ndarray) -> np.ndarray:
        return cuts(lengths, KEEP, BLOCK)

    def like(self, old: int) -> Tensors:
        rows = old // BLOCK if self.extends else 1
        return torch.empty(rows, 8, device="meta"), torch.empty(1, device="meta")

    def compress(self, histories: pk.Histories, known: Sequence[Known | None]) -> list[Tensors]:
        old = histories.between(
            np.arange(len(histories)), np.zeros(len(histories), np.int64), self.cuts(histories.lengths)
        )
        index = CATALOG.index_of(old.items, "old")
        weight = self.model.hf_model.get_input_embeddings().weight[:, :8]
        vectors = torch.stack([weight[title].sum(dim=0) for title in TITLES])[index]
        found = []
        for past, before in zip(vectors.split(old.lengths.tolist()), known, strict=True):
            new = past if before is None else past[before.cut :]
            self.read.append(len(new))
            rows = new.view(-1, BLOCK, 8).sum(dim=1) if self.extends else new.sum(dim=0)[None]
            if before is not None:
                rows = torch.cat([before.tensors[0], rows])
            found.append((rows, rows.sum()[None]))
        return found


@pytest.fixture(params=["one", "blocks"])
def parts(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch, parts: str) -> Callable[..., UserStates]:
    model = pk.PatchedCausalLM(tiny("llama").eval(), CATALOG, PROMPT, pk.ItemPatches(0, None))

    def make(store: Any = None, model: pk.PatchedCausalLM = model, parts: str = parts) -> UserStates:
        monkeypatch.setattr("patchkern.serving.user_states.compressor_of", lambda model, policy: Sums(model, parts))
        return UserStates(model, None, store)

    return make


def kept(states: UserStates, names: list[Any], histories: list[list[int]]) -> list[Tensors | None]:
    with states.reading(names, pk.Histories.coerce(histories)) as found:
        return [None if tensors is None else tuple(tensor.clone() for tensor in tensors) for tensors in found]


def read_items(states: UserStates) -> list[int]:
    compressor: Any = states._compressor
    read, compressor.read = compressor.read, []
    return read


def is_right(states: UserStates, names: list[Any], histories: list[list[int]]) -> bool:
    """Is what is kept that which all old items are compressed to?"""
    fresh = Sums(states.model, states._compressor.policy["parts"])
    for found, history in zip(kept(states, names, histories), histories, strict=True):
        if len(history) < KEEP + BLOCK:
            assert found is None
            continue
        ((rows, total),) = fresh.compress(pk.Histories.coerce([history]), [None])
        if found is None or not torch.equal(found[0], rows) or not torch.allclose(found[1], total):
            return False
    return True


PASTS = np.random.default_rng(0).integers(0, 40, (5, 30)).tolist()


def test_one_event_after_the_other(make: Callable[..., UserStates], parts: str) -> None:
    states = make()
    names = ["ada", 7, b"bob"]
    for length in range(20):
        users = [PASTS[0][:length], PASTS[1][: 2 * length // 3], PASTS[2][:1]]
        updated = states.update(names, users)
        assert updated.recent + updated.unchanged + updated.extended + updated.compressed == 3
        assert is_right(states, names, users) and updated.deleted == 0
        assert states.update(names, users) == Updated(updated.recent, 3 - updated.recent, 0, 0, 0)
    assert len(states) == 2 and "ada" in states and 7 in states and b"bob" not in states and "7" not in states
    read = read_items(states)
    assert sorted(set(read)) == ([3] if parts == "blocks" else [3, 6, 9, 12, 15])
    assert states.delete(["ada", "nobody"]) == 1 and "ada" not in states
    assert kept(states, ["ada"], [PASTS[0]]) == [None]


def test_a_past_that_changed_is_compressed_anew_and_never_read(make: Callable[..., UserStates], parts: str) -> None:
    states = make()
    history = PASTS[0][:14]  # of which 12 are old
    assert states.update(["ada"], [history]) == Updated(0, 0, 0, 1, 0)
    shorter, other, swapped = history[:10], [*history[:5], 39 - history[5], *history[6:]], history[::-1]
    for changed in (shorter, other, swapped):
        assert kept(states, ["ada"], [changed]) == [None]
        assert states.update(["ada"], [changed]) == Updated(0, 0, 0, 1, 0) and is_right(states, ["ada"], [changed])
        assert kept(states, ["ada"], [history]) == [None] and kept(states, ["bob"], [changed]) == [None]
        states.update(["ada"], [history])
    longer = [*history, *PASTS[1][:3]]  # and all the recent ones of other users
    assert kept(states, ["ada"], [longer]) == [None]
    assert states.update(["ada"], [longer]) == (Updated(0, 0, 1, 0, 0) if parts == "blocks" else Updated(0, 0, 0, 1, 0))
    recent = [*history[:12], 0, 1]
    states.update(["ada"], [history])
    assert states.update(["ada"], [recent]).unchanged == 1 and is_right(states, ["ada"], [recent])


def test_many_users_in_batches(make: Callable[..., UserStates]) -> None:
    random = np.random.default_rng(1)
    users = [random.integers(0, 40, length).tolist() for length in random.integers(0, 40, 700)]
    old = sum(len(user) >= KEEP + BLOCK for user in users)
    states, all_at_once = make(), make()
    assert states.update(None, users, batch_size=7) == Updated(700 - old, 0, 0, old, 0) and len(states) == old
    assert is_right(states, list(range(700)), users)
    all_at_once.update(range(700), dict(enumerate(users)), batch_size=10_000)
    assert is_right(all_at_once, list(range(700)), users)
    assert make().update([], []) == Updated(0, 0, 0, 0, 0)
    twice = make()  # of equal names the last
    assert twice.update(["ada", "ada"], [PASTS[0], PASTS[1]]).compressed == 1 and is_right(twice, ["ada"], [PASTS[1]])


def test_what_is_kept_has_the_bytes_it_should(open_one: Opener, make: Callable[..., UserStates], kind: str) -> None:
    store = open_one()
    states = make(store)
    states.update(["ada"], [PASTS[0][:5]])
    with store.reading(list(store)) as (value,):
        assert value is not None and value.nbytes == states.bytes_per_user == 128 + 4 * (8 + 1)
    if kind != "redis":
        assert store.num_bytes == states.bytes_per_user + len(b"sada")


def test_states_outlive_their_process(open_one: Opener, make: Callable[..., UserStates], kind: str) -> None:
    states = make(open_one())
    states.update(["ada"], [PASTS[0]])
    if kind != "memory":
        states.close()
        states = make(open_one())
    assert is_right(states, ["ada"], [PASTS[0]]) and states.update(["ada"], [PASTS[0]]).unchanged == 1


def test_another_models_store_is_refused(open_one: Opener, make: Callable[..., UserStates], kind: str) -> None:
    store = open_one()
    states = make(store)
    states.update(["ada"], [PASTS[0]])
    other = pk.PatchedCausalLM(tiny("llama", rms_norm_eps=1e-3).eval(), CATALOG, PROMPT)
    where = {"memory": "MemoryStore", "redis": "Redis server at"}.get(kind, f"users.{kind}")
    for model, parts in ((other, "one"), (states.model, "another")):
        if kind != "memory":
            store.close()
            store = open_one()
        with pytest.raises(StoreError, match=f"store: expected one of this model, prompt and policy .*{where}"):
            make(store, model, parts)
    if kind != "memory":
        store = open_one()
    assert len(store) == 1
    with pytest.raises(ValueError, match="user_states: expected those made for this model, got another model's"):
        states.check(other, None, None)


def test_a_model_that_changed_is_refused(make: Callable[..., UserStates]) -> None:
    model = pk.PatchedCausalLM(tiny("llama").eval(), CATALOG, PROMPT)
    store = MemoryStore()
    states = make(store, model)
    states.update(["ada"], [PASTS[0]])
    hook = model.hf_model.model.layers[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="user_states: expected the model as it was when they were made"):
        states.update(["bob"], [PASTS[1]])
    hook.remove()
    for part in ("prefix", "separator"):
        model.prompt = replace(PROMPT, **{part: [7]})
        with pytest.raises(ValueError, match="user_states: expected the model as it was when they were made"):
            states.update(["bob"], [PASTS[1]])
    model.prompt = replace(PROMPT, suffix=[8])  # which follows what is old
    states.update(["bob"], [PASTS[1]])
    with torch.no_grad():
        model.hf_model.get_input_embeddings().weight[3] += 1
    with pytest.raises(ValueError, match="user_states: expected the model as it was when they were made"):
        states.update(["eve"], [PASTS[1]])
    with pytest.raises(StoreError, match="store: expected one of this model"):
        make(store, model)
    assert len(store) == 2


def test_a_torn_user_is_named(make: Callable[..., UserStates]) -> None:
    store = MemoryStore()
    states = make(store)
    states.update(["ada", "bob"], PASTS[:2])
    with store.reading([b"sbob"]) as (value,):
        assert value is not None
        torn = bytes(value)[:-1]
    store.put({b"sbob": torn})
    with pytest.raises(StoreError, match="user 'bob': expected a whole compressed user, got a torn one"):
        states.update(["ada", "bob"], PASTS[:2])
    assert states.delete(["bob"]) == 1 and states.update(["ada", "bob"], PASTS[:2]).compressed == 1


def test_saved_and_loaded(make: Callable[..., UserStates], tmp_path: Path) -> None:
    states = make()
    states.update(["ada", "bob", 3], PASTS[:3])
    for name in ("users.sqlite", "users.lmdb"):
        if name == "users.lmdb":
            pytest.importorskip("lmdb", reason="the package lmdb is not installed")
        for _ in range(2):  # the second time in place of the first
            states.save(tmp_path / name)
        others = make()
        others.update(["ada", "eve"], [PASTS[4], PASTS[4]])
        others.load(tmp_path / name)
        assert is_right(others, ["ada", "bob", 3, "eve"], [*PASTS[:3], PASTS[4]]) and len(others) == 4
    assert {path.name.removesuffix("-lock") for path in tmp_path.iterdir()} == {"users.sqlite", "users.lmdb"}
    model = pk.PatchedCausalLM(tiny("llama", rms_norm_eps=1e-3).eval(), CATALOG, PROMPT)
    with pytest.raises(StoreError, match=r"store: expected one of this model, .*users\.sqlite"):
        make(None, model).load(tmp_path / "users.sqlite")
    with pytest.raises(FileNotFoundError, match="path: expected a file with users, found none at"):
        states.load(tmp_path / "nobody")
    assert not (tmp_path / "nobody").exists()
    own = make(tmp_path / "users.sqlite")
    with pytest.raises(ValueError, match=r"path: expected another file than the store's own, got .*users\.sqlite"):
        own.save(tmp_path / "users.sqlite")
    own.close()


def test_saved_in_place_of_what_a_killed_process_left(make: Callable[..., UserStates], tmp_path: Path) -> None:
    """SQLite would take the log beside the file for that of the new one, and bring the old users back."""
    path = tmp_path / "users.sqlite"
    left = make(path)
    left.update(["eve"], PASTS[:1])
    copies = [file.with_name(f"copy {file.name}") for file in tmp_path.iterdir()]
    for copy in copies:
        shutil.copy(copy.with_name(copy.name.removeprefix("copy ")), copy)
    left.close()
    for copy in copies:  # as if it had not been closed
        copy.rename(copy.with_name(copy.name.removeprefix("copy ")))
    assert len(list(tmp_path.iterdir())) == 3
    states = make()
    states.update(["ada", "bob"], PASTS[:2])
    states.save(path)
    others = make()
    others.load(path)
    assert len(others) == 2 and is_right(others, ["ada", "bob"], PASTS[:2])


def test_a_place_that_is_no_file_is_refused(make: Callable[..., UserStates], tmp_path: Path) -> None:
    states, address = make(), "redis://localhost:6379/0"
    for copy in (states.save, states.load):
        with pytest.raises(ValueError, match=f"path: expected the path of a file, got a server's address: '{address}'"):
            copy(address)
        with pytest.raises(TypeError, match="path: expected the path of a file, got int"):
            copy(5)  # type: ignore[arg-type]
    with pytest.raises(StoreError, match=f"{tmp_path}: .*directory"):
        states.save(tmp_path)


@pytest.mark.slow
@with_processes
def test_updates_survive_ten_kills(open_one: Opener, make: Callable[..., UserStates]) -> None:
    """Of every user what was acknowledged is there, whole, and can be gone on from."""
    random = np.random.default_rng(0)
    users = [random.integers(0, 40, 3000).tolist() for _ in range(8)]
    length = BLOCK + KEEP
    for kill in range(10):

        def update(say: Callable[[bytes], None], first: int = length) -> None:
            states = make(open_one())
            for at in range(first, 3000):
                states.update(None, [user[:at] for user in users], batch_size=3)
                say(b".")

        child, said = in_child(update)
        assert os.read(said, 1) == b"."
        time.sleep(0.01 + 0.023 * kill)
        os.kill(child, signal.SIGKILL)
        length += len(rest_of(said))
        os.waitpid(child, 0)
        states = make(open_one())
        acknowledged = int(cuts(np.array(length), KEEP, BLOCK))
        with states.store.reading([f"i{user}".encode() for user in range(8)]) as values:
            absorbed = [unpack(value, states._identity, "user").cut for value in values]
        assert all(acknowledged <= cut <= acknowledged + BLOCK for cut in absorbed)
        assert is_right(states, list(range(8)), [user[: cut + KEEP] for user, cut in zip(users, absorbed, strict=True)])
        states.close()


def test_budgets_count_those_who_went(make: Callable[..., UserStates], tmp_path: Path) -> None:
    histories = [past[:5] for past in PASTS]
    states = make(SqliteStore(tmp_path / "users.sqlite", max_bytes=3 * 200))
    assert states.update(list("abcde"), histories, batch_size=2) == Updated(0, 0, 0, 5, 2)
    assert [name in states for name in "abcde"] == [False, False, True, True, True]
    states.close()


def test_items_that_left_the_catalogue_are_left_out(make: Callable[..., UserStates]) -> None:
    states, history = make(), PASTS[0][:12]
    with pytest.warns(pk.PartialListsWarning, match="histories: 2 items that the catalog does not hold") as caught:
        updated = states.update(["ada", "bob"], [[777, *history[:5], 999, *history[5:]], PASTS[1]], unknown="drop")
    warning: Any = caught[0].message
    assert (warning.summary.unknown_items, warning.summary.unknown_examples) == (2, ("ada",))
    assert updated.compressed == 2 and is_right(states, ["ada", "bob"], [history, PASTS[1]])


def test_wrong_arguments(make: Callable[..., UserStates]) -> None:
    states = make()
    for ids, histories, error, message in (
        ([1.5], [[1]], TypeError, r"user_ids\[0\]: expected an integer, a string or bytes for a store, got float"),
        (["ada"], [[1], [2]], ValueError, r"user_ids: expected one per user \(2\), got 1"),
        (
            ["ada"],
            [[1, 999]],
            ValueError,
            r"histories: expected .* got 999 at position 1 of user 'ada'; 1 items of 1 users are",
        ),
    ):
        with pytest.raises(error, match=message):
            states.update(ids, histories)
    with pytest.raises(ValueError, match="unknown: expected one of error, drop, got 'keep'"):
        states.update(["ada"], PASTS[:1], unknown="keep")
    with pytest.raises(ValueError, match="batch_size: expected an integer in 1"):
        states.update(["ada"], PASTS[:1], batch_size=0)
    states.update(["a", "d"], PASTS[:2])
    for ids in ("ada", 3):  # a name is not the users that its letters are
        with pytest.raises(TypeError, match="user_ids: expected a sequence of names"):
            states.delete(ids)
    assert states.delete(np.array(["a", "d", "ada"])) == 2
    with pytest.raises(TypeError, match="store: expected a path"):
        make({})
    assert len(states) == 0
