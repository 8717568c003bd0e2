# SPDX-License-Identifier: Apache-2.0
"""Compressed users as bytes: what is read is what was written, or an error."""

from __future__ import annotations

import struct
import warnings

import pytest
import torch

from patchkern.serving.records import UserRecord, header_bytes, pack, record_bytes, unpack
from patchkern.serving.stores import StoreError

MODEL, ITEMS = b"a model's identi", b"hash of the past"


def a_record() -> UserRecord:
    strided = torch.randn(4, 6)[:, ::2]
    tensors = (torch.randn(3, 2, 4), torch.randn(5).bfloat16(), torch.zeros(0, 7), torch.tensor(2.5).half(), strided)
    return UserRecord(1 << 40, ITEMS, (*tensors, torch.randn(1, 1, 2, 1, 3, dtype=torch.float64)))


def test_what_is_packed_is_unpacked_bit_for_bit_without_a_copy() -> None:
    record = a_record()
    value = pack(record, MODEL)
    assert len(value) == record_bytes(record.tensors)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read = unpack(memoryview(bytes(value)), MODEL, "user 'ada'")
    assert (read.cut, read.items) == (1 << 40, ITEMS)
    for tensor, original in zip(read.tensors, record.tensors, strict=True):
        assert tensor.dtype == original.dtype and tensor.shape == original.shape and torch.equal(tensor, original)
    shared = unpack(memoryview(value), MODEL, "user 'ada'").tensors[0]
    struct.pack_into("<f", value, header_bytes(6), 42.0)
    assert shared[0, 0, 0] == 42 and shared.numel() == 24
    del value  # the tensors keep their bytes
    assert shared[0, 0, 0] == 42


def test_bytes_are_the_formula_and_a_fixed_header() -> None:
    """Llama-3.2-1B: 16 layers, 8 key-value heads of 64, 4 rows in bfloat16; and no tensors at all."""
    layers = [torch.zeros(2, 8, 4, 64, dtype=torch.bfloat16) for _ in range(16)]
    assert record_bytes(layers) == 131_072 + header_bytes(16) and header_bytes(16) == 448
    assert record_bytes([torch.zeros(4, 64)]) == 1024 + header_bytes(1) and header_bytes(1) == 128
    empty = pack(UserRecord(0, ITEMS, ()), MODEL)
    assert len(empty) == header_bytes(0) == 64 and unpack(memoryview(empty), MODEL, "user 'ada'").tensors == ()


def test_values_that_lie_oddly_are_copied() -> None:
    record = a_record()
    shifted = memoryview(bytearray(3) + pack(record, MODEL))[3:]
    for tensor, original in zip(unpack(shifted, MODEL, "user 'ada'").tensors, record.tensors, strict=True):
        assert torch.equal(tensor, original) and tensor.data_ptr() % tensor.element_size() == 0


def test_every_changed_or_missing_byte_is_noticed() -> None:
    value = pack(UserRecord(7, ITEMS, (torch.randn(3, 5), torch.randn(2))), MODEL)
    for at in range(len(value)):
        changed = bytearray(value)
        changed[at] ^= 1 << (at % 8)
        with pytest.raises(StoreError, match="user 'ada': expected a"):
            unpack(memoryview(changed), MODEL, "user 'ada'")
    for size in range(len(value)):
        with pytest.raises(StoreError, match="user 'ada': expected a"):
            unpack(memoryview(value)[:size], MODEL, "user 'ada'")
    with pytest.raises(StoreError, match="expected a whole compressed user, got a torn one of 197 bytes"):
        unpack(memoryview(value + b"\0"), MODEL, "user 'ada'")


def test_what_is_of_another_kind_version_or_model_is_said() -> None:
    value = pack(UserRecord(7, ITEMS, ()), MODEL)
    with pytest.raises(StoreError, match=r"'ada': expected a user compressed by this model and policy .* of another"):
        unpack(memoryview(value), bytes(16), "user 'ada'")
    struct.pack_into("<H", value, 4, 9)
    with pytest.raises(StoreError, match="user 'ada': expected a compressed user of format version 1, got 9"):
        unpack(memoryview(value), MODEL, "user 'ada'")
    for other in (b"", b"x" * 10, b"x" * 100):
        with pytest.raises(StoreError, match=f"expected a compressed user, got {len(other)} bytes of something else"):
            unpack(memoryview(other), MODEL, "user 'ada'")


def test_what_cannot_be_packed() -> None:
    with pytest.raises(TypeError, match=r"record.tensors\[1\]: expected float32, bfloat16, .*, got torch.int64"):
        pack(UserRecord(0, ITEMS, (torch.zeros(1), torch.zeros(1, dtype=torch.int64))), MODEL)
    with pytest.raises(ValueError, match=r"record.tensors\[0\]: expected at most 5 dimensions, got 6"):
        pack(UserRecord(0, ITEMS, (torch.zeros(6 * [1]),)), MODEL)
    with pytest.raises(ValueError, match=r"record.items: expected 16 bytes, got 1"):
        pack(UserRecord(0, b"x", ()), MODEL)
    with pytest.raises(ValueError, match="model: expected 16 bytes, got 5"):
        pack(UserRecord(0, ITEMS, ()), b"model")
    with pytest.raises(ValueError, match=r"record.cut: expected a number of items, got -1"):
        pack(UserRecord(-1, ITEMS, ()), MODEL)
