# SPDX-License-Identifier: Apache-2.0
"""Data sets: readers, filters, splits and a synthetic generator.

    data = open_dataset("ml-100k")              # MovieLens, Amazon, Steam, MerRec, EB-NeRD, ..., by their files
    data = from_tables(interactions, items)     # or tables of pandas, polars, pyarrow
    data = prepare(data)                        # rating > 3, users with more than 20 of those, split 48:1:1 by time
    test = data.samples("test")                 # users and positions of the targets
    data.before(test, max_items=100), data.targets(test)

Nothing is ever downloaded or unpickled.
"""

from __future__ import annotations

from patchkern.data.amazon import read_amazon
from patchkern.data.ebnerd import read_ebnerd
from patchkern.data.filters import (
    hold_out_items,
    k_core,
    latest,
    min_interactions,
    most_frequent_items,
    rating_above,
    rating_at_least,
)
from patchkern.data.formats import open_dataset
from patchkern.data.goodreads import read_goodreads
from patchkern.data.interactions import MIN_HISTORY, SPLITS, Interactions
from patchkern.data.merrec import read_merrec
from patchkern.data.movielens import clean_title, read_movielens
from patchkern.data.parquet import read_parquet, write_parquet
from patchkern.data.preparation import prepare, samples_of
from patchkern.data.recbole import read_recbole
from patchkern.data.samples import Samples
from patchkern.data.splits import leave_last_out, leave_one_out, temporal_split
from patchkern.data.steam import read_steam
from patchkern.data.synthetic import synthetic
from patchkern.data.tables import from_tables, read_tables

__all__ = [
    "MIN_HISTORY",
    "SPLITS",
    "Interactions",
    "Samples",
    "clean_title",
    "from_tables",
    "hold_out_items",
    "k_core",
    "latest",
    "leave_last_out",
    "leave_one_out",
    "min_interactions",
    "most_frequent_items",
    "open_dataset",
    "prepare",
    "rating_above",
    "rating_at_least",
    "read_amazon",
    "read_ebnerd",
    "read_goodreads",
    "read_merrec",
    "read_movielens",
    "read_parquet",
    "read_recbole",
    "read_steam",
    "read_tables",
    "samples_of",
    "synthetic",
    "temporal_split",
    "write_parquet",
]
