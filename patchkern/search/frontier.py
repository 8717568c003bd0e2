# SPDX-License-Identifier: Apache-2.0
"""Where a search stands: the hypotheses that go on, and what the model says of the tokens that can follow each.

A pass of the model costs about the same for one hypothesis as for hundreds, on a GPU, and the last levels of the tree
have few. So as soon as all that lies below the hypotheses of a batch is no more than a full step would have been, it is
fed at once, as trees; the search then goes on level by level as before, and asks the model nothing more.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from patchkern.budget.search import LOG_PROBS_AT_ONCE
from patchkern.search.prefix_cache import StepShape
from patchkern.search.prompts import Prompts
from patchkern.search.trie import Trie


class Choices(NamedTuple):
    """Prefixes of every user, (B, C), in no particular order; score -inf where there is none."""

    node: Tensor
    score: Tensor  # log-probability so far
    row: Tensor  # `Hypotheses.row` of the prefixes one token shorter; -1 for the prompt


class Hypotheses(NamedTuple):
    """N of them, users ascending."""

    user: Tensor  # (N,)
    node: Tensor  # (N,)
    score: Tensor  # (N,) log-probability so far
    row: Tensor  # (N,) of `Prompts`, where the last token was fed; -1 for the prompt
    gains: Tensor  # (M, C) log-probabilities of the children, after each token of the last pass; see `_gains`
    source: Tensor  # (N,) which of its tokens each hypothesis ends with
    most_children: int  # of one hypothesis
    most_choices: int  # children of all hypotheses of one user
    is_complete: bool = False
    """The last pass fed everything below; then ``row`` is what makes ``source`` of a node's `Subtrees.place`."""


def at_the_prompts(prompts: Prompts, trie: Trie) -> Hypotheses:
    """One hypothesis of each user, without a token."""
    user = torch.arange(prompts.num_users, device=trie.tokens.device)
    root = torch.zeros_like(user)
    most = trie.num_first_tokens
    gains = _gains(prompts.logits, root, most, trie)
    return Hypotheses(user, root, gains.new_zeros(len(user)), root - 1, gains, user, most, most)


def follow(
    prompts: Prompts,
    trie: Trie,
    before: Hypotheses,
    chosen: Choices,
    goes: Tensor,
    left: Tensor,
    is_bad: Tensor,
    depth: int | None,
    num_beams: int,
) -> tuple[Hypotheses | None, int]:
    """The hypotheses of those of the ``(B, W)`` prefixes that go on, whose last tokens are fed; None where none does.

    With ``depth``, that of the tokens before them, rows that lead to none of them are dropped, and all below them is
    fed where that is no more than ``num_beams`` tokens of every user. Also returns ``left.max()``. Everything that the
    host has to know about the step is read here, at once.
    """
    node = chosen.node
    is_open = depth is not None and not before.is_complete
    is_live = prompts.live(torch.where(goes, chosen.row, -1), depth) if is_open and depth is not None else None
    below = trie.subtrees.sizes[node].long() if is_open else torch.ones_like(node)
    n_children = trie.children[node + 1] - trie.children[node]
    of_user = (torch.stack([torch.ones_like(node), n_children, below]) * goes).sum(dim=2)  # (3, B)
    highest = (torch.stack([trie.level[node], n_children, trie.longest[node] - 1]) * goes).amax(dim=(1, 2))
    n_live = torch.zeros_like(left[0]) if is_live is None else is_live.sum()
    rest = torch.stack([(of_user[0] > 0).sum(), left.max(), n_live, is_bad.long()])
    sizes = torch.cat([of_user.sum(dim=1), of_user.amax(dim=1), highest, rest]).tolist()
    n, _, n_below, width, most_choices, width_below, *others = sizes
    deepest, most_children, last, n_users, most_left, n_kept, found_bad = others
    check_finite(bool(found_bad))
    if n == 0:
        return None, most_left
    at = (~goes).flatten().to(torch.int8).argsort(stable=True)[:n]
    user = torch.div(at, goes.shape[1], rounding_mode="floor")
    node, score, row = (x.flatten()[at] for x in chosen)
    found = before._replace(user=user, node=node, score=score, most_children=most_children, most_choices=most_choices)
    if before.is_complete:
        return found._replace(row=row, source=row + trie.subtrees.place[node]), most_left
    if is_live is not None:
        row = prompts.keep(is_live, n_kept)[row]
    # no more tokens, nor of those before them, than a search of single steps may have
    fits = n_below <= num_beams * len(goes) and max(n_kept + n_below, n_below * (last - 1)) <= prompts.max_rows
    if is_live is not None and fits:
        shape = StepShape(n_users, width_below, last)
        return _all_below(prompts, trie, found._replace(row=row), n_below, deepest, shape), most_left
    first = prompts.num_rows
    logits = prompts.step(row, user, trie.tokens[node], StepShape(n_users, width, deepest))
    source = torch.arange(n, device=at.device)
    gains = _gains(logits, node, most_children, trie)
    return found._replace(row=source + first, gains=gains, source=source), most_left


def _all_below(prompts: Prompts, trie: Trie, found: Hypotheses, count: int, level: int, shape: StepShape) -> Hypotheses:
    """Feed the ``count`` inner nodes at and below hypotheses of one level, whose ``row`` is the one before them."""
    trees = trie.subtrees
    device = found.node.device
    counts = trees.sizes[found.node].long()
    starts = counts.cumsum(0) - counts
    number = torch.arange(count, device=device)
    of = torch.arange(len(counts), device=device).repeat_interleave(counts, output_size=count)
    offset = starts - trees.place[found.node]
    place = number - offset[of]
    fed = trees.nodes[place].long()
    parent = torch.where(number == starts[of], found.row[of], number - trees.above[place] + prompts.num_rows)
    logits = prompts.step(parent, found.user[of], trie.tokens[fed], shape)
    gains = _gains(logits, fed, trees.most_children[level], trie)
    return found._replace(row=offset, gains=gains, source=starts, is_complete=True)


def _gains(logits: Tensor, node: Tensor, most: int, trie: Trie) -> Tensor:
    """(M, most) log-probabilities of the children of M nodes; behind a node's last child any.

    Only those are kept, so that log-probabilities over the vocabulary exist of some rows at a time.
    """
    number = torch.arange(most, device=node.device)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    rows = max(LOG_PROBS_AT_ONCE // logits.shape[1], 1)
    parts = []
    for part, own in zip(logits.split(rows), node.split(rows), strict=True):
        child = (trie.children[own, None] + number).clamp_(max=trie.num_nodes - 1)
        parts.append(part.log_softmax(dim=-1, dtype=dtype).gather(1, trie.tokens[child]))
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def check_finite(is_bad: bool) -> None:
    """Raise where a model gave no numbers."""
    if is_bad:
        raise ValueError("model: expected finite logits, got NaN or infinity")
