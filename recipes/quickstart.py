# SPDX-License-Identifier: Apache-2.0
"""The whole of patchkern in a few minutes on a CPU: data, training, evaluation, recommendations, a report.

    python recipes/quickstart.py                                  # synthetic users, under 5 minutes on 2 cores
    python recipes/quickstart.py --data path/to/ml-100k           # a data set of your own, under 20 minutes
    make quickstart DATA=path/to/ml-100k                          # the same, setting everything up first

A small language model is trained from random weights on titles: as text, then patch pre-training and item patches, then
session patches. All of them recommend to the same test users, beside two yardsticks that know no titles at all. The
report with its plots is written to runs/<name>/report.md, each model to a folder beside it, which recipes/evaluate.py
takes.
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
from transformers import PrinterCallback, ProgressCallback, TrainingArguments

import patchkern as pk
from patchkern import metrics
from patchkern.data import Interactions, Samples, most_popular, open_dataset, prepare, synthetic, transitions
from patchkern.ops.backends import describe as describe_backend
from patchkern.scratch import fit_tokenizer, scratch_model, scratch_prompt
from patchkern.trainer import PatchTrainer

KS = (10, 20)


@dataclass(frozen=True)
class Stage:
    """One training run: the stage it goes on from, how histories are compressed, how many samples."""

    name: str
    after: str | None
    policy: pk.Policy
    samples: int
    learning_rate: float
    pretrain: bool = False


@dataclass(frozen=True)
class Result:
    """One row of the table."""

    name: str
    evaluation: metrics.Evaluation
    rows: NDArray[np.int64] | None = None
    compression: float | None = None
    seconds: float | None = None
    samples_per_second: float | None = None


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
    hf_model = scratch_model(tokenizer, "tiny", seed=args.seed)
    model = pk.PatchedCausalLM(hf_model, catalog, scratch_prompt(tokenizer))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    say(f"model: {parameters / 1e6:.1f} M parameters, {len(tokenizer):,} tokens, {catalog.lengths.mean():.2f} a title")

    test = spread(data.samples(args.split), args.limit)
    results = yardsticks(data, catalog, test)
    recommended: dict[str, list[list[tuple[Any, float]]]] = {}
    trained: dict[str, dict[str, torch.Tensor]] = {}
    for stage in plan(args):
        if stage.after:
            model.load_state_dict(trained[stage.after])
        seconds, samples = train(model, data, stage, args, folder)
        trained[stage.name] = {name: value.clone() for name, value in model.state_dict().items()}
        if stage.pretrain:
            continue
        recommended[stage.name], result = evaluate(model, data, test, stage)
        results.append(replace(result, seconds=seconds, samples_per_second=samples / seconds))
        model.save_pretrained(folder / stage.name.replace(" ", "-"))
        tokenizer.save_pretrained(folder / stage.name.replace(" ", "-"))
        say(f"{stage.name}: {result.evaluation}")

    report = [f"# {data.name}", "", *table(results), ""]
    say("\n" + "\n".join(report[2:]))
    of_users = np.unique(test.users, return_index=True)[1][: args.examples]
    examples = [line for sample in of_users for line in example(data, test, recommended, int(sample))]
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
    data.add_argument("--examples", type=int, default=3, help="users whose recommendations are printed")
    model = parser.add_argument_group("model and training")
    model.add_argument("--vocab_size", type=int, default=4096)
    model.add_argument("--max_items", type=int, default=30, help="items of a history that the model sees")
    model.add_argument("--keep_text", type=int, default=5, help="latest items kept as text beside item patches")
    model.add_argument("--group_size", type=int, default=5, help="items per session patch")
    model.add_argument(
        "--samples",
        type=int,
        help="of the text stage, the others take a quarter (default: 10,000 synthetic, else 13,000)",
    )
    model.add_argument("--learning_rate", type=float, default=3e-3)
    model.add_argument("--batch_size", type=int, default=32)
    model.add_argument("--seed", type=int, default=0)
    model.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    output = parser.add_argument_group("output")
    output.add_argument("--output", default="runs")
    output.add_argument("--name", help="folder of the report below --output (default: the data set's name)")
    args = parser.parse_args(argv)
    # On ml-100k's validation split 9,000 and 30,000 samples both did worse: too few, and overfitting.
    args.samples = args.samples or (10_000 if args.data == "synthetic" else 13_000)
    return args


def plan(args: argparse.Namespace) -> list[Stage]:
    """The paper's order: text, patch pre-training, and from there item patches or session patches."""
    text = pk.TextOnly(args.max_items)
    items = pk.ItemPatches(args.keep_text, args.max_items)
    sessions = pk.SessionPatches(args.group_size, args.max_items)
    rate, samples = args.learning_rate, args.samples
    return [
        Stage("text", None, text, samples, rate),
        Stage("patch pre-training", "text", items, samples // 4, rate / 3, pretrain=True),
        Stage("item patches", "patch pre-training", items, samples // 4, rate / 3),
        Stage("session patches", "patch pre-training", sessions, samples // 4, rate / 3),
    ]


def spread(samples: Samples, limit: int | None) -> Samples:
    """At most ``limit`` of the samples, evenly spread over users and time."""
    size = samples.users.size
    chosen = np.linspace(0, size - 1, min(limit or size, size)).astype(np.int64)
    return Samples(samples.users[chosen], samples.positions[chosen])


def train(
    model: pk.PatchedCausalLM, data: Interactions, stage: Stage, args: argparse.Namespace, folder: Path
) -> tuple[float, int]:
    """Run one stage; returns its seconds and how many samples it took."""
    arguments = TrainingArguments(
        output_dir=str(folder / "training"),
        max_steps=max(1, stage.samples // args.batch_size),
        per_device_train_batch_size=args.batch_size,
        learning_rate=stage.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        weight_decay=0.1,
        max_grad_norm=1.0,
        save_strategy="no",
        report_to="none",
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
        pretrain=stage.pretrain,
        supervise_history=True,
    )
    trainer.remove_callback(PrinterCallback)
    say(f"training: {stage.name}, {trainer.args.max_steps} steps of {args.batch_size} samples")
    started = time.perf_counter()
    trainer.train()
    trainer.remove_callback(ProgressCallback)
    return time.perf_counter() - started, trainer.args.max_steps * args.batch_size


def evaluate(
    model: pk.PatchedCausalLM, data: Interactions, test: Samples, stage: Stage
) -> tuple[list[list[tuple[Any, float]]], Result]:
    histories = data.before(test)
    layout = pk.build_layout(model.catalog, histories, stage.policy, model.prompt)
    recommended = model.recommend(histories, stage.policy, k=max(KS), num_beams=max(KS), exclude_seen=True)
    evaluation = metrics.evaluate(recommended, data.targets(test), KS, catalog=model.catalog)
    rows = np.diff(layout.cu_seqlens.numpy()).astype(np.int64)
    return recommended, Result(stage.name, evaluation, rows, layout.compression_ratio)


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
    header = ["", "rows/user", "compression", "samples/s", "train s", *measures]
    lines = [header]
    for result in results:
        scores = result.evaluation.as_dict()
        lines.append(
            [
                result.name,
                number(None if result.rows is None else float(result.rows.mean()), 1),
                number(result.compression, 2),
                number(result.samples_per_second, 0),
                number(result.seconds, 0),
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
    models = [result for result in results if result.rows is not None]
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
            axes.errorbar(result.rows.mean(), hr, yerr=error, fmt="o", capsize=3, label=result.name)
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
