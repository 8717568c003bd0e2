# SPDX-License-Identifier: Apache-2.0
"""Reading under `patchkern.Experts`: a user's prompt with experts in it, all of it, or what is left of it in a cache.

With one part a user's rows stand as they are read, ``[prompt | old | U | recent | suffix]``: the first three are one
causal span, and the rest a span that sees the prompt and the experts U. With blocks they stand as
``[prompt | U_0 U_1 .. | s_0 | s_1 | .. | recent | suffix]``, each a span: s_j and U_j see the prompt and the experts
before them, U_j sees its s_j, too. Positions are those of the order in which all of it was read.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from patchkern.batch.arrangement import Table, arranged, running
from patchkern.batch.catalog import Catalog
from patchkern.batch.experts import Experts, settled_levels
from patchkern.batch.histories import Histories
from patchkern.batch.layout import PatchLayout
from patchkern.batch.planned_layout import plan_layout, unlabelled
from patchkern.batch.planning import Head, Int32, Int64, Spans
from patchkern.batch.policies import Level, Levels
from patchkern.batch.prompt import Prompt


class Parts(NamedTuple):
    """Histories in parts: users in order, of each the parts that are compressed and then its recent items.

    Attributes:
        user: ``(Q,)`` whose each part is, nth: which of that user's, is_old: whether it is compressed.
        items: Q parts, with the ``(N,)`` catalogue positions and levels of their items.
        rows: ``(Q,)`` of entries and the separators between them.
    """

    user: Int64
    nth: Int64
    is_old: NDArray[np.bool_]
    items: Histories
    of_catalog: Int32
    levels: Levels
    rows: Int64

    @classmethod
    def of(cls, catalog: Catalog, histories: Histories, policy: Experts, prompt: Prompt) -> Parts:
        """Where no user's history is without recent items and old ones are left out if there are no experts."""
        lengths = histories.lengths
        cut = policy.cuts(lengths)
        compressed = policy.compressed_parts(cut)
        user = np.repeat(np.arange(lengths.size), compressed + 1)
        nth = np.arange(user.size) - np.repeat(running(compressed + 1)[:-1], compressed + 1)
        is_old = nth < compressed[user]
        size = policy.block if policy.parts == "blocks" else cut[user]
        start = np.where(is_old, nth * size, cut[user])
        items = histories.between(user, start, np.where(is_old, start + size, lengths[user]))
        recents = items.take(np.flatnonzero(~is_old))
        place = np.arange(items.items.size) - np.repeat(items.offsets[:-1], items.lengths)
        levels = settled_levels(policy.policy, place)
        levels[~np.repeat(is_old, items.lengths)] = policy.recents.levels(recents)
        index = catalog.index_of(items.items, "histories")
        rows = entry_rows(catalog, items, index, levels, len(prompt.separator))
        return cls(user, nth, is_old, items, index, levels, rows)

    def planned(
        self, catalog: Catalog, prompt: Prompt, chosen: NDArray[np.bool_], targets: Int32 | None
    ) -> tuple[PatchLayout, Int64]:
        """A layout of the chosen parts, and ``(Q,)`` where their rows begin, after the prefix that a user begins with.

        Args:
            targets: ``(Q,)`` -1 for parts that end with their last entry; None: all have a suffix.
        """
        of_items = np.repeat(chosen, self.items.lengths)
        items = self.items.take(np.flatnonzero(chosen))
        first = np.ones(items.lengths.size, np.bool_)
        first[1:] = np.diff(self.user[chosen]) != 0
        heads = np.where(first, np.uint8(Head.PREFIX), np.uint8(Head.NOTHING))
        spans = None
        if targets is not None or not first.all():
            spans = Spans(heads, np.zeros(first.size, np.int64))
        layout = plan_layout(
            catalog,
            items,
            self.of_catalog[of_items],
            self.levels[of_items],
            prompt,
            None if targets is None else targets[chosen],
            spans,
        )
        begin = np.zeros(self.user.size, np.int64)
        begin[chosen] = layout.cu_seqlens.numpy()[:-1] + len(prompt.prefix) * first
        return layout, begin


def entry_rows(catalog: Catalog, items: Histories, index: Int32, levels: Levels, separator: int) -> Int64:
    """``(Q,)`` rows of the entries of each part, and of the separators between them."""
    rows = np.where(levels == Level.TEXT, catalog.inputs.lengths[index], levels == Level.PATCH)
    rows, entries = (np.diff(running(counts)[items.offsets]) for counts in (rows, levels != Level.JOIN))
    return rows + np.maximum(entries - 1, 0) * separator


def without_old(histories: Histories, policy: Experts) -> Histories | None:
    """The recent items alone, where no user's past is compressed; None where one is."""
    lengths = histories.lengths
    cut = policy.cuts(lengths)
    if policy.compressed_parts(cut).any():
        return None
    return histories.between(np.arange(lengths.size), cut, lengths) if cut.any() else histories


def expert_layout(
    catalog: Catalog,
    histories: Histories,
    policy: Experts,
    prompt: Prompt,
    targets: Int32 | None,
    head: str,
) -> PatchLayout:
    """All rows of every user's prompt, as `patchkern.build_layout` plans them, without item rows and transpose."""
    parts = _checked_parts(catalog, histories, policy, prompt)
    asked = None
    if head == "items" or targets is not None:
        asked = np.full(parts.user.size, -1, np.int32)
        if head != "items" and targets is not None:
            asked[~parts.is_old] = targets
    if head != "items" and not prompt.suffix and bool((parts.items.lengths[~parts.is_old] == 0).any()):
        raise ValueError("prompt: expected a suffix, which follows the experts where no item is recent, got none")
    layout, begin = parts.planned(catalog, prompt, np.ones(parts.user.size, np.bool_), asked)
    if head == "items":
        layout = unlabelled(layout)
    ends = np.append(layout.cu_seqlens.numpy()[1:].astype(np.int64), 0)
    rows = np.where(parts.is_old, parts.rows, ends[:-1] - begin)
    return _joined(layout, begin, rows, parts, np.ones_like(parts.is_old), policy, prompt)


def compress_layout(catalog: Catalog, histories: Histories, policy: Experts, prompt: Prompt) -> PatchLayout:
    """What must be computed for the experts of every user: `expert_layout` without recent items and suffix.

    Users without old items have no rows.
    """
    parts = _checked_parts(catalog, histories, policy, prompt)
    nothing = np.full(parts.user.size, -1, np.int32)
    layout, begin = parts.planned(catalog, prompt, parts.is_old, nothing)
    return _joined(unlabelled(layout), begin, parts.rows, parts, parts.is_old, policy, prompt)


def read_layout(catalog: Catalog, histories: Histories, policy: Experts, prompt: Prompt, head: str) -> PatchLayout:
    """What is left of every user's prompt where the experts' keys and values are kept, a span per user.

    ``[prompt | U | recent | suffix]``, with the positions that these rows have in the whole prompt. Its rows of experts
    are places: computed from it they would have seen nothing that is old.
    """
    parts = _checked_parts(catalog, histories, policy, prompt)
    asked = np.full(parts.user.size, -1, np.int32) if head == "items" else None
    layout, begin = parts.planned(catalog, prompt, ~parts.is_old, asked)
    if head == "items":
        layout = unlabelled(layout)
    rows = np.zeros(parts.user.size, np.int64)
    rows[~parts.is_old] = layout.cu_seqlens.numpy()[1:] - begin[~parts.is_old]
    layout = _joined(layout, begin, rows, parts, ~parts.is_old, policy, prompt)
    tokens = int(catalog.inputs.lengths[parts.of_catalog].sum(dtype=np.int64))
    counts = {"history_tokens": tokens, "cu_users": None}
    return PatchLayout._trusted({**layout.__dict__, **counts})


def _checked_parts(catalog: Catalog, histories: Histories, policy: Experts, prompt: Prompt) -> Parts:
    policy.check_prompt(prompt)
    return Parts.of(catalog, histories, policy, prompt)


def _joined(
    layout: PatchLayout,
    begin: Int64,
    rows: Int64,
    parts: Parts,
    chosen: NDArray[np.bool_],
    policy: Experts,
    prompt: Prompt,
) -> PatchLayout:
    """Chosen parts and all experts, in their order and as spans; without old items a user is one span.

    Args:
        begin: ``(Q,)`` where each part's rows begin in the layout, after a prefix.
        rows: ``(Q,)`` how many of them are taken.
    """
    count, first_rows, n_users = policy.count, len(prompt.prefix), int(parts.user.max(initial=-1)) + 1
    old, bodies = np.flatnonzero(parts.is_old), np.flatnonzero(chosen)
    # the prompt is the beginning of the first part that was planned
    leads = bodies[np.diff(parts.user[bodies], prepend=-1) != 0]
    sizes = parts.rows + count * parts.is_old
    before = running(sizes)[:-1]
    position = first_rows + before - before[parts.nth == 0][parts.user]
    in_blocks = policy.parts == "blocks"
    last = parts.user.size + 1
    body_rank, expert_rank = (last + parts.nth, 1 + parts.nth) if in_blocks else (1 + 2 * parts.nth, 2 + 2 * parts.nth)

    compressed = np.zeros(n_users, np.bool_)
    compressed[parts.user[old]] = chosen[old]
    table = Table()
    of_prompts = table.add(begin[leads] - first_rows, first_rows, 0, True, parts.user[leads], 0)
    opens = compressed[parts.user[bodies]] & (in_blocks | (parts.nth[bodies] > 0))
    of_bodies = table.add(begin[bodies], rows[bodies], position[bodies], opens, parts.user[bodies], body_rank[bodies])
    behind = position[old] + parts.rows[old]
    opens = compressed[parts.user[old]] & in_blocks
    of_experts = table.add(np.full(old.size, layout.num_rows), count, behind, opens, parts.user[old], expert_rank[old])
    pieces, order, at = table.ordered()

    prompts, experts = np.zeros(n_users, np.int64), np.zeros(n_users, np.int64)
    prompts[parts.user[leads]] = at[of_prompts]
    experts[parts.user[old[::-1]]] = at[of_experts][::-1]  # of several the first
    ranges = np.zeros((2, 2, order.size), np.int64)
    for where, which in ((of_bodies, bodies), (of_experts, old)):
        seen = first_rows + (count * parts.nth[which] if in_blocks else 0)
        ranges[0, :, where] = np.stack([prompts[parts.user[which]], prompts[parts.user[which]] + seen])
    if in_blocks:
        own = np.zeros(parts.user.size, np.int64)
        own[bodies] = at[of_bodies]
        ranges[1, :, of_experts] = np.stack([own[old], own[old] + rows[old]])
    else:
        first = experts[parts.user[bodies]]
        ranges[1, :, of_bodies] = np.stack([first, first + count])
    per_user = np.zeros(n_users, np.int64)
    for where, which in ((of_prompts, leads), (of_bodies, bodies), (of_experts, old)):
        np.add.at(per_user, parts.user[which], pieces.rows[np.argsort(order)[where]])
    joined = arranged(layout, prompt.experts[:count], pieces, ranges[:, :, order], running(per_user))
    return PatchLayout._trusted({**joined.__dict__, "history_rows": layout.history_rows + count * old.size})
