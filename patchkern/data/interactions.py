# SPDX-License-Identifier: Apache-2.0
"""Interactions: who took which item when, as flat arrays, with titles and the split of the targets."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from patchkern.batch.arguments import check_count
from patchkern.batch.columns import id_array, mask_array, number_array, title_mapping
from patchkern.batch.frozen import freeze, frozen
from patchkern.batch.histories import Histories
from patchkern.batch.instants import instants
from patchkern.data.samples import Samples

logger = logging.getLogger("patchkern.data")

SPLITS = ("train", "val", "test")
MIN_HISTORY = 3

# A tie here and there is chance; times of which so many are shared were not recorded one by one.
_MANY_TIES = 0.01


@dataclass(frozen=True, eq=False)
class Interactions:
    """A data set in columnar form. Immutable: its arrays are read-only, every change makes a new one.

    Args:
        user_ids: ``(U,)`` distinct ids, integers or strings.
        histories: one history per user, oldest first; its items are keys of ``titles``.
        titles: ``{item id: title}`` of the whole catalogue, in catalogue order.
        ratings: ``(N,)`` finite float, one per interaction, or None.
        ranges: ``{split: (U, 2) int64}``; the targets of user ``u`` in a split are the positions
            ``ranges[split][u, 0] <= position < ranges[split][u, 1]``. Splits never overlap.
        name: what reports call the data set.
        system, instruction: prompt texts that fit the data, or None; the instruction holds ``[HISTORY_SEQUENCE]``.
        texts: ``{item id: text}`` of all items of ``titles``, what a model reads of them in place of their titles
            (`Catalog.from_titles`); readers make them where ``item_text`` names fields. None: the titles.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: arrays that do not fit each other, an item without title, unordered timestamps, overlapping splits.
    """

    user_ids: NDArray[Any]
    histories: Histories
    titles: Mapping[Any, str]
    ratings: NDArray[np.float64] | None = None
    ranges: Mapping[str, NDArray[np.int64]] = field(default_factory=dict)
    name: str = "interactions"
    system: str | None = None
    instruction: str | None = None
    texts: Mapping[Any, str] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.histories, Histories):
            raise TypeError(f"histories: expected Histories, got {type(self.histories).__name__}")
        titles = title_mapping(self.titles)
        texts = None if self.texts is None else title_mapping(self.texts, "texts")
        for name, optional in (("name", False), ("system", True), ("instruction", True)):
            text = getattr(self, name)
            if not (isinstance(text, str) or (optional and text is None)):
                raise TypeError(f"{name}: expected a string, got {type(text).__name__}")
        _check_titles(titles)
        if texts is not None:
            if texts.keys() != titles.keys():
                wrong = next(iter(texts.keys() ^ titles.keys()))
                has = "a text without title" if wrong in texts else "a title without text"
                raise ValueError(f"texts: expected one for each title, got {has}, of {wrong!r}")
            _check_titles(texts, "texts")
        _check_items(self.histories.items, titles)
        _check_times(self.histories)
        user_ids = id_array(self.user_ids, "user_ids")
        if user_ids.shape != (len(self.histories),):
            raise ValueError(f"user_ids: expected one per history ({len(self.histories)}), got shape {user_ids.shape}")
        if np.unique(user_ids).size != user_ids.size:
            raise ValueError("user_ids: expected distinct ids, got one twice")
        ratings = self.ratings
        if ratings is not None:
            ratings = number_array("ratings", ratings)
            if ratings.shape != self.histories.items.shape:
                raise ValueError(
                    f"ratings: expected one per interaction ({self.histories.items.size}), got shape {ratings.shape}"
                )
        if not isinstance(self.ranges, Mapping):
            raise TypeError(f"ranges: expected a mapping of split to bounds, got {type(self.ranges).__name__}")
        ranges = {split: _as_range(split, bounds, self.histories.lengths) for split, bounds in self.ranges.items()}
        _check_disjoint(ranges)
        if self.instruction is not None and "[HISTORY_SEQUENCE]" not in self.instruction:
            raise ValueError(f"instruction: expected a text that holds [HISTORY_SEQUENCE], got {self.instruction!r}")
        own = {
            "user_ids": frozen(user_ids, self.user_ids),
            "titles": MappingProxyType(dict(titles)),
            "texts": None if texts is None else MappingProxyType(dict(texts)),
            "ratings": None if ratings is None else frozen(ratings, self.ratings),
            "ranges": MappingProxyType({split: freeze(bounds) for split, bounds in ranges.items()}),
        }
        for name, value in own.items():
            object.__setattr__(self, name, value)

    @classmethod
    def from_columns(
        cls,
        users: Any,
        items: Any,
        timestamps: Any,
        titles: Mapping[Any, str],
        ratings: Any = None,
        *,
        time_unit: str | None = None,
        tie_seed: int | None = 0,
        **about: Any,
    ) -> Interactions:
        """Build from one row per interaction, in any order.

        Users are sorted by id, each history by time. Where a user's interactions share their instant, no order is
        known, and that of the rows is often one of item ids, which a model would learn: it is drawn, the same whatever
        the order of the rows, and the share of such interactions is logged. Columns are lists, NumPy arrays, tensors,
        or columns of arrow, pandas or polars; their types are checked, not converted.

        Args:
            users, items: ``(N,)`` ids, integers or strings.
            timestamps: ``(N,)`` numbers or datetimes (without a time zone: UTC), or None: rows are then taken to be in
                order. They are sorted as exact as they come and kept in seconds.
            titles: as for the class; ``about`` takes its other fields.
            ratings: ``(N,)`` or None.
            time_unit: of numbers: ``s``, ``ms``, ``us`` or ``ns``; None: by their size, and a warning where these are
                no seconds.
            tie_seed: of the drawn order; None keeps that of the rows.
        """
        if tie_seed is not None:
            check_count("tie_seed", tie_seed, minimum=0, maximum=2**64 - 1)
        users, items = id_array(users, "users"), id_array(items, "items")
        times = None if timestamps is None else instants("timestamps", timestamps, time_unit)
        ratings = None if ratings is None else number_array("ratings", ratings)
        ticks = None if times is None else times.ticks
        for name, column in {"users": users, "items": items, "timestamps": ticks, "ratings": ratings}.items():
            if column is not None and column.shape != (users.size,):
                raise ValueError(f"{name}: expected one per interaction ({users.size}), got shape {column.shape}")
        user_ids, user_index = np.unique(users, return_inverse=True)
        if times is None:
            order = np.argsort(user_index, kind="stable")
        else:
            order = np.lexsort((times.ticks, user_index))
            together = _same(user_index[order]) & _same(times.ticks[order])
            _draw_ties(order, together, items, tie_seed, str(about.get("name", "interactions")))
            times = times._replace(ticks=times.ticks[order])
        offsets = np.zeros(user_ids.size + 1, np.int64)
        np.cumsum(np.bincount(user_index, minlength=user_ids.size), out=offsets[1:])
        seconds = None if times is None else freeze(times.seconds())
        histories = Histories(freeze(items[order]), freeze(offsets), seconds)
        return cls(user_ids, histories, titles, None if ratings is None else ratings[order], **about)

    def __reduce__(self) -> tuple[Any, ...]:
        """As its fields: a read-only mapping cannot be pickled, and a copy is checked and read-only again."""
        ranges = dict(self.ranges)
        fields = (self.user_ids, self.histories, dict(self.titles), self.ratings, ranges, self.name, self.system)
        return type(self), (*fields, self.instruction, None if self.texts is None else dict(self.texts))

    def __repr__(self) -> str:
        splits = ", ".join(self.ranges) or "none"
        return (
            f"Interactions({self.name!r}: {self.num_users:,} users, {self.num_items:,} items, "
            f"{self.num_interactions:,} interactions, splits: {splits})"
        )

    @property
    def num_users(self) -> int:
        return len(self.histories)

    @property
    def num_items(self) -> int:
        """Items of the catalogue, taken by somebody or not."""
        return len(self.titles)

    @property
    def num_interactions(self) -> int:
        return int(self.histories.items.size)

    @property
    def item_ids(self) -> NDArray[Any]:
        """``(num_items,)`` the catalogue's ids, in its order."""
        return id_array(list(self.titles), "titles")

    @property
    def user_index(self) -> NDArray[np.int64]:
        """``(N,)`` int64, the user of each interaction."""
        return np.repeat(np.arange(self.num_users), self.histories.lengths)

    @property
    def positions(self) -> NDArray[np.int64]:
        """``(N,)`` int64, the position of each interaction in its history."""
        return np.arange(self.num_interactions) - np.repeat(self.histories.offsets[:-1], self.histories.lengths)

    @property
    def splits(self) -> dict[str, Samples]:
        """The samples of every split."""
        return {split: self.samples(split) for split in self.ranges}

    def in_split(self, split: str) -> NDArray[np.bool_]:
        """``(N,)`` bool: is this interaction one of the split's, as a target or as one of a user's first items?"""
        begin, end = self._range(split)[self.user_index].T
        return (self.positions >= begin) & (self.positions < end)

    def samples(self, split: str, min_history: int = MIN_HISTORY) -> Samples:
        """The prediction tasks of a split: its interactions with at least ``min_history`` others before them.

        Raises:
            ValueError: an unknown split, or a negative ``min_history``.
        """
        check_count("min_history", min_history, minimum=0)
        chosen = self.in_split(split) & (self.positions >= min_history)
        return Samples(self.user_index[chosen], self.positions[chosen])

    def before(self, samples: Samples, max_items: int | None = None) -> Histories:
        """What each sample may look at: the items before its target, cut to the latest ``max_items``."""
        _check_samples(samples)
        return self.histories.before(samples.users, samples.positions, max_items)

    def targets(self, samples: Samples) -> NDArray[Any]:
        """``(S,)`` ids of the items to predict."""
        _check_samples(samples)
        return self.histories.at(samples.users, samples.positions)

    def target_sets(self, split: str, min_history: int = MIN_HISTORY) -> tuple[Samples, Histories]:
        """The prediction tasks of a split with all of a user's targets in one: the first one's sample, and the targets.

        Recommending from `before` the samples and comparing with the targets (`patchkern.evaluation.evaluate`) asks
        what a user takes in the whole split, once; `samples` asks for each target, knowing those before it.

        Raises:
            ValueError: as of `samples`.
        """
        samples = self.samples(split, min_history)
        users, first, counts = np.unique(samples.users, return_index=True, return_counts=True)
        starts = samples.positions[first]
        return Samples(users, starts), self.histories.between(users, starts, starts + counts)

    def keep(self, chosen: ArrayLike) -> Interactions:
        """The interactions where ``chosen`` ``(N,)`` is true; users left without any go. Splits and titles stay."""
        chosen = mask_array("chosen", chosen, self.num_interactions)
        kept_before = np.concatenate([np.zeros(1, np.int64), np.cumsum(chosen)])
        offsets = kept_before[self.histories.offsets]
        users = np.diff(offsets) > 0
        starts = self.histories.offsets[:-1, None]
        ranges = {
            split: (kept_before[starts + bounds] - offsets[:-1, None])[users] for split, bounds in self.ranges.items()
        }
        times = self.histories.timestamps
        histories = Histories._owned(
            self.histories.items[chosen],
            np.concatenate([offsets[:1], offsets[1:][users]]),
            None if times is None else times[chosen],
        )
        ratings = None if self.ratings is None else self.ratings[chosen]
        return replace(self, user_ids=self.user_ids[users], histories=histories, ratings=ratings, ranges=ranges)

    def _range(self, split: str) -> NDArray[np.int64]:
        if split not in self.ranges:
            known = ", ".join(self.ranges) or "none: apply temporal_split or leave_one_out first"
            raise ValueError(f"split: expected one of the data set's splits ({known}), got {split!r}")
        return self.ranges[split]


def check_interactions(interactions: Any) -> None:
    """Raise a TypeError unless it is a data set."""
    if not isinstance(interactions, Interactions):
        raise TypeError(f"interactions: expected Interactions, got {type(interactions).__name__}")


def _check_samples(samples: Any) -> None:
    if not isinstance(samples, Samples):
        raise TypeError(f"samples: expected Samples, got {type(samples).__name__}")


def _same(ordered: NDArray[Any]) -> NDArray[np.bool_]:
    """``(N,)`` is an entry equal to the one before it?"""
    return np.concatenate([np.zeros(min(ordered.size, 1), bool), ordered[1:] == ordered[:-1]])


def _draw_ties(
    order: NDArray[np.int64], together: NDArray[np.bool_], items: NDArray[Any], seed: int | None, name: str
) -> None:
    """Draw anew, in place, the order of interactions that are ``together`` ``(N,)`` with the one before them."""
    tied = together.copy()
    tied[:-1] |= together[1:]
    share = float(tied.mean()) if tied.size else 0.0
    if not share:
        return
    done = "their order is that of the rows" if seed is None else f"their order is drawn (tie_seed={seed})"
    logger.log(
        logging.WARNING if share >= _MANY_TIES else logging.INFO,
        "%s: %.1f%% of interactions share their instant with another of the same user; %s", name, 100 * share, done,
    )  # fmt: skip
    if seed is None:
        return
    rows, run = order[tied], np.cumsum(~together)[tied]
    known = np.lexsort((rows, items[rows], run))  # whatever the order they came in
    key = np.random.default_rng(seed).random(rows.size)
    order[tied] = rows[known][np.lexsort((key, run[known]))]


def positions_of(item_ids: NDArray[Any], items: NDArray[Any]) -> NDArray[np.int64]:
    """``(N,)`` catalogue positions of ``items``, all of which ``item_ids`` holds."""
    order = np.argsort(item_ids, kind="stable")
    return order[np.searchsorted(item_ids, items, sorter=order)] if items.size else np.zeros(0, np.int64)


def _check_titles(titles: Mapping[Any, str], argument: str = "titles") -> None:
    kinds = {int if isinstance(item, np.integer) else type(item) for item in titles}
    if len(kinds) > 1 or not kinds <= {int, str}:
        names = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise TypeError(f"{argument}: expected keys that are all integers or all strings, got {names}")
    id_array(list(titles), argument)
    for item, title in titles.items():
        if not isinstance(title, str):
            raise TypeError(f"{argument}[{item!r}]: expected a string, got {type(title).__name__}")
        if not title.strip():
            raise ValueError(f"{argument}[{item!r}]: expected a {argument.removesuffix('s')}, got {title!r}")


def _check_items(items: NDArray[Any], titles: Mapping[Any, str]) -> None:
    missing = [item for item in np.unique(items).tolist() if item not in titles]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"histories: expected items with a title, got {missing[0]!r}{more} without one")


def _check_times(histories: Histories) -> None:
    if histories.timestamps is None or histories.items.size == 0:
        return
    falls = np.diff(histories.timestamps) < 0
    borders = histories.offsets[1:-1]
    falls[borders[(borders > 0) & (borders < histories.items.size)] - 1] = False
    if falls.any():
        user = int(np.searchsorted(histories.offsets, np.flatnonzero(falls)[0], side="right")) - 1
        raise ValueError(f"histories: expected oldest first, got falling timestamps in history {user}")


def _as_range(split: str, bounds: ArrayLike, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    given = np.asarray(bounds)
    if given.size and given.dtype.kind not in "iu":
        raise TypeError(f"ranges[{split!r}]: expected integers, got dtype {given.dtype}")
    array = given.astype(np.int64)
    if array.shape != (lengths.size, 2):
        raise ValueError(f"ranges[{split!r}]: expected shape {(lengths.size, 2)}, got {array.shape}")
    wrong = np.flatnonzero((array[:, 0] < 0) | (array[:, 0] > array[:, 1]) | (array[:, 1] > lengths))
    if wrong.size:
        user = int(wrong[0])
        raise ValueError(
            f"ranges[{split!r}][{user}]: expected 0 <= begin <= end <= {lengths[user]}, got {array[user].tolist()}"
        )
    return array


def _check_disjoint(ranges: Mapping[str, NDArray[np.int64]]) -> None:
    names: Sequence[str] = list(ranges)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            begin = np.maximum(ranges[one][:, 0], ranges[other][:, 0])
            end = np.minimum(ranges[one][:, 1], ranges[other][:, 1])
            wrong = np.flatnonzero(begin < end)
            if wrong.size:
                raise ValueError(
                    f"ranges: expected disjoint splits, got {one!r} and {other!r} overlap for user {wrong[0]}"
                )
