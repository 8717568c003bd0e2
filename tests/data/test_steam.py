# SPDX-License-Identifier: Apache-2.0
"""Steam: dictionaries as Python prints them, or JSON; nothing in them is run."""

from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from patchkern.data import open_dataset

REVIEWS: list[dict[str, Any]] = [
    {
        "username": " Chaos 'Syren'",
        "hours": 0.1,
        "product_id": "725280",
        "date": "2017-12-17",
        "text": 'it\'s \\ "so"\n',
    },
    {"username": "Ariman1", "hours": 13.2, "product_id": "328100", "date": "2017-12-16", "text": "((((([[{"},
    {"username": " Chaos 'Syren'", "product_id": "328100", "date": "2016-02-29", "text": "", "user_id": "765"},
    {"username": "", "product_id": "328100", "date": "2016-03-01", "text": ""},
    {"username": "Ariman1", "product_id": "1", "date": "2016-03-01", "text": ""},
]
GAMES: list[dict[str, Any]] = [
    {"publisher": "INGAME", "genres": ["Indie", "RPG"], "title": "Bravium", "id": "725280", "price": 14.99},
    {"app_name": "Lost \xe9 Cat", "id": "328100", "price": "Free To Play"},
    {"title": "no id"},
]


def python2(record: dict[str, Any]) -> str:
    """As Python 2 printed it: u'...' and no letter that is not ASCII."""

    def printed(value: Any) -> str:
        if isinstance(value, list):
            return f"[{', '.join(map(printed, value))}]"
        return f"u{value!a}" if isinstance(value, str) else repr(value)

    return "{" + ", ".join(f"{printed(name)}: {printed(value)}" for name, value in record.items()) + "}"


FORMS: dict[str, Any] = {"json": json.dumps, "python 2": python2, "python 3": repr}


@pytest.fixture(params=FORMS)
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    for name, records in (("steam_reviews.json.gz", REVIEWS), ("steam_games.json.gz", GAMES)):
        text = "".join(FORMS[request.param](record) + "\n" for record in records)
        (tmp_path / name).write_bytes(gzip.compress(text.encode()))
    return tmp_path


def test_steam(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "patchkern.data"):
        data = open_dataset(folder, item_text="title (publisher, genres, price)")
    assert "interactions left out: 1 without username, 1 with an item without title" in caplog.text
    assert data.user_ids.tolist() == [" Chaos 'Syren'", "Ariman1"] and data.ratings is None
    assert [history.tolist() for history in data.histories] == [[328100, 725280], [328100]]
    assert data.histories.timestamps.tolist() == [1456704000, 1513468800, 1513382400]
    assert data.titles == {725280: "Bravium", 328100: "Lost \xe9 Cat"}
    assert data.texts == {725280: "Bravium (INGAME, Indie, RPG, 14.99)", 328100: "Lost \xe9 Cat (Free To Play)"}
    by_id = open_dataset(folder / "steam_reviews.json.gz", user_field="user_id")
    assert by_id.user_ids.tolist() == ["765"]


@pytest.mark.parametrize(
    "line",
    [
        "{'username': __import__('os').system('true'), 'product_id': '1', 'date': '2017-12-17'}",
        "{'username': [x for x in 'a'], 'product_id': '1', 'date': '2017-12-17'}",
        "{'username': 'a' 'b'.upper(), 'product_id': '1', 'date': '2017-12-17'}",
        "{'username': 'a', 'product_id': '1', 'date': '2017-12-17', 'x': " + "[" * 50_000 + "]" * 50_000 + "}",
        "{'username': 'a', 'product_id': '1', 'date': '2017-12-17', 'x': " + "-" * 300_000 + "1}",
        "{'username': 'a', 'product_id': '1', 'date': '2017-12-17', 1: 2}",
        "{'username', 'product_id'}",
        "['username']",
        "{'username': 'a'",
    ],
)
def test_only_literals_of_dictionaries(tmp_path: Path, line: str) -> None:
    (tmp_path / "steam_reviews.json").write_text(line + "\n")
    (tmp_path / "steam_games.json").write_text("")
    with pytest.raises(ValueError, match="line 1: expected one JSON object, or the literal of a Python dictionary"):
        open_dataset(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"product_id": "007"}, "expected an object with text as username"),
        ({"date": "17 Dec 2017"}, "expected an object with text as username"),
        ({"username": 5}, "expected an object with text as username"),
        ({"username": "x" * 2000}, "expected an object with text as username"),
    ],
)
def test_reviews_are_refused_by_line(folder: Path, change: dict[str, Any], message: str) -> None:
    (folder / "steam_reviews.json.gz").write_text(repr(REVIEWS[0] | change) + "\n")
    with pytest.raises(ValueError, match=f"line 1: {message}"):
        open_dataset(folder)


def test_a_field_twice(folder: Path) -> None:
    line = "{'username': 'a', 'product_id': '1', 'date': '2017-12-17', 'username': 'b'}\n"
    (folder / "steam_reviews.json.gz").write_text(line)
    with pytest.raises(ValueError, match="line 1: expected one username"):
        open_dataset(folder)


def test_the_games_are_missing(folder: Path) -> None:
    (folder / "steam_games.json.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"expected the games, steam_games.json or steam_games.json.gz"):
        open_dataset(folder)
