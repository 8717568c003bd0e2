# SPDX-License-Identifier: Apache-2.0
"""patchkern makes long user histories cheap for LLM-based recommenders.

Old items become patches, the mean of their titles' token embeddings; fused kernels pool them and write the packed
batch that variable-length attention takes.

    >>> import torch
    >>> import patchkern as pk
    >>> titles = {7: "Alien", 8: "Aliens", 9: "The Third Man", 10: "Brazil"}
    >>> catalog = pk.Catalog.from_titles(titles, lambda title: list(title.encode()))  # or a transformers tokenizer
    >>> prompt = pk.Prompt(prefix=[256], separator=[257], suffix=[258], response_end=[259])
    >>> policy = pk.ItemPatches(keep_text=1)  # the latest item as text, one row for each of the others
    >>> weight = torch.randn(260, 64)  # a model's input embeddings
    >>> pk.compress_batch(weight, catalog, [[8, 9, 10, 7], [9, 10]], policy, prompt, targets=[9, 8])
    PackedBatch((44, 64) float32 of
      PatchLayout(2 users, 44 rows, longest 27, 4 items in patches, compression 3.27, 21 labels, on cpu))

`PatchedCausalLM` wraps a language model of transformers, which then learns from histories and recommends, `ItemModel`
is one on item ids alone;
`patchkern.training.PatchTrainer` trains it, `patchkern.data` reads data sets, `patchkern.evaluation` measures. A policy
(`TextOnly`, `ItemPatches`, `SessionPatches`, `TimeSessions`, `FitRows`) decides which items become what.
`python -m patchkern` prints versions and backends.
"""

import importlib
from typing import TYPE_CHECKING, Any

from patchkern.batch.catalog import Catalog
from patchkern.batch.catalog_diff import CatalogDiff, CatalogWarning
from patchkern.batch.expert_layout import expert_row_counts
from patchkern.batch.experts import Experts
from patchkern.batch.hashes import row_hashes
from patchkern.batch.histories import Histories
from patchkern.batch.joined_layout import join_layouts
from patchkern.batch.layout import PatchLayout
from patchkern.batch.mean_of_old import MeanOfOld
from patchkern.batch.memory_layout import memory_row_counts
from patchkern.batch.policies import (
    FitRows,
    ItemDropout,
    ItemPatches,
    RandomItemPatches,
    SessionPatches,
    TextOnly,
    TimeSessions,
)
from patchkern.batch.policy_kinds import FittingPolicy, Level, Policy, TrunkPolicy
from patchkern.batch.preference_memory import PreferenceMemory
from patchkern.batch.prompt import Prompt
from patchkern.batch.prompt_words import PromptWords
from patchkern.batch.row_counts import row_counts
from patchkern.batch.sample_layout import build_layout
from patchkern.batch.training_layout import build_training_layout, training_rows
from patchkern.ops.backends import backends
from patchkern.ops.item_table import ItemTable, item_table
from patchkern.ops.packed import PackedBatch, compress_batch
from patchkern.ops.pool_rows import pool_rows, pool_rows_grad

if TYPE_CHECKING:
    from patchkern.budget.counted_memory import MemoryRows
    from patchkern.budget.training import TrainingPlan, plan_training
    from patchkern.models.item_model import ItemModel
    from patchkern.models.learned_rows import add_experts
    from patchkern.models.memories import Memories
    from patchkern.models.model_card import ModelCard
    from patchkern.models.patched_lm import PatchedCausalLM
    from patchkern.models.recurrent import RecurrentMemory
    from patchkern.search.batching import plan_memory
    from patchkern.search.bulk_run import BulkRun, recommendation_table
    from patchkern.search.combined_prior import CombinedPrior
    from patchkern.search.head_prior import ItemHeadPrior
    from patchkern.search.linear_prior import LinearPrior
    from patchkern.search.prior import PopularityPrior, TransitionPrior
    from patchkern.search.prior_weight import PriorFit, fit_prior_weight
    from patchkern.search.results import read_recommendations, read_summary, recommend_to_disk
    from patchkern.search.summary import PartialListsWarning, UnprovenSearchWarning
    from patchkern.search.user_cache import UserCache
    from patchkern.serving.user_states import UserStates

__version__ = "0.1.0"

__all__ = [
    "BulkRun",
    "Catalog",
    "CatalogDiff",
    "CatalogWarning",
    "CombinedPrior",
    "Experts",
    "FitRows",
    "FittingPolicy",
    "Histories",
    "ItemDropout",
    "ItemHeadPrior",
    "ItemModel",
    "ItemPatches",
    "ItemTable",
    "Level",
    "LinearPrior",
    "MeanOfOld",
    "Memories",
    "MemoryRows",
    "ModelCard",
    "PackedBatch",
    "PartialListsWarning",
    "PatchLayout",
    "PatchedCausalLM",
    "Policy",
    "PopularityPrior",
    "PreferenceMemory",
    "PriorFit",
    "Prompt",
    "PromptWords",
    "RandomItemPatches",
    "RecurrentMemory",
    "SessionPatches",
    "TextOnly",
    "TimeSessions",
    "TrainingPlan",
    "TransitionPrior",
    "TrunkPolicy",
    "UnprovenSearchWarning",
    "UserCache",
    "UserStates",
    "add_experts",
    "backends",
    "build_layout",
    "build_training_layout",
    "compress_batch",
    "expert_row_counts",
    "fit_prior_weight",
    "item_table",
    "join_layouts",
    "memory_row_counts",
    "plan_memory",
    "plan_training",
    "pool_rows",
    "pool_rows_grad",
    "read_recommendations",
    "read_summary",
    "recommend_to_disk",
    "recommendation_table",
    "row_counts",
    "row_hashes",
    "training_rows",
]


# transformers is an extra, and slow to import: only those who use the model pay for it, or for data sets.
_LAZY = {
    "BulkRun": "patchkern.search.bulk_run",
    "CombinedPrior": "patchkern.search.combined_prior",
    "ItemHeadPrior": "patchkern.search.head_prior",
    "ItemModel": "patchkern.models.item_model",
    "LinearPrior": "patchkern.search.linear_prior",
    "Memories": "patchkern.models.memories",
    "MemoryRows": "patchkern.budget.counted_memory",
    "ModelCard": "patchkern.models.model_card",
    "PartialListsWarning": "patchkern.search.summary",
    "PatchedCausalLM": "patchkern.models.patched_lm",
    "PopularityPrior": "patchkern.search.prior",
    "PriorFit": "patchkern.search.prior_weight",
    "RecurrentMemory": "patchkern.models.recurrent",
    "TrainingPlan": "patchkern.budget.training",
    "TransitionPrior": "patchkern.search.prior",
    "UnprovenSearchWarning": "patchkern.search.summary",
    "UserCache": "patchkern.search.user_cache",
    "UserStates": "patchkern.serving.user_states",
    "add_experts": "patchkern.models.learned_rows",
    "fit_prior_weight": "patchkern.search.prior_weight",
    "plan_memory": "patchkern.search.batching",
    "plan_training": "patchkern.budget.training",
    "read_recommendations": "patchkern.search.results",
    "read_summary": "patchkern.search.results",
    "recommend_to_disk": "patchkern.search.results",
    "recommendation_table": "patchkern.search.bulk_run",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
