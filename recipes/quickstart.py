# SPDX-License-Identifier: Apache-2.0
"""The whole of patchkern in a few minutes on a CPU: data, training, evaluation, recommendations, a report.

    python recipes/quickstart.py                                  # synthetic users, under 5 minutes on 2 cores
    python recipes/quickstart.py --data path/to/ml-100k           # a data set of your own, under 20 minutes
    make quickstart DATA=path/to/ml-100k                          # the same, setting everything up first

Small language models are trained on titles from random weights, all targets of a user in one pass: one reads histories
as text, one as item patches, and the latter goes on with session patches. All of them recommend to the same test users,
alone and with item-to-item transitions as a prior whose weight is fitted on the validation split, beside two yardsticks
that know no titles at all. The report with its plots is written to runs/<name>/report.md, each model to a folder beside
it, which recipes/evaluate.py takes. How the settings were chosen is told in recipes/LOG.md.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PrinterCallback, ProgressCallback

import patchkern as pk
from patchkern.data import Interactions, Samples, open_dataset, prepare, synthetic
from patchkern.evaluation import metrics, most_popular, transitions
from patchkern.models.scratch import fit_tokenizer, scratch_model, scratch_prompt
from patchkern.ops.backends import describe as describe_backend
from patchkern.training import SETTINGS, PatchTrainer

KS = (10, 20)
# synthetic users choose by the order of their history; a short run needs many steps, and has no time to overfit
DEFAULTS = {
    "synthetic": {
        "epochs": 2.0,
        "session_epochs": 0.25,
        "learning_rate": 1e-3,
        "rows_per_pass": 1536,
        "dropout": 0.1,
        "jitter": 0.0,
        "fit_limit": 300,
    },
    "real": {
        "epochs": 8.0,
        "session_epochs": 1.0,
        "learning_rate": SETTINGS["scratch"].learning_rate,
        "rows_per_pass": 4096,
        "dropout": SETTINGS["scratch"].dropout,
        "jitter": SETTINGS["scratch"].jitter,
        "fit_limit": 1000,
    },
}


@dataclass(frozen=True)
class Stage:
    """One training run: the stage it goes on from, how histories are compressed, how often each target is seen."""

    name: str
    after: str | None
    policy: pk.Policy
    epochs: float
    learning_rate: float


@dataclass(frozen=True)
class Result:
    """One row of the table."""

    name: str
    evaluation: metrics.Evaluation
    rows: NDArray[np.int64] | None = None
    compression: float | None = None
    seconds: float | None = None
    targets_per_second: float | None = None
    users_per_second: float | None = None


def main(argv: Sequence[str] | None = None) -> list[Result]:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    data = synthetic(seed=args.seed) if args.data == "synthetic" else prepare(open_dataset(args.data))
    folder = Path(args.output) / (args.name or data.name)
    folder.mkdir(parents=True, exist_ok=True)
    say(f"{data}\n{backend_line()}")

    tokenizer = fit_tokenizer(data.titles.values(), args.vocab_size)
    catalog = pk.Catalog.from_titles(data.titles, tokenizer)
    prior = pk.TransitionPrior(data, catalog)
    chosen = spread(data.samples(args.split), args.limit)
    results = yardsticks(data, catalog, chosen)
    recommended: dict[str, list[list[tuple[Any, float]]]] = {}
    model = None
    for stage in plan(args):
        if model is None or stage.after is None:
            model = new_model(tokenizer, catalog, stage.policy, args)
        seconds, targets = train(model, data, stage, args, folder)
        model.save_pretrained(folder / stage.name.replace(" ", "-"))
        tokenizer.save_pretrained(folder / stage.name.replace(" ", "-"))
        recommended[stage.name], result = evaluate(model, data, chosen, stage)
        results.append(replace(result, seconds=seconds, targets_per_second=targets / seconds))
        if args.split == "test":
            weight = fitted_weight(model, data, stage, prior, args)
            _, together = evaluate(model, data, chosen, stage, prior=prior, prior_weight=weight)
            results.append(replace(together, name=f"{stage.name} + {weight:g} transitions"))

    report = [f"# {data.name}", "", *table(results), ""]
    say("\n" + "\n".join(report[2:]))
    of_users = np.unique(chosen.users, return_index=True)[1][: args.examples]
    examples = [line for sample in of_users for line in example(data, chosen, recommended, int(sample))]
    say("\n".join(examples))
    write_report(folder, report, results, examples, args)
    say(f"report: {folder / 'report.md'}")
    return results


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data", default="synthetic", help='"synthetic" or a folder that patchkern.data.open_dataset reads'
    )
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
    model.add_argument("--learning_rate", type=float, help="(default: 3e-3, synthetic 1e-3; session patches: a third)")
    model.add_argument("--rows_per_pass", type=int, help="rows of a step (default: 4096, synthetic 1536)")
    model.add_argument("--dropout", type=float, help="(default: 0.2, synthetic 0.1)")
    model.add_argument("--jitter", type=float, help="of the order of training items (default: 8, synthetic 0)")
    model.add_argument("--seed", type=int, default=0)
    model.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    output = parser.add_argument_group("output")
    output.add_argument("--output", default="runs")
    output.add_argument("--name", help="folder of the report below --output (default: the data set's name)")
    args = parser.parse_args(argv)
    for name, value in DEFAULTS["synthetic" if args.data == "synthetic" else "real"].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def plan(args: argparse.Namespace) -> list[Stage]:
    items = pk.ItemPatches(SETTINGS["scratch"].keep_text, max_items=None)
    # with borders that never move, a user's history is one trunk for all targets
    sessions = pk.SessionPatches(args.group_size, max_items=None, align="start")
    return [
        Stage("text", None, pk.TextOnly(max_items=None), args.epochs, args.learning_rate),
        Stage("item patches", None, items, args.epochs, args.learning_rate),
        Stage("session patches", "item patches", sessions, args.session_epochs, args.learning_rate / 3),
    ]


def new_model(tokenizer: Any, catalog: pk.Catalog, policy: pk.Policy, args: argparse.Namespace) -> pk.PatchedCausalLM:
    """Random weights; for patches every item has an embedding of its own beside those of its title."""
    hf_model = scratch_model(tokenizer, "tiny", seed=args.seed, dropout=args.dropout)
    of_items = not isinstance(policy, pk.TextOnly)
    model = pk.PatchedCausalLM(hf_model, catalog, scratch_prompt(tokenizer), item_embeddings=of_items)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    say(f"model: {parameters / 1e6:.1f} M parameters, {len(tokenizer):,} tokens, {catalog.lengths.mean():.2f} a title")
    return model


def spread(samples: Samples, limit: int | None) -> Samples:
    """At most ``limit`` of the samples, evenly spread over users and time."""
    size = samples.users.size
    chosen = np.linspace(0, size - 1, min(limit or size, size)).astype(np.int64)
    return Samples(samples.users[chosen], samples.positions[chosen])


def train(
    model: pk.PatchedCausalLM, data: Interactions, stage: Stage, args: argparse.Namespace, folder: Path
) -> tuple[float, int]:
    """Run one stage; returns its seconds and how many targets it learned from, each of them once an epoch."""
    arguments = SETTINGS["scratch"].arguments(
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
        rows_per_pass=args.rows_per_pass,
        jitter=args.jitter,
    )
    trainer.remove_callback(PrinterCallback)
    targets = trainer.train_dataset.num_targets
    say(f"training: {stage.name}, {targets:,} targets in {trainer.args.max_steps:,} steps")
    started = time.perf_counter()
    trainer.train()
    trainer.remove_callback(ProgressCallback)
    return time.perf_counter() - started, targets


def evaluate(
    model: pk.PatchedCausalLM, data: Interactions, samples: Samples, stage: Stage, **options: Any
) -> tuple[list[list[tuple[Any, float]]], Result]:
    histories, targets = data.before(samples), data.targets(samples)
    layout = pk.build_layout(model.catalog, histories, stage.policy, model.prompt)
    started = time.perf_counter()
    recommended = model.recommend(histories, stage.policy, k=max(KS), num_beams=max(KS), exclude_seen=True, **options)
    speed = len(histories) / (time.perf_counter() - started)
    evaluation = metrics.evaluate(recommended, targets, KS, catalog=model.catalog)
    say(f"{stage.name}: {evaluation}")
    rows = np.diff(layout.cu_seqlens.numpy()).astype(np.int64)
    return recommended, Result(stage.name, evaluation, rows, layout.compression_ratio, users_per_second=speed)


def fitted_weight(
    model: pk.PatchedCausalLM, data: Interactions, stage: Stage, prior: Any, args: argparse.Namespace
) -> float:
    """The weight of a prior that ranks the targets of the validation split best."""
    samples = spread(data.samples("val"), args.fit_limit)
    fit = pk.fit_prior_weight(
        model, data.before(samples), data.targets(samples), stage.policy, prior, k=max(KS), exclude_seen=True
    )
    return fit.weight


def yardsticks(data: Interactions, catalog: pk.Catalog, test: Samples) -> list[Result]:
    # As for the models, an item anywhere in the history is seen.
    rankings = {
        "most popular": most_popular(data, test, max(KS), unseen=True, max_items=None),
        "transitions": transitions(data, test, max(KS), max_items=None),
    }
    targets = data.targets(test)
    return [
        Result(name, metrics.evaluate(ranking.as_lists(), targets, KS, catalog=catalog))
        for name, ranking in rankings.items()
    ]


# ------------------------------------------------------------------ the report


def table(results: Sequence[Result]) -> list[str]:
    """A Markdown table that is also readable in a terminal."""
    measures = [f"{measure}@{k}" for measure in ("HR", "NDCG") for k in KS]
    header = ["", "rows/user", "compression", "targets/s", "train s", "users/s", *measures]
    lines = [header]
    for result in results:
        scores = result.evaluation.as_dict()
        lines.append(
            [
                result.name,
                number(None if result.rows is None else float(result.rows.mean()), 1),
                number(result.compression, 2),
                number(result.targets_per_second, 0),
                number(result.seconds, 0),
                number(result.users_per_second, 0),
                *(f"{scores[measure]:.4f}" for measure in measures),
            ]
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    cells = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return ["| " + " | ".join(line) + " |" for line in [cells[0], rule, *cells[1:]]]


def number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def example(
    data: Interactions, test: Samples, recommended: dict[str, list[list[tuple[Any, float]]]], sample: int
) -> list[str]:
    """What the user of one sample took, what came next, and what each model would have said."""
    history = data.before(Samples(test.users[[sample]], test.positions[[sample]]))[0]
    target = data.targets(test)[sample]
    lines = [f"### User {data.user_ids[test.users[sample]]}", ""]
    lines += ["- latest: " + ", ".join(data.titles[item] for item in history[-6:].tolist())]
    lines += [f"- then took: {data.titles[target]}"]
    for name, lists in recommended.items():
        shown = [f"**{data.titles[item]}**" if item == target else data.titles[item] for item, _ in lists[sample][:6]]
        lines += [f"- {name}: " + ", ".join(shown)]
    return [*lines, ""]


def write_report(
    folder: Path, report: list[str], results: Sequence[Result], examples: Sequence[str], args: argparse.Namespace
) -> None:
    models = [result for result in results if result.seconds is not None]
    plot_accuracy(folder / "accuracy.png", results)
    plot_rows(folder / "rows.png", models)
    settings = ", ".join(f"{name} {value}" for name, value in sorted(vars(args).items()) if value is not None)
    lines = [
        *report,
        f"{results[0].evaluation.ranks.size:,} {args.split} samples, strict metric, items already seen left out.",
        f"Standard error of the largest HR@20: {max(r.evaluation.as_dict()['HR@20 ±'] for r in results):.4f}.",
        "",
        "![Accuracy against rows](accuracy.png)",
        "![Rows per user](rows.png)",
        "",
        "## Some users",
        "",
        *examples,
        "## Settings",
        "",
        settings,
        "",
        backend_line(),
    ]
    unfinished = folder / "report.md.part"
    unfinished.write_text("\n".join(lines) + "\n", encoding="utf-8")
    unfinished.replace(folder / "report.md")


def plot_accuracy(path: Path, results: Sequence[Result]) -> None:
    figure, axes = canvas()
    for result in results:
        hr = result.evaluation.hr(20)
        if result.rows is None:
            axes.axhline(hr, linestyle="--", linewidth=1, color="0.5")
            axes.annotate(
                result.name, (0.99, hr), xycoords=("axes fraction", "data"), ha="right", va="bottom", color="0.4"
            )
        else:
            error = metrics.standard_error(result.evaluation.hits(20))
            marker = "x" if result.seconds is None else "o"
            axes.errorbar(result.rows.mean(), hr, yerr=error, fmt=marker, capsize=3, label=result.name)
    axes.legend(frameon=False, loc="lower right")
    axes.set(xlabel="rows per user", ylabel="HR@20", xlim=(0, None), ylim=(0, None), title="Accuracy against rows")
    figure.savefig(path, dpi=120)


def plot_rows(path: Path, results: Sequence[Result]) -> None:
    figure, axes = canvas()
    for result in results:
        rows = np.sort(np.asarray(result.rows))
        axes.plot(rows, np.arange(1, rows.size + 1) / rows.size, label=result.name)
    axes.set(
        xlabel="rows", ylabel="share of users with at most so many", xlim=(0, None), ylim=(0, 1), title="Rows per user"
    )
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def canvas() -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def backend_line() -> str:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return f"patchkern {pk.__version__}, torch {torch.__version__}, backend: {describe_backend(device)}"


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    main()
