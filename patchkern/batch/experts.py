# SPDX-License-Identifier: Apache-2.0
"""The policy that compresses old items into learned rows, PerSRec's expert tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from patchkern.batch.arguments import check_count
from patchkern.batch.policies import ItemPatches, SessionPatches, TextOnly
from patchkern.batch.policy_kinds import Level, Levels
from patchkern.batch.prompt import Prompt
from patchkern.batch.segments import cuts

PARTS = ("one", "blocks")
_SETTLED = (TextOnly, ItemPatches, SessionPatches)
_KEEP = 20

SettledPolicy = TextOnly | ItemPatches | SessionPatches
"""A policy under which an old item's row never changes, however the history grows."""


@dataclass(frozen=True)
class Experts:
    """Old items are read by ``count`` learned rows, the experts, and by nobody else (PerSRec).

    What follows sees the experts in their place, so that their keys and values are all that must be kept of a user's
    past. The experts' input rows are the token ids of `Prompt.experts`, the same for all users.

    With L items, the first ``max(L - keep, 0) // block * block`` are old: borders never move while a history grows, and
    between ``keep`` and ``keep + block - 1`` items are recent. A history without old items is read as if by the inner
    policy; with ``count=0`` every user's recent items are, and what is old is left out.

    Args:
        policy: of old items, in the form that they have once nothing of them is recent any more: `TextOnly`,
            `ItemPatches` (all patches) or ``SessionPatches(align="start")`` (sessions alone), with ``max_items=None``.
        recent: of recent items, as if they were a history of their own; ``policy`` where not given.
        count: experts of a part; the prompt has as many (`Prompt.with_special`).
        keep: items that are always recent; 20 where not given, and 1 with blocks.
        block: items between borders, a multiple of a session's items.
        parts: "one": the experts follow all old items, and are computed anew when a border moves. "blocks": experts
            follow every block of old items; they see it and the experts before it, and are never computed again.
        boundaries: in training with one part, at how many of its borders a user's history is cut per pass; they are
            drawn, and targets of the others see the whole history. None: all, so that every target is learned as it is
            served. Where old and recent items have different forms, it is all.
        seed: of these draws.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Examples:
        >>> import numpy as np
        >>> import patchkern as pk
        >>> policy = pk.Experts(pk.ItemPatches(keep_text=0, max_items=None), count=4, keep=20, block=50)
        >>> policy.cuts(np.array([69, 70, 119, 120])).tolist()
        [0, 50, 50, 100]
    """

    policy: SettledPolicy
    recent: SettledPolicy | None = None
    count: int = 4
    keep: int | None = None
    block: int = 50
    parts: str = "one"
    boundaries: int | None = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.parts, str) or self.parts not in PARTS:
            raise ValueError(f"parts: expected one of {', '.join(PARTS)}, got {self.parts!r}")
        if self.keep is None:
            object.__setattr__(self, "keep", _KEEP if self.parts == "one" else 1)
        check_count("count", self.count, minimum=0)
        check_count("keep", self.least_recent, minimum=0)
        check_count("block", self.block, minimum=1)
        check_count("seed", self.seed, minimum=0, maximum=2**64 - 1)
        if self.boundaries is not None:
            check_count("boundaries", self.boundaries, minimum=1)
        if self.parts == "blocks" and self.keep != 1:
            raise ValueError(f'keep: expected 1 with parts="blocks", got {self.keep}')
        check_settled("policy", self.policy, self.block)
        if self.recent is not None:
            check_settled("recent", self.recent, self.block)

    @property
    def max_items(self) -> None:
        """None: histories are never cut off, which would move their borders."""
        return None

    @property
    def least_recent(self) -> int:
        """``keep``, a number also where it was not given."""
        return self.keep  # type: ignore[return-value]

    @property
    def recents(self) -> SettledPolicy:
        """The policy of recent items."""
        return self.policy if self.recent is None else self.recent

    @property
    def has_one_form(self) -> bool:
        """Has an old item the row that it has as a recent one, once that does not change any more?"""
        groups = [getattr(policy, "group_size", None) for policy in (self.policy, self.recents)]
        return type(self.policy) is type(self.recents) and groups[0] == groups[1]

    def cuts(self, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
        """How many items of histories of these lengths are old, of the same shape."""
        return cuts(lengths, self.least_recent, self.block)

    def compressed_parts(self, old: NDArray[np.int64]) -> NDArray[np.int64]:
        """Into how many parts so many old items are compressed; without experts they are none."""
        if self.count == 0:
            return np.zeros_like(old)
        return old // self.block if self.parts == "blocks" else np.minimum(old, 1)

    def check_head(self, head: str) -> None:
        """Raise a ValueError where prompts cannot be read for a head of `patchkern.build_layout`.

        A title follows the suffix. An item is predicted from the last row, which is the last expert's where nothing is
        recent: a whole pass has its state, but of experts keys and values are kept, from which no state comes again.
        """
        if head == "items" and self.keep == 0 and self.count:
            raise ValueError(
                "policy: expected to keep at least one item recent (keep) for an item head, got 0: where none is, it "
                "would read the last expert's state, and of experts only keys and values are kept"
            )

    def check_prompt(self, prompt: Prompt) -> None:
        """Raise a ValueError unless the prompt has as many experts."""
        if self.count and len(prompt.experts) != self.count:
            got = f"{len(prompt.experts)} of them" if prompt.experts else "none"
            raise ValueError(
                f"prompt: expected the token ids of {self.count} experts (prompt.with_special(experts=...)), got {got}"
            )


def settled_levels(policy: SettledPolicy, place: NDArray[np.int64]) -> Levels:
    """The levels of items once they are not among the recent ones any more.

    Args:
        policy: of a kind that `Experts` takes.
        place: ``(N,)`` each item's position in the history, or in a part that begins at a multiple of ``block``.
    """
    if isinstance(policy, TextOnly):
        return np.full(place.size, Level.TEXT, np.uint8)
    if isinstance(policy, ItemPatches):
        return np.full(place.size, Level.PATCH, np.uint8)
    return np.where(place % policy.group_size == 0, np.uint8(Level.PATCH), np.uint8(Level.JOIN))


def check_settled(name: str, policy: Any, block: int) -> None:
    """Raise a TypeError or ValueError unless old items never change under a policy, and no session crosses a border."""
    if not isinstance(policy, _SETTLED):
        why = ", which draws at random" if hasattr(policy, "probability") else ""
        raise TypeError(
            f'{name}: expected TextOnly, ItemPatches or SessionPatches(align="start"), under which the rows of old '
            f"items never change, got {type(policy).__name__}{why}"
        )
    if isinstance(policy, SessionPatches) and policy.align != "start":
        raise ValueError(f'{name}: expected SessionPatches(align="start"), whose sessions never move, got align="end"')
    if policy.max_items is not None:
        raise ValueError(
            f"{name}: expected max_items=None, as the borders of a history that is cut off move, got {policy.max_items}"
        )
    if isinstance(policy, SessionPatches) and block % policy.group_size:
        raise ValueError(
            f"block: expected a multiple of {policy.group_size}, the items of a session of {name}, so that no session "
            f"crosses a border, got {block}"
        )
