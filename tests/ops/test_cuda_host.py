# SPDX-License-Identifier: Apache-2.0
"""The runtime that stands in for CUDA's on the CPU: it finds divergent warps and blocks."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import pytest
from cuda_cases import SHIM, kept_for_host


@pytest.fixture(scope="session")
def faults() -> Callable[[int, int, Any], bytes]:
    launch = ctypes.CDLL(str(kept_for_host("faults", SHIM / "faults.cu"))).launch
    launch.restype = ctypes.c_char_p
    return launch  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (0, "divergent warp: thread 0 at __ballot_sync, line 11, thread 5 at __shfl_sync, line 13"),
        (1, "divergent warp: thread 32 at __shfl_up_sync, line 19, thread 40 at its end"),
        (2, "divergent block: thread 0 at __syncthreads, line 24, thread 32 at __syncthreads, line 26"),
        (3, "divergent block: thread 0 at its end, thread 32 at __syncthreads, line 32"),
    ],
)
def test_host_runtime_detects_divergence(faults: Callable[..., bytes], kernel: int, message: str) -> None:
    assert faults(kernel, 64, None).decode() == message
    out = (ctypes.c_int * 64)()
    assert faults(4, 64, out) == b"no error"  # and goes on working
    assert list(out) == [(i + 1) % 64 + 100 * (i - (i % 32 != 0)) for i in range(64)]


def test_host_runtime_refuses_impossible_launches(faults: Callable[..., bytes]) -> None:
    for threads in (0, 31, 1025, 2048):
        assert faults(4, threads, None) == b"invalid configuration argument"
