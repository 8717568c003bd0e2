# SPDX-License-Identifier: Apache-2.0
"""Points in time: what users bring, as exact as it came until it is sorted, then in seconds since 1970."""

from __future__ import annotations

import logging
from datetime import date, datetime, timedelta, timezone
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from patchkern.batch.columns import flat_array

logger = logging.getLogger("patchkern.batch")

UNITS = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}

_COARSE = {"Y", "M", "W", "D", "h", "m"}
# The year 5138 in seconds, 1973 in milliseconds: no time that people record stands for both.
_MAX_SECONDS = 10**11
_MAX_EXACT = 2**53


class Instants(NamedTuple):
    """``ticks`` ``(N,)`` int64 or float64, of which ``per_second`` make a second."""

    ticks: NDArray[Any]
    per_second: int

    def seconds(self) -> NDArray[Any]:
        """``(N,)`` int64 where all are whole seconds, else float64; in order where the ticks are."""
        ticks, unit = self
        if ticks.dtype.kind == "f":
            seconds = ticks if unit == 1 else ticks / unit
            whole = bool((seconds == np.floor(seconds)).all()) and np.abs(seconds).max(initial=0) < _MAX_EXACT
            return seconds.astype(np.int64) if whole else seconds
        if unit == 1:
            return ticks
        return ticks // unit if not (ticks % unit).any() else ticks / unit


def instants(name: str, values: Any, unit: str | None = None) -> Instants:
    """Numbers, ``datetime64`` arrays, datetimes or dates as instants; those without a time zone are UTC.

    Args:
        name: of the argument, for complaints.
        values: ``(N,)``; `Instants` come back as they are.
        unit: of numbers: ``s``, ``ms``, ``us`` or ``ns``. None: by their size, with a warning unless it is seconds.

    Raises:
        TypeError: text, booleans, or a mixture.
        ValueError: a missing or infinite time, an unknown unit, or numbers of several units.
    """
    if isinstance(values, Instants):
        return values
    if unit is not None and unit not in UNITS:
        raise ValueError(f"time_unit: expected one of {', '.join(UNITS)} or None, got {unit!r}")
    if getattr(getattr(values, "dtype", None), "tz", None) is not None:  # pandas, whose array would be of objects
        values = values.dt.tz_convert("UTC").dt.tz_localize(None)
    array = flat_array(name, values)
    if array.dtype.kind == "O":
        array = _of_objects(name, array)
    if array.dtype.kind == "M":
        return _of_datetimes(name, array)
    if array.size and array.dtype.kind not in "iuf":
        raise TypeError(f"{name}: expected numbers or datetimes, got dtype {array.dtype}")
    if array.dtype.kind == "f":
        ticks: NDArray[Any] = array.astype(np.float64, copy=False)
        wrong = np.flatnonzero(~np.isfinite(ticks))
        if wrong.size:
            raise ValueError(f"{name}[{wrong[0]}]: expected a time, got {ticks[wrong[0]]}")
    else:
        if array.dtype.kind == "u" and array.size and int(array.max()) > np.iinfo(np.int64).max:
            raise ValueError(f"{name}: expected integers that fit in int64, got {int(array.max())}")
        ticks = array.astype(np.int64, copy=False)
        missing = np.flatnonzero(ticks == np.iinfo(np.int64).min)
        if missing.size:  # what NaT is as a number
            raise ValueError(f"{name}[{missing[0]}]: expected a time, got none")
    return Instants(ticks, UNITS[unit] if unit is not None else _guessed_unit(name, ticks))


def _guessed_unit(name: str, ticks: NDArray[Any]) -> int:
    size = np.abs(ticks)
    largest = size.max(initial=0)
    if largest < _MAX_SECONDS:
        return 1
    unit = next((unit for unit, ratio in UNITS.items() if largest < _MAX_SECONDS * ratio), "ns")
    small = np.flatnonzero((size > 0) & (size < _MAX_SECONDS * UNITS[unit] // 1000))
    if small.size:
        raise ValueError(
            f"{name}[{small[0]}]: expected times of one unit, got {ticks[small[0]]} among {unit} as large as "
            f"{largest}; time_unit says which it is"
        )
    logger.warning(
        "%s: as large as %s, taken to be %s; the time_unit of Interactions.from_columns says otherwise",
        name,
        largest,
        unit,
    )
    return UNITS[unit]


def _of_objects(name: str, array: NDArray[Any]) -> NDArray[Any]:
    """Numbers as they are; datetimes, exact to the microsecond, and dates as ``datetime64``."""
    values = array.tolist()
    kinds = set(map(type, values))
    listed = ", ".join(sorted(kind.__name__ for kind in kinds))
    if all(issubclass(kind, (int, float, np.number)) and not issubclass(kind, bool) for kind in kinds):
        return np.array(values)
    if not all(issubclass(kind, date) for kind in kinds):
        raise TypeError(f"{name}: expected numbers or datetimes, got {listed}")
    if not any(issubclass(kind, datetime) for kind in kinds):
        return np.array(values, "datetime64[D]")
    if not all(issubclass(kind, datetime) for kind in kinds):
        raise TypeError(f"{name}: expected all datetimes or all dates, got {listed}")
    if any(value != value for value in values):
        raise ValueError(f"{name}: expected no missing time, got one")
    if len({value.tzinfo is None for value in values}) > 1:
        raise TypeError(f"{name}: expected datetimes that all have a time zone or all have none, got both")
    if any(getattr(value, "nanosecond", 0) for value in values):
        raise TypeError(f"{name}: expected a column of nanoseconds as datetime64, got a list of {listed}")
    start = datetime(1970, 1, 1, tzinfo=None if values[0].tzinfo is None else timezone.utc)
    microseconds = [(value - start) // timedelta(microseconds=1) for value in values]
    return np.array(microseconds, np.int64).view("datetime64[us]")


def _of_datetimes(name: str, array: NDArray[Any]) -> Instants:
    missing = np.flatnonzero(np.isnat(array))
    if missing.size:
        raise ValueError(f"{name}[{missing[0]}]: expected a time, got none")
    unit, count = np.datetime_data(array.dtype)
    if unit in _COARSE or count != 1:
        exact = array.astype("datetime64[s]")
        if not (exact.astype(array.dtype) == array).all() or (unit not in _COARSE and unit != "s"):
            raise ValueError(f"{name}: expected datetime64 of {', '.join(UNITS)} or D, got {array.dtype}")
        array, unit = exact, "s"
    if unit not in UNITS:
        raise ValueError(f"{name}: expected datetime64 of {', '.join(UNITS)} or D, got {array.dtype}")
    return Instants(array.view(np.int64) if array.flags.c_contiguous else array.astype(np.int64), UNITS[unit])
