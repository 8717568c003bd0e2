# SPDX-License-Identifier: Apache-2.0
"""Trees of whole catalogues, kept from search to search: the same titles need not be sorted again for every call."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch

from patchkern.batch.catalog import Catalog
from patchkern.search.trie import Trie

TREES_PER_CATALOG = 2
"""Trees that a catalogue keeps, those used last: room for one more device, response end or set of titles."""


@dataclass
class _Kept:
    trees: dict[tuple[object, ...], Trie] = field(default_factory=dict)  # the one used last comes last
    lock: threading.Lock = field(default_factory=threading.Lock)


_kept: WeakKeyDictionary[Catalog, _Kept] = WeakKeyDictionary()
_lock = threading.Lock()


def catalog_trie(
    catalog: Catalog, response_end: Sequence[int], device: torch.device, leaves_only: bool = False
) -> Trie:
    """The tree of all titles on ``device``, see `Trie.from_catalog`: built by the first call for it, then kept.

    It lives as long as the catalogue, unless `TREES_PER_CATALOG` others of the same catalogue are used after it.
    Threads that need a tree which another one is building wait for it.
    """
    with _lock:
        kept = _kept.setdefault(catalog, _Kept())
    key = (tuple(response_end), device, leaves_only)
    with kept.lock:
        trie = kept.trees.pop(key, None)
        if trie is None:
            # room first, so that there is never one more; and no tensor that only inference mode may use later
            while len(kept.trees) >= TREES_PER_CATALOG:
                del kept.trees[next(iter(kept.trees))]
            with torch.inference_mode(False):
                trie = Trie.from_catalog(catalog, response_end, leaves_only).to(device)
        kept.trees[key] = trie
    return trie


def forget_trees(catalog: Catalog) -> None:
    """Drop the trees kept with ``catalog`` and so free their memory; the next search builds what it needs."""
    with _lock:
        _kept.pop(catalog, None)
