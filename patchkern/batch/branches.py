# SPDX-License-Identifier: Apache-2.0
"""What targets read beside their trunks: branches of their own, and of several together."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from patchkern.batch.arrangement import running, spread
from patchkern.batch.catalog import Catalog
from patchkern.batch.histories import Histories
from patchkern.batch.planning import Head, Int64
from patchkern.batch.policy_kinds import Level, Levels
from patchkern.batch.prompt import Prompt
from patchkern.batch.runs import Runs


class Branches(NamedTuple):
    """The items that samples read behind trunks, as the branches that hold them.

    Items that several samples read alike behind the same trunk stand once, in a branch without a title. What is left of
    a sample, and its title, is a branch of its own, which sees the trunk and the beginning of the shared one. An item
    is predicted from the row of the item before it, so that a sample of which nothing is left needs none.

    Attributes:
        sample: ``(n,)`` whose items each of n branches holds: first those that are shared, then those that are not,
            each ascending.
        runs: the items of the n branches.
        heads: ``(n,)`` the `Head` of each: a separator where entries stand before it.
        titles: ``(n,)`` whether a title follows.
        behind: ``(n,)`` the branch whose beginning each one goes on from; -1: it goes on from its trunk.
        ahead: ``(n,)`` how many rows of that branch it sees.
        rows: ``(n,)`` of each branch, without a title and what surrounds it.
        of: ``(S,)`` the branch that each sample reads last; -1: its trunk holds all that it reads.
        read: ``(S,)`` how many rows of that branch it reads, a title apart.
    """

    sample: Int64
    runs: Runs
    heads: NDArray[np.uint8]
    titles: NDArray[np.bool_]
    behind: Int64
    ahead: Int64
    rows: Int64
    of: Int64
    read: Int64

    @classmethod
    def of_samples(
        cls,
        catalog: Catalog,
        prompt: Prompt,
        items: Histories,
        levels: Levels,
        trunks: tuple[Int64, ...],
        before: Int64,
        head: str,
    ) -> Branches:
        """Of S samples.

        Args:
            catalog: that has the items.
            prompt: whose separators stand between them.
            items, levels: of each sample what stands behind its trunk.
            trunks: ``(S,)`` each; samples alike in all of them read the same before their own items.
            before: ``(S,)`` rows of its trunk's entries that each sample reads.
            head: as of `patchkern.build_training_layout`; a title follows its history, in a branch of its own.

        Raises:
            ValueError: a title without a row before it in its branch.
        """
        titled = head != "items"
        longest, shared = _shared(items, levels, numbered(*trunks), not titled or bool(prompt.suffix))
        upto = np.zeros_like(shared)
        np.maximum.at(upto, longest, shared)
        common = np.flatnonzero(upto)
        alone = np.flatnonzero((shared < items.lengths) | titled)
        sample = np.append(common, alone)
        start, end = np.zeros_like(sample), items.lengths[sample]
        start[common.size :], end[: common.size] = shared[alone], upto[common]
        index = spread(items.offsets[sample] + start, end - start)
        runs = Runs.of(catalog, items.between(sample, start, end), levels[index])

        behind = np.full(sample.size, -1)
        reads = shared[alone] > 0
        behind[common.size :][reads] = np.searchsorted(common, longest[alone[reads]])
        entries = np.diff(runs.entries[runs.items.offsets])
        led = (entries > 0) & ((before[sample] > 0) | (behind >= 0))
        separator = len(prompt.separator)

        def beginning(branch: Int64, count: Int64) -> Int64:
            """Rows of the first items of branches, the separators before them included."""
            return runs.before(branch, count, separator) + led[branch] * separator

        ahead, rows = np.zeros_like(behind), beginning(np.arange(sample.size), end - start)
        chained = np.flatnonzero(behind >= 0)
        ahead[chained] = beginning(behind[chained], start[chained])
        if titled and not prompt.suffix and bool((rows[common.size :] == 0).any()):
            raise ValueError("prompt: expected a suffix, which a branch without text of its own begins with, got none")
        of, read = np.full(len(items), -1), np.zeros_like(shared)
        whole = np.flatnonzero(shared)
        of[whole] = np.searchsorted(common, longest[whole])
        read[whole] = beginning(of[whole], shared[whole])
        of[alone], read[alone] = common.size + np.arange(alone.size), rows[common.size :]
        heads = np.where(led, Head.SEPARATOR, Head.NOTHING).astype(np.uint8)
        titles = titled & (np.arange(sample.size) >= common.size)
        return cls(sample, runs, heads, titles, behind, ahead, rows, of, read)

    def last_rows(self, begin: Int64, otherwise: Int64) -> Int64:
        """``(S,)`` the last row of each sample's history.

        Args:
            begin: ``(n,)`` the first row of each branch.
            otherwise: ``(S,)`` that of a sample that has no rows in branches.
        """
        rows = otherwise.copy()
        branched = np.flatnonzero(self.of >= 0)
        follows = branched[self.behind[self.of[branched]] >= 0]
        rows[follows] = begin[self.behind[self.of[follows]]] + self.ahead[self.of[follows]] - 1
        inside = np.flatnonzero(self.read)
        rows[inside] = begin[self.of[inside]] + self.read[inside] - 1
        return rows


def numbered(*columns: Int64) -> Int64:
    """``(S,)`` the rank of each sample's columns among the distinct ones, the first column counting most."""
    order = np.lexsort(columns[::-1])
    new = np.zeros(order.size, np.bool_)
    for column in columns:
        new[1:] |= np.diff(column[order]) != 0
    rank = np.empty(order.size, np.int64)
    rank[order] = np.cumsum(new)
    return rank


def _shared(items: Histories, levels: Levels, trunk: Int64, whole: bool) -> tuple[Int64, Int64]:
    """Which sample holds the most items behind the same trunk, and how many of a sample's first ones are its first too.

    Args:
        items, levels: of S samples.
        trunk: ``(S,)`` which are alike.
        whole: whether all items of a sample may be shared; else one that has rows is left.

    Returns:
        ``(S,)`` and ``(S,)``; 0 where no other sample shares anything.
    """
    lengths, begins, ends = items.lengths, items.offsets[:-1], items.offsets[1:]
    order = np.lexsort((lengths, trunk))
    last = np.flatnonzero(np.diff(trunk[order], append=-1) != 0)
    longest = np.empty_like(order)
    longest[order] = np.repeat(order[last], np.diff(last, prepend=-1))
    every = np.arange(levels.size)
    there = every + np.repeat(begins[longest] - begins, lengths)
    unlike = running(levels != levels[there])
    alike = unlike[1:] == np.repeat(unlike[begins], lengths)
    # a patch that goes on behind the shared items is another one
    starts = np.append((levels == Level.PATCH) | (levels == Level.TEXT), True)
    at_end = np.zeros(levels.size, np.bool_)
    at_end[ends[lengths > 0] - 1] = True
    of_itself = np.where(at_end, whole, starts[every + 1])
    of_longest = at_end[there] | starts[there + 1]
    until = np.maximum.accumulate(np.where(alike & of_itself & of_longest, every + 1, 0))
    count = np.maximum(np.append(until, 0)[ends - 1] - begins, 0)
    entries = running((levels == Level.PATCH) | (levels == Level.TEXT))
    count[entries[begins + count] == entries[begins]] = 0
    with_others = np.zeros(order.size, np.bool_)
    with_others[longest[(count > 0) & (longest != np.arange(order.size))]] = True
    return longest, np.where(with_others[longest], count, 0)
