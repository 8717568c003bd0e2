# SPDX-License-Identifier: Apache-2.0
"""Evaluation: metrics, and yardsticks to measure a recommender against."""

from patchkern.evaluation.metrics import Evaluation, evaluate
from patchkern.evaluation.yardsticks import Ranking, most_popular, transitions

__all__ = ["Evaluation", "Ranking", "evaluate", "most_popular", "transitions"]
