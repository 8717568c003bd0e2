# SPDX-License-Identifier: Apache-2.0
"""MovieLens as GroupLens ships it: 100K (``u.data``), 1M and 10M (``ratings.dat``), newer ones (``ratings.csv``)."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from os import PathLike
from pathlib import Path

from patchkern.data._files import as_integers, guess_encoding, malformed, read_lines, read_numbers
from patchkern.data.interactions import Interactions

SYSTEM = "You recommend movies."
INSTRUCTION = (
    "A user has watched [HISTORY_SEQUENCE]. Name one movie for this user to watch next: its title only, no explanation."
)

# ratings file -> (titles file, separator of the ratings, header lines)
FILES = {"u.data": ("u.item", "\t", 0), "ratings.dat": ("movies.dat", "::", 0), "ratings.csv": ("movies.csv", ",", 1)}

_COLUMNS = ("userId", "movieId", "rating", "timestamp")
_TRAILING_GROUPS = re.compile(r"(?<=\S)(\s*\([^()]*\))+\s*$")
_YEAR = re.compile(r"\((\d{4})[^()]*\)\s*(\([^()]*\)\s*)*$")
_TRAILING_ARTICLE = re.compile(r"^(.+), (The|An|A)$")


def clean_title(title: str, keep_year: bool = False, move_article: bool = True) -> str:
    """A MovieLens title as people write it: "Usual Suspects, The (1995)" becomes "The Usual Suspects".

    Everything in trailing parentheses goes: the year, the original title, "(V)". Articles other than English ones stay
    where they are.

    Args:
        keep_year: leave the year: "The Usual Suspects (1995)".
        move_article: bring a trailing The, A or An to the front.
    """
    title = title.strip()
    name = _TRAILING_GROUPS.sub("", title)
    article = _TRAILING_ARTICLE.match(name) if move_article else None
    if article:
        name = f"{article[2]} {article[1]}"
    year = _YEAR.search(title) if keep_year and name != title else None
    return f"{name} ({year[1]})" if year else name


def read_movielens(
    path: str | PathLike[str], *, raw_titles: bool = False, keep_year: bool = False, move_article: bool = True
) -> Interactions:
    """Read a MovieLens folder, or its ratings file with the titles file beside it.

    Ids are MovieLens's own. The catalogue is the whole titles file in its order. Titles may repeat.

    Args:
        path: a folder that holds ``u.data`` and ``u.item``, or ``ratings.dat`` and ``movies.dat``, or ``ratings.csv``
            and ``movies.csv``; or that ratings file.
        raw_titles: leave titles exactly as they are in the file.
        keep_year, move_article: see `clean_title`.

    Raises:
        FileNotFoundError: neither pair of files is there.
        ValueError: a malformed line, with its file and number; a rated movie without title.
    """
    ratings_file = _ratings_file(Path(path))
    titles_name, separator, skip = FILES[ratings_file.name]
    titles_file = ratings_file.with_name(titles_name)
    if not titles_file.is_file():
        raise FileNotFoundError(f"{titles_file}: expected the titles beside {ratings_file.name}, found no such file")
    titles: dict[int, str] = {}
    for number, item, title in _TITLE_READERS[titles_name](titles_file):
        if not (item.isascii() and item.isdigit()) or not title.strip():
            malformed(titles_file, number, "an integer id and a title", f"{item} {title}")
        if int(item) in titles:
            malformed(titles_file, number, "an id that no line before has", item)
        titles[int(item)] = title if raw_titles else clean_title(title, keep_year, move_article)
    columns = read_numbers(ratings_file, separator, _COLUMNS, skip)
    users, items, timestamps = (as_integers(ratings_file, c, columns[c]) for c in ("userId", "movieId", "timestamp"))
    return Interactions.from_columns(
        users,
        items,
        timestamps,
        titles,
        columns["rating"],
        name=ratings_file.parent.resolve().name,
        system=SYSTEM,
        instruction=INSTRUCTION,
    )


def _ratings_file(path: Path) -> Path:
    if path.is_file() and path.name in FILES:
        return path
    for name in FILES:
        if (path / name).is_file():
            return path / name
    raise FileNotFoundError(f"{path}: expected a folder with {', '.join(FILES)}, found none of them")


def _u_item(path: Path) -> Iterator[tuple[int, str, str]]:
    for number, line in read_lines(path, guess_encoding(path)):
        fields = line.split("|")
        if len(fields) < 2:
            malformed(path, number, "an id and a title separated by '|'", line)
        yield number, fields[0], fields[1]


def _movies_dat(path: Path) -> Iterator[tuple[int, str, str]]:
    for number, line in read_lines(path, guess_encoding(path)):
        # The title is all between the first and the last separator, so it may itself hold one.
        item, first, rest = line.partition("::")
        title, last, _ = rest.rpartition("::")
        if not first or not last:
            malformed(path, number, "an id, a title and genres separated by '::'", line)
        yield number, item, title


def _movies_csv(path: Path) -> Iterator[tuple[int, str, str]]:
    with open(path, encoding=guess_encoding(path), newline="") as stream:
        reader = csv.reader(stream, strict=True)
        try:
            header = next(reader, [])
            if header[:2] != ["movieId", "title"]:
                malformed(path, 1, "the header movieId,title,...", ",".join(header))
            for fields in reader:
                if len(fields) < 2:
                    malformed(path, reader.line_num, "an id and a title separated by ','", ",".join(fields))
                yield reader.line_num, fields[0], fields[1]
        except csv.Error as error:
            malformed(path, reader.line_num, "a line of comma-separated values", str(error))


_TITLE_READERS = {"u.item": _u_item, "movies.dat": _movies_dat, "movies.csv": _movies_csv}
