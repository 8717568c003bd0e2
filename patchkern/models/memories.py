# SPDX-License-Identifier: Apache-2.0
"""The memories of users, and the passes that write them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from patchkern.batch.histories import Histories
from patchkern.batch.memory_layout import MemoryPlanner, Queries
from patchkern.batch.planning import Int64
from patchkern.batch.preference_memory import PreferenceMemory


@dataclass(frozen=True, eq=False)
class Memories:
    """The memories of B users.

    Attributes:
        vectors: ``(M, D)``, user by user, as a model's prompts read them.
        rows: ``(B,)`` how many of them each user has.
        absorbed: ``(B,)`` how many of each user's first items are in them.

    Raises:
        TypeError, ValueError: naming the attribute, what was expected and what came.
    """

    vectors: Tensor
    rows: Int64
    absorbed: Int64

    def __post_init__(self) -> None:
        if not isinstance(self.vectors, Tensor) or not self.vectors.is_floating_point():
            got = self.vectors.dtype if isinstance(self.vectors, Tensor) else type(self.vectors).__name__
            raise TypeError(f"vectors: expected a tensor of floating-point numbers, got {got}")
        for name in ("rows", "absorbed"):
            counts = np.asarray(getattr(self, name))
            if counts.ndim != 1 or (counts.size and (counts.dtype.kind not in "iu" or counts.min() < 0)):
                raise ValueError(f"{name}: expected a 1-D array of counts, got {counts.dtype} of shape {counts.shape}")
            object.__setattr__(self, name, counts.astype(np.int64))
        if self.absorbed.size != self.rows.size:
            raise ValueError(f"absorbed: expected one per user ({self.rows.size}), got {self.absorbed.size}")
        if self.vectors.dim() != 2 or self.vectors.shape[0] != self.rows.sum():
            raise ValueError(
                f"vectors: expected shape ({self.rows.sum()}, D), as many as rows say, got {tuple(self.vectors.shape)}"
            )

    @classmethod
    def of(cls, users: Sequence[tuple[Tensor, int]]) -> Memories:
        """Of each user's vectors and the number of items in them; at least one user."""
        if not users:
            raise ValueError("users: expected at least one, got none")
        for place, (own, _) in enumerate(users):
            if not isinstance(own, Tensor) or own.dim() != 2 or own.shape[1] != users[0][0].shape[1]:
                got = tuple(own.shape) if isinstance(own, Tensor) else type(own).__name__
                raise ValueError(f"users[{place}]: expected vectors of shape (n, D), D of all users, got {got}")
        vectors = [own for own, _ in users]
        rows = np.array([own.shape[0] for own in vectors], np.int64)
        return cls(torch.cat(vectors), rows, np.array([absorbed for _, absorbed in users]))

    def __len__(self) -> int:
        return self.rows.size

    def __getitem__(self, user: int) -> tuple[Tensor, int]:
        """A user's vectors, and how many items are in them."""
        if not 0 <= user < len(self):
            raise IndexError(f"user: expected an index below {len(self)}, got {user}")
        begin = int(self.rows[:user].sum())
        return self.vectors[begin : begin + int(self.rows[user])], int(self.absorbed[user])


@dataclass(frozen=True)
class Writer:
    """Absorbs segments of items.

    Attributes:
        model: that reads and writes, in evaluation mode and without gradients.
        planner: of its passes.
        read: its states as rows that it can read.
        rows_per_pass: of users computed together; a user alone may have more.
    """

    model: Any
    planner: MemoryPlanner
    read: Callable[[Tensor], Tensor]
    rows_per_pass: int

    def absorb(self, histories: Histories, users: Int64, absorbed: Int64, kept: list[Tensor]) -> None:
        """The next segment of some users, in their memories."""
        policy = self.planner.policy
        segments = histories.between(users, absorbed[users], absorbed[users] + policy.block)
        rows = self.planner.update_rows(segments, absorbed[users])
        for part in _within(rows, self.rows_per_pass):
            asked = self.planner.update(segments.take(part), absorbed[users[part]])
            vectors = torch.cat([kept[user] for user in users[part]])
            for user, new in zip(users[part].tolist(), self._written(asked, vectors), strict=True):
                kept[user] = torch.cat([kept[user], new]) if policy.mode == "append" else new
        absorbed[users] += policy.block

    def once(self, histories: Histories, wanted: Int64, kept: list[Tensor]) -> None:
        """All segments of all users at once."""
        policy, users = self.planner.policy, np.flatnonzero(wanted)
        items = histories.between(users, np.zeros_like(users), wanted[users])
        rows = self.planner.once_rows(items)
        for part in _within(rows, self.rows_per_pass):
            new = self._written(self.planner.once(items.take(part)), None).flatten(0, 1)
            counts = policy.memory_rows(wanted[users[part]])
            for user, own in zip(users[part].tolist(), new.split(counts.tolist()), strict=True):
                kept[user] = own

    def _written(self, asked: Queries, vectors: Tensor | None) -> Tensor:
        """``(G, C, D)`` the memories that a pass writes."""
        given = vectors if asked.layout.vector_rows is not None else None
        states = self.model.row_states(asked.layout, given)
        return self.read(states[asked.rows.to(states.device, non_blocking=True)])


def _within(rows: Int64, most: int) -> list[Int64]:
    """Consecutive users whose rows together are at most ``most``, at least one."""
    parts, begin, filled = [], 0, 0
    for place, count in enumerate(rows.tolist()):
        if place > begin and filled + count > most:
            parts.append(np.arange(begin, place))
            begin, filled = place, 0
        filled += count
    return [*parts, np.arange(begin, rows.size)] if rows.size else parts


def check_memories(memories: Any, policy: PreferenceMemory, wanted: Int64, width: int) -> None:
    """Raise unless these, of vectors so wide, may go on to hold so many items of each user."""
    if not isinstance(memories, Memories):
        raise TypeError(f"memories: expected Memories or None, got {type(memories).__name__}")
    if len(memories) != wanted.size:
        raise ValueError(f"memories: expected those of {wanted.size} users, as histories, got {len(memories)}")
    if memories.vectors.shape[1] != width:
        raise ValueError(f"memories: expected vectors of width {width}, got {memories.vectors.shape[1]}")
    wrong = np.flatnonzero(
        (memories.absorbed > wanted)
        | (memories.absorbed % policy.block != 0)
        | (memories.rows != policy.memory_rows(memories.absorbed))
    )
    if wrong.size:
        user = int(wrong[0])
        raise ValueError(
            f"memories: expected at most {wanted[user]} items of user {user}, a multiple of {policy.block}, in "
            f"{policy.memory_rows(memories.absorbed[user])} vectors, got {memories.absorbed[user]} in "
            f"{memories.rows[user]}"
        )
