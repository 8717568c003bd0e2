# SPDX-License-Identifier: Apache-2.0
"""One user's request, checked: what is wrong with it is said before it waits beside others."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from patchkern.serving.identity import user_key
from patchkern.serving.server.limits import Limits
from patchkern.serving.server.problems import Invalid, Problem
from patchkern.serving.server.schema import Asked, Recommended
from patchkern.serving.server.served import Served

Ranked = list[Recommended]
Loc = tuple[str | int, ...]


class Options(NamedTuple):
    """What must be the same for users who are computed together."""

    search: str
    k: int
    num_beams: int
    exclude_seen: bool
    chooses: bool
    """whether there are ``allowed_items``"""
    named: bool
    """whether something of them is kept"""
    timed: bool
    """whether their histories have timestamps"""


@dataclass(eq=False)
class Job:
    """A user who waits for a list.

    Attributes:
        served: the model that the request was checked against, which is the one that answers.
        items, times: of the history, without the items that the catalogue lacks; the latter if there are any.
        allowed: ids, or None for all.
        dropped: ids that the catalogue lacks.
        loc: of the user in the request.
        reply: the list, for the loop that waits for it; None where nobody does.
        arrived: by `time.monotonic`.
        rows, compressed: of `Served.rows`, once they are counted.
        settled: whether the reply is on its way.
    """

    served: Served
    options: Options
    items: NDArray[Any]
    times: NDArray[np.float64] | None
    allowed: NDArray[Any] | None
    user_id: Hashable
    dropped: int
    loc: Loc = ()
    reply: asyncio.Future[Ranked] | None = None
    arrived: float = field(default_factory=time.monotonic)
    rows: int = 0
    compressed: int = 0
    settled: bool = False

    @property
    def group(self) -> tuple[int, Options]:
        """Equal for jobs that can be computed together."""
        return self.served.number, self.options


def admitted(asked: Asked, served: Served, limits: Limits, loc: Loc = ("body",)) -> Job:
    """The job of a request; called by the loop that waits for the reply.

    Raises:
        Invalid: naming the field, below ``loc``.
    """
    check = _Check(asked, served, limits, loc)
    items, times, dropped = check.history()
    allowed, dropped_too = check.allowed()
    search = check.search()
    k = check.at_most("k", asked.k, limits.max_k)
    beams = check.at_most("num_beams", asked.num_beams or min(max(20, k), limits.max_beams), limits.max_beams)
    named = check.named()
    options = Options(
        search, k, beams if search == "beam" else 1, asked.exclude_seen, allowed is not None, named, times is not None
    )
    reply = asyncio.get_running_loop().create_future()
    return Job(served, options, items, times, allowed, asked.user_id, dropped + dropped_too, loc, reply)


def tell(outcomes: Sequence[tuple[asyncio.Future[Ranked], Ranked | Problem]]) -> None:
    """Give those who wait what they wait for, or why there is none, on their loop; who has something keeps it."""
    for reply, outcome in outcomes:
        if reply.done():
            continue
        if isinstance(outcome, Problem):
            reply.set_exception(outcome)
            reply.exception()  # seen, though another reply of its request may be the one that is raised
        else:
            reply.set_result(outcome)


class _Check:
    def __init__(self, asked: Asked, served: Served, limits: Limits, loc: Loc) -> None:
        self._asked, self._served, self._limits, self._loc = asked, served, limits, loc
        self._catalog = served.model.catalog

    def _invalid(self, message: str, *loc: str | int) -> Invalid:
        return Invalid(message, (*self._loc, *loc))

    def at_most(self, name: str, value: int, most: int) -> int:
        if value > most:
            raise self._invalid(f"expected at most {most}, got {value}", name)
        return value

    def search(self) -> str:
        search = self._asked.search or self._served.search
        if search not in self._served.searches:
            able = ", ".join(self._served.searches)
            raise self._invalid(f"expected one of {able}, which this model is able to, got {search!r}", "search")
        return search

    def history(self) -> tuple[NDArray[Any], NDArray[np.float64] | None, int]:
        """Ids, timestamps if any, and how many ids were left out."""
        asked, most = self._asked, self._limits.max_history
        if (asked.history is None) == (asked.titles is None):
            got = "neither" if asked.history is None else "both"
            raise self._invalid(f"expected either history, of item ids, or titles, got {got}", "history")
        name = "titles" if asked.history is None else "history"
        given = asked.titles if asked.history is None else asked.history
        if len(given or ()) > most:
            raise self._invalid(f"expected at most {most} items, got {len(given or ())}", name)
        if asked.history is None:
            places = self._of_titles(asked.titles or [])
        else:
            places = self._places("history", asked.history)
        times = None
        if asked.timestamps is not None:
            if len(asked.timestamps) != places.size:
                raise self._invalid(f"expected one per item ({places.size}), got {len(asked.timestamps)}", "timestamps")
            times = np.array(asked.timestamps, np.float64)
        dropped = 0
        if asked.unknown == "drop":
            known = places >= 0
            dropped = int(places.size - known.sum())
            places, times = places[known], None if times is None else times[known]
        return self._catalog.item_ids[places], times, dropped

    def allowed(self) -> tuple[NDArray[Any] | None, int]:
        """Ids, None for all, and how many were left out."""
        if self._asked.allowed_items is None:
            return None, 0
        places = self._places("allowed_items", self._asked.allowed_items)
        known = places[places >= 0]
        return self._catalog.item_ids[known], int(places.size - known.size)

    def named(self) -> bool:
        """Whether something is kept of the user."""
        served, user_id = self._served, self._asked.user_id
        if user_id is None or (served.cache is None and served.states is None):
            return False
        try:
            user_key(user_id, "user_id")
        except ValueError as error:
            raise self._invalid(str(error).removeprefix("user_id: "), "user_id") from error
        return True

    def _places(self, name: str, ids: list[Any]) -> NDArray[np.int32]:
        """Catalogue positions, -1 where an id is not in the catalogue and may be dropped."""
        kind, called = (str, "a string") if self._catalog.item_ids.dtype.kind == "U" else (int, "an integer")
        if not set(map(type, ids)) <= {kind}:
            place = [type(item) is kind for item in ids].index(False)
            raise self._invalid(
                f"expected {called}, as the catalogue's item ids are, got {_short(ids[place])}", name, place
            )
        try:
            places = self._catalog.find(ids, name)
        except ValueError as error:  # what no id can be
            raise self._invalid(str(error).removeprefix(f"{name}: "), name) from error
        self._refuse(name, ids, places)
        return places

    def _of_titles(self, titles: list[str]) -> NDArray[np.int32]:
        found = [self._served.index.exact(title) for title in titles]
        places = np.array([-1 if place is None else place for place in found], np.int32)
        self._refuse("titles", titles, places)
        return places

    def _refuse(self, name: str, given: list[Any], places: NDArray[np.int32]) -> None:
        if self._asked.unknown == "drop" or not places.size or places.min() >= 0:
            return
        at = int(places.argmin())
        message = f"expected one of the catalogue's {len(self._catalog)} items, got {_short(given[at])}"
        if name == "titles" and (near := self._nearest(given[at])):
            message += f"; did you mean {' or '.join(map(repr, near))}?"
        raise self._invalid(f'{message}; unknown="drop" leaves such items out', name, at)

    def _nearest(self, title: str) -> list[str]:
        return [self._served.titles[place] for place in self._served.index.near(title)]


def _short(value: Any) -> str:
    """For people, and with nothing that cannot be encoded."""
    text = ascii(value) if not isinstance(value, str) or not value.isprintable() else repr(value)
    return text if len(text) <= 60 else f"{text[:59]}…"
