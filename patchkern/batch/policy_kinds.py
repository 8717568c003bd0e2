# SPDX-License-Identifier: Apache-2.0
"""What a policy is: it says which history items stay text and which are pooled, and with whom.

A policy produces one `Level` per item and nothing else; the layout is built from those levels alone, so a new policy
is one method: `levels`, or `fit` where the titles' lengths matter. Those that compress a past into learned rows plan
more than levels can say.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from patchkern.batch.histories import Histories
from patchkern.batch.prompt import Prompt

Levels = NDArray[np.uint8]


class Level(IntEnum):
    """How one history item enters the batch."""

    TEXT = 0
    """its title, token by token"""
    PATCH = 1
    """it starts a new patch"""
    JOIN = 2
    """it is pooled into the patch of the item before it"""
    DROP = 3
    """it is left out, with its separator"""


@runtime_checkable
class Policy(Protocol):
    """What `build_layout` asks of a policy.

    Examples:
        One of your own: every other item is left out, the others are patches.

        >>> import numpy as np
        >>> import patchkern as pk
        >>> class EveryOther:
        ...     max_items = None
        ...
        ...     def levels(self, histories):
        ...         age = np.repeat(histories.offsets[1:], histories.lengths) - np.arange(histories.items.size)
        ...         return np.where(age % 2, pk.Level.PATCH, pk.Level.DROP).astype(np.uint8)
        >>> catalog = pk.Catalog.from_token_ids([0, 1, 2, 3], [0, 2, 3, 4])
        >>> pk.build_layout(catalog, [[0, 1, 2], [2, 0]], EveryOther(), pk.Prompt(separator=[4])).num_rows
        4
    """

    @property
    def max_items(self) -> int | None:
        """Histories are cut to their latest ``max_items`` items first (None: keep all)."""

    def levels(self, histories: Histories) -> Levels:
        """``(N,)`` uint8, one `Level` per item of the (already cut) histories."""


@runtime_checkable
class FittingPolicy(Protocol):
    """What `build_layout` asks of a policy that must know how long the titles and the prompt are."""

    @property
    def max_items(self) -> int | None:
        """As of `Policy`."""

    def fit(self, histories: Histories, title_lengths: NDArray[np.integer[Any]], prompt: Prompt) -> Levels:
        """As `Policy.levels`; ``title_lengths`` ``(N,)`` counts each item's tokens."""


@runtime_checkable
class TrunkPolicy(Policy, Protocol):
    """A policy under which a user's prompts share their beginnings, so that many targets can be trained in one pass."""

    def trunks(self, lengths: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """How much of the levels of ``(S,)`` histories of these lengths of one user does not depend on the length.

        Returns:
            ``(S,)`` keys and ``(S,)`` splits. Among histories of one user that begin at the same item and have the same
            key, the levels before the split are those that the longest one has there, no patch reaches across the
            split, and what follows it has the levels that it would have as a history of its own.
        """


@runtime_checkable
class CuttingPolicy(Protocol):
    """A policy that compresses old items into learned rows, such as `patchkern.Experts`: more than levels say."""

    @property
    def max_items(self) -> int | None:
        """As of `Policy`."""

    def cuts(self, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
        """How many items of histories of these lengths are old."""


@runtime_checkable
class PlanningPolicy(Policy, Protocol):
    """A policy whose prompts are more than a history's entries: it plans them itself, and `levels` is not asked."""

    def plan(self, catalog: Any, histories: Histories, prompt: Prompt, targets: Any, head: str) -> Any:
        """What `build_layout` plans, without item rows; ``targets`` are catalogue positions, or None."""

    def count_rows(self, catalog: Any, histories: Histories, prompt: Prompt) -> NDArray[np.int64]:
        """What `row_counts` returns."""


AnyPolicy = Policy | FittingPolicy | CuttingPolicy


def cut(histories: Histories, policy: AnyPolicy) -> Histories:
    """The histories as the policy cuts them: to their latest ``max_items``, ``cut_every`` at a time if it has that."""
    return histories.latest(policy.max_items, cut_every_of(policy))


def cut_every_of(policy: AnyPolicy) -> int:
    """How many items at a time a policy cuts from a history; 1 for one that does not say."""
    every: int = getattr(policy, "cut_every", 1)
    return every


def check_policy(policy: Any) -> None:
    """Raise a ``TypeError`` unless ``policy`` is one of the three kinds."""
    if isinstance(policy, type) or not isinstance(policy, (Policy, FittingPolicy, CuttingPolicy)):
        raise TypeError(f"policy: expected a policy with max_items and levels, got {type(policy).__name__}")


def levels_of(
    policy: AnyPolicy, histories: Histories, title_lengths: NDArray[np.integer[Any]], prompt: Prompt
) -> Levels:
    """``(N,)`` one `Level` per item of the (already cut) histories, whose titles have so many tokens.

    Raises:
        TypeError: a policy that no levels can describe.
    """
    if isinstance(policy, FittingPolicy):
        return policy.fit(histories, title_lengths, prompt)
    if isinstance(policy, Policy):
        return policy.levels(histories)
    raise TypeError(f"policy: expected one with levels, got {type(policy).__name__}, whose rows are more than those")
