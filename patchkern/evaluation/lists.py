# SPDX-License-Identifier: Apache-2.0
"""Recommendation lists as catalogue positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from patchkern.batch.catalog import Catalog
from patchkern.batch.columns import is_sequence
from patchkern.batch.histories import Histories

Int64 = NDArray[np.int64]


def listed_items(
    recommendations: Sequence[Sequence[Any]], catalog: Catalog, k: int | None = None
) -> tuple[Int64, Int64]:
    """The first ``k`` items (None: all) of each list, one list after the other.

    Args:
        recommendations: as in `patchkern.evaluation.evaluate`.

    Returns:
        ``(N,)`` int64 catalogue positions, ``(B + 1,)`` int64 where each list begins among them.

    Raises:
        TypeError, ValueError: what is no item of the catalogue; the message names the list.
    """
    check_catalog(catalog)
    rows = [items_of(row, user)[:k] for user, row in enumerate(recommendations)]
    offsets = np.cumsum([0, *map(len, rows)])
    ids = [item for row in rows for item in row]
    if len({type(item) for item in ids}) == 1:
        index = catalog.find(ids, "recommendations")
        if index.min() >= 0:
            return index.astype(np.int64), offsets
    parts = [catalog.index_of(row, f"recommendations[{user}]") for user, row in enumerate(rows)]
    return np.concatenate([np.zeros(0, np.int64), *parts]), offsets


def check_catalog(catalog: Any) -> None:
    """Raise a TypeError unless it is a catalogue."""
    if not isinstance(catalog, Catalog):
        raise TypeError(f"catalog: expected a Catalog, got {type(catalog).__name__}")


def are_lists(targets: Any) -> bool:
    """Whether these are several targets for each sample, and not one."""
    if isinstance(targets, Histories) or getattr(targets, "ndim", 1) > 1:
        return True
    return is_sequence(targets) and len(targets) > 0 and is_sequence(next(iter(targets)))


def items_of(row: Any, user: int) -> list[Any]:
    """The items of one list, without their scores."""
    if not is_sequence(row):
        raise TypeError(f"recommendations[{user}]: expected a list of items, got {type(row).__name__}")
    return [entry[0] if isinstance(entry, tuple) else entry for entry in row]
