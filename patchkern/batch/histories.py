# SPDX-License-Identifier: Apache-2.0
"""Ragged item histories: one flat array of items and the offsets that cut it into users."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Union

import numpy as np
from numpy.typing import ArrayLike, NDArray

from patchkern.batch.arguments import check_max_items, check_number, check_offsets
from patchkern.batch.arrow import arrow_lists
from patchkern.batch.columns import as_array, flat_array, id_array, is_sequence, mask_array
from patchkern.batch.frozen import adopted, freeze, frozen
from patchkern.batch.instants import instants

# Or a column of lists (arrow, pandas, polars), or a 2-D or nested tensor: see `Histories.coerce`.
HistoriesLike = Union["Histories", Sequence[Sequence[Any]], Mapping[Any, Sequence[Any]], NDArray[Any]]


def _integers(name: str, values: ArrayLike) -> NDArray[np.int64]:
    array = flat_array(name, values)
    if array.size and array.dtype.kind not in "iu":
        raise TypeError(f"{name}: expected integers, got dtype {array.dtype}")
    return array.astype(np.int64, copy=False)


def _sequence_array(name: str, sequence: Any) -> NDArray[Any]:
    if not is_sequence(sequence):
        raise TypeError(f"{name}: expected a sequence of item ids, got {type(sequence).__name__}")
    array = flat_array(name, sequence)
    if array.size and array.dtype.kind not in "iuUO":
        raise TypeError(f"{name}: expected integer or string item ids, got dtype {array.dtype}")
    return id_array(array, name) if array.dtype.kind == "O" else array


def _item_array(items: ArrayLike) -> NDArray[Any]:
    array = flat_array("items", items)
    if array.size == 0 and array.dtype.kind == "f":
        return array.astype(np.int64)
    if array.dtype.kind == "O":
        return id_array(array, "items")
    if array.dtype.kind not in "iuU":
        raise TypeError(f"items: expected integer or string item ids, got dtype {array.dtype}")
    return array


def first_kept(lengths: NDArray[np.int64], max_items: int | None, cut_every: int = 1) -> NDArray[np.int64]:
    """``(B,)`` how many of its oldest items each history loses when it is cut to its latest ``max_items``.

    ``cut_every`` makes that a multiple of so many: of a history that is longer, ``max_items`` to
    ``max_items + cut_every - 1`` items are kept, and while it grows by ``cut_every`` items it begins at the same one.
    """
    if max_items is None:
        return np.zeros_like(lengths)
    return np.maximum(lengths - max_items, 0) // cut_every * cut_every


class Histories:
    """The item ids of many users, oldest first, in columnar form.

    Args:
        items: ``(N,)`` item ids of all users one after the other, integers or strings.
        offsets: ``(B + 1,)`` integers; user ``b`` owns ``items[offsets[b]:offsets[b + 1]]``.
        timestamps: ``(N,)`` seconds, whole or not, or datetimes (without a time zone: UTC), or None. Kept in seconds,
            as int64 where all are whole, else float64.

    Each may be a NumPy array, a list, a tensor, or a column of arrow, pandas or polars. They are kept read-only: what
    could still be written into is copied, what is immutable, such as arrow's, is not.

    Raises:
        TypeError: a wrong dtype.
        ValueError: a wrong shape, or offsets that do not cut ``items``.
    """

    __slots__ = ("items", "offsets", "timestamps")

    items: NDArray[Any]
    offsets: NDArray[np.int64]
    timestamps: NDArray[Any] | None

    def __init__(self, items: ArrayLike, offsets: ArrayLike, timestamps: ArrayLike | None = None) -> None:
        self.items = frozen(_item_array(items), items)
        self.offsets = frozen(_integers("offsets", offsets), offsets)
        check_offsets("offsets", self.offsets, self.items.size)
        self.timestamps = None
        if timestamps is not None:
            self.timestamps = frozen(instants("timestamps", timestamps, "s").seconds(), timestamps)
        if self.timestamps is not None and self.timestamps.size != self.items.size:
            raise ValueError(f"timestamps: expected one per item ({self.items.size}), got {self.timestamps.size}")

    @classmethod
    def _owned(
        cls, items: NDArray[Any], offsets: NDArray[np.int64], timestamps: NDArray[Any] | None = None
    ) -> Histories:
        """Of arrays that are right by construction and that nobody else holds: no check, no copy."""
        histories = object.__new__(cls)
        histories.items, histories.offsets = freeze(items), freeze(offsets)
        histories.timestamps = None if timestamps is None else freeze(timestamps)
        return histories

    def __setstate__(self, state: Any) -> None:
        """A pickle may hold anything."""
        slots = state[1] if isinstance(state, tuple) and len(state) == 2 else None
        if not (isinstance(slots, dict) and slots.keys() >= set(self.__slots__)):
            raise TypeError(
                f"histories: expected {', '.join(self.__slots__)} in the pickle, got {type(state).__name__}"
            )
        Histories.__init__(self, *(adopted(slots[name]) for name in self.__slots__))

    @classmethod
    def from_sequences(cls, sequences: Sequence[Sequence[Any]], argument: str = "histories") -> Histories:
        """Build from one sequence of item ids per user; complaints name ``argument``.

        Examples:
            >>> import patchkern as pk
            >>> histories = pk.Histories.from_sequences([[7, 9, 7], [9]])
            >>> histories
            Histories(2 users, 4 items)
            >>> histories[0].tolist(), histories.latest(2)[0].tolist()
            ([7, 9, 7], [9, 7])
        """
        if not is_sequence(sequences):
            raise TypeError(
                f"{argument}: expected Histories or a list of item-id sequences, got {type(sequences).__name__}"
            )
        arrays = [_sequence_array(f"{argument}[{user}]", sequence) for user, sequence in enumerate(sequences)]
        offsets = np.zeros(len(arrays) + 1, np.int64)
        np.cumsum([array.size for array in arrays], out=offsets[1:])
        filled = [array for array in arrays if array.size]
        kinds = {"text" if array.dtype.kind == "U" else "number" for array in filled}
        if len(kinds) > 1:
            raise TypeError(f"{argument}: expected item ids of one kind, got integers and strings")
        return cls(freeze(np.concatenate(filled) if filled else np.zeros(0, np.int64)), freeze(offsets))

    @classmethod
    def from_arrow(cls, items: Any, timestamps: Any = None, argument: str = "histories") -> Histories:
        """Build from an arrow column of lists, one per user; integers are shared with arrow, not copied.

        Args:
            items: a ``pyarrow`` array of lists (list, large list, fixed size list or list view), whole or in chunks, or
                any object with the arrow C interface, such as a column of polars. Only chunks are copied together.
            timestamps: lists of as many numbers (seconds) or arrow timestamps, or None.
            argument: what complaints call the items.

        Raises:
            ImportError: pyarrow is missing.
            TypeError: a column of something else.
            ValueError: a missing list, id or time, or other lengths of ``timestamps``.
        """
        values, offsets = arrow_lists(argument, items)
        items = as_array(argument, values)
        if timestamps is None:
            return cls(items, offsets)
        times, others = arrow_lists("timestamps", timestamps)
        if not np.array_equal(offsets, others):
            users = min(offsets.size, others.size) - 1
            differing = np.flatnonzero(np.diff(offsets)[:users] != np.diff(others)[:users])
            user = int(differing[0]) if differing.size else users
            raise ValueError(f"timestamps[{user}]: expected as many as items, one list per user")
        return cls(items, offsets, times)

    @classmethod
    def coerce(cls, histories: HistoriesLike, argument: str = "histories") -> Histories:
        """Histories of what callers bring.

        Args:
            histories: a `Histories`, returned as it is; one sequence of item ids per user, in a list, an object array
                or a column of pandas; a mapping of users to such sequences, in its order; an arrow column of lists (see
                `from_arrow`); a 2-D array or tensor, one row per user, every entry an item; a nested tensor.
            argument: what complaints call them.

        Raises:
            TypeError, ValueError: naming the user by position, what was expected and what came.
        """
        given: Any = histories
        if isinstance(given, cls):
            return given
        if isinstance(given, Mapping):
            return cls.from_sequences(list(given.values()), argument)
        if getattr(given, "is_nested", False):
            return cls.from_sequences(list(given.unbind()), argument)
        is_arrow = hasattr(given, "__arrow_c_array__") or hasattr(given, "__arrow_c_stream__")
        # pandas offers to make arrow of its objects; they are sequences already
        if is_arrow and getattr(given, "dtype", None) != np.dtype(object):
            return cls.from_arrow(given, argument=argument)
        if not isinstance(given, Sequence) and is_sequence(given):
            given = as_array(argument, given)
            if given.ndim == 2 and given.dtype.kind in "iuU":
                return cls(given.reshape(-1), np.arange(len(given) + 1) * given.shape[1])
        return cls.from_sequences(given, argument)

    def __len__(self) -> int:
        return self.offsets.size - 1

    def __getitem__(self, user: int) -> NDArray[Any]:
        if isinstance(user, bool) or not isinstance(user, (int, np.integer)):
            raise TypeError(f"user: expected an integer, as take() has several, got {type(user).__name__}")
        if not -len(self) <= user < len(self):
            raise IndexError(f"user: expected an index below {len(self)}, got {user}")
        user %= len(self)
        return self.items[self.offsets[user] : self.offsets[user + 1]]

    def __iter__(self) -> Iterator[NDArray[Any]]:
        return (self[user] for user in range(len(self)))

    def __repr__(self) -> str:
        times = "" if self.timestamps is None else ", with timestamps"
        return f"Histories({len(self):,} users, {self.items.size:,} items{times})"

    @property
    def lengths(self) -> NDArray[np.int64]:
        """``(B,)`` number of items per user."""
        return np.diff(self.offsets)

    def _gather(self, starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> Histories:
        offsets = np.zeros(lengths.size + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        index = np.arange(offsets[-1])
        index += np.repeat(starts - offsets[:-1], lengths)
        times = None if self.timestamps is None else self.timestamps[index]
        return Histories._owned(self.items[index], offsets, times)

    def latest(self, max_items: int | None, cut_every: int = 1) -> Histories:
        """Each history cut to its latest ``max_items`` items (None: unchanged); see `first_kept` for ``cut_every``."""
        check_max_items(max_items, cut_every)
        lengths = self.lengths
        if max_items is None or lengths.size == 0 or int(lengths.max()) <= max_items:
            return self
        first = first_kept(lengths, max_items, cut_every)
        return self._gather(self.offsets[:-1] + first, lengths - first)

    def take(self, users: ArrayLike) -> Histories:
        """The histories of ``users`` (``(S,)`` indices), in that order."""
        index = self._users(users)
        return self._gather(self.offsets[index], self.lengths[index])

    def keep(self, mask: ArrayLike) -> Histories:
        """The same users with those items alone for which ``mask``, ``(N,)`` in the order of ``items``, is true."""
        mask = mask_array("mask", mask, self.items.size)
        times = None if self.timestamps is None else self.timestamps[mask]
        return Histories._owned(self.items[mask], np.append(0, np.cumsum(mask))[self.offsets], times)

    def before(
        self, users: ArrayLike, positions: ArrayLike, max_items: int | None = None, cut_every: int = 1
    ) -> Histories:
        """For each sample, the items of ``users[s]`` before ``positions[s]``, cut as by `latest`."""
        check_max_items(max_items, cut_every)
        index, ends = self._samples(users, positions)
        first = first_kept(ends, max_items, cut_every)
        return self._gather(self.offsets[index] + first, ends - first)

    def between(self, users: ArrayLike, starts: ArrayLike, ends: ArrayLike) -> Histories:
        """For each sample, the items of ``users[s]`` from position ``starts[s]`` to before ``ends[s]``."""
        index, ends = self._samples(users, ends, "ends")
        starts = _integers("starts", starts)
        if starts.size != ends.size:
            raise ValueError(f"starts: expected one per user ({ends.size}), got {starts.size}")
        wrong = np.flatnonzero((starts < 0) | (starts > ends))
        if wrong.size:
            s = int(wrong[0])
            raise ValueError(f"starts[{s}]: expected 0..{ends[s]}, got {starts[s]}")
        return self._gather(self.offsets[index] + starts, ends - starts)

    def jittered(self, width: float, ends: ArrayLike, rng: np.random.Generator) -> Histories:
        """The same histories with their order blurred: a noise for training where the order is partly an accident.

        The items of user ``b`` before position ``ends[b]`` are sorted by their position plus a number drawn from
        ``[0, width)``; so none comes to stand before one that was more than ``width`` positions ahead of it. Items from
        ``ends[b]`` on, and all timestamps, stay where they are.
        """
        check_number("width", width, minimum=0)
        _, until = self._samples(np.arange(len(self)), ends, "ends")
        lengths = self.lengths
        user = np.repeat(np.arange(len(self)), lengths)
        position = np.arange(self.items.size) - np.repeat(self.offsets[:-1], lengths)
        blurred = position + rng.uniform(0, width, position.size)
        until = np.repeat(until, lengths)
        # what stays comes after all that moves
        order = np.lexsort((np.where(position < until, blurred, position + width), user))
        return Histories._owned(self.items[order], self.offsets, self.timestamps)

    def at(self, users: ArrayLike, positions: ArrayLike) -> NDArray[Any]:
        """``(S,)`` item ids: the item of ``users[s]`` at ``positions[s]``."""
        index, ends = self._samples(users, positions)
        past = np.flatnonzero(ends >= self.lengths[index])
        if past.size:
            s = int(past[0])
            raise ValueError(f"positions[{s}]: expected below {self.lengths[index[s]]}, got {ends[s]}")
        return self.items[self.offsets[index] + ends]

    def _users(self, users: ArrayLike) -> NDArray[np.int64]:
        index = _integers("users", users)
        wrong = np.flatnonzero((index < 0) | (index >= len(self)))
        if wrong.size:
            s = int(wrong[0])
            raise ValueError(f"users[{s}]: expected an index in 0..{len(self) - 1}, got {index[s]}")
        return index

    def _samples(
        self, users: ArrayLike, positions: ArrayLike, argument: str = "positions"
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        index, ends = self._users(users), _integers(argument, positions)
        if index.size != ends.size:
            raise ValueError(f"{argument}: expected one per user ({index.size}), got {ends.size}")
        wrong = np.flatnonzero((ends < 0) | (ends > self.lengths[index]))
        if wrong.size:
            s = int(wrong[0])
            raise ValueError(f"{argument}[{s}]: expected 0..{self.lengths[index[s]]}, got {ends[s]}")
        return index, ends
