# SPDX-License-Identifier: Apache-2.0
"""The two stages in which a recurrent memory is trained, as spans: see `patchkern.batch.memory_layout`."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from patchkern.batch.branches import Branches
from patchkern.batch.histories import Histories
from patchkern.batch.layout import PatchLayout
from patchkern.batch.memory_pieces import MemoryPieces, Rows, Spliced, each_of, starts_of
from patchkern.batch.planned_layout import target_samples, with_items
from patchkern.batch.planning import Head, Int64
from patchkern.batch.policies import SessionPatches
from patchkern.batch.runs import Runs


class References:
    """Stage 1: users' items, and query rows after the segments ``begin`` to before ``end`` of each."""

    def __init__(self, planner: MemoryPieces, items: Histories, begin: Int64, end: Int64) -> None:
        self.planner, self.runs = planner, Runs.of(planner.catalog, items, planner.policy.settled(items))
        users, separator = np.arange(len(items)), len(planner.prompt.separator)
        self.owner, nth = each_of(end - begin)
        self.span = users + starts_of(end - begin)
        self.query_span = self.span[self.owner] + 1 + nth
        rows = self.runs.whole(separator)
        first = len(planner.prompt.prefix)
        after = (begin[self.owner] + nth + 1) * planner.policy.block
        self.seen = first + self.runs.before(self.owner, after, separator)
        self.spliced = Spliced(
            planner.prefix(self.span, rows.sum()),
            Rows(starts_of(rows), rows, np.full_like(rows, first), self.span),
            planner.query(self.query_span, self.seen, rows.sum()),
        )

    def layout(self) -> PatchLayout:
        prefix = np.zeros((self.span.size + self.query_span.size, 1, 2), np.int64)
        begin = self.begins[self.owner]
        prefix[self.query_span, 0] = np.stack([begin, begin + self.seen], axis=1)
        return self.spliced.layout(self.planner.planned(self.runs), self.planner, prefix)

    @property
    def begins(self) -> Int64:
        """``(B,)`` the first row of each user."""
        return self.spliced.starts[0]

    def rows(self) -> Int64:
        """``(G, C)`` the query rows."""
        return self.spliced.rows_of(2, self.planner.policy.slots)


class Training:
    """Both stages of some users and targets; users without a target are left out.

    A *unit* is a segment of a user that has targets: those that are predicted from the memory before it and from its
    own items, the last of them being the first item of the next segment.
    """

    def __init__(
        self, planner: MemoryPieces, histories: Histories, target_ranges: ArrayLike, head: str, reference: bool
    ) -> None:
        self.planner, self.head, self.reference = planner, head, reference
        policy, catalog = planner.policy, planner.catalog
        inner, block, appends = policy.policy, policy.block, policy.mode == "append"
        if reference and (head == "titles" or isinstance(inner, SessionPatches)):
            raise ValueError("reference: expected an item head, and a policy with a row for every item, for its loss")
        user, self.position = target_samples(histories, target_ranges)
        self.users, owner = np.unique(user, return_inverse=True)
        self.owner: Int64 = owner
        self.targets = catalog.index_of(histories.at(user, self.position), "histories")
        first, last = np.full(self.users.size, np.iinfo(np.int64).max), np.zeros(self.users.size, np.int64)
        np.minimum.at(first, owner, self.position)
        np.maximum.at(last, owner, self.position)
        first_segment, last_segment = (np.maximum(x - 1, 0) // block for x in (first, last))
        whole = last // block  # segments that can be absorbed

        self.first_reference = np.zeros_like(whole) if appends else np.maximum(first_segment - 1, 0)
        self.references_before = starts_of(whole - self.first_reference)
        until = last if reference else whole * block
        self.reading = np.flatnonzero(reference | (until > 0))
        items = histories.between(self.users[self.reading], np.zeros_like(self.reading), until[self.reading])
        self.references = References(planner, items, self.first_reference[self.reading], whole[self.reading])

        units = last_segment - first_segment + 1
        self.unit_owner, nth = each_of(units)
        self.segment = first_segment[self.unit_owner] + nth
        segment = np.maximum(self.position - 1, 0) // block
        self.unit = starts_of(units)[owner] + segment - first_segment[owner]
        recent = self.position - segment * block
        self.split = inner.trunks(recent)[1]
        is_whole = self.segment < whole[self.unit_owner]
        held = np.zeros(self.unit_owner.size, np.int64)
        np.maximum.at(held, self.unit, self.split)
        held[is_whole] = block
        begin = self.segment * block
        items = histories.between(self.users[self.unit_owner], begin, begin + held)
        self.trunks = Runs.of(catalog, items, policy.settled(items))
        own = histories.between(user, segment * block + self.split, self.position)
        of_trunk = self.trunks.before(self.unit, self.split, len(planner.prompt.separator))
        self.branches = Branches.of_samples(
            catalog, planner.prompt, own, inner.levels(own), (self.unit, self.split), of_trunk, head
        )
        self._place(units, last_segment, is_whole & (self.segment > 0), of_trunk)

    def _place(self, units: Int64, last_segment: Int64, updated: NDArray[np.bool_], of_trunk: Int64) -> None:
        """Which rows stand where."""
        planner, policy, prompt = self.planner, self.planner.policy, self.planner.prompt
        slots, appends = policy.slots, policy.mode == "append"
        first, separator = len(prompt.prefix), len(prompt.separator)
        branched, titled = self.branches.sample, self.branches.titles
        trunk, branch = np.arange(self.segment.size), self.segment.size + np.arange(branched.size)
        of_branch = self.unit[branched]
        rows = self.branches.rows.copy()
        titles = planner.catalog.lengths[self.targets[branched[titled]]]
        rows[titled] += len(prompt.suffix) + titles + len(prompt.response_end)
        held = self.trunks.whole(separator)
        rows = np.append(held, rows)

        branches = np.bincount(self.owner[branched], minlength=units.size)
        self.span = starts_of(1 + units + branches)
        unit_span = self.span[self.unit_owner] + 1 + each_of(units)[1]
        branch_owner, nth = each_of(branches)
        branch_span = np.empty_like(branched)
        by_owner = np.argsort(self.owner[branched], kind="stable")
        branch_span[by_owner] = self.span[branch_owner] + 1 + units[branch_owner] + nth
        # what a unit sees of the span before it, and the memory rows in its own
        seen = first + (slots * self.segment if appends else np.zeros_like(self.segment))
        memory = np.zeros_like(self.segment) if appends else slots * (self.segment > 0)
        before = memory[self.unit] + of_trunk
        if appends:
            vectors = planner.memory(self.span, last_segment, first)
            self.held_by, nth = each_of(last_segment)
            self.memory_of = nth
        else:
            vectors = planner.memory(unit_span, memory // slots, seen)
            self.held_by, self.memory_of = (x[memory > 0] for x in (self.unit_owner, self.segment - 1))
        position = np.append(seen + memory, seen[of_branch] + before[branched] + self.branches.ahead)
        self.updated_units = np.flatnonzero(updated)
        total = rows.sum()
        self.spliced = Spliced(
            planner.prefix(self.span, total),
            vectors._replace(begin=vectors.begin + total),
            Rows(starts_of(rows), rows, position, np.append(unit_span, branch_span)),
            planner.query(unit_span[updated], (seen + memory + held)[updated], total),
        )
        banks = self.spliced.starts[0]
        begin = self.spliced.starts[2][trunk] - memory
        chained = np.flatnonzero(self.branches.behind >= 0)
        ranges = 1 + bool(branch.size) + bool(chained.size)
        self.prefix = np.zeros((self.span.size + trunk.size + branch.size, ranges, 2), np.int64)
        self.prefix[unit_span, 0, 0] = banks[self.unit_owner]
        self.prefix[unit_span, 0, 1] = banks[self.unit_owner] + seen
        self.prefix[branch_span, 0] = self.prefix[unit_span[of_branch], 0]
        self.prefix[branch_span, 1:2, 0] = begin[of_branch, None]
        self.prefix[branch_span, 1:2, 1] = (begin[of_branch] + before[branched])[:, None]
        at = self.spliced.starts[2][branch]
        self.prefix[branch_span[chained], 2:] = at[self.branches.behind[chained], None, None]
        self.prefix[branch_span[chained], 2:, 1] += self.branches.ahead[chained, None]
        # an item is predicted from the last row of the history before it
        last = np.where(before > 0, begin[self.unit] + before, banks[self.owner] + first) - 1
        self.item_rows = self.branches.last_rows(at, last)
        self.banks = banks

    def stage1(self) -> PatchLayout:
        layout = self.references.layout()
        if not self.reference:
            return layout
        place = np.zeros(self.users.size, np.int64)
        place[self.reading] = np.arange(self.reading.size)
        of, separator = place[self.owner], len(self.planner.prompt.separator)
        rows = len(self.planner.prompt.prefix) + self.references.runs.before(of, self.position, separator)
        begins = self.references.begins[of]
        return with_items(layout, begins + rows - 1, begins, self.targets)

    def stage2(self) -> PatchLayout:
        titles = None
        if self.head != "items":
            titles = np.where(self.branches.titles, self.targets[self.branches.sample], np.int32(-1))
            titles = np.append(np.full(self.segment.size, -1, np.int32), titles)
        heads = np.append(np.full(self.segment.size, Head.NOTHING, np.uint8), self.branches.heads)
        planned = self.planner.planned(self.trunks.then(self.branches.runs), heads, titles)
        layout = self.spliced.layout(planned, self.planner, self.prefix, vectors=1)
        if self.head == "titles":
            return layout
        return with_items(layout, self.item_rows, self.banks[self.owner], self.targets)

    def memories(self) -> Int64:
        slots = self.planner.policy.slots
        return (self._reference(self.held_by, self.memory_of)[:, None] * slots + np.arange(slots)).flatten()

    def updates(self) -> Int64:
        return self.spliced.rows_of(3, self.planner.policy.slots)

    def updated(self) -> Int64:
        return self._reference(self.unit_owner[self.updated_units], self.segment[self.updated_units])

    def _reference(self, owner: Int64, segment: Int64) -> Int64:
        """Which of the references is that of a user's segment."""
        return self.references_before[owner] + segment - self.first_reference[owner]

    def owners1(self) -> Int64:
        """Whose each piece of stage 1 is."""
        return self.reading[np.searchsorted(self.references.span, self.references.spliced.span, side="right") - 1]

    def owners2(self) -> Int64:
        """Whose each piece of stage 2 is."""
        return np.searchsorted(self.span, self.spliced.span, side="right") - 1
