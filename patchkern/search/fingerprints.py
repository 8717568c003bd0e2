# SPDX-License-Identifier: Apache-2.0
"""What a run is known by: its arguments as JSON has them, or hashes of their content."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from patchkern.batch.columns import is_sequence
from patchkern.search.protocol import SearchModel

_VALUES = 4096  # of each parameter, to know a model by


def described(value: Any) -> Any:
    """The value itself where JSON has it, else a hash of its content."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if callable(value):
        return getattr(value, "fingerprint", None) or getattr(value, "__qualname__", type(value).__qualname__)
    hashed = hashlib.blake2b(digest_size=16)
    _hash_into(hashed, value)
    return hashed.hexdigest()


def _hash_into(hashed: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        if value.dtype == torch.bfloat16:  # of which NumPy knows nothing
            hashed.update(b"bfloat16")
            value = value.view(torch.int16)
        value = value.numpy()
    if isinstance(value, np.ndarray) and value.dtype != object:
        hashed.update(f"{value.dtype.str}{value.shape}".encode())
        hashed.update(np.ascontiguousarray(value).tobytes())
    elif is_sequence(value) or (isinstance(value, np.ndarray) and value.ndim):
        hashed.update(f"[{len(value)}]".encode())
        for part in value:
            _hash_into(hashed, part)
    elif callable(value):
        hashed.update(str(described(value)).encode())
    else:
        hashed.update(repr(value).encode())


def model_fingerprint(model: SearchModel) -> str:
    """Names, shapes and a sample of the values of all parameters; and how a model with memories makes them."""
    hashed = hashlib.blake2b(digest_size=16)
    if getattr(model, "one_time", False):
        hashed.update(b"one_time")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            sample = parameter.reshape(-1)[:: max(1, parameter.numel() // _VALUES)].double()
            name = name.replace("_orig_mod.", "")  # of torch.compile
            hashed.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
            hashed.update(sample.cpu().numpy().tobytes())
    return hashed.hexdigest()
