# SPDX-License-Identifier: Apache-2.0
"""Data sets: readers, filters, splits and a synthetic generator.

    data = open_dataset("ml-100k")              # MovieLens, Goodreads, RecBole or parquet, recognised by its files
    data = prepare(data)                        # rating > 3, users with more than 20 of those, split 48:1:1 by time
    test = data.samples("test")                 # users and positions of the targets
    data.before(test, max_items=100), data.targets(test)

Nothing is ever downloaded or unpickled.
"""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from patchkern.data import goodreads, movielens, parquet
from patchkern.data._files import one_file
from patchkern.data.filters import k_core, latest, min_interactions, most_frequent_items, rating_above
from patchkern.data.goodreads import read_goodreads
from patchkern.data.interactions import MIN_HISTORY, SPLITS, Interactions, Samples
from patchkern.data.movielens import clean_title, read_movielens
from patchkern.data.parquet import read_parquet, write_parquet
from patchkern.data.recbole import read_recbole
from patchkern.data.splits import leave_one_out, temporal_split
from patchkern.data.synthetic import synthetic

__all__ = [
    "MIN_HISTORY",
    "SPLITS",
    "Interactions",
    "Samples",
    "clean_title",
    "k_core",
    "latest",
    "leave_one_out",
    "min_interactions",
    "most_frequent_items",
    "open_dataset",
    "prepare",
    "rating_above",
    "read_goodreads",
    "read_movielens",
    "read_parquet",
    "read_recbole",
    "synthetic",
    "temporal_split",
    "write_parquet",
]


def open_dataset(path: str | PathLike[str], **options: Any) -> Interactions:
    """Read a data set of any supported format, recognised by its file names.

    Args:
        path: a folder, or the file of interactions in it.
        options: keyword arguments of the format's reader.

    Raises:
        FileNotFoundError: the path does not exist.
        ValueError: no known format; the message says what was looked for. Or what the reader raises.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"path: expected a folder or file of data, found nothing at {path}")
    folder = path if path.is_dir() else path.parent

    def holds(*names: str) -> bool:
        return path.name in names if path.is_file() else any((path / name).is_file() for name in names)

    if holds(parquet.HISTORIES):
        return read_parquet(folder, **options)
    if holds(*movielens.FILES):
        return read_movielens(path, **options)
    if path.suffix == ".inter" or (path.is_dir() and one_file(path, ["*.inter"])):
        return read_recbole(path, **options)
    if _is_goodreads(path):
        return read_goodreads(path, **options)
    raise ValueError(
        f"path: expected a data set in {path}, found none of: {parquet.HISTORIES} (parquet), "
        f"{', '.join(movielens.FILES)} (MovieLens), *.inter (RecBole), "
        f"{goodreads.INTERACTIONS_FILES[0]}[.gz] (Goodreads)"
    )


def prepare(
    interactions: Interactions,
    *,
    threshold: float = 3,
    min_length: int = 21,
    ratio: Sequence[float] = (48, 1, 1),
) -> Interactions:
    """The preparation of the PatchRec paper; data that already has splits comes back as it is.

    Args:
        threshold: keep interactions rated strictly above it; without ratings, all.
        min_length: then users with at least so many interactions.
        ratio: then the split of all interactions by time; data without timestamps is split by `leave_one_out`.
    """
    if interactions.ranges:
        return interactions
    if interactions.ratings is not None:
        interactions = rating_above(interactions, threshold)
    interactions = min_interactions(interactions, min_length)
    if interactions.histories.timestamps is None:
        return leave_one_out(interactions)
    return temporal_split(interactions, ratio)


def _is_goodreads(path: Path) -> bool:
    if path.is_dir():
        return one_file(path, goodreads.INTERACTIONS_FILES) is not None
    return any(path.match(pattern) for pattern in goodreads.INTERACTIONS_FILES)
