# SPDX-License-Identifier: Apache-2.0
r"""Planning past one machine: the tables of docs/scale.md, from measured rates and the laws that carry them on.

    python bench/scale.py                                     # of bench/results/scale.csv
    python bench/scale.py runs/bench/scale.csv --users 1e7 --items 1e6 --events 1000 --gpu_tflops 200

The rates are those of bench_scale.py, the largest size of each. What is carried on grows with the number of items,
events or users alone, which the two sizes of each show; the operations of a model are counted (`Shape.flops`). Nothing
here was measured on a GPU: its hours are operations by --gpu_tflops, an assumption.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

POLICIES = ("text", "items", "sessions of 5", "sessions of 20", "sessions of 20, no text")
PUBLISHED = Path(__file__).parent / "results/scale.csv"
INT32 = 2**31 - 1
GIB = 2**30
BFLOAT16 = 2
NARROW, TOGETHER = 128, 32  # width and users of bench_scale.py
VECTORS, KEEP, BLOCK = 4, 20, 50  # of `Experts` and `PreferenceMemory`, as they are where not given


@dataclass(frozen=True)
class Shape:
    """A causal language model of Llama's kind, without its embeddings, which rows are looked up or pooled from."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_width: int
    intermediate: int

    @property
    def parameters(self) -> int:
        """Of the layers' products."""
        attention = self.hidden * self.head_width * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    def flops(self, rows: float, stored: float = 0) -> float:
        """Operations of a forward pass over new rows of one user, each of which sees those before it and the stored."""
        seen = rows * (stored + rows / 2)
        return 2 * self.parameters * rows + 4 * seen * self.heads * self.head_width * self.layers

    def row_bytes(self) -> int:
        """Keys and values of a row, in bfloat16."""
        return 2 * self.layers * self.kv_heads * self.head_width * BFLOAT16


SMALL = Shape("SmolLM2-135M", layers=30, hidden=576, heads=9, kv_heads=3, head_width=64, intermediate=1536)
LARGE = Shape("Llama-3.2-1B", layers=16, hidden=2048, heads=32, kv_heads=8, head_width=64, intermediate=8192)


@dataclass(frozen=True)
class Plan:
    """What is asked for."""

    users: float = 1e8
    items: float = 1e7
    events: float = 1e4
    """of each user"""
    gpu_tflops: float = 400.0
    """a second; 40 % of what an H100 has in bfloat16"""
    gpu_gib: float = 80.0
    host_gib: float = 512.0


class Rates:
    """Medians of the measurements, by provider, mode and metric."""

    def __init__(self, path: Path) -> None:
        with path.open(newline="") as file:
            rows = {(row["provider"], row["mode"], row["metric"]): row for row in csv.DictReader(file)}
        self._rows = {name: float(row["p50"]) for name, row in rows.items()}
        self._config = {name: json.loads(row["config"]) for name, row in rows.items()}

    def __call__(self, provider: str, mode: str, metric: str) -> float:
        return self._rows[self._known(provider, mode, metric)]

    def config(self, provider: str, mode: str, metric: str, name: str) -> float:
        """What it was measured with."""
        return float(self._config[self._known(provider, mode, metric)][name])

    def _known(self, *name: str) -> tuple[str, str, str]:
        if name not in self._rows:
            raise ValueError(f"expected a row {', '.join(map(repr, name))}, found none; run all parts")
        provider, mode, metric = name
        return provider, mode, metric

    def measured(self, *providers: str) -> list[str]:
        """Those of some providers that were at hand."""
        known = {provider for provider, _, _ in self._rows}
        return [provider for provider in providers if provider in known]

    def sizes(self, provider: str, metric: str, after: str = "") -> list[int]:
        """The numbers that a provider's modes begin with, ascending; those of modes that end with ``after``."""
        found = {
            int(mode.split()[0]) for own, mode, what in self._rows if (own, what) == (provider, metric)
            if mode.endswith(after) and mode.split()[0].isdigit()
        }  # fmt: skip
        if not found:
            raise ValueError(f"expected rows of {provider!r}, found none; run all parts")
        return sorted(found)


# ------------------------------------------------------------------ the tables

Table = list[list[str]]


def items(rates: Rates, plan: Plan) -> Table:
    """What a catalogue takes."""
    small, large = (rates.sizes("catalogue", "time")[place] for place in (0, -1))
    title = f"{count(plan.items)} items"
    rows = [["", f"at {count(small)} items", f"at {count(large)}", f"{title}: one core", "memory kept", "at most"]]
    widths = {
        "catalogue": 1.0,
        "tree": 1.0,
        "item table": LARGE.hidden / NARROW,
        "head, its vectors": LARGE.hidden / NARROW,
    }
    for provider, wider in widths.items():
        times = [rates(provider, f"{size} items", "time") for size in (small, large)]
        kept, peak = (rates(provider, f"{large} items", metric) for metric in ("kept", "peak"))
        if provider == "catalogue":
            kept += rates(provider, f"{large} items", "titles as text")
        name = provider if wider == 1 else f"{provider}, width {LARGE.hidden:,}"
        rows.append([
            name,
            *(f"{time:.3g} µs an item" for time in times),
            duration(times[1] * wider * plan.items / 1e6),
            size_of(kept * wider * plan.items),
            size_of(peak * wider * plan.items),
        ])  # fmt: skip
    return rows


def scoring(rates: Rates, plan: Plan) -> Table:
    """All items scored by the item head."""
    rows = [["items", "width", "users at once", "time of a user", "GF/s of one core", "memory of a user"]]
    for size in rates.sizes("head", "time", " users"):
        for users in (1, TOGETHER):
            mode = f"{size} items, {users} users"
            time, peak = rates("head", mode, "time") / 1e6, rates("head", mode, "peak") * size
            speed = 2 * size * NARROW / time / 1e9
            rows.append([f"{size:,}", str(NARROW), str(users), duration(time), f"{speed:.3g}", size_of(peak)])
    operations = 2 * plan.items * LARGE.hidden
    peak = rates("head", mode, "peak") * plan.items
    core = operations / (speed * 1e9)
    rows.append([f"{plan.items:,.0f}", f"{LARGE.hidden:,}", "many", duration(core), f"{speed:.3g}", size_of(peak)])
    gpu = operations / (plan.gpu_tflops * 1e12)
    rows.append([f"{plan.items:,.0f}, GPU", f"{LARGE.hidden:,}", "many", duration(gpu), "", size_of(peak)])
    return rows


def forward(rates: Rates) -> Table:
    """Whether operations are what counts."""
    rows = [["rows", "users/s of one core", "GF a user", "GF/s of one core"]]
    for size in rates.sizes("forward", "time"):
        time, speed = (rates("forward", f"{size} rows", metric) for metric in ("time", "speed"))
        rows.append([f"{size:,}", f"{1 / time:.3g}", f"{time * speed:.3g}", f"{speed:.3g}"])
    return rows


def users(rates: Rates, plan: Plan) -> Table:
    """A user as each policy has it, and all of them read once."""
    rows = [["", "rows", f"GPU hours, {SMALL.name}", f"GPU hours, {LARGE.name}", "stored, a user", "stored, all"]]
    for name in POLICIES:
        own = policy_rows(rates, plan, name)
        rows.append([name, number(own), *gpu_hours(plan, [(1, own, 0)]), *stored(plan, own * LARGE.row_bytes())])
    own = policy_rows(rates, plan, "items") + VECTORS
    kept = stored(plan, VECTORS * LARGE.row_bytes())
    rows.append([f"{VECTORS} experts of items", number(own), *gpu_hours(plan, [(1, own, 0)]), *kept])
    segments, each = plan.events / BLOCK, BLOCK + 2 * VECTORS
    kept = stored(plan, VECTORS * LARGE.hidden * BFLOAT16)
    name = f"memory of {VECTORS} vectors, of items"
    rows.append([name, number(segments * each), *gpu_hours(plan, [(segments, each, 0)]), *kept])
    return rows


def events(rates: Rates, plan: Plan) -> Table:
    """One more event of every user, and a recommendation after it."""
    rows = [["", "kept", "rows of a visit", "rows to absorb an event",
             *(f"GPU hours for all, {shape.name}" for shape in (SMALL, LARGE))]]  # fmt: skip
    prompt = policy_rows(rates, plan, "items") - plan.events
    for name in POLICIES:
        new, kept = rates("planning", name, "rows of one more event"), policy_rows(rates, plan, name)
        rows.append([name, f"{number(kept)} rows in a `UserCache`", number(new), "",
                     *gpu_hours(plan, [(1, new, kept)])])  # fmt: skip
    visit, whole = prompt + recent_items(KEEP), plan.events + VECTORS
    rows.append([f"{VECTORS} experts of items", f"{VECTORS} rows in a store", number(visit), number(whole / BLOCK),
                 *gpu_hours(plan, [(1, visit, VECTORS), (1 / BLOCK, whole, 0)])])  # fmt: skip
    visit, segment = prompt + VECTORS + recent_items(1), BLOCK + 2 * VECTORS
    rows.append([f"memory of {VECTORS} vectors", f"{VECTORS} vectors in a store", number(visit),
                 number(segment / BLOCK), *gpu_hours(plan, [(1, visit, 0), (1 / BLOCK, segment, 0)])])  # fmt: skip
    return rows


def learning(rates: Rates, plan: Plan) -> Table:
    """An epoch of all targets by the item head, three forward passes a row."""
    size = rates.sizes("training", "rows")[-1]
    each = rates("training", f"{size} events", "rows")
    rows = [["a user's events in one pass", "rows a target", *(f"GPU hours, {shape.name}" for shape in (SMALL, LARGE))]]
    for window in (200.0, 1000.0, plan.events):
        hours = [
            3 * shape.flops(each * window) / window * plan.users * plan.events / (plan.gpu_tflops * 1e12) / 3600
            for shape in (SMALL, LARGE)
        ]
        rows.append([f"{window:,.0f}", f"{each:.3g}", *map(number, hours)])
    return rows


def batch(rates: Rates, plan: Plan) -> Table:
    """What feeds the GPUs, in hours of one core or one writer."""
    rows = [["", "measured", f"{count(plan.users)} users of {count(plan.events)} events"]]
    large = rates.sizes("histories", "time")[-1]
    time = rates("histories", f"{large} users", "time")
    rows.append(["`Histories.from_arrow`", f"{time:.3g} ns a user", duration(time * plan.users / 1e9)])
    most = rates.sizes("catalogue", "time")[-1]
    for name in POLICIES:
        time = rates("planning", f"{name}, {most} items", "time")
        told = f"{time:.3g} ns an event, {count(most)} items"
        rows.append([f"layouts, {name}", told, duration(time * plan.users * plan.events / 1e9)])
    for store in rates.measured("lmdb", "sqlite", "redis"):
        for mode in ("put", "get, copied"):
            speed = rates(store, mode, "speed")
            rows.append([f"{store}, {mode}", f"{speed:,.0f} users/s", duration(plan.users / speed)])
    return rows


def limits(rates: Rates, plan: Plan) -> Table:
    """Where each part stops, on one machine."""
    host, gpu = plan.host_gib * GIB, plan.gpu_gib * GIB
    large = rates.sizes("catalogue", "time")[-1]
    tokens = rates("catalogue", f"{large} items", "tokens")
    tree = rates("tree", f"{large} items", "peak")
    text, sessions = (policy_rows(rates, plan, name) for name in ("text", "sessions of 20"))
    pairs = rates("transitions", f"{rates.sizes('transitions', 'peak')[-1]} events", "peak")
    in_host, in_gpu = f" in {plan.host_gib:g} GiB", f" in {plan.gpu_gib:g} GiB"
    search = {width: 2 * width + max(2 * width, 8 * TOGETHER) for width in (LARGE.hidden, NARROW)}
    cached = gpu / 2 / LARGE.row_bytes() / sessions
    return [
        ["part", "law", "stops at"],
        ["`Histories`", "8 bytes an event, 8 a user", f"{count(host / (8 * plan.events + 8))} users{in_host}"],
        [
            "a layout",
            "2^31 - 1 rows",
            f"{count(INT32 / text)} users of text, {count(INT32 / sessions)} of sessions of 20",
        ],
        [
            "`Catalog`",
            f"2^31 - 1 tokens, {tokens:.2g} a title",
            f"{count(INT32 / tokens)} items; with texts of 20 tokens {count(INT32 / (tokens + 20))}",
        ],
        ["tree of titles", f"{tree:,.0f} bytes an item while it is built", f"{count(host / tree)} items{in_host}"],
        ["item table", f"{LARGE.hidden:,} x 2 bytes an item", f"{count(gpu / LARGE.hidden / 2)} items{in_gpu}"],
        *(
            [
                f'`search="items"`, {width:,} wide',
                f"4 x {width:,} bytes an item planned, or 2 x {width:,} and 8 for every user at once",
                f"{count(gpu / each)} items and {TOGETHER} users{in_gpu}",
            ]
            for width, each in search.items()
        ),
        ["loss of items", "all up to 50,000 items, else 8,192 sampled", "none: validation alone scores all"],
        [
            "full rankings of recipes/evaluate.py",
            "256 users x items x 8 bytes, at least twice",
            f"{count(host / (256 * 16))} items{in_host}",
        ],
        [
            "`TransitionPrior`",
            f"{pairs:.0f} bytes an event while it is fitted",
            f"{count(host / pairs)} events{in_host}",
        ],
        ["`LinearPrior`", "32 bytes a pair of items", f"{count((16 * GIB / 32) ** 0.5)} items in 16 GiB"],
        [
            "`UserCache`",
            f"{LARGE.row_bytes():,} bytes a row ({LARGE.name}), {SMALL.row_bytes():,} ({SMALL.name})",
            f"{count(cached)} users of sessions of 20 in half of {plan.gpu_gib:g} GiB ({LARGE.name})",
        ],
        ["a store's value", "512 MiB", f"{count(2**29 / LARGE.row_bytes())} rows ({LARGE.name})"],
    ]


TABLES = {
    "Items": items, "Scoring": scoring, "Rows": lambda rates, plan: forward(rates), "Users": users, "Events": events,
    "Learning": learning, "Batch": batch, "Limits": limits,
}  # fmt: skip


# ------------------------------------------------------------------ laws


def policy_rows(rates: Rates, plan: Plan, name: str) -> float:
    """Of a user's prompt: those measured, as many more as there are more events."""
    row = "planning", f"{name}, {rates.sizes('catalogue', 'time')[-1]} items", "rows"
    return rates(*row) * plan.events / rates.config(*row, "events")


def recent_items(least: int) -> float:
    """Of a user whose old items are absorbed in blocks, on average over where its history ends in a block."""
    return least + (BLOCK - 1) / 2


def gpu_hours(plan: Plan, passes: Sequence[tuple[float, float, float]]) -> list[str]:
    """Of all users, with both models: of so many passes over so many rows that see so many stored ones."""
    flops = [sum(times * shape.flops(rows, kept) for times, rows, kept in passes) for shape in (SMALL, LARGE)]
    return [number(one * plan.users / (plan.gpu_tflops * 1e12) / 3600) for one in flops]


def stored(plan: Plan, own: float) -> list[str]:
    """Bytes of a user, and of all."""
    return [size_of(own), size_of(own * plan.users)]


# ------------------------------------------------------------------ words


def number(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{float(f'{value:.3g}'):,.0f}"


def size_of(value: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} PB"


def duration(seconds: float) -> str:
    steps = [
        (1e-6, "ns", 1e-9),
        (1e-3, "µs", 1e-6),
        (1, "ms", 1e-3),
        (120, "s", 1),
        (7200, "min", 60),
        (1e6, "h", 3600),
    ]
    for below, unit, size in [*steps, (1e6, "h", 3600)]:
        if seconds < below:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 86_400:,.0f} days"


def count(value: float) -> str:
    for size, word in ((1e9, "billion"), (1e6, "million")):
        if value >= size:
            return f"{value / size:.3g} {word}"
    return number(value)


def markdown(table: Table) -> list[str]:
    head, *rest = table
    rule = ["---", *["--:"] * (len(head) - 1)]
    return [f"| {' | '.join(row)} |" for row in (head, rule, *rest)]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", nargs="?", type=Path, default=PUBLISHED, help="of bench_scale.py (default: published)")
    for name, default in vars(Plan()).items():
        parser.add_argument(f"--{name}", type=float, default=default, help="(default: %(default)s)")
    given = vars(parser.parse_args(argv))
    rates, plan = Rates(given.pop("csv")), Plan(**given)
    for name, table in TABLES.items():
        print("\n".join([f"## {name}", "", *markdown(table(rates, plan)), ""]))


if __name__ == "__main__":
    main()
