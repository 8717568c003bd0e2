# SPDX-License-Identifier: Apache-2.0
"""What targets read beside their trunks: a branch for each of them, or one for several."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from patchkern.batch.arrangement import running
from patchkern.batch.catalog import Catalog
from patchkern.batch.histories import Histories
from patchkern.batch.planning import Int64
from patchkern.batch.policy_kinds import Level, Levels
from patchkern.batch.runs import Runs


class Branches(NamedTuple):
    """The items that samples read behind trunks, as the branches that hold them.

    An item is predicted from the row of the item before it, so a branch serves all targets whose own items it begins
    with, in the form that they have there. A title follows its history, and needs a branch to itself.

    Attributes:
        sample: ``(n,)`` ascending, the sample whose own items each branch holds, all of them.
        runs: the items of the n branches.
        of: ``(S,)`` the branch that each sample reads; -1: its trunk holds all that it reads.
        own: ``(S,)`` how many items of its branch each sample reads.
    """

    sample: Int64
    runs: Runs
    of: Int64
    own: Int64

    @classmethod
    def behind(cls, catalog: Catalog, items: Histories, levels: Levels, *trunks: Int64, head: str) -> Branches:
        """Of S samples.

        Args:
            catalog: that has the items.
            items, levels: of each sample what stands behind its trunk.
            trunks: ``(S,)`` each; samples alike in all of them read the same before their own items.
            head: as of `patchkern.build_training_layout`; branches are shared, and can be none, for "items".
        """
        every = np.arange(len(items))
        if head != "items":
            return cls(every, Runs.of(catalog, items, levels), every, items.lengths)
        reads = np.where(items.lengths > 0, _readable(items, levels, numbered(*trunks)), -1)
        sample = np.unique(reads[reads >= 0])
        held = np.repeat(np.isin(every, sample), items.lengths)
        runs = Runs.of(catalog, items.take(sample), levels[held])
        return cls(sample, runs, np.where(reads >= 0, np.searchsorted(sample, reads), -1), items.lengths)

    def leads(self, before: Int64) -> NDArray[np.bool_]:
        """``(n,)`` whether a separator leads each branch: where entries stand on both sides of the border.

        Args:
            before: ``(S,)`` rows of its trunk's entries that each sample reads.
        """
        return (before[self.sample] > 0) & (np.diff(self.runs.entries[self.runs.items.offsets]) > 0)

    def rows(self, leads: NDArray[np.bool_], separator: int) -> Int64:
        """``(S,)`` rows of its branch that each sample reads, a leading separator included."""
        rows = np.zeros_like(self.of)
        reading = np.flatnonzero(self.of >= 0)
        of, own = self.of[reading], self.own[reading]
        led = leads[of] & (self.runs.counted(self.runs.entries, of, own) > 0)
        rows[reading] = self.runs.before(of, own, separator) + led * separator
        return rows


def _readable(items: Histories, levels: Levels, trunk: Int64) -> Int64:
    """``(S,)`` the sample with most items behind the same trunk where those begin with a sample's own; else itself."""
    lengths, begins = items.lengths, items.offsets[:-1]
    order = np.lexsort((lengths, trunk))
    last = np.flatnonzero(np.diff(trunk[order], append=-1) != 0)
    longest = np.empty_like(order)
    longest[order] = np.repeat(order[last], np.diff(last, prepend=-1))
    there = np.arange(levels.size) + np.repeat(begins[longest] - begins, lengths)
    unlike = running(levels != levels[there])
    # a patch that goes on behind a sample's items is another one
    following = np.append(levels, np.uint8(Level.PATCH))[begins[longest] + lengths]
    ends = (lengths == lengths[longest]) | (following == Level.PATCH) | (following == Level.TEXT)
    same = ends & (unlike[items.offsets[1:]] == unlike[begins])
    return np.where(same, longest, np.arange(order.size))


def numbered(*columns: Int64) -> Int64:
    """``(S,)`` the rank of each sample's columns among the distinct ones, the first column counting most."""
    order = np.lexsort(columns[::-1])
    new = np.zeros(order.size, np.bool_)
    for column in columns:
        new[1:] |= np.diff(column[order]) != 0
    rank = np.empty(order.size, np.int64)
    rank[order] = np.cumsum(new)
    return rank
