# SPDX-License-Identifier: Apache-2.0
"""Each reader on files the test writes itself: the formats' hard cases, and what malformed files say."""

from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from patchkern.data import (
    clean_title,
    leave_one_out,
    open_dataset,
    prepare,
    read_goodreads,
    read_movielens,
    read_recbole,
)


def write(folder: Path, name: str, text: str, encoding: str = "utf-8") -> Path:
    path = folder / name
    path.write_bytes(text.encode(encoding))
    return path


# ------------------------------------------------------------------ MovieLens

MOVIELENS = {
    "100k": {
        "u.data": "7\t3\t4\t200\n7\t1\t5\t100\n9\t3\t2\t50\n7\t8\t1\t200\n",
        "u.item": "1|Misérables, Les (1995)|01-Jan-1995||u|0|1\n3|Usual Suspects, The (1995)|||u|1|0\n8|unknown|||||\n",
    },
    "1m": {
        "ratings.dat": "7::3::4::200\n7::1::5::100\n9::3::2::50\n7::8::1::200\n",
        "movies.dat": "1::Misérables, Les (1995)::Drama\n3::Usual Suspects, The (1995)::Crime|War\n8::unknown::Drama\n",
    },
    "csv": {
        "ratings.csv": "userId,movieId,rating,timestamp\n7,3,4.0,200\n7,1,5.0,100\n9,3,2.0,50\n7,8,1.0,200\n",
        "movies.csv": 'movieId,title,genres\n1,"Misérables, Les (1995)",Drama\n3,"Usual Suspects, The (1995)",Crime\n'
        "8,unknown,(no genres listed)\n",
    },
}


@pytest.mark.parametrize("encoding", ["latin-1", "utf-8"])
@pytest.mark.parametrize("version", sorted(MOVIELENS))
def test_movielens(tmp_path: Path, version: str, encoding: str) -> None:
    for name, text in MOVIELENS[version].items():
        write(tmp_path, name, text, encoding)
    data = open_dataset(tmp_path)
    assert data.titles == {1: "Misérables, Les", 3: "The Usual Suspects", 8: "unknown"}
    assert data.user_ids.tolist() == [7, 9]
    assert data.histories.timestamps is not None and data.ratings is not None
    assert data.histories.timestamps.tolist() == [100, 200, 200, 50]
    # 3 and 8 share an instant: their order is drawn, and their ratings go along
    assert [history.tolist() for history in data.histories] in ([[1, 3, 8], [3]], [[1, 8, 3], [3]])
    assert dict(zip(data.histories[0].tolist(), data.ratings.tolist(), strict=False)) == {1: 5, 3: 4, 8: 1}
    kept = open_dataset(tmp_path, tie_seed=None)
    assert [history.tolist() for history in kept.histories] == [[1, 3, 8], [3]]
    assert data.ranges == {} and data.name == tmp_path.name
    assert data.instruction is not None and "[HISTORY_SEQUENCE]" in data.instruction
    ratings_file = next(tmp_path / name for name in MOVIELENS[version] if "data" in name or "ratings" in name)
    assert open_dataset(ratings_file).titles == data.titles


def test_movielens_options_of_titles(tmp_path: Path) -> None:
    for name, text in MOVIELENS["csv"].items():
        write(tmp_path, name, text)
    assert read_movielens(tmp_path, raw_titles=True).titles[3] == "Usual Suspects, The (1995)"
    assert read_movielens(tmp_path, keep_year=True).titles[3] == "The Usual Suspects (1995)"
    assert read_movielens(tmp_path, move_article=False).titles[3] == "Usual Suspects, The"
    assert open_dataset(tmp_path, raw_titles=True).titles[8] == "unknown"


@pytest.mark.parametrize(
    ("raw", "clean", "with_year"),
    [
        ("Toy Story (1995)", "Toy Story", "Toy Story (1995)"),
        ("Matrix, The (1999)", "The Matrix", "The Matrix (1999)"),
        ("American President, The (1995) ", "The American President", "The American President (1995)"),
        ("Postman, The (Postino, Il) (1994)", "The Postman", "The Postman (1994)"),
        ("Land Before Time III (1995) (V)", "Land Before Time III", "Land Before Time III (1995)"),
        ("Postino, Il (1994)", "Postino, Il", "Postino, Il (1994)"),
        ("(500) Days of Summer (2009)", "(500) Days of Summer", "(500) Days of Summer (2009)"),
        ("Sex, Lies, and Videotape (1989)", "Sex, Lies, and Videotape", "Sex, Lies, and Videotape (1989)"),
        ("Date with an Angel (1987/I)", "Date with an Angel", "Date with an Angel (1987)"),
        ("1984", "1984", "1984"),
        ("(1995)", "(1995)", "(1995)"),
        ("unknown", "unknown", "unknown"),
    ],
)
def test_clean_title(raw: str, clean: str, with_year: str) -> None:
    assert clean_title(raw) == clean
    assert clean_title(raw, keep_year=True) == with_year


def test_title_that_holds_the_separator(tmp_path: Path) -> None:
    write(tmp_path, "ratings.dat", "1::5::3.5::10\n")
    write(tmp_path, "movies.dat", "5::Mission :: Impossible::Action\n")
    data = read_movielens(tmp_path)
    assert data.titles == {5: "Mission :: Impossible"}
    assert data.ratings is not None and data.ratings.tolist() == [3.5]


def test_quoted_commas_quotes_and_line_breaks(tmp_path: Path) -> None:
    write(tmp_path, "ratings.csv", "userId,movieId,rating,timestamp\n1,5,3,10\n")
    write(tmp_path, "movies.csv", 'movieId,title,genres\n5,"The ""Best"", Ever",x\n6,"Two\nLines",x\n')
    assert read_movielens(tmp_path).titles == {5: 'The "Best", Ever', 6: "Two\nLines"}


def test_duplicate_titles_and_gaps_in_ids_are_kept(tmp_path: Path) -> None:
    write(tmp_path, "u.data", "1\t10\t5\t1\n1\t20\t5\t2\n")
    write(tmp_path, "u.item", "20|Sabrina (1954)|\n10|Sabrina (1995)|\n4000|Other|\n")
    data = read_movielens(tmp_path)
    assert data.titles == {20: "Sabrina", 10: "Sabrina", 4000: "Other"}
    assert data.item_ids.tolist() == [20, 10, 4000]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "u.data",
            "1\t1\t5\t1\n1\t1\t5\n",
            r"u\.data, line 2: expected 4 numbers \(userId, movieId, rating, timestamp\)",
        ),
        ("u.data", "1\t1\t5\t1\n\n1\tx\t5\t3\n", r"u\.data, line 3: .* got '1\\tx\\t5\\t3'"),
        ("u.data", "1\t1\t5\t1\t0\n" * 3, r"u\.data, line 1: expected 4 numbers"),
        ("u.data", "1\t1\tnan\t1\n", r"u\.data, line 1: expected 4 numbers"),
        (
            "u.data",
            "1\t1.5\t3\t1\n",
            r"u\.data, line 1: expected 4 .* userId and movieId without sign, point or leading",
        ),
        ("u.data", "1\t1\t5\t1\n1\t007\t5\t1\n", r"u\.data, line 2: expected 4 numbers"),
        ("u.data", "1\t-1\t5\t1\n", r"u\.data, line 1: expected 4 numbers"),
        ("u.data", "1\t1\t5\t1_0\n", r"u\.data, line 1: expected 4 numbers"),
        ("u.data", "1\t1\t\t1\n", r"u\.data, line 1: expected 4 numbers"),
        ("u.data", "\t\t\t\n", r"u\.data, line 1: expected 4 numbers"),
        ("u.data", "1\t1\t5\t9" + "9" * 400 + "\n", r"u\.data, line 1: expected 4 numbers"),
        ("u.data", "1\t1\t5\t1\n1\t2\t5\té\n", r"u\.data, line 2: expected 4 numbers"),
        ("u.data", "1\t77\t5\t1\n", r"histories: expected items with a title, got 77 without one"),
        ("u.item", "Two\n", r"u\.item, line 1: expected an id and a title separated by '\|', got 'Two'"),
        ("u.item", "1|A|\nTwo\n", r"u\.item, line 2: expected 3 values separated by '\|', got 'Two'"),
        ("u.item", "1|A|x\n2|Either|Or|x\n", r"u\.item, line 2: expected 3 values separated by '\|'"),
        ("u.item", "1|A|\nx|B|\n", r"u\.item, line 2: expected an integer id and a title, got 'x B'"),
        ("u.item", "1|A|\n2| |\n", r"u\.item, line 2: expected an integer id and a title"),
        ("u.item", "1|A|\n1|B|\n", r"u\.item, line 2: expected one title for each id, 'A' for 1, got 'B'"),
    ],
)
def test_malformed_movielens(tmp_path: Path, name: str, text: str, message: str) -> None:
    for good, lines in {"u.data": "1\t1\t5\t1\n", "u.item": "1|A|\n"}.items():
        write(tmp_path, good, lines)
    write(tmp_path, name, text)
    with pytest.raises(ValueError, match=message):
        read_movielens(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,name\n", r"movies\.csv, line 1: expected a header with movieId and title"),
        ("1,A,x\n", r"movies\.csv, line 1: expected a header with movieId and title, got '1,A,x'"),
        ("movieId,title,title\n", r"movies\.csv: expected one column 'title', got movieId, title, title"),
        ("movieId,title,genres\n1,A,x\n7\n", r"movies\.csv, line 3: expected 3 values separated by ','"),
        ("movieId,title,genres\n1,A, the film,x\n", r"movies\.csv, line 2: expected 3 values"),
        ("movieId,title,genres\n007,A,x\n", r"movies\.csv, line 2: expected an integer id and a title"),
        ('movieId,title,genres\n1,"A,x\n', r"movies\.csv, line 2: expected a closing quote for each"),
    ],
)
def test_malformed_movies_csv(tmp_path: Path, text: str, message: str) -> None:
    write(tmp_path, "ratings.csv", "userId,movieId,rating,timestamp\n1,1,3,10\n")
    write(tmp_path, "movies.csv", text)
    with pytest.raises(ValueError, match=message):
        read_movielens(tmp_path)


def test_malformed_line_far_down(tmp_path: Path) -> None:
    """Blocks of lines are parsed at once; the complaint still names the line."""
    write(tmp_path, "ratings.dat", "1::1::3::5\n" * 70_000 + "1::1::3\n")
    write(tmp_path, "movies.dat", "1::A::x\n")
    with pytest.raises(ValueError, match=r"ratings\.dat, line 70001: expected 4 numbers"):
        read_movielens(tmp_path)


def test_movielens_without_titles_file(tmp_path: Path) -> None:
    write(tmp_path, "u.data", "1\t1\t5\t1\n")
    with pytest.raises(FileNotFoundError, match=r"u\.item: expected the titles beside u\.data"):
        read_movielens(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"expected a folder with u\.data, ratings\.dat, ratings\.csv"):
        read_movielens(tmp_path / "nowhere")


# ------------------------------------------------------------------ Goodreads


def goodreads(folder: Path, rows: list[dict[str, Any]], books: list[dict[str, Any]], packed: bool) -> Path:
    for name, records in (("goodreads_interactions_poetry.json", rows), ("goodreads_books_poetry.json", books)):
        text = "".join(json.dumps(record) + "\n" for record in records).encode()
        (folder / f"{name}.gz").write_bytes(gzip.compress(text)) if packed else (folder / name).write_bytes(text)
    return folder


def rated(user: str, book: str, rating: int, added: str) -> dict[str, Any]:
    return {"user_id": user, "book_id": book, "rating": rating, "date_added": added, "read_at": "", "is_read": True}


GOODREADS_ROWS = [
    rated("b", "20", 5, "Sun Jul 30 07:44:10 -0700 2017"),
    rated("b", "10", 2, "Sun Jul 30 14:44:09 +0000 2017"),
    rated("a", "30", 4, "Thu Jan 01 01:00:00 +0100 1970"),
    rated("a", "10", 4, "Wed Feb 29 00:00:00 +0000 2012"),
]
GOODREADS_BOOKS = [
    {"book_id": "10", "title": "Dune (Dune, #1)", "title_without_series": "Dune"},
    {"book_id": "99", "title": "Never read", "title_without_series": "Never read"},
    {"book_id": "20", "title": " Émile ", "title_without_series": "Émile"},
    {"book_id": "30", "title": "Ulysses", "title_without_series": "Ulysses"},
]


@pytest.mark.parametrize("packed", [False, True])
def test_goodreads(tmp_path: Path, packed: bool) -> None:
    data = open_dataset(goodreads(tmp_path, GOODREADS_ROWS, GOODREADS_BOOKS, packed))
    assert data.titles == {10: "Dune (Dune, #1)", 20: "Émile", 30: "Ulysses"}
    assert data.user_ids.tolist() == ["a", "b"]
    assert [history.tolist() for history in data.histories] == [[30, 10], [10, 20]]
    assert data.histories.timestamps is not None
    assert data.histories.timestamps.tolist() == [0, 1330473600, 1501425849, 1501425850]
    assert read_goodreads(tmp_path, rating_above=4).histories.items.tolist() == [20]
    assert read_goodreads(tmp_path, title_field="title_without_series").titles[10] == "Dune"


def test_goodreads_leaves_out_what_has_no_title_or_date(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [*GOODREADS_ROWS, rated("c", "77", 5, GOODREADS_ROWS[0]["date_added"]), rated("a", "20", 5, "")]
    books = [*GOODREADS_BOOKS, {"book_id": "77", "title": " "}]
    with caplog.at_level(logging.WARNING, logger="patchkern.data"):
        data = read_goodreads(goodreads(tmp_path, rows, books, False))
    assert data.num_interactions == 4 and data.user_ids.tolist() == ["a", "b"]
    assert "interactions left out: 1 without date_added, 1 with a book without title" in caplog.text


def test_goodreads_without_anything(tmp_path: Path) -> None:
    data = read_goodreads(goodreads(tmp_path, GOODREADS_ROWS, GOODREADS_BOOKS, True), time_field="read_at")
    assert data.num_users == 0 and data.num_interactions == 0


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("interactions", '{"user_id": "a"', r"interactions_x\.json, line 1: expected one JSON object"),
        ("interactions", "[1]", r"interactions_x\.json, line 1: expected one JSON object, got '\[1\]'"),
        ("interactions", '{"user_id": "a", "book_id": "x", "rating": 1, "date_added": ""}', r"integer book_id"),
        ("interactions", '{"user_id": "a", "rating": 1, "date_added": ""}', r"got \"KeyError: 'book_id'\""),
        (
            "interactions",
            '{"user_id": "a", "book_id": "1", "rating": 1, "date_added": "2017-01-01"}',
            r"line 1: expected a date like 'Sun Jul 30 07:44:10 -0700 2017', got '2017-01-01'",
        ),
        (
            "interactions",
            '{"user_id": "a", "book_id": "1", "rating": 1, "date_added": "Sun Jul 99 07:44:10 -0700 2017"}',
            r"line 1: expected a date like",
        ),
        ("books", '{"book_id": "1"}', r"books_x\.json, line 1: expected an object with integer book_id and title"),
    ],
)
def test_malformed_goodreads(tmp_path: Path, file: str, text: str, message: str) -> None:
    write(tmp_path, "goodreads_interactions_x.json", text if file == "interactions" else "")
    write(tmp_path, "goodreads_books_x.json", text if file == "books" else "")
    with pytest.raises(ValueError, match=message):
        open_dataset(tmp_path)


def test_damaged_gzip(tmp_path: Path) -> None:
    goodreads(tmp_path, GOODREADS_ROWS * 1000, GOODREADS_BOOKS, True)
    file = tmp_path / "goodreads_interactions_poetry.json.gz"
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(ValueError, match="expected a whole gzip file, damaged after line"):
        read_goodreads(tmp_path)


def test_goodreads_files_are_missing_or_too_many(tmp_path: Path) -> None:
    write(tmp_path, "goodreads_interactions_x.json", "")
    with pytest.raises(FileNotFoundError, match="expected the books, a file like"):
        open_dataset(tmp_path)
    write(tmp_path, "goodreads_interactions_y.json", "")
    with pytest.raises(ValueError, match=r"goodreads_interactions_x\.json, goodreads_interactions_y\.json"):
        open_dataset(tmp_path)


# ------------------------------------------------------------------ RecBole

INTER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"


def test_recbole(tmp_path: Path) -> None:
    write(tmp_path, "toy.inter", INTER + "u2\t7\t4\t20.9\nu1\t7\t3\t5\nu2\t12\t5\t20.1\n")
    write(
        tmp_path, "toy.item", "item_id:token\tmovie_title:token_seq\tclass:token_seq\n7\tÉmile the Cat\tx\n12\tDog\ty\n"
    )
    data = open_dataset(tmp_path)
    assert data.name == "toy"
    assert data.titles == {7: "Émile the Cat", 12: "Dog"}
    assert data.user_ids.tolist() == ["u1", "u2"]
    # by tenths of a second, not in the order of the file
    assert [history.tolist() for history in data.histories] == [[7], [12, 7]]
    assert data.histories.timestamps is not None and data.histories.timestamps.tolist() == [5, 20.1, 20.9]
    assert open_dataset(tmp_path / "toy.inter").histories.items.tolist() == data.histories.items.tolist()


def test_recbole_string_ids_no_times_and_items_without_title(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, "toy.inter", "item_id:token\tuser_id:token\nb\t2\n007\t2\nb\t1\nzz\t1\n")
    write(tmp_path, "toy.item", "item_id:token\ttitle:token_seq\n007\tBond\nb\tBee\nzz\t\n")
    with caplog.at_level(logging.WARNING, logger="patchkern.data"):
        data = read_recbole(tmp_path)
    assert "interactions left out: 1 with an item without title" in caplog.text
    assert "no column timestamp, the rows are taken to be in order of time" in caplog.text
    assert data.titles == {"007": "Bond", "b": "Bee"}
    assert data.user_ids.tolist() == [1, 2]
    assert [history.tolist() for history in data.histories] == [["b"], ["b", "007"]]
    assert data.histories.timestamps is None and data.ratings is None
    assert prepare(data, min_interactions=1).ranges["train"].tolist() == leave_one_out(data).ranges["train"].tolist()


@pytest.mark.parametrize(
    ("inter", "item", "message"),
    [
        (INTER + "1\t2\t3\n", None, r"toy\.inter, line 2: expected 4 values separated by '\\t'"),
        (INTER + "1\t2\tx\t5\n", None, r"toy\.inter, line 2: expected a number as rating, got 'x'"),
        (INTER + "1\t2\t3\tinf\n", None, r"toy\.inter, line 2: expected a number as timestamp, got 'inf'"),
        (INTER + "1\t\t3\t5\n", None, r"toy\.inter, line 2: expected a user_id and a item_id"),
        ("user_id\titem_id\n", None, r"toy\.inter, line 1: expected a header of name:type columns"),
        ("user_id:token\tx:token\n", None, r"toy\.inter: expected a column 'item_id', got user_id, x"),
        (INTER, "item_id:token\tyear:token\n", r"toy\.item: expected a column of titles \(title, .*got item_id, year"),
        (
            INTER,
            "item_id:token\ttitle:token\n2\tA\n2\tB\n",
            r"toy\.item, line 3: expected one title for each id, 'A' for '2', got 'B'",
        ),
    ],
)
def test_malformed_recbole(tmp_path: Path, inter: str, item: str | None, message: str) -> None:
    write(tmp_path, "toy.inter", inter)
    write(tmp_path, "toy.item", item or "item_id:token\ttitle:token_seq\n2\tTwo\n")
    with pytest.raises(ValueError, match=message):
        read_recbole(tmp_path)


@pytest.mark.parametrize("field", ["time_field", "rating_field"])
def test_recbole_columns_that_are_named_must_be_there(tmp_path: Path, field: str) -> None:
    write(tmp_path, "toy.inter", INTER + "1\t2\t3\t4\n")
    write(tmp_path, "toy.item", "item_id:token\ttitle:token_seq\n2\tTwo\n")
    with pytest.raises(ValueError, match=r"toy\.inter: expected a column 'stars', got user_id, item_id, rating, time"):
        read_recbole(tmp_path, **{field: "stars"})  # type: ignore[arg-type]


def test_recbole_without_items(tmp_path: Path) -> None:
    write(tmp_path, "toy.inter", INTER)
    with pytest.raises(FileNotFoundError, match=r"toy\.item: expected the titles"):
        open_dataset(tmp_path)


# ------------------------------------------------------------------ sniffing


def test_open_dataset_says_what_it_looked_for(tmp_path: Path) -> None:
    looked_for = r"none of: histories\.parquet .*interactions\.parquet .*u\.data, ratings\.dat, .*\.inter .*goodreads_"
    write(tmp_path, "seq.df", "a pickle, never opened")
    with pytest.raises(ValueError, match=looked_for):
        open_dataset(tmp_path)
    with pytest.raises(ValueError, match=looked_for):
        open_dataset(tmp_path / "seq.df")
    with pytest.raises(FileNotFoundError, match="path: expected a folder or file of data, found nothing at"):
        open_dataset(tmp_path / "absent")
