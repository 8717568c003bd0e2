# SPDX-License-Identifier: Apache-2.0
"""Searching a catalogue: users per second, memory, and how both grow with the history.

    python bench/bench_search.py                               # all parts, about 25 minutes on one core
    python bench/bench_search.py --parts peers --users 16
    python bench/bench_search.py --device cuda --shape 1b --budget 40GiB
    python bench/bench_search.py --parts catalogue --shape tiny --rounds 9 --output search-catalogue.csv

Parts:

- peers: item patches on ml-100k, width 20. "patchkern beam", "diverse" and "exact" against "generate" (transformers
  with its key-value cache and ``prefix_allowed_tokens_fn``) and "published" (diverse beam search as the PatchRec
  authors run it: 20 groups, no cache, every beam with a copy of the prompt), and the keys and values of 20 beams over
  those of one. Before anything is timed, the scores of "generate" and "published" must agree with ours.
- policies: the same engine on whole histories of the ml-1m users with more than 500 items: text, ItemPatches(20),
  SessionPatches(20), seconds per user, and the peak memory of a batch, predicted and measured.
- scaling: one synthetic user with up to 100,000 items under SessionPatches(20): bytes and seconds of the prompt, all
  keys and values and the seconds of a step with 1 and with 20 beams. bench/plot_scaling.py draws it.
- extend: a cached user with up to 5,000 items and 10 new events, against computing the prompt anew. What can be saved
  is the part of the prompt that does not change: all but the latest items and the suffix.
- catalogue: the tree of a million titles, one of 2,000 tokens: seconds and bytes to build; and one user of 200,000
  items: a call that finds the tree kept, against one that builds it, and one that builds it as it was done before,
  from a matrix of padded titles.

Without ../shared the users are synthetic. The model is a small Llama with random weights and a tokenizer fitted on the
titles; time does not depend on what the weights have learnt, but for the searches that stop early when the best titles
stand out, which they do not here.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import tracemalloc
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

sys.path.append(str(Path(__file__).resolve().parents[1]))  # an installed patchkern comes first

import patchkern as pk
from bench import output
from bench.search_peers import as_published, by_generate, plain_model, right_and_no_better, same_scores
from bench.timing import Table, Timing, measure, synchronize
from bench.workloads import SHARED
from patchkern.budget.live_bytes import peak_memory
from patchkern.data import Interactions, open_dataset, prepare, synthetic
from patchkern.models.scratch import LLAMA_1B, fit_tokenizer, scratch_model, scratch_prompt
from patchkern.search.prompts import Prompts
from patchkern.search.recommend import generate_titles
from patchkern.search.trie import Trie
from patchkern.search.trie_cache import forget_trees

PARTS = ("peers", "policies", "scaling", "extend", "catalogue")


def make_model(data: Interactions, shape: str, device: str) -> pk.PatchedCausalLM:
    tokenizer = fit_tokenizer(data.titles.values(), 4096)
    if shape == "1b":
        torch.manual_seed(0)
        llama = LlamaConfig(**LLAMA_1B, max_position_embeddings=131_072, tie_word_embeddings=True)
        with torch.device(device):
            hf_model: PreTrainedModel = LlamaForCausalLM(llama).bfloat16()
    else:
        hf_model = scratch_model(tokenizer, shape)
        hf_model.to(torch.device(device))  # type: ignore[arg-type]
    catalog = pk.Catalog.from_titles(data.titles, tokenizer)
    return pk.PatchedCausalLM(hf_model.eval(), catalog, scratch_prompt(tokenizer))


def dataset(name: str) -> Interactions:
    folder = Path(os.environ.get("PATCHKERN_BENCH_DATA", SHARED)) / name
    if folder.is_dir():
        return prepare(open_dataset(folder))
    if name == "ml-1m":  # its long users are what matters
        return synthetic(60, 3883, mean_length=700.0)
    return synthetic(700, 1682, mean_length=76.0)


# ------------------------------------------------------------------ the peers


def peers(table: Table, args: argparse.Namespace) -> None:
    data = dataset("ml-100k")
    model = make_model(data, args.shape, args.device)
    plain = plain_model(model)
    # a sample each of users from all over the split, fewer where it has fewer
    samples = data.samples("test")
    of_users = np.unique(samples.users, return_index=True)[1]
    chosen = of_users[np.linspace(0, of_users.size - 1, min(args.users, of_users.size)).astype(np.int64)]
    samples = type(samples)(samples.users[chosen], samples.positions[chosen])
    histories, policy, width = data.before(samples), pk.ItemPatches(5, 100), args.width
    few = histories.take(np.arange(min(args.published_users, len(histories))))

    ours = [[score for _, score in user] for user in model.recommend(histories, policy, k=width, num_beams=width)]
    every = model.score_items(histories, policy)
    right_and_no_better("generate", by_generate(model, plain, histories, policy, width), ours, every)
    lists = generate_titles(model, few, policy, width, leaves_only=False)
    titles = [sorted((score for _, score in user), reverse=True) for user in lists]
    same_scores("published", as_published(model, plain, few, policy, width), titles)

    smaller = f"generate, {len(few)} at once"
    calls: dict[str, tuple[Callable[[], object], int]] = {
        "patchkern beam": (lambda: model.recommend(histories, policy, width, width), len(histories)),
        "patchkern diverse": (lambda: model.recommend(histories, policy, width, width, "diverse"), len(histories)),
        "patchkern exact": (lambda: model.recommend(few, policy, width, width, "exact"), len(few)),
        "generate": (lambda: by_generate(model, plain, histories, policy, width), len(histories)),
        # copying the keys and values of all beams at every step is what it does most: fewer users, smaller copies
        smaller: (lambda: by_generate(model, plain, few, policy, width), len(few)),
        "published": (lambda: as_published(model, plain, few, policy, width), len(few)),
    }
    timing = measure({name: call for name, (call, _) in calls.items()}, args.seconds, args.rounds, args.rounds)
    per_user = Timing({name: timing.seconds[name] / count for name, (_, count) in calls.items()})
    config = {"data": data.name, "users": len(histories), "width": width, "policy": str(policy), "shape": args.shape}
    for name, (_, count) in calls.items():
        p20, p50, p80 = (1 / seconds for seconds in per_user.quantiles(name))
        table.add(name, "peers", "speed", "users/s", (p80, p50, p20), config | {"users": count})
    for peer in ("generate", smaller):
        faster = per_user.ratio(peer, "patchkern beam")
        table.add("patchkern beam", "peers", f"speed-up over {peer}", "x", faster, config)
    for name in ("patchkern beam", "patchkern diverse"):
        table.add(name, "peers", "speed-up over published", "x", per_user.ratio("published", name), config)
    for stored in (policy, pk.ItemPatches(5, None)):
        many, one = (stored_bytes(model, histories, stored, beams) for beams in (width, 1))
        of_policy = config | {"policy": str(stored)}
        table.add("patchkern beam", "peers", f"keys and values, {width} beams / 1", "x", (many / one,) * 3, of_policy)


def stored_bytes(model: pk.PatchedCausalLM, histories: pk.Histories, policy: pk.Policy, beams: int) -> int:
    """The most bytes of keys and values, of prompts and hypotheses, that a beam search holds."""
    most = 0
    step = Prompts.step

    def counting(self: Prompts, *arguments: Any, **options: Any) -> Tensor:
        nonlocal most
        logits = step(self, *arguments, **options)
        cache = self._cache
        tensors = [x for store in (cache.layers, cache.suffixes._pool) for pair in store.values() for x in pair]
        most = max(most, sum(x.untyped_storage().nbytes() for x in tensors))
        return logits

    Prompts.step = counting  # type: ignore[method-assign]
    try:
        model.recommend(histories, policy, k=beams, num_beams=beams)
    finally:
        Prompts.step = step  # type: ignore[method-assign]
    return most


# ------------------------------------------------------------------ whole histories


def policies(table: Table, args: argparse.Namespace) -> None:
    data = dataset("ml-1m")
    long = np.flatnonzero(data.histories.lengths > 500)[: args.long_users]
    histories = data.histories.take(long)
    model = make_model(data, args.shape, args.device)
    chosen: dict[str, pk.Policy] = {
        "text": pk.TextOnly(None),
        "items": pk.ItemPatches(20, None),
        "sessions": pk.SessionPatches(20, None),
    }

    options = {"k": args.width, "num_beams": args.width, "memory_budget": args.budget, "batch_size": args.long_batch}
    calls = {name: partial(model.recommend, histories, policy, **options) for name, policy in chosen.items()}
    timing = measure(calls, 0.0, args.long_rounds, args.long_rounds)
    per_user = Timing({name: seconds / len(histories) for name, seconds in timing.seconds.items()})
    weights = sum(parameter.nbytes for parameter in model.parameters())
    peaks: dict[str, int] = {}
    for name, policy in chosen.items():
        counts = pk.row_counts(model.catalog, histories, policy, model.prompt)
        config = {"data": data.name, "users": len(histories), "policy": str(policy), "rows": float(counts.mean())}
        config |= {"width": args.width, "shape": args.shape, "batch": args.long_batch, "budget": str(args.budget)}
        table.add(name, "whole histories", "time", "s/user", per_user.quantiles(name), config)
        # the longest users make the first batch, and the peak
        plan = pk.plan_memory(model, counts, args.budget, args.width, batch_size=args.long_batch)
        first = max(plan.batches, key=lambda batch: batch.needed.peak)
        with peak_memory(model.device) as peak:
            model.recommend(histories.take(first.users), policy, **options)
        peaks[name] = weights + peak.bytes
        for metric, size in (("peak memory", peaks[name]), ("peak memory, predicted", plan.peak)):
            table.add(name, "whole histories", metric, "MiB", (size / 2**20,) * 3, config)
        if name != "text":
            table.add(name, "whole histories", "speed-up over text", "x", per_user.ratio("text", name), config)
            saved = (peaks["text"] - weights) / (peaks[name] - weights)
            table.add(name, "whole histories", "memory saved beside weights", "x", (saved,) * 3, config)


# ------------------------------------------------------------------ growth


def scaling(table: Table, args: argparse.Namespace) -> None:
    data = dataset("ml-100k")
    model = make_model(data, args.shape, args.device)
    rng = np.random.default_rng(0)
    policy = pk.SessionPatches(20, None)
    trie = Trie.from_catalog(model.catalog, model.prompt.response_end).to(model.device)
    first = trie.tokens[1 : 1 + args.width]
    for count in args.scaling_items:
        history = pk.Histories(rng.choice(model.catalog.item_ids, count), [0, count])
        layout = pk.build_layout(model.catalog, history, policy, model.prompt)
        config = {"items": count, "rows": layout.num_rows, "policy": str(policy), "shape": args.shape}
        with model.searching():
            with peak_memory(model.device) as peak:
                Prompts(model, layout, 64, chunk_rows=1024)
            prompts: list[Prompts] = []

            def prefill(layout: pk.PatchLayout = layout, prompts: list[Prompts] = prompts) -> None:
                prompts[:] = [Prompts(model, layout, 64, chunk_rows=1024)]
                synchronize(model.device)

            seconds = measure({"prompt": prefill}, 1.0, 3, 20)
            (ready,) = prompts

            steps = measure({f"{w} beams": partial(one_step, ready, first[:w]) for w in (1, args.width)}, 1.0, 5, 50)
        per_row = peak.bytes / layout.num_rows
        table.add("patchkern", "scaling", "prompt", "s", seconds.quantiles("prompt"), config)
        table.add("patchkern", "scaling", "prompt, peak memory per row", "B", (per_row,) * 3, config)
        for beams in (1, args.width):
            stored = stored_bytes(model, history, policy, beams)
            table.add("patchkern", "scaling", f"keys and values, {beams} beams", "B", (stored,) * 3, config)
        for name in steps.seconds:
            table.add("patchkern", "scaling", f"step, {name}", "s", steps.quantiles(name), config)


def one_step(prompts: Prompts, tokens: Tensor) -> None:
    prompts.step(torch.full_like(tokens, -1), torch.zeros_like(tokens), tokens)
    prompts.forget()
    synchronize(tokens.device)


def extend(table: Table, args: argparse.Namespace) -> None:
    data = dataset("ml-100k")
    model = make_model(data, args.shape, args.device)
    rng = np.random.default_rng(0)
    cache = pk.UserCache(model, 1 << 28)
    for policy in (
        pk.TextOnly(None),
        pk.ItemPatches(5, None),
        pk.SessionPatches(5, None, align="start"),
        pk.SessionPatches(20, None, align="start"),
    ):
        for count in args.extend_items:
            items = rng.choice(model.catalog.item_ids, count + 10).tolist()
            old, new = (pk.build_layout(model.catalog, [part], policy, model.prompt) for part in (items[:count], items))
            seconds: dict[str, list[float]] = {"anew": [], "extended": []}
            with model.searching():
                for number in range(args.rounds + 2):
                    cache.clear()
                    Prompts(model, old, 64, user_cache=cache)
                    synchronize(model.device)
                    times, logits = [time.perf_counter()], []
                    for user_cache in (cache, None):
                        logits.append(Prompts(model, new, 64, user_cache=user_cache).logits)
                        synchronize(model.device)
                        times.append(time.perf_counter())
                    if not torch.allclose(logits[0], logits[1], rtol=1e-3, atol=1e-3):
                        sys.exit("extend: a cached prompt has other logits; nothing was timed")
                    if number:
                        for name, taken in zip(("extended", "anew"), np.diff(times), strict=True):
                            seconds[name].append(taken)
            timing = Timing({name: np.array(values) for name, values in seconds.items()})
            config = {"items": count, "rows": new.num_rows, "policy": str(policy), "shape": args.shape}
            for name in timing.seconds:
                table.add(name, "extend", "prompt", "s", timing.quantiles(name), config)
            table.add("extended", "extend", "time / anew", "x", timing.ratio("extended", "anew"), config)


# ------------------------------------------------------------------ large catalogues


def random_titles(count: int, tokens: np.ndarray, longest: int) -> pk.Catalog:
    """Titles of 3 to 11 of the ``tokens``, about as many as those of the real data, and one of ``longest``."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 12, count)
    lengths[0] = longest
    return pk.Catalog.from_token_ids(rng.choice(tokens, lengths.sum()), np.append(0, lengths.cumsum()))


def padded_order(tokens: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The titles' order by sorting a matrix as wide as the longest, as a tree was built before it was ragged."""
    lengths = np.diff(offsets)
    matrix = np.full((lengths.size, lengths.max()), -1)
    matrix[np.arange(lengths.max()) < lengths[:, None]] = tokens
    order = np.lexsort(matrix.T[::-1])
    differs = np.diff(matrix[order], axis=0) != 0
    shared = np.where(differs.any(axis=1), differs.argmax(axis=1), lengths[order][1:])
    return order, np.append(0, shared)


def catalogue(table: Table, args: argparse.Namespace) -> None:
    # of one thread, whatever else the machine does
    clock = time.thread_time if args.device == "cpu" and args.threads == 1 else time.perf_counter
    titles = random_titles(args.tree_titles, np.arange(50_000), longest=2_000)
    tracemalloc.start()  # it counts what NumPy allocates, and the tensors are NumPy's memory; not while the clock runs
    tree = Trie.from_catalog(titles, [1])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    config: dict[str, Any] = {"items": len(titles), "longest": tree.depth - 1, "nodes": tree.num_nodes}
    timing = measure({"tree": lambda: Trie.from_catalog(titles, [1])}, 0.0, args.rounds, args.rounds, clock=clock)
    table.add("tree", "catalogue", "build", "s", timing.quantiles("tree"), config)
    for metric, size in (("bytes", tree.num_bytes), ("peak of building", peak)):
        table.add("tree", "catalogue", metric, "MiB", (size / 2**20,) * 3, config)

    plain = make_model(synthetic(20, 1_000), args.shape, args.device)
    titles = random_titles(args.catalogue_items, np.unique(plain.catalog.token_ids), longest=11)
    model = pk.PatchedCausalLM(plain.hf_model, titles, plain.prompt)
    history = pk.Histories(np.random.default_rng(0).integers(0, len(titles), 100), [0, 100])
    recommend = partial(model.recommend, history, pk.ItemPatches(5, 100), args.width, args.width)

    def building() -> object:
        forget_trees(titles)
        return recommend()

    def padding() -> object:
        with mock.patch("patchkern.search.trie._in_order", padded_order):
            return building()

    calls: dict[str, Callable[[], object]] = {"tree padded": padding, "tree built": building, "tree kept": recommend}
    lists = [call() for call in calls.values()]
    if lists != lists[::-1]:
        sys.exit("catalogue: another tree has other lists; nothing was timed")
    timing = measure(calls, 0.0, args.rounds, args.rounds, clock=clock)
    config = {"items": len(titles), "users": 1, "width": args.width, "shape": args.shape}
    for name in calls:
        table.add(name, "catalogue", "call", "s", timing.quantiles(name), config)
    for name in ("tree padded", "tree built"):
        table.add("tree kept", "catalogue", f"time / {name}", "x", timing.ratio("tree kept", name), config)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shape", default="small", help="tiny, small or 1b (Llama-3.2-1B's)")
    parser.add_argument("--width", type=int, default=20)
    parser.add_argument("--users", type=int, default=64)
    parser.add_argument("--published_users", type=int, default=8, help="at once for the slowest providers of peers")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.0, help="more rounds of peers while there is time")
    parser.add_argument("--long_users", type=int, default=58)
    parser.add_argument("--long_batch", type=int, default=8)
    parser.add_argument("--long_rounds", type=int, default=2)
    parser.add_argument("--budget", default="8GiB", help="of the whole histories")
    parser.add_argument("--scaling_items", type=int, nargs="+", default=[1_000, 3_000, 10_000, 30_000, 100_000])
    parser.add_argument("--extend_items", type=int, nargs="+", default=[200, 1_000, 5_000])
    parser.add_argument("--tree_titles", type=int, default=1_000_000)
    parser.add_argument("--catalogue_items", type=int, default=200_000)
    parser.add_argument("--threads", type=int, default=1)
    output.add_option(parser, "search.csv")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    table = Table(output.prepare(args.output, "search.csv"))
    parts = {"peers": peers, "policies": policies, "scaling": scaling, "extend": extend, "catalogue": catalogue}
    for part in args.parts:
        parts[part](table, args)
        table.write()


if __name__ == "__main__":
    main()
