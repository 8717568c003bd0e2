# SPDX-License-Identifier: Apache-2.0
"""Compiling the CUDA sources, once for all test processes, and reading what they write bit by bit."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sysconfig
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pybind11
import pytest
import torch

import patchkern as pk

REPOSITORY = Path(__file__).resolve().parents[1]
CSRC, SHIM = REPOSITORY / "csrc", REPOSITORY / "tests" / "cuda_host"


def command(*parts: str | Path, **options: Any) -> str:
    done = subprocess.run(
        [str(part) for part in parts], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that one of the test processes fills and all of them use."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "made").exists():
            make(folder)
            (folder / "made").touch()
    return folder


def compile_for_host(target: Path, *sources: Path) -> None:
    flags = os.environ.get("PATCHKERN_HOST_FLAGS", "").split()
    compiler = ["g++", "-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"]
    includes = [f"-I{path}" for path in (SHIM, CSRC, sysconfig.get_path("include"), pybind11.get_include())]
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}  # it is for the tests

    def compile_one(source: Path) -> Path:
        unit = target.with_name(f"{source.stem}.o")
        own = [] if source.name.startswith("bindings") else flags
        options = [*own, "-Wno-unknown-pragmas", *includes, "-x", "c++", "-c"]
        command(*compiler, *options, source, "-o", unit, env=environment)
        return unit

    with ThreadPoolExecutor() as pool:
        units = list(pool.map(compile_one, [*sources, SHIM / "runtime.cpp"]))
    command("g++", "-shared", *flags, *units, "-o", target, env=environment)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bit patterns, in which NaN equals itself and -0.0 is not 0.0."""
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


def columns(layout: pk.PatchLayout) -> tuple[torch.Tensor, ...]:
    transpose = layout.with_transpose().transpose
    assert transpose is not None
    return transpose.tokens, transpose.offsets, transpose.rows, transpose.divisors
