# SPDX-License-Identifier: Apache-2.0
"""A compressed user as bytes: a header of fixed size and its tensors, one after the other, as they lie in memory.

    64 bytes          magic, format version, number of tensors, checksum of the whole, items absorbed, their
                      hash, identity of the model
    24 for a tensor   its dtype and shape; zeros up to a multiple of 64
    the rest          the tensors' elements

Numbers are little-endian; nothing is pickled. A value that is cut off, changed, of another version or of another model
is an error, never a tensor.
"""

from __future__ import annotations

import ctypes
import math
import struct
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from patchkern.serving.stores.protocol import StoreError

VERSION = 1
HASH_BYTES = 16  # of the items' hash and of a model's identity
MAX_DIMS = 5

_MAGIC = b"pkus"
_HEADER = struct.Struct("<4sHHIQ16s16s12x")
_TENSOR = struct.Struct("<BB2x5I")
_CHECKSUM = slice(8, 12)  # of the header
_ALIGNMENT = 64
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class UserRecord(NamedTuple):
    """A user's old items, compressed."""

    cut: int
    """how many items are absorbed"""
    items: bytes
    """16 bytes, the hash of the absorbed items in order"""
    tensors: tuple[Tensor, ...]
    """what a model made of them"""


def header_bytes(num_tensors: int) -> int:
    """Bytes that a record has besides its tensors' elements."""
    return -(-(_HEADER.size + num_tensors * _TENSOR.size) // _ALIGNMENT) * _ALIGNMENT


def record_bytes(tensors: Sequence[Tensor]) -> int:
    """Bytes of a record of tensors like these."""
    return header_bytes(len(tensors)) + sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def pack(record: UserRecord, model: bytes) -> bytearray:
    """The record as bytes.

    Args:
        record: its tensors are float32, bfloat16, float16 or float64, of at most 5 dimensions, on any device.
        model: 16 bytes, the identity of the model that made them.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    for name, value in (("record.items", record.items), ("model", model)):
        if len(value) != HASH_BYTES:
            raise ValueError(f"{name}: expected {HASH_BYTES} bytes, got {len(value)}")
    if not 0 <= record.cut < 1 << 63:
        raise ValueError(f"record.cut: expected a number of items, got {record.cut}")
    packed = bytearray(record_bytes(record.tensors))
    at = _HEADER.size
    for number, tensor in enumerate(record.tensors):
        if tensor.dtype not in _DTYPES:
            raise TypeError(f"record.tensors[{number}]: expected {_names(_DTYPES)}, got {tensor.dtype}")
        if tensor.ndim > MAX_DIMS:
            raise ValueError(f"record.tensors[{number}]: expected at most {MAX_DIMS} dimensions, got {tensor.ndim}")
        shape = [*tensor.shape, *(MAX_DIMS - tensor.ndim) * [0]]
        _TENSOR.pack_into(packed, at, _DTYPES.index(tensor.dtype), tensor.ndim, *shape)
        at += _TENSOR.size
    elements = np.frombuffer(packed, np.uint8)
    at = header_bytes(len(record.tensors))
    for tensor in record.tensors:
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        elements[at : at + flat.size] = flat
        at += flat.size
    head = (_MAGIC, VERSION, len(record.tensors))
    _HEADER.pack_into(packed, 0, *head, 0, record.cut, record.items, model)
    _HEADER.pack_into(packed, 0, *head, _checksum(packed), record.cut, record.items, model)
    return packed


def unpack(value: memoryview, model: bytes, name: str) -> UserRecord:
    """The record of these bytes; its tensors are views of them, to be read only, for as long as the bytes are valid.

    Args:
        value: what `pack` has made.
        model: 16 bytes, the identity of the model that must have made it.
        name: of the user, for errors.

    Raises:
        StoreError: the bytes are torn, of another version or of another model.
    """
    if value.nbytes < _HEADER.size or value[:4] != _MAGIC:
        raise StoreError(f"{name}: expected a compressed user, got {value.nbytes} bytes of something else")
    _, version, count, checksum, cut, items, made_by = _HEADER.unpack_from(value)
    if version != VERSION:
        raise StoreError(f"{name}: expected a compressed user of format version {VERSION}, got {version}")
    if checksum != _checksum(value) or value.nbytes < header_bytes(count):
        raise StoreError(f"{name}: expected a whole compressed user, got a torn one of {value.nbytes} bytes")
    if made_by != model:
        raise StoreError(
            f"{name}: expected a user compressed by this model and policy ({model.hex()}), got one of another "
            f"({made_by.hex()})"
        )
    elements, at = _viewed(value[header_bytes(count) :]), 0
    tensors = []
    for number in range(count):
        code, ndim, *shape = _TENSOR.unpack_from(value, _HEADER.size + number * _TENSOR.size)
        dtype, shape = _DTYPES[code], shape[:ndim]
        size = math.prod(shape) * dtype.itemsize
        own = elements[at : at + size]
        tensors.append((own.clone() if at % dtype.itemsize else own).view(dtype).view(shape))
        at += size
    return UserRecord(cut, items, tuple(tensors))


def _checksum(value: memoryview | bytearray) -> int:
    view = memoryview(value)
    return zlib.crc32(view[_CHECKSUM.stop :], zlib.crc32(view[: _CHECKSUM.start]))


def _viewed(value: memoryview) -> Tensor:
    """Bytes as a tensor without a copy, unless they lie where no element of eight bytes may."""
    if value.nbytes == 0:
        return torch.empty(0, dtype=torch.uint8, device="cpu")
    array = np.frombuffer(value, np.uint8)
    if array.ctypes.data % 8:
        return torch.from_numpy(array.copy())
    # torch has no tensors that are read-only, and warns of arrays that are
    buffer = (ctypes.c_uint8 * array.size).from_address(array.ctypes.data)
    buffer.owner = array  # type: ignore[attr-defined]
    return torch.frombuffer(buffer, dtype=torch.uint8)


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
