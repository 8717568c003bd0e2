# SPDX-License-Identifier: Apache-2.0
"""Train a recommender over compressed histories, one stage at a time.

A small model from scratch, on synthetic data (minutes on a CPU), from text to session patches:

    python recipes/train.py --stage sft      --model tiny         --data synthetic --output_dir runs/sft
    python recipes/train.py --stage pretrain --from runs/sft      --data synthetic --output_dir runs/pretrain
    python recipes/train.py --stage items    --from runs/pretrain --data synthetic --output_dir runs/items
    python recipes/train.py --stage sessions --from runs/pretrain --data synthetic --output_dir runs/sessions
    python recipes/evaluate.py runs/sessions --data synthetic

All targets of a user are learned in one pass over the history, in batches of --rows_per_pass rows. The published form,
a sample for each target with a history of its own, is --targets-per-pass one: here with a local Llama-3.2-1B and the
paper's settings for the data set, 64 samples a step in batches of 8:

    python recipes/train.py --stage pretrain --model Llama-3.2-1B-Instruct --data ml-1m --output_dir runs/pretrain \\
        --targets-per-pass one --per_device_train_batch_size 8 --gradient_accumulation_steps 8 \\
        --activation_checkpointing --save_steps 500

A small model from scratch learns its users by heart if it is trained for long: --early_stopping 5 recommends for the
validation split twenty times in the run, ends it after five times without a better HR@20, and saves the best model. Hit
rates are noisy, and low for a while at first: less patience can end a run before it has begun.

    python recipes/train.py --stage items --model tiny --data ml-100k --output_dir runs/items \\
        --num_train_epochs 20 --early_stopping 5 --dropout 0.3 --label_smoothing_factor 0.1

A run that was killed goes on where it was: the same command and --resume. Several GPUs: torchrun --nproc_per_node 2
recipes/train.py ... All flags that are not listed here are those of transformers.TrainingArguments; before 5.23 it is
--gradient_checkpointing instead of --activation_checkpointing.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    EarlyStoppingCallback,
    HfArgumentParser,
    TrainingArguments,
)

sys.path.append(str(Path(__file__).resolve().parents[1]))  # an installed patchkern comes first

import patchkern as pk
from patchkern.data import Interactions, samples_of
from patchkern.data.preparation import add_arguments, load
from patchkern.models.scratch import SIZES
from patchkern.ops.backends import describe as describe_backend
from patchkern.training import SETTINGS, STAGES, PatchTrainer, Settings, checkpoints, find_model
from recipes import models

# What a resumed run must share with the run it continues, or its losses would not be the uninterrupted run's.
SHARED = (
    *("num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "world_size"),
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "optim"),
    *("adam_beta1", "adam_beta2", "adam_epsilon", "label_smoothing_factor", "seed", "data_seed", "bf16", "fp16"),
)
# Twenty evaluations a run; --eval_steps and --save_steps change that.
EARLY_STOPPING = {
    "eval_strategy": "steps",
    "eval_steps": 0.05,
    "save_strategy": "steps",
    "save_steps": 0.05,
    "save_total_limit": 2,
    "metric_for_best_model": "HR@20",
    "load_best_model_at_end": True,
    "restore_callback_states_from_checkpoint": True,
}


def main(argv: Sequence[str] | None = None) -> PatchTrainer:
    args, rest = parse(argv)
    data = load(args)
    name, settings = choose_settings(args, data)
    parser = HfArgumentParser(TrainingArguments)  # type: ignore[arg-type]
    parser.set_defaults(**settings.defaults(args.stage), **({} if args.early_stopping is None else EARLY_STOPPING))
    (arguments,) = parser.parse_args_into_dataclasses(rest)

    description = {key: value for key, value in vars(args).items() if key != "resume"} | {"settings": name}
    description |= {key: str(getattr(arguments, key)) for key in SHARED}
    start = check_output(Path(arguments.output_dir), description, args.resume)

    model, tokenizer = load_model(args, data, settings)
    trainer = PatchTrainer(
        model,
        arguments,
        data.histories,
        samples_of(data, "train"),
        settings.policy(args.stage, args.max_items),
        pretrain=args.stage == "pretrain",
        supervise_history=args.supervise_history,
        rows_per_pass=args.rows_per_pass if args.targets_per_pass == "all" else None,
        jitter=settings.jitter if args.targets_per_pass == "all" else 0.0,
        eval_samples=None if arguments.eval_strategy == "no" else data.samples("val"),
        processing_class=tokenizer,
        callbacks=[] if args.early_stopping is None else [EarlyStoppingCallback(args.early_stopping)],
    )
    if trainer.is_world_process_zero():
        write_json(Path(arguments.output_dir) / "arguments.json", description)
        print(f"{banner(model.device)}\n{data}\n{describe(trainer, args.stage)}", flush=True)
    metrics = trainer.train(resume_from_checkpoint=None if start is None else str(start)).metrics
    if arguments.load_best_model_at_end:
        trainer.save_model()  # beside the checkpoints, of which it is not the last
    if trainer.is_world_process_zero():
        saved: Any = arguments.output_dir
        if not arguments.load_best_model_at_end:
            saved = next(reversed(checkpoints(arguments.output_dir)), "nothing")
        before = 0 if start is None else int(start.name.rpartition("-")[2])
        done = (trainer.state.global_step - before) / trainer.args.max_steps
        speed = trainer.train_dataset.num_targets * done / metrics["train_runtime"]
        print(f"{speed:.1f} targets/s, peak memory {peak_memory() / 2**30:.2f} GiB, saved: {saved}", flush=True)
    return trainer


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--stage", required=True, choices=STAGES)
    add_arguments(parser)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", help=f"{', '.join(SIZES)} (from scratch), or the folder of a transformers model")
    model.add_argument("--from", dest="checkpoint", help="a run of this recipe, or one of its checkpoints")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the weights")
    parser.add_argument("--vocab_size", type=int, default=4096, help="of the tokenizer, from scratch only")
    parser.add_argument("--dropout", type=float, help="from scratch only (default: of the settings)")
    parser.add_argument("--no-separator", action="store_true", help="between items, from scratch only")
    parser.add_argument(
        "--settings", choices=SETTINGS, help="rates, batch and patch sizes (default: by model and data)"
    )
    parser.add_argument("--max_items", type=int, default=100, help="latest items of a history")
    parser.add_argument(
        "--keep_text", type=int, help="latest items that stay text in the items stage (default: of the settings)"
    )
    parser.add_argument("--targets-per-pass", choices=["all", "one"], default="all", help="of a user")
    parser.add_argument("--rows_per_pass", type=int, default=16384, help="of a batch with all targets")
    parser.add_argument(
        "--jitter", type=float, help="of the order of training items, in such batches (default: of the settings)"
    )
    parser.add_argument(
        "--supervise_history", action="store_true", help="train on the history's text too (for models from scratch)"
    )
    parser.add_argument(
        "--item-embeddings", action="store_true", help="learn a vector for each item's patches; later stages keep it"
    )
    parser.add_argument(
        "--early_stopping", type=int, metavar="PATIENCE", help="evaluations without a better HR@20 that end the run"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --output_dir, if any")
    args, rest = parser.parse_known_args(argv)
    if args.early_stopping is not None and args.early_stopping < 1:
        parser.error(f"--early_stopping: expected at least 1, got {args.early_stopping}")
    if args.dropout is not None and args.model not in SIZES:
        parser.error(f"--dropout: expected only with --model {' or '.join(SIZES)}; other models have their own")
    if args.no_separator and args.model not in SIZES:
        parser.error(f"--no-separator: expected only with --model {' or '.join(SIZES)}; other models keep their prompt")
    return args, rest


def choose_settings(args: argparse.Namespace, data: Interactions) -> tuple[str, Settings]:
    """--settings, else those of the run we start from, of scratch models, or of the data set of that name."""
    name = args.settings
    if name is None and args.checkpoint is not None:
        folder = find_model(args.checkpoint, "--from")
        before = [path for path in (folder / "arguments.json", folder.parent / "arguments.json") if path.is_file()]
        name = json.loads(before[0].read_text(encoding="utf-8"))["settings"] if before else None
    elif name is None and args.model in SIZES:
        name = "scratch"
    name = name or next((known for known in SETTINGS if data.name.startswith(known)), None)
    if name is None:
        raise ValueError(f"--settings: expected one of {', '.join(SETTINGS)}, as none is known for {data.name!r}")
    given = {field: getattr(args, field) for field in ("keep_text", "jitter") if getattr(args, field) is not None}
    return name, replace(SETTINGS[name], **given)


# ------------------------------------------------------------------ the model


def load_model(args: argparse.Namespace, data: Interactions, settings: Settings) -> tuple[pk.PatchedCausalLM, Any]:
    return models.load_model(
        args.checkpoint or args.model,
        data.titles,
        dtype=getattr(torch, args.dtype),
        words=models.words_of(data),
        item_embeddings=args.item_embeddings,
        vocab_size=args.vocab_size,
        dropout=settings.dropout if args.dropout is None else args.dropout,
        separator=not args.no_separator,
        argument="--from" if args.checkpoint else "--model",
    )


# ------------------------------------------------------------------ the run's folder


def check_output(folder: Path, description: dict[str, Any], resume: bool) -> Path | None:
    """The checkpoint to start from; refuses to mix two runs in one folder."""
    found = checkpoints(folder)
    if not found:
        return None
    if not resume:
        raise ValueError(f"--output_dir: expected a folder without checkpoints, or --resume, got {os.fspath(folder)!r}")
    before = json.loads((folder / "arguments.json").read_text(encoding="utf-8"))
    now = json.loads(json.dumps(description))
    changed = [f"{key} {before.get(key)!r} -> {now.get(key)!r}" for key in now if now[key] != before.get(key)]
    if changed:
        raise ValueError(f"--resume: expected the arguments of the run so far, got other {'; '.join(changed)}")
    return found[-1]


def write_json(path: Path, content: dict[str, Any]) -> None:
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    unfinished.replace(path)


# ------------------------------------------------------------------ what is printed


def banner(device: torch.device) -> str:
    return (
        f"patchkern {pk.__version__}, torch {torch.__version__}, transformers {transformers.__version__}\n"
        f"BACKEND {describe_backend(device)}"
    )


def describe(trainer: PatchTrainer, stage: str) -> str:
    arguments, dataset = trainer.args, trainer.train_dataset
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    collate: Any = trainer.data_collator
    batch = collate([dataset[number] for number in range(arguments.train_batch_size)])["layout"]
    targets = dataset.num_targets / arguments.max_steps
    return (
        f"{parameters / 1e6:.1f} M parameters, {dataset.num_targets:,} targets in {arguments.max_steps:,} steps of "
        f"{targets:,.0f}, learning rate {arguments.learning_rate:g}\n"
        f"stage {stage}, {trainer.model.policy}: {batch.num_rows:,} rows, compression ratio "
        f"{batch.compression_ratio:.2f} in the first batch"
    )


def peak_memory() -> int:
    """Bytes: of the GPU, or of the process where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    main()
