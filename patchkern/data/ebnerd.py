# SPDX-License-Identifier: Apache-2.0
"""EB-NeRD, the Ekstra Bladet News Recommendation Dataset: a bundle (demo, small, large) of parquet files.

The layout that is read, column by column; further columns may be there:

    articles.parquet               article_id; title: text; perhaps subtitle, category_str, topics, ... for item_text
    {train,validation}/history.parquet    a row per user: user_id; article_id_fixed: list of ids; impression_time_fixed:
                                   list of timestamps, as many: what the user clicked before the part begins
    {train,validation}/behaviors.parquet  a row per impression: user_id; impression_time: timestamp;
                                   article_ids_clicked: list of ids, of those that were shown
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from patchkern.batch.arrow import arrow_lists
from patchkern.batch.columns import as_array, id_array
from patchkern.data.interactions import Interactions
from patchkern.data.item_text import TITLE, ItemText
from patchkern.data.parquet import read_table
from patchkern.data.tables import from_tables

SYSTEM = "You recommend news articles."
INSTRUCTION = (
    "A reader has read [HISTORY_SEQUENCE]. Name one article for this reader to read next: its title only, no "
    "explanation."
)
ARTICLES = "articles.parquet"
PARTS = ("train", "validation")
HISTORY, BEHAVIORS = "history.parquet", "behaviors.parquet"


class _Clicks(NamedTuple):
    """``(N,)`` each: users, articles, times as ``datetime64``."""

    users: NDArray[np.int64]
    articles: NDArray[np.int64]
    times: NDArray[Any]

    def take(self, chosen: NDArray[Any]) -> _Clicks:
        return _Clicks(*(column[chosen] for column in self))


def read_ebnerd(path: str | PathLike[str], *, item_text: str | None = None, tie_seed: int | None = 0) -> Interactions:
    """Read the clicks of a bundle's parts, and the articles' titles.

    A part's history ends where its impressions begin, and the validation part's history covers the impressions of the
    training part: so histories are taken of all parts, equal clicks of them once, and clicks in impressions only of
    users whom no later part has a history of. A click in an impression has the impression's time. Articles without
    title, or that the file of articles lacks, are left out; how many clicks is logged.

    Args:
        path: a bundle's folder with ``articles.parquet`` and the folders ``train`` and ``validation``, or one of them;
            or the file of articles in it. The hidden test part has no clicks and is not read.
        item_text: what a model reads of an article, such as "title (category_str, subtitle)": columns of the articles;
            see `Interactions.texts`.
        tie_seed: of the order within one instant, see `Interactions.from_columns`.

    Raises:
        FileNotFoundError: a file is missing.
        ImportError: pyarrow is missing.
        TypeError, ValueError: a missing column or one of another type, missing values, lists of unequal length; the
            message names the file and the column.
    """
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    parts = [folder / part for part in PARTS if (folder / part).is_dir()]
    for file in (folder / ARTICLES, *(part / name for part in parts or [folder / PARTS[0]]
                                      for name in (HISTORY, BEHAVIORS))):  # fmt: skip
        if not file.is_file():
            raise FileNotFoundError(f"{file}: expected a bundle of EB-NeRD, found no such file")
    text = ItemText.parse(item_text)
    wanted = ["article_id", TITLE, *(() if text is None else text.fields)]
    articles = read_table(folder / ARTICLES, wanted)
    histories = [_history(part / HISTORY) for part in parts]
    clicked = []
    for number, part in enumerate(parts):
        clicks = _clicked(part / BEHAVIORS)
        later = [history.users for history in histories[number + 1 :]]
        clicked.append(clicks.take(~np.isin(clicks.users, np.concatenate(later))) if later else clicks)
    users, items, times = _concatenated([_distinct(_concatenated(histories)), *clicked])
    return from_tables(
        {"user_id": users, "article_id": items, "timestamp": times},
        articles,
        item_field="article_id",
        title_field=TITLE,
        item_text=item_text,
        tie_seed=tie_seed,
        labels=(str(folder), str(folder / ARTICLES)),
        name=folder.resolve().name,
        system=SYSTEM,
        instruction=INSTRUCTION,
    )


def is_ebnerd(path: Path) -> bool:
    """Whether a folder, or a file of articles, is of this format."""
    folder = path if path.is_dir() else path.parent
    parts = any((folder / part / BEHAVIORS).is_file() for part in PARTS)
    return parts and (path.is_dir() or path.name == ARTICLES)


def _history(path: Path) -> _Clicks:
    table = read_table(path, ("user_id", "article_id_fixed", "impression_time_fixed"))
    users = _ids(path, "user_id", table["user_id"])
    items, offsets = _lists(path, table, "article_id_fixed")
    times, bounds = _lists(path, table, "impression_time_fixed")
    if not np.array_equal(offsets, bounds):
        raise ValueError(f"{path}: expected as many impression_time_fixed as article_id_fixed in each row")
    return _Clicks(
        np.repeat(users, np.diff(offsets)),
        _ids(path, "article_id_fixed", items),
        _times(path, "impression_time_fixed", times),
    )


def _clicked(path: Path) -> _Clicks:
    table = read_table(path, ("user_id", "impression_time", "article_ids_clicked"))
    users = _ids(path, "user_id", table["user_id"])
    times = _times(path, "impression_time", table["impression_time"])
    items, offsets = _lists(path, table, "article_ids_clicked")
    counts = np.diff(offsets)
    return _Clicks(np.repeat(users, counts), _ids(path, "article_ids_clicked", items), np.repeat(times, counts))


def _distinct(clicks: _Clicks) -> _Clicks:
    """Equal ones once."""
    order = np.lexsort(clicks)
    new = np.ones(order.size, bool)
    for column in clicks:
        new[1:] &= column[order[1:]] == column[order[:-1]]
    new[1:] = ~new[1:]
    return clicks.take(order[new])


def _concatenated(clicks: list[_Clicks]) -> _Clicks:
    return _Clicks(*(np.concatenate(columns) for columns in zip(*clicks, strict=True)))


def _ids(path: Path, name: str, column: Any) -> NDArray[np.int64]:
    ids = id_array(column, f"{path}: {name}")
    if ids.dtype.kind != "i":
        raise TypeError(f"{path}: {name}: expected integers, got text")
    return ids


def _times(path: Path, name: str, column: Any) -> NDArray[Any]:
    times = as_array(f"{path}: {name}", column)
    if times.dtype.kind != "M":
        raise TypeError(f"{path}: {name}: expected timestamps, got {column.type}")
    return times


def _lists(path: Path, table: Any, name: str) -> tuple[Any, NDArray[np.int64]]:
    return arrow_lists(f"{path}: {name}", table[name])
