# SPDX-License-Identifier: Apache-2.0
"""Which backend runs where, why not, and who decides."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from types import SimpleNamespace
from typing import Any

import cases
import pytest
import torch

import patchkern as pk
from patchkern.ops import backends
from patchkern.ops.backends import choose, describe

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")
NAMES = ["cuda", "triton", "native", "reference"]

without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a CUDA device")


@pytest.fixture(autouse=True)
def automatic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PATCHKERN_BACKEND", raising=False)
    monkeypatch.setattr(backends, "_warned", False)


def pretend(monkeypatch: pytest.MonkeyPatch, **reasons: str | None) -> None:
    """Backends whose reasons not to be usable are these; Triton compiles."""
    real = backends.module
    fakes = {name: SimpleNamespace(unusable_reason=lambda reason=reason: reason) for name, reason in reasons.items()}
    monkeypatch.setattr(backends, "module", lambda name: fakes.get(name) or real(name))
    monkeypatch.setattr(backends, "_interpreted", lambda: False)


def run_python(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-W", "always", "-c", program],
        env=inherited | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


# ------------------------------------------------------------------ what there is


def test_every_backend_says_why() -> None:
    status = pk.backends()
    assert list(status) == NAMES
    assert all(isinstance(usable, bool) and reason for usable, reason in status.values())
    assert status["reference"] == (True, "PyTorch, on any device")


@without_cuda
def test_without_a_gpu() -> None:
    status = pk.backends()
    assert not status["cuda"].usable
    assert status["triton"].usable == (os.environ.get("TRITON_INTERPRET") == "1")


def test_triton_is_imported_when_it_is_asked_for() -> None:
    program = """
import sys, torch, patchkern as pk
layout = pk.build_layout(pk.Catalog.from_token_ids([0], [0, 1]), [[0]], pk.ItemPatches(0), pk.Prompt())
pk.pool_rows(torch.ones(1, 1, requires_grad=True), layout).sum().backward()
assert "triton" not in sys.modules, "imported for a CPU tensor"
print(pk.backends()["triton"])
"""
    done = run_python(program)
    assert done.returncode == 0, done.stderr
    assert "BackendStatus(usable=" in done.stdout


def test_without_triton() -> None:
    program = """
import sys
sys.modules["triton"] = None
import torch, patchkern as pk
status = pk.backends()
assert not status["triton"].usable
print(status["triton"].reason)
layout = pk.build_layout(pk.Catalog.from_token_ids([0], [0, 1]), [[0]], pk.ItemPatches(0), pk.Prompt())
try:
    pk.pool_rows(torch.ones(1, 1), layout, backend="triton")
except ValueError as error:
    print("refused:", error)
assert pk.pool_rows(torch.ones(1, 1), layout).item() == 1
"""
    done = run_python(program)
    assert done.returncode == 0, done.stderr
    reason, refused = done.stdout.splitlines()
    assert "triton" in reason
    assert refused == f"refused: backend: expected a usable backend, got 'triton': {reason}"
    assert "Warning" not in done.stderr


@without_cuda
def test_triton_that_compiles_needs_a_gpu() -> None:
    done = run_python("import patchkern as pk; print(*pk.backends()['triton'])")
    assert done.stdout.startswith("False torch sees no CUDA device"), done.stdout + done.stderr


# ------------------------------------------------------------------ automatic


def test_the_cpu_gets_the_native_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where Triton interprets, which is slower than anything."""
    pretend(monkeypatch, native=None)
    for dtype in cases.DTYPES:
        assert choose("auto", CPU, dtype) == "native"


@pytest.mark.parametrize(
    ("cuda", "triton", "forward", "gradient"),
    [
        (None, None, "triton", "cuda"),
        (None, "broken", "cuda", "cuda"),
        ("not built", None, "triton", "triton"),
        ("not built", "not installed", "reference", "reference"),
    ],
)
def test_a_gpu_gets_the_fastest_kernels(
    monkeypatch: pytest.MonkeyPatch, cuda: str | None, triton: str | None, forward: str, gradient: str
) -> None:
    pretend(monkeypatch, cuda=cuda, triton=triton)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert choose("auto", CUDA, dtype) == forward
            assert choose("auto", CUDA, dtype, "pool_rows_grad") == gradient
        assert choose("auto", CUDA, torch.float64) == "reference"  # no kernel has it, which is no reason to warn
    messages = [str(warning.message) for warning in caught]
    wanted = "patchkern runs on the slow reference backend: triton: not installed; cuda: not built"
    assert messages == ([wanted] if forward == "reference" else [])


def test_each_op_asks_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward pass and the gradient have their own order of preference."""
    asked = []

    def chosen(backend: str, device: torch.device, dtype: torch.dtype, op: str = "pool_rows") -> str:
        asked.append((backend, op))
        return "reference"

    monkeypatch.setattr(backends, "choose", chosen)
    layout = cases.make_batch(pk.ItemPatches(2), [9]).layout(transpose=True)
    weight = cases.make_weight(cases.VOCABULARY, 8, torch.float32).requires_grad_()
    pk.pool_rows(weight, layout).sum().backward()
    assert asked == [("auto", "pool_rows"), ("auto", "pool_rows_grad")]


def test_other_devices_get_the_reference() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose("auto", torch.device("xpu"), torch.float32) == "reference"


def test_an_interpreter_is_never_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, cuda="not built", triton=None, native="not built")
    monkeypatch.setattr(backends, "_interpreted", lambda: True)
    with pytest.warns(UserWarning, match="slow reference backend: native: not built"):
        assert choose("auto", CPU, torch.float32) == "reference"
    assert choose("auto", CUDA, torch.float32) == "reference"


# ------------------------------------------------------------------ asked for by name


@pytest.mark.parametrize("source", ["argument", "environment"])
@pytest.mark.parametrize(
    ("name", "device", "dtype", "message"),
    [
        ("fast", CPU, torch.float32, "expected auto, cuda or triton or native or reference, got 'fast'"),
        (
            "native",
            CUDA,
            torch.float32,
            "expected a backend for torch.float32 on cuda:0, got 'native', which runs on the CPU",
        ),
        (
            "cuda",
            CPU,
            torch.float32,
            "expected a backend for torch.float32 on cpu, got 'cuda', which runs on CUDA devices",
        ),
        ("triton", CPU, torch.bfloat16, "got 'triton', which runs on CUDA devices"),
        (
            "cuda",
            CUDA,
            torch.float64,
            "expected a backend for torch.float64 on cuda:0, got 'cuda', which has no float64",
        ),
        ("triton", CUDA, torch.float64, "got 'triton', which has no float64"),
    ],
)
def test_a_backend_that_does_not_fit(
    monkeypatch: pytest.MonkeyPatch, source: str, name: str, device: torch.device, dtype: torch.dtype, message: str
) -> None:
    pretend(monkeypatch, cuda=None, triton=None, native=None)
    argument = "backend"
    if source == "environment":
        monkeypatch.setenv("PATCHKERN_BACKEND", name)
        name, argument = "auto", "PATCHKERN_BACKEND"
    with pytest.raises(ValueError, match=f"^{argument}: .*{message}"):
        choose(name, device, dtype)


def test_a_backend_that_is_not_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, cuda="the driver is from 2009")
    with pytest.raises(ValueError, match=r"^backend: expected a usable backend, got 'cuda': the driver is from 2009$"):
        choose("cuda", CUDA, torch.float32)


def test_a_name_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, cuda=None, triton=None)
    assert choose("triton", CUDA, torch.float32) == "triton"
    monkeypatch.setenv("PATCHKERN_BACKEND", "reference")
    assert choose("auto", CUDA, torch.float32) == "reference"
    assert choose("cuda", CUDA, torch.float32) == "cuda"  # the argument wins
    assert choose("auto", CUDA, torch.float32, "pool_rows_grad") == "reference"
    monkeypatch.setenv("PATCHKERN_BACKEND", "auto")
    assert choose("auto", CUDA, torch.float32) == "triton"


def test_the_gradient_is_as_particular(monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not fit is refused by every public function, and nothing is written."""
    layout = cases.make_batch(pk.ItemPatches(2), [9]).layout()
    weight = cases.make_weight(cases.VOCABULARY, 8, torch.float64)
    out = torch.full((layout.num_rows, 8), 7.0, dtype=torch.float64)
    into = torch.full((cases.VOCABULARY, 8), 7.0, dtype=torch.float64)
    pretend(monkeypatch, triton=None)
    monkeypatch.setattr(backends, "_interpreted", lambda: True)
    calls: list[Any] = [
        lambda: pk.pool_rows(weight, layout, backend="triton", out=out),
        lambda: pk.pool_rows(weight.clone().requires_grad_(), layout, backend="triton"),
        lambda: pk.pool_rows_grad(weight[: layout.num_rows], layout, cases.VOCABULARY, backend="triton", out=into),
        lambda: pk.item_table(cases.make_batch(pk.ItemPatches(2), [9]).catalog, weight, backend="triton"),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"backend: expected a backend for torch.float64 on cpu, got 'triton'"):
            call()
    assert (out == 7).all() and (into == 7).all()


# ------------------------------------------------------------------ announced


def test_programs_announce_what_will_run(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, cuda=None, triton=None, native=None)
    monkeypatch.setattr(backends, "origin", lambda: "from /copy")
    assert describe(CUDA) == (
        "triton (Triton kernels, on GPUs), gradients by cuda (CUDA C++ kernels, on NVIDIA GPUs) on cuda:0, from /copy"
    )
    assert describe(CUDA, torch.float64) == "reference (PyTorch, on any device) on cuda:0, from /copy"
    said = describe(CPU)
    assert said.startswith("native (C++ kernels for the CPU") and said.endswith("on cpu, 1 threads, from /copy")
    monkeypatch.setenv("PATCHKERN_BACKEND", "triton")
    assert describe(CUDA) == "triton (Triton kernels, on GPUs) on cuda:0, from /copy"
