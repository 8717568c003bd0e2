# SPDX-License-Identifier: Apache-2.0
"""A trained network as a prior for another model."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

import patchkern as pk
from recipes.baselines.batches import Windows
from recipes.baselines.networks import Recommender
from recipes.baselines.scoring import window_scores


class NetworkPrior:
    """The log-probabilities of a network's items: of users without a history those of its biases alone.

    Args:
        window: latest items that the network is given.
    """

    def __init__(self, model: Recommender, catalog: pk.Catalog, window: int) -> None:
        self.model, self.catalog, self.window = model, catalog, window

    def __call__(self, histories: pk.Histories) -> NDArray[np.float32]:
        """``(B, n_items)`` log-probabilities."""
        items = np.append(self.catalog.index_of(histories.items, "histories").astype(np.int64), 0)  # no target follows
        lengths = np.minimum(histories.lengths, self.window)
        begins = histories.offsets[1:] - lengths
        scores = np.tile(self.model.bias.detach().float().cpu().numpy(), (len(histories), 1))
        known = np.flatnonzero(lengths)
        if known.size:
            windows = Windows(items, begins[known], lengths[known], every=False)
            for chosen, part in window_scores(self.model, windows):
                scores[known[chosen]] = part
        return torch.log_softmax(torch.from_numpy(scores), dim=1).numpy()
