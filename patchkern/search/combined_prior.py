# SPDX-License-Identifier: Apache-2.0
"""Several priors as one, without any model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from patchkern.batch.arguments import check_count, check_number
from patchkern.batch.catalog import Catalog
from patchkern.batch.columns import is_sequence
from patchkern.batch.histories import Histories, HistoriesLike
from patchkern.evaluation.lists import check_catalog
from patchkern.search.arguments import check_answers_for
from patchkern.search.fingerprints import described
from patchkern.search.weights import fit_weights, shortlist

Prior = Callable[[Histories], Any]

_USERS_AT_ONCE = 256


class CombinedPrior:
    """The product of what several priors say, each to the power of its weight, made to sum to 1.

    What any of them finds impossible (-inf) is so whatever its weight, as in `recommend`.

    Beside a model, ``recommend(prior=[...], prior_weight=[...])`` takes several as they are; this is for their sum
    alone, as a recommender without a network.

    Args:
        priors: callables such as `TransitionPrior`, which return log-probabilities.
        weights: at least 0, one per prior.

    Raises:
        TypeError, ValueError: naming the argument.

    Examples:
        >>> import patchkern as pk
        >>> from patchkern.data import synthetic
        >>> data = synthetic(150, 200)
        >>> catalog = pk.Catalog.from_titles(data.titles, lambda title: list(title.encode()))
        >>> priors = [pk.LinearPrior(data, catalog), pk.TransitionPrior(data, catalog)]
        >>> val = data.samples("val")
        >>> both = pk.CombinedPrior.fit(priors, catalog, data.before(val), data.targets(val), exclude_seen=True)
        >>> both(data.before(data.samples("test"))).shape
        (165, 200)
    """

    def __init__(self, priors: Sequence[Prior], weights: Sequence[float]) -> None:
        _check_priors(priors)
        if not is_sequence(weights):
            raise TypeError(f"weights: expected one number per prior, got {weights!r}")
        for place, weight in enumerate(weights):
            check_number(f"weights[{place}]", weight, minimum=0)
        self.priors, self.weights = tuple(priors), tuple(map(float, weights))
        if len(self.weights) != len(self.priors):
            raise ValueError(f"weights: expected one per prior ({len(self.priors)}), got {len(self.weights)}")
        if self.catalog is not None:
            self._check_order(self.catalog)

    @classmethod
    def fit(
        cls,
        priors: Sequence[Prior],
        catalog: Catalog,
        histories: HistoriesLike,
        targets: ArrayLike,
        *,
        objective: str = "ndcg",
        k: int = 20,
        candidates: int = 100,
        exclude_seen: bool = False,
    ) -> CombinedPrior:
        """With the weights that rank best, the first prior having weight 1.

        Args:
            priors: at least two.
            catalog: the items, in whose order the priors answer.
            histories: B users of a validation split; no table of all of them is held.
            targets: ``(B,)`` the item that each took next.
            objective, k: as of `patchkern.search.weights.fit_weights`.
            candidates: of every prior and user, at least ``k``.
            exclude_seen: leave out the items of a user's history.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came.
        """
        check_catalog(catalog)
        _check_priors(priors)
        if len(priors) < 2:
            raise ValueError("priors: expected at least two to weigh against each other, got one")
        cls(priors, [1.0] * len(priors))._check_order(catalog)
        check_count("k", k, minimum=1)
        check_count("candidates", candidates, minimum=k)
        given = Histories.coerce(histories)
        expected = catalog.index_of(np.asarray(targets), "targets").astype(np.int64)
        if expected.shape != (len(given),) or not len(given):
            raise ValueError(f"targets: expected one per user ({len(given)}) and at least one, got {expected.shape}")
        parts, places = [], []
        for first in range(0, len(given), _USERS_AT_ONCE):
            users = np.arange(first, min(first + _USERS_AT_ONCE, len(given)))
            some = given.take(users)
            table = np.stack(_answers(priors, some), axis=2)
            if exclude_seen:
                seen = catalog.index_of(some.items, "histories")
                table[np.repeat(np.arange(users.size), some.lengths), seen] = -math.inf
            short, place = shortlist(table, expected[users], candidates)
            parts.append(short)
            places.append(place)
        scores = np.full((len(given), max(part.shape[1] for part in parts), len(priors)), -math.inf)
        for number, part in enumerate(parts):
            scores[number * _USERS_AT_ONCE :][: len(part), : part.shape[1]] = part
        weights = fit_weights(scores, np.concatenate(places), objective, k, depth=candidates)
        return cls(priors, [1.0, *weights.tolist()])

    def __call__(self, histories: HistoriesLike) -> NDArray[np.float64]:
        """``(B, n_items)`` log-probabilities; all -inf where every item is impossible."""
        total = np.zeros((1, 1))
        for table, weight in zip(_answers(self.priors, Histories.coerce(histories)), self.weights, strict=True):
            with np.errstate(invalid="ignore"):  # 0 times -inf, which is left out
                total = np.where((table == -math.inf) | (total == -math.inf), -math.inf, total + weight * table)
        top = total.max(axis=1, keepdims=True)
        total -= np.where(top == -math.inf, 0, top)
        share = np.exp(total).sum(axis=1, keepdims=True)
        total -= np.log(share, where=share > 0, out=np.zeros_like(share))
        return total

    @property
    def catalog(self) -> Catalog | None:
        """In whose order it answers; None where none of the priors says."""
        return next((one for prior in self.priors if (one := getattr(prior, "catalog", None)) is not None), None)

    def _check_order(self, catalog: Catalog) -> None:
        for place, prior in enumerate(self.priors):
            check_answers_for(f"priors[{place}]", prior, catalog)

    @property
    def fingerprint(self) -> str:
        """A hash of all that decides what it returns, as far as the priors have one."""
        return str(described([json.dumps(self.weights), *(described(prior) for prior in self.priors)]))


def _check_priors(priors: Any) -> None:
    if not is_sequence(priors) or not len(priors) or not all(callable(prior) for prior in priors):
        raise TypeError(f"priors: expected callables, at least one, got {priors!r}")


def _answers(priors: Sequence[Prior], histories: Histories) -> list[NDArray[np.float64]]:
    """``(B, n_items)`` of each prior, which it may return as an array or a tensor."""
    tables: list[NDArray[np.float64]] = []
    for place, prior in enumerate(priors):
        given = prior(histories)
        if isinstance(given, Tensor):
            given = given.detach().to("cpu", torch.float64).numpy()
        table = np.asarray(given, np.float64)
        shape = tables[0].shape if tables else (len(histories), *table.shape[1:])
        if table.ndim != 2 or table.shape != shape:
            raise ValueError(f"priors[{place}]: expected answers of shape {shape}, got {table.shape}")
        tables.append(table)
    return tables
