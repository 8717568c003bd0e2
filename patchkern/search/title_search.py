# SPDX-License-Identifier: Apache-2.0
"""The search algorithms: what to feed the model next, and which titles were found. All of it on the device.

A hypothesis is a user and a node of the trie, the tokens on the way to it generated. Everything about a batch lives in
tensors with one row per user, padded; the model alone gets hypotheses without padding, user by user. Three things of a
step depend on data and have to be sizes of tensors: how many hypotheses go on, how many children the busiest user has,
and how many prefixes are set aside. They are read together (`follow`), so a step waits for the device once, and that is
also where the loop learns that it is done. Nothing loops over users or beams. `diverse_search` loops over groups,
because each group's choice depends on those of the groups before it: that is its definition.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from patchkern.budget.search import LOG_PROBS_AT_ONCE
from patchkern.search.frontier import Choices, Hypotheses, at_the_prompts, check_finite, follow
from patchkern.search.prefix_cache import StepShape
from patchkern.search.prompts import Prompts
from patchkern.search.trie import BestValues, TreePass, Trie

DIVERSITY_PENALTY = 0.8
"""What diverse search takes off a token's log-probability for each earlier group that chose it; the paper's."""


class Found(NamedTuple):
    """Titles, best first."""

    node: Tensor  # (B, M) where in the trie the title ends
    score: Tensor  # (B, M) what the model gives it, without a prior; -inf where there is no title


class Ranking:
    """What titles are ranked by, and what a prefix promises.

    A title has ``log-probability / length ** penalty``, as in transformers, the response end counting as length. To
    that comes the best prior of its items that the user may get; and since the best items have the best titles, the
    ``k`` best titles hold the ``k`` best items.

    Args:
        trie: the titles.
        penalty: 0 ranks by log-probability; above 0 favours longer titles, below 0 shorter ones.
        dtype: of the scores.
        prior: of the items of B users, weighted.
    """

    def __init__(self, trie: Trie, penalty: float, dtype: torch.dtype, prior: BestValues | None = None) -> None:
        lengths = torch.arange(trie.depth + 2, device=trie.tokens.device, dtype=dtype).clamp_(min=1)
        self._divisor = lengths.pow(penalty)
        self._trie = trie
        self._reach = trie.longest if penalty > 0 else trie.level + 1
        self._prior = prior

    def of_title(self, score: Tensor, node: Tensor) -> Tensor:
        """What the model alone gives to titles that end at ``node``."""
        return score / self._divisor[self._trie.level[node]]

    def total(self, found: Found) -> Tensor:
        """(B, M) the score of each title's best item."""
        return found.score if self._prior is None else found.score + self._prior.at.gather(1, found.node)

    def best(self, found: Found, count: int) -> Found:
        """Every user's ``count`` best, equal ones by the first item that has the title."""
        order = _ranking(self.total(found), self._trie.items[self._trie.begin[found.node]])[:, :count]
        return Found(found.node.gather(1, order), found.score.gather(1, order))

    def promise(self, score: Tensor, node: Tensor) -> Tensor:
        """What prefixes are taken further by: their log-probability, and the best prior below them."""
        return score if self._prior is None else score + self._prior.below.gather(1, node)

    def bound(self, score: Tensor, node: Tensor) -> Tensor:
        """What no title that goes on below ``node`` can exceed.

        Log-probabilities are not positive and only fall, so the best that can happen is that they stay, at the length
        that divides them best: the longest title below, or, where length costs, one more token; and that this title
        has the best prior below.
        """
        return self.promise(score / self._divisor[self._reach[node]], node)


def search_titles(
    prompts: Prompts,
    trie: Trie,
    running: Tensor,
    k: int,
    num_beams: int,
    length_penalty: float = 0.0,
    max_expansions: int | None = None,
    prior: BestValues | None = None,
) -> tuple[Found, Tensor]:
    """Every user's ``k`` best titles: of a beam search, or of all there are.

    A step takes up to ``num_beams`` prefixes of each user one token further. The titles completed enter a pool of the
    user's ``k`` best; prefixes that cannot lead to something as good as a full pool's worst are dropped.

    Without ``max_expansions`` this is beam search: a step goes on with the best of the prefixes it just made, and
    forgets the others. With it, the others are set aside, and once a user's beam has ended the search comes back to
    them, best first, until none is left that could matter: the pool is then the ``k`` best titles of all, and the beam
    search before it serves to find a bound early. Feeding a prefix set aside costs one token, for the keys and values
    of the tokens before it are kept.

    Args:
        prompts: of B users, with room for ``B * trie.live_rows(num_beams)`` rows; with ``max_expansions`` for that many
            per user, or ``trie.fed_rows(num_beams)`` if it is more.
        trie: the titles.
        running: ``(B, n_items + 1)`` which items each user may get, see `Trie.running_count`.
        k: titles per user.
        num_beams: prefixes per user and step.
        length_penalty: see `Ranking`.
        max_expansions: prefixes per user that may be taken further, those of the beam search included, which is
            completed in any case.
        prior: of the items of B users, -inf where ``running`` does not count them; see `Ranking`.

    Returns:
        ``(B, k)`` titles by descending `Ranking.total`, equal ones by their first item; and ``(B,)`` bool, users for
        whom ``max_expansions`` left prefixes that could matter. They have the best titles seen, never worse than the
        beam's.
    """
    n_users, device = prompts.num_users, running.device
    hypotheses = at_the_prompts(prompts, trie)
    rank = Ranking(trie, length_penalty, hypotheses.score.dtype, prior)
    pool = _nothing(n_users, k, hypotheses.score)
    aside = Choices(*(pool.node[:, :0], pool.score[:, :0], pool.node[:, :0]))
    in_beam = torch.ones(n_users, 1, dtype=torch.bool, device=device)
    expanded = torch.zeros(n_users, 1, dtype=torch.int64, device=device)
    for step in itertools.count():
        made, ends, goes_on, is_bad = _children(hypotheses, trie, running)
        score = rank.of_title(made.score, made.node).masked_fill(~ends, float("-inf"))
        pool = rank.best(Found(torch.cat([pool.node, made.node], dim=1), torch.cat([pool.score, score], dim=1)), k)
        worst = rank.total(pool)[:, -1:]  # -inf until the pool is full
        made = made._replace(score=made.score.masked_fill(~goes_on, float("-inf")))
        is_open = _is_open(made, rank, worst)
        n_made = made.node.shape[1]
        if max_expansions is not None:
            in_beam &= is_open.any(dim=1, keepdim=True)
            made = Choices(*(torch.cat(pair, dim=1) for pair in zip(made, aside, strict=True)))
            is_open = torch.cat([is_open, _is_open(aside, rank, worst)], dim=1)
        may_follow = is_open.clone()
        may_follow[:, n_made:] &= ~in_beam
        promise = rank.promise(made.score, made.node).masked_fill(~may_follow, float("-inf"))
        followed = _ranking(promise, trie.first_item[made.node])[:, :num_beams]
        goes = may_follow.gather(1, followed)
        if max_expansions is not None:
            goes &= in_beam | (torch.arange(goes.shape[1], device=device) < max_expansions - expanded)
            expanded += goes.sum(dim=1, keepdim=True)
            is_open.scatter_(1, followed, is_open.gather(1, followed) & ~goes)
        left = is_open.sum(dim=1)
        chosen = Choices(*(x.gather(1, followed) for x in made))
        following, n_left = follow(
            *(prompts, trie, hypotheses, chosen, goes, left, is_bad),
            step if max_expansions is None else None,
            num_beams,
        )
        if following is None:
            break
        hypotheses = following
        if max_expansions is not None:
            kept = _first_true(is_open, n_left)
            aside = Choices(*(x.gather(1, kept.clamp(min=0)) for x in made))
            aside = aside._replace(score=aside.score.masked_fill(kept < 0, float("-inf")))
    return pool, left > 0 if max_expansions is not None else torch.zeros_like(left, dtype=torch.bool)


def diverse_search(prompts: Prompts, trie: Trie, running: Tensor, num_groups: int) -> Found:
    """Diverse beam search with groups of one beam; as many entries per user as groups, which may be equal.

    In each step the groups choose in turn, and a token loses `DIVERSITY_PENALTY` for each earlier group of the user
    that chose it in this step. Ordered by penalised log-probability per token; the scores are log-probabilities.

    Args:
        prompts, trie, running: as in `search_titles`.
        num_groups: groups per user.
    """
    n_users, device = prompts.num_users, running.device
    hypotheses = at_the_prompts(prompts, trie)
    node = torch.zeros(n_users, num_groups, dtype=torch.int64, device=device)
    row = torch.full_like(node, -1)
    length = torch.zeros_like(node)
    goes = (running[:, -1:] > 0).repeat(1, num_groups)  # nowhere for users who may get nothing
    log_prob = hypotheses.score.new_zeros(n_users, num_groups)
    penalised = log_prob.masked_fill(~goes, float("-inf"))
    log_prob = penalised.clone()
    times_chosen = log_prob.new_zeros(n_users, prompts.logits.shape[1])
    users = torch.arange(n_users, device=device)
    source = users[:, None].expand_as(node)  # which hypothesis each group is
    for step in itertools.count():
        # the choices of every hypothesis do not depend on the other groups: (N, most children)
        child = trie.children[hypotheses.node, None] + torch.arange(hypotheses.most_children, device=device)
        exists = child < trie.children[hypotheses.node + 1, None]
        child = torch.where(exists, child, 1)
        reached, ends_at, _ = _reach(hypotheses.user[:, None], child, trie, running)
        tokens = trie.tokens[child]
        gains = hypotheses.gains[hypotheses.source, : hypotheses.most_children]
        is_bad = (reached & exists & ~gains.isfinite()).any()
        gains.masked_fill_(~(reached & exists), float("-inf"))
        times_chosen.zero_()
        for group in range(num_groups):
            mine = source[:, group]
            token = tokens[mine]
            total = penalised[:, group, None] + gains[mine] - DIVERSITY_PENALTY * times_chosen.gather(1, token)
            best = total.argmax(dim=1)
            total, token = (x.gather(1, best[:, None])[:, 0] for x in (total, token))
            gained, next_node, ends = (x[mine, best] for x in (gains, child, ends_at))
            chooses = goes[:, group].clone()
            node[:, group] = torch.where(chooses, next_node, node[:, group])
            penalised[:, group] = torch.where(chooses, total, penalised[:, group])
            log_prob[:, group] += torch.where(chooses, gained, 0.0)
            length[:, group] += chooses
            goes[:, group] &= ~ends
            # the token that closes a response counts for nobody, as the end token in transformers 4
            counts = chooses & ~ends if trie.end_length else chooses
            times_chosen[users, token] += counts.to(times_chosen.dtype)
        prefixes = Choices(node, log_prob, row)
        following, _ = follow(prompts, trie, hypotheses, prefixes, goes, goes.sum(dim=1), is_bad, step, num_groups)
        if following is None:
            break
        hypotheses = following
        source = (goes.flatten().cumsum(0) - 1).view_as(goes).clamp_(min=0)
        row = torch.where(goes, hypotheses.row[source], row)
    order = (penalised / length.clamp(min=1)).argsort(dim=1, descending=True, stable=True)
    return Found(node.gather(1, order), log_prob.gather(1, order))


def score_titles(prompts: Prompts, trie: Trie, passes: Sequence[TreePass]) -> Tensor:
    """The log-probability of every title for every user.

    Titles are fed as trees, so a token that several of them share is computed once, except where two passes cut a
    subtree.

    Args:
        prompts: of B users, with room for the largest pass of every user.
        trie: the titles.
        passes: ``trie.passes(...)``.

    Returns:
        ``(B, n_titles)``, in the order of ``trie.titles``.
    """
    n_users, device = prompts.num_users, trie.tokens.device
    users = torch.arange(n_users, device=device)
    of_prompt = prompts.logits.log_softmax(dim=-1)
    scores = []
    for tree in passes:
        n_fed, n_first = len(tree.fed), tree.level_ends[0]
        score = of_prompt.new_empty(n_users, len(tree.tokens))
        score[:, :n_first] = of_prompt[:, tree.tokens[:n_first]]
        if n_fed:
            row = torch.where(tree.above < 0, -1, tree.above + n_fed * users[:, None])
            user = users.repeat_interleave(n_fed, output_size=n_users * n_fed)
            shape = StepShape(n_users, n_fed, len(tree.level_ends) - 1)
            logits = prompts.step(row.flatten(), user, tree.fed.repeat(n_users), shape)
            prompts.forget()
            at_once = max(LOG_PROBS_AT_ONCE // (n_fed * logits.shape[1]), 1)
            later = score[:, n_first:].split(at_once)
            for own, part in zip(later, logits.view(n_users, n_fed, -1).split(at_once), strict=True):
                own[:] = part.log_softmax(dim=-1, dtype=score.dtype)[:, tree.source, tree.tokens[n_first:]]
        # level by level, so that a title's sum is rounded as it is when a search adds it up token by token
        for begin, end in itertools.pairwise(tree.level_ends):
            score[:, begin:end] += score[:, tree.parent[begin - n_first : end - n_first]]
        scores.append(score[:, tree.ends])
    result = torch.cat(scores, dim=1)
    check_finite(not bool(result.isfinite().all()))
    return result


# ------------------------------------------------------------------ steps


def _nothing(n_users: int, count: int, like: Tensor) -> Found:
    node = torch.zeros(n_users, count, dtype=torch.int64, device=like.device)
    return Found(node, like.new_full(node.shape, float("-inf")))


def _reach(user: Tensor, child: Tensor, trie: Trie, running: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Does an item that the user may get lie at or below a node, at it, below it? ``user`` (n, 1), ``child`` (n, C)."""
    begin, own_end, end = (running[user, rank[child]] for rank in (trie.begin, trie.own_end, trie.end))
    return end > begin, own_end > begin, end > own_end


def _children(hypotheses: Hypotheses, trie: Trie, running: Tensor) -> tuple[Choices, Tensor, Tensor, Tensor]:
    """What can follow the hypotheses, what of it ends a title, what goes on; and whether a logit was not finite."""
    user, node = hypotheses.user, hypotheses.node
    device = running.device
    users = torch.arange(len(running), device=device)
    first = trie.children[node]
    ends_at = (trie.children[node + 1] - first).cumsum(0)  # (N,) children of all users are numbered through
    starts_at = torch.cat([ends_at.new_zeros(1), ends_at])
    bounds = starts_at[torch.searchsorted(user, torch.arange(len(running) + 1, device=device))]
    number = bounds[:-1, None] + torch.arange(hypotheses.most_choices, device=device)
    exists = number < bounds[1:, None]
    parent = torch.searchsorted(ends_at, number, right=True).clamp_(max=len(user) - 1)
    child = torch.where(exists, (first - starts_at[:-1])[parent] + number, 1)
    reached, ends, goes_on = (x & exists for x in _reach(users[:, None], child, trie, running))
    gained = hypotheses.gains[hypotheses.source[parent], torch.where(exists, number - starts_at[parent], 0)]
    score = (hypotheses.score[parent] + gained).masked_fill(~reached, float("-inf"))
    is_bad = (reached & ~gained.isfinite()).any()
    return Choices(child, score, hypotheses.row[parent]), ends, goes_on, is_bad


def _is_open(prefixes: Choices, rank: Ranking, worst: Tensor) -> Tensor:
    """Which prefixes may lead to a title as good as ``worst``."""
    return (prefixes.score > float("-inf")) & (rank.bound(prefixes.score, prefixes.node) >= worst)


# ------------------------------------------------------------------ order


def _ranking(score: Tensor, tie: Tensor) -> Tensor:
    """Positions in each row by descending ``score``, equal ones by ascending ``tie``; all (B, C)."""
    order = tie.argsort(dim=1)
    return order.gather(1, score.gather(1, order).sort(dim=1, descending=True, stable=True).indices)


def _first_true(mask: Tensor, count: int) -> Tensor:
    """Positions of the first ``count`` true entries of each row, (B, count); -1 where there are fewer."""
    place = mask.cumsum(dim=1) - 1
    place = torch.where(mask, place, count)  # one column more, for all that is not wanted
    positions = torch.full((len(mask), count + 1), -1, dtype=torch.int64, device=mask.device)
    every = torch.arange(mask.shape[1], device=mask.device).expand_as(place)
    return positions.scatter_(1, place.clamp_(max=count), every)[:, :count]


def without_repeats(found: Found) -> Found:
    """Every title at its first place only; its other places become empty and go last."""
    same = found.node[:, :, None] == found.node[:, None, :]
    is_repeat = same.tril(-1).any(dim=2)
    order = is_repeat.to(torch.int8).argsort(dim=1, stable=True)
    score = found.score.masked_fill(is_repeat, float("-inf"))
    return Found(found.node.gather(1, order), score.gather(1, order))
