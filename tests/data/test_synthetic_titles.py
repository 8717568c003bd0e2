# SPDX-License-Identifier: Apache-2.0
"""Titles of synthetic items: distinct, short, and of words that betray the genre."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from patchkern.data import synthetic
from patchkern.data.synthetic_titles import GENRES, MAX_SERIES, genre_of, titles_of


def words_of(title: str) -> set[str]:
    return set(title.replace(":", "").split()) - {"The", "of", "the", "and", "II", "III", "IV", "V", "VI"}


def test_every_word_belongs_to_one_genre() -> None:
    count = Counter(word for lists in GENRES.values() for words in lists for word in words)
    assert set(count.values()) == {1}
    assert all(word.isalpha() and word.isascii() and word == word.capitalize() for word in count)


@pytest.mark.parametrize("num_genres", [1, 12, len(GENRES)])
def test_every_title_is_of_words_of_its_genre(num_genres: int) -> None:
    data = synthetic(20, 400, seed=3, num_genres=num_genres)
    seen = set()
    for title in data.titles.values():
        genre = genre_of(title)
        assert genre is not None
        assert words_of(title) <= {word for words in GENRES[genre] for word in words}
        seen.add(genre)
    assert seen == set(list(GENRES)[:num_genres])


def test_the_genre_of_other_titles_is_unknown() -> None:
    assert genre_of("The Sheriff and the Mermaid") == "western"
    assert genre_of("Mermaid: Sheriff") == "sea"
    assert genre_of("Toy Story (1995)") is None and genre_of("") is None


def test_parts_follow_each_other_under_one_name() -> None:
    genre = np.array([4, 4, 4, 1, 2, 2])
    titles = titles_of(np.random.default_rng(0), genre, np.array([1, 2, -1, -1, 5, -1]))
    assert titles[1] == titles[0] + " II" and titles[2] == titles[0] + " III" and titles[5] == titles[4] + " II"
    assert [genre_of(title) for title in titles] == [list(GENRES)[g] for g in genre]


def test_titles_stay_distinct_and_short_when_words_run_out() -> None:
    """One genre has words for about 1,700 short titles and 17,000 longer ones: the last are two joined by a colon."""
    size = 40_000
    titles = titles_of(np.random.default_rng(1), np.zeros(size, np.int64), np.full(size, -1))
    assert len(set(titles)) == size
    lengths = np.array([len(title.split()) for title in titles])
    assert lengths[:300].mean() < 3.2 and lengths.max() <= 12
    joined = [title for title in titles if ": " in title]
    assert 15_000 < len(joined) < size and not any(": " in title for title in titles[:1000])


def test_some_titles_begin_others() -> None:
    """The searches' hard case, beyond sequels: a title that ends inside another one."""
    titles = set(synthetic(1, 1000).titles.values())
    first_parts = {title for title in titles if f"{title} II" in titles}
    assert len(first_parts) > 100
    single = {title for title in titles if len(title.split()) == 1}
    assert sum(any(other.startswith((f"{one} of", f"{one} and")) for other in titles) for one in single) > 10


def test_lengths_are_spread() -> None:
    lengths = np.array([len(title.split()) for title in synthetic(1, 10_000).titles.values()])
    assert 3.3 < lengths.mean() < 3.9 and 1.0 < lengths.std() < 1.4 and lengths.min() == 1
    assert MAX_SERIES == 6
