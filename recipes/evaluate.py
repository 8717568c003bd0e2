# SPDX-License-Identifier: Apache-2.0
"""Recommend to the users of a data set and compare with what they took next: HR and NDCG at 10 and 20.

    python recipes/evaluate.py runs/sessions --data synthetic
    python recipes/evaluate.py runs/sessions --data ml-1m --exclude_seen --num_beams 40
    python recipes/evaluate.py runs/sessions --data ml-1m --search diverse     # the paper's search, counted by item
    python recipes/evaluate.py runs/sessions --data ml-1m --metric paper       # the paper's search and its counting
    python recipes/evaluate.py runs/sessions --data ml-1m --exclude_seen --prior transitions
    python recipes/evaluate.py runs/text --data ml-1m --exclude_seen --max_items 20     # what do fewer rows cost?

The yardsticks, which any recommender should beat, are computed on the same samples. "Unseen" leaves out the items of
the whole history with --exclude_seen, as the model then does, else those among the latest 100. One line per user goes
to a CSV.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoTokenizer

sys.path.append(str(Path(__file__).resolve().parents[1]))  # an installed patchkern comes first

import patchkern as pk
from patchkern.batch.policies import AnyPolicy
from patchkern.data import Interactions, Samples, samples_of
from patchkern.data.preparation import add_arguments, load
from patchkern.evaluation import most_popular, transitions
from patchkern.evaluation.metrics import METRICS, Evaluation, evaluate
from patchkern.ops.backends import describe as describe_backend
from patchkern.search.arguments import SEARCHES
from patchkern.search.recommend import generate_titles
from patchkern.training import find_model

KS = (10, 20)
PRIORS = {"popularity": pk.PopularityPrior, "transitions": pk.TransitionPrior}


def main(argv: Sequence[str] | None = None) -> dict[str, list[Evaluation]]:
    args = parse(argv)
    folder = find_model(args.checkpoint, "checkpoint")
    path = Path(args.output) if args.output else folder / f"{args.split}-{args.metric}.csv"
    check_writable(path)
    data = load(args)
    samples = Samples(*(column[: args.limit] for column in samples_of(data, args.split)))

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    catalog = pk.Catalog.from_titles(data.titles, tokenizer)
    model = pk.PatchedCausalLM.from_pretrained(folder, catalog, dtype=getattr(torch, args.dtype))
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    print(f"patchkern {pk.__version__}, torch {torch.__version__}, transformers {transformers.__version__}")
    print(f"BACKEND {describe_backend(model.device)}")
    policy = chosen_policy(model, args)
    rows = pk.build_layout(catalog, data.before(samples), policy, model.prompt)
    print(f"{data}\n{folder}: {policy}, {samples.users.size:,} {args.split} samples")
    print(
        f"{rows.num_rows / samples.users.size:.1f} rows a prompt, compression {rows.compression_ratio:.2f}", flush=True
    )

    started = time.perf_counter()
    found = recommend(model, data, samples, policy, args)
    seconds = time.perf_counter() - started
    results = {"this model": found}
    say(results)
    write_csv(path, data, samples, found)
    if args.prior != "none":
        prior = PRIORS[args.prior](data, catalog)
        weight = fitted_weight(model, data, policy, prior, args) if args.prior_weight is None else args.prior_weight
        found = recommend(model, data, samples, policy, args, prior=prior, prior_weight=weight)
        results[f"+ {args.prior} (weight {weight:g})"] = found
        say(results)
        write_csv(path.with_name(f"{path.stem}-{args.prior}{path.suffix}"), data, samples, found)
    results |= yardsticks(data, samples, catalog, None if args.exclude_seen else 100)

    print(f"{samples.users.size / seconds:.2f} users/s, metric {args.metric}; yardsticks by item\n")
    print("\n".join(table(results)))
    ambiguous = found[-1].num_ambiguous
    print(f"\n{ambiguous:,} samples whose target shares its title with another item; per user: {path}", flush=True)
    return results


def say(results: dict[str, list[Evaluation]]) -> None:
    """The latest result, before it is written: a failing write must not take it along."""
    name, found = list(results.items())[-1]
    print(f"{name}: {'; '.join(map(str, found))}", flush=True)


def check_writable(path: Path) -> None:
    """Raise an OSError where the file could not be written, which is better known before the search."""
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        message = f"--output: expected a place for {path.name} that can be written, got {os.fspath(path.parent)!r}"
        raise type(error)(error.errno, f"{message}: {error.strerror}") from error


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a run of recipes/train.py, or one of its checkpoints")
    add_arguments(parser)
    parser.add_argument("--split", choices=["test", "val"], default="test")
    parser.add_argument("--limit", type=int, help="the first so many samples only")
    parser.add_argument("--metric", choices=METRICS, default="strict", help='"paper" decodes with diverse search')
    parser.add_argument("--search", choices=SEARCHES, default="beam")
    parser.add_argument("--num_beams", type=int, default=max(KS), help="of both searches; at least %(default)s")
    parser.add_argument("--max_items", type=int, help="latest items of a history (default: as trained)")
    parser.add_argument("--exclude_seen", action="store_true", help="leave out items of the user's history")
    parser.add_argument("--prior", choices=["none", *PRIORS], default="none", help="another row, with this prior")
    parser.add_argument("--prior_weight", type=float, help="of the prior (default: fitted on the validation split)")
    parser.add_argument(
        "--fit_limit", type=int, default=1000, help="validation samples to fit on (default: %(default)s)"
    )
    parser.add_argument("--batch_size", type=int, default=64, help="users searched together")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the weights")
    parser.add_argument("--output", help="the CSV (default: beside the model)")
    args = parser.parse_args(argv)
    for name in ("limit", "max_items"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name}: expected at least 1, got {getattr(args, name)}")
    check_prior(parser, args)
    if args.num_beams < max(KS):
        parser.error(f"--num_beams: expected at least {max(KS)}, the length of the lists, got {args.num_beams}")
    if args.metric == "paper" and (args.exclude_seen or args.num_beams != max(KS)):
        parser.error(
            "--metric paper: expected neither --exclude_seen nor --num_beams, which its protocol does not have"
        )
    return args


def check_prior(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.fit_limit < 1:
        parser.error(f"--fit_limit: expected at least 1, got {args.fit_limit}")
    if args.prior == "none":
        if args.prior_weight is not None:
            parser.error("--prior_weight: expected a --prior that it weighs")
        return
    if args.metric == "paper" or args.search == "diverse":
        parser.error("--prior: expected none with --metric paper or --search diverse, whose protocol has none")
    if args.prior_weight is None and args.split == "val":
        parser.error("--prior_weight: expected with --split val, or it would be fitted to the samples it is shown on")
    if args.prior_weight is not None and not 0 <= args.prior_weight < float("inf"):
        parser.error(f"--prior_weight: expected at least 0, got {args.prior_weight}")


def chosen_policy(model: pk.PatchedCausalLM, args: argparse.Namespace) -> AnyPolicy:
    """The model's, with fewer items or more if that is asked for."""
    if model.policy is None:
        raise ValueError(f"checkpoint: expected a model saved with its policy, got {args.checkpoint!r} without one")
    policy: Any = model.policy
    return policy if args.max_items is None else replace(policy, max_items=args.max_items)


def fitted_weight(
    model: pk.PatchedCausalLM, data: Interactions, policy: AnyPolicy, prior: Any, args: argparse.Namespace
) -> float:
    """The best on validation samples, spread evenly over the split."""
    samples = data.samples("val")
    if not samples.users.size:
        raise ValueError("--prior_weight: expected one for data without validation samples to fit it on")
    chosen = np.unique(np.linspace(0, samples.users.size - 1, args.fit_limit).astype(np.int64))
    samples = Samples(*(column[chosen] for column in samples))
    fit = pk.fit_prior_weight(
        model,
        data.before(samples),
        data.targets(samples),
        policy,
        prior,
        k=max(KS),
        exclude_seen=args.exclude_seen,
        batch_size=args.batch_size,
    )
    curve = "  ".join(f"{weight:g}: {found.ndcg(max(KS)):.4f}" for weight, found in fit.curve.items())
    print(f"{args.prior}: NDCG@{max(KS)} on {chosen.size:,} validation samples by weight: {curve}", flush=True)
    return fit.weight


def recommend(
    model: pk.PatchedCausalLM,
    data: Interactions,
    samples: Samples,
    policy: AnyPolicy,
    args: argparse.Namespace,
    **options: Any,
) -> list[Evaluation]:
    """One evaluation for all k, or, as the paper decodes anew for each k, one per k."""
    histories, targets = data.before(samples), data.targets(samples)
    if args.metric == "paper":
        return [
            evaluate(
                generate_titles(model, histories, policy, num_beams=k, batch_size=args.batch_size),
                targets,
                [k],
                "paper",
                catalog=model.catalog,
            )
            for k in KS
        ]
    lists = model.recommend(
        histories,
        policy,
        k=max(KS),
        num_beams=args.num_beams,
        search=args.search,
        exclude_seen=args.exclude_seen,
        batch_size=args.batch_size,
        **options,
    )
    return [evaluate(lists, targets, KS, catalog=model.catalog)]


def yardsticks(
    data: Interactions, samples: Samples, catalog: pk.Catalog, max_items: int | None
) -> dict[str, list[Evaluation]]:
    """Recommenders without a model, counted by item."""
    k, targets = max(KS), data.targets(samples)
    rankings = {
        "most popular": most_popular(data, samples, k),
        "most popular, unseen": most_popular(data, samples, k, unseen=True, max_items=max_items),
        "transitions, unseen": transitions(data, samples, k, max_items=max_items),
    }
    return {name: [evaluate(r.as_lists(), targets, KS, catalog=catalog)] for name, r in rankings.items()}


def table(results: dict[str, list[Evaluation]]) -> list[str]:
    rows = {
        name: {key: value for part in parts for key, value in part.as_dict().items()} for name, parts in results.items()
    }
    width = 2 + max(map(len, rows))
    columns = [f"{measure}@{k}" for measure in ("HR", "NDCG") for k in KS]
    lines = ["".ljust(width) + "".join(column.rjust(18) for column in columns)]
    for name, row in rows.items():
        cells = [f"{row[column]:.4f} ± {row[column + ' ±']:.4f}".rjust(18) for column in columns]
        lines.append(name.ljust(width) + "".join(cells))
    return lines


def write_csv(path: Path, data: Interactions, samples: Samples, found: Sequence[Evaluation]) -> None:
    """One line per sample; a rank of 0: not in the list. With one list per k, ``rank`` is that of the longest."""
    hits: dict[str, Any] = {f"hit@{k}": part.hits(k).astype(int) for part in found for k in part.ks}
    columns = {
        "user": data.user_ids[samples.users],
        "position": samples.positions,
        "target": data.targets(samples),
        "rank": found[-1].ranks,
        **hits,
        "shared_title": found[-1].ambiguous.astype(int),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    with unfinished.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(zip(*(column.tolist() for column in columns.values()), strict=True))
    unfinished.replace(path)


if __name__ == "__main__":
    main()
