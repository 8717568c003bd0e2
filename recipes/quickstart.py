# SPDX-License-Identifier: Apache-2.0
"""The whole of patchkern in a few minutes on a CPU: data, training, evaluation, recommendations, a report.

    python recipes/quickstart.py                                  # synthetic users, under 5 minutes on 2 cores
    python recipes/quickstart.py --data path/to/ml-100k           # a data set of your own, under 20 minutes
    make quickstart DATA=path/to/ml-100k                          # the same, setting everything up first

Small language models are trained from random weights, all targets of a user in one pass. Three learn titles: one
reads histories as text, one as item patches, and the latter goes on with session patches. A fourth has an item head:
it reads item patches, learns which item comes next from the row of the one before, and ranks all items in one
product. All of them recommend to the same test users, alone and with item-to-item transitions as a prior whose weight
is fitted on the validation split, beside yardsticks that know no titles at all. The report with its plots is written
to runs/<name>/report.md, each model to a folder beside it, which recipes/evaluate.py takes. How the settings were
chosen is told in recipes/LOG.md.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PrinterCallback, ProgressCallback

# after everything else: an installed patchkern comes first
sys.path.append(str(Path(__file__).resolve().parents[1]))

import patchkern as pk
from patchkern.data import Interactions, Samples
from patchkern.data.preparation import add_arguments, load
from patchkern.evaluation import metrics, most_popular, transitions
from patchkern.models.scratch import fit_tokenizer, scratch_model, scratch_prompt
from patchkern.ops.backends import describe as describe_backend
from patchkern.training import SETTINGS, PatchTrainer
from recipes.commands import Parser
from recipes.ranking import by_prior
from recipes.report import KS, Lists, Model, Report

# synthetic users choose by the order of their history; a short run needs many steps, and has no time to overfit
DEFAULTS = {
    "synthetic": {
        "epochs": 2.0,
        "session_epochs": 0.25,
        "learning_rate": 1e-3,
        "rows_per_pass": 1152,
        "dropout": 0.1,
        "jitter": 0.0,
        "fit_limit": 300,
    },
    "real": {
        "epochs": 8.0,
        "session_epochs": 1.0,
        "learning_rate": SETTINGS["scratch"].learning_rate,
        "rows_per_pass": 3456,
        "dropout": SETTINGS["scratch"].dropout,
        "jitter": SETTINGS["scratch"].jitter,
        "fit_limit": 1000,
    },
}


@dataclass(frozen=True)
class Stage:
    """One training run: the stage it goes on from, how histories are compressed, how often each target is seen."""

    name: str
    reads: str
    after: str | None
    policy: pk.Policy
    epochs: float
    learning_rate: float
    head: str = "titles"
    """what it learns and is searched by"""


def main(argv: Sequence[str] | None = None) -> Report:
    command = sys.argv[1:] if argv is None else list(argv)
    args = parse(command)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    data = load(args)
    folder = Path(args.output) / (args.name or data.name)
    folder.mkdir(parents=True, exist_ok=True)
    say(f"{data}\n{backend_line()}")

    tokenizer = fit_tokenizer(data.titles.values(), args.vocab_size)
    catalog = pk.Catalog.from_titles(data.titles, tokenizer)
    prior = pk.TransitionPrior(data, catalog)
    chosen = data.samples(args.split).spread(args.limit)
    # the prior's weight is fitted on the validation split, and would flatter there
    to_fit = data.samples("val").spread(args.fit_limit) if args.split == "test" else None
    popular, yardsticks = without_model(data, catalog, chosen, prior if to_fit else None)

    models: list[Model] = []
    model = None
    for stage in plan(args):
        if model is None or stage.after is None:
            model = new_model(tokenizer, catalog, stage, args)
        seconds, targets = train(model, data, stage, args, folder)
        own = folder / stage.name.replace(" ", "-")
        model.save_pretrained(own, tokenizer=tokenizer)
        found = evaluate(model, data, chosen, stage, own, seconds, targets)
        models.append(found if to_fit is None else with_prior(model, data, found, stage, chosen, to_fit, prior))

    report = Report(
        data=data,
        source=args.data,
        samples=chosen,
        split=args.split,
        yardsticks=yardsticks,
        popular=popular,
        models=models,
        fitted_on=to_fit,
        num_examples=args.examples,
        command=command,
        settings=vars(args),
        backend=backend_line(),
        whole_split=chosen.users.size == data.samples(args.split).users.size,
    )
    say("\n".join(["", *report.summary()]))
    say(f"report: {report.write(folder)}")
    return report


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    data = parser.add_argument_group("data")
    add_arguments(data, default="synthetic")
    data.add_argument("--split", default="test", choices=["val", "test"], help="val is the one to tune on")
    data.add_argument("--limit", type=int, help="evaluate on so many of the samples only")
    data.add_argument(
        "--fit_limit", type=int, help="validation samples that fit the prior's weight (default: 1000, synthetic 300)"
    )
    data.add_argument("--examples", type=int, default=3, help="users whose recommendations are printed")
    model = parser.add_argument_group("model and training")
    model.add_argument("--vocab_size", type=int, default=4096)
    model.add_argument("--group_size", type=int, default=5, help="items per session patch")
    model.add_argument("--epochs", type=float, help="of text and of item patches (default: 8, synthetic 2)")
    model.add_argument(
        "--session_epochs", type=float, help="of session patches, after item patches (default: 1, synthetic 0.25)"
    )
    model.add_argument("--head_epochs", type=float, default=8.0, help="of the item head (default: %(default)s)")
    model.add_argument("--learning_rate", type=float, help="(default: 3e-3, synthetic 1e-3; session patches: a third)")
    model.add_argument("--rows_per_pass", type=int, help="rows of a step (default: 3456, synthetic 1152)")
    model.add_argument("--dropout", type=float, help="(default: 0.2, synthetic 0.1)")
    model.add_argument("--jitter", type=float, help="of the order of training items (default: 8, synthetic 0)")
    model.add_argument("--seed", type=int, default=0)
    model.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    output = parser.add_argument_group("output")
    output.add_argument("--output", default="runs")
    output.add_argument("--name", help="folder of the report below --output (default: the data set's name)")
    args = parser.parse_args(argv)
    if args.threads < 1:
        parser.error(f"--threads: expected at least 1, got {args.threads}")
    for name, value in DEFAULTS["synthetic" if args.data == "synthetic" else "real"].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def plan(args: argparse.Namespace) -> list[Stage]:
    text, g = SETTINGS["scratch"].keep_text, args.group_size
    items = pk.ItemPatches(text, max_items=None)
    # with borders that never move, a user's history is one trunk for all targets
    sessions = pk.SessionPatches(g, max_items=None, align="start")
    latest = "the latest item" if text == 1 else f"the latest {text} items"
    reads_items = (
        f"{latest} as text and each older one as one row: the mean of its title's token embeddings plus an embedding "
        "of its own"
    )
    reads_sessions = (
        f"the latest {g} items as text, {g} to {2 * g - 1} before them as item patches, and every {g} older ones as "
        "one row, the mean of their item patches"
    )
    of_head = pk.ItemPatches(keep_text=0, max_items=None)
    reads_head = (
        "each item as one row, as above, and ranks all items in one product with the last row's hidden state instead "
        "of writing titles"
    )
    return [
        Stage("text", "every title as text", None, pk.TextOnly(max_items=None), args.epochs, args.learning_rate),
        Stage("item patches", reads_items, None, items, args.epochs, args.learning_rate),
        Stage("session patches", reads_sessions, "item patches", sessions, args.session_epochs, args.learning_rate / 3),
        Stage(
            "item head", reads_head, None, of_head, args.head_epochs, SETTINGS["scratch-head"].learning_rate, "items"
        ),
    ]


def new_model(tokenizer: Any, catalog: pk.Catalog, stage: Stage, args: argparse.Namespace) -> pk.PatchedCausalLM:
    """Random weights; for patches every item has an embedding of its own beside those of its title."""
    by_items = stage.head == "items"
    hf_model = scratch_model(
        tokenizer, "tiny", seed=args.seed, dropout=SETTINGS["scratch-head"].dropout if by_items else args.dropout
    )
    model = pk.PatchedCausalLM(
        hf_model,
        catalog,
        scratch_prompt(tokenizer, separator=not by_items),
        item_embeddings=not isinstance(stage.policy, pk.TextOnly),
        item_head=by_items,
    )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    say(f"model: {parameters / 1e6:.1f} M parameters, {len(tokenizer):,} tokens, {catalog.lengths.mean():.2f} a title")
    return model


def train(
    model: pk.PatchedCausalLM, data: Interactions, stage: Stage, args: argparse.Namespace, folder: Path
) -> tuple[float, int]:
    """Run one stage; returns its seconds and how many targets it learned from, each of them once an epoch."""
    by_items = stage.head == "items"
    arguments = SETTINGS["scratch-head" if by_items else "scratch"].arguments(
        "sft",
        folder / "training",
        num_train_epochs=stage.epochs,
        learning_rate=stage.learning_rate,
        save_strategy="no",
        logging_strategy="no",
        seed=args.seed,
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = PatchTrainer(
        model,
        arguments,
        data.histories,
        data.samples("train"),
        stage.policy,
        head=stage.head,
        rows_per_pass=args.rows_per_pass,
        jitter=min(args.jitter, SETTINGS["scratch-head"].jitter) if by_items else args.jitter,
    )
    trainer.remove_callback(PrinterCallback)
    targets = trainer.train_dataset.num_targets
    say(f"training: {stage.name}, {targets:,} targets in {trainer.args.max_steps:,} steps")
    started = time.perf_counter()
    trainer.train()
    trainer.remove_callback(ProgressCallback)
    return time.perf_counter() - started, targets


def evaluate(
    model: pk.PatchedCausalLM,
    data: Interactions,
    samples: Samples,
    stage: Stage,
    folder: Path,
    seconds: float,
    targets: int,
) -> Model:
    layout = pk.build_layout(model.catalog, data.before(samples), stage.policy, model.prompt, head=stage.head)
    rows = np.diff(layout.cu_seqlens.numpy()).astype(np.int64)
    started = time.perf_counter()
    lists, alone = recommend(model, data, samples, stage)
    speed = samples.users.size / (time.perf_counter() - started)
    return Model(
        stage.name,
        folder,
        stage.reads,
        stage.after,
        rows=rows,
        compression=layout.compression_ratio,
        seconds=seconds,
        targets=targets,
        users_per_second=speed,
        lists=lists,
        alone=alone,
        search=search_of(stage),
    )


def with_prior(
    model: pk.PatchedCausalLM,
    data: Interactions,
    found: Model,
    stage: Stage,
    samples: Samples,
    to_fit: Samples,
    prior: pk.TransitionPrior,
) -> Model:
    """The model's numbers with a prior too, whose weight ranks the targets of the validation split best."""
    histories, targets = data.before(to_fit), data.targets(to_fit)
    search = search_of(stage)
    fit = pk.fit_prior_weight(
        model, histories, targets, stage.policy, prior, k=max(KS), exclude_seen=True, search=search
    )
    _, together = recommend(model, data, samples, stage, prior=prior, prior_weight=fit.weight)
    return replace(found, fit=fit, with_prior=together)


def recommend(
    model: pk.PatchedCausalLM, data: Interactions, samples: Samples, stage: Stage, **options: Any
) -> tuple[Lists, metrics.Evaluation]:
    k = max(KS)
    lists = model.recommend(
        data.before(samples), stage.policy, k=k, num_beams=k, search=search_of(stage), exclude_seen=True, **options
    )
    evaluation = metrics.evaluate(lists, data.targets(samples), KS, catalog=model.catalog, users=samples.users)
    say(f"{stage.name}{' + prior' if options else ''}: {evaluation}")
    return lists, evaluation


def search_of(stage: Stage) -> str:
    return "items" if stage.head == "items" else "beam"


def without_model(
    data: Interactions, catalog: pk.Catalog, samples: Samples, prior: pk.TransitionPrior | None
) -> tuple[Lists, dict[str, metrics.Evaluation]]:
    """What is most popular, and how good recommendations without a model are."""
    # As for the models, an item anywhere in the history is seen.
    popular = most_popular(data, samples, max(KS), unseen=True, max_items=None)
    rankings = {"most popular": popular, "transitions": transitions(data, samples, max(KS), max_items=None)}
    if prior is not None:
        rankings["prior alone"] = by_prior(data, catalog, samples, prior, max(KS)).ranking
    targets = data.targets(samples)
    found = {
        name: metrics.evaluate(each.as_lists(), targets, KS, catalog=catalog, users=samples.users)
        for name, each in rankings.items()
    }
    return popular.as_lists(), found


def backend_line() -> str:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return f"patchkern {pk.__version__}, torch {torch.__version__}, backend: {describe_backend(device)}"


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    main()
