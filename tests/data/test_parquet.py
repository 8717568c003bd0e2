# SPDX-License-Identifier: Apache-2.0
"""Parquet: exact round trips, the authors' form, malformed tables, files that declare more than they hold."""

from __future__ import annotations

import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from patchkern import Histories
from patchkern.data import (
    Interactions,
    open_dataset,
    prepare,
    read_parquet,
    synthetic,
    write_parquet,
)


def write(folder: Path, name: str, text: str) -> None:
    (folder / name).write_bytes(text.encode())


def parquet(folder: Path, rows: dict[str, list[Any]], items: dict[str, list[Any]]) -> None:
    pa = pytest.importorskip("pyarrow", reason="needs pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table(rows), folder / "histories.parquet")
    pq.write_table(pa.table(items), folder / "items.parquet")


GOOD_ROWS: dict[str, list[Any]] = {
    "user": [4, 2],
    "items": [[10, 30, 10], [30]],
    "train_first": [0, None],
    "train_last": [1, None],
    "test_first": [2, 0],
    "test_last": [2, 0],
}
GOOD_ITEMS: dict[str, list[Any]] = {"item": [30, 10], "title": ["A", "B"]}


def test_parquet(tmp_path: Path) -> None:
    parquet(tmp_path, GOOD_ROWS, GOOD_ITEMS)
    write(tmp_path, "prompt.txt", "Be kind.\nSeen: [HISTORY_SEQUENCE]. Next?\n")
    data = open_dataset(tmp_path)
    assert data.user_ids.tolist() == [4, 2]
    assert [history.tolist() for history in data.histories] == [[10, 30, 10], [30]]
    assert {split: bounds.tolist() for split, bounds in data.ranges.items()} == {
        "train": [[0, 2], [0, 0]],
        "test": [[2, 3], [0, 1]],
    }
    assert (data.system, data.instruction) == ("Be kind.", "Seen: [HISTORY_SEQUENCE]. Next?")
    assert list(data.titles) == [30, 10]
    assert prepare(data) is data
    assert open_dataset(tmp_path / "histories.parquet").num_users == 2


PROMPTS = {
    "two lines": ("Be kind.", "Seen: [HISTORY_SEQUENCE]. Next?"),
    "several lines": ("Be kind.\nBe brief.\n", "Seen:\r\n[HISTORY_SEQUENCE]\u2028\n\nNext? "),
    "no system": (None, "[HISTORY_SEQUENCE]"),
    "no instruction": ("", None),
    "none": (None, None),
}


def made(ids: str, times: str, prompt: str) -> Interactions:
    users, items = {"integers": ([9, 4], [30, -1]), "strings": (["01", "1"], ["007", "7"])}[ids]
    titles = dict(zip(items, [' "É\t\n', "nan"], strict=True))
    histories = Histories(
        np.array(items)[[0, 1, 0, 1]],
        [0, 3, 4],
        {"none": None, "seconds": [-1, 5, 2**40, 0], "fractions": [0.1, 0.2, 1.6e9 + 0.5, 7]}[times],
    )
    ratings = None if times == "none" else [1, -2.5, 0.1, 5]
    ranges = {"train": [[0, 2], [1, 1]], "held out": [[2, 3], [0, 1]]}
    system, instruction = PROMPTS[prompt]
    return Interactions(users, histories, titles, ratings, ranges, "a name", system, instruction)


def same(one: Interactions, other: Interactions) -> None:
    assert (one.name, one.system, one.instruction) == (other.name, other.system, other.instruction)
    assert list(one.titles.items()) == list(other.titles.items())
    arrays = [
        (data.user_ids, data.ratings, *[getattr(data.histories, n) for n in Histories.__slots__])
        for data in (one, other)
    ]
    for mine, theirs in zip(*arrays, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            assert mine.dtype == theirs.dtype or mine.dtype.kind == theirs.dtype.kind == "U"
            assert np.array_equal(mine, theirs)
    assert list(one.ranges) == list(other.ranges)
    for split in one.ranges:
        for mine, theirs in zip(one.samples(split, 0), other.samples(split, 0), strict=True):
            assert np.array_equal(mine, theirs)


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("times", ["none", "seconds", "fractions"])
@pytest.mark.parametrize("ids", ["integers", "strings"])
def test_round_trip(tmp_path: Path, ids: str, times: str, prompt: str) -> None:
    pytest.importorskip("pyarrow", reason="needs pyarrow")
    data = made(ids, times, prompt)
    (tmp_path / "prompt.txt").write_text("of an older\nset [HISTORY_SEQUENCE]\n", encoding="utf-8")
    write_parquet(data, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["about.json", "histories.parquet", "items.parquet"]
    same(open_dataset(tmp_path), data)


def test_round_trip_of_synthetic_and_of_no_data(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="needs pyarrow")
    for number, data in enumerate(
        (synthetic(20, 60, seed=3, num_genres=4, mean_length=20), made("strings", "seconds", "none"))
    ):
        for size, part in enumerate((data, data.keep(np.zeros(data.num_interactions, bool)))):
            write_parquet(part, tmp_path / f"{number}{size}")
            same(read_parquet(tmp_path / f"{number}{size}"), part)


def test_two_tables_are_not_overwritten(tmp_path: Path) -> None:
    """Theirs is a file of items of the same name, with columns of its own."""
    pytest.importorskip("pyarrow", reason="needs pyarrow")
    for name in ("interactions.parquet", "items.parquet"):
        (tmp_path / name).write_text(name)
    with pytest.raises(FileExistsError, match=r"folder: expected one without interactions\.parquet, whose items\.parq"):
        write_parquet(made("integers", "seconds", "none"), tmp_path)
    assert sorted(file.read_text() for file in tmp_path.iterdir()) == ["interactions.parquet", "items.parquet"]


def test_a_folder_that_was_not_written_to_the_end_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the new items would go with the old histories."""
    pytest.importorskip("pyarrow", reason="needs pyarrow")
    write_parquet(made("integers", "seconds", "none"), tmp_path)

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("patchkern.data.parquet.json.dumps", lambda *_, **__: "{}")
    monkeypatch.setattr("pathlib.Path.write_text", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_parquet(made("strings", "none", "none"), tmp_path)
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError, match=r"histories\.parquet"):
        read_parquet(tmp_path)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("prompt.txt", "One\n", r"prompt\.txt: expected two lines \(system message, instruction\), got 1"),
        (
            "prompt.txt",
            "One\nTwo\nThree [HISTORY_SEQUENCE]\n",
            r"got 3; texts of several lines belong into about\.json",
        ),
        ("prompt.txt", "One\n\n[HISTORY_SEQUENCE]\n", r"prompt\.txt: expected two lines"),
        ("about.json", "{", r"about\.json: expected JSON"),
        ("about.json", "[]", r"about\.json: expected an object with name, system, instruction, got \[\]"),
        ("about.json", '{"name": "x"}', r"about\.json: expected an object with name, system, instruction"),
        (
            "about.json",
            '{"name": 1, "system": null, "instruction": null}',
            r"about\.json: expected text as name, got 1",
        ),
    ],
)
def test_malformed_texts(tmp_path: Path, file: str, text: str, message: str) -> None:
    parquet(tmp_path, GOOD_ROWS, GOOD_ITEMS)
    write(tmp_path, file, text)
    with pytest.raises(ValueError, match=message):
        open_dataset(tmp_path)


def test_a_file_that_declares_more_than_it_holds(tmp_path: Path) -> None:
    """A constant column of fifty million rows takes kilobytes on disk and would take gigabytes in memory."""
    pa = pytest.importorskip("pyarrow", reason="needs pyarrow")
    import pyarrow.parquet as pq

    few = pa.table({"user": np.zeros(1_000_000, np.int64), "items": pa.array([[]] * 1_000_000, pa.list_(pa.int64()))})
    with pq.ParquetWriter(tmp_path / "histories.parquet", few.schema, compression="zstd") as writer:
        for _ in range(8):
            writer.write_table(few)
    pq.write_table(pa.table(GOOD_ITEMS), tmp_path / "items.parquet")
    assert (tmp_path / "histories.parquet").stat().st_size < 100_000
    with pytest.raises(ValueError, match=r"histories\.parquet: expected a file whose size fits its content, got"):
        open_dataset(tmp_path)


def test_titles_that_repeat_take_no_more_than_one(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow", reason="needs pyarrow")
    import pyarrow.parquet as pq

    n, title = 2000, "x" * 200_000
    pq.write_table(
        pa.table({"item": np.arange(n), "title": pa.array([title] * n)}), tmp_path / "items.parquet", compression="zstd"
    )
    pq.write_table(pa.table({"user": [1], "items": [[5]]}), tmp_path / "histories.parquet")
    tracemalloc.start()
    data = open_dataset(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 20 << 20
    tracemalloc.stop()
    assert data.num_items == n and data.titles[1999] == title


@pytest.mark.parametrize(
    ("rows", "items", "message"),
    [
        ({"user": [1]}, GOOD_ITEMS, "expected a column 'items', got user"),
        (
            {"user": [1], "items": [3]},
            GOOD_ITEMS,
            r"histories\.parquet: items: expected a column of lists, got one of int64",
        ),
        (
            {"user": [1], "items": [[10, None]]},
            GOOD_ITEMS,
            r"items\[0\]: expected no missing value, got one at position 1",
        ),
        ({"user": [1], "items": [None]}, GOOD_ITEMS, "expected no null in column 'items', got 1"),
        ({"user": [1.0], "items": [[10]]}, GOOD_ITEMS, "user: expected integer or string item ids, got dtype float64"),
        ({"user": [1], "items": [[10.0]]}, GOOD_ITEMS, "items: expected integer or string item ids, got dtype float64"),
        (
            {**GOOD_ROWS, "ratings": [[1, 2, 3], [float("nan")]]},
            GOOD_ITEMS,
            r"ratings\[3\]: expected a finite number, got nan",
        ),
        ({**GOOD_ROWS, "ratings": [[1, 2], [3, 4]]}, GOOD_ITEMS, "expected as many ratings as items in each row"),
        ({**GOOD_ROWS, "train_last": [0.5, None]}, GOOD_ITEMS, "expected integers in column 'train_last', got double"),
        ({"user": [1, 1], "items": [[10], [30]]}, GOOD_ITEMS, "user_ids: expected distinct ids"),
        ({"user": [1], "items": [[10]], "train_first": [0]}, GOOD_ITEMS, "expected a column 'train_last'"),
        (
            {**GOOD_ROWS, "train_last": [5, None]},
            GOOD_ITEMS,
            r"ranges\['train'\]\[0\]: expected 0 <= begin <= end <= 3",
        ),
        ({**GOOD_ROWS, "train_last": [1, 0]}, GOOD_ITEMS, "to be null in the same rows"),
        ({**GOOD_ROWS, "test_first": [1, 0]}, GOOD_ITEMS, "expected disjoint splits"),
        (GOOD_ROWS, {"item": [30, 30], "title": ["A", "B"]}, "expected distinct items, got 1 more than once"),
        (GOOD_ROWS, {"item": [30], "title": ["A"]}, "expected items with a title, got 10 without one"),
        (GOOD_ROWS, {"item": [30, 10], "title": ["A", None]}, "expected no null in column 'title'"),
    ],
)
def test_malformed_parquet(tmp_path: Path, rows: dict[str, Any], items: dict[str, Any], message: str) -> None:
    parquet(tmp_path, rows, items)
    with pytest.raises((TypeError, ValueError), match=message):
        read_parquet(tmp_path)


def test_parquet_that_is_none(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="needs pyarrow")
    write(tmp_path, "histories.parquet", "not parquet")
    write(tmp_path, "items.parquet", "not parquet")
    with pytest.raises(ValueError, match=r"histories\.parquet: expected a parquet file"):
        open_dataset(tmp_path)


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    write(tmp_path, "histories.parquet", "")
    write(tmp_path, "items.parquet", "")
    with pytest.raises(
        ImportError, match=r"parquet needs pyarrow, which is not installed: pip install 'patchkern\[data\]'"
    ):
        open_dataset(tmp_path)


@pytest.mark.parametrize(("scale", "warned"), [(1, False), (1000, True), (10**9, True)])
def test_times_of_another_unit(scale: int, warned: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    times = [1_600_000_000, 1_600_000_001, 1_600_000_007, 1_600_000_002]
    lists = [[scale * time for time in times[:3]], [scale * times[3]]]
    parquet(tmp_path, GOOD_ROWS | {"timestamps": lists}, GOOD_ITEMS)
    data = read_parquet(tmp_path)
    assert data.histories.timestamps is not None and data.histories.timestamps.tolist() == times
    assert ("taken to be" in caplog.text) == warned
