# SPDX-License-Identifier: Apache-2.0
"""Servers in processes of their own, and clients for them that cost next to nothing beside what they measure."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

HOST = "127.0.0.1"
_STARTED = 180  # seconds until a server must listen


@contextmanager
def server(run: Path, *options: str) -> Iterator[tuple[int, subprocess.Popen[str]]]:
    """``python -m patchkern.serving serve`` on a port of its own; ended by SIGTERM, and must then end well."""
    command = [sys.executable, "-m", "patchkern.serving", "serve", str(run), "--port", "0", *options]
    paths = [str(Path(__file__).resolve().parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    said: list[str] = []
    reader = threading.Thread(target=lambda: said.extend(process.stderr or ()), daemon=True)
    reader.start()
    try:
        end = time.monotonic() + _STARTED
        while not (found := re.search(r"running on http://[\d.]+:(\d+)", "".join(said))):
            if process.poll() is not None or time.monotonic() > end:
                sys.exit(f"the server did not start: {''.join(said)}")
            time.sleep(0.05)
        yield int(found[1]), process
        process.terminate()
        if process.wait(60):
            sys.exit(f"the server ended with {process.returncode}: {''.join(said[-20:])}")
    finally:
        process.kill()
        process.wait()
        reader.join(5)


class Connection:
    """One client, whose connection stays open between requests."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, path: str, body: bytes | None = None, *headers: str) -> tuple[int, bytes]:
        """Status and body of an answer; a request without a body is a GET."""
        reader, writer = await self._open()
        writer.write(request(path, body, *headers))
        await writer.drain()
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        length = re.search(r"^content-length: (\d+)", head, re.MULTILINE)
        if length is None:
            raise ValueError(f"expected an answer of a known length, got {head}")
        content = await reader.readexactly(int(length[1]))
        if "connection: close" in head:
            self.close()
        return int(head.split()[1]), content

    async def send(self, content: bytes) -> None:
        """Some bytes, whatever they are, and then nothing: the connection is closed."""
        _, writer = await self._open()
        writer.write(content)
        await writer.drain()
        self.close()

    def close(self) -> None:
        """Until the next request."""
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None

    async def _open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._streams is None:
            self._streams = await asyncio.open_connection(HOST, self._port, limit=1 << 22)
        return self._streams


def request(path: str, body: bytes | None = None, *headers: str) -> bytes:
    """What a client sends."""
    lines = [f"{'GET' if body is None else 'POST'} {path} HTTP/1.1", f"Host: {HOST}", *headers]
    if body is not None:
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, "", ""]).encode() + (body or b"")


class Load(NamedTuple):
    """What clients saw.

    Attributes:
        seconds: of every request.
        answers: status and body of every request, in their order.
        total: seconds from the first request to the last answer.
        cpu: seconds that the server's process computed for them.
        batches: calls of the model.
    """

    seconds: list[float]
    answers: list[tuple[int, bytes]]
    total: float
    cpu: float
    batches: int


def load(port: int, path: str, bodies: Sequence[bytes], clients: int) -> Load:
    """Each of so many clients sends the next of ``bodies`` as soon as it has its answer, until all are sent."""
    return asyncio.run(_load(port, path, bodies, clients))


async def _load(port: int, path: str, bodies: Sequence[bytes], clients: int) -> Load:
    seconds = [0.0] * len(bodies)
    answers: list[tuple[int, bytes]] = [(0, b"")] * len(bodies)
    waiting = iter(range(len(bodies)))

    async def client() -> None:
        connection = Connection(port)
        for number in waiting:
            start = time.perf_counter()
            answers[number] = await connection.ask(path, bodies[number])
            seconds[number] = time.perf_counter() - start
        connection.close()

    watcher = Connection(port)
    names = ("process_cpu_seconds_total", "patchkern_batch_users_count")
    before = [await metric(watcher, name) for name in names]
    start = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    total = time.perf_counter() - start
    watcher.close()  # the server may have
    cpu, batches = [await metric(watcher, name) - was for name, was in zip(names, before, strict=True)]
    watcher.close()
    return Load(seconds, answers, total, cpu, int(batches))


async def metric(connection: Connection, name: str) -> float:
    """What the server's metrics say of its process, which they do on Linux."""
    _, content = await connection.ask("/metrics")
    found = re.search(rf"^{name} (\S+)", content.decode(), re.MULTILINE)
    if found is None:
        sys.exit(f"the server's metrics say nothing of {name}")
    return float(found[1])
