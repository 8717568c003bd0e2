# SPDX-License-Identifier: Apache-2.0
"""Caser (Tang and Wang, 2018): convolutions over the latest items, across their vectors and down each dimension.

Users have no vectors of their own: those who are tested are not those who were trained on.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recipes.baselines.settings import LATEST, Settings

ACROSS, DOWN = 16, 4
"""filters of each height, and filters that weigh the latest items"""


class Convolutions(nn.Module):
    """``(B, L, D)`` to ``(B, L, D)``, at every position as if its latest items were all there is.

    Filters of 1 to `LATEST` items span whole vectors, and the largest answer of each among the latest items is kept;
    others weigh the latest items, alike in every dimension. A LayerNorm before and one after.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        width = settings.width
        self.dropout = nn.Dropout(settings.dropout)
        self.first_norm, self.last_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.across = nn.ModuleList(nn.Conv1d(width, ACROSS, height) for height in range(1, LATEST + 1))
        self.down = nn.Conv1d(1, DOWN, LATEST)
        self.output = nn.Linear(LATEST * ACROSS + DOWN * width, width)

    def forward(self, vectors: Tensor) -> Tensor:
        batch, _, width = vectors.shape
        padded = F.pad(
            self.dropout(self.first_norm(vectors)).transpose(1, 2), (LATEST - 1, 0)
        )  # (B, D, LATEST - 1 + L)
        answers = []
        for height, filters in enumerate(self.across, start=1):
            found = F.relu(filters(padded))  # one for each run of `height` items, of which a position has several
            answers.append(F.max_pool1d(found, LATEST + 1 - height, stride=1))
        weighed = self.down(padded.reshape(batch * width, 1, -1))  # (B * D, DOWN, L)
        answers.append(weighed.unflatten(0, (batch, width)).flatten(1, 2))
        states: Tensor = self.last_norm(self.output(self.dropout(torch.cat(answers, dim=1).transpose(1, 2))))
        return states


def caser(settings: Settings) -> nn.Module:
    return Convolutions(settings)
