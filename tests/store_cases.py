# SPDX-License-Identifier: Apache-2.0
"""What tests of the stores of compressed users share."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Opener = Callable[..., Any]

with_processes = pytest.mark.parametrize("kind", ["lmdb", "sqlite", "redis"], indirect=True)


def read(store: Any, *keys: bytes) -> list[bytes | None]:
    """Copies of values, None where there is none."""
    with store.reading(keys) as views:
        return [None if view is None else bytes(view) for view in views]


class RedisServer:
    """A server on a free port of the loopback, which may be killed and started again over the same folder."""

    def __init__(self, folder: Path, *options: str) -> None:
        pytest.importorskip("redis", reason="the package redis is not installed")
        program = shutil.which("redis-server")
        if program is None:
            pytest.skip("redis-server is not installed")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self._port}/0"
        self._command = [program, "--port", str(self._port), "--bind", "127.0.0.1", "--save", ""]
        self._command += ["--dir", str(folder), *options]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)
        for _ in range(600):
            with socket.socket() as trial:
                if trial.connect_ex(("127.0.0.1", self._port)) == 0:
                    return
            assert self._process.poll() is None, "redis-server did not start"
            time.sleep(0.05)
        raise AssertionError("redis-server does not answer")

    def end(self, with_signal: int = signal.SIGTERM) -> None:
        assert self._process is not None
        self._process.send_signal(with_signal)
        self._process.wait()


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
