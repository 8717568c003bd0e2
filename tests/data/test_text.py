# SPDX-License-Identifier: Apache-2.0
"""Text as it really comes: marks, encodings, line ends, quotes, headers in any order, and files that ask for gigabytes.

Every reader opens text in one way, so each kind of fault is tried on all files that it can be in.
"""

from __future__ import annotations

import codecs
import gzip
import json
import logging
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from patchkern.data import Interactions, open_dataset
from patchkern.data._text import MAX_LINE, read_lines

RATINGS = "userId,movieId,rating,timestamp\n7,3,4.0,200\n7,1,5.0,100\n9,3,2.0,50\n"
MOVIES = 'movieId,title,genres\n1,"Misérables, Les (1995)",Drama\n3,Heat (1995),Crime|War\n'
FORMATS: dict[str, dict[str, str]] = {
    "u.data": {
        "u.data": "7\t3\t4\t200\n7\t1\t5\t100\n9\t3\t2\t50\n",
        "u.item": "1|Misérables, Les (1995)|01-Jan-1995\n3|Heat (1995)|x\n",
    },
    "ratings.dat": {
        "ratings.dat": "7::3::4::200\n7::1::5::100\n9::3::2::50\n",
        "movies.dat": "1::Misérables, Les (1995)::Drama\n3::Heat (1995)::Crime|War\n",
    },
    "ratings.csv": {"ratings.csv": RATINGS, "movies.csv": MOVIES},
    "x.inter": {
        "x.inter": "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
        "7\t3\t4\t200\n7\t1\t5\t100\n9\t3\t2\t50\n",
        "x.item": "item_id:token\ttitle:token_seq\n1\tMisérables, Les\n3\tHeat\n",
    },
    "goodreads": {
        "goodreads_interactions_x.json": "".join(
            json.dumps({"user_id": user, "book_id": book, "rating": rating, "date_added": date}) + "\n"
            for user, book, rating, date in (
                ("7", "3", 4, "Thu Jan 01 00:03:20 +0000 1970"),
                ("7", "1", 5, "Thu Jan 01 00:01:40 +0000 1970"),
                ("9", "3", 2, "Thu Jan 01 00:00:50 +0000 1970"),
            )
        ),
        "goodreads_books_x.json": '{"book_id": "1", "title": "Misérables, Les"}\n{"book_id": "3", "title": "Heat"}\n',
    },
}
FILES = [(name, file) for name, files in FORMATS.items() for file in files]
LATIN1 = [("u.data", "u.item"), ("ratings.dat", "movies.dat"), ("ratings.csv", "movies.csv")]


def put(folder: Path, files: dict[str, Any]) -> Path:
    for name, content in files.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def check(data: Interactions) -> None:
    assert [history.tolist() for history in data.histories] == [[1, 3], [3]]
    assert [str(user) for user in data.user_ids.tolist()] == ["7", "9"]
    assert data.histories.timestamps is not None and data.histories.timestamps.tolist() == [100, 200, 50]
    assert data.ratings is not None and data.ratings.tolist() == [5, 4, 2]
    assert data.titles[1] in ("Misérables, Les", "Les Misérables") and data.titles[3] == "Heat"


@pytest.mark.parametrize("change", ["as it is", "mark", "CRLF", "no last line end", "empty lines", "gzip"])
@pytest.mark.parametrize(("name", "file"), FILES)
def test_every_file_in_every_harmless_form(tmp_path: Path, name: str, file: str, change: str) -> None:
    content = FORMATS[name][file].encode()
    forms = {
        "as it is": content,
        "mark": codecs.BOM_UTF8 + content,
        "CRLF": content.replace(b"\n", b"\r\n"),
        "no last line end": content.rstrip(b"\n"),
        "empty lines": content.replace(b"\n", b"\n\n") + b"  \n\n",
        "gzip": gzip.compress(content),
    }
    check(open_dataset(put(tmp_path, FORMATS[name] | {file: forms[change]})))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("UTF-16", "expected UTF-8 text, got the byte-order mark of UTF-16"),
        ("UTF-32", "expected UTF-8 text, got the byte-order mark of UTF-32"),
        ("UTF-16 without mark", r"line 1: expected UTF-8 text without NUL characters \(is it UTF-16, or no text\?\)"),
        ("second mark", r"line 2: expected a byte-order mark at the beginning of the file only"),
        ("old Mac", r"line 1: expected lines that end in a line feed, without carriage returns within"),
        ("one carriage return", r"line 2: expected lines that end in a line feed"),
        ("long line", rf"line 2: expected at most {MAX_LINE} bytes, got more"),
        ("cut gzip", "expected a whole gzip file, damaged after line"),
    ],
)
@pytest.mark.parametrize(("name", "file"), FILES)
def test_every_file_in_forms_that_are_refused(tmp_path: Path, name: str, file: str, change: str, message: str) -> None:
    content = FORMATS[name][file].encode()
    lines = content.splitlines(keepends=True)
    forms = {
        "UTF-16": content.decode().encode("utf-16"),
        "UTF-32": content.decode().encode("utf-32"),
        "UTF-16 without mark": content.decode().encode("utf-16-be"),
        "second mark": lines[0] + codecs.BOM_UTF8 + b"".join(lines[1:]),
        "old Mac": content.replace(b"\n", b"\r"),
        "one carriage return": lines[0] + lines[1][:3] + b"\r" + lines[1][3:],
        "long line": lines[0] + b"1" * (MAX_LINE + 1),
        "cut gzip": gzip.compress(content)[:-9],
    }
    with pytest.raises(ValueError, match=f"{file}.*{message}"):
        open_dataset(put(tmp_path, FORMATS[name] | {file: forms[change]}))


def test_a_line_of_a_gigabyte_in_a_megabyte_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "u.data"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(64):
            file.write(b"1" * (1 << 20))
    tracemalloc.start()
    with pytest.raises(ValueError, match="line 1: expected at most"):
        list(read_lines(path))
    assert tracemalloc.get_traced_memory()[1] < 16 * MAX_LINE
    tracemalloc.stop()


# ------------------------------------------------------------------ encodings


@pytest.mark.parametrize(("name", "file"), LATIN1)
def test_latin1_titles_of_older_files(tmp_path: Path, name: str, file: str, caplog: pytest.LogCaptureFixture) -> None:
    check(open_dataset(put(tmp_path, FORMATS[name] | {file: FORMATS[name][file].encode("latin-1")})))
    assert "latin-1" not in caplog.text


@pytest.mark.parametrize(("name", "file"), LATIN1)
def test_a_file_of_both_encodings_is_read_line_by_line(
    tmp_path: Path, name: str, file: str, caplog: pytest.LogCaptureFixture
) -> None:
    text = FORMATS[name][file]
    extra = text.splitlines()[-1].replace("3", "8", 1).replace("Heat", "Amélie") + "\n"
    mixed = text.encode("latin-1") + extra.encode("utf-8")
    with caplog.at_level(logging.WARNING, logger="patchkern.data"):
        data = open_dataset(put(tmp_path, FORMATS[name] | {file: mixed}))
    check(data)
    assert data.titles[8] == "Amélie"
    where = 2 if file == "movies.csv" else 1
    assert f"1 lines are latin-1, the first is {where}, and 1 are UTF-8; each was read as what it is" in caplog.text


@pytest.mark.parametrize("title", [b"caf\xe9 and caf\xc3\xa9", b"it\x92s cp1252"])
@pytest.mark.parametrize(("name", "file"), LATIN1)
def test_a_line_of_both_encodings_or_another_is_refused(tmp_path: Path, name: str, file: str, title: bytes) -> None:
    content = FORMATS[name][file].encode().replace(b"Heat", title)
    line = 3 if file == "movies.csv" else 2
    with pytest.raises(ValueError, match=rf"line {line}: expected a line that is UTF-8 or latin-1 throughout"):
        open_dataset(put(tmp_path, FORMATS[name] | {file: content}))


@pytest.mark.parametrize(("name", "file"), [("x.inter", "x.item"), ("goodreads", "goodreads_books_x.json")])
def test_formats_that_are_always_utf8(tmp_path: Path, name: str, file: str) -> None:
    content = FORMATS[name][file].encode("latin-1")
    line = 2 if file == "x.item" else 1
    with pytest.raises(ValueError, match=rf"line {line}: expected UTF-8 text"):
        open_dataset(put(tmp_path, FORMATS[name] | {file: content}))


def test_a_mark_within_a_title_stays_and_within_an_id_is_refused(tmp_path: Path) -> None:
    files = FORMATS["x.inter"]
    data = open_dataset(put(tmp_path, files | {"x.item": files["x.item"].replace("Heat", "He\ufeffat")}))
    assert data.titles[3] == "He\ufeffat"
    with pytest.raises(ValueError, match=r"x\.item, line 3: expected a item_id of 1 to 1024 characters"):
        open_dataset(put(tmp_path, files | {"x.item": files["x.item"].replace("3\tHeat", "3\ufeff\tHeat")}))


# ------------------------------------------------------------------ headers


@pytest.mark.parametrize(
    "ratings",
    [
        "timestamp,rating,movieId,userId\n200,4.0,3,7\n100,5.0,1,7\n50,2.0,3,9\n",
        "row,userId,comment,movieId,rating,timestamp\n0,7,x,3,4.0,200\n1,7,,1,5,100\n2,9,y,3,2,50\n",
        '"userId","movieId","rating","timestamp"\n"7","3","4.0","200"\n7,1,5.0,100\n9,3,"2.0",50\n',
        'comment,userId,movieId,rating,timestamp\n"a, b",7,3,4,200\n"say ""x""",7,1,5,100\n,9,3,2,50\n',
        "userId,movieId,rating,timestamp\n7,3,4e0,2.00e2\n7,1,+5.0,100.0\n9,3,2.,50\n",
    ],
)
def test_ratings_by_the_names_in_the_header(tmp_path: Path, ratings: str) -> None:
    check(open_dataset(put(tmp_path, {"ratings.csv": ratings, "movies.csv": MOVIES})))


def test_movies_by_the_names_in_the_header(tmp_path: Path) -> None:
    movies = 'year,title,movieId\n1995,"Misérables, Les (1995)",1\n,Heat,3\n'
    check(open_dataset(put(tmp_path, {"ratings.csv": RATINGS, "movies.csv": movies})))


@pytest.mark.parametrize(
    ("ratings", "message"),
    [
        ("7,3,4.0,200\n7,1,5.0,100\n", r"line 1: expected a header with userId, movieId, rating, timestamp, got '7,3"),
        ("", r"line 1: expected a header with userId"),
        ("userId,movieId,rating\n7,3,4\n", r"line 1: expected a header with userId, movieId, rating, timestamp"),
        ("user,movieId,rating,timestamp\n", r"line 1: expected a header with userId"),
        ("userId,movieId,rating,timestamp,rating\n7,3,4,5,1\n", r"expected one column 'rating', got userId, movieId"),
        (RATINGS + "7,1,5.0\n", r"line 5: expected 4 numbers"),
        (RATINGS + "7,1,5.0,100,9\n", r"line 5: expected 4 numbers"),
        (RATINGS + RATINGS, r"line 5: expected 4 numbers .*got 'userId,movieId,rating,timestamp'"),
        (RATINGS + '"7,1",5.0,100\n', r"line 5: expected 4 numbers"),
        (RATINGS + '7,"1,5",5.0,100\n', r"line 5: expected 4 numbers"),
        (RATINGS + '7,1,5.0,"100\n', r"line 5: expected 4 numbers"),
        (RATINGS + "007,1,5.0,100\n", r"line 5: expected 4 numbers .*without sign, point or leading zero, got '007"),
        (RATINGS + "7,1.0,5.0,100\n", r"line 5: expected 4 numbers"),
        (RATINGS + "7,1,NaN,100\n", r"line 5: expected 4 numbers"),
        (RATINGS + "7,1,,100\n", r"line 5: expected 4 numbers"),
        (RATINGS + "7;1;5.0;100\n", r"line 5: expected 4 numbers"),
        (RATINGS.replace(",", ";"), r"line 1: expected a header with userId"),
        ("a,userId,movieId,rating,timestamp\nx,7,b,4,200\n", r"line 2: expected 5 values .* with numbers as userId"),
    ],
)
def test_malformed_ratings_csv(tmp_path: Path, ratings: str, message: str) -> None:
    with pytest.raises(ValueError, match=rf"ratings\.csv(, |: ){message}"):
        open_dataset(put(tmp_path, {"ratings.csv": ratings, "movies.csv": MOVIES}))


@pytest.mark.parametrize(
    "row", ['4,"Alpha,x\n5,Beta,y\n', '4,"Alpha,x\n5,Beta",y\n', '4,"Alpha" Beta,x\n', '4,"' + "x\n" * 5000 + '",x\n']
)
def test_a_quote_in_movies_csv_takes_no_other_line(tmp_path: Path, row: str) -> None:
    with pytest.raises(ValueError, match=r"movies\.csv, line 4: expected a closing quote for each value that begins"):
        open_dataset(put(tmp_path, {"ratings.csv": RATINGS, "movies.csv": MOVIES + row}))


def test_negative_and_half_ratings(tmp_path: Path) -> None:
    ratings = "userId,movieId,rating,timestamp\n7,1,-1,1\n7,3,.5,2\n"
    data = open_dataset(put(tmp_path, {"ratings.csv": ratings, "movies.csv": MOVIES}))
    assert data.ratings is not None and data.ratings.tolist() == [-1, 0.5]


# ------------------------------------------------------------------ RecBole's dialect, which is that of pandas

HEAD = "user_id:token\titem_id:token\ttimestamp:float\n"
ITEM_HEAD = "item_id:token\ttitle:token_seq\n"


def recbole(folder: Path, items: str, rows: str) -> Interactions:
    return open_dataset(put(folder, {"x.item": ITEM_HEAD + items, "x.inter": HEAD + rows}))


@pytest.mark.parametrize(
    ("written", "title"),
    [
        ('"Alien, ""Director\'s Cut"""', 'Alien, "Director\'s Cut"'),
        ('"A\ttab"', "A\ttab"),
        ('"Two\nlines"', "Two\nlines"),
        ('The "Best" Of', 'The "Best" Of'),
        ('17" Monitor', '17" Monitor'),
        ('"Great Performances" Cats', '"Great Performances" Cats'),
        ('"One" and "two', '"One" and "two'),
    ],
)
def test_quotes_in_titles(tmp_path: Path, written: str, title: str) -> None:
    data = recbole(tmp_path, f"a\t{written}\nb\tBeta\n", "u\ta\t1\nu\tb\t2\n")
    assert data.titles == {"a": title, "b": "Beta"}
    assert data.histories[0].tolist() == ["a", "b"]


@pytest.mark.parametrize(
    "items",
    ['a\t"Alpha\nb\tBeta\n', 'a\t"Alpha\nb\tMonitor 17"\n', 'a\t"Alpha\nb\t"Beta"\n'],
)
def test_a_quote_that_is_not_closed_takes_no_other_line(tmp_path: Path, items: str) -> None:
    with pytest.raises(ValueError, match=r"x\.item, line 2: expected a closing quote for each value that begins with"):
        recbole(tmp_path, items, "u\ta\t1\n")


@pytest.mark.parametrize("word", ["", "nan", "NaN", "None", "NULL", "<NA>", " "])
def test_missing_titles_and_items_are_left_out_and_counted(
    tmp_path: Path, word: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="patchkern.data"):
        data = recbole(tmp_path, f"a\t{word}\nb\tBeta\n", "u\ta\t1\nu\tb\t2\nu\tz\t3\nu\tz\t4\n")
    assert data.titles == {"b": "Beta"} and data.histories.items.tolist() == ["b"]
    assert "left out: 1 with an item without title, 2 with an item that the .item file lacks" in caplog.text


@pytest.mark.parametrize(
    ("items", "rows", "message"),
    [
        ("a\tA\n", "nan\ta\t1\n", r"x\.inter, line 2: expected a user_id and a item_id"),
        ("a\tA\n", "u\tNone\t1\n", r"x\.inter, line 2: expected a user_id and a item_id"),
        ("NA\tA\n", "", r"x\.item, line 2: expected a item_id"),
        ("a\tA\n", "u\ta \t1\n", r"x\.inter, line 2: expected a item_id of 1 to 1024 characters without space"),
        ("a\tA\n", f"{'u' * 1025}\ta\t1\n", r"x\.inter, line 2: expected a user_id of 1 to 1024 characters"),
        ("a\tA\n", "u\ta\t1_000\n", r"x\.inter, line 2: expected a number as timestamp, got '1_000'"),
        ("a\tA\n", "u\ta\t\n", r"x\.inter, line 2: expected a number as timestamp"),
        ("a\tA\n", "u\ta\t2017-01-01\n", r"x\.inter, line 2: expected a number as timestamp"),
        ("a\tA\n", "\t\t\n", r"x\.inter, line 2: expected a user_id and a item_id"),
    ],
)
def test_malformed_values(tmp_path: Path, items: str, rows: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recbole(tmp_path, items, rows)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ("user_id:token\titem_id:token\ttimestamp:token\n", "column 'timestamp' of type float, got token"),
        ("user_id:float\titem_id:token\ttimestamp:float\n", "column 'user_id' of type token, got float"),
        ("user_id:token\titem_id:token\titem_id:token\n", "one column 'item_id', got user_id, item_id, item_id"),
    ],
)
def test_types_and_names_of_the_header(tmp_path: Path, head: str, message: str) -> None:
    with pytest.raises(ValueError, match=rf"x\.inter: expected {message}"):
        open_dataset(put(tmp_path, {"x.item": ITEM_HEAD + "a\tA\n", "x.inter": head + "u\ta\t1\n"}))


def test_ids_with_leading_zeros_stay_text(tmp_path: Path) -> None:
    data = recbole(tmp_path, "007\tBond\n7\tSeven\n", "01\t7\t1\n1\t007\t2\n")
    assert data.titles == {"007": "Bond", "7": "Seven"}
    assert dict(zip(data.user_ids.tolist(), (h.tolist() for h in data.histories), strict=True)) == {
        "01": ["7"],
        "1": ["007"],
    }


@pytest.mark.parametrize(
    ("times", "seconds"),
    [
        (("100.9", "100.5", "100.1"), [100.1, 100.5, 100.9]),
        (("0.9", "0.5", "0.1"), [0.1, 0.5, 0.9]),
        (("1600000000.5", "1600000000.25", "1600000000"), [1.6e9, 1.6e9 + 0.25, 1.6e9 + 0.5]),
        (("1.6e9", "1599999999.0", "-5"), [-5, 1599999999, 1600000000]),
        (("1600000000900", "1600000000500", "1600000000000"), [1600000000, 1600000000.5, 1600000000.9]),
        (("1600000000000000003", "1600000000000000002", "1600000000000000001"), [1.6e9] * 3),
        (("9000000000000000003", "9000000000000000002", "9000000000000000001"), [9e9] * 3),
        (("8000000000000000003", "8000000000000000002", "8000000000000000001"), [8e9] * 3),
    ],
)
def test_times_are_as_exact_as_they_are_written(tmp_path: Path, times: tuple[str, ...], seconds: list[float]) -> None:
    rows = "".join(f"u\t{item}\t{time}\n" for item, time in zip("abc", times, strict=True))
    data = recbole(tmp_path, "a\tA\nb\tB\nc\tC\n", rows)
    assert data.histories[0].tolist() == ["c", "b", "a"]
    assert data.histories.timestamps is not None and data.histories.timestamps.tolist() == seconds


def test_times_of_two_units_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"expected times of one unit, got 1600000000 among ms as large as 16000000005"
    ):
        recbole(tmp_path, "a\tA\n", "u\ta\t1600000000\nu\ta\t1600000000500\n")


# ------------------------------------------------------------------ JSON


def books(folder: Path, rows: list[str], titles: list[str]) -> Interactions:
    return open_dataset(
        put(folder, {"goodreads_interactions_x.json": "\n".join(rows), "goodreads_books_x.json": "\n".join(titles)})
    )


def rated(book: Any = "1", user: Any = "u", rating: Any = 5, second: int = 10) -> str:
    time = f"Sun Jul 30 07:44:{second:02d} -0700 2017"
    return json.dumps({"user_id": user, "book_id": book, "rating": rating, "date_added": time})


def book(number: Any, title: Any) -> str:
    return json.dumps({"book_id": number, "title": title})


@pytest.mark.parametrize("title", [None, float("nan"), "", "  ", ["x"], {}, 5, True])
def test_a_title_that_is_no_text_is_none(tmp_path: Path, title: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="patchkern.data"):
        data = books(tmp_path, [rated("1"), rated("2", second=11)], [book("1", title), book("2", "B")])
    assert data.titles == {2: "B"} and data.histories.items.tolist() == [2]
    assert "left out: 1 with a book without title" in caplog.text


@pytest.mark.parametrize("text", ["None", "nan", "null"])
def test_a_title_that_is_such_a_word_is_a_title(tmp_path: Path, text: str) -> None:
    assert books(tmp_path, [rated()], [book("1", text)]).titles == {1: text}


@pytest.mark.parametrize("number", [1.0, 2.7, True, None, "007", " 1", "1_0", "-1", "١", "1.0", "9" * 19, [1]])
def test_an_id_that_is_no_integer_is_refused(tmp_path: Path, number: Any) -> None:
    with pytest.raises(ValueError, match=r"interactions_x\.json, line 1: expected an object with .*integer book_id"):
        books(tmp_path, [rated(number)], [book("1", "A")])
    with pytest.raises(ValueError, match=r"books_x\.json, line 1: expected an object with integer book_id"):
        books(tmp_path, [rated()], [book(number, "A")])


@pytest.mark.parametrize("rating", ["5", None, True, float("nan"), float("inf"), [5], 10**400])
def test_a_rating_that_is_no_number_is_refused(tmp_path: Path, rating: Any) -> None:
    with pytest.raises(ValueError, match=r"line 1: expected an object with user_id, integer book_id, rating"):
        books(tmp_path, [rated(rating=rating)], [book("1", "A")])


@pytest.mark.parametrize("users", [[None], [1.5], [True], [["u"]], ["u", 1], [""]])
def test_a_user_that_is_no_text_or_integer_is_refused(tmp_path: Path, users: list[Any]) -> None:
    with pytest.raises(ValueError, match=rf"line {len(users)}: expected a user_id"):
        books(tmp_path, [rated(user=user) for user in users], [book("1", "A")])


def test_integer_ids_of_users_and_books(tmp_path: Path) -> None:
    data = books(tmp_path, [rated(1, 5), rated(2, 3, second=11)], [book(1, "A"), book("2", "B")])
    assert data.user_ids.tolist() == [3, 5] and data.titles == {1: "A", 2: "B"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"book_id": "1", "title": "A", "title": "B"}', "one title"),
        ("[" * 100_000, "one JSON object"),
        ('{"book_id": ' + "1" * 5000 + ', "title": "A"}', "one JSON object"),
        (book("1", "B"), "one title for each id, 'A' for 1, got 'B'"),
    ],
)
def test_malformed_books(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(ValueError, match=rf"books_x\.json, line 3: expected {message}"):
        books(tmp_path, [rated()], [book("1", "A"), book("1", "A"), line])


def test_words_of_the_format_within_a_text_are_text(tmp_path: Path) -> None:
    title = 'How to write "title": "x", "title": "y"'
    assert books(tmp_path, [rated()], [book("1", title)]).titles == {1: title}


# ------------------------------------------------------------------ which reader


def test_two_data_sets_in_one_folder_are_refused(tmp_path: Path) -> None:
    put(tmp_path, FORMATS["u.data"] | FORMATS["x.inter"])
    with pytest.raises(ValueError, match=r"expected one data set in .*, found MovieLens and RecBole; give the path of"):
        open_dataset(tmp_path)
    check(open_dataset(tmp_path / "u.data"))
    put(tmp_path, FORMATS["ratings.csv"])
    (tmp_path / "x.inter").unlink()
    with pytest.raises(ValueError, match=r"expected one file of ratings, got u\.data, ratings\.csv"):
        open_dataset(tmp_path)
    check(open_dataset(tmp_path / "ratings.csv"))


def test_lines_are_those_of_line_feeds_only(tmp_path: Path) -> None:
    """Not of the other characters that Python's `str.splitlines` ends lines at."""
    text = "".join(f"{i}|A{mark}B|x\n" for i, mark in enumerate("\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"))
    (tmp_path / "u.item").write_text(text, encoding="utf-8")
    (tmp_path / "u.data").write_text("1\t1\t5\t1\n", encoding="utf-8")
    data = open_dataset(tmp_path)
    assert data.num_items == 8 and data.titles[6] == "A\u2028B"
    assert np.array_equal(data.item_ids, np.arange(8))
