# SPDX-License-Identifier: Apache-2.0
"""`python -m patchkern`: what a bug report needs to say about this installation and this machine."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import patchkern
from patchkern._build import build_info, missing_reason, origin, shadowed_copy
from patchkern.ops import native

PACKAGES = [
    *("torch", "numpy", "tqdm", "triton", "flash-attn"),
    *("transformers", "tokenizers", "safetensors", "accelerate", "peft", "pyarrow"),
]
CPU_FEATURES = r"avx2|fma|f16c|avx512\w*|amx\w*|asimd|sve\w*|bf16"
VARIABLES = r"(PATCHKERN|OMP|MKL|KMP)_\w+|CUDA_VISIBLE_DEVICES"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _cpu() -> tuple[str, str]:
    """The CPU's name and those of its features that kernels care about, as far as the system says."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine(), "unknown"
    name = re.search(r"^model name\s*: (.*)", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*: (.*)", text, re.MULTILINE)
    features = [flag for flag in flags[1].split() if re.fullmatch(CPU_FEATURES, flag)] if flags else []
    return name[1] if name else platform.machine(), " ".join(features) or "none of note"


def _native_build() -> str:
    if reason := missing_reason("_native"):
        return f"none: {reason}"
    info = build_info()
    if not info:
        return "no record of it"
    return f"{info['compiler']}, {' '.join(info['flags'])}, for {' '.join(info['isa'])}"


def _cuda_build() -> str:
    if reason := missing_reason("_cuda"):
        return f"none: {reason}"
    info = build_info()
    if not info:
        return "no record of it"
    return f"{info['nvcc']}, for {' '.join(f'sm_{arch}' for arch in info['archs'])}"


def report() -> Iterator[tuple[str, str]]:
    """The lines of the report: a name and what there is to say about it."""
    yield "patchkern", f"{patchkern.__version__} {origin()}"
    if (copy := shadowed_copy()) is not None:
        yield "not used", f"the copy in {copy.parent}, which is found later"
    yield "python", f"{platform.python_version()} ({platform.python_implementation()})"
    for package in PACKAGES:
        yield package, _version(package)
    yield "platform", platform.platform()
    name, features = _cpu()
    yield "cpu", f"{name}, {os.cpu_count()} logical cores"
    yield "cpu features", features
    yield "threads", f"{torch.get_num_threads()} in torch"
    yield "cuda", f"{torch.version.cuda or 'none'} in torch, {torch.cuda.device_count()} devices"
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        capability = f"sm_{properties.major}{properties.minor}"
        yield f"cuda:{i}", f"{properties.name}, {capability}, {properties.total_memory / 2**30:.0f} GiB"
    yield "native build", _native_build()
    yield "cuda build", _cuda_build()
    yield "native isa", f"{native.isa()}, of {' '.join(native.isa_levels()) or 'none'}"
    for backend, status in patchkern.backends().items():
        yield backend, f"{'usable' if status.usable else 'not usable'}: {status.reason}"
    for variable in sorted(os.environ):
        if re.fullmatch(VARIABLES, variable):
            yield variable, os.environ[variable]


def main() -> None:
    for name, value in report():
        print(f"{name:<14}{value}")


if __name__ == "__main__":
    main()
