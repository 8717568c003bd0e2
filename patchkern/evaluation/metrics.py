# SPDX-License-Identifier: Apache-2.0
"""Hit rate and NDCG of recommendation lists: by item, and the way the PatchRec authors count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from patchkern.batch.catalog import Catalog

METRICS = ("strict", "paper")


@dataclass(frozen=True)
class Evaluation:
    """HR@k and NDCG@k of one set of recommendation lists.

    Attributes:
        metric: ``"strict"`` or ``"paper"``.
        ks: the list lengths counted.
        ranks: ``(B,)`` int64, the target's place in each user's list, from 1; 0 where it is not in the list.
        ambiguous: ``(B,)`` bool, users whose target shares its title with another item of the catalogue.
    """

    metric: str
    ks: tuple[int, ...]
    ranks: NDArray[np.int64]
    ambiguous: NDArray[np.bool_]

    @property
    def num_ambiguous(self) -> int:
        """Users whose target shares its title with another item."""
        return int(self.ambiguous.sum())

    def hits(self, k: int) -> NDArray[np.float64]:
        """``(B,)`` 1 where the target is among the first ``k``, else 0."""
        return ((self.ranks > 0) & (self.ranks <= k)).astype(np.float64)

    def gains(self, k: int) -> NDArray[np.float64]:
        """``(B,)`` 1 / log2(rank + 1) where the target is among the first ``k``, else 0: NDCG with one target."""
        return self.hits(k) / np.log2(np.maximum(self.ranks, 1) + 1)

    def hr(self, k: int) -> float:
        """HR@k: share of users whose target is among the first ``k``; NaN without users."""
        return _mean(self.hits(k))

    def ndcg(self, k: int) -> float:
        """NDCG@k; NaN without users."""
        return _mean(self.gains(k))

    def as_dict(self) -> dict[str, float]:
        """``HR@k`` and ``NDCG@k`` for every k, each followed by its standard error over users as ``... ±``."""
        row = {}
        for name, per_user in (("HR", self.hits), ("NDCG", self.gains)):
            for k in self.ks:
                row[f"{name}@{k}"] = _mean(per_user(k))
                row[f"{name}@{k} ±"] = standard_error(per_user(k))
        return row

    def __repr__(self) -> str:
        return f"Evaluation({self})"

    def __str__(self) -> str:
        row = self.as_dict()
        numbers = "  ".join(f"{name} {row[name]:.4f} ± {row[name + ' ±']:.4f}" for name in row if "±" not in name)
        return f"{numbers}  ({self.metric}, {self.ranks.size} samples, {self.num_ambiguous} with a shared title)"


def evaluate(
    recommendations: Sequence[Sequence[Any]],
    targets: ArrayLike,
    ks: Sequence[int] = (10, 20),
    metric: str = "strict",
    *,
    catalog: Catalog,
) -> Evaluation:
    """Compare each user's list with the item that came next.

    ``metric="strict"`` compares items. Items whose titles have equal tokens cannot be told apart by a model that
    generates titles, so they stand for each other: a list is ranked by its distinct titles, and the target counts at
    the rank of its title. `Evaluation.ambiguous` says where that mattered.

    ``metric="paper"`` counts as the PatchRec authors do, for comparison with their numbers: every title that *begins
    with* the target's title is a hit ("Alien" when "Aliens" comes out), and the last such entry of the list gives the
    rank. They decode once for each k and look at the whole list, so do the same: give the lists of
    `patchkern.search.recommend.generate_titles` with ``num_beams=k`` and a single k, once for each.

    Args:
        recommendations: one list per user, best first: item ids, or ``(item_id, score)`` as `recommend` returns them.
        targets: ``(B,)`` item ids.
        ks: list lengths to count.
        metric: ``"strict"`` or ``"paper"``.
        catalog: the items' titles; ``"paper"`` needs them as text.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Examples:
        >>> import patchkern as pk
        >>> from patchkern.evaluation import evaluate
        >>> catalog = pk.Catalog.from_token_ids([5, 6, 7], [0, 1, 2, 3], item_ids=["a", "b", "c"])
        >>> result = evaluate([["c", "a"], ["a", "b"]], targets=["c", "b"], ks=[1, 2], catalog=catalog)
        >>> result.ranks.tolist()
        [1, 2]
        >>> result.hr(1), round(result.ndcg(2), 3)
        (0.5, 0.815)
    """
    if metric not in METRICS:
        raise ValueError(f"metric: expected one of {', '.join(METRICS)}, got {metric!r}")
    if not isinstance(catalog, Catalog):
        raise TypeError(f"catalog: expected a Catalog, got {type(catalog).__name__}")
    texts = catalog.titles or ()
    if metric == "paper" and not texts:
        raise ValueError('catalog: metric="paper" compares titles as text, got a catalog without titles')
    ks = _list_lengths(ks)
    target_index = catalog.index_of(np.asarray(targets), "targets")
    if len(recommendations) != target_index.size:
        raise ValueError(f"targets: expected one per list ({len(recommendations)}), got {target_index.size}")
    title = _title_numbers(catalog)
    ranks = np.zeros(target_index.size, np.int64)
    for user, (row, target) in enumerate(zip(recommendations, target_index.tolist(), strict=True)):
        ids = [entry[0] if isinstance(entry, tuple) else entry for entry in row]
        listed = catalog.index_of(np.asarray(ids), f"recommendations[{user}]").tolist()
        if metric == "strict":
            ranks[user] = _strict_rank(title[listed].tolist(), int(title[target]))
        else:
            ranks[user] = _paper_rank([texts[item] for item in listed], texts[target])
    ambiguous = np.bincount(title)[title[target_index]] > 1
    return Evaluation(metric, ks, ranks, ambiguous)


def standard_error(values: NDArray[np.float64]) -> float:
    """Standard error of the mean of ``(B,)`` values; NaN for fewer than two."""
    return float(values.std(ddof=1) / np.sqrt(values.size)) if values.size > 1 else float("nan")


def _mean(values: NDArray[np.float64]) -> float:
    return float(values.mean()) if values.size else float("nan")


def _list_lengths(ks: Sequence[int]) -> tuple[int, ...]:
    for k in ks:
        if isinstance(k, bool) or not isinstance(k, (int, np.integer)):
            raise TypeError(f"ks: expected integers, got {k!r}")
        if k < 1:
            raise ValueError(f"ks: expected integers of at least 1, got {k}")
    if not len(ks):
        raise ValueError("ks: expected at least one list length, got none")
    return tuple(int(k) for k in ks)


def _title_numbers(catalog: Catalog) -> NDArray[np.int64]:
    """(n_items,) equal for items whose titles have equal tokens."""
    numbers: dict[bytes, int] = {}
    titles = (catalog.tokens(item).tobytes() for item in range(len(catalog)))
    return np.fromiter((numbers.setdefault(title, len(numbers)) for title in titles), np.int64, len(catalog))


def _strict_rank(listed: list[int], target: int) -> int:
    """Rank of the target among the distinct titles of a list, 0 if it is not there."""
    distinct = list(dict.fromkeys(listed))
    return distinct.index(target) + 1 if target in distinct else 0


def _paper_rank(generated: list[str], target: str) -> int:
    """Rank of the last title that begins with the target's, 0 if there is none."""
    matches = [rank for rank, title in enumerate(generated, start=1) if title.startswith(target)]
    return matches[-1] if matches else 0
