# SPDX-License-Identifier: Apache-2.0
"""Synthetic interactions with something to learn: genres, sequels, drifting taste, popular and rare items."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from patchkern.batch.arguments import check_count, check_number
from patchkern.data.interactions import Interactions
from patchkern.data.splits import temporal_split
from patchkern.data.synthetic_titles import GENRES, MAX_SERIES, titles_of

SYSTEM = "You recommend stories."
INSTRUCTION = "A user has enjoyed [HISTORY_SEQUENCE]. Name one story for this user to enjoy next: its title only."

_GENRES_PER_USER = 3
_DRIFT = 0.06  # probability, per item, that another liked genre comes on top
_LOYALTY = 0.85  # probability that an item is of the genre on top, not of any liked one
_RETRIES = 20
_POPULARITY = -1.1  # of the item at rank r, (1 + r) to this power
_SERIES_SHARE = 0.35
_DAY = 86_400
_START = 946_684_800  # 2000-01-01
_YEARS = 3


def synthetic(
    num_users: int = 600,
    num_items: int = 1000,
    seed: int = 0,
    *,
    num_genres: int = 12,
    mean_length: float = 60.0,
    sequel_rate: float = 0.35,
    name: str = "synthetic",
) -> Interactions:
    """Generate users whose taste can be learnt from their histories and from titles. Equal arguments, equal data.

    A title is made of ordinary words of the item's genre, so the title tells the genre: "The Dusty Saloon" is a
    western (`patchkern.data.synthetic_titles.genre_of` says so). No two items share a title; some form series
    ("Title", "Title II", "Title III"). A user likes a few genres and drifts: the genre on top changes from time to
    time. The next item is, with probability ``sequel_rate``, the part that continues the last item; otherwise an
    unseen item of a liked genre, popular ones far more often (popularity falls as a power of the rank). Users
    arrive over three years, each active for some weeks.

    Args:
        num_users: all of them have at least 12 interactions (fewer if there are fewer items).
        num_items: items in the catalogue, ids 0, 1, 2, ...
        seed: of the generator.
        num_genres: at most ``num_items`` and 16, the genres that there are words for.
        mean_length: mean interactions per user; lengths are spread widely around it.
        sequel_rate: probability to go on with a series where the last item has a next part.

    Returns:
        Interactions with timestamps, titles and the temporal 48:1:1 split.

    Raises:
        ValueError: a count below 1, too many genres, ``sequel_rate`` outside 0..1.

    Examples:
        >>> from patchkern.data import synthetic
        >>> data = synthetic(num_users=50, num_items=40, num_genres=4)
        >>> data.num_users, data.num_items, list(data.ranges)
        (50, 40, ['train', 'val', 'test'])
        >>> test = data.samples("test")
        >>> histories, targets = data.before(test), data.targets(test)
        >>> len(histories) == len(targets) > 0
        True
    """
    for argument, value in (("num_users", num_users), ("num_items", num_items), ("num_genres", num_genres)):
        check_count(argument, value, minimum=1)
    check_count("seed", seed, minimum=0, maximum=2**64 - 1)
    if num_genres > num_items:
        raise ValueError(f"num_genres: expected at most num_items ({num_items}), got {num_genres}")
    if num_genres > len(GENRES):
        raise ValueError(f"num_genres: expected at most {len(GENRES)} (those with words), got {num_genres}")
    check_number("sequel_rate", sequel_rate)
    check_number("mean_length", mean_length)
    if not 0 <= sequel_rate <= 1:
        raise ValueError(f"sequel_rate: expected 0..1, got {sequel_rate}")
    if not mean_length > 0:
        raise ValueError(f"mean_length: expected above 0, got {mean_length}")
    random = np.random.default_rng(seed)
    genre, sequel = _series(random, num_items, num_genres)
    popularity: NDArray[np.float64] = np.power(1.0 + random.permutation(num_items), _POPULARITY)

    lengths = random.lognormal(np.log(mean_length) - 0.18, 0.6, num_users).astype(np.int64)
    lengths = np.clip(lengths, min(12, num_items), max(num_items // 2, 1))
    arrivals = np.sort(random.uniform(0, _YEARS * 365 * _DAY, num_users))
    shelves = [np.flatnonzero(genre == g) for g in range(num_genres)]
    shelves = [shelf for shelf in shelves if shelf.size]
    draw = [_Draw(shelf, popularity[shelf]) for shelf in shelves]
    everything = _Draw(np.arange(num_items), popularity)
    items, times = [], []
    for length, arrival in zip(lengths, arrivals, strict=True):
        items.append(_history(random, int(length), draw, everything, sequel, sequel_rate))
        times.append(_START + (arrival + np.cumsum(random.exponential(0.5 * _DAY, length))).astype(np.int64))
    titles = titles_of(random, genre, sequel)
    data = Interactions.from_columns(
        np.repeat(np.arange(num_users), lengths),
        np.concatenate(items),
        np.concatenate(times),
        dict(enumerate(titles)),
        name=name,
        system=SYSTEM,
        instruction=INSTRUCTION,
    )
    return temporal_split(data)


def _series(
    random: np.random.Generator, num_items: int, num_genres: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """``(num_items,)`` genre of each item, and the item that continues it (-1: none). Parts follow each other."""
    genre = np.zeros(num_items, np.int64)
    sequel = np.full(num_items, -1, np.int64)
    first = 0
    while first < num_items:
        parts = int(random.integers(2, MAX_SERIES + 1)) if random.random() < _SERIES_SHARE else 1
        end = min(first + parts, num_items)
        genre[first:end] = random.integers(num_genres)
        sequel[first : end - 1] = np.arange(first + 1, end)
        first = end
    return genre, sequel


class _Draw:
    """Draws items in proportion to their popularity."""

    def __init__(self, items: NDArray[np.int64], popularity: NDArray[np.float64]) -> None:
        self.items = items
        self.cumulative = np.cumsum(popularity)

    def __call__(self, random: np.random.Generator) -> int:
        at = np.searchsorted(self.cumulative, random.random() * self.cumulative[-1], side="right")
        return int(self.items[min(int(at), self.items.size - 1)])


def _history(
    random: np.random.Generator,
    length: int,
    genres: list[_Draw],
    everything: _Draw,
    sequel: NDArray[np.int64],
    sequel_rate: float,
) -> list[int]:
    liked = random.permutation(len(genres))[:_GENRES_PER_USER]
    on_top = liked[0]
    history: list[int] = []
    seen: set[int] = set()
    while len(history) < length:
        if random.random() < _DRIFT:
            on_top = liked[int(random.integers(liked.size))]
        item = int(sequel[history[-1]]) if history else -1
        if item < 0 or item in seen or random.random() >= sequel_rate:
            genre = on_top if random.random() < _LOYALTY else liked[int(random.integers(liked.size))]
            item = _unseen(random, genres[genre], everything, seen)
        history.append(item)
        seen.add(item)
    return history


def _unseen(random: np.random.Generator, genre: _Draw, everything: _Draw, seen: set[int]) -> int:
    """An item not in ``seen``: of the genre, or of any once most of that genre is seen."""
    for draw in (genre, everything):
        for _ in range(_RETRIES):
            item = draw(random)
            if item not in seen:
                return item
    left = np.setdiff1d(everything.items, np.fromiter(seen, np.int64, len(seen)))
    return int(left[random.integers(left.size)])
