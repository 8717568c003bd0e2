# SPDX-License-Identifier: Apache-2.0
r"""Users kept compressed: what the stores take and give, and what one more event costs.

    python bench/bench_user_states.py                                      # minutes; 2,000 users
    python bench/bench_user_states.py --parts stores --users 100000        # 900 MB on the disk for each store
    python bench/bench_user_states.py --output bench/results/user-states.csv
    python bench/bench_user_states.py --users 50 --seconds 0 --items 130 --events 5 --together 3   # does it run at all

"stores": --users values of --layers x 2 x --width x --experts numbers in float32, a small model's, are put in
transactions of --batch and read back by as many, in an order of its own. "put" is on the disk when it ends, where there
is one; "get" is a header checked, the checksum too, and tensors that can be read; "get, copied" has them copied, as a
search does. The bytes of a user are those of the file, beside the formula's. A Redis server is started for the run
where redis-server is installed, without a file of its own.

"events": one user of --items items has --events more, one after the other, under a language model with an item head.
"update" is ``UserStates.update``, which compresses only where a block of items is full; "anew" the same for a user who
is not kept. "list" is the user's 20 items behind what is kept, "list, anew" without it; both read the recent items,
which "list, cached" has in a `UserCache`; "update and list" is an event and then that. "whole history" has nothing
compressed: its list is computed anew, or, "whole history, cached", with a `UserCache`, after the same events as the
others. Times are those of single events, and their mean, which has the blocks in it.

"together": --together users of --items items and up to a block more, each with one more event at a time: "update", and
the lists of all of them in one call.

Before any time is printed, every value must be read back bit for bit, and lists must be those without states.
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

import patchkern as pk
from bench import output
from bench.timing import Table, Timing, measure
from bench.training_providers import make_model
from bench.workloads import Workload, ml1m
from patchkern.serving.records import UserRecord, header_bytes, pack, record_bytes, unpack
from patchkern.serving.stores import LmdbStore, MemoryStore, RedisStore, SqliteStore, UserStore

PARTS = ("stores", "events", "together")
K = 20
BLOCK = 50
WHOLE, WHOLE_CACHED = "whole history", "whole history, cached"
MODEL = bytes(16)
SPEED_UPS = (
    ("anew", "update"),
    ("list, anew", "list"),
    ("list, anew", "list, cached"),
    ("list, anew", "update and list"),
    (WHOLE_CACHED, "list"),
    (WHOLE_CACHED, "list, cached"),
)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--users", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=64, help="users of one transaction")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=128, help="key-value heads times their width")
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--items", type=int, default=1000, help="of the user who has further events")
    parser.add_argument("--events", type=int, default=100)
    parser.add_argument("--together", type=int, default=64, help="users of one call")
    parser.add_argument("--hidden_size", type=int, default=256)
    parser.add_argument("--vocab_size", type=int, default=2048)
    parser.add_argument("--seconds", type=float, default=3.0, help="of reading, for each store")
    parser.add_argument("--folder", type=Path, help="where the files are written (default: a temporary folder)")
    output.add_option(parser, "user-states.csv")
    args = parser.parse_args(argv)
    table = Table(output.prepare(args.output, "user-states.csv"))
    for part in args.parts:
        {"stores": stores, "events": events, "together": together}[part](table, args)
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


# ------------------------------------------------------------------ events


def events(table: Table, args: argparse.Namespace) -> None:
    workload = ml1m(args.vocab_size)
    items = np.random.default_rng(0).choice(workload.catalog.item_ids, args.items + args.events)
    policies = policies_of(args)
    model = model_of(workload, policies[WHOLE], args)
    find = finder(model, ["ada"])
    for name, policy in policies.items():
        config = {part: getattr(args, part) for part in ("items", "events", "hidden_size", "layers", "experts")}
        config |= {"data": workload.name, "policy": str(policy)}
        cached = partial(find, user_cache=pk.UserCache(model, 1 << 28))
        if name == WHOLE:
            taken = whole_history(find, cached, items, args)
        else:
            states = pk.UserStates(model_of(workload, policy, args))
            taken = kept(states, cached, items, args, name)
            config["bytes_per_user"] = states.bytes_per_user
        add_times(table, name, taken, config)


def policies_of(args: argparse.Namespace) -> dict[str, Any]:
    patches = pk.ItemPatches(0, None)
    return {
        "experts, one": pk.Experts(patches, count=args.experts, keep=20, block=BLOCK),
        "experts, blocks": pk.Experts(patches, count=args.experts, block=BLOCK, parts="blocks"),
        "memory, overwrite": pk.PreferenceMemory(patches, slots=args.experts, block=BLOCK),
        "memory, append": pk.PreferenceMemory(patches, slots=args.experts, block=BLOCK, mode="append"),
        WHOLE: patches,
    }


def model_of(workload: Workload, policy: Any, args: argparse.Namespace) -> Any:
    prompt = workload.prompt.with_special(experts=range(args.vocab_size, args.vocab_size + args.experts))
    network = make_model(args.hidden_size, args.layers, args.vocab_size + args.experts)
    model = pk.PatchedCausalLM(network, workload.catalog, prompt, policy, item_head=True).eval()
    return pk.RecurrentMemory(model).eval() if isinstance(policy, pk.PreferenceMemory) else model


def finder(model: Any, users: list[str]) -> Callable[..., Any]:
    return partial(model.recommend, k=K, search="items", user_ids=users, batch_size=len(users))


def kept(
    states: pk.UserStates, whole: Callable[..., Any], items: Any, args: argparse.Namespace, name: str
) -> dict[str, list[float]]:
    """Seconds of every event, by what was done."""
    model = states.model
    anew, find = pk.UserStates(model), finder(model, ["ada"])
    cache, shuffle = pk.UserCache(model, 1 << 26), np.random.default_rng(0)
    modes = ("update", "anew", "list", "list, cached", "list, anew", WHOLE_CACHED)
    taken: dict[str, list[float]] = {mode: [] for mode in modes}
    states.update(["ada"], [items[: args.items - 1]])
    for length in range(args.items, args.items + args.events):
        history = [items[:length]]
        anew.delete(["ada"])
        calls: dict[str, Callable[[], Any]] = {
            "update": partial(states.update, ["ada"], history),
            "anew": partial(anew.update, ["ada"], history),
            "list": partial(find, history, user_states=states),
            "list, cached": partial(find, history, user_states=states, user_cache=cache),
            "list, anew": partial(find, history),
            WHOLE_CACHED: partial(whole, history),
        }
        results = {}
        for mode in ("update", *shuffle.permutation(modes[1:]).tolist()):
            before = time.perf_counter()
            results[mode] = calls[mode]()
            if length > args.items:  # the first one warms up
                taken[mode].append(time.perf_counter() - before)
        expected = dict(results["list, anew"][0])
        same = [alike(dict(results[mode][0]), expected) for mode in ("list", "list, cached")]
        if results["anew"].compressed != 1 or not all(same):
            sys.exit(f"{name}: wrong result: other lists than without states; nothing was timed")
    taken["update and list"] = [sum(both) for both in zip(taken["update"], taken["list, cached"], strict=True)]
    return taken


def whole_history(
    find: Callable[..., Any], cached: Callable[..., Any], items: Any, args: argparse.Namespace
) -> dict[str, list[float]]:
    taken: dict[str, list[float]] = {"list, cached": [], "list, anew": []}
    for length in range(args.items - 1, args.items + args.events):
        scores = []
        for mode, call in (("list, cached", cached), ("list, anew", find)):
            before = time.perf_counter()
            scores.append(dict(call([items[:length]])[0]))
            if length > args.items:
                taken[mode].append(time.perf_counter() - before)
        if not alike(*scores):
            sys.exit("whole history: wrong result: other lists than without a cache; nothing was timed")
    return taken


def together(table: Table, args: argparse.Namespace) -> None:
    workload, rng, shuffle = ml1m(args.vocab_size), np.random.default_rng(0), np.random.default_rng(1)
    users = [f"user {number}" for number in range(args.together)]
    begins = [args.items + number * BLOCK // len(users) for number in range(len(users))]
    items = [rng.choice(workload.catalog.item_ids, begin + args.events) for begin in begins]
    policies = policies_of(args)
    whole = model_of(workload, policies.pop(WHOLE), args)
    cached = partial(finder(whole, users), user_cache=pk.UserCache(whole, 1 << 30))
    for name, policy in policies.items():
        states = pk.UserStates(model_of(workload, policy, args))
        find = finder(states.model, users)
        calls = {
            "update": partial(states.update, users),
            "list": partial(find, user_states=states),
            "list, cached": partial(find, user_states=states, user_cache=pk.UserCache(states.model, 1 << 28)),
            WHOLE_CACHED: cached,
        }
        taken: dict[str, list[float]] = {mode: [] for mode in calls}
        for event in range(args.events):
            histories = [own[: begin + event] for own, begin in zip(items, begins, strict=True)]
            results = {}
            for mode in ("update", *shuffle.permutation(list(calls)[1:]).tolist()):
                before = time.perf_counter()
                results[mode] = calls[mode](histories)
                if event:  # the first one warms up
                    taken[mode].append(time.perf_counter() - before)
        some = min(2, len(users))  # without states, the rest takes minutes
        expected = find(histories[:some], user_ids=users[:some])
        for mode in ("list", "list, cached"):
            if not all(map(alike, map(dict, results[mode][:some]), map(dict, expected))):
                sys.exit(f"{name}: wrong result: other lists than without states; nothing was timed")
        config = {part: getattr(args, part) for part in ("items", "events", "together", "hidden_size", "layers")}
        config |= {"experts": args.experts, "data": workload.name, "policy": str(policy)}
        add_times(table, f"{name}, together", taken, config)


def add_times(table: Table, name: str, taken: dict[str, list[float]], config: dict[str, Any]) -> None:
    timing = Timing({mode: np.array(seconds) for mode, seconds in taken.items()})
    for mode, seconds in timing.seconds.items():
        table.add(name, mode, "time", "ms", quantiles(1e3 * seconds), config)
        table.add(name, mode, "mean time", "ms", 3 * (1e3 * float(seconds.mean()),), config)
    for slow, mode in SPEED_UPS:
        if {slow, mode} <= taken.keys():
            table.add(name, mode, f"speed-up over {slow}", "x", timing.ratio(slow, mode), config)
            mean = timing.seconds[slow].mean() / timing.seconds[mode].mean()
            table.add(name, mode, f"speed-up over {slow}, means", "x", 3 * (float(mean),), config)


def alike(found: dict[Any, float], expected: dict[Any, float]) -> bool:
    """The same scores but for rounding, which may exchange items whose scores are nearly the same."""
    if len(found) != K or not np.allclose(list(found.values()), list(expected.values()), atol=1e-4):
        return False
    return all(abs(found[item] - expected[item]) < 1e-4 for item in found.keys() & expected.keys())


def quantiles(rates: Any) -> tuple[float, float, float]:
    p20, p50, p80 = np.quantile(rates, (0.2, 0.5, 0.8))
    return float(p20), float(p50), float(p80)


if __name__ == "__main__":
    main()
