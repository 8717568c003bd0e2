# SPDX-License-Identifier: Apache-2.0
"""Items' own vectors that are left out at random in training, so that a model learns to do without them."""

from __future__ import annotations

import torch
from torch import Tensor


def check_vector_dropout(probability: float, item_embeddings: bool) -> float:
    """The probability, of vectors that a model has.

    Raises:
        TypeError, ValueError: no number from 0 up to but not 1, or not 0 where there are no vectors.
    """
    if isinstance(probability, bool) or not isinstance(probability, (int, float)):
        raise TypeError(f"vector_dropout: expected a number, got {type(probability).__name__}")
    if not 0 <= probability < 1:
        raise ValueError(f"vector_dropout: expected a probability of at least 0 and below 1, got {probability}")
    if probability and not item_embeddings:
        raise ValueError(
            f"vector_dropout: expected 0 without item embeddings, of which it drops some, got {probability}"
        )
    return float(probability)


def drop_vectors(vectors: Tensor, probability: float) -> Tensor:
    """``(n_items, D)`` with zeros for the items that one draw of torch's generator leaves out.

    What is kept is not scaled: an item without its vector is one that is new to the model, and one with it is what it
    will be when nothing is dropped.
    """
    kept = torch.rand(vectors.shape[0], 1, device=vectors.device) >= probability
    return vectors * kept.to(vectors.dtype)
