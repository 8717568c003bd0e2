# SPDX-License-Identifier: Apache-2.0
"""Compiling the CUDA sources, once for all test processes, and reading what they write bit by bit."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from kept_builds import REPOSITORY, kept_build

import patchkern as pk

CSRC, SHIM = REPOSITORY / "csrc", REPOSITORY / "tests" / "cuda_host"


def command(*parts: str | Path, **options: Any) -> str:
    done = subprocess.run(
        [str(part) for part in parts], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def kept_for_host(name: str, *sources: Path) -> Path:
    """The module (or library) ``name``.so of these sources, compiled for the CPU."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    flags = os.environ.get("PATCHKERN_HOST_FLAGS", "")
    read = [Path(__file__), *(path for folder in (CSRC, SHIM) for path in folder.iterdir() if path.is_file())]
    versions = [flags, sys.version, command("g++", "--version", env=without_preload())]
    folder = kept_build(
        name, [*read, Path(__file__)], versions, lambda folder: compile_for_host(folder / f"{name}.so", *sources)
    )
    return folder / f"{name}.so"


def without_preload() -> dict[str, str]:
    """The environment of a compiler: what is preloaded is for the tests."""
    return {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}


def compile_for_host(target: Path, *sources: Path) -> None:
    flags = os.environ.get("PATCHKERN_HOST_FLAGS", "").split()
    compiler = ["g++", "-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"]
    includes = [f"-I{path}" for path in (SHIM, CSRC, sysconfig.get_path("include"))]

    def compile_one(source: Path) -> Path:
        unit = target.with_name(f"{source.stem}.o")
        own = [] if source.name.startswith("bindings") else flags
        options = [*own, "-Wno-unknown-pragmas", *includes, "-x", "c++", "-c"]
        command(*compiler, *options, source, "-o", unit, env=without_preload())
        return unit

    with ThreadPoolExecutor() as pool:
        units = list(pool.map(compile_one, [*sources, SHIM / "runtime.cpp"]))
    command("g++", "-shared", *flags, *units, "-o", target, env=without_preload())


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bit patterns, in which NaN equals itself and -0.0 is not 0.0."""
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


def columns(layout: pk.PatchLayout) -> tuple[torch.Tensor, ...]:
    transpose = layout.with_transpose().transpose
    assert transpose is not None
    return transpose.tokens, transpose.offsets, transpose.rows, transpose.divisors
