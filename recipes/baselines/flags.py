# SPDX-License-Identifier: Apache-2.0
"""The flags of recipes/baselines/train.py."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

from patchkern.data.preparation import add_arguments
from recipes.baselines.evaluation import SEEN
from recipes.baselines.settings import SETTINGS, Settings, settings_of
from recipes.commands import Parser
from recipes.priors import ABOUT, FIT_LIMIT, check_prior

CHANGE = {
    "num_train_epochs": "epochs",
    "batch_size": "batch",
    "learning_rate": "learning_rate",
    "weight_decay": "weight_decay",
    "dropout": "dropout",
    "window": "window",
    "width": "width",
    "layers": "layers",
    "heads": "heads",
}
"""Flags that change settings, and what they change."""
WITHOUT = {"heads": ("gru4rec", "caser", "mamba4rec"), "layers": ("caser",)}
"""Of these, those that a network has no use for."""


def parse(description: str | None, argv: Sequence[str] | None) -> argparse.Namespace:
    """All flags, checked against each other; exits with an error that names the flag."""
    parser = Parser(description=description)
    parser.add_argument("--model", help=", ".join(SETTINGS["tuned"]))
    parser.add_argument("--setting", choices=list(SETTINGS), default="tuned", help="how it is trained")
    add_arguments(parser)
    parser.add_argument("--output_dir", required=True, help="the run's folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--encoder", help="of titles, for morec: a folder of a sentence encoder, or a hub id")
    parser.add_argument("--resume", action="store_true", help="go on where a killed run was")
    parser.add_argument("--evaluate_only", action="store_true", help="of the run in --output_dir")
    parser.add_argument("--threads", type=int, help="of torch (default: its own)")
    parser.add_argument("--bf16", choices=["true", "false"], help="products of the softmax (default: if faster here)")
    group = parser.add_argument_group("instead of the setting's own")
    for flag, field in CHANGE.items():
        kind = float if isinstance(getattr(Settings(), field), float) else int
        group.add_argument(f"--{flag}", type=kind)
    group = parser.add_argument_group("ranking")
    group.add_argument("--split", choices=["test", "val"], default="test")
    group.add_argument("--seen_items", nargs="+", choices=SEEN, default=["left_out"], help="default: left_out")
    group.add_argument("--limit", type=int, help="so many samples only, spread over all")
    group.add_argument("--prior", nargs="+", default=[], help=f"rows with each and with all: {ABOUT}")
    group.add_argument("--prior_weight", nargs="+", type=float, help="of each (default: fitted on validation samples)")
    group.add_argument("--fit_limit", type=int, help=f"of these, so many (default: {FIT_LIMIT})")
    args = parser.parse_args(argv)
    args.search = args.metric = None  # flags of recipes/evaluate.py, whose checks these are
    check_prior(parser, args)
    try:
        check(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def check(args: argparse.Namespace) -> None:
    """Raise a ValueError that names the flag."""
    for name in ("limit", "threads", *CHANGE):
        value = getattr(args, name)
        if isinstance(value, int) and value < 1:
            raise ValueError(f"--{name}: expected at least 1, got {value}")
    if args.evaluate_only:
        for name in ("resume", "encoder", "bf16", *CHANGE):
            if getattr(args, name) not in (None, False):
                raise ValueError(f"--evaluate_only: expected no --{name} beside it, as the run is not trained")
        return
    if args.model is None:
        raise ValueError(f"--model: expected one of {', '.join(SETTINGS['tuned'])}, got none")
    settings = chosen_settings(args)
    for name, without in WITHOUT.items():
        if args.model in without and getattr(args, name) is not None:
            raise ValueError(f"--{name}: expected none with --model {args.model}, which has none to choose")
    if args.bf16 == "true" and settings.loss != "softmax":
        raise ValueError(f"--bf16: expected none with --setting {args.setting}, which has no softmax")
    if args.model not in WITHOUT["heads"] and settings.width % settings.heads:
        raise ValueError(f"--heads: expected a divisor of the width {settings.width}, got {settings.heads}")
    if not 0 <= settings.dropout < 1:
        raise ValueError(f"--dropout: expected at least 0 and below 1, got {settings.dropout}")
    if not settings.learning_rate > 0:
        raise ValueError(f"--learning_rate: expected above 0, got {settings.learning_rate}")
    if not settings.weight_decay >= 0:
        raise ValueError(f"--weight_decay: expected at least 0, got {settings.weight_decay}")
    if args.model == "morec" and args.encoder is None:
        raise ValueError("--encoder: expected the folder or hub id of a sentence encoder with --model morec, got none")
    if args.model != "morec" and args.encoder is not None:
        raise ValueError(f"--encoder: expected only with --model morec, got --model {args.model}")


def chosen_settings(args: argparse.Namespace) -> Settings:
    """Those of the model and the setting, with what is asked for of them."""
    given = {field: getattr(args, flag) for flag, field in CHANGE.items() if getattr(args, flag) is not None}
    return replace(settings_of(args.model, args.setting), **given)
