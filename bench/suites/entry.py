# SPDX-License-Identifier: Apache-2.0
"""How a provider becomes an entry of pytest-benchmark, alone or paired with a baseline."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from bench import timing

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

PAIRED = "paired with"
_now = 0.0


def in_baselines() -> float:
    """The clock of paired entries: it counts baselines instead of seconds, as many as `Entry.pair` has measured."""
    return _now


def _advance(quotient: float) -> None:
    global _now
    _now += quotient


paired = pytest.mark.benchmark(timer=in_baselines)


class Entry:
    """One row of a table of pytest-benchmark; tests check the result before they ask for it."""

    def __init__(self, benchmark: BenchmarkFixture, max_time: float, min_rounds: int) -> None:
        self._benchmark, self._max_time, self._min_rounds = benchmark, max_time, min_rounds

    def time(self, group: str, call: Callable[[], object]) -> None:
        """Time ``call`` beside the other entries of ``group``."""
        self._benchmark.group = group
        self._benchmark(call)

    def pair(self, group: str, call: Callable[[], object], name: str, baseline: Callable[[], object]) -> None:
        """Time ``call`` in units of ``baseline``, one after the other in every round; for tests marked `paired`."""
        self._benchmark.group = f"{group}, {PAIRED} {name}"
        calls = {"call": call, "baseline": baseline}
        if self._benchmark.disabled:
            self._benchmark.pedantic(lambda: (call(), baseline()))
            return
        # the thread's own time: what neighbours take in the middle of a call belongs to neither
        times = timing.measure(calls, self._max_time, self._min_rounds, clock=time.thread_time)
        quotients = times.seconds["call"] / times.seconds["baseline"]
        each = iter(quotients.tolist())
        self._benchmark.pedantic(lambda: _advance(next(each)), rounds=len(quotients))
