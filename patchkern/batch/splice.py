# SPDX-License-Identifier: Apache-2.0
"""Planned rows in another order, with further tokens between them: how spans are made that are no prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from patchkern.batch.layout import PatchLayout
from patchkern.batch.planning import Int64


class Pieces(NamedTuple):
    """Runs of rows in the order in which they are to stand, one entry each."""

    source: Int64
    """the run's first row among the planned ones, or among the further tokens, which are numbered after them"""
    rows: Int64
    """how many, perhaps none"""
    position: Int64
    """of its first row; -1 where none of them has a position"""
    span: Int64
    """ascending: runs with the same number are a span"""

    @property
    def starts(self) -> Int64:
        """Where the runs begin among the spliced rows."""
        return np.cumsum(self.rows) - self.rows


def splice(
    layout: PatchLayout,
    tokens: Sequence[int],
    pieces: Pieces,
    prefix: Int64 | None = None,
    vector_rows: Int64 | None = None,
) -> PatchLayout:
    """A layout of runs of another's rows and of tokens.

    Args:
        layout: on the CPU, of which every user is a run, or several; what it says of items is not kept, and its
            transpose neither.
        tokens: ids, one further row each, which may stand in several places.
        pieces: what stands where.
        prefix: ``(n, R, 2)`` the rows that each of n spans, numbered from 0, sees besides itself; None where none sees
            any. Spans without rows are left out.
        vector_rows: as of `PatchLayout`.
    """
    total = int(pieces.rows.sum())
    if total > np.iinfo(np.int32).max:
        raise ValueError(f"histories: expected a batch of at most 2^31 - 1 rows, got {total}")
    place = np.arange(total) - np.repeat(pieces.starts, pieces.rows)
    index = torch.from_numpy(place + np.repeat(pieces.source, pieces.rows))
    position = np.repeat(pieces.position, pieces.rows)
    position = np.where(position < 0, position, position + place)
    further = torch.tensor(tokens, dtype=torch.int32)
    lo = torch.cat([layout.lo, -1 - further])[index]
    n_spans = int(pieces.span.max(initial=-1)) + 1 if prefix is None else len(prefix)
    sizes = np.zeros(n_spans, np.int64)
    np.add.at(sizes, pieces.span, pieces.rows)
    filled = sizes > 0
    literal = lo < 0
    values = {
        **layout.__dict__,
        "lo": lo,
        "hi": torch.cat([layout.hi, torch.zeros_like(further)])[index],
        "cu_seqlens": torch.from_numpy(np.append(0, np.cumsum(sizes[filled])).astype(np.int32)),
        "max_seqlen": int(sizes.max(initial=0)),
        "position_ids": torch.from_numpy(position),
        "max_position": int(position.max(initial=-1)),
        "max_token_id": max(
            (int(x.max()) for x in (-1 - lo[literal], layout.token_ids) if x.numel()),
            default=-1,
        ),
        "transpose": None,
        "item_rows": None,
        "item_labels": None,
        "vector_rows": None if vector_rows is None else torch.from_numpy(vector_rows),
    }
    if layout.labels is not None:
        labels = torch.cat([layout.labels, torch.full(further.shape, -100)])[index]
        supervised = torch.nonzero(labels >= 0)[:, 0]
        values |= {"labels": labels, "logit_rows": supervised - 1, "logit_labels": labels[supervised]}
    if prefix is not None:
        ranges = prefix[filled]
        ranges[ranges[:, :, 0] == ranges[:, :, 1]] = 0
        values["prefix"] = torch.from_numpy(ranges.astype(np.int32))
        values["max_prefix"] = int((ranges[:, :, 1] - ranges[:, :, 0]).sum(axis=1).max(initial=0))
    return PatchLayout._trusted(values)
