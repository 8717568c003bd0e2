# SPDX-License-Identifier: Apache-2.0
"""Times of every kind in seconds, exact until they are sorted."""

from __future__ import annotations

import logging
from datetime import date, datetime, timedelta, timezone
from typing import Any

import numpy as np
import pytest
import torch

from patchkern.batch.instants import instants

EAST = timezone(timedelta(hours=2))
DAY = 1_577_836_800  # 2020-01-01


def seconds(values: Any, unit: str | None = None) -> list[float]:
    return list(instants("timestamps", values, unit).seconds().tolist())


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([5, -3], [5, -3]),
        ([1.6e9, 5.0], [1_600_000_000, 5]),
        ([1.6e9 + 0.5, 5], [1.6e9 + 0.5, 5]),
        (torch.tensor([5, 6]), [5, 6]),
        (np.array([5, 6], np.uint32), [5, 6]),
        (np.array([5, 6.5], object), [5, 6.5]),
        ([datetime(2020, 1, 1)], [DAY]),
        ([datetime(2020, 1, 1, 0, 0, 0, 250_000)], [DAY + 0.25]),
        ([datetime(2020, 1, 1, 2, tzinfo=EAST), datetime(2020, 1, 1, tzinfo=timezone.utc)], [DAY, DAY]),
        ([date(2020, 1, 1), date(1969, 12, 31)], [DAY, -86_400]),
        (np.array(["2020-01-01"], "datetime64[D]"), [DAY]),
        (np.array(["2020-01"], "datetime64[M]"), [DAY]),
        (np.array(["2020-01-01T00:00"], "datetime64[m]"), [DAY]),
        (np.array(["2020-01-01T00:00:00.250"], "datetime64[ms]"), [DAY + 0.25]),
        (np.array(["2020-01-01", "2020-01-01"], "datetime64[ns]")[::2], [DAY]),
        (np.array([3], "datetime64[25s]"), [75]),
        ([np.datetime64("2020-01-01")], [DAY]),
        ([], []),
    ],
)
def test_kinds(values: Any, expected: list[float]) -> None:
    got = instants("timestamps", values).seconds()
    assert got.tolist() == expected
    assert got.dtype == (np.int64 if all(float(value).is_integer() for value in expected) else np.float64)


@pytest.mark.parametrize(("unit", "ratio"), [("ms", 10**3), ("us", 10**6), ("ns", 10**9)])
def test_units_by_size_with_a_warning_and_as_told(unit: str, ratio: int, caplog: pytest.LogCaptureFixture) -> None:
    times = [1_600_000_000 * ratio, 1_500_000_000 * ratio]
    with caplog.at_level(logging.WARNING, logger="patchkern.batch"):
        assert seconds(times) == [1_600_000_000, 1_500_000_000]
        assert f"timestamps: as large as {times[0]}, taken to be {unit}; the time_unit of " in caplog.text
        caplog.clear()
        assert seconds(times, unit) == [1_600_000_000, 1_500_000_000]
        assert seconds(times, "s") == times
        assert seconds([1000], "ms") == [1] and seconds([1500, 0], "ms") == [1.5, 0]
    assert not caplog.text


def test_nanoseconds_are_sorted_before_they_are_rounded() -> None:
    times = instants("timestamps", [1_600_000_000_000_000_002, 1_600_000_000_000_000_001], "ns")
    assert times.ticks.tolist() == [1_600_000_000_000_000_002, 1_600_000_000_000_000_001]
    assert times.seconds().tolist() == [1.6e9, 1.6e9]


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        (["2020-01-01"], TypeError, "timestamps: expected numbers or datetimes, got dtype <U10"),
        ([True], TypeError, "timestamps: expected numbers or datetimes, got dtype bool"),
        ([1, None], TypeError, "timestamps: expected numbers or datetimes, got NoneType, int"),
        ([1.0, float("nan")], ValueError, r"timestamps\[1\]: expected a time, got nan"),
        ([float("inf")], ValueError, r"timestamps\[0\]: expected a time, got inf"),
        (np.array(["2020", "NaT"], "datetime64[s]"), ValueError, r"timestamps\[1\]: expected a time, got none"),
        (np.array(["2020", "NaT"], "M8[s]").view(np.int64), ValueError, r"timestamps\[1\]: expected a time, got none"),
        (np.array([3], "datetime64[ps]"), ValueError, "timestamps: expected datetime64 of s, ms, us, ns or D, got"),
        (np.array([3], "timedelta64[s]"), TypeError, "got dtype timedelta64"),
        (np.array([2**63], np.uint64), ValueError, "timestamps: expected integers that fit in int64"),
        (
            [datetime(2020, 1, 1), date(2020, 1, 1)],
            TypeError,
            "expected all datetimes or all dates, got date, datetime",
        ),
        ([datetime(2020, 1, 1), datetime(2020, 1, 1, tzinfo=EAST)], TypeError, "all have a time zone or all have none"),
        ([datetime(2020, 1, 1), 5], TypeError, "expected numbers or datetimes, got datetime, int"),
        ([timedelta(1)], TypeError, "expected numbers or datetimes, got timedelta"),
        (
            [1_600_000_000, 1_600_000_000_000],
            ValueError,
            r"timestamps\[0\]: expected times of one unit, got 1600000000 among ms as large as 1600000000000; time",
        ),
    ],
)
def test_what_is_no_time(values: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        instants("timestamps", values)


def test_unknown_unit() -> None:
    with pytest.raises(ValueError, match="time_unit: expected one of s, ms, us, ns or None, got 'h'"):
        instants("timestamps", [1], "h")


def test_arrow() -> None:
    pa = pytest.importorskip("pyarrow", reason="needs pyarrow")
    for column in (
        pa.array([datetime(2020, 1, 1)]),
        pa.array([datetime(2020, 1, 1, 2, tzinfo=EAST)]),
        pa.chunked_array([pa.array([DAY * 10**9], pa.timestamp("ns"))]),
        pa.array([date(2020, 1, 1)]),
        pa.array([date(2020, 1, 1)], pa.date64()),
        pa.array([DAY]),
    ):
        assert seconds(column) == [DAY]
    with pytest.raises(ValueError, match=r"timestamps\[1\]: expected no missing value, got 1"):
        instants("timestamps", pa.array([datetime(2020, 1, 1), None]))


def test_pandas() -> None:
    pd = pytest.importorskip("pandas", reason="needs pandas")
    for column in (
        pd.to_datetime(pd.Series(["2020-01-01"])),
        pd.to_datetime(pd.Series(["2020-01-01 02:00:00+02:00"])),
        pd.to_datetime(pd.Series(["2020-01-01"])).dt.tz_localize("Asia/Tokyo") + pd.Timedelta(hours=9),
        pd.Series([DAY]),
    ):
        assert seconds(column) == [DAY]
    assert seconds([pd.Timestamp("2020-01-01")]) == [DAY]
    with pytest.raises(ValueError, match="timestamps: expected no missing value, got 1"):
        instants("timestamps", pd.to_datetime(pd.Series(["2020-01-01", None])))
    with pytest.raises(TypeError, match="expected a column of nanoseconds as datetime64, got a list of Timestamp"):
        instants("timestamps", [pd.Timestamp("2020-01-01 00:00:00.000000001")])


def test_polars() -> None:
    pl = pytest.importorskip("polars", reason="needs polars")
    for column in (
        pl.Series([datetime(2020, 1, 1)]),
        pl.Series([datetime(2020, 1, 1, 2, tzinfo=EAST)]),
        pl.Series([date(2020, 1, 1)]),
        pl.Series([DAY]),
    ):
        assert seconds(column) == [DAY]
    with pytest.raises(ValueError, match="timestamps: expected no missing value, got 1"):
        instants("timestamps", pl.Series([date(2020, 1, 1), None]))
