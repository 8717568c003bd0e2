# SPDX-License-Identifier: Apache-2.0
"""patchkern makes long user histories cheap for LLM-based recommenders.

Old items become patches, the mean of their titles' token embeddings; fused kernels pool them and write the packed
batch that variable-length attention takes.
"""

import importlib
from typing import TYPE_CHECKING, Any

from patchkern.batch.catalog import Catalog
from patchkern.batch.hashes import row_hashes
from patchkern.batch.histories import Histories
from patchkern.batch.layout import PatchLayout
from patchkern.batch.policies import (
    FitRows,
    FittingPolicy,
    ItemPatches,
    Level,
    Policy,
    RandomItemPatches,
    SessionPatches,
    TextOnly,
    TimeSessions,
    TrunkPolicy,
)
from patchkern.batch.prompt import Prompt
from patchkern.batch.row_counts import row_counts
from patchkern.batch.sample_layout import build_layout
from patchkern.batch.training_layout import build_training_layout, join_layouts, training_rows
from patchkern.ops.backends import backends
from patchkern.ops.item_table import ItemTable, item_table
from patchkern.ops.packed import PackedBatch, compress_batch
from patchkern.ops.pool_rows import pool_rows, pool_rows_grad
from patchkern.search.user_cache import UserCache

if TYPE_CHECKING:
    from patchkern.models.patched_lm import PatchedCausalLM
    from patchkern.search.batching import plan_memory
    from patchkern.search.prior import PopularityPrior, PriorFit, TransitionPrior, fit_prior_weight
    from patchkern.search.results import read_recommendations, recommend_to_disk

__version__ = "0.1.0"

__all__ = [
    "Catalog",
    "FitRows",
    "FittingPolicy",
    "Histories",
    "ItemPatches",
    "ItemTable",
    "Level",
    "PackedBatch",
    "PatchLayout",
    "PatchedCausalLM",
    "Policy",
    "PopularityPrior",
    "PriorFit",
    "Prompt",
    "RandomItemPatches",
    "SessionPatches",
    "TextOnly",
    "TimeSessions",
    "TransitionPrior",
    "TrunkPolicy",
    "UserCache",
    "backends",
    "build_layout",
    "build_training_layout",
    "compress_batch",
    "fit_prior_weight",
    "item_table",
    "join_layouts",
    "plan_memory",
    "pool_rows",
    "pool_rows_grad",
    "read_recommendations",
    "recommend_to_disk",
    "row_counts",
    "row_hashes",
    "training_rows",
]


# transformers is an extra, and slow to import: only those who use the model pay for it, or for data sets.
_LAZY = {
    "PatchedCausalLM": "patchkern.models.patched_lm",
    "PopularityPrior": "patchkern.search.prior",
    "PriorFit": "patchkern.search.prior",
    "TransitionPrior": "patchkern.search.prior",
    "fit_prior_weight": "patchkern.search.prior",
    "plan_memory": "patchkern.search.batching",
    "read_recommendations": "patchkern.search.results",
    "recommend_to_disk": "patchkern.search.results",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
