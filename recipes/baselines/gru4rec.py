# SPDX-License-Identifier: Apache-2.0
"""GRU4Rec (Hidasi et al., 2016): a recurrent network over the items of a history."""

from __future__ import annotations

from torch import Tensor, nn

from recipes.baselines.settings import Settings


class Recurrent(nn.Module):
    """Gated recurrent units, twice as wide as the items' vectors, and back to their width, between two LayerNorms."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        width, inner = settings.width, 2 * settings.width
        self.dropout = nn.Dropout(settings.dropout)
        self.first_norm, self.last_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        between = settings.dropout if settings.layers > 1 else 0.0
        self.units = nn.GRU(width, inner, settings.layers, batch_first=True, dropout=between)
        self.output = nn.Linear(inner, width)

    def forward(self, vectors: Tensor) -> Tensor:
        hidden, _ = self.units(self.dropout(self.first_norm(vectors)))
        states: Tensor = self.last_norm(self.output(self.dropout(hidden)))
        return states


def gru4rec(settings: Settings) -> nn.Module:
    return Recurrent(settings)
