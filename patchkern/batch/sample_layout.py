# SPDX-License-Identifier: Apache-2.0
"""One packed sample per user: a history, and the item that came next where it is known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from patchkern.batch.catalog import Catalog
from patchkern.batch.columns import is_sequence
from patchkern.batch.expert_layout import expert_layout, without_old
from patchkern.batch.experts import Experts
from patchkern.batch.histories import Histories, HistoriesLike
from patchkern.batch.layout import PatchLayout
from patchkern.batch.planned_layout import check_head, check_inputs, plan_layout, unlabelled, with_items
from patchkern.batch.planning import Head, Int32, Spans
from patchkern.batch.policy_kinds import AnyPolicy, PlanningPolicy, cut, levels_of
from patchkern.batch.prompt import Prompt


def build_layout(
    catalog: Catalog,
    histories: HistoriesLike,
    policy: AnyPolicy,
    prompt: Prompt,
    targets: Sequence[Any] | NDArray[Any] | None = None,
    *,
    transpose: bool | None = None,
    head: str = "titles",
) -> PatchLayout:
    """Plan a packed batch: integers only, on the CPU, safe in data-loader workers.

    Each user becomes ``prefix | history rows | suffix``, with targets ``| target title | response_end``; one separator
    stands between two history entries. For an item head a user is ``prefix | history rows`` and nothing after.

    Args:
        catalog: the titles, and perhaps texts, which the history's items are read as.
        histories: `Histories` or one sequence of item ids per user, oldest first; B users.
        policy: decides which items become what.
        prompt: the fixed tokens.
        targets: B item ids, the next item of each user; adds the response and its labels.
        transpose: also plan the gradient (None: when there are targets).
        head: "titles"; "items", for a model's item head: `PatchLayout.item_rows` has the last row of every history, and
            ``item_labels`` the targets; "both", the rows of titles with the labels of both.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Examples:
        >>> import patchkern as pk
        >>> catalog = pk.Catalog.from_token_ids([5, 6, 7, 8, 9], [0, 2, 5])
        >>> prompt = pk.Prompt(prefix=[1], separator=[2], suffix=[3], response_end=[4])
        >>> policy = pk.ItemPatches(keep_text=1)
        >>> layout = pk.build_layout(catalog, [[0, 1, 1], [0]], policy, prompt, targets=[0, 1])
        >>> layout
        PatchLayout(2 users, 20 rows, longest 12, 2 items in patches, compression 1.43, 7 labels, on cpu)
        >>> layout.cu_seqlens.tolist()
        [0, 12, 20]
    """
    check_inputs(catalog, policy, prompt)
    if not (transpose is None or isinstance(transpose, bool)):
        raise TypeError(f"transpose: expected a bool or None, got {type(transpose).__name__}")
    check_head(head)
    kept = cut(Histories.coerce(histories), policy)
    target_index = None if targets is None else _target_index(catalog, targets, len(kept))
    wanted = targets is not None if transpose is None else transpose
    if isinstance(policy, Experts) and (uncompressed := without_old(kept, policy)) is not None:
        kept, policy = uncompressed, policy.recents
    if isinstance(policy, Experts):
        layout = expert_layout(catalog, kept, policy, prompt, target_index, head)
    elif isinstance(policy, PlanningPolicy):
        layout = policy.plan(catalog, kept, prompt, target_index, head)
    else:
        layout = _user_layout(catalog, kept, policy, prompt, target_index, head)
    if head != "titles":
        after = np.zeros(len(kept), np.int64)
        if head == "both":
            after += len(prompt.suffix)
            if target_index is not None:
                after += catalog.lengths[target_index] + len(prompt.response_end)
        cu_users = layout.prompts.numpy().astype(np.int64)
        layout = with_items(layout, cu_users[1:] - 1 - after, cu_users[:-1], target_index)
    return layout.with_transpose() if wanted else layout


def _user_layout(
    catalog: Catalog, kept: Histories, policy: AnyPolicy, prompt: Prompt, targets: Int32 | None, head: str
) -> PatchLayout:
    """A span per user."""
    index = catalog.index_of(kept.items, "histories")
    levels = levels_of(policy, kept, catalog.inputs.lengths[index], prompt)
    if head != "items":
        return plan_layout(catalog, kept, index, levels, prompt, targets)
    open_ended = np.full(len(kept), -1, np.int32)
    spans = Spans(np.full(len(kept), Head.PREFIX, np.uint8), np.zeros(len(kept), np.int64))
    return unlabelled(plan_layout(catalog, kept, index, levels, prompt, open_ended, spans))


def _target_index(catalog: Catalog, targets: Sequence[Any] | NDArray[Any], n_users: int) -> NDArray[np.int32]:
    if not is_sequence(targets):
        raise TypeError(f"targets: expected one item id per user, got {type(targets).__name__}")
    if len(targets) != n_users:
        raise ValueError(f"targets: expected one item id per user ({n_users}), got {len(targets)}")
    index = catalog.index_of(targets, "targets")
    if index.ndim != 1:
        raise ValueError(f"targets: expected one item id per user ({n_users}), got shape {index.shape}")
    return index
