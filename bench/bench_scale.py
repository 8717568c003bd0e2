# SPDX-License-Identifier: Apache-2.0
r"""What each part of the library takes per item, event, row and user, at two sizes or more: the rates of docs/scale.md.

    python bench/bench_scale.py                                            # minutes, 4 GiB
    python bench/bench_scale.py --parts tree head --items 100000 1000000
    python bench/bench_scale.py --output bench/results/scale.csv           # then: python bench/scale.py
    python bench/bench_scale.py --items 500 --users 20 --events 60 --rows 50 --seconds 0    # does it run at all

"catalogue": titles tokenised by a tokenizer of 8,192 words fitted to them. "tree": what a search for titles walks.
"item table": every title's embeddings pooled. "head": all items scored by an item head, made to log-probabilities,
and the best 20 taken, for one user and for many together. "histories": from an arrow column of lists. "transitions":
which item follows which, of so many events of training, as `TransitionPrior` is fitted. "planning": layouts of users
of --events events. "forward": `recommend(search="items")` for one user, of a Llama of hidden size 512 in float32; its
floating-point operations are those of `scale.Shape.flops`. "training": the same model's loss of all targets of a
user, forward and backward. "stores": compressed users of 128 KiB, put and read by bench_user_states.

Times are processor times of one thread, which a busy machine distorts least; those of the stores are of the clock, as
they wait for a disk. Peak memory is by how much the process grew at most, as Linux counts it.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # an installed patchkern comes first

import patchkern as pk
from bench import bench_user_states, output
from bench.bench_search import random_titles
from bench.scale import NARROW, TOGETHER, Shape
from bench.timing import Table, measure
from bench.training_providers import make_model
from patchkern.evaluation.yardsticks import Follows
from patchkern.models.scratch import fit_tokenizer
from patchkern.search.filters import ItemFilter
from patchkern.search.item_search import best_items
from patchkern.search.trie import Trie

K, VOCABULARY = 20, 8192
WHOLE: dict[str, pk.Policy] = {
    "text": pk.TextOnly(None),
    "items": pk.ItemPatches(0, None),
    "sessions of 5": pk.SessionPatches(5, None, align="start"),
    "sessions of 20": pk.SessionPatches(20, None, align="start"),
    "sessions of 20, no text": pk.SessionPatches(20, None, align="start", keep_text=0),
}
# words that a chat template puts around a history; no separators, which patches need none of
PROMPT = pk.Prompt(prefix=tuple(range(32)), suffix=(33,), response_end=(34,))
SHAPE = Shape("bench", layers=4, hidden=512, heads=8, kv_heads=2, head_width=64, intermediate=2048)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--items", type=int, nargs="+", default=[100_000, 1_000_000], help="sizes of catalogues")
    parser.add_argument("--users", type=int, default=64, help="planned together; put into stores 16 times as many")
    parser.add_argument("--events", type=int, default=10_000, help="of each user")
    parser.add_argument("--rows", type=int, nargs="+", default=[500, 1000, 2000, 4000], help="of a prompt")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each timing, once it has run three times")
    parser.add_argument("--folder", type=Path, help="where stores write (default: a temporary folder)")
    output.add_option(parser, "scale.csv")
    args = parser.parse_args(argv)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    table = Table(output.prepare(args.output, "scale.csv"))
    for part in args.parts:
        PARTS[part](table, args)
        table.write()


# ------------------------------------------------------------------ per item


def catalogue(table: Table, args: Namespace) -> None:
    for count in args.items:
        titles = dict(enumerate(random_words(count)))
        tokenizer = fit_tokenizer(list(titles.values())[:20_000], VOCABULARY)
        built, seconds, peak = grown(partial(pk.Catalog.from_titles, titles, tokenizer))
        arrays = sum(value.nbytes for value in vars(built).values() if isinstance(value, np.ndarray))
        config = {"items": count, "tokens_per_title": built.token_ids.size / count}
        per_item(table, "catalogue", count, seconds, config, arrays, peak)
        characters = sum(map(sys.getsizeof, built.titles or ())) / count + 8
        table.add("catalogue", f"{count} items", "titles as text", "B/item", (characters,) * 3, config)
        table.add("catalogue", f"{count} items", "tokens", "1/item", (config["tokens_per_title"],) * 3, config)


def tree(table: Table, args: Namespace) -> None:
    for count in args.items:
        titles = random_titles(count, np.arange(100, VOCABULARY), 11)
        built, seconds, peak = grown(partial(Trie.from_catalog, titles, [1]))
        kept = sum(value.nbytes for value in vars(built).values() if isinstance(value, torch.Tensor))
        config = {"items": count, "nodes": built.tokens.numel(), "tokens": titles.token_ids.size}
        per_item(table, "tree", count, seconds, config, kept, peak)


def pooled(table: Table, args: Namespace) -> None:
    weight = torch.randn(VOCABULARY, NARROW, generator=torch.Generator().manual_seed(0))
    for count in args.items:
        titles = random_titles(count, np.arange(100, VOCABULARY), 11)
        built, seconds, peak = grown(partial(pk.item_table, titles, weight))
        config = {"items": count, "width": NARROW, "tokens": titles.token_ids.size}
        per_item(table, "item table", count, seconds, config, built.rows.nbytes, peak)


def head(table: Table, args: Namespace) -> None:
    for count in args.items:
        titles = random_titles(count, np.arange(100, VOCABULARY), 11)
        hf_model = make_model(NARROW, 1, VOCABULARY)
        model = pk.PatchedCausalLM(hf_model, titles, PROMPT, WHOLE["items"], item_head=True).eval()
        states = torch.randn(TOGETHER, NARROW, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            _, seconds, peak = grown(partial(model.item_scores, states[:1]))
        config = {"items": count, "width": NARROW, "k": K}
        vectors = count * NARROW * 4
        per_item(table, "head, its vectors", count, seconds, config, vectors, peak)
        for users in (1, TOGETHER):
            seen = pk.Histories(np.tile(np.arange(100), users), np.arange(users + 1) * 100)
            unseen = ItemFilter(titles, seen, None, exclude_seen=True)
            numbers, chosen = np.arange(users), states[:users]

            def rank(model: Any = model, chosen: Any = chosen, numbers: Any = numbers, unseen: Any = unseen) -> object:
                with torch.no_grad():
                    return best_items(model.item_scores(chosen), numbers, unseen, None, K, normalize=False)

            _, _, peak = grown(rank)
            mode, config["users"] = f"{count} items, {users} users", users
            table.add("head", mode, "time", "us/user", scaled(cpu_seconds(rank, args), 1e6 / users), config)
            table.add("head", mode, "peak", "B/item/user", (peak / count / users,) * 3, config)


# ------------------------------------------------------------------ per event and row


def histories(table: Table, args: Namespace) -> None:
    pa: Any = __import__("pyarrow")
    for count in args.items:
        events = np.random.default_rng(0).integers(0, 1000, 20 * count)
        column = pa.LargeListArray.from_arrays(pa.array(np.arange(count + 1) * 20), pa.array(events))
        seconds = cpu_seconds(partial(pk.Histories.from_arrow, column), args)
        config = {"users": count, "events": events.size}
        table.add("histories", f"{count} users", "time", "ns/user", scaled(seconds, 1e9 / count), config)


def transitions(table: Table, args: Namespace) -> None:
    for count in args.items:
        rng = np.random.default_rng(0)
        users, taken = np.arange(count) // 100, rng.integers(0, 10_000, count)
        _, seconds, peak = grown(partial(Follows, users, taken, np.bincount(taken, minlength=10_000), 10))
        config = {"events": count, "items": 10_000, "recent": 10}
        table.add("transitions", f"{count} events", "time", "us/event", (1e6 * seconds / count,) * 3, config)
        table.add("transitions", f"{count} events", "peak", "B/event", (peak / count,) * 3, config)


def planning(table: Table, args: Namespace) -> None:
    rng = np.random.default_rng(0)
    for count in args.items:
        titles = random_titles(count, np.arange(100, VOCABULARY), 11)
        past = pk.Histories(rng.integers(0, count, args.users * args.events), np.arange(args.users + 1) * args.events)
        for name, policy in WHOLE.items():

            def plan(titles: Any = titles, past: Any = past, policy: Any = policy) -> pk.PatchLayout:
                return pk.build_layout(titles, past, policy, PROMPT, transpose=False, head="items")

            rows = pk.row_counts(titles, past, policy, PROMPT).mean()
            config = {"items": count, "users": args.users, "events": args.events, "policy": str(policy)}
            mode = f"{name}, {count} items"
            seconds = cpu_seconds(plan, args)
            table.add("planning", mode, "time", "ns/event", scaled(seconds, 1e9 / past.items.size), config)
            table.add("planning", mode, "rows", "1/user", (float(rows),) * 3, config)
    for name, policy in WHOLE.items():
        new = rows_of_an_event(titles, policy, args.events)
        table.add("planning", name, "rows of one more event", "1", (new,) * 3, {"events": args.events})


def rows_of_an_event(titles: pk.Catalog, policy: pk.Policy, events: int, visits: int = 40) -> float:
    """How many rows a user's prompt has, on average, that its last one had not: those that a `UserCache` computes."""
    past = np.random.default_rng(0).integers(0, len(titles), events + visits)
    prompts = [
        pk.row_hashes(
            pk.build_layout(titles, pk.Histories(past[:size], [0, size]), policy, PROMPT, transpose=False, head="items")
        )
        for size in range(events, events + visits + 1)
    ]
    new = []
    for last, now in zip(prompts, prompts[1:], strict=False):
        size = min(last.size, now.size)
        new.append(now.size - int(np.append(last[:size] == now[:size], False).argmin()))
    return float(np.mean(new))


def forward(table: Table, args: Namespace) -> None:
    titles = random_titles(1000, np.arange(100, VOCABULARY), 11)
    model = small_model(titles)
    for rows in args.rows:
        past = random_past(len(titles), max(rows - len(PROMPT.prefix) - 1, 1))
        count = int(pk.row_counts(titles, past, WHOLE["items"], PROMPT)[0])
        seconds = cpu_seconds(partial(model.recommend, past, k=K, search="items"), args)
        flops = SHAPE.flops(count)
        config = {"rows": count, "flops": flops}
        table.add("forward", f"{count} rows", "time", "s/user", seconds, config)
        table.add("forward", f"{count} rows", "speed", "GF/s", rates(seconds, flops / 1e9), config)


def training(table: Table, args: Namespace) -> None:
    titles = random_titles(1000, np.arange(100, VOCABULARY), 11)
    model = small_model(titles).train()
    for events in args.rows:
        past = random_past(len(titles), events)
        ranges = [[3, events - 1]]
        layout = pk.build_training_layout(titles, past, WHOLE["items"], PROMPT, ranges, head="items")
        total = int(layout.cu_seqlens[-1])

        def step(layout: pk.PatchLayout = layout) -> None:
            model(layout).loss.backward()
            model.zero_grad()

        seconds = cpu_seconds(step, args)
        config = {"events": events, "rows": total, "flops": 3 * SHAPE.flops(total)}
        table.add("training", f"{events} events", "rows", "1/target", (total / (events - 3),) * 3, config)
        table.add("training", f"{events} events", "speed", "GF/s", rates(seconds, config["flops"] / 1e9), config)


def stores(table: Table, args: Namespace) -> None:
    asked = Namespace(users=16 * args.users, batch=64, layers=16, width=512, experts=2, seconds=args.seconds)
    asked.folder = args.folder
    bench_user_states.stores(table, asked)


# ------------------------------------------------------------------ how


def grown(call: Callable[[], Any]) -> tuple[Any, float, float]:
    """What a call returns, its processor time in seconds, and by how many bytes the process grew at most."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before, start = _status("VmRSS"), time.process_time()
    result = call()
    return result, time.process_time() - start, float(max(_status("VmHWM") - before, 0))


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{name}:")))


def cpu_seconds(call: Callable[[], Any], args: Namespace) -> tuple[float, float, float]:
    timing = measure({"": call}, args.seconds, min_rounds=3, clock=time.process_time)
    return timing.quantiles("")


def per_item(
    table: Table, provider: str, count: int, seconds: float, config: dict[str, Any], kept: float, peak: float
) -> None:
    mode = f"{count} items"
    table.add(provider, mode, "time", "us/item", (1e6 * seconds / count,) * 3, config)
    table.add(provider, mode, "kept", "B/item", (kept / count,) * 3, config)
    table.add(provider, mode, "peak", "B/item", (peak / count,) * 3, config)


def scaled(quantiles: tuple[float, float, float], factor: float) -> tuple[float, float, float]:
    p20, p50, p80 = quantiles
    return p20 * factor, p50 * factor, p80 * factor


def rates(quantiles: tuple[float, float, float], work: float) -> tuple[float, float, float]:
    p20, p50, p80 = quantiles
    return work / p80, work / p50, work / p20


def small_model(titles: pk.Catalog) -> pk.PatchedCausalLM:
    return pk.PatchedCausalLM(
        make_model(SHAPE.hidden, SHAPE.layers, VOCABULARY), titles, PROMPT, WHOLE["items"], item_head=True
    ).eval()


def random_past(items: int, events: int) -> pk.Histories:
    return pk.Histories(np.random.default_rng(0).integers(0, items, events), [0, events])


def random_words(count: int) -> list[str]:
    """Titles of two to six of 20,000 words."""
    rng = np.random.default_rng(0)
    syllables = np.array([a + b for a in "bcdfglmnprstvz" for b in "aeiou"])
    words = np.char.add(np.char.add(rng.choice(syllables, 20_000), rng.choice(syllables, 20_000)), "n")
    lengths = rng.integers(2, 7, count)
    chosen = words[rng.integers(0, words.size, lengths.sum())].tolist()
    ends = lengths.cumsum().tolist()
    return [" ".join(chosen[end - size : end]) for end, size in zip(ends, lengths.tolist(), strict=True)]


PARTS: dict[str, Callable[[Table, Namespace], None]] = {
    "catalogue": catalogue,
    "tree": tree,
    "item table": pooled,
    "head": head,
    "histories": histories,
    "transitions": transitions,
    "planning": planning,
    "forward": forward,
    "training": training,
    "stores": stores,
}


if __name__ == "__main__":
    main()
