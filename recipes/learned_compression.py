# SPDX-License-Identifier: Apache-2.0
"""What it is worth to compress a past: experts and memories, beside whole histories, recent items and free means.

    python recipes/learned_compression.py --data ml-100k --backbone sasrec --output_dir runs/learned --seeds 0
    python recipes/learned_compression.py --data ml-1m --backbone hstu --output_dir runs/learned-hstu
    python recipes/learned_compression.py --data ml-1m --backbone sasrec --output_dir runs/learned-1m --sweep
    python recipes/learned_compression.py --data ml-1m --model tiny --output_dir runs/learned-lm --processes 13 \\
        --rows_per_pass 24576

A model for every row of the table and every seed, from random weights, all with the same epochs, the same targets a
step and the same rates; kept is what recommends best for the validation split, of ten times in the run. What must be
beaten: the same recent items alone (recent), and these with one row that is the mean of all that is old (mean).
--sweep adds other numbers of experts and slots, and other weights of --consistency, on the validation split.

Models are of item ids, or with --model language models that read item patches: those of recipes/train.py --stage items
--head items --item_embeddings --no_separator, with its settings for them.

What is finished is not computed again: a run that was killed goes on with the same command, from its last checkpoint.
--processes trains so many at once, on one GPU or with a share of the threads each; what one prints is in its log.txt.
On a GPU they compute by turns unless CUDA's multi-process service runs (nvidia-cuda-mps-control -d).
The table is printed and written to table.md in --output_dir; one line per sample of every row and seed goes to a CSV,
any two of which recipes/compare.py compares. Errors are over users; a difference between rows is of the same samples.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
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
from patchkern.models.item_blocks import BLOCKS
from patchkern.models.scratch import SIZES
from patchkern.training import SETTINGS, PatchTrainer, Settings, checkpoints
from recipes.commands import Parser
from recipes.item_models import catalog_of_ids
from recipes.learned import with_learned_rows
from recipes.learned_compression_rows import Row, all_rows
from recipes.learned_compression_table import table
from recipes.models import load_model
from recipes.ranking import by_item_head
from recipes.results import KS, Result, Results
from recipes.side_by_side import side_by_side
from recipes.training_run import banner, read_arguments, write_arguments

EVALUATIONS = 10  # of the validation split in a run
EVALUATED_AT_ONCE = 256  # users
SHAPE = {"width": 64, "layers": 4, "heads": 4}
NOT_SHARED = ("rows", "seeds", "output_dir", "sweep", "processes")  # between the runs of a folder
RESULT, LOG = "result.json", "log.txt"


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    args = parse(argv)
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    shared = {name: value for name, value in vars(args).items() if name not in NOT_SHARED}
    shared = json.loads(json.dumps(shared, default=str))
    before = read_arguments(folder)
    changed = [name for name in shared if before.get(name) != shared[name]]
    if before and changed:
        raise ValueError(f"--output_dir: expected the arguments of the runs there, got other {', '.join(changed)}")
    write_arguments(folder, shared)
    data = load(args)
    print(f"{banner(device_of_runs())}\n{data}", flush=True)
    rows = {name: row for name, row in all_rows(args).items() if args.rows is None or name in args.rows}
    if args.processes > 1:
        measure_side_by_side(rows, args, folder)
    else:
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
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--backbone", choices=BLOCKS, help="of models of item ids (default: sasrec)")
    kind.add_argument("--model", choices=SIZES, help="language models of this size, which read item patches")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+", help="only these (default: all)")
    parser.add_argument("--sweep", action="store_true", help="also other numbers of experts and slots, and weights")
    parser.add_argument("--processes", type=int, default=1, help="runs at once, each with its share of the threads")
    for name, default in SHAPE.items():
        parser.add_argument(f"--{name}", type=int, help=f"of a model of item ids (default: {default})")
    parser.add_argument("--keep", type=int, default=20, help="items that are always recent, with experts")
    parser.add_argument("--block", type=int, default=50, help="items of a segment")
    parser.add_argument("--group_size", type=int, default=5, help="items of a session patch")
    parser.add_argument("--consistency", type=float, default=0.01, help="of memories; 1 keeps them from learning")
    parser.add_argument("--epochs", type=float, default=12)
    parser.add_argument("--targets_per_step", type=int, default=2048)
    parser.add_argument("--rows_per_pass", type=int, default=4096)
    parser.add_argument("--learning_rate", type=float, help="(default: of recipes/train.py for such a model)")
    parser.add_argument("--limit", type=int, help="test samples, spread over all")
    args = parser.parse_args(argv)
    if args.model is None:
        args.backbone = args.backbone or "sasrec"
    for name, default in SHAPE.items():
        if args.model is not None and getattr(args, name) is not None:
            parser.error(f"--{name}: expected none with --model, whose sizes have their own, got {getattr(args, name)}")
        if args.model is None and getattr(args, name) is None:
            setattr(args, name, default)
    if args.learning_rate is None:
        args.learning_rate = settings_of(args).learning_rate
    if args.processes < 1:
        parser.error(f"--processes: expected at least 1, got {args.processes}")
    known = all_rows(args)
    for name in args.rows or ():
        if name not in known:
            parser.error(f"--rows: expected some of {', '.join(known)}, got {name}")
        of = known[name].of
        if of is not None and of not in args.rows:
            parser.error(f"--rows: expected {of} beside {name}, which uses its models")
    return args


def settings_of(args: argparse.Namespace) -> Settings:
    """What recipes/train.py trains such a model with."""
    return SETTINGS["ids" if args.model is None else "scratch-head"]


def measure_side_by_side(rows: Mapping[str, Row], args: argparse.Namespace, folder: Path) -> None:
    """`measure` what is not finished, in several processes; rows that use another's models after all others.

    Raises:
        RuntimeError: some failed, when all others are finished.
    """
    failed: list[str] = []
    for uses_others in (False, True):
        tasks = {
            f"{name}-{seed}": (name, seed, args)
            for seed in args.seeds
            for name, row in rows.items()
            if (row.of is not None) == uses_others
            and f"{row.of}-{seed}" not in failed
            and not (folder / f"{name}-{seed}" / RESULT).exists()
        }
        if tasks:
            print(f"each writes {LOG} in its folder: {', '.join(tasks)}", flush=True)
        failed += side_by_side(measure_alone, tasks, args.processes)
    if failed:
        raise RuntimeError(
            f"--processes: expected all runs to finish, got errors, which are above, of {', '.join(failed)}; the same "
            "command goes on with these"
        )


def measure_alone(name: str, seed: int, args: argparse.Namespace) -> None:
    """`measure`, with what is printed of it in a file of its own."""
    folder = Path(args.output_dir)
    own = folder / f"{name}-{seed}"
    own.mkdir(exist_ok=True)
    with (own / LOG).open("a", buffering=1, encoding="utf-8") as log, redirect_stdout(log):
        measure(name, all_rows(args)[name], seed, args, load(args), folder)


# ------------------------------------------------------------------ one row, one seed


def measure(name: str, row: Row, seed: int, args: argparse.Namespace, data: Interactions, folder: Path) -> None:
    """Train and evaluate, unless that was done."""
    own = folder / f"{name}-{seed}"
    if (own / RESULT).exists():
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
    unfinished.replace(own / RESULT)


def device_of_runs() -> torch.device:
    """Where transformers trains."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def trained(
    row: Row, seed: int, args: argparse.Namespace, data: Interactions, own: Path
) -> tuple[Any, dict[str, float]]:
    """The best model of a run by the validation split, and what the run took."""
    settings = settings_of(args)
    set_seed(seed)
    model, tokenizer = make_model(row, seed, args, data)
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
        head="items",
        head_learning_rate=settings.head_learning_rate,
        eval_samples=data.samples("val"),
        eval_options={"search": "items", "batch_size": EVALUATED_AT_ONCE},
        processing_class=tokenizer,
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


def make_model(row: Row, seed: int, args: argparse.Namespace, data: Interactions) -> tuple[Any, Any]:
    """With positions for whole histories and room for what the row learns beside items; and its tokenizer, if any."""
    dropout = settings_of(args).dropout
    model: Any
    if args.model is not None:
        model, tokenizer = load_model(
            args.model,
            data.titles,
            item_embeddings=True,
            item_head=True,
            seed=seed,
            dropout=dropout,
            separator=False,
        )
        model.tokenizer = tokenizer
    else:
        tokenizer = None
        model = pk.ItemModel(
            catalog_of_ids(data.titles),
            block=args.backbone,
            width=args.width,
            layers=args.layers,
            heads=args.heads,
            dropout=dropout,
            max_positions=int(data.histories.lengths.max(initial=1)) + 1,
            seed=seed,
        )
    return with_learned_rows(model, row.policy, data, seed, row.memory or {}), tokenizer


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


if __name__ == "__main__":
    main()
