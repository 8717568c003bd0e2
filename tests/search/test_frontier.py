# SPDX-License-Identifier: Apache-2.0
"""Beams that end in one pass: the trees below them, the passes that this saves, and the lists that stay."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from cases import POLICIES, make_catalog, make_histories, make_titles
from hypothesis import given
from hypothesis import strategies as st
from search_oracle import make_model

from patchkern.search import frontier
from patchkern.search.prompts import Prompts
from patchkern.search.trie import Subtrees, Trie

TITLES = make_titles(60)


@given(st.lists(st.lists(st.integers(5, 7), min_size=1, max_size=6), min_size=1, max_size=12), st.booleans())
def test_subtrees_are_the_inner_nodes_in_depth_first_order(titles: list[list[int]], has_end: bool) -> None:
    trie = Trie.from_catalog(make_catalog(dict(enumerate(titles))), [9] if has_end else [])
    children, level = trie.children.tolist(), trie.level.tolist()
    parent = {child: node for node in range(trie.num_nodes) for child in range(children[node], children[node + 1])}

    def inner(node: int) -> list[int]:
        below = [each for child in range(children[node], children[node + 1]) for each in inner(child)]
        return [node, *below] if children[node] < children[node + 1] else []

    trees = trie.subtrees
    assert trees.nodes.tolist() == inner(0)
    assert trees.sizes.tolist() == [len(inner(node)) for node in range(trie.num_nodes)]
    places = {node: place for place, node in enumerate(inner(0))}
    assert all(int(trees.place[node]) == place for node, place in places.items())
    assert trees.above.tolist() == [place - places[parent.get(node, node)] for node, place in places.items()]
    widths = np.diff(children)
    for begin, most in enumerate(trees.most_children):
        assert most == max(width for width, own in zip(widths, level, strict=True) if own >= begin)
    tensors = [x for x in trees if isinstance(x, torch.Tensor)]
    assert sum(x.nbytes for x in tensors) <= 16 * trie.num_nodes


@pytest.mark.parametrize("search", ["beam", "diverse"])
def test_the_last_levels_are_one_pass(search: str, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[int] = []
    step = Prompts.step

    def counting(self: Prompts, parent: Any, user: Any, token: Any, shape: Any) -> Any:
        passes.append(len(token))
        assert shape.users == len(user.unique()) and shape.width == user.bincount().max()
        return step(self, parent, user, token, shape)

    monkeypatch.setattr(Prompts, "step", counting)
    model, histories = make_model(TITLES), make_histories(TITLES, [5, 2, 4])
    options: dict[str, Any] = {"k": 6, "num_beams": 6, "search": search}
    found = model.recommend(histories, POLICIES["items"], **options, short="allow")
    few, most = list(passes), len(histories) * 6
    passes.clear()
    with monkeypatch.context() as patched:
        trees = frontier.Trie.subtrees.func  # type: ignore[attr-defined]

        def too_many(trie: Trie) -> Subtrees:
            whole: Subtrees = trees(trie)
            return whole._replace(sizes=whole.sizes + 10**6)

        patched.setattr(Trie, "subtrees", property(too_many))
        level_by_level = model.recommend(histories, POLICIES["items"], **options, short="allow")
    assert len(few) < len(passes) and max(few) <= most
    assert few[: len(few) - 1] == passes[: len(few) - 1]
    for own, plain in zip(found, level_by_level, strict=True):
        assert [item for item, _ in own] == [item for item, _ in plain]
        np.testing.assert_allclose([x for _, x in own], [x for _, x in plain], rtol=0, atol=1e-11)


def test_log_probabilities_of_some_rows_at_a_time_are_those_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    model, histories = make_model(TITLES), make_histories(TITLES, [5, 2, 4])
    whole = model.recommend(histories, POLICIES["items"], 9, 9), model.score_items(histories, POLICIES["items"])
    monkeypatch.setattr("patchkern.search.frontier.LOG_PROBS_AT_ONCE", 250)  # two rows
    monkeypatch.setattr("patchkern.search.title_search.LOG_PROBS_AT_ONCE", 1)
    again = model.recommend(histories, POLICIES["items"], 9, 9), model.score_items(histories, POLICIES["items"])
    assert again[0] == whole[0] and (again[1] == whole[1]).all()
