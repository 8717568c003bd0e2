# SPDX-License-Identifier: Apache-2.0
"""GRU4Rec (Hidasi et al., 2016): a recurrent network over the items of a history."""

from __future__ import annotations

from torch import Tensor, nn

from recipes.baselines.settings import Settings


class Recurrent(nn.Module):
    """Gated recurrent units, twice as wide as the items' vectors, and back to their width."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.dropout = nn.Dropout(settings.dropout)
        between = settings.dropout if settings.layers > 1 else 0.0
        self.units = nn.GRU(settings.width, 2 * settings.width, settings.layers, batch_first=True, dropout=between)
        self.output = nn.Linear(2 * settings.width, settings.width)

    def forward(self, vectors: Tensor) -> Tensor:
        hidden, _ = self.units(self.dropout(vectors))
        states: Tensor = self.output(self.dropout(hidden))
        return states


def gru4rec(settings: Settings) -> nn.Module:
    return Recurrent(settings)
