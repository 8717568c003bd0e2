# SPDX-License-Identifier: Apache-2.0
"""Policies: which history items stay text and which are pooled, and with whom.

A policy produces one `Level` per item and nothing else; the layout is built from those levels alone, so a new policy
is one `levels` method.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import IntEnum
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from patchkern.histories import Histories, check_count, check_max_items

Levels = NDArray[np.uint8]


class Level(IntEnum):
    """How one history item enters the batch."""

    TEXT = 0
    """its title, token by token"""
    PATCH = 1
    """it starts a new patch"""
    JOIN = 2
    """it is pooled into the patch of the item before it"""


@runtime_checkable
class Policy(Protocol):
    """What `build_layout` asks of a policy."""

    @property
    def max_items(self) -> int | None:
        """Histories are cut to their latest ``max_items`` items first (None: keep all)."""

    def levels(self, histories: Histories) -> Levels:
        """``(N,)`` uint8, one `Level` per item of the (already cut) histories."""


@dataclass(frozen=True)
class TextOnly:
    """Every item as text (the paper's "Vanilla")."""

    max_items: int | None = 100

    def __post_init__(self) -> None:
        check_max_items(self.max_items)

    def levels(self, histories: Histories) -> Levels:
        return np.zeros(histories.items.size, np.uint8)


@dataclass(frozen=True)
class ItemPatches:
    """The latest ``keep_text`` items as text, all earlier ones as item patches (the paper's PFT-I)."""

    keep_text: int = 5
    max_items: int | None = 100

    def __post_init__(self) -> None:
        check_count("keep_text", self.keep_text, minimum=0)
        check_max_items(self.max_items)

    def levels(self, histories: Histories) -> Levels:
        levels = np.full(histories.items.size, Level.PATCH, np.uint8)
        _set_latest(levels, histories, self.keep_text, Level.TEXT)
        return levels


@dataclass(frozen=True)
class SessionPatches:
    """The latest ``group_size`` items as text, the ones before as item patches, the oldest as sessions (PFT-S).

    ``align="end"`` counts sessions of ``group_size`` back from the item patches, so only the oldest may be short.
    ``align="start"`` counts complete groups from the first item: their borders never move while a history grows
    (with ``max_items=None``), so that a user's successive prompts share a growing prefix; between ``group_size`` and
    ``2 * group_size - 1`` items stand as item patches.
    """

    group_size: int = 5
    max_items: int | None = 100
    align: str = "end"

    def __post_init__(self) -> None:
        check_count("group_size", self.group_size, minimum=1)
        check_max_items(self.max_items)
        if not isinstance(self.align, str) or self.align not in ("end", "start"):
            raise ValueError(f'align: expected "end" or "start", got {self.align!r}')

    def levels(self, histories: Histories) -> Levels:
        g, lengths = self.group_size, histories.lengths
        pooled = np.maximum(lengths - 2 * g, 0)
        if self.align == "start":
            pooled -= pooled % g
        # Positions within each history, shifted so that sessions start at multiples of g.
        shift = -pooled % g
        position = np.arange(histories.items.size) - np.repeat(histories.offsets[:-1] - shift, lengths)
        levels = np.where(position % g == 0, np.uint8(Level.PATCH), np.uint8(Level.JOIN))
        levels[histories.offsets[:-1][lengths > 0]] = Level.PATCH
        levels[position >= np.repeat(pooled + shift, lengths)] = Level.PATCH
        _set_latest(levels, histories, g, Level.TEXT)
        return levels


@dataclass(frozen=True)
class RandomItemPatches:
    """Every item independently an item patch with ``probability``, else text (the paper's patch pre-training).

    The draws depend on ``seed`` and the flat position of the item in the batch only: the same call gives the same
    layout. Training varies ``seed`` from step to step.
    """

    probability: float = 0.3
    max_items: int | None = 100
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.probability, bool) or not isinstance(self.probability, (int, float, np.floating)):
            raise TypeError(f"probability: expected a number, got {type(self.probability).__name__}")
        if not 0.0 <= self.probability <= 1.0 or math.isnan(self.probability):
            raise ValueError(f"probability: expected a number in 0..1, got {self.probability}")
        check_count("seed", self.seed, minimum=0, maximum=2**64 - 1)
        check_max_items(self.max_items)

    def levels(self, histories: Histories) -> Levels:
        draws = np.random.Generator(np.random.SFC64(self.seed)).random(histories.items.size, np.float32)
        return np.where(draws < self.probability, np.uint8(Level.PATCH), np.uint8(Level.TEXT))


_POLICIES = {policy.__name__: policy for policy in (TextOnly, ItemPatches, SessionPatches, RandomItemPatches)}


def policy_to_dict(policy: Policy) -> dict[str, Any]:
    """A JSON-ready description of one of this module's policies."""
    if not isinstance(policy, (TextOnly, ItemPatches, SessionPatches, RandomItemPatches)):
        raise TypeError(f"policy: expected one of {', '.join(_POLICIES)}, got {type(policy).__name__}")
    values = asdict(policy).items()
    arguments = {name: value.item() if isinstance(value, np.generic) else value for name, value in values}
    return {"name": type(policy).__name__, **arguments}


def policy_from_dict(description: Mapping[str, Any]) -> Policy:
    """The inverse of `policy_to_dict`."""
    if not isinstance(description, Mapping):
        raise TypeError(f"description: expected a mapping, got {type(description).__name__}")
    arguments = dict(description)
    name = arguments.pop("name", None)
    if name not in _POLICIES:
        raise ValueError(f"description: expected a name among {', '.join(_POLICIES)}, got {name!r}")
    return _POLICIES[name](**arguments)


def _set_latest(levels: Levels, histories: Histories, count: int, level: Level) -> None:
    kept = np.minimum(histories.lengths, count)
    ends = np.cumsum(kept)
    levels[np.arange(kept.sum()) + np.repeat(histories.offsets[1:] - ends, kept)] = level
