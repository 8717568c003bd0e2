# SPDX-License-Identifier: Apache-2.0
"""Parquet: one row per user with a list of items and the range of each split's targets; beside it the titles.

A folder holds ``histories.parquet`` (``user``; ``items``: list, oldest first; optionally the lists ``timestamps`` and
``ratings``; ``train_first``, ``train_last``, ``val_first``, ...: the inclusive range of target positions, or null),
``items.parquet`` (``item``, ``title``) and optionally ``prompt.txt`` (line 1: system message, line 2: instruction).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from patchkern.batch.histories import Histories
from patchkern.data.interactions import SPLITS, Interactions

HISTORIES, ITEMS, PROMPT = "histories.parquet", "items.parquet", "prompt.txt"


def read_parquet(folder: str | PathLike[str]) -> Interactions:
    """Read a folder in the form above; the splits are those of the file.

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
    table = _read_table(histories_file)
    users = _numpy(_column(histories_file, table, "user"))
    items, offsets = _lists(histories_file, table, "items")
    present = [name for name in ("timestamps", "ratings") if name in table.column_names]
    lists = {name: _lists(histories_file, table, name) for name in present}
    for name, (_, other) in lists.items():
        if not np.array_equal(offsets, other):
            raise ValueError(f"{histories_file}: expected as many {name} as items in each row")
    ranges = {split: _range(histories_file, table, split) for split in SPLITS if f"{split}_first" in table.column_names}
    catalog = _read_table(items_file)
    ids, names = _column(items_file, catalog, "item").to_pylist(), _column(items_file, catalog, "title").to_pylist()
    titles = dict(zip(ids, names, strict=True))
    if len(titles) != len(ids):
        raise ValueError(f"{items_file}: expected distinct items, got {len(ids) - len(titles)} more than once")
    system, instruction = _prompt(folder / PROMPT)
    return Interactions(
        users,
        Histories(items, offsets, lists["timestamps"][0] if "timestamps" in lists else None),
        titles,
        lists["ratings"][0] if "ratings" in lists else None,
        ranges,
        name=folder.resolve().name,
        system=system,
        instruction=instruction,
    )


def write_parquet(interactions: Interactions, folder: str | PathLike[str]) -> None:
    """Write the folder that `read_parquet` reads back; worth it where reading the original takes minutes.

    Every file is written under a temporary name and renamed.

    Raises:
        ImportError: pyarrow is missing.
    """
    pa, pq = import_pyarrow()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    histories = interactions.histories

    def lists(values: NDArray[Any]) -> Any:
        return pa.LargeListArray.from_arrays(pa.array(histories.offsets), pa.array(values))

    columns = {"user": pa.array(interactions.user_ids), "items": lists(histories.items)}
    if histories.timestamps is not None:
        columns["timestamps"] = lists(histories.timestamps)
    if interactions.ratings is not None:
        columns["ratings"] = lists(interactions.ratings)
    for split, bounds in interactions.ranges.items():
        empty = bounds[:, 0] == bounds[:, 1]
        columns[f"{split}_first"] = pa.array(bounds[:, 0].astype(np.int32), mask=empty)
        columns[f"{split}_last"] = pa.array((bounds[:, 1] - 1).astype(np.int32), mask=empty)
    titles = {"item": pa.array(interactions.item_ids), "title": pa.array(list(interactions.titles.values()))}
    replace_file(folder / ITEMS, lambda file: pq.write_table(pa.table(titles), file))
    if interactions.system is not None and interactions.instruction is not None:
        prompt = f"{interactions.system}\n{interactions.instruction}\n"
        replace_file(folder / PROMPT, lambda file: Path(file).write_text(prompt, encoding="utf-8"))
    replace_file(folder / HISTORIES, lambda file: pq.write_table(pa.table(columns), file))


def import_pyarrow() -> tuple[Any, Any]:
    """pyarrow and its parquet module.

    Raises:
        ImportError: it is missing, and how to install it.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError("parquet needs pyarrow, which is not installed: pip install 'patchkern[data]'") from error
    return pyarrow, pyarrow.parquet


def _read_table(path: Path) -> Any:
    pa, pq = import_pyarrow()
    try:
        return pq.read_table(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path}: expected a parquet file: {error}") from error


def _column(path: Path, table: Any, name: str) -> Any:
    if name not in table.column_names:
        raise ValueError(f"{path}: expected a column {name!r}, got {', '.join(table.column_names)}")
    column = table[name].combine_chunks()
    if column.null_count:
        raise ValueError(f"{path}: expected no null in column {name!r}, got {column.null_count}")
    return column


def _numpy(column: Any) -> NDArray[Any]:
    values = np.asarray(column.to_numpy(zero_copy_only=False))
    return values.astype(str) if values.dtype == object else values


def _lists(path: Path, table: Any, name: str) -> tuple[NDArray[Any], NDArray[np.int64]]:
    pa, _ = import_pyarrow()
    column = _column(path, table, name)
    if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
        raise ValueError(f"{path}: expected lists in column {name!r}, got {column.type}")
    values = column.flatten()
    if values.null_count:
        raise ValueError(f"{path}: expected no null inside column {name!r}, got {values.null_count}")
    offsets = np.zeros(len(column) + 1, np.int64)
    np.cumsum(_numpy(column.value_lengths()), out=offsets[1:])
    return _numpy(values), offsets


def _range(path: Path, table: Any, split: str) -> NDArray[np.int64]:
    """Inclusive and nullable in the file, half-open with empty ranges here."""
    bounds = []
    for name in (f"{split}_first", f"{split}_last"):
        if name not in table.column_names:
            raise ValueError(f"{path}: expected a column {name!r}, got {', '.join(table.column_names)}")
        bounds.append(table[name].combine_chunks())
    first, last = (bound.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64) for bound in bounds)
    if ((first < 0) != (last < 0)).any():
        raise ValueError(f"{path}: expected {split}_first and {split}_last to be null in the same rows")
    return np.stack([np.maximum(first, 0), np.where(last < 0, 0, last + 1)], axis=1)


def _prompt(path: Path) -> tuple[str | None, str | None]:
    if not path.is_file():
        return None, None
    lines = path.read_text(encoding="utf-8").splitlines()
    if len(lines) < 2:
        raise ValueError(f"{path}: expected two lines (system message, instruction), got {len(lines)}")
    return lines[0], lines[1]


def replace_file(path: Path, write: Callable[[str], Any]) -> None:
    """Let ``write`` make the file under a temporary name and rename it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(str(temporary))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
