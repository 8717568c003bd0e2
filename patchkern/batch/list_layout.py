# SPDX-License-Identifier: Apache-2.0
"""Many targets per history without a branch: where a prompt is a list, the next item's text is the next target."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from patchkern.batch.catalog import Catalog
from patchkern.batch.histories import Histories
from patchkern.batch.layout import PatchLayout
from patchkern.batch.planned_layout import plan_layout
from patchkern.batch.planning import Int64
from patchkern.batch.policies import TextOnly
from patchkern.batch.policy_kinds import AnyPolicy, Level
from patchkern.batch.prompt import Prompt


class Lists(NamedTuple):
    """One entry per trunk: a user's items from ``start`` on, of which those from ``first`` to ``last`` are targets."""

    user: Int64
    start: Int64
    first: Int64
    last: Int64

    @classmethod
    def of(cls, user: Int64, start: Int64, position: Int64) -> Lists:
        """Of samples by user and position: those of one user and one start are in the same trunk."""
        new = np.ones(user.size, np.bool_)
        new[1:] = (np.diff(user) != 0) | (np.diff(start) != 0)
        begin = np.flatnonzero(new)
        end = np.append(begin[1:], user.size)[: begin.size] - 1
        return cls(user[begin], start[begin], position[begin], position[end])

    def rows(self, catalog: Catalog, histories: Histories, prompt: Prompt) -> Int64:
        """``(n,)`` rows of each trunk."""
        items = histories.between(self.user, self.start, self.last + 1)
        return len(prompt.prefix) + _entry_rows(catalog, items, prompt)


def is_list(catalog: Catalog, policy: AnyPolicy, prompt: Prompt) -> bool:
    """Whether the trunk alone, all text, holds every response with the rows before it that a sample would have.

    Not where items are read as other texts than their titles, which the responses are.
    """
    return isinstance(policy, TextOnly) and prompt.is_list and catalog.texts is None


def list_layout(catalog: Catalog, histories: Histories, prompt: Prompt, lists: Lists) -> PatchLayout:
    """The trunks with labels on all their targets' responses, without a transpose.

    Raises:
        ValueError: a target that is the first row of a prompt, which nothing predicts.
    """
    if not prompt.prefix and bool((lists.first == lists.start).any()):
        raise ValueError("prompt: expected a prefix, from which a target without a history is predicted, got none")
    # to the planner the last target is one more item, and its response_end the suffix
    items = histories.between(lists.user, lists.start, lists.last + 1)
    levels = np.full(items.items.size, Level.TEXT, np.uint8)
    layout = plan_layout(catalog, items, catalog.index_of(items.items, "histories"), levels, prompt, None)
    untaught = _entry_rows(catalog, histories.between(lists.user, lists.start, lists.first), prompt)
    cu_seqlens = layout.cu_seqlens.numpy().astype(np.int64)
    begin = cu_seqlens[:-1] + len(prompt.prefix) + untaught
    taught = torch.from_numpy(np.arange(cu_seqlens[-1]) >= np.repeat(begin, np.diff(cu_seqlens)))
    return layout._labelled(taught)


def _entry_rows(catalog: Catalog, items: Histories, prompt: Prompt) -> Int64:
    """``(n,)`` rows of each history's titles, a separator after every one."""
    rows = catalog.lengths[catalog.index_of(items.items, "histories")].astype(np.int64) + len(prompt.separator)
    return np.diff(np.append(0, np.cumsum(rows))[items.offsets])
