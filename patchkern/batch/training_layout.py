# SPDX-License-Identifier: Apache-2.0
"""Many targets per history in one pass: the history is a trunk, computed once, and every target a branch of it.

A sample (history, target) as `patchkern.build_layout` packs it repeats the whole history for a single target. Here a
user's *trunk* is the prompt's prefix and the part of the history that many samples begin with, and a sample's *branch*
is the rest of it: the recent items that its policy treats apart, the suffix and the response. A branch is a span whose
prefix is its trunk up to its own point, with positions that go on from there, so that every row sees exactly the rows
that it sees in a sample of its own. Recent items that several targets read alike behind the same point stand once, in a
branch that these see besides. Loss and gradients are those of the samples, packed.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike

from patchkern.batch.arguments import check_count
from patchkern.batch.branches import Branches, numbered
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
from patchkern.batch.planning import Head, Int64, Spans
from patchkern.batch.policy_kinds import AnyPolicy, TrunkPolicy, cut_every_of
from patchkern.batch.prompt import Prompt
from patchkern.batch.runs import Runs

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
            `RandomItemPatches`, ``ItemPatches(keep_text=0)``) or a branch that targets share
            (``SessionPatches(align="start", keep_text=0)``), and else a branch of recent items alone, without suffix or
            response; "both", the rows of titles with the labels of both.

    Returns:
        A layout whose spans are the trunks, the branches that targets share and those of one target each, with labels
        on the responses, or ``item_labels``, in the order of the targets, or both. Without branches it has no prefixes,
        and with shared ones two ranges of each span.

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
    trunks, before, branches = _parts(catalog, histories, policy, samples, head, prompt)
    listed = head != "items" and is_list(catalog, policy, prompt)
    targets = catalog.index_of(histories.at(samples.user, samples.position), "histories")
    n_trunks, hidden = len(trunks.items), len(prompt.prefix) + before
    branched = branches.sample
    seen = hidden[branched] + branches.ahead
    if listed:
        layout = list_layout(catalog, histories, prompt, Lists.of(samples.user, samples.start, samples.position))
    else:
        runs = trunks.then(branches.runs)
        titles = np.where(branches.titles, targets[branched], np.int32(-1))
        layout = plan_layout(
            catalog,
            *runs[:3],
            prompt,
            np.append(np.full(n_trunks, -1, np.int32), titles),
            Spans(
                np.append(np.full(n_trunks, Head.PREFIX, np.uint8), branches.heads),
                np.append(np.zeros(n_trunks, np.int64), seen),
            ),
        )
    _check_rows(layout, max_rows)
    cu_seqlens = layout.cu_seqlens.numpy().astype(np.int64)
    starts, begin = cu_seqlens[samples.trunk], cu_seqlens[n_trunks:-1]
    if not listed and (head != "items" or branched.size):
        prefix = np.zeros((n_trunks + branched.size, 2, 2), np.int32)
        prefix[n_trunks:, 0] = starts[branched, None]
        prefix[n_trunks:, 0, 1] += hidden[branched]
        chained = np.flatnonzero(branches.behind >= 0)
        prefix[n_trunks + chained, 1] = begin[branches.behind[chained], None]
        prefix[n_trunks + chained, 1, 1] += branches.ahead[chained]
        ranges = prefix if chained.size else prefix[:, 0].copy()
        changed = {"prefix": torch.from_numpy(ranges), "max_prefix": int(seen.max(initial=0))}
        layout = PatchLayout._trusted({**layout.__dict__, **changed})
    if head == "items":
        layout = unlabelled(layout)
    if head != "titles":
        layout = with_items(layout, branches.last_rows(begin, starts + hidden - 1), starts, targets)
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
    trunks, _, branches = _parts(catalog, histories, policy, samples, head, prompt)
    of_trunks = len(prompt.prefix) + trunks.whole(len(prompt.separator))
    owner = np.zeros(of_trunks.size, np.int64)
    owner[samples.trunk] = samples.user
    np.add.at(rows, owner, of_trunks)
    np.add.at(rows, samples.user[branches.sample], branches.rows)
    if head != "items":
        titles = catalog.lengths[catalog.index_of(histories.at(samples.user, samples.position), "histories")]
        np.add.at(rows, samples.user, titles + len(prompt.suffix) + len(prompt.response_end))
    return rows


def _check_rows(layout: PatchLayout, max_rows: int | None) -> None:
    if max_rows is not None and layout.num_rows > max_rows:
        raise ValueError(f"max_rows: expected at least {layout.num_rows} for these users and targets, got {max_rows}")


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
    return _Samples(user, position, start, split, numbered(user, start, key))


def _parts(
    catalog: Catalog, histories: Histories, policy: TrunkPolicy, samples: _Samples, head: str, prompt: Prompt
) -> tuple[Runs, Int64, Branches]:
    """The trunks of a batch, how many rows of its trunk's entries each sample reads, and what follows those."""
    order = np.lexsort((samples.split, samples.trunk))
    longest = order[np.flatnonzero(np.diff(samples.trunk[order], append=-1) != 0)]
    user, start, split = samples.user[longest], samples.start[longest], samples.split[longest]
    # levels of a trunk are those it has in the longest of its samples
    whole = histories.between(user, start, samples.position[longest])
    place = np.arange(whole.items.size) - np.repeat(whole.offsets[:-1], whole.lengths)
    of_trunks = policy.levels(whole)[place < np.repeat(split, whole.lengths)]
    trunks = Runs.of(catalog, histories.between(user, start, start + split), of_trunks)
    before = trunks.before(samples.trunk, samples.split, len(prompt.separator))
    own = histories.between(samples.user, samples.start + samples.split, samples.position)
    behind = samples.trunk, samples.split
    return trunks, before, Branches.of_samples(catalog, prompt, own, policy.levels(own), behind, before, head)
