# SPDX-License-Identifier: Apache-2.0
"""Evaluation: metrics, and yardsticks to measure a recommender against."""

from patchkern.evaluation.linear import linear
from patchkern.evaluation.metrics import Evaluation, evaluate
from patchkern.evaluation.yardsticks import Ranking, most_popular, transitions

__all__ = ["Evaluation", "Ranking", "evaluate", "linear", "most_popular", "transitions"]
