# SPDX-License-Identifier: Apache-2.0
"""Rows from embeddings: which may be pooled without calling them, and what comes to them from elsewhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils.parametrize import is_parametrized

from patchkern.batch.layout import PatchLayout
from patchkern.ops.pool_rows import pool_rows


def with_vectors(rows: Tensor, layout: PatchLayout, vectors: Tensor | None) -> Tensor:
    """The rows of a layout with its ``vector_rows`` overwritten; differentiable, and the same bits every time.

    Args:
        rows: ``(T, D)`` from an embedding.
        layout: whose they are.
        vectors: ``(V, D)``, in the order of ``vector_rows``; None where it has none.

    Raises:
        ValueError: vectors for a layout without such rows, none for one with, or others than it has rows for.
    """
    if layout.vector_rows is None:
        if vectors is not None:
            raise ValueError("vectors: expected None for a layout without vector rows, got some")
        return rows
    expected = (layout.vector_rows.shape[0], rows.shape[1])
    if vectors is None:
        if expected[0] == 0:
            return rows
        raise ValueError(
            f"vectors: expected {expected[0]}, for the vector rows of the layout, got None; a RecurrentMemory around "
            "the model makes them"
        )
    if tuple(vectors.shape) != expected:
        raise ValueError(f"vectors: expected shape {expected}, one per vector row, got {tuple(vectors.shape)}")
    places = layout.vector_rows.to(rows.device, non_blocking=True)
    return rows.index_copy(0, places, vectors.to(device=rows.device, dtype=rows.dtype))


def add_item_vectors(rows: Tensor, layout: PatchLayout, own: Tensor) -> Tensor:
    """To each patch among the rows of a layout the mean of its items' own vectors, in place; differentiable.

    Args:
        rows: ``(T, D)`` from an embedding.
        layout: whose they are, with its identities unless it is on the CPU.
        own: ``(n_items, D)`` in the order of its catalogue.
    """
    identities = layout.with_identities().identities
    if identities is None:
        raise RuntimeError("with_identities returned a layout without them")
    # also without patches: data parallel training waits for every parameter's gradient
    means = pool_rows(own, identities.layout.to(rows.device, non_blocking=True))
    return rows.index_add_(0, identities.rows.to(rows.device, non_blocking=True), means.to(rows.dtype))


class EmbeddingScale:
    """The number by which a model's input embedding multiplies its weight's rows.

    Args:
        token_ids: all that are ever pooled.
    """

    def __init__(self, token_ids: frozenset[int]) -> None:
        self._token_ids = token_ids
        self._known: tuple[Tensor, int, torch.dtype, float] | None = None

    def of(self, embedding: nn.Embedding) -> float | None:
        """The number by which the embedding multiplies its weight's rows; None where it does more than that."""
        if isinstance(embedding.weight, DTensor) and not embedding._forward_pre_hooks:
            raise ValueError(
                "the embedding is sharded and nothing gathers it here: call fully_shard on the PatchedCausalLM, not on "
                "the model inside it"
            )
        does_more = (
            embedding._forward_hooks
            or embedding._forward_pre_hooks
            or "forward" in vars(embedding)
            or is_parametrized(embedding)
            or embedding.max_norm is not None
        )
        # nn.Embedding gives its padding token no gradient; the weight alone would
        if does_more or embedding.padding_idx in self._token_ids:
            return None
        if type(embedding) is nn.Embedding:
            return 1.0
        if not _only_scales(type(embedding)) or torch.compiler.is_compiling():
            return None
        return self._host_scale(embedding.embed_scale, embedding.weight.dtype)

    def _host_scale(self, scale: Any, dtype: torch.dtype) -> float | None:
        """A scaled embedding's buffer as a number, read from its device only when it is another or has changed."""
        if not isinstance(scale, Tensor) or scale.dim() != 0 or scale.is_inference() or scale.requires_grad:
            return None
        known = self._known
        if known is None or known[0] is not scale or known[1:3] != (scale._version, dtype):
            known = self._known = (scale, scale._version, dtype, float(scale.to(dtype)))
        return known[3]


class _ScaledEmbedding(nn.Embedding):
    """What transformers' Gemma models do to their embeddings; `_only_scales` compares with it."""

    embed_scale: Tensor

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.embed_scale.to(self.weight.dtype)


def _only_scales(kind: type[nn.Embedding]) -> bool:
    """Whether the class is `_ScaledEmbedding` but for its name: its ``forward`` is made of the same instructions."""
    wanted, code = _ScaledEmbedding.forward.__code__, getattr(kind.forward, "__code__", None)
    same = code is not None and (code.co_code, code.co_names) == (wanted.co_code, wanted.co_names)
    return same and kind.__bases__ == (nn.Embedding,)
