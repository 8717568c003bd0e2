# SPDX-License-Identifier: Apache-2.0
"""The flags of recipes/train.py: its own, those of transformers.TrainingArguments, and what a run hands on."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Iterator, Sequence
from typing import Any

from transformers import HfArgumentParser, TrainingArguments

from patchkern.data.preparation import add_arguments
from patchkern.models.adapters import ADAPTER
from patchkern.models.files import read_description
from patchkern.models.folders import current
from patchkern.models.scratch import SIZES
from patchkern.training import SETTINGS, STAGES, find_model
from recipes import learned
from recipes.commands import Parser
from recipes.item_models import add_flags as add_item_flags
from recipes.training_run import read_arguments

# What a run started with --from takes over from the one before, unless its own flags say otherwise; and what it is
# where neither does.
HANDED_ON: dict[str, Any] = {
    "settings": None,
    "keep_text": None,
    "group_size": None,
    "sessions_keep_text": None,
    "align": None,
    "max_items": 100,
    "head": "titles",
    "hold_out_items": 0.0,
    "item_text": None,
}
# The shape of a model of item ids where nothing is given.
_OF_BACKBONE = {"width": 64, "layers": 2, "heads": 2, "item_scores": "dot"}
_NOT_KEPT = ("resume", "dry_run", "processes")
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


class _OfDataclasses(Parser, HfArgumentParser):
    """For flags that are the fields of a dataclass."""


def make_parser(description: str | None) -> Parser:
    """The recipe's flags, and after them those of transformers."""
    own = Parser(add_help=False)
    group = own.add_argument_group("stage and data")
    group.add_argument("--stage", required=True, choices=(*STAGES, *learned.STAGES))
    add_arguments(group, item_text=True)
    group.add_argument(
        "--hold_out_items",
        type=float,
        metavar="SHARE",
        help="of the items to leave out wholly, always the same ones of a data set; recipes/cold_items.py then shows "
        "what is known of items that nobody has taken (default: none)",
    )

    group = own.add_argument_group("model (one of --model, --from and --backbone)")
    group.add_argument(
        "--model",
        help=f"{', '.join(SIZES)} (from scratch), or a transformers model: a folder, a GGUF file or a hub id",
    )
    group.add_argument(
        "--from",
        dest="checkpoint",
        help=f"a run of this recipe, or one of its checkpoints; {', '.join(HANDED_ON)}, "
        "item embeddings and prompt are taken over",
    )
    group.add_argument("--prompt", metavar="FILE", help="the prompt's words, as JSON (default: of the data set)")
    group.add_argument("--random_weights", action="store_true", help="of --model keep the architecture alone")
    group.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the weights")
    group.add_argument("--lora", type=int, metavar="RANK", help="train an adapter, and the rows of added markers")
    group.add_argument("--load_in_4bit", action="store_true", help="the weights under an adapter, with bitsandbytes")
    group.add_argument(
        "--item_embeddings", action="store_true", help="learn a vector for each item's patches; later stages keep it"
    )
    group.add_argument(
        "--vector_dropout",
        type=float,
        metavar="SHARE",
        help="of the items that are without their vector in a pass, so that text must carry (default: none)",
    )
    group.add_argument("--vocab_size", type=int, default=4096, help="of the tokenizer, from scratch only")
    group.add_argument("--dropout", type=float, help="from scratch only (default: of the settings)")
    group.add_argument(
        "--item_tokens", action="store_true", help="a token for each item in place of its title, from scratch only"
    )
    group.add_argument("--no_separator", action="store_true", help="between items, from scratch only")

    add_item_flags(own, _OF_BACKBONE)
    learned.add_flags(own)
    group = own.add_argument_group("histories")
    group.add_argument(
        "--max_items",
        type=int,
        help=f"latest items of a history (default: {HANDED_ON['max_items']}, all with --backbone, and where"
        " what is old is compressed to learned rows)",
    )
    group.add_argument(
        "--keep_text", type=int, help="latest items that stay text in the items stage (default: of the settings)"
    )
    group.add_argument("--group_size", type=int, help="items of a session patch (default: of the settings)")
    group.add_argument(
        "--sessions_keep_text",
        type=int,
        help="latest items that stay text in the sessions stage (default: of the settings; as many as a session has, "
        "0 for small models with an item head)",
    )
    group.add_argument(
        "--align",
        choices=("end", "start"),
        help="of a history, where sessions are counted from; from the start, targets share the items between sessions "
        "and text (default: of the settings; the end, the start for small models with an item head)",
    )
    group.add_argument(
        "--item_dropout",
        type=float,
        metavar="SHARE",
        help="of the items before the latest --keep_text, left out at random in the sft stage and when recommending",
    )
    group.add_argument(
        "--jitter",
        type=float,
        help="of the order of training items, with all targets of a user in one pass (default: of the settings)",
    )

    group = own.add_argument_group("steps")
    group.add_argument("--settings", choices=SETTINGS, help="rates, batch and patch sizes (default: by model and data)")
    group.add_argument("--targets_per_pass", choices=["all", "one"], default="all", help="of a user")
    group.add_argument("--rows_per_pass", type=int, default=16384, help="of a batch with all targets")
    group.add_argument(
        "--targets_per_step",
        type=int,
        help="in as many such batches as that takes (default: what --rows_per_pass and "
        "--gradient_accumulation_steps come to)",
    )
    group.add_argument(
        "--memory_budget",
        metavar="SIZE",
        help='such as "40GiB": fewer rows a pass, or recomputed activations, if that is what it takes; none: refuse',
    )
    group.add_argument(
        "--supervise_history", action="store_true", help="train on the history's text too (for models from scratch)"
    )
    group.add_argument(
        "--head",
        choices=["titles", "items", "both"],
        help="what is learned, and validated by: titles token by token "
        "(the default), or items by the item head; both: validated by items",
    )
    group.add_argument("--title_weight", type=float, default=1.0, help="of the titles' loss")
    group.add_argument("--item_weight", type=float, default=1.0, help="of the items' loss")
    group.add_argument(
        "--head_learning_rate", type=float, help="of item head and item embeddings (default: of the settings)"
    )
    group.add_argument(
        "--ema_decay",
        type=float,
        metavar="SHARE",
        help="that a step leaves of an average of the weights, which is validated and saved in their place "
        "(default: no average)",
    )
    group.add_argument(
        "--early_stopping",
        type=int,
        metavar="PATIENCE",
        help="evaluations without a better --metric_for_best_model "
        "that end the run (default: HR@20; NDCG@20 and others do too)",
    )
    group.add_argument(
        "--dry_run",
        nargs="?",
        const="cuda",
        choices=["cuda", "cpu"],
        help="print what each process would hold on such a device, and train nothing",
    )
    group.add_argument("--processes", type=int, help="of a --dry_run (default: those that run)")
    group.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --output_dir, if any")
    theirs = _OfDataclasses(TrainingArguments, add_help=False)
    theirs._optionals.title = "transformers.TrainingArguments"
    usage = (
        "%(prog)s --stage STAGE --data DATA (--model MODEL | --from RUN | --backbone BLOCK) --output_dir FOLDER [flags]"
    )
    return Parser(usage=usage, description=description, parents=[own, theirs])


def parse(parser: Parser, argv: Sequence[str] | None) -> argparse.Namespace:
    """All flags, checked against each other, with what `--from` hands on; None where transformers decides by default.

    Exits with an error that names the flag.

    Raises:
        FileNotFoundError: --from is no model.
    """
    # to know what was given
    parser.set_defaults(bf16=None, lr_scheduler_type=None)
    args = parser.parse_args(argv)
    if [args.model, args.checkpoint, args.backbone].count(None) != 2:
        parser.error("--model, --from, --backbone: expected one of them")
    if args.output_dir is None:
        parser.error("--output_dir: expected a folder for the run")
    scratch = f"expected only with --model {' or '.join(SIZES)}; other models"
    for wrong, message in (
        *learned.wrong_flags(args),
        (
            args.early_stopping is not None and args.early_stopping < 1,
            f"--early_stopping: expected at least 1, got {args.early_stopping}",
        ),
        (
            args.item_dropout is not None and (args.stage != "sft" or not 0 <= args.item_dropout <= 1),
            f"--item_dropout: expected a share in 0..1 with --stage sft, got {args.item_dropout} with {args.stage}",
        ),
        (
            args.dropout is not None and args.model not in SIZES and args.backbone is None,
            f"--dropout: {scratch} have their own",
        ),
        *(
            (args.backbone is None and getattr(args, name) is not None, f"--{name}: expected only with --backbone")
            for name in _OF_BACKBONE
        ),
        *_of_item_ids(args, args.backbone is not None, "--backbone"),
        (args.no_separator and args.model not in SIZES, f"--no_separator: {scratch} keep their prompt"),
        (args.item_tokens and args.model not in SIZES, f"--item_tokens: {scratch} keep their titles"),
        (
            args.item_tokens and args.item_text is not None,
            "--item_text: expected none with --item_tokens, by which an item is read",
        ),
        *(
            (share is not None and not 0 <= share < 1, f"--{name}: expected at least 0 and below 1, got {share}")
            for name, share in (("vector_dropout", args.vector_dropout), ("hold_out_items", args.hold_out_items))
        ),
        (
            bool(args.vector_dropout) and args.model is not None and not args.item_embeddings,
            "--vector_dropout: expected only with --item_embeddings, of which it drops some",
        ),
        (
            args.random_weights and (args.model is None or args.model in SIZES),
            "--random_weights: expected only with a transformers --model",
        ),
        (
            args.targets_per_step is not None and args.targets_per_pass == "one",
            "--targets_per_step: expected none with --targets_per_pass one, whose steps are "
            "--per_device_train_batch_size times --gradient_accumulation_steps",
        ),
        (
            bool(args.jitter) and args.targets_per_pass == "one",
            "--jitter: expected none with --targets_per_pass one, whose histories have their order",
        ),
        (
            args.memory_budget is not None and args.targets_per_pass == "one",
            "--memory_budget: expected none with --targets_per_pass one, whose batches it does not choose",
        ),
        (
            args.ema_decay is not None and not 0 < args.ema_decay < 1,
            f"--ema_decay: expected above 0 and below 1, got {args.ema_decay}",
        ),
        (
            args.ema_decay is not None and not (args.memory_budget is None and args.dry_run is None),
            "--ema_decay: expected none with --memory_budget or --dry_run, which do not count the average",
        ),
        (
            args.dry_run is not None and args.targets_per_pass == "one",
            "--dry_run: expected none with --targets_per_pass one, whose batches have no number of rows",
        ),
        (
            args.processes is not None and (args.dry_run is None or args.processes < 1),
            f"--processes: expected at least 1, and only with --dry_run, got {args.processes}; torchrun starts some",
        ),
        (
            args.stage == "memory" and args.supervise_history,
            "--supervise_history: expected none with --stage memory, whose histories are in two passes",
        ),
        (
            args.stage == "memory" and args.targets_per_pass == "one",
            "--targets_per_pass: expected all with --stage memory",
        ),
        (
            args.load_in_4bit and args.lora is None and not _is_adapter(args.checkpoint),
            "--load_in_4bit: expected only with --lora, which trains beside it, or --from a run with that",
        ),
        (
            args.resume_from_checkpoint is not None,
            "--resume_from_checkpoint: expected --resume, which goes on from the last checkpoint in --output_dir",
        ),
        (args.lora is not None and not _installed("peft"), "--lora: expected peft to be installed, got none"),
        (
            args.load_in_4bit and not _installed("bitsandbytes"),
            "--load_in_4bit: expected bitsandbytes to be installed, got none",
        ),
    ):
        if wrong:
            parser.error(message)
    before: dict[str, Any] = {}
    reads_ids = args.backbone is not None
    if args.checkpoint is not None:
        source = find_model(args.checkpoint, "--from")
        before = read_arguments(source)
        reads_ids = "titles" not in read_description(current(source)).learns
        for wrong, message in _of_item_ids(args, reads_ids, "--from a model of item ids"):
            if wrong:
                parser.error(message)
    if reads_ids:
        args.head = "items"
    if args.backbone is not None or args.stage in learned.STAGES:
        before["max_items"] = None
    for name, otherwise in HANDED_ON.items():
        if getattr(args, name) is None:
            setattr(args, name, before.get(name, otherwise))
    for name, otherwise in _OF_BACKBONE.items():
        if getattr(args, name) is None:
            setattr(args, name, otherwise)
    if args.supervise_history and args.head == "items":
        parser.error("--supervise_history: expected none with --head items, which learns no text")
    for name, head in (("title_weight", "items"), ("item_weight", "titles")):
        if args.head == head and getattr(args, name) != 1.0:
            parser.error(f"--{name}: expected none with --head {head}, which has no such loss")
    return args


def training_arguments(
    parser: Parser, argv: Sequence[str] | None, given: argparse.Namespace, defaults: dict[str, Any]
) -> TrainingArguments:
    """What is ``given`` on the command line, and ``defaults`` where nothing is."""
    if given.lr_scheduler_type is not None:
        defaults = defaults | {"lr_scheduler_kwargs": None}  # they are of another one
    parser.set_defaults(**defaults)
    args = parser.parse_args(argv)
    fields = TrainingArguments.__dataclass_fields__.values()
    return TrainingArguments(**{field.name: getattr(args, field.name) for field in fields if field.init})


def own_flags(args: argparse.Namespace) -> dict[str, Any]:
    """The recipe's flags that a run is known by, without those of transformers."""
    theirs = TrainingArguments.__dataclass_fields__
    return {name: value for name, value in vars(args).items() if name not in theirs and name not in _NOT_KEPT}


def _of_item_ids(args: argparse.Namespace, reads_ids: bool, what: str) -> Iterator[tuple[bool, str]]:
    """Flags that a model of item ids has no use for, and what to say of them."""
    yield (
        reads_ids and args.head not in (None, "items"),
        f"--head: expected items with {what}, which reads no titles",
    )
    for name in ("item_embeddings", "vector_dropout", "lora", "prompt", "random_weights", "item_text"):
        yield reads_ids and bool(getattr(args, name)), f"--{name}: expected none with {what}"


def _is_adapter(checkpoint: str | None) -> bool:
    return checkpoint is not None and (current(find_model(checkpoint, "--from")) / ADAPTER).is_file()


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
