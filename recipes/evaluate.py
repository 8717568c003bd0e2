# SPDX-License-Identifier: Apache-2.0
"""Recommend to the users of a data set and compare with what they took next: HR, NDCG, MRR, likelihood of the target.

    python recipes/evaluate.py runs/sessions --data synthetic
    python recipes/evaluate.py runs/sessions --data ml-1m --exclude_seen --num_beams 40
    python recipes/evaluate.py runs/sessions --data ml-1m --search diverse     # the paper's search, counted by item
    python recipes/evaluate.py runs/sessions --data ml-1m --metric paper       # the paper's search and its counting
    python recipes/evaluate.py runs/sessions --data ml-1m --exclude_seen --prior transitions
    python recipes/evaluate.py runs/text --data ml-1m --exclude_seen --max_items 20     # what do fewer rows cost?
    python recipes/evaluate.py runs/head --data ml-1m --exclude_seen --search items --prior transitions linear
    python recipes/evaluate.py runs/head --data ml-1m --exclude_seen --prior linear runs/other-seed runs/hstu
    python recipes/evaluate.py Llama-3.2-1B-Instruct --data ml-1m --policy text --limit 500     # zero-shot
    python recipes/evaluate.py runs/head --data ml-1m --split_by leave_two_out --targets all --ks 5 10 50 200

--prior adds to the model's scores what else is known, by a weight that the validation split decides: fitted in seconds
(popularity, transitions, linear), or another trained model, by the folder of its run, read as it was trained.

Errors are over users, whose samples are not independent. The yardsticks, which any recommender should beat, are
computed on the same samples; so is a prior alone. Each sample asks for one item, knowing those before it; with
--targets all for all that the user takes in the split, knowing what came before, and Recall@k says which share of them
is found (of one target it is HR@k). "Unseen" leaves out the items of the whole history with
--exclude_seen, as the model then does, else those among the latest 100. NLL title, where titles are searched: minus
the log-probability of the target's title, all its tokens together; NLL item: of the item, by the item head or a
prior. --slices adds tables by length of history and by how often the target occurs in training. One line per sample
goes to a CSV, of which recipes/compare.py compares any two. --run FILE writes the lists for ranx, ir-measures and
other readers of the format of TREC: FILE of the model alone, FILE-NAME with priors, FILE.qrels of the targets; samples
are numbered from 0 as the lines of the CSV.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path.append(str(Path(__file__).resolve().parents[1]))  # an installed patchkern comes first

import patchkern as pk
from patchkern.batch.policy_kinds import AnyPolicy
from patchkern.budget.search import parse_bytes
from patchkern.data import Interactions, Samples, samples_of
from patchkern.data.preparation import add_arguments, load
from patchkern.evaluation import Evaluation, most_popular, transitions
from patchkern.evaluation.metrics import METRICS, evaluate
from patchkern.evaluation.trec import check_words, write_qrels, write_run
from patchkern.ops.backends import describe as describe_backend
from patchkern.search.arguments import SEARCHES
from patchkern.search.protocol import usual_search
from patchkern.search.recommend import generate_titles
from patchkern.training import TrainableModel, find_model, target_nll
from patchkern.training.likelihood import ROWS_PER_PASS
from recipes import models
from recipes.commands import Parser, check_writable
from recipes.prior_weights import fitted_weights, together, weights_beside_head, with_priors
from recipes.priors import ABOUT, FIT_LIMIT, check_prior, make_priors
from recipes.ranking import Lists, by_item_head, by_prior, prior_alone, recommend
from recipes.results import KS, Result, Results
from recipes.training_run import read_arguments

POLICIES = ("text", "items", "sessions")
BATCH_SIZE = 64


def main(argv: Sequence[str] | None = None) -> dict[str, list[Evaluation]]:
    args = parse(argv)
    path = output_path(args)
    check_writable(path, "--output")
    if args.run:
        check_writable(Path(args.run), "--run")
        if Path(args.run).absolute() == path.absolute():
            raise ValueError(f"--run: expected another file than the CSV's, got {args.run!r}")
    data = load(args)
    if args.run:
        check_words("--run", data.item_ids.tolist())
    if args.k > data.num_items:
        raise ValueError(f"--ks: expected at most the {data.num_items:,} items of {data.name}, got {args.k}")
    samples, targets = chosen_samples(data, args)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # flash attention takes no float32
    dtype = args.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    words = models.words_of(data)
    model, _ = models.load_model(
        args.checkpoint,
        data.titles,
        texts=data.texts,
        dtype=getattr(torch, dtype),
        words=words,
        argument="checkpoint",
    )
    model.to(device).eval()
    if args.item_text is not None and "titles" not in model.learns:
        raise ValueError(
            f"--item_text: expected none with {type(model).__name__}, which reads ids, got {args.item_text!r}"
        )
    if args.search is None:
        args.search = usual_search(model)
    choose_search(args)
    print(f"patchkern {pk.__version__}, torch {torch.__version__}, transformers {transformers.__version__}")
    print(f"BACKEND {describe_backend(model.device)}, {dtype}")
    policy = chosen_policy(model, args)
    if args.one_time:
        if not isinstance(model, pk.RecurrentMemory) or not isinstance(policy, pk.PreferenceMemory):
            raise ValueError(f"--one_time: expected a model with a memory, got {type(model).__name__} and {policy}")
        model.one_time = True
    rows = pk.row_counts(model.catalog, data.before(samples), policy, model.prompt)
    first = pk.build_layout(model.catalog, data.before(samples.spread(1000)), policy, model.prompt)
    results = Results(data, samples, model.catalog, targets, args.ks)
    print(f"{data}\n{args.checkpoint}: {policy}, {samples.users.size:,} {args.split} samples", end="")
    print(f" of {results.num_users:,} users")
    print(f"{rows.mean():.1f} rows a prompt, compression {first.compression_ratio:.2f}", flush=True)

    options: dict[str, Any] = {"batch_size": args.batch_size, "memory_budget": args.memory_budget}
    priors = make_priors(args.prior, data, model.catalog, dtype=model.dtype, device=device, **options)
    if by_head(args):
        seconds = ranked_by_head(results, model, policy, priors, args, path)
    else:
        seconds = searched(results, model, policy, priors, args, path)
    yardsticks(results, None if args.exclude_seen else 100)

    print(f"{samples.users.size / seconds:.2f} users/s, metric {args.metric}; yardsticks and priors alone by item")
    print(f"± one standard error over {results.num_users:,} users\n")
    parts = [results.table(), results.further()]
    if args.metric == "strict":
        parts.append(results.differences())
    for part in parts:
        print("\n".join([*part, ""]))
    if args.slices:
        sliced = path.with_name(f"{path.stem}-slices{path.suffix}")
        results.write_slices(sliced)
        print("\n".join([*results.by_slices(), "", f"all measures by slices: {sliced}"]))
    if args.run:
        write_runs(results, Path(args.run))
    ambiguous = results["this model"].found[-1].num_ambiguous
    print(f"{ambiguous:,} samples whose target shares its title with another item; per sample: {path}", flush=True)
    return {name: result.found for name, result in results.items()}


def chosen_samples(data: Interactions, args: argparse.Namespace) -> tuple[Samples, pk.Histories | None]:
    """The samples of the split, at most --limit; with --targets all one of each user, and all its targets."""
    samples = samples_of(data, args.split)
    if args.targets == "each":
        return samples.spread(args.limit), None
    samples = data.target_sets(args.split)[0].spread(args.limit)
    ends = data.ranges[args.split][samples.users, 1]
    return samples, data.histories.between(samples.users, samples.positions, ends)


def choose_search(args: argparse.Namespace) -> None:
    """What of a search is not given; an error where something is that the item head's rankings have no use for."""
    if by_head(args):
        for name in ("num_beams", "batch_size", "memory_budget"):
            if (given := getattr(args, name)) is not None:
                raise ValueError(
                    f"--{name}: expected none with --search items, which ranks all items, of {ROWS_PER_PASS:,} rows at "
                    f"a time, got {given!r}"
                )
    args.num_beams = args.num_beams or args.k
    args.batch_size = args.batch_size or BATCH_SIZE


def by_head(args: argparse.Namespace) -> bool:
    """Whether all items are ranked, and no titles are searched."""
    return bool(args.search == "items" and args.metric == "strict")


def output_path(args: argparse.Namespace) -> Path:
    """--output, else a file beside a model that patchkern saved, or below runs/ for any other."""
    name = f"{args.split}-{args.metric}.csv"
    if args.output:
        return Path(args.output)
    if models.is_saved(args.checkpoint):
        return find_model(args.checkpoint, "checkpoint") / name
    return Path("runs") / f"{Path(args.checkpoint).name}-{args.policy}" / name


def write_runs(results: Results, path: Path) -> None:
    """The lists of the model, alone and with priors, and the targets, in the format of TREC."""
    write_qrels(path.with_name(f"{path.name}.qrels"), list(results.targets))
    for name, result in results.items():
        if name == "this model" or name.startswith("+ "):
            tag = "model" if name == "this model" else re.sub(r"[^\w.]+", "-", name).strip("-")
            file = path if name == "this model" else path.with_name(f"{path.name}-{tag}")
            write_run(file, result.lists, tag=tag)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("checkpoint", help="a run of recipes/train.py, one of its checkpoints, or any causal LM")
    add_arguments(parser, item_text=True)
    parser.add_argument("--split", choices=["test", "val"], default="test")
    parser.add_argument("--limit", type=int, help="so many samples only, spread over all")
    parser.add_argument(
        "--targets",
        choices=["each", "all"],
        default="each",
        help="one item next, or all that the user takes in the split",
    )
    parser.add_argument("--ks", type=int, nargs="+", default=KS, help="list lengths counted (default: 10 20)")
    parser.add_argument("--metric", choices=METRICS, default="strict", help='"paper" decodes with diverse search')
    parser.add_argument("--search", choices=SEARCHES, help="(default: beam, or items where the run learned no titles)")
    parser.add_argument(
        "--num_beams", type=int, help="of all searches but items (default: the largest of --ks, which is the least)"
    )
    parser.add_argument("--policy", choices=POLICIES, help="how histories are read (default: as trained)")
    parser.add_argument("--max_items", type=int, help="latest items of a history (default: as trained, else 100)")
    parser.add_argument(
        "--cut_every",
        type=int,
        help="items that longer histories lose at a time, and a user's samples share the rest (default: as trained)",
    )
    parser.add_argument(
        "--keep_text", type=int, help="latest items that stay text beside item patches (default: as trained, else 5)"
    )
    parser.add_argument("--group_size", type=int, help="items of a session patch (default: as trained, else 5)")
    parser.add_argument("--one_time", action="store_true", help="make memories in one pass over all old items")
    parser.add_argument("--exclude_seen", action="store_true", help="leave out items of the user's history")
    parser.add_argument("--prior", nargs="+", default=[], help=f"another row, with these priors: {ABOUT}")
    parser.add_argument(
        "--prior_weight", nargs="+", type=float, help="of each prior (default: fitted on the validation split)"
    )
    parser.add_argument("--fit_limit", type=int, help=f"validation samples to fit weights on (default: {FIT_LIMIT})")
    parser.add_argument("--slices", action="store_true", help="also by length of history and by count in training")
    parser.add_argument(
        "--batch_size", type=int, help=f"users searched together, of all searches but items (default: {BATCH_SIZE})"
    )
    parser.add_argument("--memory_budget", help='of the same, such as "40GiB": fewer users together where needed')
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], help="of the weights (default: float32, on a GPU bfloat16)"
    )
    parser.add_argument("--output", help="the CSV (default: beside the model)")
    parser.add_argument("--run", metavar="FILE", help="also the lists and, as FILE.qrels, the targets in TREC's format")
    args = parser.parse_args(argv)
    if args.item_text is None:
        args.item_text = read_arguments(Path(args.checkpoint)).get("item_text")
    least = {"limit": 1, "max_items": 1, "cut_every": 1, "keep_text": 0, "group_size": 1, "batch_size": 1}
    for name, smallest in least.items():
        value = getattr(args, name)
        if value is not None and value < smallest:
            parser.error(f"--{name}: expected at least {smallest}, got {value}")
    if args.memory_budget is not None:
        try:
            parse_bytes("--memory_budget", args.memory_budget)
        except ValueError as error:
            parser.error(str(error))
    check_prior(parser, args)
    if min(args.ks) < 1 or len(set(args.ks)) < len(args.ks):
        parser.error(f"--ks: expected numbers of at least 1, each once, got {' '.join(map(str, args.ks))}")
    if args.metric == "paper" and args.run:
        parser.error("--run: expected none with --metric paper, whose lists are of titles")
    if args.metric == "paper" and (args.exclude_seen or args.num_beams is not None or args.targets == "all"):
        parser.error(
            "--metric paper: expected none of --exclude_seen, --num_beams and --targets all, which its protocol does "
            "not have"
        )
    if args.metric == "paper" and args.search not in (None, "diverse"):
        parser.error(f"--search: expected diverse with --metric paper, which decodes so, got {args.search}")
    args.ks = sorted(args.ks)
    args.k = args.ks[-1]
    if args.num_beams is not None and args.num_beams < args.k:
        parser.error(f"--num_beams: expected at least {args.k}, the length of the lists, got {args.num_beams}")
    if args.policy is None and not models.is_saved(args.checkpoint):
        parser.error("--policy: expected one with a model that patchkern did not save, which has none")
    return args


def chosen_policy(model: TrainableModel, args: argparse.Namespace) -> AnyPolicy:
    """--policy, else the model's; with what is asked for of it."""
    given = {name: getattr(args, name) for name in ("max_items", "cut_every", "keep_text", "group_size")}
    policy: Any = model.policy
    if args.policy is not None:
        kinds = {"text": pk.TextOnly(), "items": pk.ItemPatches(), "sessions": pk.SessionPatches(align="start")}
        trained = {} if policy is None else {field.name: getattr(policy, field.name) for field in fields(policy)}
        if type(policy) is not type(kinds[args.policy]):
            shared = ("max_items", "cut_every")
            policy = replace(kinds[args.policy], **{name: trained[name] for name in shared if name in trained})
    if policy is None:
        raise ValueError(f"--policy: expected one, as {args.checkpoint!r} was saved without")
    changed: AnyPolicy = models.with_flags(policy, given)
    return changed


# ------------------------------------------------------------------ recommending


def searched(
    results: Results,
    model: TrainableModel,
    policy: AnyPolicy,
    priors: Mapping[str, Any],
    args: argparse.Namespace,
    path: Path,
) -> float:
    """The model alone and with all priors together, by searches for titles, and each prior; seconds of the first."""
    data, samples = results.data, results.samples
    started = time.perf_counter()
    alone = recommended(results, model, policy, args)
    seconds = time.perf_counter() - started
    if args.metric == "strict" and not results.has_several:
        alone.nll["NLL title"] = target_nll(model, data.histories, samples, policy)
        if model.item_head is not None:
            alone.nll["NLL item"] = target_nll(model, data.histories, samples, policy, head="items")
    keep(results, "this model", alone, path)
    if priors:
        weights = fitted_weights(model, data, policy, priors, args)
        prior = together(priors, weights)
        found = recommended(results, model, policy, args, prior=prior, prior_weight=1.0)
        keep(results, with_priors(weights), found, beside(path, priors))
    for name, prior in priors.items():
        scored = by_prior(data, model.catalog, samples, prior, args.k, unseen=args.exclude_seen)
        results[prior_alone(name)] = counted(results, scored.ranking.as_lists(), {"NLL item": scored.nll})
    return seconds


def ranked_by_head(
    results: Results,
    model: TrainableModel,
    policy: AnyPolicy,
    priors: Mapping[str, Any],
    args: argparse.Namespace,
    path: Path,
) -> float:
    """The model alone, with each prior and with all of them, and each prior, from one pass; its seconds."""
    data, samples = results.data, results.samples
    sets = [{name: priors[name]} for name in priors]
    if len(priors) > 1:
        sets.append(dict(priors))
    rows: dict[str, dict[str, float]] = {"this model": {}}
    rows |= {with_priors(weights): weights for weights in weights_beside_head(model, data, policy, sets, args)}
    started = time.perf_counter()
    found = by_item_head(model, data, samples, policy, args.k, rows, priors, unseen=args.exclude_seen)
    seconds = time.perf_counter() - started
    for name, scored in found.items():
        result = counted(results, scored.ranking.as_lists(), {"NLL item": scored.nll})
        if name in rows:
            keep(results, name, result, beside(path, rows[name]) if rows[name] else path)
        else:
            results[name] = result
    return seconds


def keep(results: Results, name: str, result: Result, path: Path) -> None:
    """Print a result before it is written: a failing write must not take it along."""
    results[name] = result
    print(f"{name}: {'; '.join(map(str, result.found))}", flush=True)
    results.write(name, path)


def beside(path: Path, priors: Mapping[str, Any]) -> Path:
    """The file of a result with priors."""
    return path.with_name(f"{path.stem}-{'-'.join(priors)}{path.suffix}")


def recommended(
    results: Results, model: TrainableModel, policy: AnyPolicy, args: argparse.Namespace, **options: Any
) -> Result:
    """One evaluation for all k, or, as the paper decodes anew for each k, one per k."""
    data, samples = results.data, results.samples
    shared = {"batch_size": args.batch_size, "memory_budget": args.memory_budget}
    if args.metric == "paper":
        decoded = [generate_titles(model, data.before(samples), policy, num_beams=k, **shared) for k in args.ks]
        evaluations = [
            evaluate(lists, data.targets(samples), [k], "paper", catalog=model.catalog, users=samples.users)
            for k, lists in zip(args.ks, decoded, strict=True)
        ]
        return Result(evaluations, decoded[-1])
    options |= {"k": args.k, "num_beams": args.num_beams, "search": args.search, "exclude_seen": args.exclude_seen}
    return counted(results, recommend(model, data, samples, policy, **shared, **options))


def counted(results: Results, lists: Lists, nll: dict[str, Any] | None = None) -> Result:
    """Without likelihoods where samples have several targets: these are of the one that came next."""
    return Result([results.evaluate(lists)], lists, {} if results.has_several else nll or {})


def yardsticks(results: Results, max_items: int | None) -> None:
    """Recommenders without a model."""
    data, samples, k = results.data, results.samples, max(results.ks)
    rankings = {
        "most popular": most_popular(data, samples, k),
        "most popular, unseen": most_popular(data, samples, k, unseen=True, max_items=max_items),
        "transitions, unseen": transitions(data, samples, k, max_items=max_items),
    }
    for name, ranking in rankings.items():
        results[name] = counted(results, ranking.as_lists())


if __name__ == "__main__":
    main()
