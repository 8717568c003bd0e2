# SPDX-License-Identifier: Apache-2.0
"""What a search needs of the memory, kept from call to call: counting a model takes as long as a short search."""

from __future__ import annotations

import threading
from weakref import WeakKeyDictionary

from torch import nn

from patchkern.budget.search import SearchCost, SearchSize
from patchkern.search.model_state import model_form
from patchkern.search.protocol import SearchModel

COSTS_PER_MODEL = 8
"""Costs that are kept of a model, those used last: of so many kinds of search."""

_Key = tuple[SearchSize, object]
_kept: WeakKeyDictionary[nn.Module, list[tuple[_Key, SearchCost]]] = WeakKeyDictionary()
_lock = threading.Lock()


def search_cost(model: SearchModel, size: SearchSize) -> SearchCost:
    """The `SearchCost` of a model as it is now: counted by the first call for it, then kept as long as the model.

    Raises:
        TypeError, ValueError: as `SearchCost`.
    """
    key = size, model_form(model)
    with _lock:
        kept = _kept.get(model.hf_model, [])
        cost = next((cost for known, cost in kept if known == key), None)
    if cost is None:
        cost = SearchCost(model, size)
    with _lock:
        others = [entry for entry in _kept.get(model.hf_model, []) if entry[0] != key]
        _kept[model.hf_model] = [*others, (key, cost)][-COSTS_PER_MODEL:]
    return cost
