# SPDX-License-Identifier: Apache-2.0
r"""Users kept compressed: what the stores take and give, and what one more event costs.

    python bench/bench_user_states.py                                      # minutes; 2,000 users
    python bench/bench_user_states.py --parts stores --users 100000        # 900 MB on the disk for each store
    python bench/bench_user_states.py --output bench/results/user-states.csv
    python bench/bench_user_states.py --users 50 --seconds 0               # does it run at all

"stores": --users values of --layers x 2 x --width x --experts numbers in float32, a small model's, are put in
transactions of --batch and read back by as many, in an order of its own. "put" is on the disk when it ends, where there
is one; "get" is a header checked, the checksum too, and tensors that can be read; "get, copied" has them copied, as a
search does. The bytes of a user are those of the file, beside the formula's. A Redis server is started for the run
where redis-server is installed, without a file of its own.

Before any time is printed, every value must be read back bit for bit.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # an installed patchkern comes first

from bench import output
from bench.timing import Table, measure
from patchkern.serving.records import UserRecord, header_bytes, pack, record_bytes, unpack
from patchkern.serving.stores import LmdbStore, MemoryStore, RedisStore, SqliteStore, UserStore

PARTS = ("stores",)
MODEL = bytes(16)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--users", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=64, help="users of one transaction")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=128, help="key-value heads times their width")
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=3.0, help="of reading, for each store")
    parser.add_argument("--folder", type=Path, help="where the files are written (default: a temporary folder)")
    output.add_option(parser, "user-states.csv")
    args = parser.parse_args(argv)
    table = Table(output.prepare(args.output, "user-states.csv"))
    for part in args.parts:
        {"stores": stores}[part](table, args)
        table.write()


# ------------------------------------------------------------------ stores


def stores(table: Table, args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(dir=args.folder) as folder, redis_server(Path(folder)) as url:
        for name, store in opened(Path(folder), url):
            with contextlib.closing(store):
                one_store(table, name, store, args)


def one_store(table: Table, name: str, store: UserStore, args: argparse.Namespace) -> None:
    keys = [f"user {number}".encode() for number in range(args.users)]
    batches = [range(first, min(first + args.batch, args.users)) for first in range(0, args.users, args.batch)]
    rates = []
    for batch in batches:
        values = {keys[user]: pack(record(user, args), MODEL) for user in batch}
        before = time.perf_counter()
        store.put(values)
        rates.append(len(batch) / (time.perf_counter() - before))
    for batch in batches:
        with store.reading([keys[user] for user in batch]) as found:
            for user, value in zip(batch, found, strict=True):
                check(value, record(user, args), f"{name}: user {user}")
    formula = args.layers * 2 * args.width * args.experts * torch.float32.itemsize
    stored = record_bytes(record(0, args).tensors)
    if stored != formula + header_bytes(2 * args.layers):
        sys.exit(f"{name}: wrong size: expected {formula} bytes and a header, got {stored}; nothing was timed")
    config = {part: getattr(args, part) for part in ("users", "batch", "layers", "width", "experts")}
    config |= {"bytes_of_formula": formula, "bytes_of_header": stored - formula}
    table.add(name, "put", "speed", "users/s", quantiles(rates), config)
    table.add(name, "put", "bytes per user", "B", 3 * (stored,), config)
    path = getattr(store, "path", None)
    if path is not None:
        size = sum(file.stat().st_blocks * 512 for file in path.parent.glob(f"{path.name}*")) / args.users
        table.add(name, "put", "bytes per user on the disk", "B", 3 * (size,), config)
    order = np.random.default_rng(0).permutation(args.users)
    groups = [[keys[user] for user in order[list(batch)]] for batch in batches]
    for mode, copied in (("get", False), ("get, copied", True)):
        calls: dict[str, Callable[[], object]] = {mode: partial(read, store, iter_again(groups), copied)}
        seconds = measure(calls, args.seconds / 2, max_rounds=100_000).seconds[mode]
        table.add(name, mode, "speed", "users/s", quantiles(len(groups[0]) / seconds), config)


def record(user: int, args: argparse.Namespace) -> UserRecord:
    generator = torch.Generator().manual_seed(user)
    numbers = torch.randn(2 * args.layers, args.experts, args.width, generator=generator)
    return UserRecord(50, user.to_bytes(16, "little"), tuple(numbers))


def check(value: memoryview | None, expected: UserRecord, name: str) -> None:
    found = None if value is None else unpack(value, MODEL, name)
    if found is None or found[:2] != expected[:2] or not all(map(torch.equal, found.tensors, expected.tensors)):
        sys.exit(f"{name}: wrong result: not what was put; nothing was timed")


def read(store: UserStore, groups: Iterator[list[bytes]], copied: bool) -> int:
    keys, elements = next(groups), 0
    with store.reading(keys) as values:
        for key, value in zip(keys, values, strict=True):
            if value is not None:
                tensors = unpack(value, MODEL, repr(key)).tensors
                elements += sum(tensor.numel() for tensor in tensors)
                if copied:
                    torch.cat(tensors)
    return elements


def iter_again(groups: list[list[bytes]]) -> Iterator[list[bytes]]:
    """Whole groups, one after the other, without an end."""
    whole = [group for group in groups if len(group) == len(groups[0])]
    while True:
        yield from whole


def opened(folder: Path, url: str | None) -> Iterator[tuple[str, UserStore]]:
    yield "memory", MemoryStore()
    try:
        yield "lmdb", LmdbStore(folder / "users.lmdb")
    except ImportError as error:
        print(f"lmdb: left out: {error}")
    yield "sqlite", SqliteStore(folder / "users.sqlite")
    if url is not None:
        yield "redis", RedisStore(url)


@contextlib.contextmanager
def redis_server(folder: Path) -> Iterator[str | None]:
    """The address of a server that ends with the run, None where there is none to start."""
    try:
        import redis  # noqa: F401
    except ImportError as error:
        print(f"redis: left out: {error}")
        yield None
        return
    if (program := shutil.which("redis-server")) is None:
        print("redis: left out: redis-server is not installed")
        yield None
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]
    server = subprocess.Popen([program, *options], stdout=subprocess.DEVNULL)
    try:
        while not answers(port):
            if server.poll() is not None:
                sys.exit(f"redis-server ended with status {server.returncode}")
            time.sleep(0.05)
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        server.terminate()
        server.wait()


def answers(port: int) -> bool:
    with socket.socket() as trial:
        return trial.connect_ex(("127.0.0.1", port)) == 0


def quantiles(rates: Any) -> tuple[float, float, float]:
    p20, p50, p80 = np.quantile(rates, (0.2, 0.5, 0.8))
    return float(p20), float(p50), float(p80)


if __name__ == "__main__":
    main()
