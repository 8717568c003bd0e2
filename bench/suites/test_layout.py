# SPDX-License-Identifier: Apache-2.0
"""Planning rows in C++ and in NumPy: a batch of samples, and a training pass of whole users."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import pytest

import patchkern as pk
from bench.suites.entry import Entry, paired
from bench.workloads import POLICIES, Workload

bench_layout = pytest.importorskip(
    "bench.bench_layout", reason="the native module is not built: there is one planner", exc_type=ImportError
)
CASES = [("build_layout", 64, policy) for policy in ("text", "items", "sessions")]
CASES += [("build_training_layout", 8192, policy) for policy in ("text", "items")]


class Case(NamedTuple):
    group: str
    plan: dict[str, Callable[[], pk.PatchLayout]]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{case[2]}")
def case(request: pytest.FixtureRequest, workload: Workload) -> Case:
    operation, size, policy = request.param
    if operation == "build_layout":
        histories, wanted = workload.samples(size)
    else:
        histories, wanted = bench_layout.whole_users(workload, POLICIES[policy], size)
    build = getattr(pk, operation)
    build = functools.partial(build, workload.catalog, histories, POLICIES[policy], workload.prompt, wanted)
    return Case(f"{operation}, {policy}, {len(histories)} users", bench_layout.by_planner(build))


def check(case: Case) -> None:
    assert bench_layout.equal(case.plan["native"](), case.plan["numpy"]()), "the native and the NumPy planner disagree"


@pytest.mark.parametrize("provider", ["native", "numpy"])
def test_plan(case: Case, provider: str, entry: Entry) -> None:
    check(case)
    entry.time(case.group, case.plan[provider])


@paired
def test_paired(case: Case, entry: Entry) -> None:
    check(case)
    entry.pair(case.group, case.plan["native"], "numpy", case.plan["numpy"])
