# SPDX-License-Identifier: Apache-2.0
"""What differs between two catalogues, against dictionaries."""

from __future__ import annotations

import warnings
from itertools import chain
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import patchkern as pk
from patchkern.batch.catalog_diff import check_tokens, compare

TITLES = st.dictionaries(st.integers(-5, 12), st.lists(st.integers(0, 3), min_size=1, max_size=4), max_size=12)


def catalog(titles: dict[Any, list[int]], texts: dict[Any, str] | None = None) -> pk.Catalog:
    offsets = np.cumsum([0, *map(len, titles.values())])
    ids = np.array(list(titles), np.str_) if titles and isinstance(next(iter(titles)), str) else list(titles)
    return pk.Catalog(
        list(chain(*titles.values())), offsets, ids, None if texts is None else [texts[i] for i in titles]
    )


@given(TITLES, TITLES, st.booleans())
def test_as_sets_and_dictionaries_have_it(
    before: dict[int, list[int]], after: dict[int, list[int]], texts: bool
) -> None:
    said = [{item: str(len(title)) for item, title in titles.items()} if texts else None for titles in (before, after)]
    diff = compare(catalog(before, said[0]), catalog(after, said[1]))
    shared = before.keys() & after.keys()
    renamed = {item for item in shared if before[item] != after[item]}
    same = {item for item in shared if texts and len(before[item]) == len(after[item])}
    assert sorted(diff.new.tolist()) == sorted(after.keys() - shared)
    assert sorted(diff.gone.tolist()) == sorted(before.keys() - shared)
    assert sorted(diff.renamed.tolist()) == sorted(renamed)
    assert sorted(diff.retokenized.tolist()) == sorted(renamed & same)
    assert (diff.num_shared, diff.num_same_titles) == (len(shared), len(same))
    assert len(diff.examples) == min(3, len(renamed & same or renamed))


def test_strings_and_integers_share_nothing() -> None:
    diff = compare(catalog({1: [5], 2: [6]}), catalog({"1": [5], "2": [6], "3": [7]}))
    assert str(diff) == "3 new items, 2 gone, 0 of 0 with another title"
    with pytest.warns(pk.CatalogWarning, match="no item id is one of the 2 .* such as 1; now there is '1'"):
        diff.check()


def test_a_tenth_may_be_renamed() -> None:
    titles = {item: [item] for item in range(20)}
    for count in (0, 1, 2, 3):
        diff = compare(catalog(titles), catalog(titles | {item: [50] for item in range(count)}))
        if count == 0:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                diff.check()
        elif count <= 2:
            with pytest.warns(pk.CatalogWarning, match=rf"{count} of 20 .* such as item 0: \[0\] before, \[50\] now"):
                diff.check()
        else:
            with pytest.raises(ValueError, match=r"3 of 20 .* were ids exchanged"):
                diff.check()
            with pytest.warns(pk.CatalogWarning):
                diff.check(renamed="allow")


def test_another_tokenizer_is_known_by_titles_that_stay() -> None:
    titles, texts = {item: [item, 9] for item in range(20)}, {item: f"title {item}" * 9 for item in range(20)}
    other = catalog({item: [9, item + 1] for item in titles}, texts)
    for renamed in ("error", "allow"):
        with pytest.raises(
            ValueError, match=r"other token ids for 20 of 20 titles .*item 0: 'title 0.*…' \[0, 9\] before"
        ):
            compare(catalog(titles, texts), other).check(renamed)  # type: ignore[arg-type]
    # without their texts it could also be exchanged ids
    with pytest.raises(ValueError, match="were ids exchanged, or the titles tokenised by another tokenizer"):
        compare(catalog(titles), other).check()
    mixed = catalog({item: [item + 30] for item in titles}, texts | {item: f"new {item}" for item in range(2, 20)})
    with pytest.raises(ValueError, match="tokenised by the model's tokenizer, got other token ids for 2 of 2"):
        compare(catalog(titles, texts), mixed).check("allow")


@pytest.mark.parametrize("count", [0, 1, 199, 200, 201, 1000])
def test_new_items_are_tokenised_again(count: int) -> None:
    made = catalog({item: [item, 1] for item in range(1000)}, {item: str(item) for item in range(1000)})
    items = made.item_ids[:count]
    asked: list[str] = []

    def tokenizer(title: str) -> list[int]:
        asked.append(title)
        return [int(title), 1]

    check_tokens(made, items, tokenizer)
    assert min(count, 100) <= len(asked) <= 200 and len(set(asked)) == len(asked)
    check_tokens(made, items, lambda title: [int(title), 1 + (title == "0")] if count > 1 else [int(title), 1])
    if count:
        with pytest.raises(ValueError, match=r"other token ids for \d+ of \d+ new items .* item 0: '0'"):
            check_tokens(made, items, lambda title: [int(title), 2])
    check_tokens(catalog({1: [5]}), np.array([1]), tokenizer)  # no titles, nothing to say


def test_a_title_of_the_same_tokens_is_the_same() -> None:
    titles = {1: [5], 2: [6]}
    diff = compare(catalog(titles, {1: "Heat ", 2: "Up"}), catalog(titles, {1: "Heat", 2: "Up"}))
    assert diff.renamed.size == 0 and diff.num_same_titles == 1
