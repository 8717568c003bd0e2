# SPDX-License-Identifier: Apache-2.0
"""Two ordinary tables: one row per interaction, one row per item. From memory, or a folder of two parquet files."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from patchkern.batch.arrow import arrow_text
from patchkern.batch.columns import id_array, is_sequence, number_array
from patchkern.batch.instants import instants
from patchkern.data._text import log_left_out
from patchkern.data.interactions import Interactions
from patchkern.data.item_text import ItemText, as_text
from patchkern.data.parquet import INTERACTIONS, ITEMS, read_table

# The names that are looked for where the caller gives none.
_FIELDS = {
    "user_field": ("user_id", "user", "userId"),
    "item_field": ("item_id", "item", "itemId"),
    "time_field": ("timestamp", "time"),
    "rating_field": ("rating",),
    "title_field": ("title", "name"),
}


def read_tables(path: str | PathLike[str], **options: Any) -> Interactions:
    """Read a folder with ``interactions.parquet`` and ``items.parquet``, or the former with the latter beside it.

    Args:
        options: keyword arguments of `from_tables`; the data set is called as the folder is.

    Raises:
        FileNotFoundError: one of the files is missing.
        ImportError: pyarrow is missing.
        TypeError, ValueError: as of `from_tables`, with the file; no parquet file.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    files = folder / INTERACTIONS, folder / ITEMS
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file}: expected {INTERACTIONS} and {ITEMS}, found no such file")
    options = {"name": folder.resolve().name, **options}
    return from_tables(*(read_table(file) for file in files), labels=(str(files[0]), str(files[1])), **options)


def from_tables(
    interactions: Any,
    items: Any,
    *,
    user_field: str | None = None,
    item_field: str | None = None,
    time_field: str | None = None,
    rating_field: str | None = None,
    title_field: str | None = None,
    item_text: str | None = None,
    ordered: bool = False,
    time_unit: str | None = None,
    tie_seed: int | None = 0,
    labels: tuple[str, str] = ("interactions", "items"),
    **about: Any,
) -> Interactions:
    """Interactions of two tables: of pandas, polars or pyarrow, or mappings of names to columns.

    Ids keep their type, integers or strings, which must be that of both tables. Items without title (missing or
    white space) and items that the table of items lacks are left out with their interactions; how many is logged.

    Args:
        interactions: one row per interaction, in any order: user, item, time, and perhaps a rating.
        items: one row per item: its id and title; the catalogue keeps their order.
        user_field, item_field, time_field, rating_field, title_field: names of columns. None: user_id, user or userId;
            item_id, item or itemId; timestamp or time; rating; title or name, whichever one is there.
        item_text: what a model reads of an item, such as "title (brand, categories)": columns of the table of items,
            and the title; see `Interactions.texts`.
        ordered: there is no time, or none is to be read: the rows are in order.
        time_unit, tie_seed: see `Interactions.from_columns`.
        labels: what complaints call the two tables.
        about: ``name``, ``system``, ``instruction`` of `Interactions`.

    Raises:
        TypeError: a column of another type.
        ValueError: a column that is not found, with those that are there; a missing value; an id with two titles.

    Examples:
        >>> from patchkern.data import from_tables
        >>> interactions = {"user": ["eve", "eve", "bob"], "item": [8, 7, 7], "time": [20, 10, 30]}
        >>> data = from_tables(interactions, {"item": [7, 8], "title": ["Alien", "Aliens"]})
        >>> {user: items.tolist() for user, items in zip(data.user_ids.tolist(), data.histories)}
        {'bob': [7], 'eve': [7, 8]}
    """
    if ordered and not (time_field is None and time_unit is None):
        argument, given = ("time_unit", time_unit) if time_field is None else ("time_field", time_field)
        raise ValueError(f"{argument}: expected None with ordered=True, which reads no times, got {given!r}")
    rows, catalog = _Table(labels[0], interactions), _Table(labels[1], items)
    users = rows.ids("user_field", user_field)
    taken = rows.ids("item_field", item_field)
    time = None if ordered else rows.name("time_field", time_field, "; ordered=True if the rows are in order of time")
    times = None if time is None else instants(rows.called(time), rows.values[time], time_unit)
    rated = rows.name("rating_field", rating_field, needed=False)
    ratings = None if rated is None else number_array(rows.called(rated), rows.values[rated])
    ids, texts = catalog.ids("item_field", item_field), catalog.texts("title_field", title_field)
    rows.check_length(users, taken, None if times is None else times.ticks, ratings)
    catalog.check_length(ids, texts)
    if ids.size and taken.size and ids.dtype.kind != taken.dtype.kind:
        kinds = {"i": "integer", "U": "string"}
        raise TypeError(
            f"{labels[1]}: expected {kinds[taken.dtype.kind]} item ids as in {labels[0]}, got {kinds[ids.dtype.kind]}"
        )
    titles: dict[Any, str] = {}
    for row, (item, title) in enumerate(zip(ids.tolist(), texts, strict=True)):
        if title is not None and title.strip() and titles.setdefault(item, title) != title:
            raise ValueError(
                f"{labels[1]}, row {row}: expected {titles[item]!r} again as title of {item!r}, got {title!r}"
            )
    if item_text is not None:
        about["texts"] = catalog.item_texts(item_text, ids.tolist(), titles)
    known = np.isin(taken, ids)
    titled = np.isin(taken, np.array(list(titles), ids.dtype))
    left_out = {"with an item without title": known & ~titled, f"with an item that {labels[1]} lacks": ~known}
    log_left_out(labels[0], {reason: int(chosen.sum()) for reason, chosen in left_out.items()})
    return Interactions.from_columns(
        users[titled],
        taken[titled],
        None if times is None else times._replace(ticks=times.ticks[titled]),
        titles,
        None if ratings is None else ratings[titled],
        tie_seed=tie_seed,
        **about,
    )


class _Table:
    """Columns by name, whatever holds them."""

    def __init__(self, label: str, table: Any) -> None:
        names = getattr(table, "column_names", None)  # pyarrow
        if names is None:
            names = getattr(table, "columns", table if isinstance(table, Mapping) else None)
        if names is None or not hasattr(table, "__getitem__"):
            raise TypeError(f"{label}: expected a table or a mapping of columns, got {type(table).__name__}")
        self.label = label
        self.names = list(names)
        self.values: Mapping[str, Any] = table

    def name(self, argument: str, given: str | None, hint: str = "", needed: bool = True) -> str | None:
        """The name of a column: the one given, else the only usual one that is there."""
        usual = (given,) if given is not None else _FIELDS[argument]
        found = [name for name in self.names if name in usual]
        if len(found) > 1:
            raise ValueError(f"{self.label}: expected {argument}=, as there are columns {', '.join(map(repr, found))}")
        if not found and (needed or given is not None):
            wanted, there = " or ".join(map(repr, usual)), ", ".join(map(str, self.names)) or "none"
            raise ValueError(f"{self.label}: expected a column {wanted} ({argument}), got {there}{hint}")
        return found[0] if found else None

    def check_length(self, *columns: Any) -> None:
        lengths = sorted({len(column) for column in columns if column is not None})
        if len(lengths) > 1:
            raise ValueError(f"{self.label}: expected columns of one length, got {' and '.join(map(str, lengths))}")

    def called(self, name: str) -> str:
        return f"{self.label}: {name}"

    def ids(self, argument: str, given: str | None) -> NDArray[Any]:
        name = str(self.name(argument, given))
        ids = id_array(self.values[name], self.called(name))
        if ids.ndim != 1:
            raise ValueError(f"{self.called(name)}: expected a 1-D column, got shape {ids.shape}")
        return ids

    def texts(self, argument: str, given: str | None) -> list[str | None]:
        """The titles, None where there is none."""
        name = str(self.name(argument, given))
        column = self.values[name]
        if hasattr(column, "to_pylist"):
            return arrow_text(self.called(name), column)
        values = self._listed(name)
        for row, value in enumerate(values):
            if not isinstance(value, str):
                if not _is_missing(value):
                    raise TypeError(f"{self.called(name)}, row {row}: expected text, got {type(value).__name__}")
                values[row] = None
        return values

    def item_texts(self, form: str, ids: list[Any], titles: Mapping[Any, str]) -> dict[Any, str]:
        """The texts of all items that have a title."""
        text = ItemText.parse(form)
        if text is None:
            return {}
        columns = [self._written(str(self.name("item_text", name))) for name in text.fields]
        self.check_length(ids, *columns)
        texts: dict[Any, str] = {}
        for row, (item, *values) in enumerate(zip(ids, *columns, strict=True)):
            if item in titles:
                read = text.of(titles[item], values)
                if texts.setdefault(item, read) != read:
                    raise ValueError(
                        f"{self.label}, row {row}: expected {texts[item]!r} again as text of {item!r}, got {read!r}"
                    )
        return texts

    def _written(self, name: str) -> list[str]:
        written = []
        for row, value in enumerate(self._listed(name)):
            try:
                written.append("" if _is_missing(value) else as_text(value))
            except TypeError as error:
                raise TypeError(f"{self.called(name)}, row {row}: {error}") from None
        return written

    def _listed(self, name: str) -> list[Any]:
        """A column's values, whatever they are."""
        column = self.values[name]
        if not is_sequence(column):
            raise TypeError(f"{self.called(name)}: expected a column, got {type(column).__name__}")
        ways = (getattr(column, way) for way in ("to_pylist", "to_list", "tolist") if hasattr(column, way))
        return list(next(ways, lambda: column)())


def _is_missing(value: Any) -> bool:
    """None, NaN, or what pandas has for them, which compares to nothing."""
    if isinstance(value, (list, tuple, np.ndarray)):
        return False
    try:
        return value is None or bool(value != value)
    except TypeError:
        return True
