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

# of each stage its policy, and of the flags that are its own what that calls them
_POLICIES: dict[str, tuple[Any, dict[str, str]]] = {
    "experts": (pk.Experts, {"experts": "count", "keep": "keep", "parts": "parts", "boundaries": "boundaries"}),
    "memory": (pk.PreferenceMemory, {"slots": "slots", "mode": "mode"}),
}
STAGES = tuple(_POLICIES)
# of the memory stage's loss, and what each is where it is not given
_LOSS = {"consistency": 0.01, "reference_loss": 0.0, "rollout": 0.0}


def add_flags(parser: Any) -> None:
    """Of experts and of a recurrent memory."""
    group = parser.add_argument_group("what is old in learned rows (--stage experts, memory), of whole histories")
    group.add_argument("--block", type=int, help="items of a block or segment (default: 50, or as trained)")
    group.add_argument("--experts", type=int, help="learned rows of the experts stage (default: 4, or as trained)")
    group.add_argument("--keep", type=int, help="items that are always recent (default: 20; 1 with --parts blocks)")
    group.add_argument("--parts", choices=PARTS, help="experts for all old items, or for each block (default: one)")
    group.add_argument(
        "--boundaries", type=int, help="borders at which a history is cut in a pass, drawn; 0: all (default: 1)"
    )
    group.add_argument("--slots", type=int, help="vectors of a memory (default: 4, or as trained)")
    group.add_argument(
        "--mode", choices=MODES, help="what an update does to a memory (default: overwrite, or as trained)"
    )
    for name, what in (
        ("consistency", "weight of the distance between it and its reference"),
        ("reference_loss", "weight of the items' loss in whole histories"),
        ("rollout", "share of the passes with the model's own memories"),
    ):
        group.add_argument(f"--{name}", type=float, help=f"{what} (default: {_LOSS[name]:g})")


def wrong_flags(args: argparse.Namespace) -> Iterator[tuple[bool, str]]:
    """What does not go together, and what to say of it."""
    stages = {name: (stage,) for stage, (_, flags) in _POLICIES.items() for name in flags}
    for name, own in {**stages, **dict.fromkeys(_LOSS, ("memory",)), "block": STAGES}.items():
        given = getattr(args, name) is not None
        yield (
            given and args.stage not in own,
            f"--{name}: expected only with --stage {' or '.join(own)}, got {args.stage}",
        )
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
        slots = pk.PreferenceMemory.slots if args.slots is None else args.slots
        return slots if args.stage == "memory" else 0
    return pk.Experts.count if args.experts is None else args.experts


def policy_of(args: argparse.Namespace, settings: Settings, before: Any = None) -> Any:
    """What the stage reads of histories; what ``before`` read of learned rows where no flag says otherwise."""
    if args.stage not in STAGES:
        return settings.policy(args.stage, args.max_items)
    kind, flags = _POLICIES[args.stage]
    given: dict[str, Any] = {
        name: getattr(args, flag)
        for flag, name in {**flags, "block": "block"}.items()
        if getattr(args, flag) is not None
    }
    if given.get("boundaries") == 0:
        given["boundaries"] = None
    if "parts" in given:
        given.setdefault("keep", None)
    inner = settings.policy("items", None)
    if args.keep_text is not None:
        given["policy"] = inner
    return replace(before if isinstance(before, kind) else kind(inner), **given)


def prepared(model: Any, tokenizer: Any, policy: Any, args: argparse.Namespace, data: Interactions, seed: int) -> Any:
    """The model with what its stage learns; one that has a memory already goes on with its map."""
    before = model if isinstance(model, pk.RecurrentMemory) else None
    if before is not None:
        model = before.model
    if args.stage not in STAGES:
        return model
    model.tokenizer = tokenizer if model.tokenizer is None else model.tokenizer  # whose tokens the rows may be
    options = {
        name: otherwise if getattr(args, name) is None else getattr(args, name) for name, otherwise in _LOSS.items()
    }
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
    longest, first = int(data.histories.lengths.max(initial=1)), len(model.prompt.prefix)
    if isinstance(policy, pk.Experts) and policy.count:
        rows = policy.count * max(int(policy.compressed_parts(policy.cuts(np.array(longest)))), 1)
        add_experts(model, policy.count, max_positions=first + longest + rows, seed=seed)
    if not isinstance(policy, pk.PreferenceMemory):
        return model
    rows = int(policy.memory_rows(policy.absorbed(np.array(longest))))  # with a segment behind them
    known = max(policy.slots, len(model.prompt.experts))
    add_experts(model, known, max_positions=first + rows + policy.block, seed=seed)
    return pk.RecurrentMemory(model, **memory)
