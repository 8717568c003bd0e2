# SPDX-License-Identifier: Apache-2.0
"""RecBole's atomic files: tab-separated ``NAME.inter`` and ``NAME.item`` with typed headers (``user_id:token``).

RecBole reads them with pandas, so that is the dialect: a value in quotes may hold tabs and line ends, and words such as
"nan", "NA" or "None" are missing values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path

import numpy as np

from patchkern.data._delimited import canonical_ids, columns_of, equally_long, number_column, number_of, read_quoted
from patchkern.data._text import check_id, log_left_out, logger, malformed, one_file
from patchkern.data._titles import Titles
from patchkern.data.interactions import Interactions
from patchkern.data.item_text import ItemText

_TYPES = ("token", "token_seq", "float", "float_seq")
_OPTIONAL = ("timestamp", "rating")
_TITLE_FIELDS = ("title", "movie_title", "book_title", "item_title", "name", "item_name")
# what pandas takes for a missing value
_MISSING = frozenset(
    ["", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA",
     "NULL", "NaN", "None", "n/a", "nan", "null"]
)  # fmt: skip


def read_recbole(
    path: str | PathLike[str],
    *,
    user_field: str = "user_id",
    item_field: str = "item_id",
    time_field: str = "timestamp",
    rating_field: str = "rating",
    title_field: str | None = None,
    item_text: str | None = None,
    time_unit: str | None = None,
    tie_seed: int | None = 0,
) -> Interactions:
    """Read a folder with one ``.inter`` and its ``.item`` file, or that ``.inter`` file.

    Ids become integers if all of them are written as integers, else they stay strings. Without a time column the order
    of the file is kept and there are no timestamps. Items without a title are left out with their interactions; how
    many is logged.

    Args:
        user_field, item_field, time_field, rating_field: columns of ``.inter``. ``timestamp`` and ``rating`` may be
            missing from it, others not.
        title_field: column of ``.item``; None: the first there is of title, movie_title, book_title, item_title, name,
            item_name.
        item_text: what a model reads of an item, such as "title (brand, categories)": columns of ``.item`` of any type,
            and the title; see `Interactions.texts`.
        time_unit, tie_seed: see `Interactions.from_columns`.

    Raises:
        FileNotFoundError: no ``.inter`` or no ``.item`` file.
        ValueError: a malformed line, with its file and number; a column that is missing, there twice or of another
            type.
    """
    inter_file = _inter_file(Path(path))
    item_file = inter_file.with_suffix(".item")
    if not item_file.is_file():
        raise FileNotFoundError(f"{item_file}: expected the titles beside {inter_file.name}, found no such file")
    titles = _titles(item_file, item_field, title_field, ItemText.parse(item_text))

    users: list[str] = []
    items: list[str] = []
    times: list[int | float] = []
    ratings: list[int | float] = []
    left_out = dict.fromkeys(("with an item without title", "with an item that the .item file lacks"), 0)
    untitled, unknown = left_out
    kinds = {user_field: ("token",), item_field: ("token",), time_field: ("float",), rating_field: ("float",)}
    rows = _rows(inter_file, kinds, tuple(name for name in kinds if name not in _OPTIONAL))
    for number, (user, item, time, rating) in rows:
        for name, value in ((user_field, user), (item_field, item)):
            if value in _MISSING:
                malformed(
                    inter_file, number, f"a {user_field} and a {item_field}, no missing {name}", f"{user}\t{item}"
                )
            check_id(inter_file, number, name, str(value))
        if item not in titles.of:
            left_out[untitled if item in titles.missing else unknown] += 1
            continue
        users.append(str(user))
        items.append(str(item))
        if time is not None:
            times.append(number_of(inter_file, number, time_field, time))
        if rating is not None:
            ratings.append(number_of(inter_file, number, rating_field, rating))
    log_left_out(inter_file, left_out)
    if users and not times:
        logger.warning("%s: no column %s, the rows are taken to be in order of time", inter_file, time_field)

    texts = titles.texts_read()
    integer_ids = canonical_ids(list(titles.of))
    integer_users = canonical_ids(users)
    return Interactions.from_columns(
        np.array(users, str) if integer_users is None else integer_users,
        np.array(items, str) if integer_ids is None else np.array(items, np.int64),
        number_column(times) if times or not users else None,
        titles.of if integer_ids is None else dict(zip(integer_ids.tolist(), titles.of.values(), strict=True)),
        number_column(ratings) if ratings or not users else None,
        time_unit=time_unit,
        tie_seed=tie_seed,
        name=inter_file.stem,
        texts=texts if integer_ids is None or texts is None else {int(item): text for item, text in texts.items()},
    )


def _inter_file(path: Path) -> Path:
    found = path if path.is_file() and path.suffix == ".inter" else one_file(path, ["*.inter"])
    if found is None:
        raise FileNotFoundError(f"{path}: expected a RecBole folder with a .inter file, found none")
    return found


def _titles(path: Path, item_field: str, title_field: str | None, text: ItemText | None) -> Titles:
    if title_field is None:
        columns = [name for name, _ in _header(path, next(_lines(path), (1, [""])))]
        title_field = next((name for name in _TITLE_FIELDS if name in columns), None)
        if title_field is None:
            wanted = ", ".join(_TITLE_FIELDS)
            raise ValueError(f"{path}: expected a column of titles ({wanted}), got {', '.join(columns)}")
    titles = Titles(path, text)
    fields = () if text is None else text.fields
    kinds = {item_field: ("token",), title_field: ("token", "token_seq"), **dict.fromkeys(fields, _TYPES)}
    for number, values in _rows(path, kinds, (item_field, title_field, *fields)):
        item = values[0]
        if item in _MISSING:
            malformed(path, number, f"a {item_field}", str(item))
        present = ["" if value is None or value in _MISSING else value.strip() for value in values]
        known = dict(zip(kinds, present, strict=True))
        titles.add(number, check_id(path, number, item_field, str(item)), known[title_field], known)
    return titles


def _lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    # what RecBole's own converters write, which know no quotes, has titles with quotes around a part
    return read_quoted(path, "\t", lenient=True)


def _header(path: Path, line: tuple[int, list[str]]) -> list[tuple[str, str]]:
    """Names and types of the columns."""
    number, values = line
    columns = []
    for value in values:
        name, _, kind = value.strip().rpartition(":")
        if not name or kind not in _TYPES:
            expected = f"a header of name:type columns, type one of {', '.join(_TYPES)}"
            malformed(path, number, expected, "\t".join(values))
        columns.append((name, kind))
    return columns


def _rows(
    path: Path, kinds: Mapping[str, tuple[str, ...]], needed: tuple[str, ...]
) -> Iterator[tuple[int, list[str | None]]]:
    """The line number and the wanted fields of each row; None for an optional field that the file lacks."""
    rows = _lines(path)
    header = _header(path, next(rows, (1, [""])))
    columns = columns_of(path, [name for name, _ in header], kinds, needed)
    for (name, types), column in zip(kinds.items(), columns, strict=True):
        if column is not None and header[column][1] not in types:
            raise ValueError(f"{path}: expected column {name!r} of type {' or '.join(types)}, got {header[column][1]}")
    for number, values in equally_long(path, rows, len(header), "\t"):
        yield number, [None if column is None else values[column] for column in columns]
