# SPDX-License-Identifier: Apache-2.0
"""Scores of all items for the samples of a data set, and how well they rank the targets."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

import patchkern as pk
from patchkern.data import Interactions, Samples
from patchkern.evaluation.metrics import Evaluation, evaluate
from recipes.baselines.batches import Integers, Windows, item_positions, sample_windows
from recipes.baselines.networks import Recommender
from recipes.ranking import ScoredItems

SAMPLES_AT_ONCE = 128
KS = (10, 20)


def window_scores(model: Recommender, windows: Windows) -> Iterator[tuple[Integers, NDArray[np.float32]]]:
    """``(n,)`` numbers of windows, those of like length together, and their ``(n, n_items)``."""
    device = model.bias.device
    model.eval()
    for chosen in windows.parts(SAMPLES_AT_ONCE):
        batch = windows.batch(chosen)
        with torch.inference_mode():
            states, vectors = model(batch.histories.to(device))
            last = states.flatten(0, 1)[batch.rows.to(device)]
            scores = torch.addmm(model.bias, last, vectors.T).float().cpu().numpy()
        yield chosen, scores


class Ranker:
    """Ranks samples of a data set by a recommender.

    Args:
        window: latest items that the recommender is given.
    """

    def __init__(self, data: Interactions, catalog: pk.Catalog, window: int) -> None:
        self.data, self.catalog, self.window = data, catalog, window
        self._items = item_positions(data, catalog)

    def scores(self, model: Recommender, samples: Samples) -> Iterator[tuple[Integers, NDArray[np.float32]]]:
        """``(n,)`` numbers of samples, those with histories of like length together, and their ``(n, n_items)``."""
        return window_scores(model, sample_windows(self.data, self._items, samples, self.window))

    def table(self, model: Recommender, samples: Samples, *, unseen: bool) -> NDArray[np.float32]:
        """``(S, n_items)`` scores; -inf for items of the whole history if ``unseen``."""
        scores = np.zeros((samples.users.size, len(self.catalog)), np.float32)
        for chosen, part in self.scores(model, samples):
            scores[chosen] = part
        if unseen:
            past = self.data.before(samples)
            scores[np.repeat(np.arange(len(past)), past.lengths), self.catalog.index_of(past.items)] = -np.inf
        return scores

    def measure(self, model: Recommender, samples: Samples) -> tuple[Evaluation, float]:
        """Of lists without seen items; and the mean negative log-probability of the targets, in nats."""
        scored = ScoredItems(self.data, samples, self.catalog, max(KS), unseen=True)
        for chosen, scores in self.scores(model, samples):
            scored.add(chosen, scores)
        found = evaluate(
            scored.ranking.as_lists(), self.data.targets(samples), KS, catalog=self.catalog, users=samples.users
        )
        return found, float(scored.nll.mean())
