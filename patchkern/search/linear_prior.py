# SPDX-License-Identifier: Apache-2.0
"""A closed-form item-item model as a prior."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from patchkern.batch.catalog import Catalog
from patchkern.batch.histories import Histories, HistoriesLike
from patchkern.data.interactions import Interactions
from patchkern.evaluation.linear import ItemRegression
from patchkern.search import prior_file
from patchkern.search.prior import check_popularity, hash_of, log_mixture, share_of, trained_items

_KIND = "linear_prior"
_SHAPES: prior_file.Shapes = {"weights": (np.float32, ("n", "n")), "count": (np.int64, ("n",))}


@dataclass(frozen=True)
class LinearSettings:
    """How a `LinearPrior` was fitted; its arguments."""

    form: str = "ridge"
    penalty: float = 1000.0
    half_life: float = 4.0
    recent: int = 30
    popularity: float = 0.2


class LinearPrior:
    """Items that a linear regression expects after a user's latest items; with some popularity: none is impossible.

    The log of ``(1 - popularity) * linear + popularity * share``: the scores of `patchkern.evaluation.linear`, negative
    ones taken for 0, made to sum to 1 over the catalogue, and the ``share`` of `PopularityPrior`. Items that do not
    occur in training, and all of them without a history, have the latter alone.

    A regression on what was taken is an estimate of a probability already. So these are closer to what users of
    ml-100k and ml-1m took next (validation split, 6.15 and 6.93 nats) than a softmax of the scores whatever its
    temperature (6.34 and 7.26), and rank as the scores do.

    Args:
        interactions: a data set with a training split.
        catalog: its items, and any others.
        form, penalty, half_life, recent, memory_budget: as of `patchkern.evaluation.linear`. Fitting takes seconds for
            thousands of items, and the more, the third power of their number; the prior keeps 4 bytes for every pair.
        popularity: above 0 and at most 1. 0.2 is the most likely on validation for ml-100k, 0.3 for ml-1m.

    Raises:
        TypeError, ValueError: naming the argument; an item in training that the catalogue does not hold; too many items
            for ``memory_budget``.

    Examples:
        Two users went from "Alien" to "Aliens", and a third to another film.

        >>> import patchkern as pk
        >>> from patchkern.data import Interactions, leave_one_out
        >>> titles = {7: "Alien", 8: "Aliens", 9: "The Third Man"}
        >>> users, items = [1, 1, 1, 1, 2, 2, 2, 2, 3, 3], [7, 8, 9, 9, 7, 8, 9, 9, 7, 9]
        >>> data = leave_one_out(Interactions.from_columns(users, items, None, titles))
        >>> catalog = pk.Catalog.from_titles(titles, lambda title: list(title.encode()))
        >>> prior = pk.LinearPrior(data, catalog, penalty=0.1)
        >>> prior(pk.Histories([7], [0, 1])).argmax(axis=1).tolist()  # in catalogue order
        [1]
    """

    def __init__(
        self,
        interactions: Interactions,
        catalog: Catalog,
        form: str = "ridge",
        penalty: float = 1000.0,
        half_life: float = 4.0,
        recent: int = 30,
        popularity: float = 0.2,
        *,
        memory_budget: int | str = "16GiB",
    ) -> None:
        check_popularity(popularity)
        users, items, count = trained_items(interactions, catalog)
        model = ItemRegression.fit(users, items, form, penalty, half_life, recent, memory_budget)
        # a file has no numbers of NumPy
        settings = LinearSettings(form, float(penalty), float(half_life), int(recent), float(popularity))
        self._set(catalog, settings, model, count)

    def _set(self, catalog: Catalog, settings: LinearSettings, model: ItemRegression, count: NDArray[np.int64]) -> None:
        self.catalog, self.settings, self._model, self._count = catalog, settings, model, count
        self.share = share_of(count)

    def __call__(self, histories: HistoriesLike) -> NDArray[np.float64]:
        """``(B, n_items)`` log-probabilities."""
        latest = Histories.coerce(histories).latest(self.settings.recent)
        index = self.catalog.index_of(latest.items, "histories").astype(np.int64)
        table = self._model.score(index, latest.offsets, len(self.catalog)).astype(np.float64)
        return log_mixture(np.maximum(table, 0, out=table), self.share, self.settings.popularity)

    @property
    def fingerprint(self) -> str:
        """A hash of all that decides what it returns."""
        text = json.dumps(asdict(self.settings), sort_keys=True)
        return hash_of(self.catalog, np.array(text), self._count, self._model.items, self._model.weights)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as one safetensors file, with the ids of its items, hashes of their titles and the catalogue's.

        Raises:
            ImportError: safetensors is missing.
        """
        items = self._model.items
        tensors: dict[str, NDArray[Any]] = {"weights": self._model.weights, "count": self._count[items]}
        prior_file.write(path, _KIND, asdict(self.settings), tensors, self.catalog, items)

    @classmethod
    def load(cls, path: str | os.PathLike[str], catalog: Catalog) -> LinearPrior:
        """What `save` wrote, for the same catalogue or a later one; items are matched by their ids.

        Items that are new have their popularity alone, one count; those that left the catalogue are forgotten.

        Raises:
            FileNotFoundError: there is none.
            ImportError: safetensors is missing.
            TypeError, ValueError: not such a file, or a damaged one; a catalogue that shares no item with it, or in
                which more than a tenth of those items have other titles.
        """
        found = prior_file.read(path, _KIND, LinearSettings, _SHAPES, catalog)
        settings, weights = LinearSettings(**found.settings), found.tensors["weights"]
        if found.kept.size < len(weights):
            weights = weights[np.ix_(found.kept, found.kept)]
        count = np.zeros(len(catalog), np.int64)
        count[found.place] = found.tensors["count"][found.kept]
        prior = cls.__new__(cls)
        prior._set(catalog, settings, ItemRegression(found.place, weights, settings.half_life, settings.recent), count)
        return prior
