# SPDX-License-Identifier: Apache-2.0
"""SASRec (Kang and McAuley, 2018): causal self-attention over the items of a history."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from recipes.baselines.settings import Settings


class SelfAttention(nn.Module):
    """``(B, L, D)`` to ``(B, L, D)``: every position attends to itself and to those before it.

    Without dropout of its weights, with which PyTorch has no fast attention on a CPU.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.heads = settings.heads
        self.inputs = nn.Linear(settings.width, 3 * settings.width)
        self.output = nn.Linear(settings.width, settings.width)

    def forward(self, vectors: Tensor) -> Tensor:
        query, key, value = split_heads(self.inputs(vectors), self.heads)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.output(mixed.transpose(1, 2).flatten(2))


def split_heads(projected: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """``(B, L, 3 * D)`` as query, key and value, ``(B, heads, L, D // heads)`` each."""
    parts = projected.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return parts[0], parts[1], parts[2]


class FeedForward(nn.Sequential):
    """Position by position, four times as wide inside."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(
            nn.Linear(settings.width, 4 * settings.width),
            nn.GELU(),
            nn.Linear(4 * settings.width, settings.width),
        )


class Blocks(nn.Module):
    """Blocks of ``mixer`` and feed-forward, each after a LayerNorm and beside a residual, and a last LayerNorm.

    Args:
        mixer: makes what lets a position see those before it.
        positions: add a learned vector for each place in the window.
    """

    def __init__(self, settings: Settings, mixer: Callable[[Settings], nn.Module], positions: bool = True) -> None:
        super().__init__()
        self.positions = nn.Embedding(settings.window, settings.width) if positions else None
        self.dropout = nn.Dropout(settings.dropout)
        parts = [make(settings) for _ in range(settings.layers) for make in (mixer, FeedForward)]
        self.parts = nn.ModuleList(parts)
        self.norms = nn.ModuleList(nn.LayerNorm(settings.width) for _ in parts)
        self.last_norm = nn.LayerNorm(settings.width)

    def forward(self, vectors: Tensor) -> Tensor:
        if self.positions is not None:
            vectors = vectors + self.positions.weight[: vectors.shape[1]]
        vectors = self.dropout(vectors)
        for norm, part in zip(self.norms, self.parts, strict=True):
            vectors = vectors + self.dropout(part(norm(vectors)))
        last: Tensor = self.last_norm(vectors)
        return last


def sasrec(settings: Settings) -> nn.Module:
    return Blocks(settings, SelfAttention)


def start_small(module: nn.Module) -> None:
    """Draw the weights of linear maps and embeddings with a standard deviation of 0.02."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
