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
from patchkern.search.frontier import check_finite
from patchkern.search.prompts import Prompts, SearchPrompts
from patchkern.search.protocol import SearchModel
from patchkern.search.user_cache import UserCache

_SLACK = 16  # items beyond the k-th that are looked at for equal scores
_TRANSPOSED = 60 * 60  # numbers that torch has aside while it copies a transposed matrix, on the CPU
_LISTED = 100  # items of a list, for which its memory is planned


def item_log_probs(
    model: SearchModel,
    layout: SearchPrompts,
    chunk_rows: int | None = None,
    user_cache: UserCache | None = None,
    user_ids: list[object] | None = None,
) -> Tensor:
    """``(B, n_items)`` log-probabilities over the catalogue, for the prompts of a layout for items.

    Raises:
        ValueError: some are no numbers; -inf, of an item that cannot come, is one.
    """
    prompts = Prompts(model, layout, 0, chunk_rows=chunk_rows, user_cache=user_cache, user_ids=user_ids, head="items")
    log_probs = model.item_scores(prompts.states)
    check_finite(bool(log_probs.isnan().any()))
    return log_probs


def best_items(
    log_probs: Tensor,
    users: NDArray[np.int64],
    items: ItemFilter,
    known: Tensor | None,
    k: int,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The k best of the items that each user may get, best first, equal ones in catalogue order.

    Args:
        log_probs: ``(B, n_items)``; written to.
        users: ``(B,)`` whose they are.
        items: which of them a user may get.
        known: ``(B, n_items)``, or one row for all, what a prior adds: -inf for what a user may not get; or None.
        k: how many, at most.
        normalize: over the items that a user may get.

    Returns:
        User (0..B - 1), catalogue position and score of every item found, ``(F,)`` each, user by user.
    """
    if known is not None:
        log_probs += known.to(log_probs.device)
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
    n_items, itemsize = len(model.catalog), model.dtype.itemsize
    own = model.item_embedding
    vectors = n_items * itemsize * int(model.config.get_text_config().hidden_size)
    by_id = getattr(model.item_head, "scores_by", None)
    # kept from call to call: the items' vectors, and the titles that they are made of
    fixed = vectors if by_id else vectors + 12 * int(model.catalog.inputs.offsets[-1]) + 24 * n_items
    # rows of a table are copied once, others made first, and their own vectors added
    made = 0 if by_id == "dot" else 1 if own is None else 2
    wide = torch.promote_types(model.dtype, torch.float32).itemsize
    # what is known of the items is there all along
    prior = 0 if known is None else n_items * wide
    # scores twice; or what it takes to know that, which is more; and the best of them, put in order
    scores = n_items * wide + max(n_items * wide, 0 if known is None else known.user_bytes - prior)
    scores += min(_LISTED + _SLACK, n_items) * (4 * wide + 4 * 8)
    return SearchSize(
        width=1,
        kept_rows=1,
        user_bytes=prior,
        fixed_bytes=fixed + (0 if user_cache is None else user_cache.max_bytes),
        user_logits=0,
        user_scores=scores,
        fixed_scores=2 * n_items * (wide + 8),  # of one user at a time
        made_vectors=made * vectors + _TRANSPOSED * itemsize,
    )


def _top(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """``(B, k)`` the highest and where they are; of equal ones the first. `torch.topk` takes any of them."""
    looked_at = min(k + _SLACK, scores.shape[1])
    best, place = scores.topk(looked_at, dim=1)
    if looked_at < scores.shape[1]:
        # one user at a time: sorting takes several times the memory of the scores
        for user in (best[:, -1] == best[:, k - 1]).nonzero()[:, 0].tolist():
            in_order = scores[user].sort(descending=True, stable=True)
            best[user], place[user] = (part[:looked_at] for part in in_order)
    place, order = place.sort(dim=1)
    best, order = best.gather(1, order).sort(dim=1, descending=True, stable=True)
    return best[:, :k], place.gather(1, order)[:, :k]
