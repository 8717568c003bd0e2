# SPDX-License-Identifier: Apache-2.0
"""The best items by a model's item head: one pass over the prompts, one product with all items' vectors."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from patchkern.budget.search import SearchSize
from patchkern.search.filters import ItemFilter, ItemPrior
from patchkern.search.prompts import Prompts, SearchPrompts
from patchkern.search.protocol import SearchModel
from patchkern.search.user_cache import UserCache

_SLACK = 16  # items beyond the k-th that are looked at for equal scores


def item_log_probs(
    model: SearchModel,
    layout: SearchPrompts,
    chunk_rows: int | None = None,
    user_cache: UserCache | None = None,
    user_ids: list[object] | None = None,
) -> Tensor:
    """``(B, n_items)`` log-probabilities over the catalogue, for the prompts of a layout for items."""
    prompts = Prompts(model, layout, 0, chunk_rows=chunk_rows, user_cache=user_cache, user_ids=user_ids, head="items")
    return model.item_scores(prompts.states)


def best_items(
    log_probs: Tensor,
    users: NDArray[np.int64],
    items: ItemFilter,
    known: ItemPrior | None,
    k: int,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The k best of the items that each user may get, best first, equal ones in catalogue order.

    Args:
        log_probs: ``(B, n_items)``; written to.
        users: ``(B,)`` whose they are.
        items: which of them a user may get.
        known: a prior, which knows that too, or None.
        k: how many, at most.
        normalize: over the items that a user may get.

    Returns:
        User (0..B - 1), catalogue position and score of every item found, ``(F,)`` each, user by user.
    """
    if known is not None:
        log_probs += known.of(users, log_probs.device)
    elif not items.is_open:
        log_probs.masked_fill_(~items.mask(users).to(log_probs.device), -math.inf)
    if normalize:
        log_probs = torch.log_softmax(log_probs, dim=1)
    score, item = _top(log_probs, k)
    found = score > -math.inf
    user = torch.arange(users.size, device=score.device)[:, None].expand_as(score)
    return user[found], item[found], score[found]


def size_of_items(model: SearchModel, known: ItemPrior | None, user_cache: UserCache | None) -> SearchSize:
    """What scoring all items asks of the memory, beside the prompts."""
    n_items, itemsize = len(model.catalog), torch.promote_types(model.dtype, torch.float32).itemsize
    width = 0 if model.item_embedding is None else model.item_embedding.shape[1]
    width = width or int(model.config.get_text_config().hidden_size)
    user_bytes = n_items * (5 * itemsize + 2) + (0 if known is None else known.user_bytes)
    cache_bytes = 0 if user_cache is None else user_cache.max_bytes
    # the items' vectors, with their text on the way, and the titles
    fixed = n_items * width * 3 * itemsize + 12 * int(model.catalog.inputs.offsets[-1]) + 24 * n_items + cache_bytes
    return SearchSize(1, 1, user_bytes, fixed, user_logits=0)


def _top(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """``(B, k)`` the highest and where they are; of equal ones the first. `torch.topk` takes any of them."""
    looked_at = min(k + _SLACK, scores.shape[1])
    best, place = scores.topk(looked_at, dim=1)
    if looked_at < scores.shape[1] and bool((best[:, -1] == best[:, k - 1]).any()):
        best, place = scores.sort(dim=1, descending=True, stable=True)
        return best[:, :k], place[:, :k]
    place, order = place.sort(dim=1)
    best, order = best.gather(1, order).sort(dim=1, descending=True, stable=True)
    return best[:, :k], place.gather(1, order)[:, :k]
