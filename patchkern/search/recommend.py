# SPDX-License-Identifier: Apache-2.0
"""Recommending: a catalogue's titles searched with a model, for many users at once.

The prompts of a batch of users are computed once, packed, and their keys and values stored once per user. All
hypotheses of all users then advance together and see their user's prompt through `PrefixCache`; which ones is decided
in `title_search`. A title's score is the sum of the log-probabilities of its tokens and of ``response_end``, over the
full vocabulary; a prior adds to it what else is known of the user and the item.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from patchkern.batch.histories import Histories, HistoriesLike
from patchkern.batch.policy_kinds import AnyPolicy
from patchkern.budget.search import SearchSize
from patchkern.search.arguments import check_batching, check_positive, known_histories, users_named
from patchkern.search.batching import in_batches
from patchkern.search.experts import UserStates
from patchkern.search.found_items import items_of, normalized
from patchkern.search.item_search import best_items, item_log_probs, size_of_items
from patchkern.search.prompts import Prompts, SearchPrompts
from patchkern.search.protocol import SearchModel, check_model, check_titles, policy_of
from patchkern.search.request import EXPANSIONS_PER_BEAM, Request
from patchkern.search.summary import PartialListsWarning, Summary, UnprovenSearchWarning
from patchkern.search.title_search import (
    DIVERSITY_PENALTY,
    diverse_search,
    score_titles,
    search_titles,
    without_repeats,
)
from patchkern.search.trie import TreePass, Trie
from patchkern.search.trie_cache import catalog_trie
from patchkern.search.user_cache import UserCache

__all__ = [
    "DIVERSITY_PENALTY",
    "EXPANSIONS_PER_BEAM",
    "PartialListsWarning",
    "Summary",
    "UnprovenSearchWarning",
    "generate_titles",
    "recommend",
]

Ranked = list[tuple[Any, float]]


def recommend(
    model: SearchModel,
    histories: HistoriesLike,
    policy: AnyPolicy | None = None,
    k: int = 20,
    num_beams: int = 20,
    search: str | None = None,
    exclude_seen: bool = False,
    memory_budget: int | str | None = None,
    batch_size: int = 64,
    *,
    allowed_items: Any = None,
    length_penalty: float = 0.0,
    normalize: str | None = None,
    prior: Any = None,
    prior_weight: float | Sequence[float] = 1.0,
    max_expansions: int | None = None,
    user_cache: UserCache | None = None,
    user_states: UserStates | None = None,
    user_ids: Sequence[Hashable] | None = None,
    short: str = "error",
    unknown: str = "error",
    progress: bool = False,
) -> list[Ranked]:
    """Recommend items to users.

    ``search="beam"``: at every step each user's ``num_beams`` best unfinished hypotheses go on, and the titles they
    complete enter a pool of the user's ``k`` best. A user is done when no unfinished hypothesis can reach the pool's
    worst, since log-probabilities only fall. With ``num_beams`` at least the number of titles nothing is ever cut, and
    the result is that of scoring every title. With fewer beams than ``k`` a list may have fewer items, which a
    `PartialListsWarning` says.

    ``search="exact"``: the ``k`` best of all titles. After the beam search come the prefixes that it left aside, best
    first and ``num_beams`` at a time, until none is left that could lead to one of the ``k`` best. Users who would need
    more than ``max_expansions`` prefixes get the best titles found, never worse ones than from ``search="beam"``, and
    an `UnprovenSearchWarning` counts them.

    ``search="diverse"``: the paper's protocol, diverse beam search with ``num_beams`` groups of one beam (Hamming
    diversity, as transformers 4 defined it). In each step the groups choose in turn, and a token loses
    `DIVERSITY_PENALTY` for each earlier group of the user that chose it in this step. The lists are in the protocol's
    own order, by penalised log-probability per token (``response_end`` included); the scores beside the items are the
    titles' log-probabilities here too, and so need not fall. Groups may find the same title, which is listed once:
    there may be fewer than ``k`` items.

    ``search="items"``: the ``k`` best by the model's item head, which scores the whole catalogue from the row that ends
    the history: one pass and one product, without beams. Scores are log-probabilities over the catalogue.

    Args:
        model: the model, with its catalogue and prompt. It runs in evaluation mode and is left as it was.
        histories: B users.
        policy: how to compress the histories; the model's own where None.
        k: items per user.
        num_beams: hypotheses per user and step; at least ``k`` but for ``search="beam"``, because a narrower beam may
            find fewer than ``k`` titles.
        search: ``"beam"``, ``"exact"``, ``"diverse"`` or ``"items"``; where not given ``"beam"``, or ``"items"`` for a
            model that learned no titles: a model of item ids, or one whose last training was for items alone.
        exclude_seen: leave out the items of a user's whole history, also those that ``policy`` cuts off.
        memory_budget: bytes, or a text such as "40GiB", for everything that torch allocates, weights included. Users
            are batched, and their prompts computed in chunks, so that the predicted peak stays below it
            (`patchkern.budget.search`). None: ``batch_size`` users at once. A batch for which memory runs out all the
            same is halved, with a warning.
        batch_size: users computed together, at most.
        allowed_items: recommend these only: one sequence of item ids for all users or one per user, or booleans in
            catalogue order, ``(n_items,)`` or ``(B, n_items)``, an array or a tensor.
        length_penalty: rank by ``log-probability / length ** length_penalty`` and return that, as transformers does;
            ``length`` counts the tokens of the title and of ``response_end``. Above 0 favours longer titles, below 0
            shorter ones. Not for ``"diverse"``, which has its own.
        normalize: scores given that one of the user's allowed items comes out; with ``search="exact"`` only, because
            all their titles are scored for it. ``"titles"``: ``log P(title | an allowed title)``; items that share a
            title share its score, and the titles' probabilities sum to one. ``"items"``: a title's probability is
            divided equally among the user's allowed items that share it, which changes the order too, and the items'
            probabilities sum to one. With a prior, what is normalised is the product of probability and
            ``exp(prior_weight * prior)``: of every item, or, for ``"titles"``, of every title's best item.
        prior: what is known of users and items beside the model; an item's score is its title's score plus
            ``prior_weight * prior[user, item]``, and items that share a title are told apart by it. Floats in catalogue
            order, ``(n_items,)`` for all users or ``(B, n_items)``, an array or a tensor; or a callable that takes
            `Histories` of some of the users, whole and not cut by ``policy``, and returns the latter for them, such as
            `patchkern.TransitionPrior`: it is called for each batch of users, so no table of all users is ever held.
            One that has a `Catalog` as its attribute ``catalog`` is refused where the model's items are others. -inf
            leaves an item out, whatever the weight. An exact search is exact with it; the beam goes on with the
            hypotheses that have the best sum of log-probability and best prior below them. Not for ``"diverse"``. A
            list of priors: their weighted sum.
        prior_weight: at least 0, one for all priors or a sequence of one for each; `patchkern.fit_prior_weight` finds
            good ones.
        max_expansions: of an exact search, the prefixes per user that are taken one token further, those of the beam
            search included; `EXPANSIONS_PER_BEAM` times ``num_beams`` where not given.
        user_cache: keeps the users' prompts from call to call, so that only what is new in them is computed.
        user_states: keeps what users' old items are compressed to, a `patchkern.UserStates`; what it does not have is
            computed on the way, for the same lists.
        user_ids: names of the B users, hashable, in errors, in warnings, in ``user_cache`` and in ``user_states``; 0,
            1, 2, ... where not given, or the keys where ``histories`` is a mapping.
        short: where fewer than ``k`` items are left for a user, because of ``exclude_seen``, ``allowed_items``, the
            prior or a small catalogue: ``"error"`` refuses the call, before anything is computed unless a prior is a
            callable; ``"allow"`` gives the user those that are left, perhaps none, and everybody else their ``k``.
        unknown: item ids in ``histories`` and ``allowed_items`` that the catalogue does not hold, such as those of
            items that have left it: ``"error"`` refuses the call; ``"drop"`` leaves them out, before ``policy`` cuts.
        progress: show how many users are done.

    Returns:
        Per user ``(item_id, score)``, best first, the score being the log-probability unless ``length_penalty``,
        ``normalize`` or ``prior`` say otherwise. Equal scores are in catalogue order, and items that share a title and
        a score follow each other.

    Warns:
        PartialListsWarning: lists are or may be shorter than ``k`` (not for ``"diverse"``, unless ``short="allow"``),
            or items were left out; once per call, with counts and examples, also in its attribute ``summary``.

    Raises:
        TypeError, ValueError: naming the argument, the user as the caller does, what was expected and what came.
    """
    request = Request(
        model,
        histories,
        policy,
        k,
        num_beams,
        search,
        exclude_seen,
        memory_budget,
        batch_size,
        allowed_items=allowed_items,
        length_penalty=length_penalty,
        normalize=normalize,
        prior=prior,
        prior_weight=prior_weight,
        max_expansions=max_expansions,
        user_cache=user_cache,
        user_states=user_states,
        user_ids=user_ids,
        short=short,
        unknown=unknown,
        progress=progress,
    )
    lists, summary = run(request, prepare(request))
    request.warn(summary)
    return lists


class Prepared(NamedTuple):
    """What the searches of all users share."""

    trie: Trie | None  # None where items are scored, not titles
    passes: list[TreePass]  # where every title is scored
    size: SearchSize

    @property
    def depth(self) -> int:
        """Tokens that follow a prompt, at most."""
        return 0 if self.trie is None else self.trie.depth

    @property
    def head(self) -> str:
        """What the prompts are for."""
        return "items" if self.trie is None else "titles"


def prepare(request: Request) -> Prepared:
    """The tree of titles, and what a search in it asks of the memory."""
    model, num_beams, known = request.model, request.num_beams, request.known
    if request.search == "items":
        return Prepared(None, [], size_of_items(model, known, request.user_cache))
    trie = catalog_trie(model.catalog, model.prompt.response_end, model.device)
    passes = [] if request.normalize is None else trie.passes(num_beams)
    step_rows, kept_rows = num_beams, _kept_rows(trie, request.search, num_beams, request.max_expansions)
    if request.normalize is not None:
        step_rows = kept_rows = max(len(tree.fed) for tree in passes)
    fixed_bytes = trie.num_bytes + (0 if request.user_cache is None else request.user_cache.max_bytes)
    user_bytes = 0 if request.items.is_open and known is None else 10 * len(model.catalog) + 8
    if known is not None:
        user_bytes += known.user_bytes + 3 * trie.num_nodes * request.dtype.itemsize
        fixed_bytes += 8 * (2 * trie.num_nodes + len(model.catalog))
    user_logits = 1 if request.search != "diverse" and request.normalize is None else 2
    return Prepared(trie, passes, SearchSize(step_rows, kept_rows, user_bytes, fixed_bytes, user_logits))


def run(request: Request, prepared: Prepared) -> tuple[list[Ranked], Summary]:
    """The lists of a request's users, and what they lack."""
    model = request.model
    trie = prepared.trie

    def begin(users: NDArray[np.int64]) -> Callable[[SearchPrompts, int | None], tuple[Tensor, ...]]:
        known = None if request.known is None else request.known.of(users, model.device)
        if trie is None:
            return partial(_find_items, request, users, known)
        return partial(_find_titles, request, prepared, trie, users, known)

    results: list[Ranked] = [[] for _ in range(len(request.histories))]
    n_unproven = 0
    for users, (*found, unproven) in in_batches(
        model,
        request.histories,
        request.policy,
        prepared.size,
        prepared.depth,
        begin,
        request.memory_budget,
        request.batch_size,
        request.progress,
        request.names,
        prepared.head,
        request.user_states,
    ):
        _collect(results, users, model, *found)
        n_unproven += int(unproven.sum())
    return results, request.summary(results, n_unproven)


def _find_items(
    request: Request, users: NDArray[np.int64], known: Tensor | None, layout: SearchPrompts, chunk_rows: int | None
) -> tuple[Tensor, ...]:
    """User, item and score of the best items of a batch; and of no user that anything is unproven."""
    log_probs = item_log_probs(request.model, layout, chunk_rows, request.user_cache, _named(request, users))
    found = best_items(log_probs, users, request.items, known, request.k, request.normalize == "items")
    return *found, torch.zeros(0, dtype=torch.bool, device="cpu")


def _find_titles(
    request: Request,
    prepared: Prepared,
    trie: Trie,
    users: NDArray[np.int64],
    known: Tensor | None,
    layout: SearchPrompts,
    chunk_rows: int | None,
) -> tuple[Tensor, ...]:
    """User, item and score of the best titles' items of a batch; and whether each user's list is unproven."""
    model, k, num_beams = request.model, request.k, request.num_beams
    best = None if known is None else trie.best_of(known).expand(users.size)
    allowed = request.items.mask(users).to(model.device) if best is None else best.items > float("-inf")
    running = trie.running_count(allowed).expand(users.size, -1)
    prompts = Prompts(
        model,
        layout,
        users.size * prepared.size.kept_rows,
        chunk_rows=chunk_rows,
        user_cache=request.user_cache,
        user_ids=_named(request, users),
    )
    unproven = torch.zeros(0, dtype=torch.bool, device="cpu")
    if request.normalize is not None:
        by_item = request.normalize == "items"
        found = normalized(score_titles(prompts, trie, prepared.passes), trie, running, k, by_item, best)
    elif request.search == "diverse":
        found = without_repeats(diverse_search(prompts, trie, running, num_beams))
    else:
        found, unproven = search_titles(
            prompts, trie, running, k, num_beams, request.length_penalty, request.max_expansions, best
        )
    return *items_of(found, trie, running, k, best), unproven


def _named(request: Request, users: NDArray[np.int64]) -> list[Any] | None:
    """What a user cache knows the users by."""
    return None if request.user_cache is None else [request.names[user] for user in users]


def generate_titles(
    model: SearchModel,
    histories: HistoriesLike,
    policy: AnyPolicy | None = None,
    num_beams: int = 20,
    leaves_only: bool = True,
    memory_budget: int | str | None = None,
    batch_size: int = 64,
    progress: bool = False,
) -> list[Ranked]:
    """The titles that the paper's diverse beam search generates, for ``metric="paper"`` of `patchkern.evaluation`.

    As ``recommend(search="diverse")``, but titles instead of items, repeats included: always ``num_beams`` entries per
    user. With the same model and tree, transformers 4.46 gives the same lists, but for two accidents that are left out
    here: the authors cut their longest title before its end token, and a group that ends there makes the padding token
    or some forbidden one, whichever comes first, less likely for the groups after it.

    Args:
        model, histories, policy, memory_budget, batch_size, progress: as in `recommend`.
        num_beams: groups, and titles per user; the paper decodes once with 10 and once with 20.
        leaves_only: search the authors' tree, in which a title that begins another title cannot be generated.

    Returns:
        Per user ``(item_id, log-probability)``, each title named by the first item that has it.
    """
    check_model(model)
    check_titles(model, "search", "diverse")
    policy = policy_of(model, policy)
    check_positive("num_beams", num_beams)
    check_batching(memory_budget, batch_size)
    given = Histories.coerce(histories)
    names = users_named(histories, len(given), None)
    histories, _ = known_histories(model.catalog, given, "error", names)
    trie = catalog_trie(model.catalog, model.prompt.response_end, model.device, leaves_only)
    everything = trie.running_count(torch.ones(1, len(model.catalog), dtype=torch.bool, device=model.device))
    size = SearchSize(num_beams, _kept_rows(trie, "diverse", num_beams), 0, trie.num_bytes)

    def compute(
        users: NDArray[np.int64], layout: SearchPrompts, chunk_rows: int | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        prompts = Prompts(model, layout, users.size * size.kept_rows, chunk_rows=chunk_rows)
        found = diverse_search(prompts, trie, everything.expand(users.size, -1), num_beams)
        owner = torch.arange(users.size, device=model.device).repeat_interleave(num_beams)
        return owner, trie.items[trie.begin[found.node]].flatten(), found.score.flatten()

    def begin(users: NDArray[np.int64]) -> Callable[[SearchPrompts, int | None], tuple[Tensor, Tensor, Tensor]]:
        return partial(compute, users)

    results: list[Ranked] = [[] for _ in range(len(histories))]
    for users, found in in_batches(
        model,
        histories,
        policy,
        size,
        trie.depth,
        begin,
        memory_budget,
        batch_size,
        progress,
        names,
    ):
        _collect(results, users, model, *found)
    return results


# ------------------------------------------------------------------ titles and items


def _kept_rows(trie: Trie, search: str, num_beams: int, max_expansions: int | None = None) -> int:
    """Tokens per user whose keys and values a search keeps at once, at most."""
    if search == "diverse":  # groups may choose the same tokens, and each keeps its own
        return num_beams * (trie.depth - 1)
    if max_expansions is None:
        return trie.live_rows(num_beams)
    return max(trie.fed_rows(num_beams), max_expansions)


def _collect(
    results: list[Ranked], users: NDArray[np.int64], model: SearchModel, user: Tensor, item: Tensor, score: Tensor
) -> None:
    owners = users[user.cpu().numpy()].tolist()
    item_ids = model.catalog.item_ids[item.cpu().numpy()].tolist()
    for owner, item_id, value in zip(owners, item_ids, score.tolist(), strict=True):
        results[owner].append((item_id, value))
