# SPDX-License-Identifier: Apache-2.0
"""What nvcc makes of the CUDA kernels: registers, spills, 16-byte accesses, no atomics."""

from __future__ import annotations

import importlib.util
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from cuda_cases import CSRC, command
from kept_builds import kept_build

ARCHS = ["80", "90", "100"]
MOST_REGISTERS = {  # what the kernels' launch bounds leave a thread, so that as many warps as they count on fit an SM
    "pool_rows_kernel": 64,
    "pool_rows_grad_tiles": 80,
    "pool_rows_grad_borders": 64,
}


class Kernel(NamedTuple):
    """What ptxas and the disassembler say about a kernel."""

    name: str
    element: str
    vector: bool
    registers: int
    memory: str  # ptxas on the stack frame and spills
    code: str  # SASS


def tool(name: str) -> str:
    """A program of the CUDA toolkit, or the one that came with Triton."""
    found = shutil.which(name)
    triton = importlib.util.find_spec("triton")
    if found is None and triton is not None and triton.origin is not None:
        found = shutil.which(Path(triton.origin).parent / "backends" / "nvidia" / "bin" / name)
    if found is None:
        pytest.skip(f"{name} is in neither the CUDA toolkit nor Triton")
    return found


def named(mangled: str) -> tuple[str, str, bool]:
    found = re.search(r"\d(pool_rows_[a-z_]+)INS\d_\d+(Float32|BFloat16|Float16)ELb([01])E", mangled)
    assert found is not None, mangled
    return found[1], found[2], found[3] == "1"


@pytest.fixture(scope="session", params=ARCHS, ids=lambda arch: f"sm_{arch}")
def kernels(request: pytest.FixtureRequest) -> list[Kernel]:
    """Every kernel, compiled for one kind of GPU."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not installed")
    if f"compute_{request.param}" not in command(nvcc, "--list-gpu-arch").split():
        pytest.skip(f"nvcc does not know sm_{request.param}")
    disassembler = tool("cuobjdump")

    def compile_all(folder: Path) -> None:
        for source in sorted(CSRC.glob("*.cu")):
            cubin = folder / f"{source.stem}.cubin"
            options = ["-std=c++17", "-O3", f"-arch=sm_{request.param}", "-Xptxas", "-v", "-cubin", "-o", cubin]
            cubin.with_suffix(".ptxas").write_text(command(nvcc, *options, source))
            cubin.with_suffix(".sass").write_text(command(disassembler, "-sass", cubin))

    read = [path for path in CSRC.iterdir() if path.is_file()]
    folder = kept_build(f"sm_{request.param}", [*read, Path(__file__)], [command(nvcc, "--version")], compile_all)
    result = []
    for report in sorted(folder.glob("*.ptxas")):
        functions = re.split(r"\bFunction : (\S+)", report.with_suffix(".sass").read_text())
        code = dict(zip(functions[1::2], functions[2::2], strict=True))
        for entry in report.read_text().split("Compiling entry function '")[1:]:
            mangled = entry.partition("'")[0]
            registers, memory = re.search(r"Used (\d+) registers", entry), re.search(r"\d+ bytes stack.*", entry)
            assert registers is not None and memory is not None, entry
            result.append(Kernel(*named(mangled), int(registers[1]), memory[0], code[mangled]))
    return result


def test_every_kernel_is_compiled(kernels: list[Kernel]) -> None:
    assert sorted({kernel.name for kernel in kernels}) == sorted(MOST_REGISTERS)
    assert len(kernels) == len(MOST_REGISTERS) * 3 * 2  # element types, accesses


def test_registers_suffice(kernels: list[Kernel], record_property: Callable[[str, object], None]) -> None:
    for kernel in kernels:
        record_property(f"{kernel.name} {kernel.element} {'vector' if kernel.vector else 'single'}", kernel.registers)
        assert kernel.registers <= MOST_REGISTERS[kernel.name], kernel[:4]
        assert kernel.memory == "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads", kernel[:4]
        assert re.findall(r"\b(?:LDL|STL)\b", kernel.code) == [], kernel[:4]


def test_vector_kernels_move_16_bytes(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        loads, stores = (re.findall(rf"\b{op}\.E[\w.]*\.128\b", kernel.code) for op in ("LDG", "STG"))
        assert bool(loads) == bool(stores) == kernel.vector, kernel[:4]
        if kernel.vector and kernel.name != "pool_rows_grad_borders":
            in_flight = {"pool_rows_kernel": 4, "pool_rows_grad_tiles": 8}[kernel.name]
            assert longest_run(kernel.code) >= in_flight, kernel[:4]


def longest_run(code: str) -> int:
    """The most 16-byte loads that are issued without an arithmetic instruction or a store among them."""
    longest = run = 0
    for operation in re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ )?\s*([A-Z][A-Z0-9_.]*)", code):
        if re.match(r"LDG\.E[\w.]*\.128", operation):
            run += 1
            longest = max(longest, run)
        elif re.match(r"FFMA|FADD|FMUL|HADD2|STG", operation):
            run = 0
    return longest


def test_no_kernel_has_an_atomic(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        assert re.findall(r"\b(?:RED|ATOM|ATOMG|ATOMS)\b", kernel.code) == [], kernel[:4]
