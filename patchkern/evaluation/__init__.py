# SPDX-License-Identifier: Apache-2.0
"""Evaluation: metrics and how sure they are, slices, and yardsticks to measure a recommender against."""

from patchkern.evaluation.errors import Difference, Estimate, estimate, paired_difference, standard_error
from patchkern.evaluation.exposure import coverage, log_popularity
from patchkern.evaluation.linear import linear
from patchkern.evaluation.metrics import Evaluation, evaluate
from patchkern.evaluation.slices import HISTORY_LENGTHS, TRAINING_COUNTS, slices, training_counts
from patchkern.evaluation.trec import write_qrels, write_run
from patchkern.evaluation.yardsticks import Ranking, most_popular, transitions

__all__ = [
    "HISTORY_LENGTHS",
    "TRAINING_COUNTS",
    "Difference",
    "Estimate",
    "Evaluation",
    "Ranking",
    "coverage",
    "estimate",
    "evaluate",
    "linear",
    "log_popularity",
    "most_popular",
    "paired_difference",
    "slices",
    "standard_error",
    "training_counts",
    "transitions",
    "write_qrels",
    "write_run",
]
