# SPDX-License-Identifier: Apache-2.0
"""What the passes of a recurrent memory are made of: the prompt, memory rows, runs of items, query rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from patchkern.batch.arrangement import Pieces, arranged
from patchkern.batch.catalog import Catalog
from patchkern.batch.layout import PatchLayout
from patchkern.batch.planned_layout import check_inputs, plan_layout, unlabelled
from patchkern.batch.planning import Head, Int32, Int64, Spans
from patchkern.batch.preference_memory import PreferenceMemory
from patchkern.batch.prompt import Prompt
from patchkern.batch.runs import Runs


@dataclass(frozen=True)
class MemoryPieces:
    """The pieces of a recurrent memory's passes: integers only, on the CPU.

    Args:
        catalog: the titles.
        policy: how histories are read.
        prompt: the fixed tokens, with ``experts`` for the query rows.
        placed: whether memory and query rows have positions, which go on before and behind the items; else their
            ``position_ids`` are -1. The same query then means the same in both stages to a model with a table of
            positions.

    Raises:
        TypeError, ValueError: naming the argument; among them a prompt with too few experts.
    """

    catalog: Catalog
    policy: PreferenceMemory
    prompt: Prompt
    placed: bool = True

    def __post_init__(self) -> None:
        check_inputs(self.catalog, self.policy, self.prompt)
        if not isinstance(self.policy, PreferenceMemory):
            raise TypeError(f"policy: expected a PreferenceMemory, got {type(self.policy).__name__}")
        self.policy.check_prompt(self.prompt)

    @property
    def tokens(self) -> tuple[int, ...]:
        """What is spliced in between items: the prompt's prefix, then a token for each slot."""
        return (*self.prompt.prefix, *self.prompt.experts[: self.policy.slots])

    def prefix(self, spans: Int64, planned: int) -> Rows:
        """The prompt's beginning in each of some spans."""
        zeros = np.zeros_like(spans)
        return Rows(zeros + planned, zeros + len(self.prompt.prefix), zeros, spans)

    def query(self, spans: Int64, position: Int64, planned: int) -> Rows:
        """A row for each slot, in each of some spans."""
        position = position if self.placed else np.full_like(position, -1)
        begin = np.full_like(spans, planned + len(self.prompt.prefix))
        return Rows(begin, np.full_like(spans, self.policy.slots), position, spans)

    def memory(self, spans: Int64, groups: Int64, position: Int64 | int) -> Rows:
        """So many groups of rows for vectors in each of some spans; ``begin`` is relative to the planned rows."""
        owner, nth = each_of(groups)
        at = np.broadcast_to(position, spans.shape)[owner] + self.policy.slots * nth
        return self.query(spans[owner], at, 0)

    def planned(self, runs: Runs, heads: NDArray[np.uint8] | None = None, titles: Int32 | None = None) -> PatchLayout:
        """Rows of runs of items alone, or with what follows them where there are ``titles``."""
        count = len(runs.items)
        layout = plan_layout(
            self.catalog,
            *runs[:3],
            self.prompt,
            np.full(count, -1, np.int32) if titles is None else titles,
            Spans(
                np.full(count, Head.NOTHING, np.uint8) if heads is None else heads,
                np.zeros(count, np.int64),
            ),
        )
        return unlabelled(layout) if titles is None else layout


class Rows(NamedTuple):
    """Runs of rows of one kind, as `patchkern.batch.arrangement.Pieces`, and the span that each is in."""

    begin: Int64
    rows: Int64
    position: Int64
    span: Int64


class Spliced:
    """Kinds of pieces, in the order of their spans, and within a span in the order of the kinds."""

    def __init__(self, *kinds: Rows) -> None:
        kind = np.repeat(np.arange(len(kinds)), [part.span.size for part in kinds])
        every = Rows(*(np.concatenate(column) for column in zip(*kinds, strict=True)))
        order = np.lexsort((np.arange(kind.size), kind, every.span))
        self.span = every.span[order]
        filled = np.flatnonzero(every.rows[order])  # spans without rows are left out
        opens = np.zeros(kind.size, np.bool_)
        opens[filled[np.diff(self.span[filled], prepend=-1) != 0]] = True
        self.pieces = Pieces(every.begin[order], every.rows[order], every.position[order], opens)
        place = np.empty_like(order)
        place[order] = self.pieces.at
        self.starts = [place[kind == k] for k in range(len(kinds))]
        """per kind, where each of its pieces begins"""

    def rows_of(self, kind: int, count: int) -> Int64:
        """``(n, count)`` the rows of each piece of a kind."""
        return self.starts[kind][:, None] + np.arange(count)

    def layout(
        self, planned: PatchLayout, planner: MemoryPieces, prefix: Int64 | None, vectors: int | None = None
    ) -> PatchLayout:
        """What is planned, in this order.

        Args:
            planned: whose rows the pieces are.
            planner: of the tokens after them.
            prefix: ``(n, R, 2)`` the rows that each of n spans sees besides itself; None where none sees any.
            vectors: the kind whose rows are vectors.
        """
        rows = None if vectors is None else np.sort(self.rows_of(vectors, planner.policy.slots).flatten())
        seen = np.zeros((self.span.size, 0, 2), np.int64) if prefix is None else prefix[self.span]
        layout = arranged(planned, planner.tokens, self.pieces, seen.transpose(1, 2, 0), None, rows)
        if rows is None:
            return layout
        return PatchLayout._trusted({**layout.__dict__, "history_rows": planned.history_rows + rows.size})


def starts_of(counts: Int64) -> Int64:
    """``(n,)`` the sum of the counts before each."""
    return np.cumsum(counts) - counts


def each_of(counts: Int64) -> tuple[Int64, Int64]:
    """Whose each of ``counts[i]`` things of every i is, and which of i's."""
    owner = np.repeat(np.arange(counts.size), counts)
    return owner, np.arange(owner.size) - starts_of(counts)[owner]
