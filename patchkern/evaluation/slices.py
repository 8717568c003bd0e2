# SPDX-License-Identifier: Apache-2.0
"""Samples by what they are like: long histories or short ones, items seen often in training, rarely or never."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from patchkern.batch.catalog import Catalog
from patchkern.batch.columns import flat_array
from patchkern.data.interactions import Interactions
from patchkern.evaluation.lists import check_catalog
from patchkern.evaluation.yardsticks import in_training

HISTORY_LENGTHS = (0, 20, 50, 100, 200, 500)
"""Where slices by the length of the history begin."""

TRAINING_COUNTS = (0, 1, 5, 20)
"""Where slices by an item's training interactions begin: cold items, two kinds of rare ones, all others."""


def slices(values: ArrayLike, begins: Sequence[int]) -> dict[str, NDArray[np.bool_]]:
    """The samples whose value is in each range, such as ``"5-19"``; the last is open, ``"20+"``.

    Args:
        values: ``(B,)`` integers of at least ``begins[0]``.
        begins: where the ranges begin, ascending.

    Returns:
        Per range ``(B,)`` bool. Every sample is in one of them; ranges without samples are there too.

    Examples:
        >>> from patchkern.evaluation import TRAINING_COUNTS, slices
        >>> {name: chosen.tolist() for name, chosen in slices([0, 7, 300], TRAINING_COUNTS).items()}["5-19"]
        [False, True, False]
    """
    array, borders = flat_array("values", values), list(begins)
    if array.size and array.dtype.kind not in "iu":
        raise TypeError(f"values: expected integers, got dtype {array.dtype}")
    if not borders or borders != sorted(set(borders)):
        raise ValueError(f"begins: expected ascending numbers, at least one, got {borders}")
    if array.size and array.min() < borders[0]:
        raise ValueError(f"values: expected at least {borders[0]}, the first of begins, got {array.min()}")
    place = np.searchsorted(borders, array, side="right") - 1
    ends = [end - 1 for end in borders[1:]]
    names = [str(begin) if begin == end else f"{begin}-{end}" for begin, end in zip(borders, ends, strict=False)]
    return {name: place == number for number, name in enumerate([*names, f"{borders[-1]}+"])}


def training_counts(interactions: Interactions, catalog: Catalog) -> NDArray[np.int64]:
    """``(n_items,)`` how often each item of the catalogue occurs in training; 0: it is cold.

    Raises:
        ValueError: a data set without training split, or an item in training that the catalogue does not hold.
    """
    check_catalog(catalog)
    _, items = in_training(interactions)
    return np.bincount(catalog.index_of(items, "interactions"), minlength=len(catalog))
