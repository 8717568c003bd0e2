# SPDX-License-Identifier: Apache-2.0
"""Amazon Reviews 2023: both forms of reviews, products with their fields, what is refused."""

from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from patchkern.data import open_dataset, read_amazon

REVIEWS: list[dict[str, Any]] = [
    {"rating": 5.0, "title": "Great", "text": "...", "asin": "B1x", "parent_asin": "B1", "user_id": "AX",
     "timestamp": 1588615855070, "verified_purchase": True},
    {"rating": 2.0, "title": "", "text": "", "asin": "B2x", "parent_asin": "B2", "user_id": "AX",
     "timestamp": 1588615855069},
    {"rating": 4, "title": "", "text": "", "asin": "0439", "parent_asin": "0439", "user_id": "AB",
     "timestamp": 1588615855071},
    {"rating": 1.0, "asin": "B9", "parent_asin": "B9", "user_id": "AB", "timestamp": 1588615855072},
]  # fmt: skip
ITEMS: list[dict[str, Any]] = [
    {"main_category": "Toys", "title": "Blue  ball", "store": "Acme", "price": 9.5, "categories": ["Toys", "Balls"],
     "details": {"Brand": "Bounce"}, "parent_asin": "B1"},
    {"main_category": None, "title": "Red ball", "store": None, "price": None, "categories": [], "details": {},
     "parent_asin": "B2"},
    {"title": "A book", "store": "", "categories": ["Books"], "parent_asin": "0439"},
    {"title": "", "parent_asin": "B9"},
    {"title": "Nobody's", "parent_asin": "B8"},
]  # fmt: skip


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    data = text.encode()
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return path


def lines(records: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def csv(records: list[dict[str, Any]], history: bool = False) -> str:
    rows = [["user_id", "parent_asin", "rating", "timestamp", *(["history"] if history else [])]]
    rows += [[record[name] for name in rows[0][:4]] + (["B7 B8"] if history else []) for record in records]
    return "".join(",".join(map(str, row)) + "\n" for row in rows)


@pytest.mark.parametrize("gz", ["", ".gz"])
@pytest.mark.parametrize("form", ["jsonl", "csv", "history"])
def test_both_forms(tmp_path: Path, caplog: pytest.LogCaptureFixture, form: str, gz: str) -> None:
    text = lines(REVIEWS) if form == "jsonl" else csv(REVIEWS, form == "history")
    reviews = write(tmp_path, f"Toys.{'jsonl' if form == 'jsonl' else 'csv'}{gz}", text)
    write(tmp_path, f"meta_Toys.jsonl{gz}", lines(ITEMS))
    with caplog.at_level(logging.WARNING, "patchkern.data"):
        data = open_dataset(tmp_path)
    assert "interactions left out: 1 with an item without title" in caplog.text
    assert data.user_ids.tolist() == ["AB", "AX"] and data.name == "Toys"
    assert [history.tolist() for history in data.histories] == [["0439"], ["B2", "B1"]]
    assert data.histories.timestamps.tolist() == [1588615855.071, 1588615855.069, 1588615855.07]
    assert data.ratings.tolist() == [4, 2, 5]
    assert data.titles == {"B1": "Blue ball", "B2": "Red ball", "0439": "A book"} and data.texts is None
    # the file itself, and fewer of its rows
    again = open_dataset(reviews, rating_above=2)
    assert again.user_ids.tolist() == ["AB", "AX"] and again.histories.items.tolist() == ["0439", "B1"]


def test_texts(tmp_path: Path) -> None:
    write(tmp_path, "Toys.jsonl", lines(REVIEWS))
    write(tmp_path, "meta_Toys.jsonl", lines(ITEMS))
    data = open_dataset(tmp_path, item_text="title (store, categories, price, details.Brand)")
    assert data.texts == {
        "B1": "Blue ball (Acme, Toys, Balls, 9.5, Bounce)", "B2": "Red ball", "0439": "A book (Books)",
    }  # fmt: skip
    assert open_dataset(tmp_path, item_text="store (title)").texts["0439"] == "A book (A book)"
    with pytest.raises(
        ValueError, match=r"expected a field 'brand' of some item \(item_text\), got main_category, title"
    ):
        open_dataset(tmp_path, item_text="title (brand)")
    with pytest.raises(ValueError, match=r"meta_Toys.jsonl, line 1: expected text, a number or a list .* as details"):
        open_dataset(tmp_path, item_text="title (details)")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"timestamp": "1588615855070"}, "line 2: expected an object with text as user_id and parent_asin"),
        ({"timestamp": True}, "line 2: expected an object"),
        ({"rating": None}, "line 2: expected an object"),
        ({"rating": float("nan")}, "line 2: expected an object"),
        ({"user_id": " AX"}, "line 2: expected a user_id of 1 to"),
        ({"parent_asin": 7}, "line 2: expected an object"),
    ],
)
def test_reviews_are_refused_by_line(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    write(tmp_path, "Toys.jsonl", lines([REVIEWS[0], REVIEWS[1] | change]))
    write(tmp_path, "meta_Toys.jsonl", lines(ITEMS))
    with pytest.raises(ValueError, match=message):
        open_dataset(tmp_path)


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected a file like meta_"):
        read_amazon(tmp_path)
    write(tmp_path, "meta_Toys.jsonl", lines(ITEMS))
    with pytest.raises(FileNotFoundError, match=r"expected one of Toys.jsonl, .* beside meta_Toys.jsonl, found none"):
        open_dataset(tmp_path)
    part = write(tmp_path, "Toys.test.csv", csv(REVIEWS))
    for path in (tmp_path, part):
        with pytest.raises(ValueError, match="expected all reviews of Toys in one file, got a part of a split"):
            open_dataset(path)
    write(tmp_path, "Toys.csv", csv(REVIEWS).replace("parent_asin", "asin"))
    with pytest.raises(ValueError, match="expected a column 'parent_asin', got user_id, asin, rating, timestamp"):
        open_dataset(tmp_path)
    write(tmp_path, "Toys.csv", csv(REVIEWS).replace("1588615855070", "1588615855.5"))
    with pytest.raises(ValueError, match="line 2: expected milliseconds since 1970 as timestamp"):
        open_dataset(tmp_path)
    write(tmp_path, "Toys.jsonl.gz", lines(REVIEWS))
    with pytest.raises(ValueError, match="expected one file like"):
        open_dataset(tmp_path)
