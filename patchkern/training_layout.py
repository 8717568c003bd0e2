# SPDX-License-Identifier: Apache-2.0
"""Many targets per history in one pass: the history is a trunk, computed once, and every target a branch of it.

A sample (history, target) as `patchkern.build_layout` packs it repeats the whole history for a single target. Here a
user's *trunk* is the prompt's prefix and the part of the history that many samples begin with, and a sample's *branch*
is the rest of it: the recent items that its policy treats apart, the suffix and the response. A branch is a span whose
prefix is its trunk up to its own point, with positions that go on from there, so that every row sees exactly the rows
that it sees in a sample of its own. Loss and gradients are those of the samples, packed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from patchkern.catalog import Catalog
from patchkern.histories import Histories, HistoriesLike, check_count
from patchkern.layout import PatchLayout, build_layout
from patchkern.policies import AnyPolicy, Level, Levels, TrunkPolicy, check_policy
from patchkern.prompt import Prompt

Int64 = NDArray[np.int64]


class _Samples(NamedTuple):
    """One entry per target, users in order: its history is the user's items from ``start`` to before ``position``."""

    user: Int64
    position: Int64
    start: Int64
    split: Int64  # items of the history that the trunk holds
    trunk: Int64


class _Fixed:
    """The levels of a policy, decided elsewhere."""

    max_items = None

    def __init__(self, levels: Levels) -> None:
        self._levels = levels

    def levels(self, histories: Histories) -> Levels:
        return self._levels


def build_training_layout(
    catalog: Catalog,
    histories: HistoriesLike,
    policy: AnyPolicy,
    prompt: Prompt,
    target_ranges: ArrayLike,
    max_rows: int | None = None,
    *,
    block_size: int = 50,
    transpose: bool = True,
) -> PatchLayout:
    """Plan a packed batch of trunks and branches: every target of ``target_ranges``, each history computed once.

    With ``policy.max_items`` None, or histories within it, the loss over the layout is exactly that of
    `build_layout` over one sample per target. Beyond it a sample's history cannot begin at its own ``max_items``-th
    latest item, or no two would share a trunk: it begins at the last multiple of ``block_size`` before that, and so
    holds up to ``block_size - 1`` items more.

    `RandomItemPatches` are drawn once per trunk: targets of one trunk see the same items as patches, where samples of
    their own would each have drawn anew.

    Args:
        catalog: the titles.
        histories: whole histories of B users, targets included.
        policy: a `TrunkPolicy`: `TextOnly`, `ItemPatches`, `SessionPatches` or `RandomItemPatches`.
        prompt: the fixed tokens.
        target_ranges: ``(B, 2)`` integers, the first and the last position in the user's history that is a target; a
            user whose last is less than the first has none.
        max_rows: refuse a batch of more rows; `training_rows` says what each user needs.
        block_size: items between the possible beginnings of histories that are cut.
        transpose: also plan the embeddings' gradient.

    Returns:
        A layout whose spans are the trunks and then the branches, with labels on the responses.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    if max_rows is not None:
        check_count("max_rows", max_rows, minimum=1)
    histories = Histories.coerce(histories)
    policy = _trunk_policy(policy)
    samples = _samples(histories, policy, target_ranges, block_size)
    trunks, branches = _trunks(histories, policy, samples), _branches(histories, policy, samples)
    if not prompt.suffix and samples.user.size and bool((branches.items.lengths == 0).any()):
        raise ValueError("prompt: expected a suffix, which a branch without text of its own begins with, got none")
    trunk_layout = build_layout(catalog, trunks.items, _Fixed(trunks.levels), replace(prompt, suffix=()))
    targets = histories.at(samples.user, samples.position)
    leads = _leads(samples, branches)
    parts, order = [trunk_layout], []
    for group, lead in ((leads, prompt.separator), (~leads, ())):
        chosen = np.flatnonzero(group)
        levels = branches.levels[np.repeat(group, branches.items.lengths)]
        parts.append(
            build_layout(
                catalog,
                branches.items.take(chosen),
                _Fixed(levels),
                replace(prompt, prefix=lead),
                targets[chosen],
                transpose=False,
            )
        )
        order.append(chosen)
    branch_of = np.concatenate(order)
    ends = _rows_before(catalog, trunks, prompt, samples)[branch_of]
    starts = trunk_layout.cu_seqlens.numpy().astype(np.int64)[samples.trunk[branch_of]]
    nothing = np.zeros((trunk_layout.num_users, 2), np.int64)
    prefix = np.concatenate([nothing, np.stack([starts, starts + ends], axis=1)])
    layout = _continued(join_layouts(parts), torch.from_numpy(prefix.astype(np.int32)))
    if max_rows is not None and layout.num_rows > max_rows:
        raise ValueError(f"max_rows: expected at least {layout.num_rows} for these users and targets, got {max_rows}")
    return layout.with_transpose() if transpose else layout


def training_rows(
    catalog: Catalog,
    histories: HistoriesLike,
    policy: AnyPolicy,
    prompt: Prompt,
    target_ranges: ArrayLike,
    *,
    block_size: int = 50,
) -> Int64:
    """``(B,)`` rows that each user takes in `build_training_layout` with these arguments."""
    histories = Histories.coerce(histories)
    policy = _trunk_policy(policy)
    samples = _samples(histories, policy, target_ranges, block_size)
    trunks, branches = _trunks(histories, policy, samples), _branches(histories, policy, samples)
    titles = catalog.lengths[catalog.index_of(histories.at(samples.user, samples.position), "histories")]
    of_trunks = len(prompt.prefix) + _entry_rows(catalog, trunks, len(prompt.separator))
    of_branches = _entry_rows(catalog, branches, len(prompt.separator)) + titles
    of_branches += len(prompt.suffix) + len(prompt.response_end) + _leads(samples, branches) * len(prompt.separator)
    owner = np.zeros(of_trunks.size, np.int64)
    owner[samples.trunk] = samples.user
    rows = np.zeros(len(histories), np.int64)
    np.add.at(rows, owner, of_trunks)
    np.add.at(rows, samples.user, of_branches)
    return rows


def join_layouts(layouts: Sequence[PatchLayout]) -> PatchLayout:
    """The spans of several layouts on the CPU, one after the other, as one layout without a transpose.

    Where the layouts are of several catalogues, ``title_index`` no longer says of which, and the fingerprint is None.

    Raises:
        ValueError: no layout.
    """
    if not layouts:
        raise ValueError("layouts: expected at least one, got none")
    rows, items, titles, tokens = (
        np.cumsum([0, *(getattr(layout, name).shape[0] for layout in layouts)]).tolist()
        for name in ("lo", "items", "title_index", "token_ids")
    )
    fingerprints = {layout.catalog_fingerprint for layout in layouts}
    lo = torch.cat([torch.where(x.lo < 0, x.lo, x.lo + at) for x, at in zip(layouts, items, strict=False)])
    hi = torch.cat([torch.where(x.lo < 0, 0, x.hi + at) for x, at in zip(layouts, items, strict=False)])
    offsets = [x.offsets[:-1] + at for x, at in zip(layouts, tokens, strict=False)]
    cu_seqlens = [x.cu_seqlens[:-1] + at for x, at in zip(layouts, rows, strict=False)]
    values: dict[str, Any] = {
        "lo": lo,
        "hi": hi,
        "items": torch.cat([x.items + at for x, at in zip(layouts, titles, strict=False)]),
        "token_ids": torch.cat([x.token_ids for x in layouts]),
        "offsets": torch.cat([*offsets, torch.tensor(tokens[-1:], dtype=torch.int32)]).int(),
        "title_index": torch.cat([x.title_index for x in layouts]),
        "cu_seqlens": torch.cat([*cu_seqlens, torch.tensor(rows[-1:], dtype=torch.int32)]).int(),
        "max_seqlen": max(x.max_seqlen for x in layouts),
        "position_ids": torch.cat([x.position_ids for x in layouts]),
        "labels": None,
        "logit_rows": None,
        "logit_labels": None,
        "history_tokens": sum(x.history_tokens for x in layouts),
        "history_rows": sum(x.history_rows for x in layouts),
        "max_token_id": max(x.max_token_id for x in layouts),
        "prefix": None,
        "max_prefix": 0,
        "transpose": None,
        "catalog_fingerprint": fingerprints.pop() if len(fingerprints) == 1 else None,
    }
    if any(x.labels is not None for x in layouts):
        labels = [x.labels if x.labels is not None else torch.full_like(x.position_ids, -100) for x in layouts]
        values["labels"] = torch.cat(labels)
        logits = [x.logit_rows + at for x, at in zip(layouts, rows, strict=False) if x.logit_rows is not None]
        values["logit_rows"] = torch.cat(logits)
        values["logit_labels"] = torch.cat([x.logit_labels for x in layouts if x.logit_labels is not None])
    if any(x.prefix is not None for x in layouts):
        own = [torch.zeros(x.num_users, 2, dtype=torch.int32) if x.prefix is None else x.prefix for x in layouts]
        values["prefix"] = torch.cat([x + at for x, at in zip(own, rows, strict=False)]).int()
        values["max_prefix"] = max(x.max_prefix for x in layouts)
    return PatchLayout._trusted(values)


def _continued(layout: PatchLayout, prefix: Tensor) -> PatchLayout:
    """The layout with these prefixes; the positions of a span go on from its prefix's."""
    hidden = (prefix[:, 1] - prefix[:, 0]).long()
    positions = layout.position_ids + torch.repeat_interleave(hidden, layout.cu_seqlens.diff().long())
    longest = int(hidden.max()) if len(hidden) else 0
    changed = {"prefix": prefix, "max_prefix": longest, "position_ids": positions}
    return PatchLayout._trusted({**layout.__dict__, **changed})


class _Cut(NamedTuple):
    """Parts of histories and their levels."""

    items: Histories
    levels: Levels


def _trunk_policy(policy: AnyPolicy) -> TrunkPolicy:
    check_policy(policy)
    if not isinstance(policy, TrunkPolicy):
        raise ValueError(
            f"policy: expected one whose prompts share their beginnings (a TrunkPolicy), got {type(policy).__name__}"
        )
    return policy


def _samples(histories: Histories, policy: TrunkPolicy, target_ranges: ArrayLike, block_size: int) -> _Samples:
    check_count("block_size", block_size, minimum=1)
    ranges = np.asarray(target_ranges)
    if ranges.shape != (len(histories), 2) or ranges.dtype.kind not in "iu":
        raise ValueError(
            f"target_ranges: expected integers of shape {(len(histories), 2)}, got {ranges.dtype} {ranges.shape}"
        )
    first, last = ranges.astype(np.int64).T
    count = np.maximum(last - first + 1, 0)
    wrong = np.flatnonzero((count > 0) & ((first < 0) | (last >= histories.lengths)))
    if wrong.size:
        at = int(wrong[0])
        raise ValueError(
            f"target_ranges[{at}]: expected positions in 0..{histories.lengths[at] - 1}, got {ranges[at].tolist()}"
        )
    user = np.repeat(np.arange(len(histories)), count)
    position = np.arange(user.size) - np.repeat(np.cumsum(count) - count - first, count)
    start = np.zeros_like(position)
    if policy.max_items is not None:
        start = np.maximum(position - policy.max_items, 0) // block_size * block_size
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


def _trunks(histories: Histories, policy: TrunkPolicy, samples: _Samples) -> _Cut:
    """The longest part of each trunk that a sample needs, in the order of the trunks' numbers."""
    order = np.lexsort((samples.split, samples.trunk))
    longest = order[np.flatnonzero(np.diff(samples.trunk[order], append=-1) != 0)]
    user, start, split = samples.user[longest], samples.start[longest], samples.split[longest]
    whole = histories.between(user, start, samples.position[longest])
    place = np.arange(whole.items.size) - np.repeat(whole.offsets[:-1], whole.lengths)
    levels = policy.levels(whole)[place < np.repeat(split, whole.lengths)]
    return _Cut(histories.between(user, start, start + split), levels)


def _branches(histories: Histories, policy: TrunkPolicy, samples: _Samples) -> _Cut:
    """What each sample has beyond its trunk."""
    items = histories.between(samples.user, samples.start + samples.split, samples.position)
    return _Cut(items, policy.levels(items))


def _leads(samples: _Samples, branches: _Cut) -> NDArray[np.bool_]:
    """``(S,)`` whether a separator leads the branch: where entries stand on both sides of the border."""
    return (samples.split > 0) & (branches.items.lengths > 0)


def _running(catalog: Catalog, part: _Cut) -> tuple[Int64, Int64]:
    """``(N + 1,)`` running counts over all items: rows of their entries, and entries."""
    titles = catalog.lengths[catalog.index_of(part.items.items, "histories")]
    rows = np.where(part.levels == Level.TEXT, titles, np.where(part.levels == Level.PATCH, 1, 0))
    entries = part.levels != Level.JOIN
    return np.append(0, np.cumsum(rows, dtype=np.int64)), np.append(0, np.cumsum(entries, dtype=np.int64))


def _entry_rows(catalog: Catalog, part: _Cut, separator: int) -> Int64:
    """Rows of each history's entries and of the separators between them."""
    rows, entries = (np.diff(running[part.items.offsets]) for running in _running(catalog, part))
    return rows + np.maximum(entries - 1, 0) * separator


def _rows_before(catalog: Catalog, trunks: _Cut, prompt: Prompt, samples: _Samples) -> Int64:
    """``(S,)`` rows of its trunk that each sample sees."""
    start = trunks.items.offsets[:-1][samples.trunk]
    rows, entries = (running[start + samples.split] - running[start] for running in _running(catalog, trunks))
    return len(prompt.prefix) + rows + np.maximum(entries - 1, 0) * len(prompt.separator)
