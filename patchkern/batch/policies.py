# SPDX-License-Identifier: Apache-2.0
"""The policies whose levels say it all: text, item patches, sessions, by age, at random, by time or by rows."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from patchkern.batch.arguments import check_count, check_max_items
from patchkern.batch.histories import Histories
from patchkern.batch.policy_kinds import Level, Levels
from patchkern.batch.prompt import Prompt

# As seconds the year 5138, as milliseconds 1973: no timestamp of a user is as large, unless it counts smaller units.
_FIRST_IN_MS = 10**11
_UNITS = ((10**9, "nanoseconds"), (10**6, "microseconds"), (1000, "milliseconds"))


@dataclass(frozen=True)
class _Cut:
    """What all policies of this module have besides ``max_items``.

    Attributes:
        cut_every: histories longer than ``max_items`` are cut so many items at a time, and keep up to
            ``cut_every - 1`` more than that: as long as the cut stays, a growing history's prompts share their
            beginning, which a prefix cache then need not compute again.
    """

    cut_every: int = field(default=1, kw_only=True)

    def __repr__(self) -> str:
        """The arguments; those by name only come last, and only where they say something."""
        names = [each.name for each in fields(self) if not each.kw_only]
        names += [each.name for each in fields(self) if each.kw_only and getattr(self, each.name) != each.default]
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"


@dataclass(frozen=True, repr=False)
class TextOnly(_Cut):
    """Every item as text (the paper's "Vanilla").

    Examples:
        A T is an item as text.

        >>> import patchkern as pk
        >>> histories = pk.Histories.from_sequences([range(6)])
        >>> "".join(pk.Level(level).name[0] for level in pk.TextOnly().levels(histories))
        'TTTTTT'
    """

    max_items: int | None = 100

    def __post_init__(self) -> None:
        check_max_items(self.max_items, self.cut_every)

    def levels(self, histories: Histories) -> Levels:
        return np.zeros(histories.items.size, np.uint8)

    def trunks(self, lengths: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        return np.zeros_like(lengths), lengths


@dataclass(frozen=True, repr=False)
class ItemPatches(_Cut):
    """The latest ``keep_text`` items as text, all earlier ones as item patches (the paper's PFT-I).

    Examples:
        A P is an item as a patch, a T one as text.

        >>> import patchkern as pk
        >>> histories = pk.Histories.from_sequences([range(6)])
        >>> "".join(pk.Level(level).name[0] for level in pk.ItemPatches(keep_text=2).levels(histories))
        'PPPPTT'
    """

    keep_text: int = 5
    max_items: int | None = 100

    def __post_init__(self) -> None:
        check_count("keep_text", self.keep_text, minimum=0)
        check_max_items(self.max_items, self.cut_every)

    def levels(self, histories: Histories) -> Levels:
        levels = np.full(histories.items.size, Level.PATCH, np.uint8)
        _set_latest(levels, histories, self.keep_text, Level.TEXT)
        return levels

    def trunks(self, lengths: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        return np.zeros_like(lengths), np.maximum(lengths - self.keep_text, 0)


@dataclass(frozen=True, repr=False)
class SessionPatches(_Cut):
    """The latest ``group_size`` items as text, the ones before as item patches, the oldest as sessions (PFT-S).

    ``align="end"`` counts sessions of ``group_size`` back from the item patches, so only the oldest may be short.
    ``align="start"`` counts complete groups from the first item: their borders never move while a history grows
    (with ``max_items=None``), so that a user's successive prompts share a growing prefix; up to ``group_size - 1``
    items more stand as item patches.

    ``keep_text`` and ``keep_items`` are the items as text, and at least as item patches, where they are not a group's:
    with ``keep_text=0, align="start"`` an item has one row until it joins a session, which all targets share that are
    read behind the same sessions (`build_training_layout`), for two to four rows a target beside its title's.

    Examples:
        A P starts a patch, the items J after it join it, a T is an item as text.

        >>> import patchkern as pk
        >>> histories = pk.Histories.from_sequences([range(11)])
        >>> "".join(pk.Level(level).name[0] for level in pk.SessionPatches(3).levels(histories))
        'PJPJJPPPTTT'
        >>> "".join(pk.Level(level).name[0] for level in pk.SessionPatches(3, align="start").levels(histories))
        'PJJPPPPPTTT'
        >>> policy = pk.SessionPatches(3, align="start", keep_text=0)
        >>> "".join(pk.Level(level).name[0] for level in policy.levels(histories))
        'PJJPJJPPPPP'
    """

    group_size: int = 5
    max_items: int | None = 100
    align: str = "end"
    keep_text: int | None = field(default=None, kw_only=True)
    keep_items: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        check_count("group_size", self.group_size, minimum=1)
        for name in ("keep_text", "keep_items"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), minimum=0)
        check_max_items(self.max_items, self.cut_every)
        if not isinstance(self.align, str) or self.align not in ("end", "start"):
            raise ValueError(f'align: expected "end" or "start", got {self.align!r}')

    def levels(self, histories: Histories) -> Levels:
        g, lengths = self.group_size, histories.lengths
        pooled = self._pooled(lengths)
        # Positions within each history, shifted so that sessions start at multiples of g.
        shift = -pooled % g
        position = np.arange(histories.items.size) - np.repeat(histories.offsets[:-1] - shift, lengths)
        levels = np.where(position % g == 0, np.uint8(Level.PATCH), np.uint8(Level.JOIN))
        levels[histories.offsets[:-1][lengths > 0]] = Level.PATCH
        levels[position >= np.repeat(pooled + shift, lengths)] = Level.PATCH
        _set_latest(levels, histories, self._text, Level.TEXT)
        return levels

    def trunks(self, lengths: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        pooled = self._pooled(lengths)
        return pooled % self.group_size, pooled

    @property
    def _text(self) -> int:
        return self.group_size if self.keep_text is None else self.keep_text

    def _pooled(self, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
        """Items in sessions."""
        patches = self.group_size if self.keep_items is None else self.keep_items
        pooled = np.maximum(lengths - self._text - patches, 0)
        return pooled - pooled % self.group_size if self.align == "start" else pooled


@dataclass(frozen=True, repr=False)
class RandomItemPatches(_Cut):
    """Every item independently an item patch with ``probability``, else text (the paper's patch pre-training).

    The draws depend on ``seed`` and the flat position of the item in the batch only: the same call gives the same
    layout. Training varies ``seed`` from step to step.
    """

    probability: float = 0.3
    max_items: int | None = 100
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.probability, bool) or not isinstance(self.probability, (int, float, np.floating)):
            raise TypeError(f"probability: expected a number, got {type(self.probability).__name__}")
        if not 0.0 <= self.probability <= 1.0 or math.isnan(self.probability):
            raise ValueError(f"probability: expected a number in 0..1, got {self.probability}")
        check_count("seed", self.seed, minimum=0, maximum=2**64 - 1)
        check_max_items(self.max_items, self.cut_every)

    def levels(self, histories: Histories) -> Levels:
        draws = np.random.Generator(np.random.SFC64(self.seed)).random(histories.items.size, np.float32)
        return np.where(draws < self.probability, np.uint8(Level.PATCH), np.uint8(Level.TEXT))

    def trunks(self, lengths: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """One draw per trunk: its targets see the same items as patches, where samples of their own would differ."""
        return np.zeros_like(lengths), lengths


@dataclass(frozen=True, repr=False)
class ItemDropout(_Cut):
    """All but the latest ``keep_text`` items dropped with ``probability`` each, what stays is text.

    What compression is compared with: as few rows, by leaving items out. Draws are as of `RandomItemPatches`, and all
    targets of a trunk see what was drawn for it.

    Examples:
        A D is an item that is dropped.

        >>> import patchkern as pk
        >>> histories = pk.Histories.from_sequences([range(8)])
        >>> policy = pk.ItemDropout(0.5, keep_text=2, seed=1)
        >>> "".join(pk.Level(level).name[0] for level in policy.levels(histories))
        'DTTDDDTT'
    """

    probability: float = 0.5
    keep_text: int = 5
    max_items: int | None = 100
    seed: int = 0

    def __post_init__(self) -> None:
        check_count("keep_text", self.keep_text, minimum=0)
        RandomItemPatches(self.probability, self.max_items, self.seed, cut_every=self.cut_every)  # checks these

    def levels(self, histories: Histories) -> Levels:
        patches = RandomItemPatches(self.probability, self.max_items, self.seed).levels(histories)
        levels = np.where(patches == Level.PATCH, np.uint8(Level.DROP), np.uint8(Level.TEXT))
        _set_latest(levels, histories, self.keep_text, Level.TEXT)
        return levels

    def trunks(self, lengths: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        return np.zeros_like(lengths), np.maximum(lengths - self.keep_text, 0)


@dataclass(frozen=True, repr=False)
class TimeSessions(_Cut):
    """Sessions as they happened: old items are pooled with those that came shortly before them.

    The latest ``keep_text`` items stay text, the ``keep_items`` before them become item patches. Of the earlier ones,
    an item joins the session of the item before it where at most ``gap`` seconds lie between them, up to ``max_size``
    items a session (None: any number). While a history grows (with ``max_items=None``), only its youngest session
    changes.

    Examples:
        A P starts a patch, the items J after it join it: two evenings, and then the latest two items.

        >>> import patchkern as pk
        >>> histories = pk.Histories(range(7), [0, 7], timestamps=[0, 600, 1200, 90000, 90600, 180000, 180600])
        >>> policy = pk.TimeSessions(gap=3600, keep_text=1, keep_items=1)
        >>> "".join(pk.Level(level).name[0] for level in policy.levels(histories))
        'PJJPJPT'
    """

    gap: int = 3600
    keep_text: int = 5
    keep_items: int = 5
    max_size: int | None = None
    max_items: int | None = None

    def __post_init__(self) -> None:
        check_count("gap", self.gap, minimum=0)
        check_count("keep_text", self.keep_text, minimum=0)
        check_count("keep_items", self.keep_items, minimum=0)
        if self.max_size is not None:
            check_count("max_size", self.max_size, minimum=1)
        check_max_items(self.max_items, self.cut_every)

    def levels(self, histories: Histories) -> Levels:
        """Raises a ``ValueError`` for histories without timestamps, with some that fall or that are not in seconds."""
        if histories.timestamps is None:
            raise ValueError("histories: expected timestamps, which TimeSessions goes by, got none")
        _check_seconds(histories.timestamps)
        waits = np.diff(histories.timestamps, prepend=0)
        starts = histories.offsets[:-1][histories.lengths > 0]
        waits[starts] = 0
        fallen = np.flatnonzero(waits < 0)
        if fallen.size:
            at = int(fallen[0])
            raise ValueError(
                f"histories: expected timestamps that never fall within a user, got {histories.timestamps[at - 1]} "
                f"then {histories.timestamps[at]} at {at}"
            )
        breaks = waits > self.gap
        breaks[starts] = True
        if self.max_size is not None:
            first = np.flatnonzero(breaks)
            place = np.arange(breaks.size) - np.repeat(first, np.diff(first, append=breaks.size))
            breaks |= place % self.max_size == 0
        levels = np.where(breaks, np.uint8(Level.PATCH), np.uint8(Level.JOIN))
        _set_latest(levels, histories, self.keep_text + self.keep_items, Level.PATCH)
        _set_latest(levels, histories, self.keep_text, Level.TEXT)
        return levels


@dataclass(frozen=True, repr=False)
class FitRows(_Cut):
    """The finest granularity that keeps a user's prompt within ``max_rows`` rows, the oldest items compressed first.

    ``max_rows`` counts what the model reads: prefix, history with its separators, suffix; not the response. A user who
    fits stays text. Else the fewest oldest items that make it fit become item patches. If that is not enough even for
    all but the latest ``keep_text``, the fewest oldest groups of ``group_size`` become sessions; if all groups are not
    enough, the size of a group doubles, until one session holds everything but the text.

    Examples:
        A history of 10 titles, of 3 tokens each, in ever less room: 41 rows are its text.

        >>> import patchkern as pk
        >>> catalog = pk.Catalog.from_token_ids([5, 6, 7], [0, 3])
        >>> prompt = pk.Prompt(prefix=[1], separator=[2], suffix=[3])
        >>> policies = [pk.FitRows(max_rows, keep_text=2, group_size=4) for max_rows in (41, 30, 20, 12)]
        >>> [int(pk.row_counts(catalog, [[0] * 10], policy, prompt)[0]) for policy in policies]
        [41, 29, 19, 11]
    """

    max_rows: int
    keep_text: int = 5
    group_size: int = 5
    max_items: int | None = None

    def __post_init__(self) -> None:
        check_count("max_rows", self.max_rows, minimum=1)
        check_count("keep_text", self.keep_text, minimum=0)
        check_count("group_size", self.group_size, minimum=2)
        check_max_items(self.max_items, self.cut_every)

    def fit(self, histories: Histories, title_lengths: NDArray[np.integer[Any]], prompt: Prompt) -> Levels:
        """Raises a ``ValueError`` for a user whose text alone exceeds ``max_rows``."""
        separator, lengths, starts = len(prompt.separator), histories.lengths, histories.offsets[:-1]
        saved = np.append(0, np.cumsum(title_lengths - 1, dtype=np.int64))  # by patches of all items before
        patched_rows = lengths + np.maximum(lengths - 1, 0) * separator + len(prompt.prefix) + len(prompt.suffix)
        excess = patched_rows + saved[histories.offsets[1:]] - saved[starts] - self.max_rows
        poolable = np.maximum(lengths - self.keep_text, 0)
        # one search in the running savings serves every user: how many items from the first must be patches
        needed = np.searchsorted(saved, saved[starts] + np.maximum(excess, 0)) - starts
        patches = np.where(excess > 0, np.minimum(needed, poolable), 0)
        excess = excess - (saved[starts + patches] - saved[starts])
        size = np.full(lengths.size, self.group_size)
        groups = np.zeros_like(lengths)
        waiting = excess > 0
        while waiting.any():
            per_group = np.minimum(size, poolable)
            wanted = -(-excess // np.maximum((per_group - 1) * (1 + separator), 1))
            possible = np.where(per_group > 1, poolable // np.maximum(per_group, 1), 0)
            hopeless = waiting & (wanted > possible) & (size >= poolable)
            if hopeless.any():
                user = int(np.flatnonzero(hopeless)[0])
                least = self.max_rows + int(excess[user] - max(per_group[user] - 1, 0) * (1 + separator))
                raise ValueError(
                    f"max_rows: expected at least {least} for user {user}, whose latest {self.keep_text} items stay "
                    f"text, got {self.max_rows}"
                )
            fits = waiting & (wanted <= possible)
            groups[fits] = wanted[fits]
            size[fits] = per_group[fits]
            waiting &= ~fits
            size[waiting] *= 2
        place = np.arange(histories.items.size) - np.repeat(starts, lengths)
        inside = (place < np.repeat(groups * size, lengths)) & (place % np.repeat(size, lengths) != 0)
        levels = np.where(place < np.repeat(patches, lengths), np.uint8(Level.PATCH), np.uint8(Level.TEXT))
        levels[inside] = Level.JOIN
        return levels


def _check_seconds(timestamps: NDArray[np.int64]) -> None:
    latest = int(timestamps.max(initial=0))
    if latest >= _FIRST_IN_MS:
        factor, unit = next((f, u) for f, u in _UNITS if latest >= _FIRST_IN_MS * f // 1000)
        raise ValueError(
            f"histories: expected timestamps in seconds, got {latest}, which looks like {unit}; divide by {factor:,}"
        )


def _set_latest(levels: Levels, histories: Histories, count: int, level: Level) -> None:
    kept = np.minimum(histories.lengths, count)
    ends = np.cumsum(kept)
    levels[np.arange(kept.sum()) + np.repeat(histories.offsets[1:] - ends, kept)] = level
