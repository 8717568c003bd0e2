# SPDX-License-Identifier: Apache-2.0
"""What it is worth to compress a past: experts and memories, beside whole histories, recent items and free means.

    python recipes/learned_compression.py --data ml-100k --backbone sasrec --output_dir runs/learned --seeds 0
    python recipes/learned_compression.py --data ml-1m --backbone hstu --output_dir runs/learned-hstu
    python recipes/learned_compression.py --data ml-1m --backbone sasrec --output_dir runs/learned-1m --sweep

A model of item ids for every row of the table and every seed, from random weights, all with the same epochs, the same
targets a step and the same rates; kept is what recommends best for the validation split, of ten times in the run. What
must be beaten: the same recent items alone (recent), and these with one row that is the mean of all that is old (mean).
--sweep adds other numbers of experts and slots, and other weights of --consistency, on the validation split.

What is finished is not computed again: a run that was killed goes on with the same command, from its last checkpoint.
The table is printed and written to table.md in --output_dir; one line per sample of every row and seed goes to a CSV,
any two of which recipes/compare.py compares. Errors are over users; a difference between rows is of the same samples.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import set_seed

sys.path.append(str(Path(__file__).resolve().parents[1]))  # an installed patchkern comes first

import patchkern as pk
from patchkern.budget.search import SearchCost, SearchSize
from patchkern.data import Interactions
from patchkern.data.preparation import add_arguments, load
from patchkern.evaluation import estimate, paired_difference
from patchkern.models.item_blocks import BLOCKS
from patchkern.training import SETTINGS, PatchTrainer, checkpoints
from recipes import per_sample
from recipes.commands import Parser
from recipes.item_models import catalog_of_ids, read_as_trained
from recipes.ranking import by_item_head
from recipes.results import KS, Result, Results
from recipes.tables import markdown_table
from recipes.training_run import banner, read_arguments, write_arguments

EVALUATIONS = 10  # of the validation split in a run
EVALUATED_AT_ONCE = 256  # users
SWEPT = (1, 16)
WEIGHTS = (0.01, 0.1, 1.0)
DEFAULTS = 4  # experts and slots
MEASURES = [f"{kind}@{k}" for kind in ("HR", "NDCG") for k in KS]


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        what: it reads, for people.
        policy: by which it does.
        memory: options of `patchkern.RecurrentMemory`, for a `patchkern.PreferenceMemory`.
        of: the row whose models it uses, with memories made in one pass; None: its own.
        beside: the row that it must beat.
        split: of the data set.
    """

    what: str
    policy: Any
    memory: dict[str, Any] | None = None
    of: str | None = None
    beside: str | None = None
    split: str = "test"


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    args = parse(argv)
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    shared = {name: value for name, value in vars(args).items() if name not in ("rows", "seeds", "output_dir", "sweep")}
    shared = json.loads(json.dumps(shared, default=str))
    before = read_arguments(folder)
    if before and before != shared:
        changed = [name for name in shared if before.get(name) != shared[name]]
        raise ValueError(f"--output_dir: expected the arguments of the runs there, got other {', '.join(changed)}")
    write_arguments(folder, shared)
    data = load(args)
    print(f"{banner(device_of_runs())}\n{data}", flush=True)
    rows = {name: row for name, row in all_rows(args).items() if args.rows is None or name in args.rows}
    for seed in args.seeds:
        for name, row in rows.items():
            measure(name, row, seed, args, data, folder)
    lines, numbers = table(rows, args, data, folder)
    print("\n".join(lines), flush=True)
    (folder / "table.md").write_text("\n".join([*lines, ""]), encoding="utf-8")
    return numbers


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add_arguments(parser)
    parser.add_argument("--output_dir", required=True, help="of all runs and the table")
    parser.add_argument("--backbone", choices=BLOCKS, default="sasrec")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+", help="only these (default: all)")
    parser.add_argument("--sweep", action="store_true", help="also other numbers of experts and slots, and weights")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--keep", type=int, default=20, help="items that are always recent, with experts")
    parser.add_argument("--block", type=int, default=50, help="items of a segment")
    parser.add_argument("--group_size", type=int, default=5, help="items of a session patch")
    parser.add_argument("--consistency", type=float, default=0.01, help="of memories; 1 keeps them from learning")
    parser.add_argument("--epochs", type=float, default=12)
    parser.add_argument("--targets_per_step", type=int, default=2048)
    parser.add_argument("--rows_per_pass", type=int, default=4096)
    parser.add_argument("--learning_rate", type=float, default=SETTINGS["ids"].learning_rate)
    parser.add_argument("--limit", type=int, help="test samples, spread over all")
    args = parser.parse_args(argv)
    known = all_rows(args)
    for name in args.rows or ():
        if name not in known:
            parser.error(f"--rows: expected some of {', '.join(known)}, got {name}")
        of = known[name].of
        if of is not None and of not in args.rows:
            parser.error(f"--rows: expected {of} beside {name}, which uses its models")
    return args


def all_rows(args: argparse.Namespace) -> dict[str, Row]:
    """By the names that folders have."""
    items, keep, block = pk.ItemPatches(keep_text=0, max_items=None), args.keep, args.block

    def experts(parts: str, count: int = DEFAULTS) -> Any:
        return pk.Experts(items, count=count, keep=keep if parts == "one" else None, block=block, parts=parts)

    def recent(keep: int) -> Any:
        return pk.Experts(items, count=0, keep=keep, block=block)

    def memory(mode: str = "overwrite", slots: int = DEFAULTS) -> Any:
        return pk.PreferenceMemory(items, slots, block, mode)

    trained = {"consistency": args.consistency}
    rows = {
        "full": Row("whole history", items),
        "recent": Row(f"recent items, at least {keep}", recent(keep)),
        "recent-1": Row("recent items, at least 1", recent(1)),
        "latest-100": Row("latest 100 to 199 items", read_as_trained(pk.ItemPatches(keep_text=0, max_items=100))),
        "sessions": Row(
            f"sessions of {args.group_size}", pk.SessionPatches(args.group_size, max_items=None, align="start")
        ),
        "mean": Row("recent and the mean of what is old", pk.MeanOfOld(keep, block), beside="recent"),
        "mean-1": Row("the same, at least 1 recent", pk.MeanOfOld(1, block), beside="recent-1"),
        "experts": Row("PerSRec, one part", experts("one"), beside="mean"),
        "experts-blocks": Row("PerSRec, blocks", experts("blocks"), beside="mean-1"),
        "memory": Row("Rec2PM overwrite, iterated", memory(), trained, beside="mean-1"),
        "memory-once": Row("the same, one-time: its references", memory(), of="memory", beside="memory"),
        "memory-append": Row("Rec2PM append, iterated", memory("append"), trained, beside="mean-1"),
        "memory-free": Row("Rec2PM without consistency", memory(), {"consistency": 0.0}, beside="memory"),
    }
    if args.sweep:
        for count in (SWEPT[0], DEFAULTS, *SWEPT[1:]):
            rows[f"experts-{count}"] = Row(f"PerSRec, {count} experts, validation", experts("one", count), split="val")
            rows[f"memory-{count}"] = Row(
                f"Rec2PM, {count} slots, validation", memory(slots=count), trained, split="val"
            )
        for weight in WEIGHTS:
            rows[f"memory-weight-{weight:g}"] = Row(
                f"Rec2PM, consistency {weight:g}, validation", memory(), {"consistency": weight}, split="val"
            )
    return rows


# ------------------------------------------------------------------ one row, one seed


def measure(name: str, row: Row, seed: int, args: argparse.Namespace, data: Interactions, folder: Path) -> None:
    """Train and evaluate, unless that was done."""
    own = folder / f"{name}-{seed}"
    if (own / "result.json").exists():
        return
    print(f"{name}, seed {seed}: {row.what}", flush=True)
    known: dict[str, float] = {}
    if row.of is None:
        model, known = trained(row, seed, args, data, own)
    else:
        model = pk.RecurrentMemory.from_pretrained(folder / f"{row.of}-{seed}" / "model")
        model.to(device_of_runs()).eval()
        model.one_time = True
    samples = data.samples(row.split).spread(args.limit)
    started = time.perf_counter()
    scored = by_item_head(model, data, samples, row.policy, max(KS), {"": {}}, {}, unseen=True)[""]
    known["evaluation seconds"] = time.perf_counter() - started
    results = Results(data, samples, model.catalog)
    lists = scored.ranking.as_lists()
    results[name] = Result([results.evaluate(lists)], lists, {"NLL item": scored.nll})
    print(f"{name}, seed {seed}: {results[name].found[0]}", flush=True)
    results.write(name, own / f"{row.split}.csv")
    histories = data.before(samples)
    known["rows"] = float(pk.row_counts(model.catalog, histories, row.policy, model.prompt).mean())
    known["bytes"] = float(stored_bytes(model, row.policy, histories).mean())
    unfinished = own / "result.part"
    unfinished.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
    unfinished.replace(own / "result.json")


def device_of_runs() -> torch.device:
    """Where transformers trains."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def trained(
    row: Row, seed: int, args: argparse.Namespace, data: Interactions, own: Path
) -> tuple[Any, dict[str, float]]:
    """The best model of a run by the validation split, and what the run took."""
    settings = SETTINGS["ids"]
    set_seed(seed)
    model = make_model(row, seed, args, data)
    arguments = settings.arguments(
        "items",
        own,
        num_train_epochs=args.epochs,
        learning_rate=args.learning_rate,
        seed=seed,
        bf16=False,  # everywhere alike; models so small gain nothing by it on a GPU
        per_device_eval_batch_size=EVALUATED_AT_ONCE,
        eval_strategy="steps",
        eval_steps=1 / EVALUATIONS,
        save_strategy="steps",
        save_steps=1 / EVALUATIONS,
        save_total_limit=2,
        metric_for_best_model=f"NDCG@{max(KS)}",
        load_best_model_at_end=True,
        logging_steps=1 / EVALUATIONS,
        disable_tqdm=True,
    )
    trainer = PatchTrainer(
        model,
        arguments,
        data.histories,
        data.samples("train"),
        row.policy,
        rows_per_pass=args.rows_per_pass,
        targets_per_step=args.targets_per_step,
        jitter=settings.jitter,
        head_learning_rate=settings.head_learning_rate,
        eval_samples=data.samples("val"),
        eval_options={"search": "items", "batch_size": EVALUATED_AT_ONCE},
    )
    started = checkpoints(own)
    metrics = trainer.train(resume_from_checkpoint=str(started[-1]) if started else None).metrics
    trainer.save_model(str(own / "model"))
    dataset: Any = trainer.train_dataset
    validated = sum(entry.get("eval_runtime", 0.0) for entry in trainer.state.log_history)
    read = dataset.fullness() * dataset.rows_per_pass * len(dataset)
    return trainer.model.eval(), {
        # of a run that was killed, what its last part took
        "seconds": metrics["train_runtime"] - (0.0 if started else validated),
        "resumed": float(bool(started)),
        "rows per target": read / dataset.num_targets,
    }


def make_model(row: Row, seed: int, args: argparse.Namespace, data: Interactions) -> Any:
    """With positions for whole histories, and room for what the row learns beside items."""
    policy = row.policy
    longest = int(data.histories.lengths.max(initial=1))
    model = pk.ItemModel(
        catalog_of_ids(data.titles),
        policy,
        block=args.backbone,
        width=args.width,
        layers=args.layers,
        heads=args.heads,
        dropout=SETTINGS["ids"].dropout,
        max_positions=longest + 1,
        seed=seed,
    )
    if isinstance(policy, pk.Experts) and policy.count:
        parts = int(policy.compressed_parts(policy.cuts(np.array(longest))))
        pk.add_experts(model, policy.count, max_positions=longest + 1 + policy.count * max(parts, 1), seed=seed)
    if row.memory is None:
        return model
    pk.add_experts(model, policy.slots, max_positions=longest + 1 + policy.slots, seed=seed)
    return pk.RecurrentMemory(model, **row.memory)


def stored_bytes(model: Any, policy: Any, histories: pk.Histories) -> NDArray[np.float64]:
    """``(B,)`` what is kept of each user so that a past is not read again: states, or keys and values of a prompt."""
    if isinstance(policy, pk.PreferenceMemory):
        rows = policy.memory_rows(policy.absorbed(histories.lengths))
        return rows.astype(np.float64) * (model.width * model.dtype.itemsize)
    if isinstance(policy, pk.Experts):
        rows = policy.count * policy.compressed_parts(policy.cuts(histories.lengths))
    else:
        rows = pk.row_counts(model.catalog, histories, policy, model.prompt)
    return rows.astype(np.float64) * SearchCost(model, SearchSize(1, 1)).row_bytes


# ------------------------------------------------------------------ the table


def table(
    rows: dict[str, Row], args: argparse.Namespace, data: Interactions, folder: Path
) -> tuple[list[str], dict[str, dict[str, float]]]:
    """Means over seeds; errors over users, of each sample's mean over seeds; and the numbers by row and column."""
    values: dict[str, dict[str, NDArray[np.float64]]] = {}
    users: dict[str, NDArray[np.str_]] = {}
    numbers: dict[str, dict[str, float]] = {}
    header = ["row", *MEASURES, "sd over seeds", "rows read", "bytes a user", "rows a target", "s training"]
    cells = [header]
    for name, row in rows.items():
        files = [per_sample.read(folder / f"{name}-{seed}" / f"{row.split}.csv") for seed in args.seeds]
        known = [json.loads((folder / f"{name}-{seed}" / "result.json").read_text("utf-8")) for seed in args.seeds]
        of_seeds = [measures_of(file.columns["rank"]) for file in files]
        users[name] = files[0].users
        values[name] = {measure: np.mean([own[measure] for own in of_seeds], axis=0) for measure in MEASURES}
        main = [float(own[MEASURES[1]].mean()) for own in of_seeds]
        spread = float(np.std(main, ddof=1)) if len(main) > 1 else float("nan")
        means = {key: float(np.mean([own[key] for own in known])) for key in known[0]}
        seconds = f"{means['seconds']:,.0f}{'+' * bool(means['resumed'])}" if "seconds" in means else ""
        cells.append([
            f"{name}: {row.what}",
            *(str(estimate(values[name][measure], users[name])) for measure in MEASURES),
            f"{spread:.4f}",
            f"{means['rows']:.1f}",
            f"{means['bytes']:,.0f}",
            f"{means['rows per target']:.2f}" if "rows per target" in means else "",
            seconds,
        ])  # fmt: skip
        numbers[name] = {measure: float(values[name][measure].mean()) for measure in MEASURES} | means
    lines = [
        f"{data.name}, {args.backbone}, {args.layers} layers of {args.width}, seeds {', '.join(map(str, args.seeds))}, "
        f"{args.epochs:g} epochs, block {args.block}, keep {args.keep}; ± one standard error over users; +: resumed",
        "",
        *markdown_table(cells),
    ]
    differences = [["difference on the same samples", *MEASURES[1::2]]]
    for name, row in rows.items():
        if row.beside in rows:
            pairs = ((values[name][measure], values[row.beside][measure]) for measure in MEASURES[1::2])
            found = [str(paired_difference(one, other, users[name])) for one, other in pairs]
            differences.append([f"{name} - {row.beside}", *found])
    if len(differences) > 1:
        lines += ["", *markdown_table(differences)]
    return lines, numbers


def measures_of(ranks: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """``{measure: (S,)}`` of the ranks of the targets, 0 where they are not in the list."""
    found = {}
    for k in KS:
        listed = (ranks > 0) & (ranks <= k)
        found[f"HR@{k}"] = listed.astype(np.float64)
        found[f"NDCG@{k}"] = listed / np.log2(np.maximum(ranks, 1) + 1)
    return {measure: found[measure] for measure in MEASURES}


if __name__ == "__main__":
    main()
