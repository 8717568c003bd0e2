# SPDX-License-Identifier: Apache-2.0
"""The backends of the ops: which can be used here, and why not.

A backend is a module with three functions: ``pool_rows`` and ``pool_rows_grad``, which write into given outputs and do
what `reference` does, and ``unusable_reason``, which says why they cannot run on this machine, or None.
"""

from __future__ import annotations

import os
import sys
import warnings
from importlib import import_module
from types import ModuleType
from typing import Literal, NamedTuple

import torch

from patchkern._build import origin
from patchkern.ops import native

ENVIRONMENT = "PATCHKERN_BACKEND"

Op = Literal["pool_rows", "pool_rows_grad"]

# Imported when they are asked for: Triton takes a second.
_MODULES = {
    "cuda": "patchkern.ops.cuda",
    "triton": "patchkern.ops.pool_rows_triton",
    "native": "patchkern.ops.native",
    "reference": "patchkern.ops.reference",
}
# What "auto" tries on a kind of device, before it falls back on the reference: fastest first, as measured on an H100
# (docs/benchmarks.md). It depends on nothing in a batch, so that a row's bits do not either.
_KERNELS: dict[Op, dict[str, tuple[str, ...]]] = {
    "pool_rows": {"cpu": ("native",), "cuda": ("triton", "cuda")},
    "pool_rows_grad": {"cpu": ("native",), "cuda": ("cuda", "triton")},
}


class BackendStatus(NamedTuple):
    """Whether a backend can be used on this machine, and the reason."""

    usable: bool
    reason: str


def backends() -> dict[str, BackendStatus]:
    """Each backend by name: usable or not, and why.

    Examples:
        >>> import patchkern as pk
        >>> pk.backends()["reference"]
        BackendStatus(usable=True, reason='PyTorch, on any device')
    """
    return {name: _status(name) for name in _MODULES}


def usable_device(device: str, argument: str = "device") -> torch.device:
    """A device by its name, which something has been computed on.

    Raises:
        ValueError: torch cannot compute on it here; the message names ``argument`` and says why.
    """
    try:
        torch.zeros(1, device=device).item()
    except (AssertionError, RuntimeError) as error:  # an assertion is how torch says that it has no CUDA
        first, *_ = str(error).splitlines() or [""]
        raise ValueError(f"{argument}: expected one that torch can use here, got {device!r} ({first})") from None
    return torch.device(device)


def choose(backend: str, device: torch.device, dtype: torch.dtype, op: Op = "pool_rows") -> str:
    """The name of the backend to run ``op`` on tensors of ``device`` and ``dtype``.

    Args:
        backend: a name, or "auto" for the ``PATCHKERN_BACKEND`` environment variable, else the fastest that fits.

    Raises:
        ValueError: an unknown backend, or one that cannot run here; the message says why.
    """
    argument = "backend"
    if backend == "auto":
        backend, argument = os.environ.get(ENVIRONMENT, "auto"), ENVIRONMENT
    if backend == "auto":
        return _fastest(device, dtype, op)
    if backend not in _MODULES:
        raise ValueError(f"{argument}: expected auto, {' or '.join(_MODULES)}, got {backend!r}")
    reason = _unusable_reason(backend)
    if reason is not None:
        raise ValueError(f"{argument}: expected a usable backend, got {backend!r}: {reason}")
    reason = _unfit_reason(backend, device, dtype)
    if reason is not None:
        raise ValueError(f"{argument}: expected a backend for {dtype} on {device}, got {backend!r}, which {reason}")
    return backend


def describe(device: torch.device, dtype: torch.dtype = torch.float32) -> str:
    """The backends that "auto" stands for on ``device`` and the copy of patchkern that they are from, for the line that
    a program prints when it starts."""
    name, gradients = choose("auto", device, dtype), choose("auto", device, dtype, "pool_rows_grad")
    other = f", gradients by {gradients} ({_status(gradients).reason})" if gradients != name else ""
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    return f"{name} ({_status(name).reason}){other} on {device}{threads}, {origin()}"


def module(name: str) -> ModuleType:
    """The backend's module.

    Raises:
        ImportError: it needs a package that is not installed.
    """
    return sys.modules.get(_MODULES[name]) or import_module(_MODULES[name])


def _fastest(device: torch.device, dtype: torch.dtype, op: Op) -> str:
    if device.type == "cpu" and _unusable_reason("native") is None:
        return "native"  # takes every dtype
    reasons = []
    for name in _KERNELS[op].get(device.type, ()):
        if device.type == "cuda" and dtype == torch.float64:
            continue
        reason = _unusable_reason(name) or _unfit_reason(name, device, dtype)
        if reason is None:
            return name
        reasons.append(f"{name}: {reason}")
    if reasons:
        _warn_once("; ".join(reasons))
    return "reference"


def _status(name: str) -> BackendStatus:
    reason = _unusable_reason(name)
    if reason is not None:
        return BackendStatus(False, reason)
    if name == "cuda":
        description = "CUDA C++ kernels, on NVIDIA GPUs"
    elif name == "triton":
        description = f"Triton kernels, {'interpreted on the CPU, for tests' if _interpreted() else 'on GPUs'}"
    elif name == "native":
        description = f"C++ kernels for the CPU, {native.isa()} instructions"
    else:
        description = "PyTorch, on any device"
    return BackendStatus(True, description)


def _unusable_reason(name: str) -> str | None:
    try:
        reason: str | None = module(name).unusable_reason()
    except ImportError as error:
        return str(error)
    return reason


def _unfit_reason(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a usable backend does not take tensors of this kind, or None."""
    if name == "reference":
        return None
    kind = "cpu" if name == "native" or (name == "triton" and _interpreted()) else "cuda"
    if device.type != kind:
        return f"runs on {'the CPU' if kind == 'cpu' else 'CUDA devices'}"
    return "has no float64" if name != "native" and dtype == torch.float64 else None


def _interpreted() -> bool:
    """Whether Triton, which must be there, interprets its kernels: then, and only then, they take CPU tensors."""
    import triton

    interpreted: bool = triton.knobs.runtime.interpret
    return interpreted


_warned = False


def _warn_once(reason: str) -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(f"patchkern runs on the slow reference backend: {reason}", stacklevel=4)
