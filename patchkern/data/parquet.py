# SPDX-License-Identifier: Apache-2.0
"""Parquet: one row per user with a list of items and the range of each split's targets; beside it the titles.

A folder holds ``histories.parquet`` (``user``; ``items``: list, oldest first; optionally the lists ``timestamps`` and
``ratings``; ``train_first``, ``train_last``, ``val_first``, ...: the inclusive range of target positions, or null),
``items.parquet`` (``item``, ``title``; optionally ``text`` and further fields) and optionally ``about.json`` (``name``,
``system``, ``instruction``) or ``prompt.txt`` (line 1: system message, line 2: instruction). Times are arrow's, or
numbers: seconds, but without an ``about.json`` by their size, with a warning unless it is seconds. Two ordinary tables
are read by `patchkern.data.tables`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from patchkern.batch.arrow import arrow_lists, arrow_text, import_pyarrow
from patchkern.batch.columns import as_array, id_array
from patchkern.batch.histories import Histories
from patchkern.batch.instants import instants
from patchkern.data._text import read_lines
from patchkern.data.interactions import Interactions, check_interactions
from patchkern.data.item_text import ItemText, as_text

HISTORIES, ITEMS, ABOUT, PROMPT = "histories.parquet", "items.parquet", "about.json", "prompt.txt"
INTERACTIONS = "interactions.parquet"  # of `patchkern.data.tables`, whose items are in a file of the same name

# Encodings of equal values have no bound: a file of kilobytes can declare gigabytes. Sequential ids, the most compact
# values that are no repetition, take a twentieth of a byte each.
_VALUES_PER_BYTE = 64
_BYTES_PER_BYTE = 1024
_ALWAYS = 1 << 20


def read_parquet(folder: str | PathLike[str], *, item_text: str | None = None) -> Interactions:
    """Read a folder in the form above; the splits are those of the file.

    Args:
        item_text: what a model reads of an item, such as "title (brand, categories)": columns of ``items.parquet``; see
            `Interactions.texts`. None: its column ``text``, if it has one.

    Raises:
        FileNotFoundError: ``histories.parquet`` or ``items.parquet`` is missing.
        ImportError: pyarrow is missing.
        ValueError: a missing or malformed column, an item without title.
    """
    folder = Path(folder)
    histories_file, items_file = folder / HISTORIES, folder / ITEMS
    for file in (histories_file, items_file):
        if not file.is_file():
            raise FileNotFoundError(f"{file}: expected {HISTORIES} and {ITEMS}, found no such file")
    table = read_table(histories_file)
    users = id_array(_column(histories_file, table, "user"), f"{histories_file}: user")
    items, offsets = _lists(histories_file, table, "items")
    present = [name for name in ("timestamps", "ratings") if name in table.column_names]
    lists = {name: _lists(histories_file, table, name) for name in present}
    for name, (_, other) in lists.items():
        if not np.array_equal(offsets, other):
            raise ValueError(f"{histories_file}: expected as many {name} as items in each row")
    times = None
    if "timestamps" in lists:
        unit = "s" if (folder / ABOUT).is_file() else None  # as `write_parquet` writes them
        times = instants(f"{histories_file}: timestamps", lists["timestamps"][0], unit).seconds()
    splits = [name.removesuffix("_first") for name in table.column_names if name.endswith("_first")]
    ranges = {split: _range(histories_file, table, split) for split in splits}
    catalog = read_table(items_file)
    ids = id_array(_column(items_file, catalog, "item"), f"{items_file}: item").tolist()
    names = arrow_text(f"{items_file}: title", _column(items_file, catalog, "title"))
    titles = dict(zip(ids, names, strict=True))
    if len(titles) != len(ids):
        raise ValueError(f"{items_file}: expected distinct items, got {len(ids) - len(titles)} more than once")
    text = ItemText.parse("text" if item_text is None and "text" in catalog.column_names else item_text)
    texts = None
    if text is not None:
        columns = [_written(items_file, catalog, name) for name in text.fields]
        pairs = zip(titles.items(), *columns, strict=True)
        texts = {item: text.of(title, values) for (item, title), *values in pairs}
    return Interactions(
        users,
        Histories(items, offsets, times),
        titles,
        lists["ratings"][0] if "ratings" in lists else None,
        ranges,
        texts=texts,
        **_about(folder),
    )


def write_parquet(interactions: Interactions, folder: str | PathLike[str]) -> None:
    """Write the folder that `read_parquet` reads back; worth it where reading the original takes minutes.

    Every file is written under a temporary name and renamed; a folder that was not written to the end is not read.

    Raises:
        FileExistsError: a folder with ``interactions.parquet``, whose ``items.parquet`` would be lost.
        ImportError: pyarrow is missing.
    """
    check_interactions(interactions)
    pa, pq = import_pyarrow()
    folder = Path(folder)
    if (folder / INTERACTIONS).exists():
        raise FileExistsError(
            f"folder: expected one without {INTERACTIONS}, whose {ITEMS} would be overwritten, got {str(folder)!r}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    histories = interactions.histories

    def lists(values: NDArray[Any]) -> Any:
        return pa.LargeListArray.from_arrays(pa.array(histories.offsets), _array(values))

    columns = {"user": _array(interactions.user_ids), "items": lists(histories.items)}
    if histories.timestamps is not None:
        columns["timestamps"] = lists(histories.timestamps)
    if interactions.ratings is not None:
        columns["ratings"] = lists(interactions.ratings)
    for split, bounds in interactions.ranges.items():
        empty = bounds[:, 0] == bounds[:, 1]
        columns[f"{split}_first"] = pa.array(bounds[:, 0], mask=empty)
        columns[f"{split}_last"] = pa.array(bounds[:, 1] - 1, mask=empty)
    titles = {
        "item": _array(interactions.item_ids),
        "title": pa.array(list(interactions.titles.values()), pa.large_string()),
    }
    if interactions.texts is not None:
        titles["text"] = pa.array([interactions.texts[item] for item in interactions.titles], pa.large_string())
    about = {name: getattr(interactions, name) for name in ("name", "system", "instruction")}
    text = json.dumps(about, indent=2) + "\n"
    (folder / HISTORIES).unlink(missing_ok=True)  # the old ones do not go with the new items
    replace_file(folder / ITEMS, lambda file: pq.write_table(pa.table(titles), file))
    replace_file(folder / ABOUT, lambda file: Path(file).write_text(text, encoding="utf-8"))
    (folder / PROMPT).unlink(missing_ok=True)
    replace_file(folder / HISTORIES, lambda file: pq.write_table(pa.table(columns), file))


def read_table(path: Path, columns: Sequence[str] | None = None) -> Any:
    """The ``pyarrow.Table`` of a parquet file; text stays a dictionary, which takes no more room than in the file.

    Args:
        columns: names of those to read; None: all.

    Raises:
        ImportError: pyarrow is missing.
        ValueError: no parquet file, a column that is not there, two of one name, or one that declares far more values
            than it has bytes.
    """
    pa, pq = import_pyarrow()
    try:
        with pq.ParquetFile(path) as file:
            size, metadata = path.stat().st_size, file.metadata
            groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
            chunks = [group.column(column) for group in groups for column in range(metadata.num_columns)]
            values = max([metadata.num_rows, *(sum(c.num_values for c in chunks if c.path_in_schema == p)
                          for p in {c.path_in_schema for c in chunks})])  # fmt: skip
            declared = sum(chunk.total_uncompressed_size for chunk in chunks)
            if values > _ALWAYS + _VALUES_PER_BYTE * size or declared > _ALWAYS + _BYTES_PER_BYTE * size:
                raise ValueError(
                    f"{path}: expected a file whose size fits its content, got {size} bytes for {values} values of "
                    f"{declared} bytes"
                )
            text = [
                column.path for column in file.schema
                if column.physical_type == "BYTE_ARRAY" and column.max_repetition_level == 0
            ]  # fmt: skip
        names = file.schema_arrow.names
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"{path}: expected one column {twice[0]!r}, got {', '.join(names)}")
        missing = [name for name in columns or () if name not in names]
        if missing:
            raise ValueError(f"{path}: expected a column {missing[0]!r}, got {', '.join(names)}")
        with pq.ParquetFile(path, read_dictionary=text) as file:
            return file.read(columns=None if columns is None else list(columns))
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}: expected a parquet file: {error}") from error


def _nullable(path: Path, table: Any, name: str) -> Any:
    """One column as one arrow array, nulls and all."""
    if name not in table.column_names:
        raise ValueError(f"{path}: expected a column {name!r}, got {', '.join(table.column_names)}")
    return table[name].combine_chunks()


def _column(path: Path, table: Any, name: str) -> Any:
    column = _nullable(path, table, name)
    if column.null_count:
        raise ValueError(f"{path}: expected no null in column {name!r}, got {column.null_count}")
    return column


def _written(path: Path, table: Any, name: str) -> list[str]:
    """A column of any fields as text, "" for null."""
    try:
        return [as_text(value) for value in _nullable(path, table, name).to_pylist()]
    except TypeError as error:
        raise ValueError(f"{path}: column {name!r}: {error}") from error


def _lists(path: Path, table: Any, name: str) -> tuple[NDArray[Any], NDArray[np.int64]]:
    try:
        values, offsets = arrow_lists(name, _column(path, table, name))
        return as_array(name, values), offsets
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from error


def _array(values: NDArray[Any]) -> Any:
    """An arrow array; an empty one keeps its type too."""
    pa, _ = import_pyarrow()
    return pa.array(values, pa.large_string() if values.dtype.kind == "U" else None)


def _range(path: Path, table: Any, split: str) -> NDArray[np.int64]:
    """Inclusive and nullable in the file, half-open with empty ranges here."""
    bounds = []
    pa, _ = import_pyarrow()
    for name in (f"{split}_first", f"{split}_last"):
        column = _nullable(path, table, name)
        if not (pa.types.is_integer(column.type) or pa.types.is_null(column.type)):
            raise ValueError(f"{path}: expected integers in column {name!r}, got {column.type}")
        bounds.append(column.cast(pa.int64()))
    first, last = (bound.fill_null(-1).to_numpy(zero_copy_only=False) for bound in bounds)
    if ((first < 0) != (last < 0)).any():
        raise ValueError(f"{path}: expected {split}_first and {split}_last to be null in the same rows")
    return np.stack([np.maximum(first, 0), np.where(last < 0, 0, last + 1)], axis=1)


def _about(folder: Path) -> dict[str, Any]:
    """Name and prompt texts, of ``about.json`` or ``prompt.txt``."""
    path = folder / ABOUT
    if path.is_file():
        try:
            about = json.loads(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{path}: expected JSON: {error}") from error
        texts = {"name": str, "system": (str, type(None)), "instruction": (str, type(None))}
        if not isinstance(about, dict) or set(about) != set(texts):
            raise ValueError(f"{path}: expected an object with {', '.join(texts)}, got {about!r:.120}")
        for name, kind in texts.items():
            if not isinstance(about[name], kind):  # type: ignore[arg-type]
                raise ValueError(f"{path}: expected text as {name}, got {about[name]!r:.120}")
        return about
    path = folder / PROMPT
    if not path.is_file():
        return {"name": folder.resolve().name}
    lines = list(read_lines(path))
    if [number for number, _ in lines] != [1, 2]:
        raise ValueError(
            f"{path}: expected two lines (system message, instruction), got {lines[-1][0] if lines else 0}; texts of "
            f"several lines belong into {ABOUT}"
        )
    return {"name": folder.resolve().name, "system": lines[0][1], "instruction": lines[1][1]}


def replace_file(path: Path, write: Callable[[str], Any]) -> None:
    """Let ``write`` make the file under a temporary name and rename it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(str(temporary))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
