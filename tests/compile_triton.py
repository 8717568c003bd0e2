# SPDX-License-Identifier: Apache-2.0
"""Compile the Triton kernels of pool_rows for GPUs that are not here, and print what came out, as JSON.

    python tests/compile_triton.py ARCHITECTURES DTYPES CASES      e.g. 80,90 bfloat16 vector,fallback

The kernels are launched by the library's own functions, on CPU tensors: a driver that claims a GPU of that architecture
takes the place of Triton's, and every launch ends when the kernel is compiled. So what is read here is what a GPU would
run. Run without TRITON_INTERPRET.
"""

from __future__ import annotations

import collections
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from patchkern.ops import pool_rows_triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Case(NamedTuple):
    """One specialisation: the width, and elements by which a row of the matrix is longer than that."""

    width: int = 2048
    slack: int = 0
    table: bool = False
    scale: float = 1.0
    scatter: bool = True
    accumulate: bool = False


CASES = {
    "vector": Case(),
    "vector-table": Case(table=True, scale=2.0, scatter=False, accumulate=True),
    "vector-1000": Case(width=1000, scale=2.0),
    "narrow-64": Case(width=64, accumulate=True),
    "fallback": Case(slack=1),
    "fallback-41": Case(width=41, table=True, scatter=False),
    "fallback-1": Case(width=1, scale=2.0, accumulate=True),
}


class Driver:
    """Just enough of a driver for Triton to compile for an absent GPU; each architecture is a device of its own."""

    architecture = 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return self.architecture

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_only(compiled: dict[str, Any]) -> None:
    """From now on a launch compiles, and leaves the kernel in ``compiled``."""
    run = JITFunction.run

    def compile_kernel(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled[self.__name__] = run(self, *arguments, grid=grid, warmup=True, **options)
        return compiled[self.__name__]

    JITFunction.run = compile_kernel


def launch(case: Case, dtype: torch.dtype, size: int = 1000, shift: int = 0) -> None:
    """Forward and backward of a batch of ``size`` rows, whose index tensors begin ``shift`` elements into a buffer."""

    def matrix(rows: int) -> torch.Tensor:
        return torch.zeros(rows, case.width + case.slack, dtype=dtype)[:, : case.width]

    def index(length: int) -> torch.Tensor:
        return torch.zeros(length + shift, dtype=torch.int32)[shift:]

    table = matrix(10) if case.table else None
    title_index = index(size // 2) if case.table else None
    pool_rows_triton.pool_rows(
        matrix(50), index(size), index(size), index(size), index(3 * size), index(size // 2 + 1),
        table, title_index, case.scale, matrix(size),
    )  # fmt: skip
    pool_rows_triton.pool_rows_grad(
        matrix(size), index(size // 3), index(size // 3 + 1), index(5 * size), index(5 * size), case.scale,
        torch.zeros(50, case.width, dtype=dtype), case.scatter, case.accumulate,
    )  # fmt: skip


def read(kernel: Any) -> dict[str, Any]:
    """Registers, stack and local memory of a thread; how often each memory instruction stands in the machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([str(TOOLS / tool), option, file.name], capture_output=True, text=True, check=True).stdout
            for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found is not None, usage
    instructions = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ )?([A-Z][A-Z0-9_.]*)", code)
    memory = re.compile(r"LD|ST|RED(?!UX)|ATOM")
    narrow = [
        line.strip() for line in kernel.asm["ttir"].splitlines()
        if "_stride" in line and "tt.func" not in line and not line.startswith("#") and "to i64" not in line
    ]  # fmt: skip
    return {
        "registers": int(found[1]),
        "stack": int(found[2]),
        "local": int(found[3]),
        "memory": collections.Counter(name for name in instructions if memory.match(name)),
        "instructions": len(instructions),
        "int32_strides": narrow,
        "zeros": re.findall(r"constant (?:dense<)?0\.0+e\+00>? : (\S+)", kernel.asm["ttir"]),
    }


def kernel_counts() -> dict[str, int]:
    kernels = [value for value in vars(pool_rows_triton).values() if isinstance(value, JITFunction)]
    return {kernel.__name__: sum(len(cache[0]) for cache in kernel.device_caches.values()) for kernel in kernels}


def main(argv: list[str]) -> None:
    architectures, dtypes, cases = (argument.split(",") for argument in argv)
    device, compiled = Driver(), dict[str, Any]()
    driver.set_active(device)
    compile_only(compiled)
    results = []
    for architecture in architectures:
        device.architecture = int(architecture)
        for dtype in dtypes:
            for case in cases:
                compiled.clear()
                launch(CASES[case], getattr(torch, dtype))
                for name, kernel in compiled.items():
                    results.append({"kernel": name, "for": [architecture, dtype, case], **read(kernel)})
    before = kernel_counts()
    # Other sizes (one, multiples of 16 and not) and other alignments of the index tensors are no other kernels.
    for size, shift in ((257, 0), (512, 1), (1024, 3), (30000, 0)):
        launch(CASES[cases[-1]], getattr(torch, dtypes[-1]), size, shift)
    print(json.dumps({"kernels": results, "before": before, "after": kernel_counts()}))


if __name__ == "__main__":
    main(sys.argv[1:])
