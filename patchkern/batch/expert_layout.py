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
from patchkern.batch.hashes import UInt64, item_hashes, learned_hashes
from patchkern.batch.histories import Histories, HistoriesLike
from patchkern.batch.layout import PatchLayout
from patchkern.batch.planned_layout import check_head, check_inputs, plan_layout, unlabelled
from patchkern.batch.planning import Head, Int32, Int64, Spans
from patchkern.batch.policy_kinds import Levels
from patchkern.batch.prompt import Prompt
from patchkern.batch.runs import Runs


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
    def of(cls, catalog: Catalog, histories: Histories, policy: Experts, prompt: Prompt, cut: Int64) -> Parts:
        """Of histories whose first ``cut`` items are old; without experts these are left out."""
        lengths = histories.lengths
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
        runs = Runs.of(catalog, items, levels)
        return cls(user, nth, is_old, *runs[:3], runs.whole(len(prompt.separator)))

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
    behind = ~parts.is_old & (parts.nth > 0)
    if head != "items" and not prompt.suffix and bool((parts.items.lengths[behind] == 0).any()):
        raise ValueError("prompt: expected a suffix, which follows the experts where no item is recent, got none")
    layout, begin = parts.planned(catalog, prompt, np.ones(parts.user.size, np.bool_), asked)
    if head == "items":
        layout = unlabelled(layout)
    ends = np.append(layout.cu_seqlens.numpy()[1:].astype(np.int64), 0)
    rows = np.where(parts.is_old, parts.rows, ends[:-1] - begin)
    return _joined(layout, begin, rows, parts, np.ones_like(parts.is_old), policy, prompt)


def compress_layout(
    catalog: Catalog, old: Histories, policy: Experts, prompt: Prompt, known: Int64 | None = None
) -> PatchLayout:
    """What must be computed for the experts of users' old items: their prompts and parts as spans, experts behind each.

    The prompt is a span of its own, ``[prompt | old U]`` or ``[prompt | U_0 U_1 .. | s_0 | s_1 | ..]``, positions are
    those of the whole prompt.

    Args:
        old: B pasts of whole blocks, none empty.
        known: ``(B,)`` how many parts of each have experts already; these stand in their places, what they read does
            not.
    """
    parts = _old_parts(catalog, old, policy, prompt)
    chosen = parts.is_old if known is None else parts.is_old & (parts.nth >= known[parts.user])
    nothing = np.full(parts.user.size, -1, np.int32)
    layout, begin = parts.planned(catalog, prompt, chosen, nothing)
    return _joined(unlabelled(layout), begin, parts.rows, parts, chosen, policy, prompt, apart=True)


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


def expert_hashes(
    catalog: Catalog, histories: Histories, policy: Experts, prompt: Prompt, by_item: bool = False
) -> UInt64:
    """``(n,)`` what the experts of all users stand for, in order: they differ where anything does that they have read.

    Args:
        by_item: as of `patchkern.row_hashes`.
    """
    policy.check_prompt(prompt)
    cut = policy.cuts(histories.lengths)
    compressed = policy.compressed_parts(cut)
    users = np.flatnonzero(compressed)
    old = histories.between(users, np.zeros_like(users), cut[users])
    place = np.arange(old.items.size) - np.repeat(old.offsets[:-1], old.lengths)
    items = item_hashes(catalog, by_item, catalog.index_of(old.items, "histories"))
    groups = compressed[users]
    user = np.repeat(np.arange(users.size), groups)
    nth = np.arange(user.size) - np.repeat(running(groups)[:-1], groups)
    in_blocks = policy.parts == "blocks"
    lengths = (nth + 1) * policy.block if in_blocks else old.lengths
    # a block's experts have read the experts before them, too
    tokens = (len(prompt.prefix), *prompt.prefix, policy.count, *prompt.experts, *prompt.separator)
    manner = (policy.block if in_blocks else 0, *tokens)
    forms = settled_levels(policy.policy, place)
    return learned_hashes(items, forms, old.offsets, user, lengths, policy.count, np.array(manner, np.int64))


class ExpertRowCounts(NamedTuple):
    """``(B,)`` rows of every user's prompt: all of them, those computed for experts, and those that are left then."""

    whole: Int64
    compressed: Int64
    read: Int64


def expert_row_counts(
    catalog: Catalog, histories: HistoriesLike, policy: Experts, prompt: Prompt, head: str = "titles"
) -> ExpertRowCounts:
    """How many rows histories take, without building a layout.

    Args:
        catalog, histories, policy, prompt, head: as in `patchkern.build_layout`.

    Returns:
        ``whole`` is what `patchkern.row_counts` says. A search computes and drops those of ``compressed``, a few users
        at a time, and keeps those of ``read``: `patchkern.plan_memory` takes both.

    Examples:
        >>> import patchkern as pk
        >>> catalog = pk.Catalog.from_token_ids(range(9), range(10))
        >>> policy = pk.Experts(pk.ItemPatches(keep_text=0, max_items=None), count=2, keep=1, block=3)
        >>> rows = pk.expert_row_counts(catalog, [range(8), range(3)], policy, pk.Prompt(prefix=[9], experts=[10, 11]))
        >>> rows.whole.tolist(), rows.compressed.tolist(), rows.read.tolist()
        ([11, 4], [9, 0], [5, 4])
    """
    check_head(head)
    check_inputs(catalog, policy, prompt)
    if not isinstance(policy, Experts):
        raise TypeError(f"policy: expected Experts, got {type(policy).__name__}")
    histories = Histories.coerce(histories)
    parts = _checked_parts(catalog, histories, policy, prompt)
    n_users, is_old = len(histories), parts.is_old
    recent = np.zeros(n_users, np.int64)
    np.add.at(recent, parts.user[~is_old], parts.rows[~is_old])
    old = _old_rows(parts, n_users)
    experts = policy.count * np.bincount(parts.user[is_old], minlength=n_users)
    read = len(prompt.prefix) + experts + recent + (len(prompt.suffix) if head != "items" else 0)
    return ExpertRowCounts(read + old, np.where(old > 0, len(prompt.prefix) + old + experts, 0), read)


def compressed_row_counts(catalog: Catalog, old: Histories, policy: Experts, prompt: Prompt) -> Int64:
    """``(B,)`` rows of `compress_layout`."""
    parts = _old_parts(catalog, old, policy, prompt)
    experts = policy.count * policy.compressed_parts(old.lengths)
    return len(prompt.prefix) + _old_rows(parts, len(old)) + experts


def _old_rows(parts: Parts, n_users: int) -> Int64:
    rows = np.zeros(n_users, np.int64)
    np.add.at(rows, parts.user[parts.is_old], parts.rows[parts.is_old])
    return rows


def _checked_parts(catalog: Catalog, histories: Histories, policy: Experts, prompt: Prompt) -> Parts:
    policy.check_prompt(prompt)
    return Parts.of(catalog, histories, policy, prompt, policy.cuts(histories.lengths))


def _old_parts(catalog: Catalog, old: Histories, policy: Experts, prompt: Prompt) -> Parts:
    policy.check_prompt(prompt)
    if policy.count == 0:
        raise ValueError("policy: expected experts to compress old items to, got count=0")
    wrong = np.flatnonzero((old.lengths % policy.block != 0) | (old.lengths == 0))
    if wrong.size:
        raise ValueError(
            f"old[{wrong[0]}]: expected whole blocks of {policy.block} items, got {old.lengths[wrong[0]]} items"
        )
    return Parts.of(catalog, old, policy, prompt, old.lengths)


def _joined(
    layout: PatchLayout,
    begin: Int64,
    rows: Int64,
    parts: Parts,
    chosen: NDArray[np.bool_],
    policy: Experts,
    prompt: Prompt,
    apart: bool = False,
) -> PatchLayout:
    """Chosen parts and all experts, in their order and as spans; without old items a user is one span.

    Args:
        begin: ``(Q,)`` where each part's rows begin in the layout, after a prefix.
        rows: ``(Q,)`` how many of them are taken.
        chosen: ``(Q,)`` which of the parts were planned.
        apart: the prompt is a span of its own also where one part follows it.
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
    opens = compressed[parts.user[bodies]] & (in_blocks | apart | (parts.nth[bodies] > 0))
    of_bodies = table.add(begin[bodies], rows[bodies], position[bodies], opens, parts.user[bodies], body_rank[bodies])
    behind = position[old] + parts.rows[old]
    opens = compressed[parts.user[old]] & in_blocks
    of_experts = table.add(np.full(old.size, layout.num_rows), count, behind, opens, parts.user[old], expert_rank[old])
    pieces, order, at = table.ordered()

    prompts, experts = np.zeros(n_users, np.int64), np.zeros(n_users, np.int64)
    prompts[parts.user[leads]] = at[of_prompts]
    experts[parts.user[old[::-1]]] = at[of_experts][::-1]  # of several the first
    ranges = np.zeros((2 * compressed.any(), 2, order.size), np.int64)  # a user in one span sees no other
    if ranges.size:
        for where, which in ((of_bodies, bodies), (of_experts, old)):
            seen = first_rows + (count * parts.nth[which] if in_blocks else 0)
            ranges[0, :, where] = np.stack([prompts[parts.user[which]], prompts[parts.user[which]] + seen])
        if in_blocks:
            own = np.zeros(parts.user.size, np.int64)
            own[bodies] = at[of_bodies]
            ranges[1, :, of_experts] = np.stack([own[old], own[old] + rows[old] * chosen[old]])
        else:
            first = experts[parts.user[bodies]]
            ranges[1, :, of_bodies] = np.stack([first, first + count * (parts.nth[bodies] > 0)])
    begins = np.append(prompts, pieces.total)
    joined = arranged(layout, prompt.experts[:count], pieces, ranges[:, :, order], begins)
    return PatchLayout._trusted({**joined.__dict__, "history_rows": layout.history_rows + count * old.size})
