# SPDX-License-Identifier: Apache-2.0
"""The rows of the table of recipes/learned_compression.py: what is read of a history, and what each must beat."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import patchkern as pk
from recipes.item_models import read_as_trained

SWEPT = (1, 16)
WEIGHTS = (0.01, 0.1, 1.0)
DEFAULTS = 4  # experts and slots


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


def all_rows(args: argparse.Namespace) -> dict[str, Row]:
    """By the names that folders have."""
    items, keep, block = pk.ItemPatches(keep_text=0, max_items=None), args.keep, args.block

    def experts(parts: str, count: int = DEFAULTS) -> Any:
        return pk.Experts(items, count=count, keep=keep if parts == "one" else None, block=block, parts=parts)

    def recent(keep: int) -> Any:
        return pk.Experts(items, count=0, keep=keep, block=block)

    def memory(mode: str = "overwrite", slots: int = DEFAULTS) -> Any:
        return pk.PreferenceMemory(items, slots, block, mode)

    # as many recent items as where a group of them is text, which here has rows like all others
    sessions = pk.SessionPatches(
        args.group_size, max_items=None, align="start", keep_text=0, keep_items=2 * args.group_size
    )
    trained = {"consistency": args.consistency}
    rows = {
        "full": Row("whole history", items),
        "recent": Row(f"recent items, at least {keep}", recent(keep)),
        "recent-1": Row("recent items, at least 1", recent(1)),
        "latest-100": Row("latest 100 to 199 items", read_as_trained(pk.ItemPatches(keep_text=0, max_items=100))),
        "sessions": Row(f"sessions of {args.group_size}", sessions),
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
