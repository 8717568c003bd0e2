# SPDX-License-Identifier: Apache-2.0
"""MerRec, Mercari's events of a marketplace: parquet shards of one row per event, a folder of them for each month.

The columns that are read; further ones may be there:

    user_id, item_id    ids, integers or text; product_id in place of item_id where that is asked for
    stime               timestamp of the event
    event_id            text: item_view, item_like, item_add_to_cart_tap, offer_make, buy_start or buy_comp
    name                text: the title of the item as its seller wrote it, or null
    c0_name, c1_name, c2_name, brand_name, size_name, color, ...    for item_text
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from patchkern.batch.arrow import arrow_array, arrow_text
from patchkern.batch.columns import as_array, id_array
from patchkern.data._text import log_left_out
from patchkern.data.interactions import Interactions
from patchkern.data.item_text import ItemText, as_text
from patchkern.data.parquet import read_table

SYSTEM = "You recommend items of a marketplace."
INSTRUCTION = (
    "A customer has looked at [HISTORY_SEQUENCE]. Name one item for this customer to look at next: its title only, no "
    "explanation."
)
EVENTS = ("item_view", "item_like", "item_add_to_cart_tap", "offer_make", "buy_start", "buy_comp")

_SHARD = re.compile(r"[0-9]{12}\.parquet")
_MONTH = re.compile(r"[0-9]{8}")


def read_merrec(
    path: str | PathLike[str],
    *,
    events: Sequence[str] = EVENTS,
    item_field: str = "item_id",
    item_text: str | None = None,
    tie_seed: int | None = 0,
) -> Interactions:
    """Read events, and as titles the items' names.

    Events of a user that follow each other on one item (looked at, liked, bought) are one interaction, at the time of
    the first. An item's title, and what its text is made of, are those of its latest event that has a name; white space
    in it is one space. Events on items without any name are left out; how many is logged. Memory holds some 40 bytes
    per event, the ids, names and texts: read as many shards as fit, each has all events of its users in its month.

    Args:
        path: a shard, ``000000000000.parquet``; a month's folder of shards, ``20230501``; or a folder of months.
        events: those of `EVENTS` that are read.
        item_field: ``item_id``, a single item of one seller; or ``product_id``, items of a kind, whose title is the
            name of the one seen last.
        item_text: what a model reads of an item, such as "title (brand_name, c2_name)": columns of the events; see
            `Interactions.texts`.
        tie_seed: of the order within one instant, see `Interactions.from_columns`.

    Raises:
        FileNotFoundError: there is no shard.
        ImportError: pyarrow is missing.
        TypeError, ValueError: a missing column or one of another type, missing values, an event of another name; the
            message names the file and the column.
    """
    unknown = [event for event in events if event not in EVENTS]
    if isinstance(events, str) or not events or unknown:
        raise ValueError(f"events: expected some of {', '.join(EVENTS)}, got {events!r}")
    if item_field not in ("item_id", "product_id"):
        raise ValueError(f"item_field: expected 'item_id' or 'product_id', got {item_field!r}")
    path = Path(path)
    files = _shards(path)
    if not files:
        raise FileNotFoundError(f"{path}: expected shards like 000000000000.parquet, found none")
    text = ItemText.parse(item_text)
    latest = _Latest(text)
    columns = [_read(file, events, item_field, latest) for file in files]
    for name, parts in zip(("user_id", item_field), zip(*columns, strict=True), strict=False):
        if len({part.dtype.kind for part in parts if part.size}) > 1:
            raise TypeError(f"{path}: {name}: expected integers in all shards or text in all, got both")
    users, items, times = (np.concatenate(parts) for parts in zip(*columns, strict=True))
    titled = np.isin(items, id_array(list(latest.titles), item_field)) if items.size else np.zeros(0, bool)
    log_left_out(path, {"with an item without name": int((~titled).sum())})
    data = Interactions.from_columns(
        users[titled], items[titled], times[titled], latest.titles, tie_seed=tie_seed,
        texts=latest.texts, name=path.resolve().name.partition(".")[0], system=SYSTEM, instruction=INSTRUCTION,
    )  # fmt: skip
    again = data.histories.items[1:] == data.histories.items[:-1]
    again &= data.positions[1:] > 0
    return data.keep(np.concatenate([np.ones(min(data.num_interactions, 1), bool), ~again]))


def is_merrec(path: Path) -> bool:
    """Whether a folder, or a shard, is named as of this format."""
    return bool(_shards(path)) if path.is_dir() else _SHARD.fullmatch(path.name) is not None


def _shards(path: Path) -> list[Path]:
    """The shards of a folder, or of its folders of months, in order; or the one file."""
    if path.is_file():
        return [path]
    months = sorted(child for child in path.iterdir() if child.is_dir() and _MONTH.fullmatch(child.name))
    return sorted(file for folder in (path, *months) for file in folder.iterdir() if _SHARD.fullmatch(file.name))


class _Latest:
    """Title and text of each item, of its latest event that has a name."""

    def __init__(self, text: ItemText | None) -> None:
        self.text = text
        self.titles: dict[Any, str] = {}
        self.texts: dict[Any, str] | None = None if text is None else {}
        self._times: dict[Any, np.datetime64] = {}

    @property
    def fields(self) -> tuple[str, ...]:
        return () if self.text is None else self.text.fields

    def take(self, path: Path, table: Any, items: NDArray[Any], times: NDArray[Any]) -> None:
        """Learn of a shard's events."""
        names = [" ".join((name or "").split()) for name in arrow_text(f"{path}: name", table["name"])]
        named = np.flatnonzero(np.fromiter(map(bool, names), bool, len(names)))
        order = named[np.lexsort((times[named], items[named]))]
        last = order[np.flatnonzero(np.append(items[order[1:]] != items[order[:-1]], True))] if order.size else order
        last = last[[self._is_later(item, time) for item, time in zip(items[last].tolist(), times[last], strict=True)]]
        fields = [_written(path, table, name, last) for name in self.fields]
        for item, row, *values in zip(items[last].tolist(), last.tolist(), *fields, strict=True):
            self._times[item] = times[row]
            self.titles[item] = names[row]
            if self.text is not None and self.texts is not None:
                self.texts[item] = self.text.of(names[row], values)

    def _is_later(self, item: Any, time: np.datetime64) -> bool:
        return item not in self._times or bool(time > self._times[item])


def _read(path: Path, events: Sequence[str], item_field: str, latest: _Latest) -> tuple[NDArray[Any], ...]:
    """``(N,)`` users, items and times of a shard's chosen events."""
    table = read_table(path, ("user_id", item_field, "stime", "event_id", "name", *latest.fields))
    kinds = id_array(table["event_id"], f"{path}: event_id")
    other = sorted({str(kind) for kind in np.unique(kinds)} - set(EVENTS))
    if other:
        raise ValueError(f"{path}: event_id: expected {', '.join(EVENTS)}, got {other[0]!r}")
    chosen = np.isin(kinds, list(events))
    table = table.filter(chosen)
    users = id_array(table["user_id"], f"{path}: user_id")
    items = id_array(table[item_field], f"{path}: {item_field}")
    times = as_array(f"{path}: stime", table["stime"])
    if times.dtype.kind != "M":
        raise TypeError(f"{path}: stime: expected timestamps, got {table['stime'].type}")
    latest.take(path, table, items, times)
    return users, items, times


def _written(path: Path, table: Any, name: str, rows: NDArray[np.int64]) -> list[str]:
    try:
        return [as_text(value) for value in arrow_array(name, table[name]).take(rows).to_pylist()]
    except TypeError as error:
        raise TypeError(f"{path}: {name}: {error}") from None
