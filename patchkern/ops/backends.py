# SPDX-License-Identifier: Apache-2.0
"""The backends of the ops: which can be used here, and why not."""

from __future__ import annotations

import os
import warnings
from types import ModuleType
from typing import NamedTuple

import torch

from patchkern.ops import native, reference

ENVIRONMENT = "PATCHKERN_BACKEND"
_MODULES: dict[str, ModuleType] = {"native": native, "reference": reference}


class BackendStatus(NamedTuple):
    """Whether a backend can be used on this machine, and the reason."""

    usable: bool
    reason: str


def backends() -> dict[str, BackendStatus]:
    """Each backend by name, fastest first: usable or not, and why."""
    missing = native.unusable_reason()
    return {
        "native": BackendStatus(missing is None, missing or f"C++ kernels for the CPU, {native.isa()} instructions"),
        "reference": BackendStatus(True, "PyTorch, on any device"),
    }


def choose(backend: str, device: torch.device) -> str:
    """The name of the backend to run on ``device``.

    Args:
        backend: a name, or "auto" for the ``PATCHKERN_BACKEND`` environment variable, else the fastest that fits.

    Raises:
        TypeError, ValueError: an unknown backend, or one that cannot run here; the message says why.
    """
    if not isinstance(backend, str):
        raise TypeError(f"backend: expected a string, got {type(backend).__name__}")
    argument = "backend"
    if backend == "auto":
        backend, argument = os.environ.get(ENVIRONMENT, "auto"), ENVIRONMENT
    if backend == "auto":
        if device.type == "cpu":
            if native.unusable_reason() is None:
                return "native"
            _warn_once()
        return "reference"
    if backend not in _MODULES:
        raise ValueError(f"{argument}: expected auto, {' or '.join(_MODULES)}, got {backend!r}")
    if backend == "native":
        reason = native.unusable_reason()
        if reason is not None:
            raise ValueError(f"{argument}: expected a usable backend, got 'native': {reason}")
        if device.type != "cpu":
            raise ValueError(f"{argument}: expected a backend for {device}, got 'native', which runs on the CPU")
    return backend


def describe(device: torch.device) -> str:
    """The backend that "auto" stands for on ``device``, for the line that a program prints when it starts."""
    name = choose("auto", device)
    return f"{name} ({backends()[name].reason}) on {device}, {torch.get_num_threads()} threads"


def module(name: str) -> ModuleType:
    """The backend's module: ``pool_rows`` and ``pool_rows_grad`` that write into given outputs."""
    return _MODULES[name]


_warned = False


def _warn_once() -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(f"patchkern runs on the slow reference backend: {native.unusable_reason()}", stacklevel=4)
