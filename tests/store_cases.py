# SPDX-License-Identifier: Apache-2.0
"""What tests of the stores of compressed users share."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

import pytest

Opener = Callable[..., Any]

with_processes = pytest.mark.parametrize("kind", ["lmdb", "sqlite", "redis"], indirect=True)


def read(store: Any, *keys: bytes) -> list[bytes | None]:
    """Copies of values, None where there is none."""
    with store.reading(keys) as views:
        return [None if view is None else bytes(view) for view in views]


def in_child(work: Callable[[Callable[[bytes], None]], None]) -> tuple[int, int]:
    """Run in a forked process, which opens its own store; returns its number and where it says what it has done."""
    said, saying = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(said)
            work(lambda word: os.write(saying, word) and None)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    os.close(saying)
    return child, said


def rest_of(said: int) -> bytes:
    """All that comes, until the other end is closed."""
    words = b"".join(iter(lambda: os.read(said, 1 << 16), b""))
    os.close(said)
    return words


def ended(child: int, said: int) -> bytes:
    """What the child has said until its end."""
    words = rest_of(said)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    return words
