# SPDX-License-Identifier: Apache-2.0
"""MovieLens as GroupLens ships it: 100K (``u.data``), 1M and 10M (``ratings.dat``), newer ones (``ratings.csv``)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from os import PathLike
from pathlib import Path

from patchkern.data._delimited import ID, columns_of, equally_long, read_numbers, read_plain, read_quoted
from patchkern.data._text import malformed, read_lines
from patchkern.data._titles import Titles
from patchkern.data.interactions import Interactions
from patchkern.data.item_text import ItemText

SYSTEM = "You recommend movies."
INSTRUCTION = (
    "A user has watched [HISTORY_SEQUENCE]. Name one movie for this user to watch next: its title only, no explanation."
)

# ratings file -> (titles file, separator of the ratings)
FILES = {"u.data": ("u.item", "\t"), "ratings.dat": ("movies.dat", "::"), "ratings.csv": ("movies.csv", ",")}

# of u.item, whose last columns say of each whether it is one of the movie's
_GENRES = ("unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama",
           "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War",
           "Western")  # fmt: skip
_NO_GENRES = "(no genres listed)"

_ID = re.compile(ID)
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
    path: str | PathLike[str],
    *,
    raw_titles: bool = False,
    keep_year: bool = False,
    move_article: bool = True,
    item_text: str | None = None,
    tie_seed: int | None = 0,
) -> Interactions:
    """Read a MovieLens folder, or its ratings file with the titles file beside it.

    Ids are MovieLens's own. The catalogue is the whole titles file in its order. Titles may repeat. The columns of the
    newer files are found by the names in their header. Titles that are not UTF-8 are latin-1, as in the older files.

    Args:
        path: a folder that holds ``u.data`` and ``u.item``, or ``ratings.dat`` and ``movies.dat``, or ``ratings.csv``
            and ``movies.csv``; or that ratings file.
        raw_titles: leave titles exactly as they are in the file.
        keep_year, move_article: see `clean_title`.
        item_text: what a model reads of a movie, such as "title (genres, year)": those are the fields there are, see
            `Interactions.texts`.
        tie_seed: of the order within one instant, see `Interactions.from_columns`.

    Raises:
        FileNotFoundError: neither pair of files is there.
        ValueError: a malformed line, with its file and number; a rated movie without title; several ratings files.
    """
    ratings_file = _ratings_file(Path(path))
    titles_name, separator = FILES[ratings_file.name]
    titles_file = ratings_file.with_name(titles_name)
    if not titles_file.is_file():
        raise FileNotFoundError(f"{titles_file}: expected the titles beside {ratings_file.name}, found no such file")
    titles = Titles(titles_file, ItemText.parse(item_text))
    for number, item, title, genres in _TITLE_READERS[titles_name](titles_file):
        if not _ID.fullmatch(item) or not title.strip():
            malformed(titles_file, number, "an integer id and a title", f"{item} {title}")
        year = _YEAR.search(title)
        fields = {"genres": genres, "year": year[1] if year else ""}
        titles.add(number, int(item), title if raw_titles else clean_title(title, keep_year, move_article), fields)
    columns = read_numbers(ratings_file, separator, _COLUMNS, _COLUMNS[:2], header=separator == ",")
    return Interactions.from_columns(
        columns["userId"],
        columns["movieId"],
        columns["timestamp"],
        titles.of,
        columns["rating"],
        tie_seed=tie_seed,
        name=ratings_file.parent.resolve().name,
        system=SYSTEM,
        instruction=INSTRUCTION,
        texts=titles.texts_read(),
    )


def _ratings_file(path: Path) -> Path:
    if path.is_file() and path.name in FILES:
        return path
    found = [name for name in FILES if (path / name).is_file()]
    if not found:
        raise FileNotFoundError(f"{path}: expected a folder with {', '.join(FILES)}, found none of them")
    if len(found) > 1:
        raise ValueError(f"{path}: expected one file of ratings, got {', '.join(found)}; give the path of one")
    return path / found[0]


def _u_item(path: Path) -> Iterator[tuple[int, str, str, list[str]]]:
    for number, fields in equally_long(path, read_plain(path, "|", latin1=True), separator="|"):
        if len(fields) < 2:
            malformed(path, number, "an id and a title separated by '|'", fields[0])
        flags = fields[5:] if len(fields) == 5 + len(_GENRES) else [""] * len(_GENRES)
        yield number, fields[0], fields[1], [genre for genre, flag in zip(_GENRES, flags, strict=True) if flag == "1"]


def _movies_dat(path: Path) -> Iterator[tuple[int, str, str, list[str]]]:
    for number, line in read_lines(path, latin1=True):
        # The title is all between the first and the last separator, so it may itself hold one.
        item, first, rest = line.partition("::")
        title, last, genres = rest.rpartition("::")
        if not first or not last:
            malformed(path, number, "an id, a title and genres separated by '::'", line)
        yield number, item, title, genres.split("|")


def _movies_csv(path: Path) -> Iterator[tuple[int, str, str, list[str]]]:
    rows = read_quoted(path, ",", latin1=True)
    number, header = next(rows, (1, []))
    if not {"movieId", "title"} <= set(header):
        malformed(path, number, "a header with movieId and title", ",".join(header))
    item, title = header.index("movieId"), header.index("title")
    columns_of(path, header, ("movieId", "title"), ())
    for number, fields in equally_long(path, rows, len(header)):
        genres = fields[header.index("genres")] if "genres" in header else _NO_GENRES
        yield number, fields[item], fields[title], [] if genres == _NO_GENRES else genres.split("|")


_TITLE_READERS = {"u.item": _u_item, "movies.dat": _movies_dat, "movies.csv": _movies_csv}
