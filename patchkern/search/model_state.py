# SPDX-License-Identifier: Apache-2.0
"""Whether a model still computes the same keys and values, as far as can be told without computing them.

Seen are, of every parameter and buffer, its memory, the version that torch counts, dtype, device, shape and a few of
its values, for what torch does not count (`.data`); of small buffers all values, and neither memory nor version: some
models make the same rotary frequencies anew in every pass. And of every module all plain data among its attributes:
numbers, texts, functions, tensors that are no buffers, and lists, sets and dicts of these. So adapters with their
scalings, forward hooks, quantisation and the configuration are seen without being known. Not seen is a write through
`.data` to values that are not among those read, nor the inside of other objects.
"""

from __future__ import annotations

import enum
import functools
import types
from collections.abc import Iterable, Iterator
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PretrainedConfig

from patchkern.search.protocol import SearchModel

_SAMPLES = 64  # values read from every tensor
_SMALL = 4096  # values of a buffer that is read whole
_PLAIN = {type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device}
_ATOMS = _PLAIN | {types.FunctionType, types.BuiltinFunctionType, types.MethodType, functools.partial}
# What every module has besides its own attributes; its parts are looked at one by one, and its mode is the search's.
_OF_EVERY_MODULE = set(vars(nn.Module())) - {"_forward_hooks", "_forward_pre_hooks"}


def model_state(model: SearchModel) -> Any:
    """Something that is equal for equal states. Reads from each device of the model once."""
    reader = _Reader()
    tensors = [reader.identity(tensor) for tensor in model.parameters()]
    tensors += [reader.identity(buffer, whole=buffer.numel() <= _SMALL) for buffer in _buffers(model)]
    attributes = reader.attributes(model.hf_model)
    device = model.device.type
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    return tensors, attributes, reader.plain(model.config), autocast, reader.samples()


def tensor_state(tensors: Iterable[Tensor]) -> Any:
    """`model_state` of these tensors alone."""
    reader = _Reader()
    return [reader.identity(tensor) for tensor in tensors], reader.samples()


def model_form(model: SearchModel) -> Any:
    """Something that is equal where the same operators run on tensors of the same sizes, whatever the weights are."""
    reader = _Reader()
    tensors = [(type(x), x.dtype, x.device, x.shape) for x in (*model.parameters(), *_buffers(model))]
    return tensors, reader.attributes(model.hf_model), reader.plain(model.config)


def _buffers(model: SearchModel) -> Iterator[Tensor]:
    """By their names: whether two are one may be another in the next pass."""
    return (buffer for _, buffer in model.named_buffers(remove_duplicate=False))


def _own_attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    # rotary embeddings keep frequencies aside, some from their first pass on; those in use are a buffer
    own = ((key, value) for key, value in vars(module).items() if not key.endswith("inv_freq"))
    return ((key, value) for key, value in own if key not in _OF_EVERY_MODULE)


class _Reader:
    def __init__(self) -> None:
        self._read: list[tuple[Tensor, int]] = []  # every how many values
        self._configs: set[int] = set()

    def attributes(self, module: nn.Module) -> Any:
        """Of a module and all its parts, their kinds and plain data."""
        return [
            (name, type(part), [(key, self.plain(value)) for key, value in _own_attributes(part)])
            for name, part in module.named_modules()
        ]

    def plain(self, value: Any) -> Any:
        """Plain data in a form that can be compared; other objects as their type."""
        if type(value) in _ATOMS or isinstance(value, (int, float, str, enum.Enum, np.generic)):
            return value
        if isinstance(value, dict):
            return [(key if type(key) in _ATOMS else type(key), self.plain(each)) for key, each in value.items()]
        if isinstance(value, (list, tuple)):
            return [self.plain(each) for each in value]
        if isinstance(value, (set, frozenset)):
            return {each if type(each) in _ATOMS else type(each) for each in value}
        if isinstance(value, Tensor):
            return self.identity(value)
        if isinstance(value, np.ndarray):
            return value.dtype, value.shape, value.tobytes()
        if isinstance(value, PretrainedConfig) and id(value) not in self._configs:  # every module may have it
            self._configs.add(id(value))
            return self.plain(vars(value))
        return type(value)

    def identity(self, tensor: Tensor, whole: bool = False) -> Any:
        """What tells a tensor from another beside `samples` of it, or all its values; quantised ones by their parts."""
        if is_traceable_wrapper_subclass(subclass := cast(Any, tensor)):
            names, context = subclass.__tensor_flatten__()
            return type(tensor), [self.identity(getattr(subclass, name)) for name in names], self.plain(context)
        self._read.append((tensor, 1 if whole else max(1, tensor.numel() // _SAMPLES)))
        extra = [self.plain(_inside(value)) for value in vars(tensor).values()]
        form = tensor.dtype, tensor.device, tensor.shape, extra
        return form if whole else (tensor.data_ptr(), None if tensor.is_inference() else tensor._version, *form)

    def samples(self) -> list[bytes]:
        """A few values of every tensor, evenly spread."""
        devices: dict[torch.device, list[Tensor]] = {}
        with torch.no_grad():
            for tensor, step in self._read:
                if tensor.numel() and not tensor.is_meta:
                    numbers = torch.view_as_real(tensor) if tensor.is_complex() else tensor
                    some = numbers.reshape(-1)[::step].double()
                    devices.setdefault(tensor.device, []).append(some)
            return [torch.cat(of_device).cpu().numpy().tobytes() for of_device in devices.values()]


def _inside(value: Any) -> Any:
    """Of what a library hangs on a quantised parameter, the attributes."""
    return value if type(value) in _ATOMS or isinstance(value, Tensor) else getattr(value, "__dict__", value)
