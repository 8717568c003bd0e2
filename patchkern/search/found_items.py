# SPDX-License-Identifier: Apache-2.0
"""From the titles that a search found to the items of each user, in their order and with their scores."""

from __future__ import annotations

import torch
from torch import Tensor

from patchkern.search.title_search import Found, Ranking
from patchkern.search.trie import BestValues, Trie


def normalized(score: Tensor, trie: Trie, running: Tensor, k: int, by_item: bool, prior: BestValues | None) -> Found:
    """The ``k`` best titles by probability given that a title which the user may get, or such an item, comes out."""
    node = trie.titles.expand_as(score)
    counts = running[:, trie.own_end[trie.titles]] - running[:, trie.begin[trie.titles]]
    score = score.masked_fill(counts == 0, float("-inf"))
    shares = counts.clamp(min=1).to(score.dtype).log() if by_item else torch.zeros_like(score)
    total = score
    if prior is not None and by_item:
        total = (score - shares)[:, trie.title_of_item] + prior.items
    elif prior is not None:
        total = score + prior.at[:, trie.titles]
    score = score - total.logsumexp(dim=1, keepdim=True) - shares
    score = score.masked_fill(counts == 0, float("-inf"))  # of a user who may get nothing the sum is -inf too
    return Ranking(trie, 0.0, score.dtype, prior).best(Found(node, score), k)


def items_of(
    found: Found, trie: Trie, running: Tensor, k: int, prior: BestValues | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """User, catalogue index and score of every user's first ``k`` allowed items."""
    begin = trie.begin[found.node]
    count = (trie.own_end[found.node] - begin).masked_fill(found.score == float("-inf"), 0).flatten()
    title = torch.repeat_interleave(count)
    rank = torch.arange(len(title), device=title.device) + (begin.flatten() - count.cumsum(0) + count)[title]
    user = torch.div(title, found.node.shape[1], rounding_mode="floor")
    allowed = running[user, rank + 1] > running[user, rank]
    title, rank, user = title[allowed], rank[allowed], user[allowed]
    item, score = trie.items[rank], found.score.flatten()[title]
    if prior is not None:  # items that share a title need not follow each other
        score = score + prior.items[user, item]
        order = trie.items[begin.flatten()[title]].argsort(stable=True)
        order = order[score[order].argsort(stable=True, descending=True)]
        order = order[user[order].argsort(stable=True)]
        user, item, score = user[order], item[order], score[order]
    place = torch.arange(len(user), device=user.device) - torch.searchsorted(user, user)
    kept = place < k
    return user[kept], item[kept], score[kept]
