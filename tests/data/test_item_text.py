# SPDX-License-Identifier: Apache-2.0
"""Texts of several fields: their form, every reader's fields, what goes with them, the recipes' flag."""

from __future__ import annotations

import argparse
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from patchkern.data import Interactions, from_tables, k_core, most_frequent_items, open_dataset, write_parquet
from patchkern.data.item_text import ItemText, as_text, field_of
from patchkern.data.preparation import add_arguments, load


@pytest.mark.parametrize(
    ("form", "first", "others"),
    [
        ("title", "title", ()),
        ("title (brand, category)", "title", ("brand", "category")),
        (" name(a b ,details.Brand) ", "name", ("a b", "details.Brand")),
    ],
)
def test_forms(form: str, first: str, others: tuple[str, ...]) -> None:
    text = ItemText.parse(form)
    assert text == ItemText(first, others) and ItemText.parse(None) is None
    assert text.fields == tuple(name for name in (first, *others) if name != "title")


@pytest.mark.parametrize(
    "form", ["", "title ()", "title, brand", "title (a,)", "title (a) b", "(a)", "a (a)", "a (b (c))"]
)
def test_other_forms_are_refused(form: str) -> None:
    with pytest.raises(ValueError, match="item_text: expected a field and perhaps others in brackets"):
        ItemText.parse(form)
    with pytest.raises(TypeError, match="item_text: expected text, got int"):
        ItemText.parse(7)  # type: ignore[arg-type]


def test_what_an_item_lacks_is_left_out() -> None:
    text = ItemText("brand", ("title", "year"))
    assert text.of("Alien", ["Fox", "1979"]) == "Fox (Alien, 1979)"
    assert text.of("Alien", ["", "1979"]) == "Alien (Alien, 1979)"
    assert ItemText("title", ("year",)).of("Alien", [""]) == "Alien"


def test_values() -> None:
    values: list[Any] = [None, " a\n b ", 3, 4.0, 4.25, float("nan"), ["a", None, ("b", 1)], []]
    assert [as_text(value) for value in values] == ["", "a b", "3", "4", "4.25", "", "a, b, 1", ""]
    # no number in scientific notation; those of NumPy, and arrays where pandas has them for lists
    values = [1234567.0, 123456.75, np.float32(19.99), np.int64(7), np.array(["a", None, "b"], object), np.array([])]
    assert [as_text(value) for value in values] == ["1234567", "123457", "19.99", "7", "a, b", ""]
    for value in (True, np.True_, {"a": 1}, [b"a"]):
        with pytest.raises(TypeError, match="expected text, a number or a list of these"):
            as_text(value)
    record = {"a": {"b": {"c": 1}}, "d.e": 2, "f": 3}
    assert [field_of(record, name) for name in ("a.b.c", "d.e", "f", "f.g", "x", "a.x")] == [1, 2, 3, None, None, None]


# ------------------------------------------------------------------ readers

MOVIELENS = {
    "u": {
        "u.data": "7\t3\t4\t200\n9\t1\t5\t100\n",
        "u.item": f"1|Heat (1995)|||u|{'0|' * 6}1|{'0|' * 11}0\n3|Alien|||u|{'0|' * 11}1|0|0|0|1|{'0|' * 2}0\n",
    },
    "dat": {
        "ratings.dat": "7::3::4::200\n9::1::5::100\n",
        "movies.dat": "1::Heat (1995)::Crime\n3::Alien::Horror|Sci-Fi\n",
    },
    "csv": {
        "ratings.csv": "userId,movieId,rating,timestamp\n7,3,4.0,200\n9,1,5.0,100\n",
        "movies.csv": "movieId,title,genres\n1,Heat (1995),Crime\n3,Alien,Horror|Sci-Fi\n",
    },
}


@pytest.mark.parametrize("files", MOVIELENS.values(), ids=MOVIELENS)
def test_movielens(tmp_path: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    data = open_dataset(tmp_path, item_text="title (year, genres)")
    assert data.titles == {1: "Heat", 3: "Alien"}
    assert data.texts == {1: "Heat (1995, Crime)", 3: "Alien (Horror, Sci-Fi)"}
    with pytest.raises(ValueError, match=r"expected a field 'director' of some item \(item_text\), got genres, year"):
        open_dataset(tmp_path, item_text="title (director)")


def test_recbole(tmp_path: Path) -> None:
    (tmp_path / "x.inter").write_text("user_id:token\titem_id:token\ttimestamp:float\n1\t10\t5\n1\t11\t6\n")
    items = "item_id:token\tname:token_seq\tgenre:token_seq\tyear:float\n10\tAlien\tHorror SF\t1979\n11\tHeat\t\tnan\n"
    (tmp_path / "x.item").write_text(items)
    data = open_dataset(tmp_path, item_text="title (genre, year)")
    assert data.titles == {10: "Alien", 11: "Heat"} and data.texts == {10: "Alien (Horror SF, 1979)", 11: "Heat"}
    assert open_dataset(tmp_path, item_text="name (year)").texts == {10: "Alien (1979)", 11: "Heat"}
    with pytest.raises(ValueError, match="expected a column 'brand', got item_id, name, genre, year"):
        open_dataset(tmp_path, item_text="title (brand)")


def test_goodreads(tmp_path: Path) -> None:
    record = '{"user_id": "u", "book_id": 5, "rating": 4, "date_added": "Sun Jul 30 07:44:10 -0700 2017"}\n'
    (tmp_path / "goodreads_interactions.json").write_text(record)
    books = '{"book_id": "5", "title": "Emma", "publisher": "Murray", "authors": [{"author_id": 1}]}\n'
    (tmp_path / "goodreads_books.json").write_text(books)
    assert open_dataset(tmp_path, item_text="title (publisher)").texts == {5: "Emma (Murray)"}
    with pytest.raises(ValueError, match="line 1: expected text, a number or a list of these as authors"):
        open_dataset(tmp_path, item_text="title (authors)")


ROWS: dict[str, Any] = {"user_id": [7, 7, 9], "item_id": [3, 1, 3], "timestamp": [200, 100, 50]}
ITEMS: dict[str, Any] = {
    "item_id": [1, 3, 8], "title": ["Heat", "Alien", " "], "brand": ["W", None, "x"], "price": [2.5, float("nan"), 1.0],
}  # fmt: skip
TEXTS = {1: "Heat (W, 2.5)", 3: "Alien"}


def test_tables_and_parquet(tmp_path: Path) -> None:
    data = from_tables(ROWS, ITEMS, item_text="title (brand, price)")
    assert data.texts == TEXTS
    assert (
        from_tables(ROWS, {**ITEMS, "price": np.array(ITEMS["price"])}, item_text="title (brand, price)").texts == TEXTS
    )
    with pytest.raises(
        ValueError, match=r"items: expected a column 'x' \(item_text\), got item_id, title, brand, price"
    ):
        from_tables(ROWS, ITEMS, item_text="title (x)")
    with pytest.raises(TypeError, match="items: brand, row 0: expected text, a number or a list of these, got bool"):
        from_tables(ROWS, {**ITEMS, "brand": [True] * 3}, item_text="title (brand)")
    with pytest.raises(ValueError, match="items: expected columns of one length, got 1 and 3"):
        from_tables(ROWS, {**ITEMS, "brand": ["Fox"]}, item_text="title (brand)")
    lists = np.empty(3, object)
    lists[:] = [np.array(["W", "Fox"]), None, np.array([])]
    listed = from_tables(ROWS, {**ITEMS, "brand": lists}, item_text="title (brand)")
    assert listed.texts == {1: "Heat (W, Fox)", 3: "Alien"}
    pa = pytest.importorskip("pyarrow", reason="needs pyarrow")
    pq = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow")
    assert from_tables(pa.table(ROWS), pa.table(ITEMS), item_text="title (brand, price)").texts == TEXTS
    (tmp_path / "two").mkdir()
    pq.write_table(pa.table(ROWS), tmp_path / "two" / "interactions.parquet")
    pq.write_table(pa.table(ITEMS), tmp_path / "two" / "items.parquet")
    assert open_dataset(tmp_path / "two", item_text="title (brand, price)").texts == TEXTS
    # texts are written and read back; other fields of the same form are read where they are named
    write_parquet(data, tmp_path / "own")
    again = open_dataset(tmp_path / "own")
    assert again.texts == TEXTS and again.titles == data.titles
    assert open_dataset(tmp_path / "own", item_text="title (text)").texts[3] == "Alien (Alien)"
    with pytest.raises(ValueError, match="expected a column 'brand', got item, title, text"):
        open_dataset(tmp_path / "own", item_text="title (brand)")


# ------------------------------------------------------------------ the data set


def test_texts_go_with_their_items() -> None:
    data = from_tables(ROWS, ITEMS, item_text="title (brand, price)")
    assert pickle.loads(pickle.dumps(data)).texts == TEXTS
    assert most_frequent_items(data, 1).texts == {3: "Alien"} and k_core(data, 1).texts == TEXTS
    about = {"users": [1], "items": [5], "timestamps": None, "titles": {5: "a"}}
    with pytest.raises(ValueError, match="texts: expected one for each title, got a title without text, of 5"):
        Interactions.from_columns(**about, texts={})
    with pytest.raises(ValueError, match="texts: expected one for each title, got a text without title, of 6"):
        Interactions.from_columns(**about, texts={5: "a", 6: "b"})
    with pytest.raises(ValueError, match=r"texts\[5\]: expected a text, got ' '"):
        Interactions.from_columns(**about, texts={5: " "})
    with pytest.raises(TypeError, match="texts: expected a mapping of item id to text, got list"):
        Interactions.from_columns(**about, texts=["a"])


def test_the_flag(tmp_path: Path) -> None:
    for name, text in MOVIELENS["dat"].items():
        (tmp_path / name).write_text(text)
    parser = argparse.ArgumentParser()
    add_arguments(parser, item_text=True)
    flags = ["--data", str(tmp_path), "--min_interactions", "1", "--item_text", "title (genres)"]
    assert load(parser.parse_args(flags)).texts == {1: "Heat (Crime)", 3: "Alien (Horror, Sci-Fi)"}
    with pytest.raises(ValueError, match="--item_text: expected none with --data synthetic"):
        load(parser.parse_args(["--data", "synthetic", "--item_text", "title"]))
    without = argparse.ArgumentParser()
    add_arguments(without)
    assert load(without.parse_args(flags[:4])).texts is None
