# SPDX-License-Identifier: Apache-2.0
"""A recommender: a table of item vectors, a network over those of a history, and a score for every item."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recipes.baselines.caser import caser
from recipes.baselines.gru4rec import gru4rec
from recipes.baselines.linrec import linrec
from recipes.baselines.mamba4rec import SelectiveStateSpace, mamba4rec
from recipes.baselines.morec import ProjectedTitles
from recipes.baselines.sasrec import sasrec, start_small
from recipes.baselines.settings import Settings

NETWORKS: dict[str, Callable[[Settings], nn.Module]] = {
    "sasrec": sasrec,
    "gru4rec": gru4rec,
    "caser": caser,
    "linrec": linrec,
    "mamba4rec": mamba4rec,
    "morec": sasrec,
}
"""Each makes a module from ``(B, L, D)`` to ``(B, L, D)`` that lets no position see a later one. Another network,
such as one over the library's own blocks, needs an entry here and one in `recipes.baselines.settings`."""


class Table(nn.Module):
    """A vector of its own for each item, ``(n, D)``."""

    def __init__(self, n_items: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_items, width) * 0.02)

    def forward(self) -> Tensor:
        return self.weight


class Recommender(nn.Module):
    """States of histories, and scores of all items from them.

    Args:
        model: a name of `NETWORKS`.
        n_items: of the catalogue.
        settings: of the network.
        titles: ``(n_items, E)``, from which items' vectors are made; None: each has a vector of its own.

    Attributes:
        bias: ``(n_items,)``, 0 at first.
    """

    def __init__(self, model: str, n_items: int, settings: Settings, titles: Tensor | None = None) -> None:
        super().__init__()
        network = NETWORKS[model](settings)
        items = Table(n_items, settings.width) if titles is None else ProjectedTitles(titles, settings.width)
        self.network, self.items = network.apply(start_small), items.apply(start_small)
        self.outputs = None if settings.tied else Table(n_items, settings.width)
        self.bias = nn.Parameter(torch.zeros(n_items))
        for module in network.modules():
            if isinstance(module, SelectiveStateSpace):
                module.start_steps()

    def forward(self, histories: Tensor) -> tuple[Tensor, Tensor]:
        """States and the vectors that score them.

        Args:
            histories: ``(B, L)`` int64, catalogue positions, oldest first; what follows the end of a history is any.

        Returns:
            ``(B, L, D)``, ``(n_items, D)``: the score of item i is ``<state, vector[i]> + bias[i]``.
        """
        table = self.items()
        states = self.network(F.embedding(histories, table))
        return states, table if self.outputs is None else self.outputs()
