# SPDX-License-Identifier: Apache-2.0
"""Kept trees: built once, not for ever, and the same as new ones."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from cases import POLICIES, make_catalog, make_histories, make_titles
from search_oracle import make_model

from patchkern.search.recommend import generate_titles
from patchkern.search.trie import Trie
from patchkern.search.trie_cache import TREES_PER_CATALOG, catalog_trie, forget_trees

CPU = torch.device("cpu")


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many items each tree had that was built since."""
    sizes: list[int] = []
    build = Trie._of_sequences.__func__  # type: ignore[attr-defined]

    def counting(cls: type[Trie], tokens: Any, offsets: Any, items: Any, end_length: int) -> Trie:
        sizes.append(len(items))
        tree: Trie = build(cls, tokens, offsets, items, end_length)
        return tree

    monkeypatch.setattr(Trie, "_of_sequences", classmethod(counting))
    return sizes


def test_every_search_of_a_model_builds_its_tree_once(builds: list[int]) -> None:
    titles = make_titles(17)
    model, histories, policy = make_model(titles), make_histories(titles, [5, 2]), POLICIES["items"]
    first = model.recommend(histories, policy, k=3, num_beams=4)
    assert builds == [17]
    assert model.recommend(histories, policy, k=3, num_beams=4) == first
    model.recommend(histories, policy, k=3, num_beams=4, search="exact", normalize="titles")
    model.recommend(histories, policy, k=3, num_beams=4, allowed_items=list(titles)[:9], exclude_seen=True)
    every = model.score_items(histories, policy)
    assert builds == [17]
    model.score_items(histories, policy, items=list(titles)[:5])  # a tree of these alone, which is not kept
    assert builds == [17, 5]
    generate_titles(model, histories, policy, 4, leaves_only=False)
    assert builds == [17, 5]
    generate_titles(model, histories, policy, 4)
    built = len(builds)
    generate_titles(model, histories, policy, 4)
    assert (model.score_items(histories, policy) == every).all() and len(builds) == built > 2


def test_each_catalogue_end_and_device_has_its_own(builds: list[int]) -> None:
    catalog, other = make_catalog({0: [1, 2], 1: [1]}), make_catalog({0: [1, 2], 1: [3]})
    tree = catalog_trie(catalog, [9], CPU)
    assert catalog_trie(catalog, (9,), torch.device("cpu")) is tree
    assert catalog_trie(other, [9], CPU).tokens.tolist() == [-1, 1, 3, 2, 9, 9]
    assert catalog_trie(catalog, [], CPU).tokens.tolist() == [-1, 1, 2]
    elsewhere = catalog_trie(other, [9], torch.device("meta"))
    assert elsewhere.tokens.is_meta and not catalog_trie(other, [9], CPU).tokens.is_meta
    assert catalog_trie(catalog, [9], CPU) is tree
    assert len(builds) == 4


def test_what_is_kept_is_bounded_and_goes_with_the_catalogue() -> None:
    catalog = make_catalog({0: [1, 2], 1: [1]})
    trees = [weakref.ref(catalog_trie(catalog, [end], CPU)) for end in range(5, 10)]
    gc.collect()
    assert [tree() is not None for tree in trees] == [False] * (5 - TREES_PER_CATALOG) + [True] * TREES_PER_CATALOG
    catalog_trie(catalog, [8], CPU)  # used again, so the other one is the older now
    catalog_trie(catalog, [1], CPU)
    gc.collect()
    assert trees[3]() is not None and trees[4]() is None
    forget_trees(catalog)
    gc.collect()
    assert trees[3]() is None
    tree, owner = weakref.ref(catalog_trie(catalog, [5], CPU)), weakref.ref(catalog)
    del catalog
    gc.collect()
    assert owner() is None and tree() is None


def test_copies_of_a_catalogue_carry_no_tree() -> None:
    catalog = make_catalog({0: [1, 2], 1: [1]})
    without = len(pickle.dumps(catalog))
    tree = catalog_trie(catalog, [9], CPU)
    assert len(pickle.dumps(catalog)) == without
    assert catalog_trie(copy.deepcopy(catalog), [9], CPU) is not tree


def test_threads_share_one_build(builds: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    build = Trie.from_catalog

    def slowly(*args: Any, **kwargs: Any) -> Trie:
        time.sleep(0.05)
        return build(*args, **kwargs)

    monkeypatch.setattr(Trie, "from_catalog", slowly)
    catalog, together = make_catalog(make_titles(30)), threading.Barrier(4)

    def ask(_: int) -> Trie:
        together.wait()
        return catalog_trie(catalog, [9], CPU)

    with ThreadPoolExecutor(4) as pool:
        trees = list(pool.map(ask, range(4)))
    assert builds == [30] and all(tree is trees[0] for tree in trees)


def test_a_tree_built_in_inference_mode_serves_outside_it() -> None:
    titles = make_titles(17)
    model, histories = make_model(titles), make_histories(titles, [5, 2])
    with torch.inference_mode():
        within = model.recommend(histories, POLICIES["items"], k=3, num_beams=4)
    assert not catalog_trie(model.catalog, model.prompt.response_end, model.device).tokens.is_inference()
    assert model.recommend(histories, POLICIES["items"], k=3, num_beams=4) == within
