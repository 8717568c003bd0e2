# SPDX-License-Identifier: Apache-2.0
"""The arguments of a search, checked by name before anything runs."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from patchkern.batch.arguments import check_number
from patchkern.batch.catalog import Catalog
from patchkern.batch.columns import is_sequence
from patchkern.batch.experts import Experts
from patchkern.batch.histories import Histories
from patchkern.batch.preference_memory import PreferenceMemory
from patchkern.budget.search import parse_bytes
from patchkern.search.user_cache import UserCache

SEARCHES = ("beam", "exact", "diverse", "items")
NORMALIZATIONS = ("titles", "items")
SHORT = ("error", "allow")
UNKNOWN = ("error", "drop")
_TOO_MANY = 1 << 56  # of anything; a few times as many are still an int64


def users_named(given: Any, n_users: int, user_ids: Any) -> list[Hashable]:
    """What the caller calls the users: ``user_ids``, else the keys of a mapping, else 0, 1, 2, ..."""
    if user_ids is None:
        return list(given) if isinstance(given, Mapping) else list(range(n_users))
    if not is_sequence(user_ids):
        raise TypeError(f"user_ids: expected a sequence of names, got {type(user_ids).__name__}")
    if len(user_ids) != n_users:
        raise ValueError(f"user_ids: expected one per user ({n_users}), got {len(user_ids)}")
    names: list[Hashable] = user_ids.tolist() if isinstance(user_ids, np.ndarray) else list(user_ids)
    for place, name in enumerate(names):
        if not isinstance(name, Hashable):
            raise TypeError(f"user_ids[{place}]: expected something hashable, got {type(name).__name__}")
    return names


def check_cache(user_cache: Any) -> None:
    if user_cache is not None and not isinstance(user_cache, UserCache):
        raise TypeError(f"user_cache: expected a UserCache or None, got {type(user_cache).__name__}")


def check_states(user_states: Any, policy: Any) -> None:
    if user_states is None:
        return
    lacking = [name for name in ("check", "reading") if not hasattr(user_states, name)]
    if lacking:
        raise TypeError(f"user_states: expected UserStates or None, got {type(user_states).__name__}")
    if not isinstance(policy, (Experts, PreferenceMemory)):
        raise ValueError(f"user_states: expected None under {type(policy).__name__}, which compresses no old items")


def check_choice(name: str, value: Any, kinds: Sequence[str], otherwise: str = "") -> None:
    if not isinstance(value, str) or value not in kinds:
        raise ValueError(f"{name}: expected one of {', '.join(kinds)}{otherwise}, got {value!r}")


def check_leniency(short: Any, unknown: Any) -> None:
    check_choice("short", short, SHORT)
    check_choice("unknown", unknown, UNKNOWN)


def known_histories(
    catalog: Catalog, histories: Histories, unknown: str, names: Sequence[Hashable]
) -> tuple[Histories, NDArray[np.int64]]:
    """The histories without the items that the catalogue does not hold, and how many those were, ``(B,)``.

    Raises:
        ValueError: there are some, and ``unknown`` is ``"error"``.
    """
    is_known = catalog.find(histories.items, "histories") >= 0
    counts = np.diff(np.append(0, np.cumsum(~is_known))[histories.offsets])
    if not counts.any():
        return histories, counts
    if unknown == "error":
        user, at = int(np.flatnonzero(counts)[0]), int(np.flatnonzero(~is_known)[0])
        got, position = histories.items[at : at + 1].tolist()[0], at - int(histories.offsets[user])
        raise ValueError(
            f"histories: expected item ids of the catalog, got {got!r} at position {position} of user {names[user]!r}; "
            f'{counts.sum()} items of {np.count_nonzero(counts)} users are unknown, which unknown="drop" leaves out'
        )
    return histories.keep(is_known), counts


def of_users(name: str, value: Any, users: NDArray[np.int64], n_users: int) -> Any:
    """The part of an argument that is about some users; what is about all of them stays."""
    if name == "prior" and isinstance(value, (list, tuple)):
        return [of_users(f"prior[{place}]", one, users, n_users) for place, one in enumerate(value)]
    is_array = isinstance(value, (np.ndarray, Tensor))
    if value.ndim != 2 if is_array else not (is_sequence(value) and len(value) and is_sequence(value[0])):
        return value
    if len(value) != n_users:
        raise ValueError(f"{name}: expected one row per user ({n_users}), got {len(value)}")
    return value[users] if is_array else [value[user] for user in users.tolist()]


def check_search(search: Any, length_penalty: Any, normalize: Any, max_expansions: Any) -> None:
    check_choice("search", search, SEARCHES)
    check_number("length_penalty", length_penalty)
    if normalize is not None:
        check_choice("normalize", normalize, NORMALIZATIONS, " or None")
    if search == "diverse" and length_penalty != 0:
        raise ValueError(f'length_penalty: expected 0 with search="diverse", which has its own, got {length_penalty}')
    if search == "items":
        if length_penalty != 0:
            raise ValueError(
                f'length_penalty: expected 0 with search="items", which has no titles, got {length_penalty}'
            )
        if normalize == "titles":
            raise ValueError('normalize: expected "items" or None with search="items", which has no titles')
    elif normalize is not None and search != "exact":
        raise ValueError(f'normalize: expected None or search="exact", got {normalize!r} with {search!r}')
    if normalize is not None and length_penalty != 0:
        raise ValueError(f"normalize: expected None with a length_penalty of {length_penalty}, got {normalize!r}")
    if max_expansions is not None:
        check_positive("max_expansions", max_expansions)
        if search != "exact":
            raise ValueError(f'max_expansions: expected None or search="exact", got {max_expansions} with {search!r}')
        if normalize is not None:
            raise ValueError(f"max_expansions: expected None with normalize={normalize!r}, got {max_expansions}")


def check_lengths(length_penalty: float, longest: int, dtype: torch.dtype) -> None:
    """Raise where ``length ** length_penalty`` of titles of up to so many tokens leaves no room for what it divides."""
    if abs(length_penalty) * math.log(longest) > math.log(torch.finfo(dtype).max) / 2:
        raise ValueError(
            f"length_penalty: expected one with which {longest} tokens, as the longest title has, to the power of it "
            f"are a number that scores of {dtype} can be divided by, got {length_penalty}"
        )


def priors_of(prior: Any, prior_weight: Any = 1.0) -> tuple[list[Any], list[float]]:
    """The priors that a caller means, one or several or None, and the weight of each, checked."""
    several = isinstance(prior, (list, tuple))
    if several and not prior:
        raise TypeError("prior: expected at least one, or None, got an empty sequence")
    priors = list(prior) if several else [] if prior is None else [prior]
    if is_sequence(prior_weight):
        if not several or len(prior_weight) != len(priors):
            expected = f"a number, or one per prior ({len(priors)})" if several else "a number for one prior"
            raise ValueError(f"prior_weight: expected {expected}, got {len(prior_weight)} of them")
        named = [(f"prior_weight[{place}]", weight) for place, weight in enumerate(prior_weight)]
    else:
        named = [("prior_weight", prior_weight)] * max(len(priors), 1)
    for name, weight in named:
        check_number(name, weight)
        if weight < 0:
            raise ValueError(f"{name}: expected at least 0, got {weight}")
    if not priors and prior_weight != 1:
        raise ValueError(f"prior: expected one for a prior_weight of {prior_weight}, got None")
    return priors, [float(weight) for _, weight in named[: len(priors)]]


def check_answers_for(name: str, prior: Any, catalog: Catalog) -> None:
    """Raise a ValueError for a prior that says which catalogue's order it answers in, where the items are others."""
    other = getattr(prior, "catalog", None)
    if not isinstance(other, Catalog) or other is catalog:
        return
    if not np.array_equal(other.item_ids, catalog.item_ids):
        raise ValueError(
            f"{name}: expected answers for these {len(catalog):,} items in their order, got those of "
            f"{type(prior).__name__} for {len(other):,} items of another catalog; make or load it with the model's"
        )


def check_prior(search: str, prior: Any, prior_weight: Any) -> None:
    priors_of(prior, prior_weight)
    if prior is not None and search == "diverse":
        raise ValueError('prior: expected None with search="diverse", whose protocol has none')


def check_positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name}: expected an integer, got {value!r}")
    if not 1 <= value < _TOO_MANY:
        raise ValueError(f"{name}: expected at least 1{'' if value < 1 else f' and below {_TOO_MANY}'}, got {value}")


def check_batching(memory_budget: Any, batch_size: Any) -> None:
    if memory_budget is not None:
        parse_bytes("memory_budget", memory_budget)
    check_positive("batch_size", batch_size)
