# SPDX-License-Identifier: Apache-2.0
"""Fixtures that every test module shares: seeds, threads, poisoned memory, backends, shared data, markers."""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from poison import poison_memory

# Without a GPU, Triton's kernels are interpreted. Triton reads this when it is first imported, which torch puts off.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if find_spec("triton") is not None:
        from interpreter import patch_once

        patch_once()

from patchkern.batch import planning
from patchkern.ops import backends

REPOSITORY = Path(__file__).resolve().parents[1]

torch.set_num_threads(int(os.environ.get("PATCHKERN_TEST_THREADS", "1")))

# Two runs test the same examples; HYPOTHESIS_PROFILE=explore looks for new ones. A wall-clock deadline would only
# measure the neighbours.
_common: dict[str, Any] = {
    "deadline": None,
    "suppress_health_check": [
        HealthCheck.too_slow,
        HealthCheck.function_scoped_fixture,
        HealthCheck.differing_executors,
    ],
}
settings.register_profile("repeatable", derandomize=True, database=None, **_common)
settings.register_profile("explore", **_common)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


# ------------------------------------------------------------------ markers


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "unpoisoned(reason): leave torch.empty and np.empty as they are")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, none here"))


def pytest_collection_finish() -> None:
    """What is there now, of libraries and of tests, stays: collections need not look at it."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # or libraries find their objects alive at the end, and say so


# ------------------------------------------------------------------ backends and devices

CPU_BACKENDS = ["reference", "native", "triton"]
GPU_BACKENDS = ["reference", "triton", "cuda"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that asks for a `backend` runs on every one that can run on the CPU; if it also asks for a `device`, on
    those of a GPU too."""
    if "backend" not in metafunc.fixturenames:
        return
    if "device" not in metafunc.fixturenames:
        metafunc.parametrize("backend", CPU_BACKENDS, indirect=True)
        return
    places = [pytest.param(name, "cpu", id=name) for name in CPU_BACKENDS]
    places += [pytest.param(name, "cuda", id=f"{name}-gpu", marks=pytest.mark.gpu) for name in GPU_BACKENDS]
    metafunc.parametrize(("backend", "device"), places, indirect=True)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where the test's tensors are."""
    return torch.device(request.param)


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend in turn; one that cannot run this test skips it with the library's own reason."""
    parameters = request.node.callspec.params
    device, dtype = torch.device(parameters.get("device", "cpu")), parameters.get("dtype", torch.float32)
    try:
        return backends.choose(request.param, device, dtype)
    except ValueError as error:
        pytest.skip(str(error))


# ------------------------------------------------------------------ every test


@pytest.fixture(autouse=True)
def seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    # `torch.manual_seed` keeps, where no GPU was used yet, a stack trace of every call for when one is
    (torch.manual_seed if torch.cuda.is_available() else torch.default_generator.manual_seed)(0)


@pytest.fixture(autouse=True)
def poisoned_memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised memory that patchkern asks for holds NaN or a sentinel, so an unwritten element can never pass."""
    if request.node.get_closest_marker("unpoisoned") is not None:
        return
    poison_memory(monkeypatch)


# ------------------------------------------------------------------ on request


@pytest.fixture(params=["numpy", "native"])
def planner(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Plan in NumPy or in C++, whichever the library would choose."""
    if request.param == "native":
        module = pytest.importorskip("patchkern.batch.planning_native", reason="the native module is not built")
    else:
        module = planning
    monkeypatch.setattr("patchkern.batch.planner.active", module)
    return str(request.param)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Set torch's thread count for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets beside the repository; it is never part of it."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("real data not found: expected a folder shared/data beside the repository")
    return folder
