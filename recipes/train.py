# SPDX-License-Identifier: Apache-2.0
"""Train a recommender over compressed histories, one stage at a time.

A small model from scratch, on synthetic data (minutes on a CPU), from text to session patches:

    python recipes/train.py --stage sft      --model tiny         --data synthetic --output_dir runs/sft
    python recipes/train.py --stage pretrain --from runs/sft      --data synthetic --output_dir runs/pretrain
    python recipes/train.py --stage items    --from runs/pretrain --data synthetic --output_dir runs/items
    python recipes/train.py --stage sessions --from runs/pretrain --data synthetic --output_dir runs/sessions
    python recipes/evaluate.py runs/sessions --data synthetic

All targets of a user are learned in one pass over the history, in batches of --rows_per_pass rows. The published form,
a sample for each target with a history of its own, is --targets_per_pass one: here with a local Llama-3.2-1B and the
paper's settings for the data set, 64 samples a step in batches of 8:

    python recipes/train.py --stage pretrain --model Llama-3.2-1B-Instruct --data ml-1m --output_dir runs/pretrain \\
        --targets_per_pass one --per_device_train_batch_size 8 --gradient_accumulation_steps 8 \\
        --activation_checkpointing --save_steps 500

A small model from scratch learns its users by heart if it is trained for long: --early_stopping 5 recommends for the
validation split twenty times in the run, ends it after five times without a better HR@20, and saves the best model. Hit
rates are noisy, and low for a while at first: less patience can end a run before it has begun.

    python recipes/train.py --stage items --model tiny --data ml-100k --output_dir runs/items \\
        --num_train_epochs 20 --early_stopping 5 --dropout 0.3 --label_smoothing_factor 0.1

--head items learns the items themselves, each from one hidden state: a target costs a row or two instead of a title's,
and the model recommends in one pass and one product (search="items").

    python recipes/train.py --stage items --model tiny --head items --item_embeddings --no_separator --data ml-100k \\
        --output_dir runs/head --rows_per_pass 4096 --num_train_epochs 12 --early_stopping 5

What a title is worth where there is no history: --hold_out_items 0.1 trains without a tenth of the items,
--vector_dropout 0.3 without some items' vectors in each pass, so that text must carry; recipes/cold_items.py compares.

--backbone sasrec reads item ids and no words, on the same passes: the model to compare with.

    python recipes/train.py --stage items --backbone sasrec --data ml-100k --output_dir runs/sasrec \\
        --rows_per_pass 2048 --num_train_epochs 12 --early_stopping 20
    python recipes/evaluate.py runs/sasrec --data ml-100k --exclude_seen --search items

--stage experts compresses what is old to learned rows: of a user's past only their keys and values are kept. It goes on
from any other stage, or begins from scratch (docs/learned-compression.md):

    python recipes/train.py --stage experts --from runs/items --data ml-100k --output_dir runs/experts \
        --experts 4 --keep 20 --block 50
    python recipes/train.py --stage experts --backbone hstu --data ml-100k --output_dir runs/hstu-experts \
        --rows_per_pass 4096 --num_train_epochs 12 --early_stopping 20

--stage memory compresses what is old into a few vectors (docs/learned-compression.md), from an items checkpoint or from
scratch. A pass reads every history twice, whole and in segments:

    python recipes/train.py --stage memory --backbone sasrec --data ml-100k --output_dir runs/memory \
        --rows_per_pass 4096 --num_train_epochs 12 --early_stopping 20 --slots 4 --block 50 --mode overwrite
    python recipes/train.py --stage memory --from runs/items --data ml-100k --output_dir runs/memory-lm
    python recipes/evaluate.py runs/memory --data ml-100k --exclude_seen --search items

Pretrained models far below 1B learn at higher rates than the paper's, and in steps of one size whatever their rows:

    python recipes/train.py --stage items --model SmolLM2-135M-Instruct --data ml-100k --output_dir runs/small \\
        --settings pretrained-small --rows_per_pass 4096 --targets_per_step 512

A run that was killed goes on where it was: the same command and --resume. Several GPUs, or processes on a CPU
(docs/several-processes.md), and what each of eight would hold, before there are any:

    torchrun --nproc_per_node 2 recipes/train.py --stage items ...
    python recipes/train.py --stage items ... --dry_run --processes 8

Before transformers 5.23 it is --gradient_checkpointing instead of --activation_checkpointing.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig, EarlyStoppingCallback, TrainingArguments, set_seed

sys.path.append(str(Path(__file__).resolve().parents[1]))  # an installed patchkern comes first

import patchkern as pk
from patchkern.data import Interactions, hold_out_items, samples_of
from patchkern.data.preparation import load
from patchkern.models.scratch import SIZES
from patchkern.training import SETTINGS, PatchTrainer, Settings, checkpoints
from patchkern.training.collators import pass_collator
from recipes import item_models, learned, models, training_flags
from recipes.dry_run import dry_run
from recipes.training_choices import CHECKPOINTING, Place, choose_bf16, plan_passes
from recipes.training_run import banner, check_output, describe, peak_memory, read_arguments, write_arguments

# What a resumed run must share with the run it continues, or its losses would not be the uninterrupted run's.
SHARED = (
    *("num_train_epochs", "max_steps", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
    *("weight_decay", "max_grad_norm"),
    *("optim", "adam_beta1", "adam_beta2", "adam_epsilon", "label_smoothing_factor", "seed", "data_seed"),
    *("bf16", "fp16"),
)
PAPERS = ("ml-1m", "ml-100k", "goodreads")
_SMALL = 400e6  # parameters, below which the paper's rates are too low


def main(argv: Sequence[str] | None = None) -> PatchTrainer:
    parser = training_flags.make_parser(__doc__)
    args = training_flags.parse(parser, argv)
    data = held_out(load(args), args.hold_out_items)
    name, settings = choose_settings(args, data)
    defaults = settings.defaults(learned.settings_stage(args.stage)) | (
        {} if args.early_stopping is None else training_flags.EARLY_STOPPING
    )
    folder = Path(args.output_dir)
    before = read_arguments(folder) if args.resume else {}
    if "bf16" in before:  # perhaps by a measurement, which might come out otherwise now
        defaults["bf16"] = before["bf16"] == "True"
    if args.memory_budget is not None:
        args.rows_per_pass = before.get("rows_per_pass", args.rows_per_pass)
    arguments = training_flags.training_arguments(parser, argv, args, defaults)

    def description() -> dict[str, Any]:
        return training_flags.own_flags(args) | {"settings": name} | shared(arguments, args)

    start = check_output(folder, description(), args.resume)
    set_seed(arguments.seed)
    model, tokenizer = load_model(args, data, settings, arguments.seed)
    policy: Any = learned.policy_of(args, settings, model.policy)
    if isinstance(model, pk.ItemModel):
        policy = item_models.read_as_trained(policy)
    model = learned.prepared(model, tokenizer, policy, args, data, arguments.seed)
    if args.item_dropout is not None:
        policy = pk.ItemDropout(args.item_dropout, settings.keep_text, args.max_items, arguments.seed)
    own_vectors = getattr(model, "item_embedding", None) is not None
    if args.head_learning_rate is not None and args.head == "titles" and not own_vectors:
        raise ValueError("--head_learning_rate: expected only with an item head (--head) or --item_embeddings")
    pretrain, together = args.stage == "pretrain", args.targets_per_pass == "all"
    collator: Any = pass_collator(
        model,
        data.histories,
        policy,
        pretrain=pretrain,
        seed=arguments.seed if arguments.data_seed is None else arguments.data_seed,
        supervise_history=args.supervise_history,
        head=args.head,
    )
    accumulates = args.targets_per_step is not None or arguments.gradient_accumulation_steps > 1
    if args.dry_run is not None:
        print(f"{data}\n{dry_run(args, model, data, arguments, collator, accumulates)}", flush=True)
        raise SystemExit
    if args.bf16 is None and "bf16" not in before and arguments.device.type == "cpu" and model.dtype is torch.float32:
        defaults["bf16"] = choose_bf16(model, data, arguments, collator)
        arguments = training_flags.training_arguments(parser, argv, args, defaults)
    if args.memory_budget is not None:
        place = Place.of(arguments)
        plan = plan_passes(args.memory_budget, args.rows_per_pass, model, data, arguments, collator, accumulates, place)
        args.rows_per_pass, defaults[CHECKPOINTING] = plan.rows_per_pass, plan.choice.checkpointing
        arguments = training_flags.training_arguments(parser, argv, args, defaults)
        if arguments.process_index == 0:
            print(plan, flush=True)
    trainer = PatchTrainer(
        model,
        arguments,
        data.histories,
        samples_of(data, "train"),
        policy,
        pretrain=pretrain,
        supervise_history=args.supervise_history,
        rows_per_pass=args.rows_per_pass if together else None,
        targets_per_step=args.targets_per_step,
        jitter=settings.jitter if together else 0.0,
        head=args.head,
        title_weight=args.title_weight,
        item_weight=args.item_weight,
        head_learning_rate=settings.head_learning_rate,
        ema_decay=args.ema_decay,
        eval_samples=None if arguments.eval_strategy == "no" else data.samples("val"),
        eval_options=None if args.head == "titles" else {"search": "items"},
        processing_class=tokenizer,
        callbacks=[] if args.early_stopping is None else [EarlyStoppingCallback(args.early_stopping)],
    )
    if trainer.is_world_process_zero():
        write_arguments(folder, description())
        print(f"{banner(model.device)}\n{data}\n{describe(trainer, args.stage, name)}", flush=True)
        if name in PAPERS and sum(map(torch.numel, model.parameters())) < _SMALL:
            print(
                f"settings {name} are the paper's for a model of 1B; for one so small see pretrained-small", flush=True
            )
        if arguments.save_strategy == "no":
            print("--save_strategy no: the trained model will not be kept", flush=True)
    metrics = trainer.train(resume_from_checkpoint=None if start is None else str(start)).metrics
    if arguments.load_best_model_at_end:
        trainer.save_model()  # beside the checkpoints, of which it is not the last
    if trainer.is_world_process_zero():
        saved: Any = folder
        if not arguments.load_best_model_at_end:
            saved = next(reversed(checkpoints(folder)), "nothing")
        steps_before = 0 if start is None else int(start.name.rpartition("-")[2])
        done = (trainer.state.global_step - steps_before) / trainer.args.max_steps
        speed = trainer.train_dataset.num_targets * done / metrics["train_runtime"]
        print(f"{speed:.1f} targets/s, peak memory {peak_memory() / 2**30:.2f} GiB, saved: {saved}", flush=True)
    return trainer


def shared(arguments: TrainingArguments, args: argparse.Namespace) -> dict[str, str]:
    """`SHARED`, and what a step consists of, with which any number of processes may go on."""
    if args.targets_per_step is not None:  # in passes that are packed for so many
        step = {"processes": arguments.world_size}
    else:
        step = {"passes of a step": arguments.gradient_accumulation_steps * arguments.world_size}
        if args.targets_per_pass == "one":
            step = {"samples of a step": arguments.per_device_train_batch_size * step["passes of a step"]}
    return {key: str(getattr(arguments, key)) for key in SHARED} | {key: str(value) for key, value in step.items()}


def held_out(data: Interactions, share: float) -> Interactions:
    """What is trained and validated on; a model that is saved with the catalogue of that says what was left out."""
    kept = hold_out_items(data, share)
    if share and os.environ.get("RANK", "0") == "0":
        print(
            f"{data.num_items - kept.num_items:,} of {data.num_items:,} items held out, and "
            f"{data.num_interactions - kept.num_interactions:,} of {data.num_interactions:,} interactions with them "
            "(hold_out_items)",
            flush=True,
        )
    return kept


def choose_settings(args: argparse.Namespace, data: Interactions) -> tuple[str, Settings]:
    """--settings, else those of the run we start from, of scratch models, or of the data set of that name."""
    name = args.settings
    if name is None and args.backbone is not None:
        name = "ids"
    if name is None and args.model in SIZES:
        name = "scratch" if args.head == "titles" else "scratch-head"
    name = name or next((known for known in SETTINGS if data.name.startswith(known)), None)
    if name is None:
        raise ValueError(f"--settings: expected one of {', '.join(SETTINGS)}, as none is known for {data.name!r}")
    fields = ("keep_text", "group_size", "sessions_keep_text", "align", "jitter", "head_learning_rate")
    given = {field: getattr(args, field) for field in fields if getattr(args, field) is not None}
    return name, replace(SETTINGS[name], **given)


def load_model(
    args: argparse.Namespace, data: Interactions, settings: Settings, seed: int
) -> tuple[pk.PatchedCausalLM | pk.ItemModel | pk.RecurrentMemory, Any]:
    dropout = settings.dropout if args.dropout is None else args.dropout
    if args.backbone is not None:
        return item_models.make_model(args, data, dropout, seed), None
    quantized: dict[str, Any] = {}
    if args.load_in_4bit:
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
        quantized["quantization_config"] = config
    return models.load_model(
        args.checkpoint or args.model,
        data.titles,
        texts=data.texts,
        dtype=getattr(torch, args.dtype),
        words=models.words_of(data),
        prompt_file=args.prompt,
        item_embeddings=args.item_embeddings,
        item_head=args.head != "titles",
        vector_dropout=args.vector_dropout,
        lora=args.lora,
        experts=learned.number_of_experts(args),
        trainable=True,
        random_weights=args.random_weights,
        seed=seed,
        vocab_size=args.vocab_size,
        item_tokens=args.item_tokens,
        dropout=dropout,
        separator=not args.no_separator,
        argument="--from" if args.checkpoint else "--model",
        **quantized,
    )


if __name__ == "__main__":
    main()
