# SPDX-License-Identifier: Apache-2.0
"""How much to trust a prior: its weight, found on a validation split."""

from __future__ import annotations

import math
import warnings
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from patchkern.batch.arguments import check_count
from patchkern.batch.catalog import Catalog
from patchkern.batch.columns import is_sequence
from patchkern.batch.histories import Histories, HistoriesLike
from patchkern.batch.policy_kinds import AnyPolicy
from patchkern.evaluation.metrics import Evaluation, evaluate
from patchkern.search.arguments import check_leniency, known_histories, of_users, priors_of, users_named
from patchkern.search.filters import ItemFilter, ItemPrior
from patchkern.search.protocol import SearchModel
from patchkern.search.recommend import recommend
from patchkern.search.summary import PartialListsWarning
from patchkern.search.weights import OBJECTIVES, fit_weights

WEIGHTS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0, 50.0)
"""Of one prior: what the curve of `fit_prior_weight` shows beside the weight that it found."""

_USERS_AT_ONCE = 256


class PriorFit(NamedTuple):
    """What `fit_prior_weight` found."""

    weight: Any
    """a float, or, of several priors, one float for each; 0 where a prior does not help"""
    curve: dict[Any, Evaluation]
    """weights, ascending, and what each gives; the one found is among them"""


def fit_prior_weight(
    model: SearchModel,
    histories: HistoriesLike,
    targets: ArrayLike,
    policy: AnyPolicy | None,
    prior: Any,
    *,
    weights: Sequence[Any] | None = None,
    objective: str = "ndcg",
    k: int = 20,
    candidates: int = 50,
    exclude_seen: bool = False,
    allowed_items: Any = None,
    short: str = "error",
    unknown: str = "error",
    user_ids: Sequence[Hashable] | None = None,
    **options: Any,
) -> PriorFit:
    """The weight of a prior that ranks best, or of several, found with two searches for all weights together.

    The candidates of a user are the model's best titles, found by a beam of ``candidates``, and as many of every
    prior's best items that are not among them, whose titles are then scored. `patchkern.search.weights.fit_weights`
    finds the weights on these. An item that is not among them is missing at all weights, so with few candidates the
    weights in between look worse than they are.

    Weights are compared by NDCG@k and not by HR@k: it moves with every place that a target gains, where the hit rate
    stands still until one crosses the k-th place and then jumps by a whole sample. Still one sample more or less would
    move the best weight far; an average over weights nearby does not.

    Args:
        model: the model.
        histories: B users of a validation split; the test split would make the result look better than it is.
        targets: ``(B,)`` the item that each took next.
        policy, exclude_seen, allowed_items: as in ``recommend``.
        prior: as in ``recommend``; a list of several.
        weights: compare these alone, as they are, and take the best, of equally good ones the first in ascending order:
            numbers of at least 0, or, of several priors, one such number for each. None: find them, from 0 to 128.
        objective: ``"ndcg"`` or ``"nll"``, as of `patchkern.search.weights.fit_weights`; the latter moves least from
            sample to sample.
        k: of the NDCG.
        candidates: at least ``k``, of the model and of every prior; fewer where a user may get fewer items.
        short: users for whom fewer than ``k`` items are left: ``"error"`` refuses the call, ``"allow"`` leaves their
            samples out of the fit.
        unknown: as in ``recommend``; ``"drop"`` also leaves samples out of the fit whose target the catalogue does not
            hold, for no weight can rank them.
        user_ids: names of the B users, as in ``recommend``.
        options: further ones of ``recommend``, such as ``batch_size``, ``memory_budget``, ``length_penalty``, and
            ``user_cache``, with which the prompts are computed once and not twice.

    Warns:
        PartialListsWarning: items or samples were left out.

    Raises:
        TypeError, ValueError: naming the argument, the user, what was expected and what came; no sample is left.

    Examples:
        What a model says that has learned nothing is better left to the prior.

        >>> import patchkern as pk
        >>> from patchkern.data import synthetic
        >>> from patchkern.models.scratch import from_scratch
        >>> data = synthetic(num_users=50, num_items=40, num_genres=4)
        >>> hf_model, catalog, prompt = from_scratch(data.titles, hidden_size=16, intermediate_size=32)
        >>> model, prior = pk.PatchedCausalLM(hf_model, catalog, prompt), pk.TransitionPrior(data, catalog)
        >>> val = data.samples("val")
        >>> histories, targets = data.before(val), data.targets(val)
        >>> fit = pk.fit_prior_weight(model, histories, targets, pk.ItemPatches(1), prior, k=5, candidates=10)
        >>> fit.curve[fit.weight].ndcg(5) > fit.curve[0.0].ndcg(5)
        True
        >>> lists = model.recommend(histories, pk.ItemPatches(1), k=5, prior=prior, prior_weight=fit.weight)
    """
    several = isinstance(prior, (list, tuple))
    priors, _ = priors_of(prior if several else [prior])
    tried = _weights(weights, len(priors) if several else None)
    if objective not in OBJECTIVES:
        raise ValueError(f"objective: expected one of {', '.join(OBJECTIVES)}, got {objective!r}")
    check_count("k", k, minimum=1)
    check_count("candidates", candidates, minimum=k)
    check_leniency(short, unknown)
    given, catalog = Histories.coerce(histories), model.catalog
    n_users = len(given)
    names = users_named(histories, n_users, user_ids)
    target_ids = np.asarray(targets)
    expected = catalog.find(target_ids, "targets")
    if expected.shape != (n_users,) or n_users == 0:
        raise ValueError(f"targets: expected one per user ({n_users}) and at least one, got shape {expected.shape}")
    gone = np.flatnonzero(expected < 0)
    if gone.size and unknown == "error":
        got = target_ids[gone[:1]].tolist()[0]
        raise ValueError(f"targets: expected item ids of the catalog, got {got!r} for user {names[gone[0]]!r}")
    kept, _ = known_histories(catalog, given, unknown, names)
    items = ItemFilter(catalog, kept, allowed_items, exclude_seen, names, unknown == "drop")
    least = k if short == "error" else 0
    items.check(least)
    known = [
        ItemPrior(catalog, kept, items, one, 1.0, least, torch.float64, f"prior[{place}]" if several else "prior")
        for place, one in enumerate(priors)
    ]
    shared: dict[str, Any] = {"allowed_items": allowed_items, "exclude_seen": exclude_seen, "prior": prior}
    options |= {"user_ids": names, "unknown": unknown}

    counts = torch.cat([allowed.sum(dim=1) for _, _, allowed in _tables(known, n_users)]).numpy()
    useful = np.flatnonzero((expected >= 0) & (counts >= k))
    if useful.size < n_users:
        told = (
            f"{n_users - useful.size} of {n_users} samples have targets that the catalog does not hold, or fewer than"
        )
        if not useful.size:
            raise ValueError(f"targets: expected samples to fit on, got none: {told} k={k} items left")
        message = f"targets: {told} k={k} items left; they were left out of the fit"
        warnings.warn(PartialListsWarning(message), stacklevel=2)
        shared |= {name: of_users(name, shared[name], useful, n_users) for name in ("allowed_items", "prior")}
        options["user_ids"] = [names[user] for user in useful]
        own = shared.pop("prior")
        return fit_prior_weight(
            model, given.take(useful), target_ids[useful], policy, own, weights=weights, objective=objective, k=k,
            candidates=candidates,
            **shared, **options,
        )  # fmt: skip
    left = int(counts.min())
    own = min(candidates, left)
    found = recommend(model, given, policy, own, own, prior_weight=0.0, **shared, **options)
    scored = _Candidates.of(found, catalog, known)
    further = min(candidates * len(priors), left - own)
    if further:
        items_too = list(catalog.item_ids[scored.missing(known, candidates, further)])
        # as many beams as items: nothing is cut, so these are their scores and no search
        found_too = recommend(model, given, policy, further, further, allowed_items=items_too, **options)
        found = [one + two for one, two in zip(found, found_too, strict=True)]
        scored = _Candidates.of(found, catalog, known)

    def rated(weight: Any) -> Evaluation:
        rows = catalog.item_ids[scored.best(np.atleast_1d(weight), k)].tolist()
        return evaluate(rows, target_ids, [k], catalog=catalog)

    if weights is not None:
        curve = {weight: rated(weight) for weight in tried}
        return PriorFit(max(tried, key=lambda weight: curve[weight].ndcg(k)), curve)
    fitted = fit_weights(
        np.concatenate([scored.score[:, :, None], scored.prior], axis=2), scored.places(expected), objective, k,
        depth=max(k, scored.item.shape[1]),
    ).tolist()  # fmt: skip
    best = tuple(fitted) if several else fitted[0]
    return PriorFit(best, {weight: rated(weight) for weight in sorted({*tried, best})})


class _Candidates(NamedTuple):
    """Some items of every user, in catalogue order, and what the model and the priors give them."""

    item: NDArray[np.int64]  # (B, C)
    score: NDArray[np.float64]  # (B, C)
    prior: NDArray[np.float64]  # (B, C, P)

    @classmethod
    def of(cls, found: list[list[tuple[Any, float]]], catalog: Catalog, known: list[ItemPrior]) -> _Candidates:
        item = np.stack([catalog.index_of([item for item, _ in row]) for row in found]).astype(np.int64)
        score = np.array([[score for _, score in row] for row in found])
        order = item.argsort(axis=1)
        item, score = (np.take_along_axis(x, order, axis=1) for x in (item, score))
        prior = [
            torch.stack([table.gather(1, torch.from_numpy(item[users])) for table in tables], dim=2)
            for users, tables, _ in _tables(known, len(item))
        ]
        return cls(item, score, torch.cat(prior).numpy())

    def missing(self, known: list[ItemPrior], candidates: int, count: int) -> NDArray[np.int64]:
        """``(B, count)`` further items: ``candidates`` of the best by the first prior, then by the next, ..."""
        others = []
        for users, tables, allowed in _tables(known, len(self.item)):
            free = allowed.scatter(1, torch.from_numpy(self.item[users]), False)
            chosen: list[torch.Tensor] = []
            for place, table in enumerate(tables):
                number = min(candidates, count - place * candidates)
                if number > 0:
                    chosen.append(table.masked_fill(~free, -math.inf).topk(number, dim=1).indices)
                    free.scatter_(1, chosen[-1], False)
            others.append(torch.cat(chosen, dim=1))
        return torch.cat(others).numpy()

    def places(self, items: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
        """``(B,)`` where each user's item is among these, -1 where it is not."""
        same = self.item == items[:, None]
        return np.where(same.any(axis=1), same.argmax(axis=1), -1)

    def best(self, weights: NDArray[np.float64], k: int) -> NDArray[np.int64]:
        """``(B, k)`` items with the best sum."""
        order = (-(self.score + self.prior @ weights)).argsort(axis=1, kind="stable")
        return np.take_along_axis(self.item, order[:, :k], axis=1)


def _tables(
    known: list[ItemPrior], n_users: int
) -> Iterator[tuple[NDArray[np.int64], list[torch.Tensor], torch.Tensor]]:
    """Some users at a time, their ``(n, n_items)`` priors, and which items none of these leaves out."""
    for first in range(0, n_users, _USERS_AT_ONCE):
        users = np.arange(first, min(first + _USERS_AT_ONCE, n_users))
        tables = [one.of(users, torch.device("cpu")).expand(users.size, -1) for one in known]
        allowed = torch.stack([table > -math.inf for table in tables]).all(dim=0)
        yield users, tables, allowed


def _weights(weights: Any, several: int | None) -> list[Any]:
    """What to try, ascending: numbers, or tuples of as many as there are priors."""
    if weights is None:
        return list(WEIGHTS) if several is None else [(0.0,) * several]
    if not is_sequence(weights) or len(weights) == 0:
        raise TypeError(f"weights: expected a sequence of numbers, got {weights!r}")
    tried = sorted({_number(one) if several is None else _one_each(one, several) for one in weights})
    if not all(math.isfinite(number) and number >= 0 for one in tried for number in np.atleast_1d(one)):
        raise ValueError(f"weights: expected finite numbers of at least 0, got {list(weights)}")
    return tried


def _one_each(weight: Any, several: int) -> tuple[float, ...]:
    if not is_sequence(weight) or len(weight) != several:
        raise ValueError(f"weights: expected one number per prior ({several}) in each, got {weight!r}")
    return tuple(map(_number, weight))


def _number(weight: Any) -> float:
    if isinstance(weight, bool) or not isinstance(weight, (int, float, np.integer, np.floating)):
        raise TypeError(f"weights: expected numbers, got {weight!r}")
    return float(weight)
