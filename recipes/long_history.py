# SPDX-License-Identifier: Apache-2.0
"""Whole histories of the users with the most interactions, in a given memory: as text, as item and session patches.

    python recipes/long_history.py --users 4 --budget 1GiB                       # synthetic users, a minute on a CPU
    python recipes/long_history.py --data ml-1m --budget 2GiB                    # all of its 58 users, minutes
    python recipes/long_history.py --data ml-1m --tokenizer Llama-3.2-1B         # a GPU: that model's shape, 40 GiB

Section 4.6 of the PatchRec paper: users with more than 500 interactions, none of which is cut off. The models of these
commands have random weights, for which time and memory are nearly those of trained ones. With a trained one, here from
recipes/train.py, HR@k is reported too, at equal memory: histories that do not fit are then cut to the most of their
latest items that do, policy by policy. Counted are these users' targets in the test split.

    python recipes/long_history.py --data ml-1m --checkpoint runs/items --budget 10MiB      # a tiny model
    python recipes/long_history.py --checkpoint runs/items --min_items 120 --budget 6MiB    # trained on synthetic data

The budget is for everything that torch allocates. On a GPU the process may not take more, on the CPU it is what the
plan is made for. The memory that was then in use is measured: on a GPU in the timed run, on the CPU, where that takes
time, in another run of the batch that needs most. The table is printed and written to long_history.csv in --output,
with a plot.
"""

from __future__ import annotations

import argparse
import csv
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from transformers import AutoTokenizer

sys.path.append(str(Path(__file__).resolve().parents[1]))  # an installed patchkern comes first

import patchkern as pk
from patchkern.batch.row_counts import longest_history, row_counts
from patchkern.budget.live_bytes import peak_memory
from patchkern.budget.search import SearchCost, UserTooLarge, parse_bytes
from patchkern.data import Interactions
from patchkern.data.preparation import add_arguments, load
from patchkern.evaluation.metrics import Evaluation, evaluate
from patchkern.models.scratch import SIZES, fit_tokenizer, scratch_model, scratch_prompt
from patchkern.ops.backends import describe as describe_backend
from patchkern.search.batching import size_of_beams
from patchkern.search.trie import Trie
from patchkern.training import find_model
from recipes.commands import Parser

POLICIES: dict[str, pk.Policy] = {
    "text": pk.TextOnly(max_items=None),
    "items": pk.ItemPatches(20, max_items=None),
    "sessions": pk.SessionPatches(20, max_items=None),
}
NAMES = {"text": "text", "items": "item patches", "sessions": "session patches"}
LLAMA_1B = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128_256,
}


@dataclass(frozen=True)
class Accuracy:
    """Recommendations for the test targets of the same users, and how many items fitted for each."""

    evaluation: Evaluation
    items: NDArray[np.int64]


@dataclass(frozen=True)
class Result:
    """One row of the table.

    Attributes:
        items, rows: ``(B,)`` of every user.
        seconds: for all of them.
        predicted, measured: peak, bytes.
        users_at_once, chunk_rows: of the plan.
        longest: items of the longest history that fits.
        limit: what ends it, "memory" or the model's "positions".
    """

    name: str
    items: NDArray[np.int64]
    rows: NDArray[np.int64]
    seconds: float
    predicted: int
    measured: int
    users_at_once: int
    chunk_rows: int | None
    longest: int
    limit: str
    accuracy: Accuracy | None = None

    @property
    def seconds_per_user(self) -> float:
        return self.seconds / self.rows.size


def main(argv: Sequence[str] | None = None) -> list[Result]:
    args = parse(argv)
    device = torch.device(args.device)
    data = load_data(args)
    users = long_users(data, args)
    histories = data.histories.take(users)
    model = load_model(args, data, device)
    if device.type == "cuda":
        cap(args.budget, model.device)

    parameters = sum(parameter.numel() for parameter in model.parameters())
    weights = "random weights" if args.checkpoint is None else args.checkpoint
    say(f"patchkern {pk.__version__}, torch {torch.__version__}, transformers {transformers.__version__}")
    say(f"BACKEND {describe_backend(device, model.hf_model.dtype)}")
    say(f"{data}\n{parameters / 1e6:,.1f} M parameters, {args.dtype}, {weights}")
    say(f"{len(histories)} users with {histories.lengths.mean():.1f} items, budget {mebibytes(args.budget)} MiB\n")

    results = []
    for name in args.policies:
        result = measure(model, histories, name, args)
        if args.checkpoint is not None:
            result = replace(result, accuracy=accuracy(model, data, users, POLICIES[name], args))
        say(f"{NAMES[name]}: {result.seconds:.2f} s")
        results.append(result)
    say("\n" + "\n".join(table(results, args.k)))
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(folder / "long_history.csv", results, data, args)
    plot(folder / "long_history.png", results, args)
    say(f"\nlongest history: of these users' items, until {' or '.join(sorted({r.limit for r in results}))} end")
    say(f"written: {folder / 'long_history.csv'}, {folder / 'long_history.png'}")
    return results


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    parser = Parser(description=__doc__)
    add_arguments(parser, default="synthetic")
    parser.add_argument("--min_items", type=int, default=500, help="users with more interactions than this")
    parser.add_argument("--users", type=int, help="the first so many of them")
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=list(POLICIES))
    parser.add_argument("--budget", default="40GiB", help="for everything that torch allocates (%(default)s)")
    parser.add_argument("--k", type=int, default=20, help="items recommended")
    parser.add_argument("--num_beams", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=1, help="of the timed run; the median counts")
    model = parser.add_argument_group("model")
    model.add_argument("--checkpoint", help="a run of recipes/train.py, or one of its checkpoints")
    model.add_argument(
        "--shape", choices=[*SIZES, "1b"], default="1b" if on_gpu else "small", help="with random weights"
    )
    model.add_argument("--tokenizer", help="a folder; without one, a tokenizer is fitted on the titles")
    model.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16" if on_gpu else "float32")
    model.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--output", default="runs/long_history", help="a folder")
    args = parser.parse_args(argv)
    for name in ("users", "repeats"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name}: expected at least 1, got {value}")
    args.budget = parse_bytes("--budget", args.budget)
    args.policies = list(dict.fromkeys(args.policies))
    if args.num_beams < args.k:
        parser.error(
            f"--num_beams: expected at least k={args.k}, or lists are too short to count, got {args.num_beams}"
        )
    return args


def load_data(args: argparse.Namespace) -> Interactions:
    if args.checkpoint is not None:
        return load(args)  # synthetic users are then those that the other recipes train on
    return load(args, num_users=40, num_items=2000, mean_length=900.0)


def long_users(data: Interactions, args: argparse.Namespace) -> NDArray[np.int64]:
    lengths = data.histories.lengths
    users: NDArray[np.int64] = np.flatnonzero(lengths > args.min_items)[: args.users]
    if not users.size:
        raise ValueError(
            f"--min_items: expected fewer than some user's interactions, got {args.min_items} for data whose longest "
            f"history has {lengths.max(initial=0)}"
        )
    if args.checkpoint is not None and not np.isin(users, data.samples("test").users).any():
        raise ValueError(f"--users: expected some with targets in the test split, got none among {users.size}")
    return users


def load_model(args: argparse.Namespace, data: Interactions, device: torch.device) -> pk.PatchedCausalLM:
    dtype = getattr(torch, args.dtype)
    if args.checkpoint is not None:
        folder = find_model(args.checkpoint, "--checkpoint")
        catalog = pk.Catalog.from_titles(data.titles, AutoTokenizer.from_pretrained(folder, trust_remote_code=False))
        return pk.PatchedCausalLM.from_pretrained(folder, catalog, dtype=dtype).to(device)
    tokenizer: Any
    if args.tokenizer is None:
        tokenizer = fit_tokenizer(data.titles.values(), 4096)
    else:
        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer, trust_remote_code=False)
    if tokenizer.chat_template and data.system and data.instruction:
        prompt = pk.Prompt.from_chat_template(tokenizer, data.system, data.instruction)
    else:
        prompt = scratch_prompt(tokenizer)
    fields: dict[str, Any] = {}
    if args.shape == "1b":
        fields = LLAMA_1B | {"vocab_size": max(LLAMA_1B["vocab_size"], len(tokenizer))}
    with device:
        hf_model = scratch_model(tokenizer, "small" if fields else args.shape, **fields).to(dtype)
    return pk.PatchedCausalLM(hf_model, pk.Catalog.from_titles(data.titles, tokenizer), prompt)


def cap(budget: int, device: torch.device) -> None:
    """Make allocations beyond the budget fail, whatever the GPU has."""
    torch.cuda.empty_cache()  # of what was needed to make the model
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, budget / total), device)


# ------------------------------------------------------------------ one policy


def measure(model: pk.PatchedCausalLM, histories: pk.Histories, name: str, args: argparse.Namespace) -> Result:
    """Recommend to all users under one policy; a history that does not fit is an error but for a trained model."""
    policy = POLICIES[name]
    trie = Trie.from_catalog(model.catalog, model.prompt.response_end)
    cost = SearchCost(model, size_of_beams(trie, args.num_beams))
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    by_memory, by_positions = cost.max_rows(args.budget), (positions or 2**31) - trie.depth + 1
    max_rows = min(by_memory, by_positions)
    if args.checkpoint is not None:
        histories = cut(model, histories, policy, max_rows)

    def recommend(users: pk.Histories) -> None:
        model.recommend(
            users, policy, k=args.k, num_beams=args.num_beams, memory_budget=args.budget, batch_size=len(histories)
        )

    recommend(histories.take([0]).latest(50))  # what only the first run does: compiling, starting libraries
    on_gpu = model.device.type == "cuda"
    resident = torch.cuda.memory_allocated(model.device) if on_gpu else cost.weights
    times, peaks = [], []
    for _ in range(args.repeats):
        started = time.perf_counter()
        if on_gpu:
            with peak_memory(model.device) as peak:
                recommend(histories)
            peaks.append(peak.bytes)
        else:
            recommend(histories)
        times.append(time.perf_counter() - started)
    rows = row_counts(model.catalog, histories, policy, model.prompt)
    plan = cost.plan(rows, args.budget, len(histories))
    if not on_gpu:
        most = max(plan.batches, key=lambda batch: batch.needed.peak)
        with peak_memory(model.device) as peak:
            recommend(histories.take(most.users))
        peaks.append(peak.bytes)
    return Result(
        name,
        histories.lengths,
        rows,
        statistics.median(times),
        plan.peak,
        resident + max(peaks),
        plan.users_per_batch,
        plan.chunk_rows,
        longest(model, histories, policy, max_rows),
        "memory" if by_memory < by_positions else "positions",
    )


def cut(model: pk.PatchedCausalLM, histories: pk.Histories, policy: pk.Policy, max_rows: int) -> pk.Histories:
    """The most of every user's latest items whose prompt has at most ``max_rows`` rows."""
    lengths = histories.lengths
    fitting = [longest_history(model.catalog, history, policy, model.prompt, max_rows) for history in histories]
    return histories.between(np.arange(lengths.size), lengths - np.array(fitting, np.int64), lengths)


def longest(model: pk.PatchedCausalLM, histories: pk.Histories, policy: pk.Policy, max_rows: int) -> int:
    """Items of the longest history that fits, made of all users' histories, one after the other and over again."""
    items = histories.items
    while items.size == (count := longest_history(model.catalog, items, policy, model.prompt, max_rows)) > 0:
        items = np.tile(items, 2)
    return count


def accuracy(
    model: pk.PatchedCausalLM,
    data: Interactions,
    users: NDArray[np.int64],
    policy: pk.Policy,
    args: argparse.Namespace,
) -> Accuracy:
    """Of the users' test targets, with as many items as fit; items already seen are left out even where cut off."""
    samples = data.samples("test")
    samples = samples.take(np.isin(samples.users, users))
    histories = data.before(samples)
    unseen = np.ones((len(histories), len(model.catalog)), np.bool_)
    owner = np.repeat(np.arange(len(histories)), histories.lengths)
    unseen[owner, model.catalog.index_of(histories.items, "histories")] = False

    def recommend(kept: pk.Histories) -> list[list[tuple[Any, float]]]:
        return model.recommend(
            kept,
            policy,
            k=args.k,
            num_beams=args.num_beams,
            memory_budget=args.budget,
            batch_size=len(users),
            allowed_items=unseen,
        )

    try:
        lists = recommend(histories)
    except UserTooLarge as error:
        histories = cut(model, histories, policy, error.max_rows)
        lists = recommend(histories)
    evaluation = evaluate(lists, data.targets(samples), [args.k], catalog=model.catalog, users=samples.users)
    return Accuracy(evaluation, histories.lengths)


# ------------------------------------------------------------------ the report


def table(results: Sequence[Result], k: int) -> list[str]:
    """A Markdown table that is also readable in a terminal."""
    header = ["", "items/user", "rows/user", "most rows", "s/user", "speed-up", "predicted MiB", "measured MiB"]
    header += ["users at once", "longest history"]
    trained = results[0].accuracy is not None
    if trained:
        header += ["test items", f"HR@{k}", "±"]
    lines = [header]
    for result in results:
        faster = speed_up(result, results)
        line = [
            NAMES[result.name],
            f"{result.items.mean():.1f}",
            f"{result.rows.mean():.1f}",
            f"{result.rows.max()}",
            f"{result.seconds_per_user:.4f}",
            "" if faster is None else f"{faster:.2f}",
            mebibytes(result.predicted),
            mebibytes(result.measured),
            f"{result.users_at_once}",
            f"{result.longest:,}",
        ]
        if result.accuracy is not None:
            scores = result.accuracy.evaluation.as_dict()
            line += [f"{result.accuracy.items.mean():.1f}", f"{scores[f'HR@{k}']:.4f}", f"{scores[f'HR@{k} ±']:.4f}"]
        lines.append(line)
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    cells = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return ["| " + " | ".join(line) + " |" for line in [cells[0], rule, *cells[1:]]]


def speed_up(result: Result, results: Sequence[Result]) -> float | None:
    """Against text, where that was measured."""
    text = next((other for other in results if other.name == "text"), None)
    return None if text is None else text.seconds_per_user / result.seconds_per_user


def mebibytes(count: int) -> str:
    return f"{count / 2**20:,.1f}"


def write_csv(path: Path, results: Sequence[Result], data: Interactions, args: argparse.Namespace) -> None:
    """One line per policy, then what it was measured with."""
    device = torch.device(args.device)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    shared = {
        "num_beams": args.num_beams,
        "k": args.k,
        "budget_bytes": args.budget,
        "data": data.name,
        "model": args.checkpoint or args.shape,
        "dtype": args.dtype,
        "device": gpu or f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "patchkern": pk.__version__,
    }
    lines = []
    for result in results:
        found = result.accuracy
        scores = {} if found is None else found.evaluation.as_dict()
        lines.append(
            {
                "policy": result.name,
                "users": result.rows.size,
                "items_per_user": result.items.mean(),
                "rows_per_user": result.rows.mean(),
                "most_rows": result.rows.max(),
                "seconds_per_user": result.seconds_per_user,
                "speed_up": speed_up(result, results),
                "predicted_bytes": result.predicted,
                "measured_bytes": result.measured,
                "users_at_once": result.users_at_once,
                "chunk_rows": result.chunk_rows,
                "longest_history": result.longest,
                "limited_by": result.limit,
                "samples": None if found is None else found.items.size,
                "items_per_sample": None if found is None else found.items.mean(),
                "hr": scores.get(f"HR@{args.k}"),
                "hr_error": scores.get(f"HR@{args.k} ±"),
                **shared,
            }
        )
    unfinished = path.with_suffix(".part")
    with unfinished.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    unfinished.replace(path)


def plot(path: Path, results: Sequence[Result], args: argparse.Namespace) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib import ticker

    figure, ((times, memory), (rows, histories)) = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")
    names = [NAMES[result.name] for result in results]
    place = np.arange(len(results))
    times.bar_label(times.bar(names, [result.seconds_per_user for result in results]), fmt="{:.3g}")
    times.set(ylabel="s", title="Time per user")
    for shift, label in ((-0.2, "predicted"), (0.2, "measured")):
        bars = memory.bar(place + shift, [getattr(result, label) / 2**20 for result in results], 0.4, label=label)
        memory.bar_label(bars, fmt="{:,.0f}")
    memory.set(ylabel="MiB", title=f"Peak memory, of {mebibytes(args.budget)} MiB", xticks=place, xticklabels=names)
    memory.margins(y=0.2)
    memory.legend(frameon=False, loc="upper right", ncols=2)
    for result in results:
        share = np.arange(1, result.rows.size + 1) / result.rows.size
        rows.step(np.sort(result.rows), share, where="post", label=NAMES[result.name])
    rows.set(xscale="log", xlabel="rows", ylabel="share of users with at most so many", title="Rows per user")
    rows.set_ylim(0, 1.02)
    rows.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    rows.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,g}"))
    rows.xaxis.set_minor_locator(ticker.NullLocator())
    rows.legend(frameon=False)
    histories.bar_label(histories.bar(names, [result.longest for result in results]), fmt="{:,.0f}")
    histories.set(yscale="log", ylabel="items", title="Longest history that fits")
    for axes in (times, memory, rows, histories):
        axes.spines[["top", "right"]].set_visible(False)
    unfinished = path.with_suffix(".part")
    figure.savefig(unfinished, dpi=120, format="png")
    plt.close(figure)
    unfinished.replace(path)


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    main()
