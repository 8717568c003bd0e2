# SPDX-License-Identifier: Apache-2.0
"""The arguments of a search, checked by name before anything runs."""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Any

import numpy as np

from patchkern.batch.histories import Histories, is_sequence
from patchkern.budget.search import parse_bytes
from patchkern.search.user_cache import UserCache

SEARCHES = ("beam", "exact", "diverse")
NORMALIZATIONS = ("titles", "items")


def cache_names(histories: Histories, user_cache: Any, user_ids: Any) -> list[Hashable]:
    """What the users are called in the cache; nothing without one."""
    if user_cache is None:
        if user_ids is not None:
            raise ValueError("user_ids: expected None without a user_cache")
        return []
    if not isinstance(user_cache, UserCache):
        raise TypeError(f"user_cache: expected a UserCache or None, got {type(user_cache).__name__}")
    if user_ids is None:
        return list(range(len(histories)))
    if not is_sequence(user_ids):
        raise TypeError(f"user_ids: expected a sequence of names, got {type(user_ids).__name__}")
    if len(user_ids) != len(histories):
        raise ValueError(f"user_ids: expected one per user ({len(histories)}), got {len(user_ids)}")
    return list(user_ids)


def check_search(search: Any, length_penalty: Any, normalize: Any, max_expansions: Any) -> None:
    if search not in SEARCHES:
        raise ValueError(f"search: expected one of {', '.join(SEARCHES)}, got {search!r}")
    _check_number("length_penalty", length_penalty)
    if normalize not in (None, *NORMALIZATIONS):
        raise ValueError(f"normalize: expected one of {', '.join(NORMALIZATIONS)} or None, got {normalize!r}")
    if search == "diverse" and length_penalty != 0:
        raise ValueError(f'length_penalty: expected 0 with search="diverse", which has its own, got {length_penalty}')
    if normalize is not None and search != "exact":
        raise ValueError(f'normalize: expected None or search="exact", got {normalize!r} with {search!r}')
    if normalize is not None and length_penalty != 0:
        raise ValueError(f"normalize: expected None with a length_penalty of {length_penalty}, got {normalize!r}")
    if max_expansions is not None:
        check_positive("max_expansions", max_expansions)
        if search != "exact":
            raise ValueError(f'max_expansions: expected None or search="exact", got {max_expansions} with {search!r}')
        if normalize is not None:
            raise ValueError(f"max_expansions: expected None with normalize={normalize!r}, got {max_expansions}")


def check_prior(search: str, prior: Any, prior_weight: Any) -> None:
    _check_number("prior_weight", prior_weight)
    if prior_weight < 0:
        raise ValueError(f"prior_weight: expected at least 0, got {prior_weight}")
    if prior is None and prior_weight != 1:
        raise ValueError(f"prior: expected one for a prior_weight of {prior_weight}, got None")
    if prior is not None and search == "diverse":
        raise ValueError('prior: expected None with search="diverse", whose protocol has none')


def _check_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value}")


def check_positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name}: expected an integer, got {value!r}")
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")


def check_batching(memory_budget: Any, batch_size: Any) -> None:
    if memory_budget is not None:
        parse_bytes("memory_budget", memory_budget)
    check_positive("batch_size", batch_size)
