# SPDX-License-Identifier: Apache-2.0
"""Search over the titles of a catalogue: beam search and the paper's diverse beam search, batched over users.

The prompts of a batch of users are computed once, packed, and their keys and values stored once per user. All
hypotheses of all users then advance together, one token per step; each keeps the keys and values of its own few tokens
and sees its user's prompt through `PrefixCache`. A title's score is the sum of the log-probabilities of its tokens and
of ``response_end``, over the full vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from patchkern.histories import Histories, HistoriesLike
from patchkern.layout import PatchLayout
from patchkern.memory import in_batches
from patchkern.policies import AnyPolicy, check_policy
from patchkern.prompts import Prompts, inference
from patchkern.trie import Trie

if TYPE_CHECKING:
    from patchkern.model import PatchedCausalLM

SEARCHES = ("beam", "diverse")

DIVERSITY_PENALTY = 0.8
"""What ``search="diverse"`` takes off a token's log-probability for each earlier group that chose it; the paper's."""


def recommend(
    model: PatchedCausalLM,
    histories: HistoriesLike,
    policy: AnyPolicy,
    k: int = 20,
    num_beams: int = 20,
    search: str = "beam",
    exclude_seen: bool = False,
    memory_budget: int | None = None,
    batch_size: int = 64,
) -> list[list[tuple[Any, float]]]:
    """Recommend items to users.

    ``search="beam"``: at every step each user's ``num_beams`` best unfinished hypotheses go on, and the titles they
    complete enter a pool of the user's ``k`` best. A user is done when no unfinished hypothesis scores as high as the
    pool's worst, since log-probabilities only fall. With ``num_beams`` at least the number of titles nothing is ever
    cut, and the result is that of scoring every title. Never fewer than ``k`` items.

    ``search="diverse"``: the paper's protocol, diverse beam search with ``num_beams`` groups of one beam (Hamming
    diversity, as transformers 4 defined it). In each step the groups choose in turn, and a token loses
    `DIVERSITY_PENALTY` for each earlier group of the user that chose it in this step. The lists are in the protocol's
    own order, by penalised log-probability per token (``response_end`` included); the scores beside the items are the
    titles' log-probabilities here too, and so need not fall. Groups may find the same title, which is listed once:
    there may be fewer than ``k`` items.

    Args:
        model: the model, with its catalogue and prompt. It runs in evaluation mode and is left as it was.
        histories: B users.
        policy: how to compress the histories.
        k: items per user.
        num_beams: hypotheses per user, at least ``k``: a narrower beam may find fewer than ``k`` titles.
        search: ``"beam"`` or ``"diverse"``.
        exclude_seen: leave out the items of a user's whole history, also those that ``policy`` cuts off.
        memory_budget: bytes for what grows with users and beams (keys, values, logits); a batch that needs more is
            split.
        batch_size: users computed together, at most.

    Returns:
        Per user ``(item_id, log-probability)``, best first. Equal scores are in catalogue order, and the items that
        share a title follow each other.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    for name, value in (("k", k), ("num_beams", num_beams)):
        _check_count(name, value)
    _check_batching(policy, memory_budget, batch_size)
    if search not in SEARCHES:
        raise ValueError(f"search: expected one of {', '.join(SEARCHES)}, got {search!r}")
    if not isinstance(exclude_seen, bool):
        raise TypeError(f"exclude_seen: expected a bool, got {exclude_seen!r}")
    if k > len(model.catalog):
        raise ValueError(f"k: expected at most {len(model.catalog)}, the items of the catalog, got {k}")
    if num_beams < k:
        raise ValueError(f"num_beams: expected at least k={k}, to find that many titles, got {num_beams}")
    histories = Histories.coerce(histories)
    seen = _seen_items(model, histories, k) if exclude_seen else None
    trie = Trie.from_catalog(model.catalog, model.prompt.response_end).to(model.device)
    results: list[list[tuple[Any, float]]] = [[] for _ in range(len(histories))]

    def compute(users: NDArray[np.int64], layout: PatchLayout) -> tuple[Tensor, Tensor, Tensor]:
        allowed = torch.ones(users.size, len(model.catalog), dtype=torch.bool)
        if seen is not None:
            ignored = seen.take(users)
            allowed[np.repeat(np.arange(users.size), ignored.lengths), ignored.items] = False
        running = trie.running_count(allowed.to(model.device))
        prompts = Prompts(model, layout, layout.num_users * num_beams * (trie.depth - 1))
        if search == "beam":
            found = _beam_search(prompts, trie, running, k, num_beams)
        else:
            found = _without_repeats(_diverse_search(prompts, trie, running, num_beams))
        return _items_of(found, trie, running, k)

    with inference(model):
        for users, found in in_batches(
            model, histories, policy, num_beams, trie.depth, compute, memory_budget, batch_size
        ):
            _collect(results, users, model, *found)
    return results


def generate_titles(
    model: PatchedCausalLM,
    histories: HistoriesLike,
    policy: AnyPolicy,
    num_beams: int = 20,
    leaves_only: bool = True,
    memory_budget: int | None = None,
    batch_size: int = 64,
) -> list[list[tuple[Any, float]]]:
    """The titles that the paper's diverse beam search generates, for ``metric="paper"`` of `patchkern.metrics`.

    As ``recommend(search="diverse")``, but titles instead of items, repeats included: always ``num_beams`` entries per
    user. With the same model and tree, transformers 4.46 gives the same lists, but for two accidents that are left out
    here: the authors cut their longest title before its end token, and a group that ends there makes the padding token
    or some forbidden one, whichever comes first, less likely for the groups after it.

    Args:
        model, histories, policy, memory_budget, batch_size: as in `recommend`.
        num_beams: groups, and titles per user; the paper decodes once with 10 and once with 20.
        leaves_only: search the authors' tree, in which a title that begins another title cannot be generated.

    Returns:
        Per user ``(item_id, log-probability)``, each title named by the first item that has it.
    """
    _check_count("num_beams", num_beams)
    _check_batching(policy, memory_budget, batch_size)
    histories = Histories.coerce(histories)
    trie = Trie.from_catalog(model.catalog, model.prompt.response_end, leaves_only).to(model.device)
    everything = trie.running_count(torch.ones(1, len(model.catalog), dtype=torch.bool, device=model.device))
    results: list[list[tuple[Any, float]]] = [[] for _ in range(len(histories))]

    def compute(users: NDArray[np.int64], layout: PatchLayout) -> tuple[Tensor, Tensor, Tensor]:
        prompts = Prompts(model, layout, layout.num_users * num_beams * (trie.depth - 1))
        found = _diverse_search(prompts, trie, everything.expand(users.size, -1), num_beams)
        return found.user, trie.items[trie.begin[found.node]], found.score

    with inference(model):
        for users, found in in_batches(
            model, histories, policy, num_beams, trie.depth, compute, memory_budget, batch_size
        ):
            _collect(results, users, model, *found)
    return results


# ------------------------------------------------------------------ users


def _seen_items(model: PatchedCausalLM, histories: Histories, k: int) -> Histories:
    """The distinct items of every history, as catalogue indices."""
    n_items = len(model.catalog)
    index = model.catalog.index_of(histories.items, "histories").astype(np.int64)
    owner = np.repeat(np.arange(len(histories)), histories.lengths)
    pairs = np.unique(owner * n_items + index)
    counts = np.bincount(pairs // n_items, minlength=len(histories))
    short = np.flatnonzero(n_items - counts < k)
    if short.size:
        raise ValueError(
            f"k: expected at most {n_items - counts[short[0]]}, the items of the catalog ({n_items}) that user "
            f"{short[0]} has not seen, got {k}"
        )
    return Histories(pairs % n_items, np.append(0, np.cumsum(counts)))


# ------------------------------------------------------------------ the searches


class _Found(NamedTuple):
    """Titles found, M in all, ordered by user and then as listed."""

    user: Tensor  # (M,)
    node: Tensor  # (M,) node of the trie where the title ends
    score: Tensor  # (M,) its log-probability


class _Choices(NamedTuple):
    """All next tokens of N hypotheses that lead to an allowed item, C in all, hypothesis by hypothesis."""

    parent: Tensor  # (C,) 0..N-1
    user: Tensor  # (C,)
    node: Tensor  # (C,)
    log_prob: Tensor  # (C,) of the token alone
    ends: Tensor  # (C,) bool: a title that the user may get ends here
    goes_on: Tensor  # (C,) bool: longer ones lie below


def _expand(logits: Tensor, row: Tensor, user: Tensor, node: Tensor, trie: Trie, running: Tensor) -> _Choices:
    """The choices of N hypotheses, whose next-token logits are rows ``row`` of ``logits``."""
    first = trie.children[node]
    count = trie.children[node + 1] - first
    parent = torch.repeat_interleave(count)
    child = torch.arange(len(parent), device=node.device) + (first - count.cumsum(0) + count)[parent]
    user = user[parent]
    begin, own_end, end = (running[user, rank[child]] for rank in (trie.begin, trie.own_end, trie.end))
    reached = end > begin
    parent, user, child, ends, goes_on = (x[reached] for x in (parent, user, child, own_end > begin, end > own_end))
    row, total = row[parent], logits.logsumexp(dim=-1)
    if not bool(total.isfinite().all()):
        raise ValueError("model: expected finite logits, got NaN or infinity")
    log_prob = logits[row, trie.tokens[child]] - total[row]
    return _Choices(parent, user, child, log_prob, ends, goes_on)


def _best(user: Tensor, score: Tensor, tie: Tensor, count: int) -> Tensor:
    """Positions of every user's ``count`` highest scores, by user and then from the highest; ties by ``tie``."""
    order = torch.argsort(tie, stable=True)
    order = order[torch.argsort(score[order], descending=True, stable=True)]
    order = order[torch.argsort(user[order], stable=True)]
    return order[_place(user[order]) < count]


def _place(user: Tensor) -> Tensor:
    """0, 1, 2, ... within every run of an ascending ``user``."""
    return torch.arange(len(user), device=user.device) - torch.searchsorted(user, user)


def _beam_search(prompts: Prompts, trie: Trie, running: Tensor, k: int, num_beams: int) -> _Found:
    user = torch.arange(prompts.num_users, device=running.device)
    node, logits = torch.zeros_like(user), prompts.logits
    score = logits.new_zeros(len(user))
    pool = _Found(user[:0], node[:0], score[:0])
    row, fed = user, torch.full_like(user, -1)
    while True:
        choice = _expand(logits, row, user, node, trie, running)
        total = score[choice.parent] + choice.log_prob
        ended = _Found(choice.user[choice.ends], choice.node[choice.ends], total[choice.ends])
        pool = _Found(*(torch.cat(pair) for pair in zip(pool, ended, strict=True)))
        kept = _best(pool.user, pool.score, trie.items[trie.begin[pool.node]], k)
        pool = _Found(*(x[kept] for x in pool))
        # what scores below a full pool's worst cannot enter it, nor can anything that continues it
        to_beat = score.new_full((prompts.num_users,), float("-inf"))
        is_last = _place(pool.user) == k - 1
        to_beat[pool.user[is_last]] = pool.score[is_last]
        hopeful = (choice.goes_on & (total >= to_beat[choice.user])).nonzero()[:, 0]
        tie = trie.first_item[choice.node[hopeful]]
        hopeful = hopeful[_best(choice.user[hopeful], total[hopeful], tie, num_beams)]
        if len(hopeful) == 0:
            return pool
        user, node, score = choice.user[hopeful], choice.node[hopeful], total[hopeful]
        logits = prompts.step(fed[choice.parent[hopeful]], user, trie.tokens[node])
        fed = prompts.num_rows - len(user) + torch.arange(len(user), device=user.device)
        row = torch.arange(len(user), device=user.device)


def _diverse_search(
    prompts: Prompts, trie: Trie, running: Tensor, num_groups: int, penalty: float = DIVERSITY_PENALTY
) -> _Found:
    """As many entries per user as groups, ordered by penalised log-probability per token."""
    n_users, device = prompts.num_users, running.device
    node = torch.zeros(n_users, num_groups, dtype=torch.int64, device=device)
    log_prob = prompts.logits.new_zeros(n_users, num_groups)
    penalised = torch.zeros_like(log_prob)
    length = torch.zeros_like(node)
    done = torch.zeros_like(node, dtype=torch.bool)
    times_chosen = prompts.logits.new_zeros(n_users, prompts.logits.shape[1])
    user, group = (~done).nonzero(as_tuple=True)
    row, fed, logits = user, torch.full_like(user, -1), prompts.logits
    while True:
        choice = _expand(logits, row, user, node[user, group], trie, running)
        by_group = torch.argsort(group[choice.parent], stable=True)
        sizes = torch.bincount(group[choice.parent], minlength=num_groups).tolist()
        times_chosen.zero_()
        for at, mine in enumerate(by_group.split(sizes)):
            if len(mine) == 0:
                continue
            owner, child = choice.user[mine], choice.node[mine]
            token = trie.tokens[child]
            total = penalised[owner, at] + choice.log_prob[mine] - penalty * times_chosen[owner, token]
            taken = _first_highest(owner, total, n_users)
            owner, child, token, mine = owner[taken], child[taken], token[taken], mine[taken]
            node[owner, at] = child
            penalised[owner, at] = total[taken]
            log_prob[owner, at] += choice.log_prob[mine]
            length[owner, at] += 1
            done[owner, at] = choice.ends[mine]
            # the token that closes a response counts for nobody, as the end token in transformers 4
            counts = ~choice.ends[mine] if trie.end_length else torch.ones_like(choice.ends[mine])
            times_chosen[owner[counts], token[counts]] += 1
        row_of = torch.zeros_like(node)
        row_of[user, group] = torch.arange(len(user), device=device)
        user, group = (~done).nonzero(as_tuple=True)
        if len(user) == 0:
            order = torch.argsort(penalised / length, dim=1, descending=True, stable=True)
            owner = torch.arange(n_users, device=device).repeat_interleave(num_groups)
            return _Found(owner, node.gather(1, order).flatten(), log_prob.gather(1, order).flatten())
        logits = prompts.step(fed[row_of[user, group]], user, trie.tokens[node[user, group]])
        fed = prompts.num_rows - len(user) + torch.arange(len(user), device=user.device)
        row = torch.arange(len(user), device=device)


def _first_highest(user: Tensor, score: Tensor, n_users: int) -> Tensor:
    """Position of the first highest score of every user that has one."""
    highest = score.new_full((n_users,), float("-inf")).scatter_reduce_(0, user, score, "amax")
    positions = (score == highest[user]).nonzero()[:, 0]
    first = positions.new_full((n_users,), len(score)).scatter_reduce_(0, user[positions], positions, "amin")
    return first[first < len(score)]


# ------------------------------------------------------------------ items


def _without_repeats(found: _Found) -> _Found:
    """Every user's titles at their first place only."""
    position = torch.arange(len(found.user), device=found.user.device)
    key = found.user * (int(found.node.max()) + 1) + found.node
    _, number = torch.unique(key, return_inverse=True)
    first = torch.full_like(position, len(position)).scatter_reduce_(0, number, position, "amin")
    kept = position == first[number]
    return _Found(*(x[kept] for x in found))


def _items_of(found: _Found, trie: Trie, running: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """User, catalogue index and score of every user's first ``k`` allowed items."""
    begin = trie.begin[found.node]
    count = trie.own_end[found.node] - begin
    title = torch.repeat_interleave(count)
    rank = torch.arange(len(title), device=title.device) + (begin - count.cumsum(0) + count)[title]
    user = found.user[title]
    allowed = running[user, rank + 1] > running[user, rank]
    title, rank, user = title[allowed], rank[allowed], user[allowed]
    kept = _place(user) < k
    return user[kept], trie.items[rank[kept]], found.score[title[kept]]


def _collect(
    results: list[list[tuple[Any, float]]],
    users: NDArray[np.int64],
    model: PatchedCausalLM,
    user: Tensor,
    item: Tensor,
    score: Tensor,
) -> None:
    owners = users[user.cpu().numpy()].tolist()
    item_ids = model.catalog.item_ids[item.cpu().numpy()].tolist()
    for owner, item_id, value in zip(owners, item_ids, score.tolist(), strict=True):
        results[owner].append((item_id, value))


def _check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name}: expected an integer, got {value!r}")
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")


def _check_batching(policy: Any, memory_budget: Any, batch_size: Any) -> None:
    check_policy(policy)
    if memory_budget is not None:
        _check_count("memory_budget", memory_budget)
    _check_count("batch_size", batch_size)
