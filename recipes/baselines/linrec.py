# SPDX-License-Identifier: Apache-2.0
"""LinRec (Liu et al., 2023): attention whose cost is linear in the length of a history."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recipes.baselines.sasrec import Blocks, split_heads
from recipes.baselines.settings import Settings

CHUNK = 32


def linear_attention(query: Tensor, key: Tensor, value: Tensor, chunk: int = CHUNK) -> Tensor:
    """``sum over s <= t of <query[t], key[s]> value[s]``, in time linear in L.

    Equal to ``torch.tril(query @ key.T) @ value``, which is what is done within a chunk; what lies before it is one
    ``(E, V)`` sum of outer products.

    Args:
        query, key: ``(..., L, E)``.
        value: ``(..., L, V)``.
        chunk: positions that are compared pair by pair.

    Returns:
        ``(..., L, V)``.
    """
    length = query.shape[-2]
    padding = -length % chunk
    query, key, value = (F.pad(tensor, (0, 0, 0, padding)).unflatten(-2, (-1, chunk)) for tensor in (query, key, value))
    own = torch.tril(query @ key.transpose(-1, -2)) @ value
    sums = key.transpose(-1, -2) @ value
    before = sums.cumsum(-3) - sums
    return (own + query @ before).flatten(-3, -2)[..., :length, :]


class LinearAttention(nn.Module):
    """LinRec's mechanism, causal: queries and keys through ELU, queries of length 1, each channel of the keys so too.

    A channel's length is over the positions so far, where LinRec, which predicts at the last position alone, takes it
    over all: at the last position the two are equal.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.heads = settings.heads
        self.inputs = nn.Linear(settings.width, 3 * settings.width)
        self.output = nn.Linear(settings.width, settings.width)

    def forward(self, vectors: Tensor) -> Tensor:
        query, key, value = split_heads(self.inputs(vectors), self.heads)
        query, key = F.normalize(F.elu(query), dim=-1), F.elu(key)
        lengths = (key.square().cumsum(-2) + 1e-12).sqrt()
        return self.output(linear_attention(query / lengths, key, value).transpose(1, 2).flatten(2))


def linrec(settings: Settings) -> nn.Module:
    return Blocks(settings, LinearAttention)
