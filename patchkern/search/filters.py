# SPDX-License-Identifier: Apache-2.0
"""Which items each user may be recommended: those allowed, less those seen; and what is known of them beforehand."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from patchkern.batch.catalog import Catalog
from patchkern.batch.columns import is_sequence
from patchkern.batch.frozen import freeze
from patchkern.batch.histories import Histories
from patchkern.search.arguments import check_answers_for, priors_of


class ItemFilter:
    """The items of every user, kept as small as they were given.

    Args:
        catalog: all items.
        histories: of the users.
        allowed_items: None for every item, one sequence of item ids for all users, one sequence per user, or booleans
            in catalogue order: ``(n_items,)`` for all users or ``(B, n_items)``, an array or a tensor.
        exclude_seen: leave out the items of a user's history.
        names: what the users are called in errors; 0, 1, 2, ... where not given.
        drop_unknown: leave out ids of ``allowed_items`` that the catalogue does not hold, and count them.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """

    def __init__(
        self,
        catalog: Catalog,
        histories: Histories,
        allowed_items: Any,
        exclude_seen: bool,
        names: Sequence[Hashable] | None = None,
        drop_unknown: bool = False,
    ) -> None:
        self._n_users, self._n_items = len(histories), len(catalog)
        self.names: Sequence[Hashable] = range(self._n_users) if names is None else names
        self.num_unknown = 0
        self._drop_unknown = drop_unknown
        self._mask: NDArray[np.bool_] | None = None  # (1 or B, n_items)
        self._listed: Histories | None = None  # distinct catalogue indices of every user
        self._has_allowed = allowed_items is not None
        if self._has_allowed:
            self._read(catalog, allowed_items)
        self._seen: Histories | None = None
        if exclude_seen:
            index = catalog.index_of(histories.items, "histories")
            owner = np.repeat(np.arange(self._n_users), histories.lengths)
            self._seen = self._distinct(owner, index)

    def _read(self, catalog: Catalog, given: Any) -> None:
        if isinstance(given, Tensor):
            given = given.detach().cpu().numpy()
        if isinstance(given, np.ndarray) and given.dtype == bool:
            if given.shape not in ((self._n_items,), (self._n_users, self._n_items)):
                raise ValueError(
                    f"allowed_items: expected booleans of shape ({self._n_users}, {self._n_items}), users and items "
                    f"of the catalog, or ({self._n_items},), got shape {given.shape}"
                )
            self._mask = given.reshape(-1, self._n_items)
            return
        if not is_sequence(given):
            raise TypeError(f"allowed_items: expected item ids, one sequence per user or None, got {given!r}")
        if not (len(given) and is_sequence(given[0])):
            self._mask = np.zeros((1, self._n_items), bool)
            self._mask[0, self._index(catalog, given, "allowed_items")] = True
            return
        if len(given) != self._n_users:
            raise ValueError(f"allowed_items: expected one sequence per user ({self._n_users}), got {len(given)}")
        indices = [
            self._index(catalog, items, f"allowed_items[{name!r}]")
            for name, items in zip(self.names, given, strict=True)
        ]
        owner = np.repeat(np.arange(self._n_users), [len(index) for index in indices])
        self._listed = self._distinct(owner, np.concatenate(indices))

    def _index(self, catalog: Catalog, given: Any, argument: str) -> NDArray[np.int32]:
        if not self._drop_unknown:
            return catalog.index_of(given, argument)
        index = catalog.find(given, argument)
        known = index[index >= 0]
        self.num_unknown += index.size - known.size
        return known

    def _distinct(self, owner: NDArray[np.int64], index: NDArray[np.integer[Any]]) -> Histories:
        pairs = np.unique(owner * self._n_items + index)
        counts = np.bincount(pairs // self._n_items, minlength=self._n_users)
        return Histories(freeze(pairs % self._n_items), freeze(np.append(0, np.cumsum(counts))))

    def check(self, k: int) -> None:
        """Raise unless every user may get ``k`` items."""
        allowed, left = self._counts()
        short = np.flatnonzero(left < k)
        if short.size:
            user = int(short[0])
            name = f"user {self.names[user]!r}"
            whose = f"the allowed_items of {name}" if self._has_allowed else "the items of the catalog"
            if self._seen is not None:
                unseen = "that it has not seen" if self._has_allowed else f"that {name} has not seen"
                whose = f"{whose} ({allowed[user]}) {unseen}"
            raise ValueError(
                f"k: expected at most {left[user]}, {whose}, got {k}; {short.size} of {self._n_users} users have fewer "
                f'than {k} left, and short="allow" gives them what there is'
            )

    def _counts(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """``(B,)`` how many items each user is allowed, and how many of those it has not seen."""
        allowed = np.full(self._n_users, self._n_items)
        if self._mask is not None:
            allowed[:] = self._mask.sum(axis=1)
        elif self._listed is not None:
            allowed = self._listed.lengths
        if self._seen is None:
            return allowed, allowed
        owner, seen = np.repeat(np.arange(self._n_users), self._seen.lengths), self._seen.items
        if self._mask is not None:
            counted = self._mask[owner if len(self._mask) != 1 else 0, seen]
        elif self._listed is not None:
            listed = np.repeat(np.arange(self._n_users), self._listed.lengths) * self._n_items + self._listed.items
            counted = np.isin(owner * self._n_items + seen, listed)
        else:
            counted = np.ones(len(seen), bool)
        return allowed, allowed - np.bincount(owner[counted], minlength=self._n_users)

    @property
    def is_open(self) -> bool:
        """Whether every user may get every item."""
        return not self._has_allowed and self._seen is None

    def mask(self, users: NDArray[np.int64]) -> Tensor:
        """``(len(users), n_items)`` bool in catalogue order, on the CPU; one row for all where nothing is left out."""
        if self.is_open:
            return torch.ones(1, self._n_items, dtype=torch.bool, device="cpu")
        mask = np.zeros((users.size, self._n_items), bool)
        if self._mask is not None:
            mask[:] = self._mask[users] if len(self._mask) > 1 else self._mask
        elif self._listed is not None:
            self._set(mask, self._listed.take(users), True)
        else:
            mask[:] = True
        if self._seen is not None:
            self._set(mask, self._seen.take(users), False)
        return torch.from_numpy(mask)

    @staticmethod
    def _set(mask: NDArray[np.bool_], chosen: Histories, value: bool) -> None:
        mask[np.repeat(np.arange(len(mask)), chosen.lengths), chosen.items] = value


class ItemPrior:
    """The sum of what is known of every user's items, each prior times its weight.

    Args:
        catalog: all items.
        histories: of the users.
        items: which of them each user may get.
        prior: floats in catalogue order, ``(n_items,)`` for all users or ``(B, n_items)``, an array or a tensor; or a
            callable that returns the latter for the `Histories` of B users. -inf leaves an item out. Or a list of such.
        weight: at least 0; or one per prior.
        k: items that every user must be left with; 0 where lists may be shorter.
        dtype: of the scores.
        name: of the prior, in errors.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came. Of what a callable returns, when it
            does; of all else, before anything else runs.
    """

    _AT_ONCE = 1024  # users

    def __init__(
        self,
        catalog: Catalog,
        histories: Histories,
        items: ItemFilter,
        prior: Any,
        weight: Any,
        k: int,
        dtype: torch.dtype,
        name: str = "prior",
    ) -> None:
        several = isinstance(prior, (list, tuple))
        priors, self._weights = priors_of(prior if several else [prior], weight)
        names = [f"{name}[{place}]" for place in range(len(priors))] if several else [name]
        self._priors = list(zip(names, priors, strict=True))
        self._catalog, self._histories, self._items, self._k = catalog, histories, items, k
        self._dtype = dtype
        for own_name, given in self._priors:
            if callable(given):
                check_answers_for(own_name, given, catalog)
            else:
                _check_floats(own_name, given, [(len(catalog),), (len(histories), len(catalog))])
        if any(callable(given) for given in priors):
            return
        for first in range(0, len(histories), self._AT_ONCE):
            users = np.arange(first, min(first + self._AT_ONCE, len(histories)))
            self.of(users, torch.device("cpu"))

    @property
    def user_bytes(self) -> int:
        """What `of` takes on the way, per user: the values as they came, as they are returned, and what decides."""
        return len(self._catalog) * (8 + (4 + (len(self._priors) > 1)) * self._dtype.itemsize + 4)

    def of(self, users: NDArray[np.int64], device: torch.device) -> Tensor:
        """``(len(users), n_items)``, -inf for what a user may not get; one row where all users have the same."""
        weighted = torch.zeros(1, len(self._catalog), dtype=self._dtype, device=device)
        for (name, prior), weight in zip(self._priors, self._weights, strict=True):
            values = self._values(name, prior, users).to(device)
            left_out = (values == -math.inf) | (weighted == -math.inf)
            weighted = torch.where(left_out, -math.inf, weighted + values.to(self._dtype) * weight)
            is_bad = ~(weighted.isfinite() | left_out)
            if bool(is_bad.any()):
                raise self._error(name, weight, values, is_bad, users)
        allowed = self._items.mask(users).to(device)
        weighted = torch.where(allowed, weighted, -math.inf)
        left = (weighted > -math.inf).sum(dim=1)
        short = (left < self._k).nonzero()
        if len(short):
            at = int(short[0])
            name = self._items.names[users[at]]
            raise ValueError(
                f"k: expected at most {int(left[at])}, the items of user {name!r} that prior does not leave out, got "
                f'{self._k}; short="allow" gives the user what there is'
            )
        return weighted

    def _values(self, name: str, prior: Any, users: NDArray[np.int64]) -> Tensor:
        """``(len(users) or 1, n_items)`` as they are given."""
        if callable(prior):
            given = prior(self._histories.take(users))
            _check_floats(name, given, [(users.size, len(self._catalog))], "the callable to return ")
        else:
            given = prior if prior.ndim == 1 else prior[users]
        values = (
            given.detach() if isinstance(given, Tensor) else torch.tensor(np.ascontiguousarray(given), device="cpu")
        )
        return values.reshape(-1, len(self._catalog))

    def _error(self, name: str, weight: float, values: Tensor, is_bad: Tensor, users: NDArray[np.int64]) -> ValueError:
        user, item = is_bad.nonzero()[0].tolist()
        values = values.expand(len(is_bad), -1)
        return ValueError(
            f"{name}: expected -inf, or numbers that are finite in {self._dtype} when multiplied by prior_weight="
            f"{weight}, got {float(values[user, item])} for user "
            f"{self._items.names[users[user]]!r} and item {self._catalog.item_ids.item(item)!r}"
        )


def _check_floats(name: str, given: Any, shapes: list[tuple[int, ...]], whose: str = "") -> None:
    if not isinstance(given, (np.ndarray, Tensor)):
        expected = f"{whose}an array or a tensor" + ("" if whose else ", or a callable that returns one")
        raise TypeError(f"{name}: expected {expected}, got {type(given).__name__}")
    if isinstance(given, Tensor) and given.layout != torch.strided:
        raise TypeError(f"{name}: expected {whose}a dense tensor, got {given.layout}")
    is_float = (
        given.is_floating_point() if isinstance(given, Tensor) else given.dtype in (np.half, np.single, np.double)
    )
    if not is_float:
        raise TypeError(f"{name}: expected {whose}floating-point numbers, got {given.dtype}")
    if tuple(given.shape) not in shapes:
        wanted = " or ".join(str(shape) for shape in shapes)
        raise ValueError(
            f"{name}: expected {whose}shape {wanted}, users and items of the catalog, got {tuple(given.shape)}"
        )
