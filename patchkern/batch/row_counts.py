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
from patchkern.batch.policy_kinds import AnyPolicy, Level, PlanningPolicy, check_policy, cut, levels_of
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
    """How many of a user's latest items make a prompt of at most ``max_rows`` rows.

    Args:
        catalog, policy, prompt: as in `patchkern.build_layout`.
        history: the user's item ids, oldest first.
        max_rows: for instance `patchkern.budget.search.SearchCost.max_rows`.
    """
    items = np.asarray(history)

    def rows(count: int) -> int:
        return int(row_counts(catalog, Histories(items[len(items) - count :], [0, count]), policy, prompt)[0])

    return bisect_right(range(1, len(items) + 1), max_rows, key=rows)
