# SPDX-License-Identifier: Apache-2.0
r"""What a user costs by the length of the history: a read, one more event, and what is kept.

    python bench/bench_history_lengths.py                                            # 25 minutes of a core
    python bench/bench_history_lengths.py --forms text items --output FILE
    python bench/bench_history_lengths.py --forms sessions --output FILE --add       # other forms' rows stay
    python bench/plot_history_lengths.py FILE
    python bench/bench_history_lengths.py --lengths 100 150 --seconds 0 --hidden_size 64    # does it run at all

One user of ml-1m's catalogue with so many items, one after the other for all --forms: the whole history as "text", as
"items" (a patch each) and in "sessions" of 20; compressed to "experts" and to a "memory". "language model" is a small
one with an item head, "item ids" a SASRec, both with random weights. Seconds of:

"read": the user's 10 items (``search="items"``) where nothing is kept, with the compression on the way.
"event": one more item, and the list after it, behind a `UserCache` for whole histories, `UserStates` for the others
(``update`` and then the list); while no border moves. "border": the same where one does, and old items are compressed.
"event, mean": with the one border that a block of items has.

"kept": bytes of the user in the cache, or in the store; "kept, formula" is what they should be. "peak" is the most that
torch allocates while all but the last 50 items are computed, weights and what a cache reserves aside; "peak, planned"
what `plan_memory` says of a read, with the passes before it that compress.

With one thread seconds are those that it ran for, whatever else the machine does; with more they are the clock's.

A line ends ("line ends") before a length whose read would take more than --limit seconds, as far as the operations grow
from the last one, or whose planned peak exceeds --memory. The exponents of the last decade of each line stand beside
those of the operations, which `bench.history_work` counts.

Before anything of a length is printed, the list after 50 events behind what is kept must be that computed anew, and at
the first length a user with another past must have another list.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # an installed patchkern comes first

import patchkern as pk
from bench import output
from bench.history_work import COSTS, Network, Rows, exponent, kind_of
from bench.timing import Table
from bench.training_providers import make_model
from bench.workloads import Workload, ml1m
from patchkern.budget.live_bytes import peak_memory
from patchkern.budget.search import UserTooLarge, parse_bytes
from patchkern.serving.identity import user_key

K, BLOCK = 10, 50
TOLERANCE = 1e-4  # of log-probabilities
NAME = "history-lengths.csv"
MODELS = ("language model", "item ids")
PATCHES = pk.ItemPatches(keep_text=0, max_items=None)
FORMS: dict[str, Callable[[int], Any]] = {
    "text": lambda count: pk.TextOnly(max_items=None),
    "items": lambda count: PATCHES,
    "sessions": lambda count: pk.SessionPatches(20, max_items=None, align="start"),
    "sessions, no text": lambda count: pk.SessionPatches(20, max_items=None, align="start", keep_text=0),
    "experts, one": lambda count: pk.Experts(PATCHES, count=count, keep=20, block=BLOCK),
    "experts, blocks": lambda count: pk.Experts(PATCHES, count=count, block=BLOCK, parts="blocks"),
    "memory, overwrite": lambda count: pk.PreferenceMemory(PATCHES, slots=count, block=BLOCK),
    "memory, append": lambda count: pk.PreferenceMemory(PATCHES, slots=count, block=BLOCK, mode="append"),
}
SAME = {("item ids", "text")}  # an item is one row, as a patch is


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    lengths = [100, 300, 1000, 3000, 10_000, 30_000, 100_000]
    parser.add_argument("--lengths", nargs="+", type=int, default=lengths, help=f"multiples of {BLOCK}")
    parser.add_argument("--limit", type=float, default=90.0, help="seconds of a read")
    parser.add_argument("--memory", default="4GiB", help="of computing a user, weights included")
    parser.add_argument("--seconds", type=float, default=3.0, help="of reads at a length; ten times that of events")
    parser.add_argument("--learned", type=int, default=4, help="experts, or slots of a memory")
    parser.add_argument("--hidden_size", type=int, default=256, help="of the language model; item ids have a quarter")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocab_size", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=1, help="with one, seconds are those that it ran for")
    parser.add_argument("--add", action="store_true", help="keep the rows of other lines that --output has")
    output.add_option(parser, NAME)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    wrong = [length for length in args.lengths if length < 2 * BLOCK or length % BLOCK]
    if wrong:
        parser.error(f"--lengths: expected multiples of {BLOCK} from {2 * BLOCK} on, got {wrong[0]}")
    lines = [(model, form) for model in args.models for form in args.forms if (model, form) not in SAME]
    before = _rows_of_others(args.output, lines) if args.add and args.output is not None else []
    table = Table(output.prepare(args.output, NAME), before)
    workload = ml1m(args.vocab_size)
    longest = max(args.lengths) + BLOCK
    items = np.random.default_rng(0).choice(workload.catalog.item_ids, longest)
    for name, form in lines:
        model = make(workload, name, FORMS[form](args.learned), longest, args)
        line(table, name, form, model, items, workload.name, args)
        table.write()


def _rows_of_others(path: Path, lines: list[tuple[str, str]]) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if (row["mode"], row["provider"]) not in lines]


def make(workload: Workload, name: str, policy: Any, longest: int, args: argparse.Namespace) -> Any:
    """Random weights under which a past matters."""
    if name == "language model":
        network = make_model(args.hidden_size, args.layers, args.vocab_size)
        network.config.max_position_embeddings = 1 << 30
        model: Any = pk.PatchedCausalLM(network, workload.catalog, workload.prompt, policy, item_head=True)
    else:
        width, rows = args.hidden_size // 4, 2 * longest
        model = pk.ItemModel(workload.catalog, policy, width=width, layers=args.layers, max_positions=rows)
    pk.add_experts(model, args.learned)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return (pk.RecurrentMemory(model) if isinstance(policy, pk.PreferenceMemory) else model).eval()


# ------------------------------------------------------------------ a line


def line(table: Table, name: str, form: str, model: Any, items: Any, data: str, args: argparse.Namespace) -> None:
    """All lengths that one form of one model reaches."""
    network, cost = Network.of(model), COSTS[kind_of(model.policy)]
    shape = {part: getattr(args, part) for part in ("hidden_size", "layers", "learned", "limit", "memory")}
    shape |= {"data": data, "policy": str(model.policy)}
    found: dict[str, dict[int, float]] = defaultdict(dict)
    expected: dict[str, dict[int, float]] = defaultdict(dict)
    # what is made at the first call, such as the items' vectors, is no history's
    model.recommend([items[:1]], k=K, search="items")
    for length in args.lengths:
        rows = rows_of(model, items[:length], args.learned)
        work = {"read": network.flops(cost.read(rows, length)), "event": network.flops(cost.event(rows, length))}
        size = network.vector_bytes if isinstance(model.policy, pk.PreferenceMemory) else network.row_bytes
        formula = size * cost.kept(rows, length)
        config = shape | {"items": length, "gigaflops": {part: round(one / 1e9, 4) for part, one in work.items()}}
        planned, budget, why = fits(model, items[:length], args.memory)
        if found["read"]:
            last = max(found["read"])
            seconds = found["read"][last] * max(work["read"] / expected["read"][last], 1)
            if seconds > args.limit:
                why = f"a read would take some {seconds:.3g} s"
        if why:
            table.add(form, name, "line ends", "items", 3 * (length,), config | {"why": why})
            break
        is_first = length == args.lengths[0]
        where = f"{form}, {name}, {length:,} items"
        print(where, flush=True)
        measured = one_length(model, items[:length], budget, is_first, where, args)
        for part, values in measured.items():
            if not values:
                continue
            is_time = part not in ("kept", "peak")
            table.add(form, name, part, "s" if is_time else "B", quantiles(values), config)
            found[part][length] = float(np.median(values))
        if measured["border"]:
            mean = (found["event"][length] * (BLOCK - 1) + found["border"][length]) / BLOCK
            table.add(form, name, "event, mean", "s", 3 * (mean,), config)
            found["event, mean"][length] = mean
        table.add(form, name, "kept, formula", "B", 3 * (formula,), config)
        table.add(form, name, "peak, planned", "B", 3 * (planned,), config)
        expected["kept"][length] = formula
        for part, one in work.items():
            expected[part][length] = one
    for part in ("read", "event", "event, mean", "kept"):
        by_length = found[part]
        slope = exponent(list(by_length), list(by_length.values()))
        if np.isfinite(slope):
            told = expected.get(part, {})
            config = shape | {"items": max(by_length), "of_operations": exponent(list(told), list(told.values()))}
            table.add(form, name, f"exponent of {part}", "", 3 * (slope,), config)


def rows_of(model: Any, items: Any, learned: int) -> Rows:
    """As the policy of old items has it."""
    policy = getattr(model.policy, "policy", model.policy)
    beginning = len(model.prompt.prefix)
    before, now = (
        pk.row_hashes(pk.build_layout(model.catalog, [read], policy, model.prompt, head="items"))
        for read in (items[:-1], items)
    )
    size = min(before.size, now.size)
    fresh = now.size - int(np.append(before[:size] == now[:size], False).argmin())
    each = (now.size - beginning) / len(items)
    return Rows(beginning, each, fresh, learned, getattr(model.policy, "keep", 1), BLOCK)


def fits(model: Any, items: Any, memory: str) -> tuple[int, str | None, str]:
    """The planned peak without the weights, the budget if one is needed, and why that does not suffice, if so."""
    counts: Any = pk.row_counts(model.catalog, [items], model.policy, model.prompt)
    compressed = None
    if isinstance(model.policy, pk.Experts):
        rows = pk.expert_row_counts(model.catalog, [items], model.policy, model.prompt, "items")
        counts, compressed = rows.read, rows.compressed
    elif isinstance(model.policy, pk.PreferenceMemory):
        counts = pk.memory_row_counts(
            model.catalog, [items], model.policy, model.prompt, "items", one_time=model.one_time
        )
    plan = pk.plan_memory(model, counts, None, 1, compressed=compressed)
    if plan.peak <= parse_bytes("memory", memory):
        return plan.peak - plan.needed.weights, None, ""
    try:
        plan = pk.plan_memory(model, counts, memory, 1, compressed=compressed)
    except UserTooLarge as error:
        return 0, memory, str(error)
    return plan.peak - plan.needed.weights, memory, ""


def one_length(
    model: Any, items: Any, budget: str | None, is_first: bool, where: str, args: argparse.Namespace
) -> dict[str, list[float]]:
    """What is measured at one length: seconds, and bytes.

    Args:
        items: the history, whose last block arrives event by event.
        budget: of reads that would take more; planning them takes a moment that short histories would show.
        is_first: whether to see that the past matters.
        where: for errors.
    """
    length, seconds = len(items), args.seconds
    # of one thread, whatever else the machine does
    clock = time.thread_time if args.threads == 1 else time.perf_counter
    find = partial(model.recommend, k=K, search="items", user_ids=["ada"], memory_budget=budget)
    kept = (KeptStates if kind_of(model.policy) != "whole" else KeptPrompt)(model, items)
    taken: dict[str, list[float]] = {part: [] for part in ("read", "event", "border", "kept", "peak")}
    with peak_memory(model.device) as peak:
        kept.fill(items[: length - BLOCK])
    taken["peak"].append(peak.bytes - kept.reserved)
    kept.event(items[: length - BLOCK])  # warms up
    begin = time.perf_counter()
    for end in range(length - BLOCK + 1, length + 1):
        before = clock()
        found = kept.event(items[:end])
        moves = kept.cut(end) != kept.cut(end - 1)
        taken["border" if moves else "event"].append(clock() - before)
        enough = taken["event"] and (taken["border"] or not kept.has_borders)
        if enough and time.perf_counter() - begin >= 10 * seconds:
            found = kept.event(items)
            break
    taken["kept"].append(kept.num_bytes())
    begin = time.perf_counter()
    while not taken["read"] or time.perf_counter() - begin < seconds:
        before = clock()
        anew = find([items])
        taken["read"].append(clock() - before)
    if not alike(found, anew):
        sys.exit(f"{where}: wrong result: another list behind what is kept than anew; nothing was timed")
    if is_first:
        others = items.copy()
        others[:-BLOCK] = np.random.default_rng(1).choice(model.catalog.item_ids, length - BLOCK)
        if alike(find([others]), anew):
            sys.exit(f"{where}: another past has the same list; nothing was timed")
    return taken


class KeptPrompt:
    """A user whose whole prompt is kept."""

    has_borders = False

    def __init__(self, model: Any, items: Any) -> None:
        rows = pk.row_counts(model.catalog, [items], model.policy, model.prompt)
        self.reserved = Network.of(model).row_bytes * (int(rows[0]) + BLOCK)
        self._cache = pk.UserCache(model, self.reserved)
        self._find = partial(model.recommend, k=K, search="items", user_ids=["ada"], user_cache=self._cache)

    def fill(self, items: Any) -> Any:
        return self._find([items])

    event = fill

    def cut(self, length: int) -> int:
        return 0

    def num_bytes(self) -> int:
        return self._cache.num_bytes


class KeptStates:
    """A user whose old items are kept compressed."""

    has_borders = True
    reserved = 0

    def __init__(self, model: Any, items: Any) -> None:
        self._states = pk.UserStates(model)
        self._find = partial(model.recommend, k=K, search="items", user_ids=["ada"], user_states=self._states)
        self._policy = model.policy

    def fill(self, items: Any) -> None:
        self._states.update(["ada"], [items])

    def event(self, items: Any) -> Any:
        self._states.update(["ada"], [items])
        return self._find([items])

    def cut(self, length: int) -> int:
        lengths = np.array([length])
        cuts = self._policy.cuts(lengths) if isinstance(self._policy, pk.Experts) else self._policy.absorbed(lengths)
        return int(cuts[0])

    def num_bytes(self) -> int:
        with self._states.store.reading([user_key("ada", "user")]) as (value,):
            return 0 if value is None else value.nbytes


def alike(found: Any, expected: Any) -> bool:
    """The same scores but for rounding, which may exchange items whose scores are nearly the same."""
    (one,), (other,) = found, expected
    ranks = zip(one, other, strict=True)
    scores = dict(other)
    return all(abs(a - b) < TOLERANCE for (_, a), (_, b) in ranks) and all(
        abs(score - scores[item]) < TOLERANCE for item, score in one if item in scores
    )


def quantiles(values: Any) -> tuple[float, float, float]:
    p20, p50, p80 = np.quantile(values, (0.2, 0.5, 0.8))
    return float(p20), float(p50), float(p80)


if __name__ == "__main__":
    main()
