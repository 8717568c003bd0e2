# SPDX-License-Identifier: Apache-2.0
"""MerRec: shards of events, runs on one item joined, names of the latest event; other layouts are refused."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from patchkern.data import leave_last_out, open_dataset, read_merrec

pa = pytest.importorskip("pyarrow", reason="needs pyarrow")
pq = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow")

TIME = pa.timestamp("us", tz="UTC")
MAY: dict[str, Any] = {
    "user_id": [5, 5, 5, 5, 3, 3],
    "sequence_id": [0, 0, 0, 1, 0, 0],
    "item_id": [100, 100, 200, 100, 200, 300],
    "product_id": [1, 1, 2, 1, 2, 2],
    "stime": pa.array([1_000_000, 2_500_000, 3_000_000, 9_000_000, 1_000_000, 500_000], TIME),
    "event_id": ["item_view", "item_like", "item_view", "buy_comp", "item_view", "item_view"],
    "name": ["Red shoes", "Red  shoes", "Lamp", "Red shoes, sold", "Lamp", None],
    "brand_name": ["Acme", "Acme", None, "Acme", None, None],
    "c2_name": ["Shoes", "Shoes", "Lamps", "Shoes", "Lamps", "Lamps"],
    "price": [10.0, 10.0, 5.0, 9.5, 5.0, 5.0],
}
JUNE: dict[str, Any] = {
    "user_id": [5, 4],
    "sequence_id": [2, 0],
    "item_id": [200, 400],
    "product_id": [2, 3],
    "stime": pa.array([20_000_000, 21_000_000], TIME),
    "event_id": ["item_add_to_cart_tap", "item_view"],
    "name": ["Lamp, old", "Vase"],
    "brand_name": ["Lux", None],
    "c2_name": ["Lamps", None],
    "price": [4.0, 7.0],
}


def write(folder: Path, month: str, columns: dict[str, Any]) -> Path:
    (folder / month).mkdir(exist_ok=True)
    file = folder / month / "000000000000.parquet"
    pq.write_table(pa.table(columns), file)
    return file


@pytest.fixture
def months(tmp_path: Path) -> Path:
    write(tmp_path, "20230501", MAY)
    write(tmp_path, "20230601", JUNE)
    return tmp_path


def test_months(months: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "patchkern.data"):
        data = open_dataset(months, item_text="title (brand_name, c2_name, price)")
    assert "interactions left out: 1 with an item without name" in caplog.text
    assert data.user_ids.tolist() == [3, 4, 5]
    # user 5: looked at and liked 100 is one; it comes again later
    assert [history.tolist() for history in data.histories] == [[200], [400], [100, 200, 100, 200]]
    assert data.histories.timestamps.tolist() == [1, 21, 1, 3, 9, 20]
    assert data.titles == {100: "Red shoes, sold", 200: "Lamp, old", 400: "Vase"}
    assert data.texts is not None and data.texts[200] == "Lamp, old (Lux, Lamps, 4)" and data.texts[400] == "Vase (7)"
    assert leave_last_out(data).targets(leave_last_out(data).samples("test")).tolist() == [200]


def test_the_latest_name_whatever_the_order_of_shards(tmp_path: Path) -> None:
    write(tmp_path, "20230501", JUNE)
    write(tmp_path, "20230601", MAY)
    assert open_dataset(tmp_path).titles[200] == "Lamp, old"


def test_chosen_events_and_products(months: Path) -> None:
    bought = open_dataset(months / "20230501" / "000000000000.parquet", events=["buy_comp"])
    assert bought.user_ids.tolist() == [5] and dict(bought.titles) == {100: "Red shoes, sold"}
    products = open_dataset(months, item_field="product_id")
    assert [history.tolist() for history in products.histories] == [[2], [3], [1, 2, 1, 2]]
    nothing = open_dataset(months, events=["offer_make"])
    assert nothing.num_users == nothing.num_items == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"event_id": ["view"] * 2}, r"0.parquet: event_id: expected item_view, .*, got 'view'"),
        ({"stime": [1, 2]}, r"0.parquet: stime: expected timestamps, got int64"),
        ({"stime": pa.array([1, None], TIME)}, r"0.parquet: stime\[1\]: expected no missing value"),
        ({"item_id": [1.5, 2.0]}, "expected integer or string item ids, got dtype float64"),
        ({"item_id": ["a", "b"]}, "item_id: expected integers in all shards or text in all, got both"),
        ({"user_id": [None, 1]}, r"0.parquet: user_id\[0\]: expected no missing value"),
        ({"name": [1, 2]}, r"0.parquet: name: expected text, got a column of int64"),
    ],
)
def test_other_layouts_are_refused(months: Path, change: dict[str, Any], message: str) -> None:
    write(months, "20230601", JUNE | change)
    with pytest.raises((TypeError, ValueError), match=message):
        open_dataset(months)


@pytest.mark.parametrize("column", ["user_id", "item_id", "stime", "event_id", "name"])
def test_a_missing_column(months: Path, column: str) -> None:
    file = write(months, "20230601", {name: values for name, values in JUNE.items() if name != column})
    with pytest.raises(ValueError, match=f"{file}: expected a column '{column}', got"):
        open_dataset(months)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"events": ["view"]}, "events: expected some of item_view"),
        ({"events": "item_view"}, "events: expected some of item_view"),
        ({"item_field": "session_id"}, "item_field: expected 'item_id' or 'product_id', got 'session_id'"),
        ({"item_text": "title (colour)"}, r"0.parquet: expected a column 'colour', got user_id"),
    ],
)
def test_arguments(months: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_dataset(months, **options)


def test_no_shard(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected shards like 000000000000.parquet, found none"):
        read_merrec(tmp_path)
