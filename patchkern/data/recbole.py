# SPDX-License-Identifier: Apache-2.0
"""RecBole's atomic files: tab-separated ``NAME.inter`` and ``NAME.item`` with typed headers (``user_id:token``)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice
from os import PathLike
from pathlib import Path

import numpy as np

from patchkern.data._files import canonical_ids, logger, malformed, one_file, read_lines
from patchkern.data.interactions import Interactions

_TYPES = ("token", "token_seq", "float", "float_seq")
_TITLE_FIELDS = ("title", "movie_title", "book_title", "item_title", "name", "item_name")


def read_recbole(
    path: str | PathLike[str],
    *,
    user_field: str = "user_id",
    item_field: str = "item_id",
    time_field: str = "timestamp",
    rating_field: str = "rating",
    title_field: str | None = None,
) -> Interactions:
    """Read a folder with one ``.inter`` and its ``.item`` file, or that ``.inter`` file.

    Ids become integers if all of them are written as integers, else they stay strings. Without a time column the order
    of the file is kept and there are no timestamps. Items without a title are left out with their interactions; how
    many is logged.

    Args:
        user_field, item_field, time_field, rating_field: columns of ``.inter``; the last two may be missing from it.
        title_field: column of ``.item``; None: the first there is of title, movie_title, book_title, item_title, name,
            item_name.

    Raises:
        FileNotFoundError: no ``.inter`` or no ``.item`` file.
        ValueError: a malformed line, with its file and number; a missing column.
    """
    inter_file = _inter_file(Path(path))
    item_file = inter_file.with_suffix(".item")
    if not item_file.is_file():
        raise FileNotFoundError(f"{item_file}: expected the titles beside {inter_file.name}, found no such file")
    titles = dict(_titles(item_file, item_field, title_field))

    users: list[str] = []
    items: list[str] = []
    times: list[int] = []
    ratings: list[float] = []
    untitled = 0
    rows = _rows(inter_file, {user_field: True, item_field: True, time_field: False, rating_field: False})
    for number, (user, item, time, rating) in rows:
        if not user or not item:
            malformed(inter_file, number, f"a {user_field} and a {item_field}", f"{user}\t{item}")
        if item not in titles:
            untitled += 1
            continue
        users.append(user)
        items.append(item)
        if time is not None:
            times.append(math.floor(_number(inter_file, number, time_field, time)))
        if rating is not None:
            ratings.append(_number(inter_file, number, rating_field, rating))
    if untitled:
        logger.warning("%s: %d interactions left out, their items have no title", inter_file, untitled)

    integer_ids = canonical_ids(list(titles))
    integer_users = canonical_ids(users)
    return Interactions.from_columns(
        np.array(users, str) if integer_users is None else integer_users,
        np.array(items, str) if integer_ids is None else np.array(items, np.int64),
        times if times or not users else None,
        titles if integer_ids is None else dict(zip(integer_ids.tolist(), titles.values(), strict=True)),
        ratings if ratings or not users else None,
        name=inter_file.stem,
    )


def _inter_file(path: Path) -> Path:
    found = path if path.is_file() and path.suffix == ".inter" else one_file(path, ["*.inter"])
    if found is None:
        raise FileNotFoundError(f"{path}: expected a RecBole folder with a .inter file, found none")
    return found


def _titles(path: Path, item_field: str, title_field: str | None) -> Iterator[tuple[str, str]]:
    if title_field is None:
        columns = _header(path)
        title_field = next((name for name in _TITLE_FIELDS if name in columns), None)
        if title_field is None:
            wanted = ", ".join(_TITLE_FIELDS)
            raise ValueError(f"{path}: expected a column of titles ({wanted}), got {', '.join(columns)}")
    seen: set[str] = set()
    for number, (item, title) in _rows(path, {item_field: True, title_field: True}):
        if not item or item in seen:
            malformed(path, number, "an id that no line before has", str(item))
        seen.add(item)
        if title and title.strip():
            yield item, title.strip()


def _header(path: Path) -> list[str]:
    number, line = next(read_lines(path), (1, ""))
    names = []
    for column in line.split("\t"):
        name, _, kind = column.strip().rpartition(":")
        if not name or kind not in _TYPES:
            malformed(path, number, f"a header of name:type columns, type one of {', '.join(_TYPES)}", line)
        names.append(name)
    return names


def _rows(path: Path, fields: dict[str, bool]) -> Iterator[tuple[int, list[str | None]]]:
    """The line number and the wanted fields of each row; None for an optional field that the file lacks."""
    header = _header(path)
    for name, needed in fields.items():
        if needed and name not in header:
            raise ValueError(f"{path}: expected a column {name!r}, got {', '.join(header)}")
    columns = [header.index(name) if name in header else None for name in fields]
    for number, line in islice(read_lines(path), 1, None):
        values = line.split("\t")
        if len(values) != len(header):
            malformed(path, number, f"{len(header)} values separated by tabs", line)
        yield number, [None if column is None else values[column] for column in columns]


def _number(path: Path, line: int, name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        malformed(path, line, f"a number as {name}", text)
    return value
