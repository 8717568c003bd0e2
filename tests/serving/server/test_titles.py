# SPDX-License-Identifier: Apache-2.0
"""Titles found as a person types them, against a search title by title."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="needs fastapi, of the extra serving")

from patchkern.serving.server.titles import TitleIndex, fold

TITLES = ["Aliens (1986)", "Amélie", "Matrix, The (1999)", "Alien", "The\nMatrix  Reloaded", "ALIEN", "", "Straße", "a"]


def by_definition(titles: list[str], query: str) -> list[set[int]]:
    """Ranks: the title, its beginning, the beginning of a word, anywhere, all words."""
    folded, wanted = [fold(title) for title in titles], fold(query)
    ranks = [
        lambda title: title == wanted,
        lambda title: title.startswith(wanted),
        lambda title: f" {wanted}" in title,
        lambda title: wanted in title,
        lambda title: all(word in title for word in wanted.split()),
    ]
    found: list[set[int]] = []
    for rank in ranks:
        found.append({place for place, title in enumerate(folded) if rank(title)} - set().union(*found))
    return found


@pytest.mark.parametrize("query", ["alien", "ALI", "matrix the", "the matrix", "STRASSE", "e", "1986)", "nowhere", "a"])
def test_ranks_are_those_of_the_definition(query: str) -> None:
    found = TitleIndex(TITLES).search(query, 100)
    for rank in by_definition(TITLES, query):
        assert found[: len(rank)] == sorted(rank)
        del found[: len(rank)]
    assert not found


def test_random_titles() -> None:
    draw = np.random.default_rng(0)
    titles = ["".join(draw.choice(list("ab "), draw.integers(0, 9))) for _ in range(300)]
    index = TitleIndex(titles)
    for query in {"".join(draw.choice(list("ab "), draw.integers(1, 4))) for _ in range(60)}:
        if not query.strip():
            continue
        expected = [place for rank in by_definition(titles, query) for place in sorted(rank)]
        assert index.search(query, 1000) == expected
        assert index.search(query, 3) == expected[:3]
    for place, title in enumerate(titles):
        first = next(at for at, other in enumerate(titles) if fold(other) == fold(title))
        assert index.exact(title) == first <= place


def test_no_titles() -> None:
    index = TitleIndex([])
    assert index.search("", 5) == index.search("a", 5) == index.near("a") == [] and index.exact("") is None


def test_near_titles_are_found() -> None:
    index = TitleIndex(TITLES)
    assert index.near("Alein") == [3] or index.near("Aliens 1986") == [0]
    assert index.near("the matrix reloded") == [4] and index.near("") == index.near("zzz") == []
