# SPDX-License-Identifier: Apache-2.0
"""Many targets per history in one pass: the history is a trunk, computed once, and every target a branch of it.

A sample (history, target) as `patchkern.build_layout` packs it repeats the whole history for a single target. Here a
user's *trunk* is the prompt's prefix and the part of the history that many samples begin with, and a sample's *branch*
is the rest of it: the recent items that its policy treats apart, the suffix and the response. A branch is a span whose
prefix is its trunk up to its own point, with positions that go on from there, so that every row sees exactly the rows
that it sees in a sample of its own. Loss and gradients are those of the samples, packed.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from patchkern.batch.arguments import check_count
from patchkern.batch.arrangement import running
from patchkern.batch.catalog import Catalog
from patchkern.batch.expert_training import expert_training_layout, expert_training_rows
from patchkern.batch.experts import Experts
from patchkern.batch.histories import Histories, HistoriesLike, first_kept
from patchkern.batch.layout import PatchLayout
from patchkern.batch.list_layout import Lists, is_list, list_layout
from patchkern.batch.planned_layout import (
    check_head,
    check_inputs,
    plan_layout,
    target_samples,
    unlabelled,
    with_items,
)
from patchkern.batch.planning import Head, Int32, Int64, Spans
from patchkern.batch.policy_kinds import AnyPolicy, Level, Levels, TrunkPolicy, cut_every_of
from patchkern.batch.prompt import Prompt

_BLOCK_SIZE = 50


class _Samples(NamedTuple):
    """One entry per target, users in order: its history is the user's items from ``start`` to before ``position``."""

    user: Int64
    position: Int64
    start: Int64
    split: Int64  # items of the history that the trunk holds
    trunk: Int64


def build_training_layout(
    catalog: Catalog,
    histories: HistoriesLike,
    policy: AnyPolicy,
    prompt: Prompt,
    target_ranges: ArrayLike,
    max_rows: int | None = None,
    *,
    block_size: int | None = None,
    transpose: bool = True,
    head: str = "titles",
) -> PatchLayout:
    """Plan a packed batch of trunks and branches: every target of ``target_ranges``, each history computed once.

    With ``policy.max_items`` None, or histories within it, the loss over the layout is exactly that of
    `build_layout` over one sample per target. Beyond it a sample's history cannot begin at its own ``max_items``-th
    latest item, or no two would share a trunk: it begins at the last multiple of ``block_size`` before that, and so
    holds up to ``block_size - 1`` items more. It is what `build_layout` makes of it all the same where ``block_size``
    is the policy's ``cut_every``.

    Where histories are text and the prompt is a list (`Prompt.is_list`), the next item's title is the next target: the
    trunk alone is planned, with labels on all its targets, for no row more. A target without a history then follows
    the prefix without the suffix between. Not so where the catalogue has texts, as a history then holds no titles.

    `RandomItemPatches` are drawn once per trunk: targets of one trunk see the same items as patches, where samples of
    their own would each have drawn anew.

    Args:
        catalog: the titles.
        histories: whole histories of B users, targets included.
        policy: a `TrunkPolicy`: `TextOnly`, `ItemPatches`, `SessionPatches`, `RandomItemPatches` or `ItemDropout`; or
            `Experts`, whose spans are trunks, experts and branches (`patchkern.batch.expert_training`).
        prompt: the fixed tokens.
        target_ranges: ``(B, 2)`` integers, the first and the last position in the user's history that is a target; a
            user whose last is less than the first has none.
        max_rows: refuse a batch of more rows; `training_rows` says what each user needs.
        block_size: items between the possible beginnings of histories that are cut; the policy's ``cut_every`` where
            not given, or 50 where that is 1.
        transpose: also plan the embeddings' gradient.
        head: "titles"; "items", for a model's item head: every target is predicted from the last row of the history
            before it, which costs no row of its own where the trunk holds that history (`TextOnly`,
            `RandomItemPatches`, ``ItemPatches(keep_text=0)``), and else a branch of the recent items alone, without
            suffix or response; "both", the rows of titles with the labels of both.

    Returns:
        A layout whose spans are the trunks and then the branches, with labels on the responses, or ``item_labels``, in
        the order of the targets, or both. Without branches it has no prefixes.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Examples:
        A user's last three items as targets: one trunk and three branches, instead of the history three times.

        >>> import patchkern as pk
        >>> catalog = pk.Catalog.from_token_ids([5, 6, 7, 8, 9], [0, 2, 5])
        >>> prompt = pk.Prompt(prefix=[1], separator=[2], suffix=[3], response_end=[4])
        >>> policy = pk.ItemPatches(keep_text=1)
        >>> history = [0, 1] * 20
        >>> together = pk.build_training_layout(catalog, [history], policy, prompt, [[37, 39]])
        >>> apart = pk.build_layout(catalog, [history[:end] for end in (37, 38, 39)], policy, prompt, history[37:])
        >>> together.num_rows, apart.num_rows
        (100, 246)

        Their items alone, from the rows of the history.

        >>> policy = pk.ItemPatches(keep_text=0)
        >>> items = pk.build_training_layout(catalog, [history], policy, prompt, [[37, 39]], head="items")
        >>> items.num_rows, items.item_rows.tolist(), items.item_labels.tolist()
        (78, [73, 75, 77], [1, 0, 1])
    """
    check_head(head)
    if max_rows is not None:
        check_count("max_rows", max_rows, minimum=1)
    if not isinstance(transpose, bool):
        raise TypeError(f"transpose: expected a bool, got {type(transpose).__name__}")
    histories = Histories.coerce(histories)
    if isinstance(policy, Experts):
        check_inputs(catalog, policy, prompt)
        of_targets = target_samples(histories, target_ranges)
        layout = expert_training_layout(catalog, histories, policy, prompt, of_targets, head)
        _check_rows(layout, max_rows)
        return layout.with_transpose() if transpose else layout
    policy = _trunk_policy(catalog, policy, prompt)
    samples = _samples(histories, policy, target_ranges, block_size)
    parts = _parts(catalog, histories, policy, samples, head)
    listed = head != "items" and is_list(catalog, policy, prompt)
    if head != "items" and not prompt.suffix and bool((parts.items.lengths[parts.trunks :] == 0).any()):
        raise ValueError("prompt: expected a suffix, which a branch without text of its own begins with, got none")
    targets = catalog.index_of(histories.at(samples.user, samples.position), "histories")
    hidden = _rows_before(parts, prompt, samples)
    of_branches = hidden[parts.branched]
    titles = targets[parts.branched] if head != "items" else np.full(parts.branched.size, -1, np.int32)
    if listed:
        layout = list_layout(catalog, histories, prompt, Lists.of(samples.user, samples.start, samples.position))
    else:
        heads = np.where(_leads(parts, samples), np.uint8(Head.SEPARATOR), np.uint8(Head.NOTHING))
        heads = np.append(np.full(parts.trunks, Head.PREFIX, np.uint8), heads)
        layout = plan_layout(
            catalog,
            parts.items,
            parts.of_catalog,
            parts.levels,
            prompt,
            np.append(np.full(parts.trunks, -1, np.int32), titles),
            Spans(heads, np.append(np.zeros(parts.trunks, np.int64), of_branches)),
        )
    _check_rows(layout, max_rows)
    cu_seqlens = layout.cu_seqlens.numpy().astype(np.int64)
    trunk_starts = cu_seqlens[samples.trunk]
    if not listed and (head != "items" or parts.branched.size):
        prefix = np.zeros((len(parts.items), 2), np.int32)
        prefix[parts.trunks :, 0] = trunk_starts[parts.branched]
        prefix[parts.trunks :, 1] = prefix[parts.trunks :, 0] + of_branches
        changed = {"prefix": torch.from_numpy(prefix), "max_prefix": int(of_branches.max(initial=0))}
        layout = PatchLayout._trusted({**layout.__dict__, **changed})
    if head == "items":
        layout = unlabelled(layout)
    if head != "titles":
        rows = trunk_starts + hidden - 1
        own = _own_rows(parts, samples, len(prompt.separator))
        inside = np.flatnonzero(own)
        rows[parts.branched[inside]] = cu_seqlens[parts.trunks + inside] + own[inside] - 1
        layout = with_items(layout, rows, trunk_starts, targets)
    return layout.with_transpose() if transpose else layout


def training_rows(
    catalog: Catalog,
    histories: HistoriesLike,
    policy: AnyPolicy,
    prompt: Prompt,
    target_ranges: ArrayLike,
    *,
    block_size: int | None = None,
    head: str = "titles",
) -> Int64:
    """``(B,)`` rows that each user takes in `build_training_layout` with these arguments.

    With `Experts`, whose borders are drawn, the most that it can be.

    Examples:
        >>> import patchkern as pk
        >>> catalog = pk.Catalog.from_token_ids(range(4), range(5))
        >>> prompt = pk.Prompt(prefix=[4], separator=[5], suffix=[6], response_end=[7])
        >>> histories, ranges = [[0, 1, 2, 3, 0], [2, 1]], [[1, 4], [1, 1]]  # first and last target of each user
        >>> pk.training_rows(catalog, histories, pk.ItemPatches(keep_text=1), prompt, ranges).tolist()
        [25, 5]
        >>> pk.training_rows(catalog, histories, pk.ItemPatches(keep_text=1), prompt, ranges, head="items").tolist()
        [13, 2]
    """
    check_head(head)
    histories = Histories.coerce(histories)
    if isinstance(policy, Experts):
        check_inputs(catalog, policy, prompt)
        of_targets = target_samples(histories, target_ranges)
        return expert_training_rows(catalog, histories, policy, prompt, of_targets, head)
    policy = _trunk_policy(catalog, policy, prompt)
    samples = _samples(histories, policy, target_ranges, block_size)
    rows = np.zeros(len(histories), np.int64)
    if head != "items" and is_list(catalog, policy, prompt):
        lists = Lists.of(samples.user, samples.start, samples.position)
        np.add.at(rows, lists.user, lists.rows(catalog, histories, prompt))
        return rows
    parts = _parts(catalog, histories, policy, samples, head)
    of_trunks = len(prompt.prefix) + _entry_rows(parts, len(prompt.separator))[: parts.trunks]
    of_branches = _own_rows(parts, samples, len(prompt.separator))
    if head != "items":
        titles = catalog.lengths[catalog.index_of(histories.at(samples.user, samples.position), "histories")]
        of_branches += titles + len(prompt.suffix) + len(prompt.response_end)
    owner = np.zeros(of_trunks.size, np.int64)
    owner[samples.trunk] = samples.user
    np.add.at(rows, owner, of_trunks)
    np.add.at(rows, samples.user[parts.branched], of_branches)
    return rows


def _check_rows(layout: PatchLayout, max_rows: int | None) -> None:
    if max_rows is not None and layout.num_rows > max_rows:
        raise ValueError(f"max_rows: expected at least {layout.num_rows} for these users and targets, got {max_rows}")


class _Parts(NamedTuple):
    """The parts of histories that are the spans of a batch: the trunks, and then a branch per sample."""

    items: Histories
    of_catalog: Int32  # (N,) catalogue positions of the items
    levels: Levels
    trunks: int
    branched: Int64  # (n_branches,) the samples that have a branch
    rows: Int64  # (N + 1,) running count of the rows of entries
    entries: Int64  # (N + 1,) running count of entries


def _trunk_policy(catalog: Catalog, policy: AnyPolicy, prompt: Prompt) -> TrunkPolicy:
    check_inputs(catalog, policy, prompt)
    if not isinstance(policy, TrunkPolicy):
        raise ValueError(
            f"policy: expected one whose prompts share their beginnings (a TrunkPolicy), got {type(policy).__name__}"
        )
    return policy


def _samples(histories: Histories, policy: TrunkPolicy, target_ranges: ArrayLike, block_size: int | None) -> _Samples:
    if block_size is None:
        block_size = cut_every_of(policy) if cut_every_of(policy) > 1 else _BLOCK_SIZE
    check_count("block_size", block_size, minimum=1)
    user, position = target_samples(histories, target_ranges)
    start = first_kept(position, policy.max_items, block_size)
    key, split = policy.trunks(position - start)
    return _Samples(user, position, start, split, _numbered(user, start, key))


def _numbered(*columns: Int64) -> Int64:
    """``(S,)`` the rank of each sample's columns among the distinct ones, the first column counting most."""
    order = np.lexsort(columns[::-1])
    new = np.zeros(order.size, np.bool_)
    for column in columns:
        new[1:] |= np.diff(column[order]) != 0
    rank = np.empty(order.size, np.int64)
    rank[order] = np.cumsum(new)
    return rank


def _parts(catalog: Catalog, histories: Histories, policy: TrunkPolicy, samples: _Samples, head: str) -> _Parts:
    order = np.lexsort((samples.split, samples.trunk))
    longest = order[np.flatnonzero(np.diff(samples.trunk[order], append=-1) != 0)]
    user, start, split = samples.user[longest], samples.start[longest], samples.split[longest]
    # levels of a trunk are those it has in the longest of its samples
    whole = histories.between(user, start, samples.position[longest])
    place = np.arange(whole.items.size) - np.repeat(whole.offsets[:-1], whole.lengths)
    of_trunks = policy.levels(whole)[place < np.repeat(split, whole.lengths)]
    trunks = histories.between(user, start, start + split)
    # a title always has a branch; an item is predicted from the trunk where that holds its whole history
    begin = samples.start + samples.split
    branched = np.arange(begin.size) if head != "items" else np.flatnonzero(begin < samples.position)
    branches = histories.between(samples.user[branched], begin[branched], samples.position[branched])
    items = Histories._owned(
        np.concatenate([trunks.items, branches.items]),
        np.concatenate([trunks.offsets[:-1], trunks.items.size + branches.offsets]),
    )
    levels = np.concatenate([of_trunks, policy.levels(branches)])
    index = catalog.index_of(items.items, "histories")
    rows = np.where(levels == Level.TEXT, catalog.inputs.lengths[index], levels == Level.PATCH)
    entries = (levels != Level.JOIN) & (levels != Level.DROP)
    return _Parts(items, index, levels, len(trunks), branched, running(rows), running(entries))


def _leads(parts: _Parts, samples: _Samples) -> NDArray[np.bool_]:
    """``(n_branches,)`` whether a separator leads the branch: where entries stand on both sides of the border."""
    starts = parts.items.offsets[samples.trunk[parts.branched]]
    before = parts.entries[starts + samples.split[parts.branched]] - parts.entries[starts]
    own = np.diff(parts.entries[parts.items.offsets])[parts.trunks :]
    return (before > 0) & (own > 0)


def _own_rows(parts: _Parts, samples: _Samples, separator: int) -> Int64:
    """``(n_branches,)`` rows of each branch's history, its leading separator included."""
    return _entry_rows(parts, separator)[parts.trunks :] + _leads(parts, samples) * separator


def _entry_rows(parts: _Parts, separator: int) -> Int64:
    """Rows of each part's entries and of the separators between them."""
    rows, entries = (np.diff(running[parts.items.offsets]) for running in (parts.rows, parts.entries))
    return rows + np.maximum(entries - 1, 0) * separator


def _rows_before(parts: _Parts, prompt: Prompt, samples: _Samples) -> Int64:
    """``(S,)`` rows of its trunk that each sample sees."""
    start = parts.items.offsets[samples.trunk]
    rows, entries = (running[start + samples.split] - running[start] for running in (parts.rows, parts.entries))
    return len(prompt.prefix) + rows + np.maximum(entries - 1, 0) * len(prompt.separator)
