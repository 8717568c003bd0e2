# SPDX-License-Identifier: Apache-2.0
"""Hit rate, NDCG, MRR and recall of recommendation lists: by item, and the way the PatchRec authors count."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from patchkern.batch.arguments import check_count
from patchkern.batch.catalog import Catalog
from patchkern.batch.histories import Histories
from patchkern.data.samples import chosen_of
from patchkern.evaluation.errors import Difference, Estimate, estimate, paired_difference, user_numbers
from patchkern.evaluation.lists import are_lists, check_catalog, listed_items

METRICS = ("strict", "paper")


@dataclass(frozen=True)
class Evaluation:
    """HR@k, NDCG@k and MRR@k of one set of recommendation lists, each with its standard error over users.

    Where a sample has one target, Recall@k is HR@k. Where it has several, they are all as relevant: HR@k says whether
    any is among the first k, Recall@k which share of them, NDCG@k is of the best possible order, MRR@k of the first.

    Attributes:
        metric: ``"strict"`` or ``"paper"``.
        ks: the list lengths counted.
        ranks: ``(B,)`` int64, the target's place in each sample's list, from 1; 0 where it is not in the list. With
            ``offsets``, of all samples' targets one after the other.
        ambiguous: ``(B,)`` bool, samples with a target that shares its title with another item of the catalogue.
        users: ``(B,)`` int64, whose sample each is; None: everyone's own.
        offsets: ``(B + 1,)`` int64, sample ``b`` has ``ranks[offsets[b]:offsets[b + 1]]``, not none; None: one each.
    """

    metric: str
    ks: tuple[int, ...]
    ranks: NDArray[np.int64]
    ambiguous: NDArray[np.bool_]
    users: NDArray[np.int64] | None = None
    offsets: NDArray[np.int64] | None = None

    @property
    def num_samples(self) -> int:
        return int(self.ambiguous.size)

    @property
    def num_ambiguous(self) -> int:
        """Samples with a target that shares its title with another item."""
        return int(self.ambiguous.sum())

    @property
    def num_users(self) -> int:
        """Users that the samples are of."""
        return int(self.num_samples if self.users is None else np.unique(self.users).size)

    @property
    def first_ranks(self) -> NDArray[np.int64]:
        """``(B,)`` the place of the target that comes first in each sample's list, 0 where none is in it."""
        last = np.iinfo(np.int64).max
        first = np.where(self.ranks > 0, self.ranks, last)
        if self.offsets is not None and self.num_samples:
            first = np.minimum.reduceat(first, self.offsets[:-1])
        return np.where(first < last, first, 0)

    def hits(self, k: int) -> NDArray[np.float64]:
        """``(B,)`` 1 where a target is among the first ``k``, else 0."""
        return self._each(np.maximum, self._listed(k))

    def recalls(self, k: int) -> NDArray[np.float64]:
        """``(B,)`` the share of the targets that are among the first ``k``."""
        return self._each(np.add, self._listed(k)) / self._sizes

    def gains(self, k: int) -> NDArray[np.float64]:
        """``(B,)`` NDCG: sum of 1 / log2(rank + 1) over the targets among the first ``k``, by the largest possible."""
        gain = self._listed(k) / np.log2(np.maximum(self.ranks, 1) + 1)
        best = np.append(0, np.cumsum(1 / np.log2(np.arange(k) + 2)))
        return self._each(np.add, gain) / best[np.minimum(self._sizes, k)]

    def reciprocals(self, k: int) -> NDArray[np.float64]:
        """``(B,)`` 1 / rank of the first target where it is among the first ``k``, else 0."""
        return self._each(np.maximum, self._listed(k) / np.maximum(self.ranks, 1))

    def hr(self, k: int) -> float:
        """HR@k: share of samples with a target among the first ``k``; NaN without samples."""
        return self.estimate(self.hits(k)).mean

    def recall(self, k: int) -> float:
        """Recall@k: mean share of a sample's targets among the first ``k``; NaN without samples."""
        return self.estimate(self.recalls(k)).mean

    def ndcg(self, k: int) -> float:
        """NDCG@k; NaN without samples."""
        return self.estimate(self.gains(k)).mean

    def mrr(self, k: int) -> float:
        """MRR@k: mean reciprocal rank; NaN without samples."""
        return self.estimate(self.reciprocals(k)).mean

    def estimate(self, values: ArrayLike) -> Estimate:
        """Mean of ``(B,)`` values of these samples, with its standard error over users."""
        return estimate(values, self.users)

    def per_sample(self) -> dict[str, NDArray[np.float64]]:
        """``HR@k``, ``NDCG@k`` and ``MRR@k`` for every k, of each sample; with several targets also ``Recall@k``."""
        measures = {"HR": self.hits, "NDCG": self.gains, "MRR": self.reciprocals}
        if self.offsets is not None:
            measures["Recall"] = self.recalls
        return {f"{name}@{k}": of(k) for name, of in measures.items() for k in self.ks}

    def as_dict(self) -> dict[str, float]:
        """Mean of all that `per_sample` has, each followed by its standard error over users as ``... ±``."""
        row = {}
        for name, values in self.per_sample().items():
            row[name], row[f"{name} ±"] = self.estimate(values)
        return row

    def take(self, samples: ArrayLike) -> Evaluation:
        """Of some of the samples: their numbers, or ``(B,)`` bool."""
        chosen = chosen_of(samples)
        users = None if self.users is None else self.users[chosen]
        if self.offsets is None:
            return replace(self, ranks=self.ranks[chosen], ambiguous=self.ambiguous[chosen], users=users)
        lists = Histories(self.ranks, self.offsets).take(np.arange(self.num_samples)[chosen])
        return replace(self, ranks=lists.items, ambiguous=self.ambiguous[chosen], users=users, offsets=lists.offsets)

    def minus(self, other: Evaluation) -> dict[str, Difference]:
        """By how much it is above another of the same samples, in all that `per_sample` has: see `paired_difference`.

        Raises:
            ValueError: the other is of another number of samples, of other users or counts other list lengths.
        """
        if not isinstance(other, Evaluation):
            raise TypeError(f"other: expected an Evaluation, got {type(other).__name__}")
        for name in ("metric", "ks"):
            if getattr(other, name) != getattr(self, name):
                raise ValueError(f"other: expected {name} {getattr(self, name)}, got {getattr(other, name)}")
        if other.num_samples != self.num_samples:
            raise ValueError(f"other: expected {self.num_samples} samples, got {other.num_samples}")
        if not np.array_equal(self._sizes, other._sizes):
            raise ValueError("other: expected the same samples, got others: they have other numbers of targets")
        if not np.array_equal(_users(self), _users(other)):
            raise ValueError("other: expected the same samples, got others: their users differ")
        pairs = zip(self.per_sample().items(), other.per_sample().values(), strict=True)
        return {name: paired_difference(own, theirs, self.users) for (name, own), theirs in pairs}

    def __repr__(self) -> str:
        return f"Evaluation({self})"

    def __str__(self) -> str:
        numbers = "  ".join(f"{name} {self.estimate(values)}" for name, values in self.per_sample().items())
        of = "" if self.users is None else f" of {self.num_users} users"
        return f"{numbers}  ({self.metric}, {self.num_samples} samples{of}, {self.num_ambiguous} with a shared title)"

    @property
    def _sizes(self) -> NDArray[np.int64]:
        """``(B,)`` targets of each sample."""
        return np.ones(self.num_samples, np.int64) if self.offsets is None else np.diff(self.offsets)

    def _listed(self, k: int) -> NDArray[np.float64]:
        """1 for every target that is among the first ``k``, else 0."""
        check_count("k", k, minimum=1)
        return ((self.ranks > 0) & (self.ranks <= k)).astype(np.float64)

    def _each(self, combine: np.ufunc, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """``(B,)`` values of targets, combined over those of each sample."""
        if self.offsets is None or not self.num_samples:
            return values
        combined: NDArray[np.float64] = combine.reduceat(values, self.offsets[:-1])
        return combined


def evaluate(
    recommendations: Sequence[Sequence[Any]],
    targets: ArrayLike,
    ks: Sequence[int] = (10, 20),
    metric: str = "strict",
    *,
    catalog: Catalog,
    users: ArrayLike | None = None,
) -> Evaluation:
    """Compare each list with the item that came next, or with several.

    ``metric="strict"`` compares items. Items whose titles have equal tokens cannot be told apart by a model that
    generates titles, so they stand for each other: a list is ranked by its distinct titles, and the target counts at
    the rank of its title. `Evaluation.ambiguous` says where that mattered.

    ``metric="paper"`` counts as the PatchRec authors do, for comparison with their numbers: every title that *begins
    with* the target's title is a hit ("Alien" when "Aliens" comes out), and the last such entry of the list gives the
    rank. They decode once for each k and look at the whole list, so do the same: give the lists of
    `patchkern.search.recommend.generate_titles` with ``num_beams=k`` and a single k, once for each.

    Args:
        recommendations: one list per sample, best first: item ids, or ``(item_id, score)`` as `recommend` returns
            them.
        targets: ``(B,)`` item ids; or several for each sample, as a sequence of sequences or `patchkern.Histories`,
            such as those of ``Interactions.target_sets``. Items of one sample whose titles are equal count once.
        ks: list lengths to count.
        metric: ``"strict"`` or ``"paper"``.
        catalog: the items' titles; ``"paper"`` needs them as text.
        users: ``(B,)`` whose sample each is, integers or strings, such as ``Samples.users``. Where users have several,
            errors without them are too small.

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

        Several targets each.

        >>> result = evaluate([["c", "a"], ["a", "b"]], targets=[["c", "b"], ["a"]], ks=[2], catalog=catalog)
        >>> result.hr(2), result.recall(2), round(result.ndcg(2), 3)
        (1.0, 0.75, 0.807)
    """
    if metric not in METRICS:
        raise ValueError(f"metric: expected one of {', '.join(METRICS)}, got {metric!r}")
    check_catalog(catalog)
    if not hasattr(recommendations, "__len__"):
        raise TypeError(f"recommendations: expected one list per sample, got {type(recommendations).__name__}")
    texts = catalog.titles or ()
    if metric == "paper" and not texts:
        raise ValueError('catalog: metric="paper" compares titles as text, got a catalog without titles')
    ks = _list_lengths(ks)
    if are_lists(targets):
        if metric == "paper":
            raise ValueError('targets: expected one item id each with metric="paper", which knows no others, got lists')
        several: Any = targets
        return _with_several(recommendations, Histories.coerce(several, "targets"), ks, catalog, users)
    target_index = catalog.index_of(targets, "targets")
    if len(recommendations) != target_index.size:
        raise ValueError(f"targets: expected one per list ({len(recommendations)}), got {target_index.size}")
    title = _title_numbers(catalog)
    listed, offsets = listed_items(recommendations, catalog)
    if metric == "strict":
        ranks = _strict_ranks(title[listed], offsets, title[target_index])
    else:
        titles = [texts[item] for item in listed.tolist()]
        ends = zip(
            *(offsets[part].tolist() for part in (slice(-1), slice(1, None))), target_index.tolist(), strict=True
        )
        ranks = np.array([_paper_rank(titles[begin:end], texts[target]) for begin, end, target in ends], np.int64)
    ambiguous = np.bincount(title)[title[target_index]] > 1
    numbers = None if users is None else user_numbers(users, target_index.size)
    return Evaluation(metric, ks, ranks, ambiguous, numbers)


def _with_several(
    recommendations: Sequence[Sequence[Any]],
    targets: Histories,
    ks: tuple[int, ...],
    catalog: Catalog,
    users: ArrayLike | None,
) -> Evaluation:
    if len(recommendations) != len(targets):
        raise ValueError(f"targets: expected one list per list ({len(recommendations)}), got {len(targets)}")
    empty = np.flatnonzero(targets.lengths == 0)
    if empty.size:
        raise ValueError(f"targets[{empty[0]}]: expected at least one item id, got none")
    title = _title_numbers(catalog)
    wanted = title[catalog.index_of(targets.items, "targets")]
    shared = np.bincount(title)[wanted] > 1
    ranks: list[int] = []
    offsets = [0]
    items, begins = listed_items(recommendations, catalog)
    for user in range(len(targets)):
        own = dict.fromkeys(wanted[targets.offsets[user] : targets.offsets[user + 1]].tolist())
        listed = title[items[begins[user] : begins[user + 1]]].tolist()
        ranks += [_strict_rank(listed, one) for one in own]
        offsets.append(len(ranks))
    ambiguous = np.logical_or.reduceat(shared, targets.offsets[:-1]) if len(targets) else np.zeros(0, bool)
    numbers = None if users is None else user_numbers(users, len(targets))
    return Evaluation("strict", ks, np.array(ranks, np.int64), ambiguous, numbers, np.array(offsets))


def _users(found: Evaluation) -> NDArray[np.int64]:
    return np.arange(found.num_samples) if found.users is None else found.users


def _list_lengths(ks: Sequence[int]) -> tuple[int, ...]:
    if not isinstance(ks, Collection):
        raise TypeError(f"ks: expected integers, got {ks!r}, which is none or one")
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


def _strict_ranks(
    listed: NDArray[np.int64], offsets: NDArray[np.int64], wanted: NDArray[np.int64]
) -> NDArray[np.int64]:
    """``(B,)`` of `_strict_rank` for lists one after the other, list ``b`` at ``offsets[b]:offsets[b + 1]``."""
    row = np.repeat(np.arange(wanted.size), np.diff(offsets))
    order = np.lexsort((listed, row))
    again = np.zeros(listed.size, np.bool_)
    again[order[1:]] = (np.diff(row[order]) == 0) & (np.diff(listed[order]) == 0)
    distinct = np.append(0, np.cumsum(~again))
    at = np.flatnonzero(~again & (listed == wanted[row]))
    ranks = np.zeros(wanted.size, np.int64)
    ranks[row[at]] = distinct[at + 1] - distinct[offsets[row[at]]]
    return ranks


def _strict_rank(listed: list[int], target: int) -> int:
    """Rank of the target among the distinct titles of a list, 0 if it is not there."""
    distinct = list(dict.fromkeys(listed))
    return distinct.index(target) + 1 if target in distinct else 0


def _paper_rank(generated: list[str], target: str) -> int:
    """Rank of the last title that begins with the target's, 0 if there is none."""
    matches = [rank for rank, title in enumerate(generated, start=1) if title.startswith(target)]
    return matches[-1] if matches else 0
