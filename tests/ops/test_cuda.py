# SPDX-License-Identifier: Apache-2.0
"""When the CUDA backend can be used, and why not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType

import cases
import pytest
import torch

import patchkern as pk
from patchkern.ops import cuda


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Pretend: which CUDA the driver serves, what the device is, what was built."""

    def pretend(
        driver: int = 13020, capability: tuple[int, int] = (9, 0), archs: tuple[str, ...] = ("80", "90")
    ) -> None:
        module = ModuleType("_cuda")
        vars(module).update(runtime_version=lambda: 13000, driver_version=lambda: driver)
        monkeypatch.setattr(cuda, "_cuda", module)
        monkeypatch.setattr(cuda, "build_info", lambda: {"archs": list(archs)})
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    for forget in (cuda._no_cuda, cuda._no_kernel):
        forget.cache_clear()
    yield pretend
    for forget in (cuda._no_cuda, cuda._no_kernel):
        forget.cache_clear()


def test_module_that_was_not_built_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_cuda", None)
    monkeypatch.setattr(cuda, "_missing", "the package was built with PATCHKERN_CUDA=0")
    assert cuda.unusable_reason() == "the package was built with PATCHKERN_CUDA=0"
    assert pk.backends()["cuda"] == (False, "the package was built with PATCHKERN_CUDA=0")
    with pytest.raises(ValueError, match="got 'cuda': the package was built with PATCHKERN_CUDA=0"):
        pk.pool_rows(torch.ones(97, 4), cases.make_batch(pk.TextOnly(max_items=None), [3]).layout(), backend="cuda")


def test_no_device(machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    machine()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cuda.unusable_reason() == "torch sees no CUDA device"


@pytest.mark.parametrize(
    ("driver", "usable"), [(13000, True), (13020, True), (14000, True), (12080, False), (0, False)]
)
def test_driver_must_serve_the_runtime(machine: Callable[..., None], driver: int, usable: bool) -> None:
    machine(driver=driver)
    served = f"{driver // 1000}.{driver % 1000 // 10}"
    reason = f"it was built for CUDA 13.0, but the driver serves CUDA {served}"
    assert cuda.unusable_reason() == (None if usable else reason)


@pytest.mark.parametrize(
    ("capability", "archs", "usable"),
    [
        ((8, 0), ("80", "90"), True),
        ((8, 9), ("80", "90"), True),  # the same family, newer
        ((9, 0), ("80", "90"), True),
        ((12, 0), ("80", "90"), True),  # from the PTX of 90
        ((7, 5), ("80", "90"), False),
        ((8, 0), ("86", "90"), False),
        ((8, 9), ("100",), False),
        ((10, 3), ("90", "100"), True),
    ],
)
def test_kernels_must_run_on_the_device(
    machine: Callable[..., None], capability: tuple[int, int], archs: tuple[str, ...], usable: bool
) -> None:
    machine(capability=capability, archs=archs)
    built = ", ".join(f"sm_{arch}" for arch in archs)
    reason = f"it was built for {built}, but cuda:0 is sm_{capability[0]}{capability[1]}"
    assert cuda.unusable_reason() == (None if usable else reason)
