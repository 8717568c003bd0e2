# SPDX-License-Identifier: Apache-2.0
"""Training under `patchkern.Experts`: many targets of a user in one pass, each as it is served.

A user's items are computed once as a *trunk* s, as they are without experts. With one part, experts U^j after the
first j blocks of it see the prompt and those blocks; the items that are recent beside them follow *again*, as a trunk
r_j that sees the prompt and U^j. A target whose history is cut there is a branch of r_j, all others are branches of s:

    [prompt s | U^1 | r_1 | U^2 | r_2 | .. | branches]

With blocks every item stands once, ``[prompt | U_0 U_1 .. | s_0 | s_1 | .. | branches]``: a target is a branch of the
s_j that has the item before it. For an item head, a target's row is that of the item before it, and there are more
labels than targets: all rows of trunks that end a history as it is served, the last row of what is compressed, and the
last of the experts, which predict the first item that is recent.
"""

from __future__ import annotations

import numpy as np

from patchkern.batch.arrangement import Table, arranged, running, spread
from patchkern.batch.branches import Branches
from patchkern.batch.catalog import Catalog
from patchkern.batch.expert_trunks import Groups, Samples, Trunks, shared_items
from patchkern.batch.experts import Experts, settled_levels
from patchkern.batch.histories import Histories
from patchkern.batch.layout import PatchLayout
from patchkern.batch.planned_layout import plan_layout, unlabelled, with_items
from patchkern.batch.planning import Head, Int64, Spans
from patchkern.batch.prompt import Prompt
from patchkern.batch.runs import Runs


def expert_training_layout(
    catalog: Catalog, histories: Histories, policy: Experts, prompt: Prompt, samples: tuple[Int64, Int64], head: str
) -> PatchLayout:
    """The pass of ``(S,)`` users and positions, users ascending, as `patchkern.build_training_layout` plans it.

    For "items", its ``item_labels`` are first those of the targets, in order, and then the others.
    """
    policy.check_prompt(prompt)
    return _Rows(catalog, histories, policy, prompt, samples, head, policy.boundaries).layout()


def expert_training_rows(
    catalog: Catalog, histories: Histories, policy: Experts, prompt: Prompt, samples: tuple[Int64, Int64], head: str
) -> Int64:
    """``(B,)`` the most rows that each user takes in `expert_training_layout`, whichever borders are drawn."""
    policy.check_prompt(prompt)
    everything = _Rows(catalog, histories, policy, prompt, samples, head, None)
    rows = np.zeros(len(histories), np.int64)
    if policy.boundaries is None or policy.parts == "blocks" or not policy.has_one_form:
        np.add.at(rows, everything.trunks.user, everything.trunk_rows())
        np.add.at(rows, samples[0], everything.branch_rows())
        return rows
    nothing = _Rows(catalog, histories, policy, prompt, samples, head, 0)
    # whole histories, and every branch as one of them
    trunks, n_whole = everything.trunks, int(everything.trunks.is_whole.sum())
    whole = np.maximum(everything.trunk_rows()[:n_whole], nothing.trunk_rows())
    branches = nothing.branch_rows()
    np.add.at(rows, nothing.trunks.user, whole)
    np.add.at(rows, samples[0], branches)
    # and those drawn borders of each user that add most
    more = everything.trunk_rows()
    np.add.at(more, everything.samples.trunk, everything.branch_rows() - branches)
    user, more = trunks.user[n_whole:], more[n_whole:]
    order = np.lexsort((-more, user))
    drawn = order[np.arange(order.size) - np.searchsorted(user, user[order]) < policy.boundaries]
    np.add.at(rows, user[drawn], more[drawn])
    return rows


class _Rows:
    """Trunks, experts and branches of a pass, as rows."""

    def __init__(
        self,
        catalog: Catalog,
        histories: Histories,
        policy: Experts,
        prompt: Prompt,
        samples: tuple[Int64, Int64],
        head: str,
        draw: int | None,
    ) -> None:
        self.catalog, self.histories, self.policy, self.prompt, self.head = catalog, histories, policy, prompt, head
        self.trunks: Trunks
        self.groups: Groups
        self.samples: Samples
        self.trunks, self.groups, self.samples = shared_items(policy, *samples, draw, head == "items")
        position, split = self.samples.position, self.samples.split
        self.targets = catalog.index_of(histories.at(*samples), "histories")

        items = histories.between(*self.trunks[:3])
        place = np.arange(items.items.size) - np.repeat(items.offsets[:-1], items.lengths)
        is_read = np.repeat(self.trunks.is_read, items.lengths)
        levels = np.where(is_read, settled_levels(policy.recents, place), settled_levels(policy.policy, place))
        self.runs = Runs.of(catalog, items, levels.astype(np.uint8))

        own = histories.between(self.samples.user, split, position)
        # targets behind different borders share none: where those are drawn, some of them may read other trunks
        trunks = self.samples.trunk, split, policy.cuts(position)
        before = self.rows_before(self.samples.trunk, split)
        self.branches = Branches.of_samples(catalog, prompt, own, policy.recents.levels(own), trunks, before, head)

    def rows_before(self, trunk: Int64, position: Int64) -> Int64:
        """Rows of trunks before items at these positions of their users' histories."""
        return self.runs.before(trunk, position - self.trunks.start[trunk], len(self.prompt.separator))

    def trunk_rows(self) -> Int64:
        """``(N,)`` rows of each trunk, of the experts before it, and of the prompt before a user's first."""
        rows = self.runs.whole(len(self.prompt.separator))
        rows[self.groups.before] += self.policy.count
        first = np.unique(self.trunks.user, return_index=True)[1]
        rows[first] += len(self.prompt.prefix)
        return rows

    def branch_rows(self) -> Int64:
        """``(S,)`` rows of the branches that each sample's own items are in; of what is read from another's, 0."""
        rows = np.zeros_like(self.targets, np.int64)
        np.add.at(rows, self.branches.sample, self.branches.rows)
        if self.head != "items":
            response = self.catalog.lengths[self.targets] + len(self.prompt.response_end)
            rows += response + len(self.prompt.suffix)
        return rows

    # ------------------------------------------------------------------ the layout

    def planned(self) -> PatchLayout:
        """Trunks, the first of every user with the prompt, and then branches, without experts."""
        n_trunks, branches = self.trunks.user.size, self.branches
        heads = np.append(np.full(n_trunks, Head.NOTHING, np.uint8), branches.heads)
        heads[np.unique(self.trunks.user, return_index=True)[1]] = Head.PREFIX
        titles = np.where(branches.titles, self.targets[branches.sample], np.int32(-1))
        titles = np.append(np.full(n_trunks, -1, np.int32), titles)
        runs = self.runs.then(self.branches.runs)
        layout = plan_layout(self.catalog, *runs[:3], self.prompt, titles, Spans(heads, np.zeros(heads.size, np.int64)))
        return layout if self.head != "items" else unlabelled(layout)

    def positions(self) -> Int64:
        """``(N,)`` of each trunk's first row, where all that was read before it had rows."""
        trunks, groups = self.trunks, self.groups
        position = np.full(trunks.user.size, len(self.prompt.prefix))
        added = self.rows_before(groups.of, groups.upto) + self.policy.count
        if self.policy.parts == "one":
            position[groups.before] += added
            return position
        # groups of a user follow each other; what is compressed stands where its block does
        ends = running(added)
        first = np.searchsorted(trunks.user[groups.of], trunks.user[groups.of])
        position[groups.before] += ends[1:] - ends[first]
        if not self.policy.has_one_form:
            position[groups.of] = position[groups.before] - added
        return position

    def layout(self) -> PatchLayout:
        """Everything in its order, with ranges and labels."""
        planned = self.planned()
        trunks, groups, samples, count = self.trunks, self.groups, self.samples, self.policy.count
        in_blocks, n_trunks, first_rows = self.policy.parts == "blocks", trunks.user.size, len(self.prompt.prefix)
        starts = planned.cu_seqlens.numpy().astype(np.int64)
        users, first, owner = np.unique(trunks.user, return_index=True, return_inverse=True)
        owner = owner.reshape(-1)
        rows, positions = self.runs.whole(len(self.prompt.separator)), self.positions()
        begin, of_samples = starts[:n_trunks].copy(), self.branches
        begin[first] += first_rows
        trunk = samples.trunk[of_samples.sample]
        hidden = self.rows_before(trunk, samples.split[of_samples.sample])
        compressed = self.rows_before(groups.of, groups.upto)
        # a user's trunks follow each other, each behind its experts; with blocks, all experts come first
        rank = 2 * np.arange(n_trunks) + 2
        table = Table()
        prompts = table.add(starts[first], first_rows, 0, True, np.arange(users.size), 0)
        bodies = table.add(begin, rows, positions, ~trunks.is_whole, owner, rank + in_blocks * 2 * n_trunks)
        learned, of = np.full(groups.of.size, planned.num_rows), owner[groups.of]
        experts = table.add(learned, count, positions[groups.before] - count, True, of, rank[groups.before] - 1)
        sizes, place = np.diff(starts)[n_trunks:], np.arange(trunk.size)
        at_branches = positions[trunk] + hidden + of_samples.ahead
        branches = table.add(starts[n_trunks:-1], sizes, at_branches, True, users.size, place)
        pieces, order, at = table.ordered()

        prompt_at, at_bodies, at_experts = at[prompts][owner], at[bodies], at[experts]
        leads = at_bodies.copy()  # where that begins which a branch sees beside the prompt and what is compressed
        if not in_blocks:
            leads[groups.before] = at_experts
        bank = prompt_at + first_rows + in_blocks * count * trunks.follows
        chained = np.flatnonzero(of_samples.behind >= 0)
        ranges = np.zeros((2 + bool(chained.size), 2, order.size), np.int64)
        ranges[0, :, bodies] = prompt_at, bank
        ranges[1, :, bodies] = leads, at_bodies
        whole = trunks.is_whole[trunk]
        ranges[0, :, branches] = prompt_at[trunk], np.where(whole, at_bodies[trunk] + hidden, bank[trunk])
        ranges[1, :, branches] = np.where(whole, 0, [leads[trunk], at_bodies[trunk] + hidden])
        ends = at_bodies[groups.of] + compressed
        ranges[2:, :, branches.start + chained] = at[branches][of_samples.behind[chained]]
        ranges[2:, 1, branches.start + chained] += of_samples.ahead[chained]
        ranges[0, :, experts] = prompt_at[groups.of], bank[groups.of] if in_blocks else ends
        if in_blocks:
            ranges[1, :, experts] = at_bodies[groups.of], ends
        layout = arranged(planned, self.prompt.experts[:count], pieces, ranges[:, :, order])
        if self.head == "titles":
            return layout

        # a trunk without rows before an item is read from what stands before the trunk
        ahead = prompt_at + first_rows - 1
        ahead[groups.before] = at_experts + count - 1

        def before(trunk: Int64, position: Int64) -> Int64:
            rows = self.rows_before(trunk, position)
            return np.where(rows > 0, at_bodies[trunk] + rows, ahead[trunk] + 1) - 1

        item_rows = of_samples.last_rows(at[branches], before(samples.trunk, samples.split))
        labels, more = self.targets, self._more_labels() if self.head == "items" else None
        if more is not None:
            item_rows = np.concatenate([item_rows, before(*more[0]), at_experts[more[1]] + count - 1])
            user = trunks.user[np.append(more[0][0], groups.of[more[1]])]
            position = np.append(more[0][1], groups.upto[more[1]])
            labels = np.append(labels, self.catalog.index_of(self.histories.at(user, position), "histories"))
        begins = np.full(item_rows.size, 0)
        begins[: samples.user.size] = prompt_at[samples.trunk]
        return with_items(layout, item_rows, begins, labels)

    def _more_labels(self) -> tuple[tuple[Int64, Int64], Int64]:
        """Trunks and positions whose items are also predicted, and the groups of experts that predict what follows."""
        trunks, groups, samples = self.trunks, self.groups, self.samples
        least, most = np.full(len(self.histories), np.iinfo(np.int64).max), np.full(len(self.histories), -1)
        np.minimum.at(least, samples.user, samples.position)
        np.maximum.at(most, samples.user, samples.position)
        lengths = trunks.end - trunks.start
        trunk = np.repeat(np.arange(lengths.size), lengths)
        position = spread(trunks.start + 1, lengths)
        served = self.policy.recents.trunks(position - trunks.start[trunk])[1] == position - trunks.start[trunk]
        served &= trunks.is_read[trunk]
        # and the last old row, in whatever form
        trunk, position = np.append(trunk[served], groups.of), np.append(position[served], groups.upto)
        asked = (least[trunks.user[trunk]] <= position) & (position <= most[trunks.user[trunk]])
        keys = np.stack([trunk, position], axis=1)[asked]
        keys = np.unique(keys, axis=0)
        known = np.stack([samples.trunk, samples.split], axis=1)[samples.split == samples.position]
        scale = int(self.histories.lengths.max(initial=0)) + 1
        keys = keys[~np.isin(keys @ [scale, 1], known @ [scale, 1])]
        first = samples.split == trunks.start[samples.trunk]
        read_ahead = np.isin(groups.before, samples.trunk[first & (samples.split == samples.position)])
        user = trunks.user[groups.of]
        asked = (least[user] <= groups.upto) & (groups.upto <= most[user]) & ~read_ahead
        return (keys[:, 0], keys[:, 1]), np.flatnonzero(asked)
