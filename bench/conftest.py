# SPDX-License-Identifier: Apache-2.0
"""What the suites share: conditions for timing, data, and entries in pytest-benchmark's tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

    from bench.suites.entry import Entry
    from bench.workloads import Workload


def pytest_configure(config: pytest.Config) -> None:
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError("bench/ needs the plugin pytest-benchmark: pip install pytest-benchmark")
    only_checked = config.getoption("benchmark_disable") or config.getoption("benchmark_skip")
    if config.getoption("dist", "no") != "no" and not only_checked:
        raise pytest.UsageError(
            "bench/: nothing can be timed under pytest-xdist, where tests share the cores; "
            "leave out -n, or add --benchmark-disable to run the checks alone"
        )


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_scale_unit(unit: str, benchmarks: list[dict[str, Any]]) -> tuple[str, float] | None:
    """Paired entries are not in seconds: their tables say "time in baselines"."""
    from bench.suites.entry import PAIRED

    return ("baseline", 1.0) if unit == "seconds" and PAIRED in (benchmarks[0]["group"] or "") else None


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """A saved run says what it ran on; what changes from minute to minute would make every machine another one."""
    from bench.timing import environment

    for varying in ("hz_actual", "hz_actual_friendly"):
        machine_info["cpu"].pop(varying, None)
    ours = environment()
    machine_info |= {"cpu_and_isa": ours["cpu"], "torch": ours["torch"], "triton": ours["triton"]}


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed() -> None:
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope="session")
def workload() -> Workload:
    """Made up, and so the same everywhere; Llama-3's vocabulary."""
    from bench.workloads import stand_in

    return stand_in()


@pytest.fixture(scope="session")
def small_vocabulary() -> Workload:
    """The same users, with few enough tokens for a model of a moment."""
    from bench.workloads import stand_in

    return stand_in(4096)


@pytest.fixture
def entry(benchmark: BenchmarkFixture, request: pytest.FixtureRequest) -> Entry:
    from bench.suites.entry import Entry

    max_time, min_rounds = (request.config.getoption(f"benchmark_{name}") for name in ("max_time", "min_rounds"))
    return Entry(benchmark, float(max_time), int(min_rounds))
