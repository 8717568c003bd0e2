# SPDX-License-Identifier: Apache-2.0
"""The catalogue that a model is served with, where it is not the one that it was saved with: a file of titles."""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from patchkern.batch.catalog import Catalog
from patchkern.batch.columns import id_array
from patchkern.data.parquet import read_table
from patchkern.models.files import Description, read_tokenizer

_FIELDS = ("item_id", "title", "text")


def read_titles(path: str | PathLike[str]) -> tuple[dict[Any, str], dict[Any, str] | None]:
    """``{item id: title}`` and, where the file has them, ``{item id: input text}``, in the order of the file.

    Args:
        path: parquet with the columns ``item_id``, ``title`` and perhaps ``text``, or JSON, an object with these on
            every line.

    Raises:
        FileNotFoundError, ImportError: no such file; pyarrow is missing, for parquet.
        TypeError, ValueError: what is wrong with it, by line or row.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"catalog: expected a file of titles, got {str(path)!r}, which is none")
    if path.suffix == ".parquet":
        table = read_table(path)
        rows = [
            dict(zip(table.column_names, row, strict=True)) for row in zip(*table.to_pydict().values(), strict=True)
        ]
        named = [(f"row {number}", row) for number, row in enumerate(rows)]
    else:
        named = list(_json_lines(path))
    has_texts = bool(named) and "text" in named[0][1]
    wanted = _FIELDS if has_texts else _FIELDS[:2]
    titles: dict[Any, str] = {}
    texts: dict[Any, str] = {}
    for where, row in named:
        if any(field not in row for field in wanted) or ("text" in row) != has_texts:
            raise ValueError(
                f"{path}, {where}: expected {', '.join(wanted)}, got {', '.join(map(str, row)) or 'nothing'}"
            )
        item = row["item_id"]
        for field in wanted[1:]:
            if not isinstance(row[field], str):
                raise TypeError(f"{path}, {where}: expected text as {field}, got {row[field]!r:.60}")
        if item in titles:
            raise ValueError(f"{path}, {where}: expected distinct item ids, got {item!r:.60} again")
        titles[item] = row["title"]
        if has_texts:
            texts[item] = row["text"]
    id_array(list(titles), f"{path}: item_id")
    return titles, texts if has_texts else None


def _json_lines(path: Path) -> Any:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: expected JSON, got {line.strip()!r:.60}: {error}") from error
            if not isinstance(row, dict) or isinstance(row.get("item_id"), (list, dict)):
                raise ValueError(f"{path}, line {number}: expected an object with an item_id, got {line.strip()!r:.60}")
            yield f"line {number}", row


def read_catalog(path: str | PathLike[str], folder: Path, description: Description) -> Catalog:
    """The catalogue of a file of titles, as the model in ``folder`` reads it.

    Raises:
        FileNotFoundError, ImportError, TypeError, ValueError: as of `read_titles`; the model reads titles and was saved
            without a tokenizer to cut them up.
    """
    titles, texts = read_titles(path)
    if "titles" not in description.learns:  # of items, whose titles nobody reads
        return Catalog.from_token_ids(
            np.arange(len(titles)), np.arange(len(titles) + 1), list(titles), list(titles.values())
        )
    tokenizer = read_tokenizer(folder, description)
    if tokenizer is None:
        raise ValueError(
            f"catalog: expected none with the model in {str(folder)!r}, which was saved without the tokenizer that new "
            "titles need; save_pretrained(folder, tokenizer=tokenizer) keeps it"
        )
    return Catalog.from_titles(titles, tokenizer, texts)
