# SPDX-License-Identifier: Apache-2.0
"""What trained models know of items that nobody has taken yet: runs that held the same items out, side by side.

    python recipes/train.py --stage items --model tiny --head items --item_embeddings --no_separator --data ml-100k \\
        --hold_out_items 0.1 --output_dir runs/both
    python recipes/train.py ... --hold_out_items 0.1 --vector_dropout 0.3 --output_dir runs/dropped
    python recipes/train.py ... --hold_out_items 0.1 --output_dir runs/text        # without --item_embeddings
    python recipes/train.py ... --hold_out_items 0.1 --item_tokens --output_dir runs/ids
    python recipes/cold_items.py runs/both runs/dropped runs/text runs/ids --data ml-100k

Held-out items are those of the data that a run's catalogue lacks; to the model they are new: their titles alone speak
for them. Items of the whole history are left out of the rankings. *Cold*: samples whose target was held out, ranked
among all items, and among the held-out ones alone, where *chance* is what a model has that cannot tell them apart.
*NLL*: minus the log-probability of the target among all items. Of equal scores each is as likely to come first. A run
without an item head scores by titles. Errors are over users; differences are to the first run, on the same samples.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

sys.path.append(str(Path(__file__).resolve().parents[1]))  # an installed patchkern comes first

import patchkern as pk
from patchkern.data import Interactions, Samples, samples_of
from patchkern.data.preparation import add_arguments, load
from patchkern.evaluation import TRAINING_COUNTS, estimate, paired_difference, slices, training_counts
from patchkern.training import TrainableModel, item_log_probs
from recipes import models
from recipes.commands import Parser, check_writable
from recipes.tables import markdown_table
from recipes.training_run import read_arguments

Floats = NDArray[np.floating[Any]]
Bools = NDArray[np.bool_]
_TITLES_AT_ONCE = 64
_ROUNDING = 16


@dataclass(frozen=True)
class Run:
    """A model's measures of each sample, (S,) each; NaN where a sample has none.

    Attributes:
        parameters: how many the model has.
        cold: the ids of the items that it held out.
        chance: ``HR@k`` among the held-out items alone, by chance.
    """

    parameters: int
    cold: NDArray[Any]
    measures: dict[str, NDArray[np.float64]]
    chance: dict[str, NDArray[np.float64]]


def main(argv: Sequence[str] | None = None) -> dict[str, Run]:
    args = parse(argv)
    check_writable(args.output, "--output")
    data = load(args)
    samples = samples_of(data, args.split).spread(args.limit)
    runs: dict[str, Run] = {}
    for name in args.runs:
        runs[name] = measured(name, data, samples, args)
        first = next(iter(runs.values()))
        if not np.array_equal(np.sort(runs[name].cold), np.sort(first.cold)):
            raise ValueError(
                f"runs: expected all to have held the same items out, got {first.cold.size:,} in {args.runs[0]} and "
                f"{'others' if runs[name].cold.size == first.cold.size else f'{runs[name].cold.size:,}'} in {name}"
            )
        print(f"{name}: {runs[name].parameters / 1e6:.1f} M parameters", flush=True)
    parts = slices_of(data, samples, first.cold)
    lines = report(runs, parts, samples, args.k)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write(args.output, runs, parts, samples)
    heading = f"{data}\n\n{samples.users.size:,} {args.split} samples; {first.cold.size:,} items held out"
    text = "\n".join([heading, "", *lines])
    args.output.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    print(f"{text}\n\n{args.output}, {args.output.with_suffix('.md')}", flush=True)
    return runs


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("runs", nargs="+", help="of recipes/train.py with --hold_out_items, or their checkpoints")
    add_arguments(parser, item_text=True)
    parser.add_argument("--split", choices=["test", "val"], default="test")
    parser.add_argument("--limit", type=int, help="so many samples only, spread over all")
    parser.add_argument("--k", type=int, nargs="+", default=[20, 50], help="lengths of the lists (default: 20 50)")
    parser.add_argument(
        "--cut_every",
        type=int,
        help="items that longer histories lose at a time, and a user's samples share the rest (default: as trained)",
    )
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], help="of the weights (default: float32, on a GPU bfloat16)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("runs/cold_items.csv"),
        help="the CSV; the tables go beside it, as .md (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    if args.output.suffix == ".md":
        parser.error(f"--output: expected a name for the CSV, beside which the tables are .md, got {args.output}")
    if min(args.k) < 1:
        parser.error(f"--k: expected at least 1, got {min(args.k)}")
    for name in ("limit", "cut_every"):
        if (given := getattr(args, name)) is not None and given < 1:
            parser.error(f"--{name}: expected at least 1, got {given}")
    if len(set(args.runs)) < len(args.runs):
        parser.error("runs: expected each once")
    if args.item_text is None:
        texts = {run: read_arguments(Path(run)).get("item_text") for run in args.runs}
        if len(set(texts.values())) > 1:
            parser.error(f"runs: expected some that read the same of an item, got {texts}")
        args.item_text = texts[args.runs[0]]
    return args


# ------------------------------------------------------------------ measuring


def measured(name: str, data: Interactions, samples: Samples, args: argparse.Namespace) -> Run:
    """Of one run."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    if not models.is_saved(name):
        raise ValueError(f"runs: expected a run of recipes/train.py, got {name!r}")
    model, _ = models.load_model(name, data.titles, texts=data.texts, dtype=dtype, argument="runs")
    model.to(device).eval()
    catalog, diff = model.catalog, model.catalog_diff
    held_out = np.zeros(len(catalog), bool)
    if diff is not None:
        held_out[catalog.index_of(diff.new)] = True
    if not held_out.any():
        raise ValueError(f"runs: expected some that were trained with --hold_out_items, got {name}, which knows all")
    columns: dict[str, NDArray[np.float64]] = {
        column: np.full(samples.users.size, np.nan)
        for column in ("NLL", *(f"HR@{k}{among}" for k in args.k for among in ("", " among cold", " by chance")))
    }
    policy = models.with_flags(model.policy, {"cut_every": args.cut_every})
    for chosen, scores in scored(model, data, samples, policy):
        part = samples.take(chosen)
        target = catalog.index_of(data.targets(part))
        past = data.before(part)
        seen = np.zeros(scores.shape, bool)
        seen[np.repeat(np.arange(len(past)), past.lengths), catalog.index_of(past.items)] = True
        columns["NLL"][chosen] = nll(scores, target)
        cold = held_out[target]
        for k in args.k:
            columns[f"HR@{k}"][chosen] = hits(scores, ~seen, target, k)
            columns[f"HR@{k} among cold"][chosen[cold]] = hits(scores[cold], held_out & ~seen[cold], target[cold], k)
            candidates = (held_out & ~seen[cold]).sum(axis=1)
            columns[f"HR@{k} by chance"][chosen[cold]] = np.minimum(k / np.maximum(candidates, 1), 1)
    chance = {column: columns.pop(column) for column in list(columns) if column.endswith(" by chance")}
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Run(parameters, catalog.item_ids[held_out], columns, chance)


def scored(
    model: TrainableModel, data: Interactions, samples: Samples, policy: Any
) -> Iterator[tuple[NDArray[np.int64], Floats]]:
    """Some samples at a time, ``(n,)`` which, and ``(n, n_items)`` scores of all items."""
    if model.item_head is not None:
        yield from item_log_probs(model, data.histories, samples, policy)
        return
    for begin in range(0, samples.users.size, _TITLES_AT_ONCE):
        chosen = np.arange(begin, min(begin + _TITLES_AT_ONCE, samples.users.size))
        yield chosen, model.score_items(data.before(samples.take(chosen)), policy)


def hits(scores: Floats, allowed: Bools, target: NDArray[np.integer[Any]], k: int) -> NDArray[np.float64]:
    """``(n,)`` whether each target is among the first k of the ``allowed`` (n, n_items); a share among equal scores."""
    rows = np.arange(target.size)
    own = scores[rows, target][:, None]
    # one vector at two places of a product may give two numbers
    rounding = _ROUNDING * np.finfo(scores.dtype).eps * np.abs(own)
    better = (allowed & (scores > own + rounding)).sum(axis=1)
    equal = (allowed & (np.abs(scores - own) <= rounding)).sum(axis=1)
    share = np.clip((k - better) / np.maximum(equal, 1), 0, 1)
    found: NDArray[np.float64] = np.where(allowed[rows, target], share, 0.0)
    return found


def nll(scores: Floats, target: NDArray[np.integer[Any]]) -> NDArray[np.float64]:
    """``(n,)`` minus the log-probability of each target, by a softmax over the scores."""
    largest = scores.max(axis=1)
    total = np.log(np.exp(scores - largest[:, None]).sum(axis=1, dtype=np.float64)) + largest
    found: NDArray[np.float64] = total - scores[np.arange(target.size), target]
    return found


def slices_of(data: Interactions, samples: Samples, cold: NDArray[Any]) -> dict[str, Bools]:
    """Samples whose target was held out, all others, and these by how often the target occurs in training."""
    ids = data.item_ids
    catalog = pk.Catalog.from_token_ids(np.zeros(ids.size, np.int64), np.arange(ids.size + 1), ids)
    targets = data.targets(samples)
    is_cold = np.isin(targets, cold)
    counts = training_counts(data, catalog)[catalog.index_of(targets)]
    taken = {f"{name} in training": chosen & ~is_cold for name, chosen in slices(counts, TRAINING_COUNTS).items()}
    return {"all": np.ones(is_cold.size, bool), "warm": ~is_cold, "cold": is_cold, **taken}


# ------------------------------------------------------------------ tables


def report(runs: dict[str, Run], parts: dict[str, Bools], samples: Samples, ks: Sequence[int]) -> list[str]:
    """Markdown: the runs, the runs by training count, and differences to the first run."""

    def cell(values: NDArray[np.float64], chosen: Bools) -> str:
        return str(estimate(values[chosen], samples.users[chosen])) if chosen.any() else ""

    def sized(name: str) -> str:
        return f"{name} ({int(parts[name].sum()):,})"

    k = ks[0]
    cold, warm = parts["cold"], parts["warm"]
    chance = next(iter(runs.values())).chance[f"HR@{k} by chance"][cold]
    among = f"HR@{k} among cold, chance {chance.mean():.3f}" if cold.any() else f"HR@{k} among cold"
    header = ["", "parameters", f"{sized('warm')} HR@{k}", "NLL", f"{sized('cold')} HR@{k}", among, "NLL"]
    rows = [header]
    for name, run in runs.items():
        hr, known, own = (run.measures[column] for column in (f"HR@{k}", "NLL", f"HR@{k} among cold"))
        cells = [cell(hr, warm), cell(known, warm), cell(hr, cold), cell(own, cold), cell(known, cold)]
        rows.append([name, f"{run.parameters / 1e6:.1f} M", *cells])
    lines = markdown_table(rows)
    taken = [part for part in parts if part not in ("all", "warm", "cold")]
    for measure in (f"HR@{k}", "NLL"):
        rows = [[measure, *map(sized, taken)]]
        rows += [[name, *(cell(run.measures[measure], parts[part]) for part in taken)] for name, run in runs.items()]
        lines += ["", *markdown_table(rows)]
    first, *others = runs
    if others:
        compared = [(f"HR@{n}", "warm") for n in ks] + [("NLL", "warm")] + [(f"HR@{n} among cold", "cold") for n in ks]
        rows = [[f"minus {first}", *(f"{part} {measure}" for measure, part in compared)]]
        for name in others:
            cells = []
            for measure, part in compared:
                one, other = (runs[run].measures[measure][parts[part]] for run in (name, first))
                users = samples.users[parts[part]]
                cells.append(str(paired_difference(one, other, users)) if one.size else "")
            rows.append([name, *cells])
        lines += ["", *markdown_table(rows)]
    return lines


def write(path: Path, runs: dict[str, Run], parts: dict[str, Bools], samples: Samples) -> None:
    """A line per run, slice and measure, under a temporary name first."""
    unfinished = path.with_suffix(".part")
    with unfinished.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["run", "parameters", "slice", "samples", "users", "measure", "mean", "error"])
        for name, run in runs.items():
            for part, chosen in parts.items():
                for measure, values in {**run.measures, **run.chance}.items():
                    known = chosen & np.isfinite(values)
                    users = samples.users[known]
                    if known.any():
                        numbers = ["" if value != value else value for value in estimate(values[known], users)]
                        sizes = [users.size, np.unique(users).size]
                        writer.writerow([name, run.parameters, part, *sizes, measure, *numbers])
    unfinished.replace(path)


if __name__ == "__main__":
    main()
