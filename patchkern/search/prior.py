# SPDX-License-Identifier: Apache-2.0
"""What other users' histories say about an item, as a prior for ``recommend(prior=...)``.

    prior = pk.TransitionPrior(data, model.catalog)               # fitted on the training interactions
    fit = pk.fit_prior_weight(model, data.before(val), data.targets(val), policy, prior, exclude_seen=True)
    model.recommend(histories, policy, prior=prior, prior_weight=fit.weight, exclude_seen=True)

A prior is any callable that takes `Histories` of B users and returns ``(B, n_items)`` floats in catalogue order. Those
here return the logarithm of a probability of every item, which is never 0, so that a weight means the same for any
data: the model's probability of a title is multiplied by the prior's probability of the item to the power of it.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from os import PathLike, fspath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from patchkern.batch.arguments import check_count, check_number
from patchkern.batch.catalog import Catalog
from patchkern.batch.histories import Histories, HistoriesLike
from patchkern.data.interactions import Interactions, check_interactions
from patchkern.evaluation.lists import check_catalog
from patchkern.evaluation.yardsticks import Follows, in_training
from patchkern.search import prior_file

_KIND = "transition_prior"
_SHAPES: prior_file.Shapes = {
    "before": (np.int64, ("pairs",)),
    "after": (np.int64, ("pairs",)),
    "weights": (np.float64, ("pairs",)),
    "count": (np.int64, ("n",)),
}


@dataclass(frozen=True)
class TransitionSettings:
    """How a `TransitionPrior` was fitted; its arguments."""

    recent: int = 10
    popularity: float = 0.2


class PopularityPrior:
    """The same for everybody: log of each item's share of the training interactions, one more counted for every item.

    Args:
        interactions: a data set with a training split.
        catalog: its items, and any others.

    Raises:
        TypeError, ValueError: naming the argument; an item in training that the catalogue does not hold.
    """

    def __init__(self, interactions: Interactions, catalog: Catalog) -> None:
        self.catalog = catalog
        _, _, count = trained_items(interactions, catalog)
        self.share: NDArray[np.float64] = share_of(count)
        """``(n_items,)``, sums to 1."""

    def __call__(self, histories: HistoriesLike) -> NDArray[np.float64]:
        """``(B, n_items)`` log-probabilities, a read-only view of one row."""
        return np.broadcast_to(np.log(self.share), (len(Histories.coerce(histories)), self.share.size))

    @property
    def fingerprint(self) -> str:
        """A hash of all that decides what it returns."""
        return hash_of(self.catalog, self.share)


class TransitionPrior:
    """Items that, in training, came soon after a user's latest items; with some popularity, so that none is impossible.

    The log of ``(1 - popularity) * transitions + popularity * share``: the scores of
    `patchkern.evaluation.transitions`, made to sum to 1 over the catalogue, and the ``share`` of `PopularityPrior`.
    Without a history, or after items that nothing ever followed, ``share`` alone.

    Args:
        interactions: a data set with a training split.
        catalog: its items, and any others.
        recent: how many of the latest items to look at, and how far apart two items may stand to be counted.
        popularity: above 0 and at most 1. On the validation splits of ml-100k and ml-1m 0.2 to 0.3 ranks best, better
            than transitions alone.

    Raises:
        TypeError, ValueError: naming the argument; an item in training that the catalogue does not hold.

    Examples:
        Two users went from "Alien" to "Aliens", and a third to another film.

        >>> import patchkern as pk
        >>> from patchkern.data import Interactions, leave_one_out
        >>> titles = {7: "Alien", 8: "Aliens", 9: "The Third Man"}
        >>> users, items = [1, 1, 2, 2, 3, 3], [7, 8, 7, 8, 7, 9]
        >>> data = leave_one_out(Interactions.from_columns(users, items, None, titles))
        >>> catalog = pk.Catalog.from_titles(titles, lambda title: list(title.encode()))
        >>> prior = pk.TransitionPrior(data, catalog)
        >>> prior(pk.Histories([7], [0, 1])).argmax(axis=1).tolist()  # in catalogue order
        [1]
    """

    def __init__(self, interactions: Interactions, catalog: Catalog, recent: int = 10, popularity: float = 0.2) -> None:
        check_count("recent", recent, minimum=1)
        check_popularity(popularity)
        users, items, count = trained_items(interactions, catalog)
        settings = TransitionSettings(int(recent), float(popularity))  # a file has no numbers of NumPy
        self._set(catalog, settings, Follows(users, items, count, recent), count)

    def _set(self, catalog: Catalog, settings: TransitionSettings, follows: Follows, count: NDArray[np.int64]) -> None:
        self.catalog, self.recent, self.popularity = catalog, settings.recent, settings.popularity
        self._follows, self._count, self.share = follows, count, share_of(count)

    def __call__(self, histories: HistoriesLike) -> NDArray[np.float64]:
        """``(B, n_items)`` log-probabilities."""
        latest = Histories.coerce(histories).latest(self.recent)
        index = self.catalog.index_of(latest.items, "histories").astype(np.int64)
        table = self._follows.score(index, latest.offsets)
        return log_mixture(table, self.share, self.popularity)

    @property
    def fingerprint(self) -> str:
        """A hash of all that decides what it returns."""
        own = np.array([self.recent, self.popularity])
        return hash_of(
            self.catalog, own, self.share, self._follows.columns, self._follows.weights, self._follows.offsets
        )

    def save(self, path: str | PathLike[str]) -> None:
        """Write it as one safetensors file, with the ids of its items, hashes of their titles and the catalogue's.

        Raises:
            ImportError: safetensors is missing.
        """
        items, follows = np.flatnonzero(self._count), self._follows
        before = np.repeat(np.arange(len(self.catalog)), np.diff(follows.offsets))
        tensors = {
            "before": np.searchsorted(items, before),
            "after": np.searchsorted(items, follows.columns),
            "weights": follows.weights,
            "count": self._count[items],
        }
        settings = asdict(TransitionSettings(self.recent, self.popularity))
        prior_file.write(path, _KIND, settings, tensors, self.catalog, items)

    @classmethod
    def load(cls, path: str | PathLike[str], catalog: Catalog) -> TransitionPrior:
        """What `save` wrote, for the same catalogue or a later one; items are matched by their ids.

        Items that are new have their popularity alone, one count; those that left the catalogue are forgotten.

        Raises:
            FileNotFoundError: there is none.
            ImportError: safetensors is missing.
            TypeError, ValueError: not such a file, or a damaged one; a catalogue that shares no item with it, or in
                which more than a tenth of those items have other titles.
        """
        found = prior_file.read(path, _KIND, TransitionSettings, _SHAPES, catalog)
        places = np.full(found.tensors["count"].size, -1)
        places[found.kept] = found.place
        pairs = [found.tensors[name] for name in ("before", "after")]
        if any(pair.size and not 0 <= pair.min() <= pair.max() < places.size for pair in pairs):
            raise ValueError(f"{fspath(path)}: expected pairs of its {places.size} items, got others")
        before, after = (places[pair] for pair in pairs)
        both = np.flatnonzero((before >= 0) & (after >= 0))
        order = both[np.lexsort((after[both], before[both]))]
        offsets = np.searchsorted(before[order], np.arange(len(catalog) + 1))
        count = np.zeros(len(catalog), np.int64)
        count[found.place] = found.tensors["count"][found.kept]
        prior = cls.__new__(cls)
        follows = Follows.of(after[order], found.tensors["weights"][order], offsets)
        prior._set(catalog, TransitionSettings(**found.settings), follows, count)
        return prior


def trained_items(
    interactions: Interactions, catalog: Catalog
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """User and catalogue index of every training interaction, and how often each item occurs."""
    check_interactions(interactions)
    check_catalog(catalog)
    users, item_ids = in_training(interactions)
    items = catalog.index_of(item_ids, "interactions").astype(np.int64)
    return users, items, np.bincount(items, minlength=len(catalog))


def check_popularity(popularity: Any) -> None:
    """Raise unless this can be a share that leaves no item impossible."""
    check_number("popularity", popularity)
    if not 0 < popularity <= 1:
        raise ValueError(f"popularity: expected above 0 and at most 1, got {popularity}")


def share_of(count: NDArray[np.int64]) -> NDArray[np.float64]:
    """``(n_items,)`` the probability of each item by its ``count``, one more for every item."""
    return (count + 1) / (count.sum() + count.size)


def log_mixture(table: NDArray[np.float64], share: NDArray[np.float64], popularity: float) -> NDArray[np.float64]:
    """``(B, n_items)`` log of scores of at least 0, made to sum to 1, and mixed with ``share``; of zeros, ``share``."""
    total = table.sum(axis=1, keepdims=True)
    scored = np.divide(table, total, out=np.tile(share, (len(table), 1)), where=total > 0)
    return np.log((1 - popularity) * scored + popularity * share)


def hash_of(catalog: Catalog, *arrays: NDArray[Any]) -> str:
    digest = hashlib.blake2b(catalog.fingerprint.encode(), digest_size=16)
    for array in arrays:
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
