# SPDX-License-Identifier: Apache-2.0
"""The trie against sets of Python tuples."""

from __future__ import annotations

import tracemalloc
from collections import defaultdict

import numpy as np
import pytest
import torch
from cases import make_catalog
from hypothesis import given
from hypothesis import strategies as st

import patchkern as pk
from patchkern.search.trie import Trie

Sequences = dict[int, tuple[int, ...]]


def walk(trie: Trie) -> dict[tuple[int, ...], int]:
    """Node of every token path, the root's being ()."""
    paths = {(): 0}
    queue = [()]
    for path in queue:
        node = paths[path]
        for child in range(int(trie.children[node]), int(trie.children[node + 1])):
            longer = (*path, int(trie.tokens[child]))
            assert longer not in paths
            paths[longer] = child
            queue.append(longer)
    assert len(paths) == trie.num_nodes and sorted(paths.values()) == list(range(trie.num_nodes))
    return paths


def check(trie: Trie, sequences: Sequences) -> None:
    """Every node's items, own and below, are those whose sequence ends at it or goes through it."""
    paths = walk(trie)
    assert set(paths) == {s[:n] for s in sequences.values() for n in range(len(s) + 1)}
    items = trie.items.tolist()
    for path, node in paths.items():
        begin, own_end, end = int(trie.begin[node]), int(trie.own_end[node]), int(trie.end[node])
        own = [item for item, s in sequences.items() if s == path]
        below = {item for item, s in sequences.items() if s[: len(path)] == path}
        assert items[begin:own_end] == own  # catalogue order
        assert set(items[begin:end]) == below and end - begin == len(below)
        assert int(trie.first_item[node]) == min(below)
        assert int(trie.level[node]) == len(path)
        assert int(trie.longest[node]) == max(len(sequences[item]) for item in below)
        children = trie.tokens[int(trie.children[node]) : int(trie.children[node + 1])].tolist()
        assert children == sorted(set(children))
    assert trie.depth == max(map(len, sequences.values()))
    assert len(trie.titles) == len(set(sequences.values()))


titles = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=5), min_size=1, max_size=14)
ends = st.lists(st.integers(0, 3), max_size=2)


@given(titles, ends)
def test_nodes_and_ranges(titles: list[list[int]], response_end: list[int]) -> None:
    trie = Trie.from_catalog(make_catalog(dict(enumerate(titles))), response_end)
    check(trie, {item: (*title, *response_end) for item, title in enumerate(titles)})


@given(titles, ends)
def test_leaves_only_leaves_out_titles_that_begin_another(titles: list[list[int]], response_end: list[int]) -> None:
    trie = Trie.from_catalog(make_catalog(dict(enumerate(titles))), response_end, leaves_only=True)
    kept = {
        item: (*title, *response_end)
        for item, title in enumerate(titles)
        if not any(len(other) > len(title) and other[: len(title)] == title for other in titles)
    }
    check(trie, kept)


@given(titles, st.data())
def test_running_count(titles: list[list[int]], data: st.DataObject) -> None:
    trie = Trie.from_catalog(make_catalog(dict(enumerate(titles))), [9])
    allowed = torch.tensor(data.draw(st.lists(st.lists(st.booleans(), min_size=len(titles), max_size=len(titles)))))
    allowed = allowed.reshape(-1, len(titles)).bool()
    running = trie.running_count(allowed)
    assert running.shape == (len(allowed), len(titles) + 1)
    for user, mask in enumerate(allowed):
        for begin, end in zip(trie.begin.tolist(), trie.end.tolist(), strict=True):
            expected = sum(bool(mask[item]) for item in trie.items[begin:end].tolist())
            assert int(running[user, end] - running[user, begin]) == expected


@given(titles, ends, st.data())
def test_tree_of_some_items(titles: list[list[int]], end: list[int], data: st.DataObject) -> None:
    items = data.draw(st.lists(st.sampled_from(range(len(titles))), min_size=1, unique=True))
    trie = Trie.from_catalog(make_catalog(dict(enumerate(titles))), end, items=np.array(items))
    check(trie, {item: (*titles[item], *end) for item in sorted(items)})


@given(titles, ends, st.integers(1, 20))
def test_passes_hold_all_titles(titles: list[list[int]], end: list[int], nodes_per_pass: int) -> None:
    trie = Trie.from_catalog(make_catalog(dict(enumerate(titles))), end)
    found = []
    for tree in trie.passes(nodes_per_pass):
        n_first = tree.level_ends[0]
        parent, source = ([-1] * n_first + x.tolist() for x in (tree.parent, tree.source))
        tokens, fed, above = tree.tokens.tolist(), tree.fed.tolist(), tree.above.tolist()
        assert len(fed) <= nodes_per_pass + trie.depth - 1
        assert all(before < at for at, before in enumerate(above))
        levels: list[int] = []
        for before, row in zip(parent, source, strict=True):
            levels.append(0 if before < 0 else levels[before] + 1)
            assert (before < 0) == (row < 0)
            if row >= 0:  # what is fed is the token before, and so on up to the prompt
                assert fed[row] == tokens[before] and above[row] == source[before]
        assert levels == [
            level for level, count in enumerate(np.diff(tree.level_ends, prepend=0)) for _ in range(count)
        ]
        for place in tree.ends.tolist():
            path = []
            while place >= 0:
                path.insert(0, tokens[place])
                place = parent[place]
            found.append(tuple(path))
    assert found == sorted({(*title, *end) for title in titles})


@given(titles, ends, st.integers(1, 5))
def test_rows_of_a_beam_search(titles: list[list[int]], end: list[int], num_beams: int) -> None:
    trie = Trie.from_catalog(make_catalog(dict(enumerate(titles))), end)
    inner = {(*title, *end)[:n] for title in titles for n in range(1, len(title) + len(end))}

    def leading(level: int, target: int) -> int:
        return len({path[:level] for path in inner if len(path) == target})

    levels = range(1, trie.depth)
    assert trie.fed_rows(num_beams) == sum(min(num_beams, leading(level, level)) for level in levels)
    live = [sum(min(num_beams, leading(j, level)) for j in range(1, level + 1)) for level in levels]
    assert trie.live_rows(num_beams) == max(live, default=0)


def test_titles_that_share_long_beginnings() -> None:
    long = list(range(300))
    ways = [long, [*long, 7], [*long, 7], [*long[:-1], 2**31 - 2], [*long[:-2], 0], long[:150], [299], [*long, 7, 7]]
    for response_end in ([], [7], [3, 2, 1]):
        trie = Trie.from_catalog(make_catalog(dict(enumerate(ways))), response_end)
        check(trie, {item: (*title, *response_end) for item, title in enumerate(ways)})


def test_a_long_title_costs_its_own_tokens() -> None:
    """Time aside, an array of depth times titles, or of depth squared, would take gibibytes here."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 12, 20_000)
    lengths[0] = 20_000
    titles = pk.Catalog.from_token_ids(rng.integers(0, 5000, lengths.sum()), np.append(0, lengths.cumsum()))
    tracemalloc.start()
    try:
        trie = Trie.from_catalog(titles, [1])
        passes = trie.passes(64)
        rows = trie.fed_rows(20), trie.live_rows(20)
        assert tracemalloc.get_traced_memory()[1] < 8 * trie.num_bytes
    finally:
        tracemalloc.stop()
    assert trie.depth == 20_001 and sum(len(tree.ends) for tree in passes) == len(trie.titles)
    # 19 hypotheses beside the long one while others have as many tokens, of 4 levels at least
    assert rows[0] > 20_000 + 4 * 19 and rows[1] == 20_000
    assert len(trie.titles) == 20_000


def test_small_tree_by_hand() -> None:
    # "a b", "a" (twice), "c": node numbers level by level
    trie = Trie.from_catalog(make_catalog({"ab": [1, 2], "a": [1], "c": [3], "a again": [1]}), [9])
    assert trie.tokens.tolist() == [-1, 1, 3, 2, 9, 9, 9]
    assert trie.children.tolist() == [1, 3, 5, 6, 7, 7, 7, 7]
    assert trie.items.tolist() == [0, 1, 3, 2]  # [1, 2, 9] before [1, 9], which two items share
    paths = defaultdict(list)
    for node in range(trie.num_nodes):
        paths[int(trie.begin[node]), int(trie.own_end[node]), int(trie.end[node])].append(node)
    assert dict(paths) == {
        (0, 0, 4): [0],
        (0, 0, 3): [1],
        (3, 3, 4): [2],
        (0, 0, 1): [3],
        (1, 3, 3): [4],
        (3, 4, 4): [5],
        (0, 1, 1): [6],
    }


def test_one_item() -> None:
    trie = Trie.from_catalog(make_catalog({"only": [4, 4]}), [])
    assert (trie.num_nodes, len(trie.titles), trie.depth, trie.end_length) == (3, 1, 2, 0)


def test_device_copy_is_equal() -> None:
    trie = Trie.from_catalog(make_catalog({0: [1, 2], 1: [3]}), [9])
    copy = trie.to("cpu")
    assert torch.equal(copy.tokens, trie.tokens) and copy.depth == trie.depth


def test_empty_catalog_is_an_error() -> None:
    with pytest.raises(ValueError, match="catalog: expected at least one item"):
        Trie.from_catalog(make_catalog({}), [9])
