# SPDX-License-Identifier: Apache-2.0
"""The stages that compress a past into learned rows: what recipes/train.py adds to a model for them."""

from __future__ import annotations

import argparse
from typing import Any

import patchkern as pk
from patchkern.batch.preference_memory import MODES
from patchkern.models.learned_rows import add_experts
from patchkern.training import Settings

STAGES = ("memory",)


def add_flags(parser: Any) -> None:
    """Of a recurrent memory."""
    group = parser.add_argument_group("recurrent memory (--stage memory), which reads whole histories")
    group.add_argument("--slots", type=int, default=4, help="vectors of a memory")
    group.add_argument("--block", type=int, default=50, help="items of a segment")
    group.add_argument("--mode", choices=MODES, default="overwrite", help="what an update does to a memory")
    group.add_argument(
        "--consistency", type=float, default=1.0, help="weight of the distance between it and its reference"
    )
    group.add_argument("--reference_loss", type=float, default=0.0, help="weight of the items' loss in whole histories")
    group.add_argument("--rollout", type=float, default=0.0, help="share of the passes with the model's own memories")


def settings_stage(stage: str) -> str:
    """The paper's stage whose settings this one trains with."""
    return "items" if stage in STAGES else stage


def policy_of(args: argparse.Namespace, settings: Settings) -> Any:
    """What the stage reads of histories."""
    if args.stage != "memory":
        return settings.policy(args.stage, args.max_items)
    inner: Any = settings.policy("items", None)
    return pk.PreferenceMemory(inner, args.slots, args.block, args.mode)


def prepared(model: Any, policy: Any, args: argparse.Namespace, seed: int) -> Any:
    """The model with what its stage learns; one that has a memory already goes on with its map."""
    before = model if isinstance(model, pk.RecurrentMemory) else None
    if before is not None:
        model = before.model
    if args.stage != "memory":
        return model
    if len(model.prompt.experts) < args.slots:
        add_experts(model, args.slots, seed=seed)
    model.policy = policy
    memory = pk.RecurrentMemory(
        model, consistency=args.consistency, reference_loss=args.reference_loss, rollout=args.rollout
    )
    if before is not None and before.map is not None and memory.map is not None:
        memory.map.load_state_dict(before.map.state_dict())
    return memory
