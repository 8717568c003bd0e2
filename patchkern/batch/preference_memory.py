# SPDX-License-Identifier: Apache-2.0
"""Histories read as a memory of what is old, a few vectors, and the recent items: Rec2PM's recurrent memory.

Items are absorbed in segments of ``block``, each when the event after it arrives; so between 1 and ``block`` items are
recent. What the memory's vectors are is a model's to say (`patchkern.RecurrentMemory`): here they are rows of a layout
that such a model fills.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from patchkern.batch.arguments import check_count
from patchkern.batch.arrangement import Table, arranged, spread
from patchkern.batch.catalog import Catalog
from patchkern.batch.experts import SettledPolicy, check_settled, settled_levels
from patchkern.batch.histories import Histories
from patchkern.batch.layout import PatchLayout
from patchkern.batch.planned_layout import plan_layout, unlabelled
from patchkern.batch.planning import Head, Int32, Int64, Spans
from patchkern.batch.policy_kinds import Levels
from patchkern.batch.prompt import Prompt
from patchkern.batch.row_counts import row_counts
from patchkern.batch.segments import cuts

MODES = ("overwrite", "append")
"""What an update makes of a memory: another one, or a longer one."""


@dataclass(frozen=True)
class PreferenceMemory:
    """``prompt | memory | recent items | suffix``: what is old is in the memory, the vectors of `RecurrentMemory`.

    Args:
        policy: how items are read: `TextOnly`; `ItemPatches`; or ``SessionPatches(align="start")``, of whose groups
            ``block`` is a multiple. Recent items have the levels that they would have as a history of their own, those
            that are being absorbed the ones that old items end up with: text, item patches, sessions. With
            ``max_items=None``, as a memory knows its segments by counting from the first item.
        slots: C, the vectors of a memory, or of each segment's part of it.
        block: items of a segment.
        mode: "overwrite": an update replaces the C vectors; "append": it adds C to those that there are.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Examples:
        Two prompts with a memory of two vectors, one of each user with five items or more.

        >>> import patchkern as pk
        >>> catalog = pk.Catalog.from_token_ids([5, 6, 7, 8, 9], [0, 2, 5])
        >>> prompt = pk.Prompt(prefix=[1], suffix=[3]).with_special(experts=[10, 11])
        >>> policy = pk.PreferenceMemory(pk.ItemPatches(keep_text=0, max_items=None), slots=2, block=4)
        >>> layout = pk.build_layout(catalog, [[0, 1, 1, 0, 1, 0], [0, 1]], policy, prompt)
        >>> layout.cu_seqlens.tolist(), layout.vector_rows.tolist()
        ([0, 6, 10], [1, 2])
    """

    policy: SettledPolicy
    slots: int = 4
    block: int = 50
    mode: str = "overwrite"

    def __post_init__(self) -> None:
        check_count("slots", self.slots, minimum=1)
        check_count("block", self.block, minimum=1)
        if self.mode not in MODES:
            raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {self.mode!r}")
        check_settled("policy", self.policy, self.block)

    @property
    def max_items(self) -> None:
        """None: the whole history is read."""
        return None

    def levels(self, histories: Histories) -> Levels:
        """Refused: a memory is not of the history's items."""
        raise ValueError(
            "policy: expected one of the history's items alone, got PreferenceMemory, whose prompts are planned by "
            "build_layout and trained by RecurrentMemory"
        )

    def settled(self, histories: Histories) -> Levels:
        """``(N,)`` the levels of items that are being absorbed; every history begins with a segment."""
        place = np.arange(histories.items.size) - np.repeat(histories.offsets[:-1], histories.lengths)
        return settled_levels(self.policy, place)

    def absorbed(self, lengths: Int64) -> Int64:
        """How many items of histories of these lengths are in the memory."""
        return cuts(lengths, 1, self.block)

    def memory_rows(self, absorbed: Int64) -> Int64:
        """How many vectors the memories of so many items have."""
        segments = absorbed // self.block
        return self.slots * (segments if self.mode == "append" else np.minimum(segments, 1))

    def check_prompt(self, prompt: Prompt) -> None:
        """Raise a ValueError unless the prompt has a token for each query row."""
        if len(prompt.experts) < self.slots:
            raise ValueError(
                f"prompt: expected {self.slots} experts, a token for each of the memory's slots "
                f"(Prompt.with_special), got {len(prompt.experts)}"
            )

    # ------------------------------------------------------------------ as a `PlanningPolicy`

    def plan(
        self, catalog: Catalog, histories: Histories, prompt: Prompt, targets: Int32 | None, head: str
    ) -> PatchLayout:
        """The prompts of a batch of users, whose ``vector_rows`` are their memories', user by user."""
        self.check_prompt(prompt)
        users = np.arange(len(histories))
        absorbed = self.absorbed(histories.lengths)
        recent = histories.between(users, absorbed, histories.lengths)
        open_ended = np.full(users.size, -1, np.int32)
        planned = plan_layout(
            catalog,
            recent,
            catalog.index_of(recent.items, "histories"),
            self.policy.levels(recent),
            prompt,
            open_ended if head == "items" else targets,
            Spans(np.full(users.size, Head.NOTHING, np.uint8), np.zeros(users.size, np.int64)),
        )
        if head == "items" or targets is None:
            planned = unlabelled(planned)
        first, groups = len(prompt.prefix), self.memory_rows(absorbed) // self.slots
        owner = np.repeat(users, groups)
        nth = np.arange(owner.size) - np.repeat(np.cumsum(groups) - groups, groups)
        begin, learned = planned.cu_seqlens.numpy().astype(np.int64), planned.num_rows
        table = Table()
        table.add(np.full(users.size, learned), first, 0, first > 0, users, 0)
        memory = table.add(
            np.full(owner.size, learned + first),
            self.slots,
            first + self.slots * nth,
            (first == 0) & (nth == 0),
            owner,
            1 + nth,
        )
        behind = first + self.slots * groups
        table.add(begin[:-1], np.diff(begin), behind, behind == 0, users, 1 + groups)
        pieces, _, at = table.ordered()
        vector_rows = spread(at[memory], np.full(owner.size, self.slots))
        tokens = (*prompt.prefix, *prompt.experts[: self.slots])
        layout = arranged(planned, tokens, pieces, np.zeros((0, 2, pieces.rows.size), np.int64), None, vector_rows)
        titles = catalog.inputs.lengths[catalog.index_of(histories.items, "histories")]
        counted = {
            "history_tokens": int(titles.sum(dtype=np.int64)),
            "history_rows": planned.history_rows + vector_rows.size,
        }
        return PatchLayout._trusted({**layout.__dict__, **counted})

    def count_rows(self, catalog: Catalog, histories: Histories, prompt: Prompt) -> Int64:
        """``(B,)`` rows of the users' prompts: prefix, memory, recent items and suffix."""
        absorbed = self.absorbed(histories.lengths)
        recent = histories.between(np.arange(len(histories)), absorbed, histories.lengths)
        return row_counts(catalog, recent, self.policy, prompt) + self.memory_rows(absorbed)
