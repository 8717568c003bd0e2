# SPDX-License-Identifier: Apache-2.0
r"""The HTTP server on loopback: how fast, how late, and whether anybody gets somebody else's list.

    python bench/bench_serving.py                                  # minutes
    python bench/bench_serving.py --parts mixed --seconds 600      # ten minutes of everything at once
    python bench/bench_serving.py --output bench/results/serving.csv
    python bench/bench_serving.py --users 8 --requests 16 --rounds 1 --clients 1 4 --seconds 2    # does it run at all

"throughput": so many clients send requests of one user each, the next as soon as the answer is there. "batched" is the
server as it is; "one at a time" the same with ``--max_batch 1``; either takes all cores, or OMP_NUM_THREADS of them.
Both run all the time and are loaded in turns; ratios are taken within a turn, of time and of what the server's process
computed, which other work on the machine does not change much. "titles" is a beam search with 20 hypotheses, "items"
the item head of the same model, with "prompts kept" for users whose history the server has seen before (``--cache``),
"item ids" an `ItemModel`.

"mixed": --seconds of clients who do anything: ask for one user or several, in every way, search titles, read metrics,
send what is malformed, hang up in the middle; model and catalogue are read again now and then. The server must answer
each as it should, and its memory must not grow: "growth" compares the last third with the second.

Every list is compared with that of `recommend` for the user alone, and before anything is timed it is seen that no
user's list would pass as another's.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # an installed patchkern comes first

import patchkern as pk
from bench import output
from bench.serving_client import Connection, Load, load, metric, request, server
from bench.timing import Table
from bench.training_providers import make_model
from bench.workloads import Workload, ml1m

PARTS = ("throughput", "mixed")
K, SPARE = 10, 16
TOLERANCE = 1e-3
PATH = "/v1/recommend"
PROVIDERS = {"batched": (), "one at a time": ("--max_batch", "1")}


class Kind(NamedTuple):
    """A way of asking, and what `recommend` says to it for each user alone, some items more than are asked for."""

    search: str
    named: bool
    expected: list[dict[Any, float]]

    def body(self, history: Sequence[Any], user: int) -> bytes:
        """A request."""
        asked = {"history": list(history), "k": K, "search": self.search, "exclude_seen": True}
        return json.dumps(asked | ({"user_id": user} if self.named else {})).encode()

    def is_right(self, answer: dict[str, Any], user: int) -> bool:
        """Whether a list is the user's: of equal scores but for rounding, any item will do."""
        expected = self.expected[user]
        best = sorted(expected.values(), reverse=True)[:K]
        found = [(item["item"], item["score"]) for item in answer["items"]]
        return len(found) == len(best) and all(
            abs(score - rank) <= TOLERANCE and abs(score - expected.get(item, np.inf)) <= TOLERANCE
            for (item, score), rank in zip(found, best, strict=True)
        )


def make_models(workload: Workload, args: argparse.Namespace) -> dict[str, Any]:
    """Random weights that tell users apart."""
    language = pk.PatchedCausalLM(
        make_model(args.hidden_size, args.layers, args.vocab_size),
        workload.catalog,
        workload.prompt,
        pk.ItemPatches(5, args.max_items),
        item_head=True,
    )
    of_ids = pk.ItemModel(workload.catalog, pk.ItemPatches(0, args.max_items), width=args.hidden_size // 2)
    generator = torch.Generator().manual_seed(0)
    for model in (language, of_ids):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return {"language model": language.eval(), "item ids": of_ids.eval()}


def kinds_of(name: str, model: Any, histories: list[list[Any]]) -> dict[str, Kind]:
    """The ways of asking a model, by the names that the table has for them."""
    searches = {"titles": "beam", "items": "items"} if name == "language model" else {name: "items"}
    kinds = {}
    for mode, search in searches.items():
        options = {"k": K + SPARE, "num_beams": 20 + SPARE, "search": search, "exclude_seen": True, "short": "allow"}
        if search == "beam":  # whose list depends on its width
            options |= {"k": K, "num_beams": 20}
        alone = [dict(model.recommend([history], **options)[0]) for history in histories]
        kinds[mode] = Kind(search, False, alone)
    if name == "language model":
        kinds["items, prompts kept"] = kinds["items"]._replace(named=True)
    for mode, kind in kinds.items():
        for user, other in itertools.permutations(range(min(len(histories), 40)), 2):
            best = sorted(kind.expected[user].items(), key=lambda pair: -pair[1])[:K]
            as_answer = {"items": [{"item": item, "score": score} for item, score in best]}
            if not kind.is_right(as_answer, user) or (
                histories[user] != histories[other] and kind.is_right(as_answer, other)
            ):
                sys.exit(f"{mode}: the list of user {user} would pass as that of {other}; nothing was timed")
    return kinds


# ------------------------------------------------------------------ throughput


def throughput(
    table: Table, runs: dict[str, Path], kinds: dict[str, dict[str, Kind]], histories: Any, args: Any
) -> None:
    for name, run in runs.items():
        cache = ("--cache", args.cache) if name == "language model" else ()
        with (
            server(run, *cache, *PROVIDERS["batched"]) as (batched, _),
            server(run, *cache, *PROVIDERS["one at a time"]) as (alone, _),
        ):
            ports = {"batched": batched, "one at a time": alone}
            for mode, kind in kinds[name].items():
                users = [number % len(histories) for number in range(args.requests)]
                bodies = [kind.body(histories[user], user) for user in users]
                for clients in args.clients:
                    measure(table, ports, mode, kind, users, bodies, clients, args)
                table.write()


def measure(
    table: Table,
    ports: dict[str, int],
    mode: str,
    kind: Kind,
    users: list[int],
    bodies: list[bytes],
    clients: int,
    args: argparse.Namespace,
) -> None:
    loads: dict[str, list[Load]] = {name: [] for name in ports}
    for port in ports.values():
        check(load(port, PATH, bodies, clients), mode, kind, users)  # warms up
    for round_number in range(args.rounds):
        for name in sorted(ports, reverse=bool(round_number % 2)):
            loads[name].append(load(ports[name], PATH, bodies, clients))
            check(loads[name][-1], mode, kind, users)
    config = {"data": args.data, "items": args.n_items, "users": args.users, "requests": len(bodies), "k": K}
    config |= {name: getattr(args, name) for name in ("hidden_size", "layers", "vocab_size", "max_items")}
    config |= {"threads_of_server": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))}
    for name, of_rounds in loads.items():
        speed = np.array([len(bodies) / one.total for one in of_rounds])
        add(table, name, f"{mode}, {clients} clients", "speed", "users/s", speed, config)
        cpu = np.array([1e3 * one.cpu / len(bodies) for one in of_rounds])
        add(table, name, f"{mode}, {clients} clients", "CPU time", "ms/user", cpu, config)
        together = np.array([len(bodies) / one.batches for one in of_rounds])
        add(table, name, f"{mode}, {clients} clients", "users in a batch", "users", together, config)
        for share in (50, 95):
            late = np.array([1e3 * np.percentile(one.seconds, share) for one in of_rounds])
            add(table, name, f"{mode}, {clients} clients", f"p{share} of latency", "ms", late, config)
    pairs = list(zip(*loads.values(), strict=True))
    speed_up = np.array([alone.total / batched.total for batched, alone in pairs])
    add(table, "batched", f"{mode}, {clients} clients", "speed-up over one at a time", "x", speed_up, config)
    saved = np.array([alone.cpu / batched.cpu for batched, alone in pairs])
    add(table, "batched", f"{mode}, {clients} clients", "CPU time saved over one at a time", "x", saved, config)


def add(table: Table, provider: str, mode: str, metric: str, unit: str, values: Any, config: dict[str, Any]) -> None:
    p20, p50, p80 = (float(value) for value in np.quantile(values, (0.2, 0.5, 0.8)))
    table.add(provider, mode, metric, unit, (p20, p50, p80), config)


def check(seen: Load, mode: str, kind: Kind, users: list[int]) -> None:
    for user, (status, content) in zip(users, seen.answers, strict=True):
        if status != 200 or not kind.is_right(json.loads(content), user):
            sys.exit(f"{mode}: user {user} got {status} {content[:300]!r} in place of a list of its own")


# ------------------------------------------------------------------ everything at once


MALFORMED: list[tuple[bytes, int]] = [
    (b"", 422),
    (b"{", 422),
    (b"[" * 5000, 400),
    (b'{"history": ["\xff"]}', 400),
    (b'{"history": [1e400]}', 422),
    (b'{"history": ["a"]}', 422),
    (b'{"history": [-1]}', 422),
    (b'{"history": [1], "k": 0}', 422),
    (b'{"history": [1], "k": 1000000}', 422),
    (b'{"history": [1], "search": "all"}', 422),
    (b'{"history": [1], "wishes": 3}', 422),
    (b'{"titles": ["no such title at all"]}', 422),
    (b'{"history": [' + b"9" * 4900 + b"]}", 400),
    (b'{"history": [' + b"1," * 20000 + b"1]}", 422),
    (b" " * (1 << 21), 413),
]


class WrongAnswer(Exception):
    """What the server said in place of what it should have."""


class Mixed:
    """Clients who do anything, and what came of it."""

    def __init__(
        self, port: int, kinds: dict[str, Kind], histories: list[list[Any]], token: str, seconds: float
    ) -> None:
        self._port, self._kinds, self._histories, self._token = port, list(kinds.values()), histories, token
        self._end = time.monotonic() + seconds
        self.counts = {"lists": 0, "refused": 0, "hung up": 0, "other": 0, "reloads": 0}
        self.memory: list[float] = []  # MiB, over time

    async def run(self, clients: int, reloads: int, seconds: float) -> None:
        await asyncio.gather(
            *(self._client(random.Random(number)) for number in range(clients)),
            self._watch(seconds / 200),
            self._reload(reloads, seconds / (reloads + 1)),
        )

    async def _client(self, draw: random.Random) -> None:
        doings: list[Callable[[Connection, random.Random], Awaitable[None]]] = [self._one, self._several, self._other]
        doings += [self._malformed, self._hang_up]
        connection = Connection(self._port)
        while time.monotonic() < self._end:
            (doing,) = draw.choices(doings, (60, 8, 8, 16, 8))
            await doing(connection, draw)
        connection.close()

    async def _one(self, connection: Connection, draw: random.Random) -> None:
        kind, user = draw.choice(self._kinds), draw.randrange(len(self._histories))
        status, content = await connection.ask(PATH, kind.body(self._histories[user], user))
        self._check(status, content, kind, [user], lambda answer: [answer])

    async def _several(self, connection: Connection, draw: random.Random) -> None:
        kind = draw.choice(self._kinds)
        users = [draw.randrange(len(self._histories)) for _ in range(draw.randint(1, 12))]
        body = b'{"users": [%s]}' % b",".join(kind.body(self._histories[user], user) for user in users)
        status, content = await connection.ask(f"{PATH}:batch", body)
        self._check(status, content, kind, users, lambda answer: answer["users"])

    def _check(
        self, status: int, content: bytes, kind: Kind, users: list[int], lists: Callable[[Any], list[Any]]
    ) -> None:
        if status != 200:
            raise WrongAnswer(f"users {users} got {status} {content[:300]!r}")
        for user, answer in zip(users, lists(json.loads(content)), strict=True):
            if not kind.is_right(answer, user):
                raise WrongAnswer(f"user {user} got {answer} in place of a list of its own")
        self.counts["lists"] += len(users)

    async def _malformed(self, connection: Connection, draw: random.Random) -> None:
        body, expected = draw.choice(MALFORMED)
        try:
            status, content = await connection.ask(PATH, body)
        except (ConnectionError, asyncio.IncompleteReadError):
            if expected != 413:  # the server need not read to the end what is too long
                raise
            connection.close()
        else:
            if status != expected or not json.loads(content)["detail"][0]["msg"]:
                raise WrongAnswer(f"expected {expected} for {body[:60]!r}, got {status} {content[:300]!r}")
        self.counts["refused"] += 1

    async def _hang_up(self, connection: Connection, draw: random.Random) -> None:
        user = draw.randrange(len(self._histories))
        content = request(PATH, draw.choice(self._kinds).body(self._histories[user], user))
        await connection.send(content[: draw.choice((10, len(content) // 2, len(content)))])
        self.counts["hung up"] += 1

    async def _other(self, connection: Connection, draw: random.Random) -> None:
        path, expected = draw.choice(
            [
                ("/", 200),
                ("/v1/items?query=the", 200),
                ("/v1/model", 200),
                ("/ready", 200),
                ("/nowhere", 404),
                (PATH, 405),
            ]
        )
        status, _ = await connection.ask(path)
        if status != expected:
            raise WrongAnswer(f"expected {expected} for {path}, got {status}")
        self.counts["other"] += 1

    async def _reload(self, count: int, pause: float) -> None:
        connection = Connection(self._port)
        for _ in range(count):
            await asyncio.sleep(pause)
            status, content = await connection.ask("/admin/reload", b"{}", f"Authorization: Bearer {self._token}")
            if status != 200:
                raise WrongAnswer(f"not reloaded: {status} {content!r}")
            self.counts["reloads"] += 1
            connection.close()  # the server would not keep it until the next

    async def _watch(self, pause: float) -> None:
        connection = Connection(self._port)
        while time.monotonic() < self._end:
            self.memory.append(await metric(connection, "process_resident_memory_bytes") / 2**20)
            await asyncio.sleep(pause)
        connection.close()


def mixed(table: Table, runs: dict[str, Path], kinds: dict[str, dict[str, Kind]], histories: Any, args: Any) -> None:
    token = "the token of a benchmark"
    secret = runs["language model"].parent / "token"
    secret.write_text(token)
    options = ("--cache", args.cache, "--admin_token_file", str(secret), "--memory_budget", "1GiB")
    with server(runs["language model"], *options) as (port, process):
        clients = Mixed(port, kinds["language model"], histories, token, args.seconds)
        try:
            asyncio.run(clients.run(args.mixed_clients, args.reloads, args.seconds))
        except WrongAnswer as error:
            sys.exit(f"mixed: {error}")
        if process.poll() is not None:
            sys.exit(f"mixed: the server ended with {process.returncode}")
    config = {"seconds": args.seconds, "clients": args.mixed_clients, "cache": args.cache}
    for name, count in clients.counts.items():
        add(table, "server", "mixed", name, "requests" if name != "lists" else "users", [count], config)
    memory = np.array(clients.memory)
    second, last = np.array_split(memory, 3)[1:]
    add(table, "server", "mixed", "resident memory", "MiB", memory, config)
    add(table, "server", "mixed", "growth, last third over second", "x", [np.median(last) / np.median(second)], config)
    table.write()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--users", type=int, default=128, help="histories that are asked for")
    parser.add_argument("--requests", type=int, default=256, help="of one load")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=150.0, help="of the part mixed")
    parser.add_argument("--mixed_clients", type=int, default=16)
    parser.add_argument("--reloads", type=int, default=4, help="of model and catalogue, in the part mixed")
    parser.add_argument("--cache", default="64MiB", help="of the language model's servers, for prompts")
    parser.add_argument("--max_items", type=int, default=50, help="of a history")
    parser.add_argument("--vocab_size", type=int, default=4096, help="of a tokenizer fitted to the titles")
    parser.add_argument("--hidden_size", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    output.add_option(parser, "serving.csv")
    args = parser.parse_args(argv)
    table = Table(output.prepare(args.output, "serving.csv"))
    torch.set_num_threads(1)
    workload = ml1m(args.vocab_size)
    args.data, args.n_items = workload.name, len(workload.catalog)
    samples, _ = workload.samples(args.users)
    histories = [history.tolist() for history in samples.latest(args.max_items)]
    with tempfile.TemporaryDirectory() as folder:
        runs, kinds = {}, {}
        for name, model in make_models(workload, args).items():
            runs[name] = Path(folder) / name.replace(" ", "-")
            model.save_pretrained(runs[name])
            kinds[name] = kinds_of(name, model, histories)
        for part in args.parts:
            {"throughput": throughput, "mixed": mixed}[part](table, runs, kinds, histories, args)


if __name__ == "__main__":
    main()
