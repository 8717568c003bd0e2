# SPDX-License-Identifier: Apache-2.0
"""Models that read item ids and no words: what recipes/train.py --backbone makes."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

import patchkern as pk
from patchkern.data import Interactions
from patchkern.models.item_blocks import BLOCKS
from patchkern.models.item_head import SCORES


def add_flags(parser: Any, defaults: Mapping[str, Any]) -> None:
    """Of a backbone and its shape, for which ``defaults`` stand where nothing is given."""

    def default(name: str) -> str:
        return f"(default: {defaults[name]})"

    group = parser.add_argument_group("model of item ids (--backbone)")
    group.add_argument("--backbone", choices=BLOCKS, help="instead of --model: no words are read, items are learned")
    group.add_argument("--width", type=int, help=f"of its vectors {default('width')}")
    group.add_argument("--layers", type=int, help=default("layers"))
    group.add_argument("--heads", type=int, help=f"of attention {default('heads')}")
    group.add_argument(
        "--item_scores", choices=SCORES, help=f"product of state and vector, or cosine {default('item_scores')}"
    )


def make_model(args: argparse.Namespace, data: Interactions, dropout: float, seed: int) -> pk.ItemModel:
    """The model of the flags, with positions for the longest history that training reads."""
    longest = int(data.histories.lengths.max(initial=1))
    if args.max_items is not None:
        longest = min(longest, 2 * args.max_items)  # histories that are cut begin at its multiples
    model = pk.ItemModel(
        catalog_of_ids(data.titles),
        block=args.backbone,
        width=args.width,
        layers=args.layers,
        heads=args.heads,
        dropout=dropout,
        max_positions=longest + 1,
        head=args.item_scores,
        seed=seed,
    )
    model.to(getattr(torch, args.dtype))
    return model


def read_as_trained(policy: Any) -> Any:
    """The policy that reads long histories as passes of all targets do: cut ``max_items`` at a time.

    Cut one at a time, all of them would be read at one place, whose position only few targets of such passes train.
    """
    return policy if policy.max_items is None else replace(policy, cut_every=policy.max_items)


def catalog_of_ids(titles: Mapping[Any, str]) -> pk.Catalog:
    """Items with titles that nobody reads."""
    size = len(titles)
    return pk.Catalog.from_token_ids(np.arange(size), np.arange(size + 1), list(titles), list(titles.values()))
