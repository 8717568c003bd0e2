# SPDX-License-Identifier: Apache-2.0
"""Interactions of a streamed file, kept as numbers until all are there."""

from __future__ import annotations

from array import array
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from patchkern.batch.columns import id_array
from patchkern.data._text import log_left_out
from patchkern.data._titles import Titles
from patchkern.data.interactions import Interactions


class Rows:
    """Some 32 bytes a row, and each id once.

    Args:
        path: the file, which complaints name.
        rated: rows have a rating.
    """

    def __init__(self, path: Path, *, rated: bool) -> None:
        self.path = path
        self.rated = rated
        self.users: dict[str | int, int] = {}
        self.items: dict[str | int, int] = {}
        self._user, self._item, self._time, self._rating = array("q"), array("q"), array("q"), array("d")

    def add(self, user: str | int, item: str | int, time: int, rating: float = 0.0) -> None:
        """Take a row; ``time`` in a unit that all share."""
        self._user.append(self.users.setdefault(user, len(self.users)))
        self._item.append(self.items.setdefault(item, len(self.items)))
        self._time.append(time)
        if self.rated:
            self._rating.append(rating)

    def interactions(
        self, titles: Titles, time_unit: str, tie_seed: int | None, left_out: dict[str, int], **about: Any
    ) -> Interactions:
        """All rows whose item has a title; how many have none is logged, with what else was ``left_out``."""
        user, item, time = (_integers(column) for column in (self._user, self._item, self._time))
        names, taken = id_array(list(self.users), "user_id"), id_array(list(self.items), "item_id")
        titled = np.fromiter((name in titles.of for name in self.items), bool, len(self.items))[item]
        log_left_out(self.path, {**left_out, "with an item without title": int((~titled).sum())})
        # users by number, in the order of their ids: sorting names for every row would take their room each time
        order = np.argsort(names, kind="stable")
        rank = np.empty_like(order)
        rank[order] = np.arange(order.size)
        data = Interactions.from_columns(
            rank[user[titled]],
            taken[item[titled]],
            time[titled],
            titles.of,
            np.frombuffer(self._rating, np.float64)[titled] if self.rated and self._rating else None,
            time_unit=time_unit,
            tie_seed=tie_seed,
            texts=titles.texts_read(),
            **about,
        )
        return replace(data, user_ids=names[order][data.user_ids])


def _integers(column: array[int]) -> np.ndarray:
    return np.frombuffer(column, np.int64) if column else np.zeros(0, np.int64)
