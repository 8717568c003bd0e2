# SPDX-License-Identifier: Apache-2.0
"""A closed-form item-item model as a prior, and the file that it is kept in."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from patchkern.batch.catalog import Catalog
from patchkern.batch.catalog_diff import SHARE_OF_RENAMED
from patchkern.batch.histories import Histories
from patchkern.data.interactions import Interactions
from patchkern.evaluation.linear import ItemRegression
from patchkern.search.prior import hash_of, log_mixture, share_of, trained_items

FORMAT_VERSION = 1


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
        if not 0 < popularity <= 1:
            raise ValueError(f"popularity: expected above 0 and at most 1, got {popularity}")
        users, items, count = trained_items(interactions, catalog)
        model = ItemRegression.fit(users, items, form, penalty, half_life, recent, memory_budget)
        self._set(catalog, LinearSettings(form, penalty, half_life, recent, popularity), model, count)

    def _set(self, catalog: Catalog, settings: LinearSettings, model: ItemRegression, count: NDArray[np.int64]) -> None:
        self.catalog, self.settings, self._model, self._count = catalog, settings, model, count
        self.share = share_of(count)

    def __call__(self, histories: Histories) -> NDArray[np.float64]:
        """``(B, n_items)`` log-probabilities."""
        latest = histories.latest(self.settings.recent)
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
        tensors = {"weights": self._model.weights, "count": self._count[items], "titles": _titles(self.catalog, items)}
        description = {
            "format_version": FORMAT_VERSION,
            "settings": asdict(self.settings),
            "catalog": self.catalog.fingerprint,
            "titles": _kind(self.catalog),
            "item_ids": self.catalog.item_ids[items].tolist(),
        }
        target = Path(path)
        temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
        try:
            _safetensors().numpy.save_file(tensors, temporary, {"linear_prior": json.dumps(description)})
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)

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
        if not isinstance(catalog, Catalog):
            raise TypeError(f"catalog: expected a Catalog, got {type(catalog).__name__}")
        name = os.fspath(path)
        if not Path(path).is_file():
            raise FileNotFoundError(f"path: expected a file, got {name!r}")
        description, weights, count, titles = _read(name)
        ids = np.array(description["item_ids"], catalog.item_ids.dtype.kind if not description["item_ids"] else None)
        same_kind = ids.dtype.kind == catalog.item_ids.dtype.kind
        place = catalog.find(ids).astype(np.int64) if same_kind else np.full(ids.size, -1)
        kept = np.flatnonzero(place >= 0)
        if ids.size and not kept.size:
            raise ValueError(f"catalog: expected items that {name!r} knows, such as {ids.item(0)!r}, got none")
        place = place[kept]
        if catalog.fingerprint != description["catalog"] and _kind(catalog) == description["titles"]:
            other = np.flatnonzero(_titles(catalog, place) != titles[kept])
            if other.size > SHARE_OF_RENAMED * kept.size:
                raise ValueError(
                    f"catalog: expected items with the titles that {name!r} was fitted on, got other titles for "
                    f"{other.size} of {kept.size} item ids that are the same, such as {ids[kept].item(other[0])!r}"
                )
        settings = LinearSettings(**description["settings"])
        if kept.size < ids.size:
            weights = weights[np.ix_(kept, kept)]
        counts = np.zeros(len(catalog), np.int64)
        counts[place] = count[kept]
        prior = cls.__new__(cls)
        prior._set(catalog, settings, ItemRegression(place, weights, settings.half_life, settings.recent), counts)
        return prior


def _read(name: str) -> tuple[dict[str, Any], NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]:
    """What a file says and holds, checked."""
    safetensors = _safetensors()
    try:
        with safetensors.safe_open(name, "numpy") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in ("weights", "count", "titles")}
        description = json.loads(metadata["linear_prior"])
        if description["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format_version: expected {FORMAT_VERSION}, got {description['format_version']}")
        n = len(description["item_ids"])
        expected = {"weights": (np.float32, (n, n)), "count": (np.int64, (n,)), "titles": (np.int64, (n,))}
        for key, (dtype, shape) in expected.items():
            if tensors[key].dtype != dtype or tensors[key].shape != shape:
                found = f"{tensors[key].dtype} {tensors[key].shape}"
                raise ValueError(f"{key}: expected {np.dtype(dtype)} {shape}, got {found}")
        LinearSettings(**description["settings"])
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{name}: not a linear prior that this version reads: {error}") from error
    return description, tensors["weights"], tensors["count"], tensors["titles"]


def _kind(catalog: Catalog) -> str:
    return "tokens" if catalog.titles is None else "text"


def _titles(catalog: Catalog, items: NDArray[np.int64]) -> NDArray[np.int64]:
    """``(n,)`` a hash of each title: of its text, which no tokenizer changes, or of its tokens where there is none."""
    texts = catalog.titles
    encoded = (
        catalog.tokens(item).tobytes() if texts is None else texts[item].encode("utf-8", "surrogatepass")
        for item in items.tolist()
    )
    hashes = b"".join(hashlib.blake2b(title, digest_size=8).digest() for title in encoded)
    return np.frombuffer(hashes, "<i8").astype(np.int64)


def _safetensors() -> ModuleType:
    try:
        import safetensors
        import safetensors.numpy
    except ImportError as error:
        raise ImportError(
            "a prior's file needs safetensors, which is not installed: pip install safetensors"
        ) from error
    return safetensors
