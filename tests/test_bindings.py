# SPDX-License-Identifier: Apache-2.0
"""csrc/bind.h: what becomes of a call's arguments, before any of them is believed to be an address."""

from __future__ import annotations

import sys
import threading
import time
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from patchkern import _build


@pytest.fixture(scope="module")
def native() -> ModuleType:
    try:
        return _build.load("_native")
    except ImportError as error:
        pytest.skip(str(error))


class Index:
    def __init__(self, value: int) -> None:
        self.value = value

    def __index__(self) -> int:
        return self.value


def address(array: np.ndarray) -> int:
    return int(array.ctypes.data)


# of no rows, no items and no titles, whose offsets are one zero
OFFSETS = np.zeros(1, np.int32)
NOTHING = (0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, address(OFFSETS), 0, 0, 0, 0, 0, 1.0, 0, 1, 1, "auto")


def changed(position: int, value: object) -> tuple[Any, ...]:
    return (*NOTHING[:position], value, *NOTHING[position + 1 :])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((), TypeError, "expected 23 arguments, got 0"),
        ((*NOTHING, 0), TypeError, "expected 23 arguments, got 24"),
        (changed(1, "0"), TypeError, "integer"),
        (changed(1, 0.0), TypeError, "integer"),
        (changed(1, None), TypeError, "integer"),
        (changed(3, 1.0), TypeError, "integer"),
        (changed(1, -1), OverflowError, "negative"),
        (changed(1, 2**64), OverflowError, "too large|too big"),
        (changed(3, 2**63), OverflowError, "too large|too big"),
        (changed(0, 2**31), OverflowError, "32 bits"),
        (changed(18, "1"), TypeError, "real number|str"),
        (changed(22, 0), TypeError, "bad argument type|str"),
        (changed(22, "\ud800"), UnicodeEncodeError, "surrogates"),
    ],
)
def test_wrong_arguments_never_reach_the_kernels(
    native: ModuleType, arguments: tuple[Any, ...], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        native.pool_rows(*arguments)


def test_arguments_go_by_position_only(native: ModuleType) -> None:
    with pytest.raises(TypeError, match="keyword"):
        native.pool_rows(*NOTHING[:-1], isa="auto")


def test_integers_may_be_numpys(native: ModuleType) -> None:
    unknown_isa = native.pool_rows(*changed(22, "vax"))
    assert unknown_isa == (1, 0) and type(unknown_isa) is tuple
    for integer in (np.int64, np.uint32, Index, bool):
        assert native.pool_rows(*changed(21, integer(1))) == native.pool_rows(*NOTHING)


def test_calls_leave_no_reference_behind(native: ModuleType) -> None:
    thing, text, broken = 2**40 + 7, "no such isa", changed(2, "x")
    before = [sys.getrefcount(argument) for argument in (thing, text, broken)]
    for _ in range(100):
        native.pool_rows(*NOTHING[:2], thing, *NOTHING[3:-1], text)
        with pytest.raises(TypeError):
            native.pool_rows(*broken)
    assert [sys.getrefcount(argument) for argument in (thing, text, broken)] == before


def test_other_threads_run_during_a_call(native: ModuleType) -> None:
    """A thread that sleeps needs the GIL to wake up: it does so in the middle of a call."""
    items, rows, dim = 40_000, 400, 64
    weight = np.ones((1, dim), np.float32)
    order, zeros = np.arange(items + 1, dtype=np.int32), np.zeros(items, np.int32)
    lo, hi, out = np.zeros(rows, np.int32), np.full(rows, items, np.int32), np.empty((rows, dim), np.float32)
    ticks: list[float] = []
    over = threading.Event()

    def tick() -> None:
        while not over.wait(0.001):
            ticks.append(time.perf_counter())

    thread = threading.Thread(target=tick)
    thread.start()
    try:
        begin = time.perf_counter()
        status = native.pool_rows(
            *(0, address(weight), 1, dim, dim, address(lo), address(hi), rows, address(order), items),
            *(address(zeros), items, address(order), items, 0, 0, 0, 0, 1.0, address(out), dim, 1, "auto"),
        )
        end = time.perf_counter()
    finally:
        over.set()
        thread.join()
    assert status == (0, 0) and (out == 1).all()
    third = (end - begin) / 3
    assert any(begin + third < moment < end - third for moment in ticks), f"{end - begin:.3f} s without a tick"
