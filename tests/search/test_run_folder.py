# SPDX-License-Identifier: Apache-2.0
"""Folders that several processes write into: one run, each part once, whatever is killed."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import patchkern as pk
from patchkern.search import bulk_run, run_folder
from patchkern.search.results import read_recommendations, read_summary, recommend_to_disk
from patchkern.search.summary import PartialListsWarning

HISTORIES = [[(user + step) % 12 for step in range(1 + user % 4)] for user in range(9)]
OPTIONS: dict[str, Any] = {"k": 3, "num_beams": 3, "users_per_part": 2}  # parts 0 to 4


@pytest.fixture(scope="module")
def model() -> pk.PatchedCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=30,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=128,
    )
    catalog = pk.Catalog.from_token_ids([i * 7 % 25 for i in range(24)], range(0, 25, 2))
    prompt = pk.Prompt(prefix=[26], separator=[27], suffix=[28], response_end=[29])
    return pk.PatchedCausalLM(LlamaForCausalLM(config), catalog, prompt, pk.ItemPatches(2))


@pytest.fixture
def never_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: Any) -> Any:
        raise AssertionError("computed")

    monkeypatch.setattr(bulk_run, "run", run)


def parts_in(folder: Path) -> list[int]:
    return sorted(int(path.stem.removeprefix("part-")) for path in folder.glob("part-*"))


def is_whole(folder: Path, model: pk.PatchedCausalLM) -> None:
    users, lists = read_recommendations(folder)
    assert users.tolist() == list(range(9))
    expected = model.recommend(HISTORIES, k=3, num_beams=3)
    assert [[item for item, _ in user] for user in lists] == [[item for item, _ in user] for user in expected]
    names = {path.name for path in folder.iterdir()}
    assert names == {"run.json", *(f"part-{number:05d}.parquet" for number in range(5))}


# ------------------------------------------------------------------ processes


class Held:
    """A process that writes, and stops before its part of some number until it is let go or killed."""

    def __init__(self, write: Callable[[], Any], before: int) -> None:
        context = multiprocessing.get_context("fork")
        self._stopped, self._go = context.Event(), context.Event()
        self._process = context.Process(target=self._main, args=(write, before))
        self._process.start()
        assert self._stopped.wait(60)

    def _main(self, write: Callable[[], Any], before: int) -> None:
        torch.set_num_threads(1)
        run, done = bulk_run.run, 0

        def held(*arguments: Any) -> Any:
            nonlocal done
            if done == before:
                self._stopped.set()
                self._go.wait()
            done += 1
            return run(*arguments)

        bulk_run.run = held
        write()

    def kill(self) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, signal.SIGKILL)
        self._process.join(60)
        assert self._process.exitcode == -signal.SIGKILL

    def let_go(self) -> None:
        self._go.set()
        self._process.join(60)
        assert self._process.exitcode == 0


def test_a_second_writer_is_refused_until_the_first_is_dead(model: pk.PatchedCausalLM, tmp_path: Path) -> None:
    first = Held(lambda: recommend_to_disk(model, HISTORIES, tmp_path, **OPTIONS), before=2)
    (tmp_path / ".part-00002.parquet.1.tmp").write_bytes(b"half")  # as if it had been writing
    try:
        for shard in (None, (0, 1), (0, 2), (1, 2), (2, 3)):
            with pytest.raises(ValueError, match="folder: expected no other process to write the parts of shard"):
                recommend_to_disk(model, HISTORIES, tmp_path, shard=shard, **OPTIONS)
        with pytest.raises(ValueError, match=r"expected the run that was begun in .*, got another arguments"):
            recommend_to_disk(model, HISTORIES, tmp_path, **{**OPTIONS, "k": 2})
        assert parts_in(tmp_path) == [0, 1]
    finally:
        first.kill()
    with pytest.raises(FileNotFoundError, match=r"expected 5 parts .*, 3 are missing, the first is part-00002"):
        read_recommendations(tmp_path)
    recommend_to_disk(model, HISTORIES, tmp_path, **OPTIONS)
    is_whole(tmp_path, model)


def test_processes_share_a_run(model: pk.PatchedCausalLM, tmp_path: Path) -> None:
    """Of three at once one is killed in the middle; its rank goes on while the others still write."""

    def writer(rank: int, world: int = 3) -> Callable[[], Any]:
        return lambda: recommend_to_disk(model, HISTORIES, tmp_path, shard=(rank, world), **OPTIONS)

    held = [Held(writer(0), before=1), Held(writer(1), before=1)]
    for refused in (writer(0), writer(1), writer(1, 2), writer(0, 1)):
        with pytest.raises(ValueError, match="got one that does; processes that share a run"):
            refused()
    writer(2)()
    assert parts_in(tmp_path) == [0, 1, 2]
    held[1].kill()
    missing = (
        r"2 are missing, the first is part-00003\.parquet; by shard: 1 of \(0, 3\), 1 of \(1, 3\); the same call with"
    )
    with pytest.raises(FileNotFoundError, match=missing):
        read_recommendations(tmp_path)
    writer(1)()
    held[0].let_go()
    is_whole(tmp_path, model)


def test_one_of_many_runs_gets_the_folder(tmp_path: Path) -> None:
    """Ten writers that begin at once, with five runs: one run is there in the end, and all others know it."""
    outcomes: list[tuple[int, str]] = []
    barrier = threading.Barrier(10)

    def begin(k: int, rank: int) -> None:
        barrier.wait()
        try:
            with run_folder.writing(tmp_path / "run", {"format_version": 2, "k": k}, (rank, 2)):
                outcomes.append((k, "writes"))
                barrier.wait(60)
        except ValueError as error:
            outcomes.append((k, str(error)))
            barrier.wait(60)

    threads = [threading.Thread(target=begin, args=(number // 2, number % 2)) for number in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    kept = json.loads((tmp_path / "run" / "run.json").read_text())["k"]
    assert sorted(k for k, said in outcomes if said == "writes") == [kept, kept]
    assert all(said.endswith("got another k") for k, said in outcomes if k != kept)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["run.json"]


def test_file_systems_without_links_or_locks(
    model: pk.PatchedCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    def refuses(code: int) -> Callable[..., Any]:
        def call(*_: Any) -> Any:
            raise OSError(code, os.strerror(code))

        return call

    monkeypatch.setattr(os, "link", refuses(errno.EPERM))
    recommend_to_disk(model, HISTORIES, tmp_path / "links", **OPTIONS)
    is_whole(tmp_path / "links", model)
    monkeypatch.setattr(fcntl, "fcntl", refuses(errno.ENOLCK))
    with pytest.warns(UserWarning, match="folder: the file system of .* has no locks"):
        recommend_to_disk(model, HISTORIES, tmp_path / "locks", **OPTIONS)
    is_whole(tmp_path / "locks", model)


# ------------------------------------------------------------------ shards


@pytest.mark.parametrize("world", [2, 7])
def test_shards_one_after_the_other(world: int, model: pk.PatchedCausalLM, tmp_path: Path) -> None:
    for rank in reversed(range(world)):
        recommend_to_disk(model, HISTORIES, tmp_path, shard=(rank, world), **OPTIONS)
        expected = [number for number in range(5) if number % world >= rank]
        assert parts_in(tmp_path) == expected
    is_whole(tmp_path, model)


def test_another_world_may_finish(model: pk.PatchedCausalLM, tmp_path: Path) -> None:
    recommend_to_disk(model, HISTORIES, tmp_path, shard=(1, 4), **OPTIONS)
    with pytest.raises(
        FileNotFoundError, match=r"4 are missing.*; by shard: 2 of \(0, 4\), 1 of \(2, 4\), 1 of \(3, 4\);"
    ):
        read_recommendations(tmp_path)
    recommend_to_disk(model, HISTORIES, tmp_path, **OPTIONS)
    is_whole(tmp_path, model)


@pytest.mark.parametrize(
    ("shard", "error", "message"),
    [
        (1, TypeError, r"shard: expected \(rank, world\) or None, got 1"),
        ((0, 1, 2), TypeError, r"shard: expected \(rank, world\) or None, got \(0, 1, 2\)"),
        ((2, 2), ValueError, r"shard: rank: expected an integer in 0\.\.1, got 2"),
        ((-1, 2), ValueError, r"shard: rank: expected an integer in 0\.\.1, got -1"),
        ((0, 0), ValueError, "shard: world: expected an integer in 1"),
        ((0.0, 2), TypeError, "shard: rank: expected an integer, got float"),
    ],
)
def test_wrong_shards(
    shard: Any, error: type[Exception], message: str, model: pk.PatchedCausalLM, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        recommend_to_disk(model, HISTORIES, tmp_path / "run", shard=shard, **OPTIONS)
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------ what is checked, and when


@pytest.mark.usefixtures("never_computed")
def test_all_users_are_checked_before_the_first_part(model: pk.PatchedCausalLM, tmp_path: Path) -> None:
    names = [f"user-{number}" for number in range(9)]
    seen_all = [*HISTORIES[:8], list(range(12))]
    for histories, options, message in (
        (seen_all, {"exclude_seen": True}, "k: expected at most 0, .* that user 'user-8' has not seen, got 3"),
        ([*HISTORIES[:8], [3, 77]], {}, "histories: .* got 77 at position 1 of user 'user-8'"),
        ([*HISTORIES[:8], [1] * 200], {"policy": pk.TextOnly(None)}, "at most 128 rows .*user 'user-8'"),
        (HISTORIES, {"allowed_items": [[1, 2, 3]] * 8 + [[1]]}, "k: expected at most 1, .* of user 'user-8', got 3"),
        (HISTORIES, {"allowed_items": [[1, 2, 3]] * 8 + [[77, 2, 3]]}, r"allowed_items\['user-8'\]: .*got 77"),
        (HISTORIES, {"memory_budget": "20KiB"}, "memory_budget: .* of user 'user-"),
        (HISTORIES, {"prior": torch.tensor([[0.0] * 12] * 8 + [[float("nan")] * 12])}, "prior: .* user 'user-8'"),
    ):
        with pytest.raises(ValueError, match=message):
            recommend_to_disk(model, histories, tmp_path / "run", user_ids=names, **{**OPTIONS, **options})
        assert not (tmp_path / "run").exists()
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(OSError, match="file"):
        recommend_to_disk(model, HISTORIES, tmp_path / "file" / "run", **OPTIONS)


def test_short_lists_are_written_and_counted(model: pk.PatchedCausalLM, tmp_path: Path) -> None:
    histories = [[1, 2], list(range(12)), [0, 77, 78], list(range(11))]
    names = ["ada", "bob", "eve", "joe"]
    options = {"short": "allow", "unknown": "drop", "exclude_seen": True, "user_ids": names}
    for rank in (0, 1):
        with pytest.warns(PartialListsWarning) as caught:
            recommend_to_disk(
                model, histories, tmp_path, k=3, num_beams=3, users_per_part=1, shard=(rank, 2), **options
            )
        assert len([entry for entry in caught if entry.category is PartialListsWarning]) == 1
    users, lists = read_recommendations(tmp_path)
    assert users.tolist() == names and [len(user) for user in lists] == [3, 0, 3, 1]
    summary = read_summary(tmp_path)
    assert (summary.users, summary.short_lists, summary.empty_lists, summary.unknown_items) == (4, 2, 1, 2)
    assert summary.short_examples == ("bob", "joe") and summary.unknown_examples == ("eve",)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recommend_to_disk(model, HISTORIES, tmp_path / "all", **OPTIONS)


def test_strings_without_a_single_item(tmp_path: Path, model: pk.PatchedCausalLM) -> None:
    """A part of empty lists has the types of the others."""
    catalog = pk.Catalog.from_token_ids([1, 2, 3], range(4), ["a", "b", "c"])
    named = pk.PatchedCausalLM(model.hf_model, catalog, model.prompt, model.policy)
    with pytest.warns(PartialListsWarning):
        recommend_to_disk(
            named,
            [["a", "b", "c"], ["a"]],
            tmp_path,
            k=1,
            num_beams=1,
            users_per_part=1,
            exclude_seen=True,
            short="allow",
        )
    _, lists = read_recommendations(tmp_path)
    assert lists[0] == [] and lists[1][0][0] in ("b", "c")


# ------------------------------------------------------------------ files that are not what they should be


@pytest.fixture
def folder(model: pk.PatchedCausalLM, tmp_path: Path) -> Iterator[Path]:
    yield recommend_to_disk(model, HISTORIES, tmp_path / "run", **OPTIONS)


def refused(message: str, folder: Path, model: pk.PatchedCausalLM) -> None:
    """By who reads, and by who would go on."""
    for call in (lambda: read_recommendations(folder), lambda: recommend_to_disk(model, HISTORIES, folder, **OPTIONS)):
        with pytest.raises(ValueError, match=message):
            call()


def test_parts_of_another_run_are_noticed(folder: Path, model: pk.PatchedCausalLM, tmp_path: Path) -> None:
    other = recommend_to_disk(model, HISTORIES, tmp_path / "other", **{**OPTIONS, "k": 2})
    part = folder / "part-00003.parquet"
    part.write_bytes((other / part.name).read_bytes())
    refused(r"part-00003\.parquet: expected a part of the run in run\.json .*, got one of another run", folder, model)
    part.write_bytes((folder / "part-00001.parquet").read_bytes())
    refused(r"part-00003\.parquet: expected part 3, got part 1 under its name", folder, model)
    part.write_bytes(part.read_bytes()[:100])
    refused(r"part-00003\.parquet: expected a parquet file; removed, it is computed anew", folder, model)
    part.unlink()
    recommend_to_disk(model, HISTORIES, folder, **OPTIONS)
    is_whole(folder, model)


def test_parts_without_a_stamp_are_noticed(folder: Path, model: pk.PatchedCausalLM) -> None:
    import pyarrow.parquet as pq

    path = folder / "part-00002.parquet"
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata(None), path)
    refused(r"part-00002\.parquet: expected a part written by recommend_to_disk, got one without", folder, model)
    for stamp in (b"{", b"[]", b"{}", b'{"run": "", "part": 2, "shard": 1, "summary": {}}'):
        pq.write_table(table.replace_schema_metadata({b"patchkern": stamp}), path)
        refused(r"part-00002\.parquet: expected", folder, model)


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00", "null"])
def test_a_malformed_run_is_named(text: str, folder: Path, model: pk.PatchedCausalLM) -> None:
    (folder / "run.json").write_text(text)
    refused(r"run/run\.json: expected (JSON|a JSON object) as recommend_to_disk writes it", folder, model)


@pytest.mark.parametrize("changed", [{"users": -1}, {"users": "9"}, {"users_per_part": 0}, {"format_version": 1}])
def test_a_run_with_wrong_numbers_is_named(changed: dict[str, Any], folder: Path) -> None:
    run = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**run, **changed}))
    (name,) = changed
    with pytest.raises(ValueError, match=rf"run/run\.json: expected .*{name}"):
        read_recommendations(folder)


def test_a_changed_run_does_not_fit_its_parts(folder: Path) -> None:
    run = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**run, "prompt": None}))
    with pytest.raises(ValueError, match=r"part-00000\.parquet: expected a part of the run in run\.json"):
        read_recommendations(folder)
