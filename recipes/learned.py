# SPDX-License-Identifier: Apache-2.0
"""The stages that compress a past into learned rows: what recipes/train.py adds to a model for them."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

import patchkern as pk
from patchkern.batch.experts import PARTS
from patchkern.batch.preference_memory import MODES
from patchkern.data import Interactions
from patchkern.models.learned_rows import add_experts
from patchkern.training import Settings

STAGES = ("experts", "memory")
# of the experts stage alone, and what `patchkern.Experts` calls them
_EXPERTS = {"experts": "count", "keep": "keep", "parts": "parts", "boundaries": "boundaries"}
_BLOCK = 50


def add_flags(parser: Any) -> None:
    """Of experts and of a recurrent memory."""
    group = parser.add_argument_group("what is old in learned rows (--stage experts, memory), of whole histories")
    group.add_argument("--block", type=int, help=f"items of a block or segment (default: {_BLOCK}, or as trained)")
    group.add_argument("--experts", type=int, help="learned rows of the experts stage (default: 4, or as trained)")
    group.add_argument("--keep", type=int, help="items that are always recent (default: 20; 1 with --parts blocks)")
    group.add_argument("--parts", choices=PARTS, help="experts for all old items, or for each block (default: one)")
    group.add_argument(
        "--boundaries", type=int, help="borders at which a history is cut in a pass, drawn; 0: all (default: 1)"
    )
    group.add_argument("--slots", type=int, default=4, help="vectors of a memory")
    group.add_argument("--mode", choices=MODES, default="overwrite", help="what an update does to a memory")
    group.add_argument(
        "--consistency", type=float, default=0.01, help="weight of the distance between it and its reference"
    )
    group.add_argument("--reference_loss", type=float, default=0.0, help="weight of the items' loss in whole histories")
    group.add_argument("--rollout", type=float, default=0.0, help="share of the passes with the model's own memories")


def wrong_flags(args: argparse.Namespace) -> Iterator[tuple[bool, str]]:
    """What does not go together, and what to say of it."""
    for name in _EXPERTS:
        given = getattr(args, name) is not None
        yield given and args.stage != "experts", f"--{name}: expected only with --stage experts, got {args.stage}"
    yield (
        args.stage in STAGES and args.max_items is not None,
        f"--max_items: expected none with --stage {args.stage}, which compresses whole histories",
    )


def settings_stage(stage: str) -> str:
    """The paper's stage whose settings this one trains with."""
    return "items" if stage in STAGES else stage


def number_of_experts(args: argparse.Namespace) -> int:
    """Experts, or a token for each slot, that a model without any is to have before it gets an adapter."""
    if args.stage != "experts":
        return args.slots if args.stage == "memory" else 0
    return pk.Experts.count if args.experts is None else args.experts


def policy_of(args: argparse.Namespace, settings: Settings, before: Any = None) -> Any:
    """What the stage reads of histories; of experts, what ``before`` read where no flag says otherwise."""
    if args.stage not in STAGES:
        return settings.policy(args.stage, args.max_items)
    inner: Any = settings.policy("items", None)
    if args.stage == "memory":
        return pk.PreferenceMemory(inner, args.slots, _BLOCK if args.block is None else args.block, args.mode)
    flags = {**_EXPERTS, "block": "block"}
    given: dict[str, Any] = {
        name: getattr(args, flag) for flag, name in flags.items() if getattr(args, flag) is not None
    }
    if given.get("boundaries") == 0:
        given["boundaries"] = None
    if "parts" in given:
        given.setdefault("keep", None)
    return replace(before if isinstance(before, pk.Experts) else pk.Experts(inner), **given)


def prepared(model: Any, tokenizer: Any, policy: Any, args: argparse.Namespace, data: Interactions, seed: int) -> Any:
    """The model with what its stage learns; one that has a memory already goes on with its map."""
    before = model if isinstance(model, pk.RecurrentMemory) else None
    if before is not None:
        model = before.model
    if args.stage not in STAGES:
        return model
    model.tokenizer = tokenizer if model.tokenizer is None else model.tokenizer  # whose tokens the rows may be
    options = {name: getattr(args, name) for name in ("consistency", "reference_loss", "rollout")}
    memory = with_learned_rows(model, policy, data, seed, options)
    if before is not None and before.map is not None and getattr(memory, "map", None) is not None:
        memory.map.load_state_dict(before.map.state_dict())
    return memory


def with_learned_rows(
    model: pk.PatchedCausalLM | pk.ItemModel, policy: Any, data: Interactions, seed: int, memory: Mapping[str, Any]
) -> Any:
    """The model with the policy and room for what that learns, for the longest history of the data.

    Of a `patchkern.PreferenceMemory` it is a `patchkern.RecurrentMemory` with the options ``memory``.
    """
    model.policy = policy
    if isinstance(policy, pk.Experts) and policy.count:
        longest = int(data.histories.lengths.max(initial=1))
        rows = policy.count * max(int(policy.compressed_parts(policy.cuts(np.array(longest)))), 1)
        add_experts(model, policy.count, max_positions=longest + len(model.prompt.prefix) + rows, seed=seed)
    if not isinstance(policy, pk.PreferenceMemory):
        return model
    if len(model.prompt.experts) < policy.slots:
        add_experts(model, policy.slots, seed=seed)
    return pk.RecurrentMemory(model, **memory)
