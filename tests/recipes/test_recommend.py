# SPDX-License-Identifier: Apache-2.0
"""recipes/recommend.py: users of a file, by any number of processes, in the parts and lists of one call."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bulk_cases import save_model, write_users

import patchkern as pk
from recipes import recommend
from recipes.bulk import UserFile


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and 50 users in two files of several row groups."""
    folder = tmp_path_factory.mktemp("bulk")
    save_model(folder / "model")
    (folder / "users").mkdir()
    write_users(folder / "users" / "a.parquet", 30, row_group_size=7)
    write_users(folder / "users" / "b.parquet", 20, first=30, row_group_size=20)
    return folder


def _flags(folder: Path, output: Path, *more: str) -> list[str]:
    flags = ["--users", str(folder / "users"), "--output", str(output), "--users_per_part", "8", "--k", "5"]
    return [str(folder / "model"), *flags, "--search", "items", "--exclude_seen", *more]


@pytest.mark.parametrize(
    "users", [slice(0, 50), slice(5, 9), slice(7, 14), slice(29, 31), slice(49, 50), slice(28, 50)]
)
def test_any_range_of_users(users: slice, folder: Path) -> None:
    paths = [folder / "users" / name for name in ("a.parquet", "b.parquet")]
    rows = [row for path in paths for row in pq.read_table(path).to_pylist()][users]
    file = UserFile(str(folder / "users"))
    histories, names = file.read(users)
    assert len(file) == 50
    assert names.tolist() == [row["user"] for row in rows]
    items = np.split(histories.items, histories.offsets[1:-1])
    assert [of_user.tolist() for of_user in items] == [row["items"] for row in rows]


def test_processes_share_the_parts_and_go_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.warns(pk.PartialListsWarning, match=r"items that the catalog does not hold were left out") as caught:
        assert recommend.main(_flags(folder, tmp_path / "one")) == 7
    assert caught[0].message.summary == pk.read_summary(tmp_path / "one")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert recommend.main(_flags(folder, tmp_path / "two")) == 3
    with pytest.raises(FileNotFoundError, match=r"4 are missing, .* by shard: 4 of \(0, 2\)"):
        pk.read_recommendations(tmp_path / "two")
    monkeypatch.undo()
    assert recommend.main(_flags(folder, tmp_path / "two", "--shard", "2/3")) == 1, "by other processes"
    assert recommend.main(_flags(folder, tmp_path / "two")) == 3
    assert recommend.main(_flags(folder, tmp_path / "two")) == 0

    users, lists = pk.read_recommendations(tmp_path / "two")
    assert users.tolist() == [f"u{user}" for user in range(50)]
    assert lists == pk.read_recommendations(tmp_path / "one")[1]
    histories, names = UserFile(str(folder / "users")).read(slice(0, 50))
    model = pk.PatchedCausalLM.from_pretrained(folder / "model")
    with pytest.warns(pk.PartialListsWarning):
        expected = model.recommend(histories, k=5, search="items", exclude_seen=True, unknown="drop")
    for found, user in zip(lists, expected, strict=True):
        assert [item for item, _ in found] == [item for item, _ in user]
        np.testing.assert_allclose([score for _, score in found], [score for _, score in user], rtol=1e-5)
    assert pk.read_summary(tmp_path / "two").unknown_items > 0 and names.tolist() == users.tolist()


@pytest.mark.parametrize("learned", [("items",), ("titles", "items"), ()])
def test_a_run_that_learned_no_titles_searches_items(learned: tuple[str, ...], folder: Path, tmp_path: Path) -> None:
    model = pk.PatchedCausalLM.from_pretrained(folder / "model")
    model.learned = learned
    model.save_pretrained(tmp_path / "run" / "checkpoint-1")
    for checkpoint, output in (("run", "of-the-run"), ("run/checkpoint-1", "of-its-checkpoint")):
        flags = ["--users", str(folder / "users" / "b.parquet"), "--output", str(tmp_path / output), "--k", "5"]
        recommend.main([str(tmp_path / checkpoint), *flags])
        described = json.loads((tmp_path / output / "run.json").read_text())
        assert described["arguments"]["search"] == ("items" if learned == ("items",) else "beam")


def test_another_file_is_another_run(folder: Path, tmp_path: Path) -> None:
    recommend.main(_flags(folder, tmp_path / "lists", "--shard", "0/7"))
    with pytest.raises(ValueError, match="got another arguments"):
        recommend.main(_flags(folder, tmp_path / "lists", "--num_beams", "30"))
    (tmp_path / "users").mkdir()
    write_users(tmp_path / "users" / "a.parquet", 50, first=1)
    with pytest.raises(ValueError, match="got another histories"):
        recommend.main([*_flags(folder, tmp_path / "lists"), "--users", str(tmp_path / "users")])


def test_another_column_is_another_run(folder: Path, tmp_path: Path) -> None:
    table = pq.read_table(folder / "users" / "b.parquet")
    pq.write_table(table.append_column("bought", table["items"]), tmp_path / "users.parquet")
    flags = [*_flags(folder, tmp_path / "lists"), "--users", str(tmp_path / "users.parquet"), "--items_column"]
    recommend.main([*flags, "items", "--shard", "0/3"])
    with pytest.raises(ValueError, match="got another histories"):
        recommend.main([*flags, "bought"])


@pytest.mark.parametrize(
    ("flags", "error", "message"),
    [
        (["--users", "nowhere"], FileNotFoundError, "--users: expected a parquet file, or a folder of some"),
        (["--items_column", "events"], ValueError, "--users: expected the column 'events' in .*a.parquet"),
        (["--items_column", "user"], TypeError, "--users: in the rows from 0 to 0, histories: expected a column of li"),
        (["--num_beams", "0"], ValueError, "num_beams: expected at least 1, got 0"),
    ],
)
def test_wrong_flags(flags: list[str], error: type[Exception], message: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        recommend.main([*_flags(folder, tmp_path / "lists"), *flags])
    assert not (tmp_path / "lists").exists()


def test_ids_of_another_kind_are_known_before_the_folder_is(folder: Path, tmp_path: Path) -> None:
    pq.write_table(pa.table({"user": [1], "items": [["7"]]}), tmp_path / "users.parquet")
    with pytest.raises(TypeError, match="--users: column 'items': expected integer item ids as in the catalog, got st"):
        recommend.main([*_flags(folder, tmp_path / "lists"), "--users", str(tmp_path / "users.parquet")])
    assert not (tmp_path / "lists").exists()


def test_lists_are_not_written_among_the_users(folder: Path) -> None:
    with pytest.raises(ValueError, match="--output: expected another place than --users"):
        recommend.main(_flags(folder, folder / "users"))


def test_a_shard_is_two_numbers(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        recommend.main(_flags(folder, tmp_path / "lists", "--shard", "first"))
    assert "--shard: expected two numbers such as 0/8, got 'first'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("users", "items", "error", "message"),
    [
        ([1, None], [[1], [2]], ValueError, r"in the rows from 0 to 1, column 'user'\[1\]: expected no missing value"),
        (["a", "a\0"], [[1], [2]], ValueError, r"column 'user': expected ids that do not end in a NUL character"),
        ([1, 2], [[1], None], ValueError, r"in the rows from 0 to 1, histories\[1\]: expected a list, got none"),
        ([1, 2], [[1], [None]], ValueError, r"in the rows from 0 to 1, histories\[1\]: expected no missing value"),
        ([1, 2], [1, 2], TypeError, r"in the rows from 0 to 1, histories: expected a column of lists"),
    ],
)
def test_users_that_are_refused(users: Any, items: Any, error: type[Exception], message: str, tmp_path: Path) -> None:
    pq.write_table(pa.table({"user": users, "items": items}), tmp_path / "users.parquet")
    with pytest.raises(error, match=f"--users: .*{message}"):
        UserFile(str(tmp_path / "users.parquet")).read(slice(0, 2))


def test_a_file_that_is_no_parquet(tmp_path: Path) -> None:
    (tmp_path / "users.parquet").write_text("user,items\n")
    with pytest.raises(ValueError, match=r"--users: expected a parquet file, got '.*users\.parquet'"):
        UserFile(str(tmp_path / "users.parquet"))
