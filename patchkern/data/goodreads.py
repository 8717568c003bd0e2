# SPDX-License-Identifier: Apache-2.0
"""Goodreads as the UCSD Book Graph ships it: JSON lines of interactions and of books, plain or gzip, streamed."""

from __future__ import annotations

import math
import re
from array import array
from datetime import datetime, timedelta, timezone
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from patchkern.batch.columns import id_array
from patchkern.data._objects import integer_id, read_objects
from patchkern.data._text import check_id, log_left_out, malformed, one_file
from patchkern.data._titles import Titles
from patchkern.data.interactions import Interactions
from patchkern.data.item_text import ItemText

SYSTEM = "You recommend books."
INSTRUCTION = (
    "A user has read [HISTORY_SEQUENCE]. Name one book for this user to read next: its title only, no explanation."
)
INTERACTIONS_FILES = ("goodreads_interactions*.json", "goodreads_interactions*.json.gz")
BOOKS_FILES = ("goodreads_books*.json", "goodreads_books*.json.gz")

_DATE = re.compile(r"\w{3} (\w{3}) (\d\d) (\d\d):(\d\d):(\d\d) ([+-])(\d\d)(\d\d) (\d{4})", re.ASCII)
_MONTH_NAMES = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_MONTHS = {name: month for month, name in enumerate(_MONTH_NAMES, 1)}


def read_goodreads(
    path: str | PathLike[str],
    books: str | PathLike[str] | None = None,
    *,
    rating_above: float | None = None,
    time_field: str = "date_added",
    title_field: str = "title",
    item_text: str | None = None,
    tie_seed: int | None = 0,
) -> Interactions:
    """Read interactions and the titles of the books in them.

    Both files are streamed: memory holds some 24 bytes per kept interaction, the user ids and the titles of the books
    that occur. Book ids become integers. Interactions whose time is empty, and those with a book that has no title
    (none at all, empty, or no text), are left out; how many is logged.

    Args:
        path: a folder with one ``goodreads_interactions*.json[.gz]`` and one ``goodreads_books*.json[.gz]``, or the
            file of interactions.
        books: the file of books; None: the one beside the interactions.
        rating_above: keep only interactions rated strictly above it (0 is "not rated"), while streaming.
        time_field: ``date_added``, ``date_updated``, ``read_at`` or ``started_at``.
        title_field: ``title``, or ``title_without_series``.
        item_text: what a model reads of a book, such as "title (publisher, publication_year)": fields of the file of
            books, see `Interactions.texts`.
        tie_seed: of the order within one instant, see `Interactions.from_columns`.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a malformed line, with its file and number; several files that match.
    """
    interactions_file, books_file = _files(Path(path), books)
    user_index: dict[str | int, int] = {}
    users, items, times, ratings = array("q"), array("q"), array("q"), array("d")
    undated = 0
    expected = f"an object with user_id, integer book_id, rating and {time_field}"
    kind = None
    for number, record in read_objects(interactions_file, ("user_id", "book_id", "rating", time_field)):
        try:
            user, time = record["user_id"], record[time_field]
            item, rating = integer_id("book_id", record["book_id"]), _rating(record["rating"])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            malformed(interactions_file, number, expected, f"{type(error).__name__}: {error}")
        kind = type(user) if kind is None else kind
        if type(user) is not kind or kind not in (str, int):
            malformed(interactions_file, number, "a user_id that is text or an integer in all lines", repr(user))
        if isinstance(user, str):
            check_id(interactions_file, number, "user_id", user)
        if not (time is None or isinstance(time, str)):
            malformed(interactions_file, number, f"text as {time_field}", repr(time))
        if rating_above is not None and not rating > rating_above:
            continue
        if not time:
            undated += 1
            continue
        users.append(user_index.setdefault(user, len(user_index)))
        items.append(item)
        times.append(_seconds(interactions_file, number, time))
        ratings.append(rating)

    taken = set(items)
    titles = Titles(books_file, ItemText.parse(item_text))
    for number, record in read_objects(books_file, ("book_id", title_field)):
        try:
            book, title = integer_id("book_id", record["book_id"]), record[title_field]
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            expected = f"an object with integer book_id and {title_field}"
            malformed(books_file, number, expected, f"{type(error).__name__}: {error}")
        if book in taken:
            titles.add(number, book, title.strip() if isinstance(title, str) else "", record)

    item_ids = np.frombuffer(items, np.int64) if items else np.zeros(0, np.int64)
    titled = np.isin(item_ids, np.fromiter(titles.of, np.int64, len(titles.of)))
    untitled = int((~titled).sum())
    log_left_out(interactions_file, {f"without {time_field}": undated, "with a book without title": untitled})
    names = id_array(list(user_index), "user_id")
    return Interactions.from_columns(
        names[np.array(users, np.int64)[titled]],
        item_ids[titled],
        np.array(times, np.int64)[titled],
        titles.of,
        np.array(ratings, np.float64)[titled],
        tie_seed=tie_seed,
        name=interactions_file.name.partition(".")[0],
        system=SYSTEM,
        instruction=INSTRUCTION,
        texts=titles.texts_read(),
    )


def _files(path: Path, books: str | PathLike[str] | None) -> tuple[Path, Path]:
    interactions_file = path if path.is_file() else one_file(path, INTERACTIONS_FILES)
    if interactions_file is None:
        raise FileNotFoundError(f"{path}: expected a file like {' or '.join(INTERACTIONS_FILES)}, found none")
    books_file = Path(books) if books is not None else one_file(interactions_file.parent, BOOKS_FILES)
    if books_file is None or not books_file.is_file():
        where = books_file or interactions_file.parent
        raise FileNotFoundError(f"{where}: expected the books, a file like {' or '.join(BOOKS_FILES)}, found none")
    return interactions_file, books_file


def _rating(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"rating {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"rating {value!r}")
    return float(value)


def _seconds(path: Path, line: int, text: Any) -> int:
    """Seconds since 1970 of "Sun Jul 30 07:44:10 -0700 2017", whatever the machine's language (unlike strptime)."""
    match = _DATE.fullmatch(text) if isinstance(text, str) else None
    try:
        if match is None:
            raise ValueError
        month, day, hour, minute, second, sign, zone_hours, zone_minutes, year = match.groups()
        zone = timedelta(hours=int(zone_hours), minutes=int(zone_minutes)) * (-1 if sign == "-" else 1)
        moment = datetime(
            int(year), _MONTHS[month], int(day), int(hour), int(minute), int(second), tzinfo=timezone(zone)
        )
    except (ValueError, KeyError):
        malformed(path, line, "a date like 'Sun Jul 30 07:44:10 -0700 2017'", str(text))
    return int(moment.timestamp())
