# SPDX-License-Identifier: Apache-2.0
"""Two ordinary tables of any owner: columns by name, types checked, what is left out counted."""

from __future__ import annotations

import logging
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from patchkern.data import Interactions, from_tables, open_dataset

ROWS: dict[str, list[Any]] = {
    "user_id": [7, 7, 9],
    "item_id": [3, 1, 3],
    "timestamp": [200, 100, 50],
    "rating": [4.5, 5, 2],
}
ITEMS: dict[str, list[Any]] = {"item_id": [1, 3, 8], "title": ["Heat", "Alien", "Other"]}


def check(data: Interactions) -> Interactions:
    assert data.user_ids.tolist() == [7, 9]
    assert [history.tolist() for history in data.histories] == [[1, 3], [3]]
    assert data.histories.timestamps is not None and data.histories.timestamps.tolist() == [100, 200, 50]
    assert data.ratings is not None and data.ratings.tolist() == [5, 4.5, 2]
    assert list(data.titles.items()) == [(1, "Heat"), (3, "Alien"), (8, "Other")]
    return data


def test_mappings_of_columns() -> None:
    check(from_tables(ROWS, ITEMS))
    check(from_tables({name: np.array(column) for name, column in ROWS.items()}, ITEMS))
    reordered = {"extra": [None] * 3, **dict(reversed(ROWS.items()))}
    data = from_tables(reordered, {"title": ITEMS["title"], "x": [1, 2, 3], "item_id": ITEMS["item_id"]}, name="mine")
    assert check(data).name == "mine"


def test_other_names_and_no_time() -> None:
    rows = {"who": ROWS["user_id"], "what": ROWS["item_id"], "when": ROWS["timestamp"], "stars": ROWS["rating"]}
    items = {"what": ITEMS["item_id"], "text": ITEMS["title"]}
    fields = {"user_field": "who", "item_field": "what", "title_field": "text"}
    check(from_tables(rows, items, **fields, time_field="when", rating_field="stars"))
    data = from_tables(rows, items, **fields, ordered=True)
    assert data.histories.timestamps is None and data.ratings is None
    assert [history.tolist() for history in data.histories] == [[3, 1], [3]]


def test_datetimes_units_and_ties() -> None:
    rows = {
        **ROWS,
        "timestamp": [datetime(1970, 1, 1, 0, 3, 20), datetime(1970, 1, 1, 0, 1, 40), datetime(1970, 1, 1, 0, 0, 50)],
    }
    check(from_tables(rows, ITEMS))
    check(from_tables({**ROWS, "timestamp": [200_000, 100_000, 50_000]}, ITEMS, time_unit="ms"))
    tied = {"user": [1] * 50, "item": list(range(50)), "time": [5] * 50}
    items = {"item": list(range(50)), "name": [f"Title {i}" for i in range(50)]}
    assert from_tables(tied, items).histories[0].tolist() != list(range(50))
    assert from_tables(tied, items, tie_seed=None).histories[0].tolist() == list(range(50))


def test_what_has_no_title_is_left_out_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    items = {"item_id": [1, 3, 8], "title": [None, "Alien", " "]}
    rows = {"user_id": [7, 7, 9, 9], "item_id": [3, 1, 3, 77], "timestamp": [2, 1, 5, 6]}
    with caplog.at_level(logging.WARNING, logger="patchkern.data"):
        data = from_tables(rows, items)
    assert data.titles == {3: "Alien"} and [history.tolist() for history in data.histories] == [[3], [3]]
    assert "left out: 1 with an item without title, 1 with an item that items lacks" in caplog.text


def test_an_item_twice_with_one_title_or_two() -> None:
    twice = {"item_id": [1, 3, 1], "title": ["Heat", "Alien", "Heat"]}
    assert from_tables(ROWS, twice).titles == {1: "Heat", 3: "Alien"}
    with pytest.raises(ValueError, match=r"items, row 2: expected 'Heat' again as title of 1, got 'Cold'"):
        from_tables(ROWS, {**twice, "title": ["Heat", "Alien", "Cold"]})


AS_TEXT = {"item_id": ["3", "1", "3"]}


@pytest.mark.parametrize(
    ("rows", "items", "options", "error", "message"),
    [
        ({"a": [1]}, {}, {}, ValueError, r"expected a column 'user_id' or 'user' or 'userId' .*, got a$"),
        ({"timestamp": None}, {}, {}, ValueError, r"expected a column 'timestamp' or 'time' \(time_field\), got "
         r"user_id, item_id, rating; ordered=True if the rows are in order of time"),
        ({}, {"title": None}, {}, ValueError, r"items: expected a column 'title' or 'name' \(title_field\), got item"),
        ({}, {}, {"rating_field": "stars"}, ValueError, r"expected a column 'stars' \(rating_field\), got user_id"),
        ({"user": [1, 2, 3]}, {}, {}, ValueError, "expected user_field=, as there are columns 'user_id', 'user'"),
        ({"user_id": [7.0, 7.0, 9.0]}, {}, {}, TypeError, "interactions: user_id: expected all integers or all str"),
        ({"item_id": [3, None, 3]}, {}, {}, TypeError, "interactions: item_id: expected all .*, got NoneType, int"),
        (AS_TEXT, {}, {}, TypeError, "items: expected string item ids as in interactions, got i"),
        ({"timestamp": ["2020", "2021", "2022"]}, {}, {}, TypeError, "interactions: timestamp: expected numbers or da"),
        ({"rating": ["5", "4", "3"]}, {}, {}, TypeError, "interactions: rating: expected numbers"),
        ({"rating": [5, float("nan"), 1]}, {}, {}, ValueError, r"interactions: rating\[1\]: expected a finite number"),
        ({"rating": [5, 4]}, {}, {}, ValueError, "interactions: expected columns of one length, got 2 and 3"),
        ({}, {"title": ["A", 5, "B"]}, {}, TypeError, "items: title, row 1: expected text, got int"),
        ({}, {"title": ["A", "B"]}, {}, ValueError, "items: expected columns of one length, got 2 and 3"),
        ({}, {"title": "ABC"}, {}, TypeError, "items: title: expected a column, got str"),
        ({"item_id": np.ones((3, 1), int)}, {}, {}, ValueError, r"item_id: expected a 1-D column, got shape \(3, 1\)"),
        ({}, {}, {"ordered": True, "time_field": "x"}, ValueError, "time_field: expected None with ordered=True, "),
        ({}, {}, {"ordered": True, "time_unit": "s"}, ValueError, "time_unit: expected None with ordered=True, "),
    ],
)  # fmt: skip
def test_refused(
    rows: dict[str, Any], items: dict[str, Any], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    def changed(table: dict[str, list[Any]], change: dict[str, Any]) -> dict[str, Any]:
        if "a" in change:
            return change
        return {name: column for name, column in {**table, **change}.items() if column is not None}

    with pytest.raises(error, match=message):
        from_tables(changed(ROWS, rows), changed(ITEMS, items), **options)


def test_no_table() -> None:
    with pytest.raises(TypeError, match="interactions: expected a table or a mapping of columns, got list"):
        from_tables([ROWS], ITEMS)


# ------------------------------------------------------------------ of other libraries


def test_pandas() -> None:
    pd = pytest.importorskip("pandas", reason="needs pandas")
    rows, items = pd.DataFrame(ROWS, index=[5, 5, 5]), pd.DataFrame(ITEMS)
    check(from_tables(rows, items))
    check(from_tables(rows.assign(timestamp=pd.to_datetime(rows["timestamp"], unit="s", utc=True)), items))
    missing = pd.DataFrame({"item_id": [1, 3, 8, 9], "title": ["Heat", None, float("nan"), pd.NA]})
    assert from_tables(rows, missing).titles == {1: "Heat"}
    with pytest.raises(ValueError, match="interactions: item_id: expected no missing value, got 1"):
        from_tables(rows.assign(item_id=[1, None, 3]), items)


def test_polars() -> None:
    pl = pytest.importorskip("polars", reason="needs polars")
    rows, items = pl.DataFrame(ROWS, strict=False), pl.DataFrame(ITEMS)
    check(from_tables(rows, items))
    check(from_tables(rows.with_columns(pl.from_epoch("timestamp", time_unit="s")), items))
    assert from_tables(rows, pl.DataFrame({"item_id": [1, 3], "title": ["Heat", None]})).titles == {1: "Heat"}


# ------------------------------------------------------------------ of parquet


def tables(folder: Path, rows: dict[str, Any], items: dict[str, Any], **options: Any) -> Path:
    pa = pytest.importorskip("pyarrow", reason="needs pyarrow")
    import pyarrow.parquet as pq

    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table(rows), folder / "interactions.parquet", **options)
    pq.write_table(pa.table(items), folder / "items.parquet", **options)
    return folder


def test_a_folder_of_two_tables(tmp_path: Path) -> None:
    folder = tables(tmp_path / "mine", ROWS, ITEMS, row_group_size=1)
    assert check(open_dataset(folder)).name == "mine"
    check(open_dataset(folder / "interactions.parquet", rating_field="rating"))


def test_text_ids_with_leading_zeros_in_row_groups(tmp_path: Path) -> None:
    rows = {"user_id": ["01", "1", "01"], "item_id": ["7", "007", "007"], "timestamp": [1, 2, 3]}
    data = open_dataset(tables(tmp_path, rows, {"item_id": ["007", "7"], "title": ["Bond", "Seven"]}, row_group_size=1))
    assert data.user_ids.tolist() == ["01", "1"]
    assert [history.tolist() for history in data.histories] == [["7", "007"], ["007"]]


def test_columns_that_are_not_found_are_named_with_the_file(tmp_path: Path) -> None:
    tables(tmp_path, {"customer": [1], "sku": [2], "at": [3]}, ITEMS)
    with pytest.raises(
        ValueError, match=r"interactions\.parquet: expected a column 'user_id' or .*, got customer, sku, at"
    ):
        open_dataset(tmp_path)
    options = {"user_field": "customer", "item_field": "sku", "time_field": "at"}
    with pytest.raises(ValueError, match=r"items\.parquet: expected a column 'sku' \(item_field\), got item_id, title"):
        open_dataset(tmp_path, **options)
    (tmp_path / "items.parquet").unlink()
    with pytest.raises(FileNotFoundError, match=r"items\.parquet: expected interactions\.parquet and items\.parquet"):
        open_dataset(tmp_path)


def test_missing_values_and_two_columns_of_one_name(tmp_path: Path) -> None:
    for column in ROWS:
        wrong = tables(tmp_path, {**ROWS, column: [*ROWS[column][:2], None]}, ITEMS)
        with pytest.raises(
            ValueError, match=rf"interactions\.parquet: {column}\[2\]: expected no missing value, got 1"
        ):
            open_dataset(wrong)
    pa = pytest.importorskip("pyarrow", reason="needs pyarrow")
    import pyarrow.parquet as pq

    both = pa.table([*ROWS.values(), ROWS["rating"]], names=[*ROWS, "rating"])
    pq.write_table(both, tmp_path / "interactions.parquet")
    with pytest.raises(ValueError, match=r"interactions\.parquet: expected one column 'rating', got user_id"):
        open_dataset(tmp_path)
