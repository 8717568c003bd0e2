# SPDX-License-Identifier: Apache-2.0
"""Memory that was asked for and never written, made to show."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

# torch remembers, at its first use, by which functions a device context makes tensors: it must be the real ones
with torch.device("meta"):
    torch.empty(0)


def poison_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until ``monkeypatch`` undoes it, uninitialised memory that patchkern asks for holds NaN or a sentinel."""
    for owner, names, fill in (
        (torch, ("empty", "empty_like", "empty_strided"), _fill_tensor),
        (torch.Tensor, ("new_empty", "new_empty_strided"), _fill_tensor),
        (np, ("empty", "empty_like"), _fill_array),
    ):
        for name in names:
            monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name), fill))


def _fill_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """NaN, or the most negative integer: as an index it is out of every range, as a value it is never right."""
    if tensor.numel() == 0 or tensor.device.type == "meta":
        return tensor
    with torch.no_grad():
        if tensor.is_floating_point() or tensor.is_complex():
            tensor.fill_(float("nan"))
        elif tensor.dtype is not torch.bool:
            tensor.fill_(torch.iinfo(tensor.dtype).min if tensor.dtype.is_signed else torch.iinfo(tensor.dtype).max)
    return tensor


def _fill_array(array: np.ndarray) -> np.ndarray:
    if array.dtype.kind in "fc":
        array.fill(np.nan)
    elif array.dtype.kind in "iu":
        array.fill(np.iinfo(array.dtype).min if array.dtype.kind == "i" else np.iinfo(array.dtype).max)
    return array


def _poisoned(original: Callable[..., Any], fill: Callable[[Any], Any]) -> Callable[..., Any]:
    def allocate(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        caller = str(sys._getframe(1).f_globals.get("__name__", ""))
        return fill(result) if caller.partition(".")[0] == "patchkern" else result

    return allocate
