# SPDX-License-Identifier: Apache-2.0
"""Rec2PM's passes as spans: reference memories of all segments at once, and every segment read from a memory.

*Stage 1*: ``[prompt | items]`` is a span, and the query rows after each segment are one more, which sees the items so
far: their states are the segment's *reference* memory. *Stage 2*: ``[memory | segment | query rows]`` is a span for
each segment, whose memory rows are given vectors, the references of what came before: its items teach the next ones,
and the states of its query rows are to be the segment's own reference. Where recent items are read otherwise than old
ones, or a title follows them, they are a branch of their segment's span. What several spans would begin with, the
prompt and, in the mode "append", the memory so far, is a span of its own that they see.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from patchkern.batch.catalog import Catalog
from patchkern.batch.histories import Histories, HistoriesLike
from patchkern.batch.layout import PatchLayout
from patchkern.batch.memory_pieces import MemoryPieces, Rows, Spliced, each_of, starts_of
from patchkern.batch.memory_stages import References, Training
from patchkern.batch.planned_layout import check_head
from patchkern.batch.planning import Int64
from patchkern.batch.preference_memory import PreferenceMemory
from patchkern.batch.prompt import Prompt
from patchkern.batch.runs import Runs


@dataclass(frozen=True, eq=False)
class MemoryBatch:
    """What a training pass computes: two layouts, and which rows of one are vectors of the other.

    Attributes:
        stage1: the reference pass.
        stage2: the pass over segments, whose ``vector_rows`` are the memories, with the labels.
        queries: ``(G, C)`` int64, the query rows of stage 1: their states are G references of C vectors.
        memories: ``(M,)`` int64, for each of stage 2's vector rows which of the G * C reference vectors it holds.
        updates: ``(U, C)`` int64, query rows of stage 2, of every whole segment but the first of a user, and
            updated: ``(U,)`` int64, the reference that each of them must come to.
    """

    stage1: PatchLayout
    stage2: PatchLayout
    queries: Tensor
    memories: Tensor
    updates: Tensor
    updated: Tensor

    def _moved(self, move: Callable[[PatchLayout | Tensor], PatchLayout | Tensor]) -> MemoryBatch:
        return MemoryBatch(*(move(value) for value in vars(self).values()))  # type: ignore[arg-type]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> MemoryBatch:
        """The batch on ``device``."""
        return self._moved(lambda part: part.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> MemoryBatch:
        """The batch in page-locked memory, so that `to` can copy without waiting."""
        return self._moved(lambda part: part.pin_memory())

    def planned(self, transpose: bool = True, identities: bool = False) -> MemoryBatch:
        """The batch with what gradients, and item embeddings, need of its layouts."""

        def plan(part: PatchLayout | Tensor) -> PatchLayout | Tensor:
            if isinstance(part, PatchLayout):
                part = part.with_transpose() if transpose else part
                part = part.with_identities() if identities else part
            return part

        return self._moved(plan)

    @property
    def num_rows(self) -> int:
        """Of both stages."""
        return self.stage1.num_rows + self.stage2.num_rows

    @property
    def compression_ratio(self) -> float:
        """As of `PatchLayout`, of stage 2."""
        return self.stage2.compression_ratio


class MemoryRowCounts(NamedTuple):
    """Of users behind a memory, what their prompts and the passes before them take."""

    read: Int64
    """``(B,)`` rows of every user's prompt"""
    absorbed: Int64
    """``(B,)`` rows of the largest pass that absorbs items of each; 0: there is none"""
    vectors: Int64
    """``(B,)`` rows of the prompt that are the memory's vectors"""
    one_time: bool
    """whether all items of a user are absorbed in one pass, which cannot be cut"""


class Queries(NamedTuple):
    """A pass that absorbs items."""

    layout: PatchLayout
    """its ``vector_rows`` are the memories before, if any"""
    rows: Tensor
    """``(G, C)`` int64, the query rows, whose states are the memories after"""


class MemoryPlanner(MemoryPieces):
    """Plans the passes of a recurrent memory; arguments as of `MemoryPieces`."""

    # ------------------------------------------------------------------ training

    def training(
        self, histories: Histories, target_ranges: ArrayLike, *, head: str = "titles", reference: bool = False
    ) -> MemoryBatch:
        """Every target of ``target_ranges``, read as it will be: from the memory, and the recent items before it.

        Args:
            histories: whole histories of B users, targets included.
            target_ranges, head: as of `patchkern.build_training_layout`.
            reference: label the targets in stage 1 too, from all items before them; for an item head, and under a
                policy where every item has a row.

        Returns:
            A batch without transposes, see `MemoryBatch.planned`.
        """
        check_head(head)
        plan = Training(self, histories, target_ranges, head, reference)
        return MemoryBatch(
            stage1=plan.stage1(),
            stage2=plan.stage2(),
            queries=torch.from_numpy(plan.references.rows()),
            memories=torch.from_numpy(plan.memories()),
            updates=torch.from_numpy(plan.updates()),
            updated=torch.from_numpy(plan.updated()),
        )

    def rows(
        self, histories: Histories, target_ranges: ArrayLike, *, head: str = "titles", reference: bool = False
    ) -> Int64:
        """``(B,)`` rows that each user takes in `training`, both stages together."""
        plan = Training(self, histories, target_ranges, head, reference)
        rows = np.zeros(len(histories), np.int64)
        np.add.at(rows, plan.users[plan.owners1()], plan.references.spliced.pieces.rows)
        np.add.at(rows, plan.users[plan.owners2()], plan.spliced.pieces.rows)
        return rows

    # ------------------------------------------------------------------ inference

    def update(self, segments: Histories, absorbed: Int64) -> Queries:
        """``[prompt | memory | segment | query rows]`` for each of B users.

        Args:
            segments: B users' next ``block`` items each.
            absorbed: ``(B,)`` how many items are in the memories before.
        """
        policy, users = self.policy, np.arange(len(segments))
        runs = Runs.of(self.catalog, segments, policy.settled(segments))
        first, groups = len(self.prompt.prefix), policy.memory_rows(absorbed) // policy.slots
        memory = self.memory(users, groups, first)
        behind = first + policy.slots * groups
        rows = runs.whole(len(self.prompt.separator))
        spliced = Spliced(
            self.prefix(users, rows.sum()),
            memory._replace(begin=memory.begin + rows.sum()),
            Rows(starts_of(rows), rows, behind, users),
            self.query(users, behind + rows, rows.sum()),
        )
        layout = spliced.layout(self.planned(runs), self, None, vectors=1)
        return Queries(layout, torch.from_numpy(spliced.rows_of(3, policy.slots)))

    def once(self, histories: Histories) -> Queries:
        """The memories of whole segments in one pass over all items: ``[prompt | items]``, and what sees them.

        Args:
            histories: B users' items, whole segments each; a user without any has no memory. G is one for each user
                with the mode "overwrite", and one for each segment with "append".
        """
        count = histories.lengths // self.policy.block
        begin = np.zeros_like(count) if self.policy.mode == "append" else np.maximum(count - 1, 0)
        references = References(self, histories, begin, count)
        return Queries(references.layout(), torch.from_numpy(references.rows()))

    def update_rows(self, segments: Histories, absorbed: Int64) -> Int64:
        """``(B,)`` rows that each user takes in `update`."""
        return self._item_rows(segments) + self.policy.memory_rows(absorbed) + self.policy.slots

    def once_rows(self, histories: Histories) -> Int64:
        """``(B,)`` rows that each user takes in `once`; 0 of those without items."""
        rows = self._item_rows(histories) + self.policy.memory_rows(histories.lengths)
        return np.where(histories.lengths > 0, rows, 0)

    def _item_rows(self, items: Histories) -> Int64:
        """``(B,)`` rows of the prompt's beginning and the items."""
        runs = Runs.of(self.catalog, items, self.policy.settled(items))
        return len(self.prompt.prefix) + runs.whole(len(self.prompt.separator))


def memory_row_counts(
    catalog: Catalog,
    histories: HistoriesLike,
    policy: PreferenceMemory,
    prompt: Prompt,
    head: str = "titles",
    *,
    one_time: bool = False,
) -> MemoryRowCounts:
    """How many rows users behind a memory take, without building a layout: what `patchkern.plan_memory` asks for.

    Args:
        catalog, histories, policy, prompt, head: as in `patchkern.build_layout`.
        one_time: as of the `patchkern.RecurrentMemory` that makes the memories.

    Returns:
        ``read`` is what `patchkern.row_counts` says, for the head. Of a user whose memory is kept, in a
        `patchkern.UserStates`, nothing is absorbed: put 0 in the place of that.

    Raises:
        TypeError, ValueError: naming the argument.

    Examples:
        >>> import patchkern as pk
        >>> catalog = pk.Catalog.from_token_ids(range(9), range(10))
        >>> prompt = pk.Prompt(prefix=[9], experts=[10, 11])
        >>> policy = pk.PreferenceMemory(pk.ItemPatches(keep_text=0, max_items=None), slots=2, block=3)
        >>> rows = pk.memory_row_counts(catalog, [range(8), range(3)], policy, prompt)
        >>> rows.read.tolist(), rows.absorbed.tolist(), rows.vectors.tolist()
        ([5, 4], [8, 0], [2, 0])
        >>> pk.memory_row_counts(catalog, [range(8), range(3)], policy, prompt, one_time=True).absorbed.tolist()
        [9, 0]
    """
    check_head(head)
    planner, histories = MemoryPlanner(catalog, policy, prompt), Histories.coerce(histories)
    users, wanted = np.arange(len(histories)), policy.absorbed(histories.lengths)
    read = policy.count_rows(catalog, histories, prompt) - (len(prompt.suffix) if head == "items" else 0)
    if one_time:
        absorbed = planner.once_rows(histories.between(users, np.zeros_like(wanted), wanted))
    else:
        owner, nth = each_of(wanted // policy.block)
        begin = nth * policy.block
        absorbed = np.zeros_like(wanted)
        segments = histories.between(owner, begin, begin + policy.block)
        np.maximum.at(absorbed, owner, planner.update_rows(segments, begin))
    return MemoryRowCounts(read, absorbed, policy.memory_rows(wanted), one_time)
