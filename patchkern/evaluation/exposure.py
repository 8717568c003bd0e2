# SPDX-License-Identifier: Apache-2.0
"""What lists show beside hits: how much of the catalogue, and how popular it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from patchkern.batch.arguments import check_count
from patchkern.batch.catalog import Catalog
from patchkern.batch.columns import number_array
from patchkern.evaluation.lists import check_catalog, listed_items


def coverage(recommendations: Sequence[Sequence[Any]], k: int, *, catalog: Catalog) -> float:
    """The share of the catalogue's items that are among the first ``k`` of anybody's list.

    It grows with the number of lists: compare recommenders on the same samples.

    Args:
        recommendations: as in `patchkern.evaluation.evaluate`.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    check_count("k", k, minimum=1)
    check_catalog(catalog)
    shown = np.zeros(len(catalog), np.bool_)
    shown[listed_items(recommendations, catalog, k)[0]] = True
    return float(shown.mean()) if shown.size else float("nan")


def log_popularity(
    recommendations: Sequence[Sequence[Any]], k: int, counts: ArrayLike, *, catalog: Catalog
) -> NDArray[np.float64]:
    """``(B,)`` mean of ``log(1 + count)`` over the first ``k`` of each list; NaN for an empty one.

    What the users took, ``log1p(counts[targets])``, is what to compare it with: above it the recommender is biased
    towards what is popular.

    Args:
        recommendations: as in `patchkern.evaluation.evaluate`.
        counts: ``(n_items,)`` such as those of `patchkern.evaluation.training_counts`.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    check_catalog(catalog)
    numbers = number_array("counts", counts)
    if numbers.shape != (len(catalog),):
        raise ValueError(f"counts: expected one per item ({len(catalog)}), got shape {numbers.shape}")
    if numbers.size and numbers.min() < 0:
        raise ValueError(f"counts: expected numbers of at least 0, got {numbers.min():g}")
    each = np.log1p(numbers)
    check_count("k", k, minimum=1)
    items, offsets = listed_items(recommendations, catalog, k)
    lengths = np.diff(offsets)
    sums = np.bincount(np.repeat(np.arange(lengths.size), lengths), each[items], lengths.size)
    return np.divide(sums, lengths, out=np.full(lengths.size, np.nan), where=lengths > 0)
