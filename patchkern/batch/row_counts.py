# SPDX-License-Identifier: Apache-2.0
"""How many rows histories take, without building a layout."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from patchkern.batch.catalog import Catalog
from patchkern.batch.expert_layout import expert_row_counts
from patchkern.batch.experts import Experts
from patchkern.batch.histories import Histories, HistoriesLike
from patchkern.batch.policies import ItemPatches, SessionPatches, TextOnly
from patchkern.batch.policy_kinds import (
    AnyPolicy,
    Level,
    PlanningPolicy,
    check_policy,
    cut,
    cut_every_of,
    levels_of,
)
from patchkern.batch.prompt import Prompt


def row_counts(catalog: Catalog, histories: HistoriesLike, policy: AnyPolicy, prompt: Prompt) -> NDArray[np.int64]:
    """``(B,)`` rows of every user's prompt, without building the layout.

    Args:
        catalog, histories, policy, prompt: as in `patchkern.build_layout`.

    Examples:
        >>> import patchkern as pk
        >>> catalog = pk.Catalog.from_token_ids([5, 6, 7, 8, 9], [0, 2, 5])
        >>> prompt = pk.Prompt(prefix=[1], separator=[2], suffix=[3])
        >>> pk.row_counts(catalog, [[0, 1, 1], [0]], pk.TextOnly(), prompt).tolist()
        [12, 4]
        >>> pk.row_counts(catalog, [[0, 1, 1], [0]], pk.ItemPatches(keep_text=1), prompt).tolist()
        [9, 4]
    """
    check_policy(policy)
    kept = cut(Histories.coerce(histories), policy)
    if isinstance(policy, PlanningPolicy):
        return policy.count_rows(catalog, kept, prompt)
    if isinstance(policy, Experts):
        return expert_row_counts(catalog, kept, policy, prompt).whole
    titles = catalog.inputs.lengths[catalog.index_of(kept.items, "histories")]
    levels = levels_of(policy, kept, titles, prompt)
    entries = (levels != Level.JOIN) & (levels != Level.DROP)
    own = np.where(levels == Level.TEXT, titles, levels == Level.PATCH) + entries * len(prompt.separator)
    before = np.append(0, np.cumsum(own, dtype=np.int64))
    rows = before[kept.offsets[1:]] - before[kept.offsets[:-1]]
    # one separator between entries, none after the last
    return rows - (rows > 0) * len(prompt.separator) + len(prompt.prefix) + len(prompt.suffix)


def longest_history(
    catalog: Catalog, history: Sequence[Any] | NDArray[Any], policy: AnyPolicy, prompt: Prompt, max_rows: int
) -> int:
    """The most of a user's latest items that make a prompt of at most ``max_rows`` rows.

    More items may have fewer rows, as where a group becomes a session. So where nothing is known of a policy, such as
    one that draws at random, every count is looked at, which takes the square of the history's length.

    Args:
        catalog, policy, prompt: as in `patchkern.build_layout`.
        history: the user's item ids, oldest first.
        max_rows: for instance `patchkern.budget.search.SearchCost.max_rows`.
    """
    items = np.asarray(history)

    def rows(count: int) -> int:
        return int(row_counts(catalog, Histories(items[len(items) - count :], [0, count]), policy, prompt)[0])

    if items.size == 0 or rows(items.size) <= max_rows:
        return int(items.size)
    apart = _grows_every(policy)
    if apart is None:
        return next((count for count in range(items.size - 1, 0, -1) if rows(count) <= max_rows), 0)
    cut_at = items.size if policy.max_items is None else min(items.size, policy.max_items)  # more are as many rows
    found = 0
    for first in range(1, min(apart, cut_at) + 1):
        counts = range(first, cut_at, apart)
        fitting = bisect_right(counts, max_rows, key=rows)
        found = max(found, counts[fitting - 1] if fitting else 0)
    return found


def _grows_every(policy: AnyPolicy) -> int | None:
    """How many items more never have fewer rows, up to ``max_items``; None where nobody knows."""
    if type(policy) not in (TextOnly, ItemPatches, SessionPatches) or cut_every_of(policy) > 1:
        return None
    return policy.group_size if isinstance(policy, SessionPatches) and policy.align == "start" else 1
