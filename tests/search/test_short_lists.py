# SPDX-License-Identifier: Apache-2.0
"""One user costs the others nothing: too few items left, items that left the catalogue, beams narrower than k."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from cases import POLICIES, make_titles
from search_oracle import assert_ranked, forced_scores, make_model, narrow_beam, ranked

import patchkern as pk
from patchkern.search.summary import PartialListsWarning, Summary

TITLES = make_titles(12)
HISTORIES = [[1, 2], list(range(12)), [3, 4, 5, 6, 7, 8, 9, 10, 11], []]
LEFT = [10, 0, 3, 12]
NAMES = ["ada", "bob", "eve", "joe"]
SEARCHES: list[dict[str, Any]] = [
    {},
    {"search": "exact"},
    {"search": "exact", "normalize": "items"},
    {"search": "exact", "normalize": "titles"},
    {"search": "exact", "length_penalty": 1.0},
]


@pytest.fixture
def model() -> pk.PatchedCausalLM:
    return make_model(TITLES)


@pytest.fixture(autouse=True)
def _no_other_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", PartialListsWarning)
        yield


def counted(model: pk.PatchedCausalLM, histories: Any, **options: Any) -> tuple[list[Any], Summary]:
    """The lists, and the summary of the one warning."""
    with pytest.warns(PartialListsWarning) as caught:
        lists = model.recommend(histories, POLICIES["text"], **options)
    (warning,) = [entry.message for entry in caught if isinstance(entry.message, PartialListsWarning)]
    assert isinstance(warning, PartialListsWarning) and isinstance(warning.summary, Summary)
    return lists, warning.summary


@pytest.mark.parametrize("options", SEARCHES, ids=str)
def test_a_user_who_has_seen_all(options: dict[str, Any], model: pk.PatchedCausalLM) -> None:
    options = {"k": 5, "num_beams": 12, "exclude_seen": True, **options}
    lists, summary = counted(model, HISTORIES, short="allow", user_ids=NAMES, **options)
    assert [len(user) for user in lists] == [min(5, left) for left in LEFT]
    assert (summary.users, summary.short_lists, summary.empty_lists) == (4, 2, 1)
    assert summary.short_examples == ("bob", "eve")
    alone = model.recommend([HISTORIES[0], HISTORIES[3]], POLICIES["text"], **options)
    for got, expected in zip((lists[0], lists[3]), alone, strict=True):
        assert [item for item, _ in got] == [item for item, _ in expected]
        np.testing.assert_allclose([x for _, x in got], [x for _, x in expected], rtol=0, atol=1e-9)
    assert {item for item, _ in lists[2]} == {0, 1, 2} and all(math.isfinite(score) for _, score in lists[2])
    with pytest.raises(ValueError, match=r"k: expected at most 0, .* user 'bob' has not seen, got 5; 2 of 4 users"):
        model.recommend(HISTORIES, POLICIES["text"], user_ids=NAMES, **options)


def test_diverse_lists_may_be_short(model: pk.PatchedCausalLM) -> None:
    lists, summary = counted(model, HISTORIES, k=3, num_beams=3, search="diverse", exclude_seen=True, short="allow")
    alone = model.recommend([HISTORIES[0], HISTORIES[3]], POLICIES["text"], 3, 3, "diverse", True)
    assert [[i for i, _ in user] for user in (lists[0], lists[3])] == [[i for i, _ in user] for user in alone]
    assert lists[1] == [] and {item for item, _ in lists[2]} <= {0, 1, 2} and summary.empty_lists == 1


@pytest.mark.parametrize("options", SEARCHES[:4], ids=str)
def test_candidates_and_priors_that_leave_few(options: dict[str, Any], model: pk.PatchedCausalLM) -> None:
    histories = [[1, 2], [3], [4]]
    options = {"k": 4, "num_beams": 12, "short": "allow", **options}
    allowed = [[5, 6], [], list(range(12))]
    lists, summary = counted(model, histories, allowed_items=allowed, **options)
    assert [{i for i, _ in user} for user in lists[:2]] == [{5, 6}, set()] and len(lists[2]) == 4
    assert (summary.short_lists, summary.empty_lists, summary.short_examples) == (2, 1, (0, 1))

    table = np.zeros((3, 12))
    table[0, 2:] = table[1] = -np.inf

    def prior(given: pk.Histories) -> torch.Tensor:
        rows = {tuple(history): row for history, row in zip(histories, table, strict=True)}
        return torch.from_numpy(np.stack([rows[tuple(user.tolist())] for user in given]))

    for form in (table, prior):
        lists, summary = counted(model, histories, prior=form, **options)
        assert [{i for i, _ in user} for user in lists[:2]] == [{0, 1}, set()] and len(lists[2]) == 4
        assert summary.short_lists == 2 and all(math.isfinite(score) for user in lists for _, score in user)
        with pytest.raises(ValueError, match=r"k: .* items of user 'x' that prior does not leave out, got 4; short="):
            model.recommend(
                histories, POLICIES["text"], prior=form, user_ids=list("xyz"), **{**options, "short": "error"}
            )


def test_more_than_the_catalogue_holds(model: pk.PatchedCausalLM) -> None:
    for options in ({"num_beams": 12}, {"num_beams": 12, "search": "exact"}):
        lists, summary = counted(model, [[1], []], k=100, short="allow", **options)
        for row, table in zip(lists, forced_scores(model, "llama", [[1], []], POLICIES["text"], TITLES), strict=True):
            assert_ranked(row, table, TITLES, 12)
        assert (summary.short_lists, summary.empty_lists) == (2, 0)
    with pytest.raises(ValueError, match="k: expected at most 12, the items of the catalog, got 100"):
        model.recommend([[1]], POLICIES["text"], 100, 100)


def test_beams_narrower_than_k() -> None:
    titles = {item: [item % 2, 2 + item % 4, 6 + item] for item in range(12)}
    model = make_model(titles)
    with pytest.warns(PartialListsWarning, match="num_beams: 1 beams may find fewer than k=8 items; k: 2 of 2 users"):
        lists = model.recommend([[1], [2, 3]], POLICIES["text"], k=8, num_beams=1)
    for row, history in zip(lists, ([1], [2, 3]), strict=True):
        expected = narrow_beam(model, titles, history, POLICIES["text"], 8, 1)
        assert [(*titles[item], 96) for item, _ in row] == list(expected)
        np.testing.assert_allclose([score for _, score in row], list(expected.values()), rtol=0, atol=1e-9)
    # titles that end at the first token are found whatever the width: the warning says what may be, not that it is
    model = make_model({item: [item] for item in range(12)}, prompt=pk.Prompt([90], [92], [93], response_end=[]))
    lists, summary = counted(model, [[1]], k=8, num_beams=2)
    assert len(lists[0]) == 8 and summary.short_lists == 0


# ------------------------------------------------------------------ items that left the catalogue


@pytest.mark.parametrize("policy", ["text", "items", "sessions-start-cut"])
def test_unknown_items_are_as_if_they_had_never_been(policy: str, model: pk.PatchedCausalLM) -> None:
    gone = [[1, 99, 2, 3, 98, 4], [97, 96], [5], []]
    known = [[1, 2, 3, 4], [], [5], []]
    for options in ({}, {"exclude_seen": True, "search": "exact"}):
        with pytest.warns(PartialListsWarning) as caught:
            got = model.recommend(gone, POLICIES[policy], 4, 12, unknown="drop", user_ids=NAMES, **options)
        assert got == model.recommend(known, POLICIES[policy], 4, 12, **options)
        summary = caught[0].message.summary  # type: ignore[union-attr]
        assert (summary.unknown_items, summary.users_with_unknown_items) == (4, 2)
        assert summary.unknown_examples == ("ada", "bob") and summary.short_lists == 0
    with pytest.warns(PartialListsWarning, match="4 items .* of 2 of 4 users, such as user 'ada', user 'bob'"):
        scores = model.score_items(gone, POLICIES[policy], unknown="drop", user_ids=NAMES)
    np.testing.assert_array_equal(scores, model.score_items(known, POLICIES[policy]))
    message = (
        "histories: .* got 99 at position 1 of user 'ada'; 4 items of 2 users are unknown, which unknown=.drop. leaves"
    )
    with pytest.raises(ValueError, match=message):
        model.recommend(gone, POLICIES[policy], 4, 4, user_ids=NAMES)
    with pytest.raises(ValueError, match=message):
        model.score_items(gone, POLICIES[policy], user_ids=NAMES)


def test_unknown_candidates(model: pk.PatchedCausalLM) -> None:
    for allowed, count in (([[1, 99, 2], [98], [3, 4]], 2), ([1, 2, 3, 99], 1)):
        lists, summary = counted(
            model, [[5], [6], [7]], k=2, num_beams=12, allowed_items=allowed, short="allow", unknown="drop"
        )
        assert summary.unknown_allowed_items == count and {i for i, _ in lists[0]} <= {1, 2, 3}
    with pytest.raises(ValueError, match=r"allowed_items\['b'\]: expected item ids of the catalog, got 98"):
        model.recommend([[5], [6]], POLICIES["text"], 1, 1, allowed_items=[[1], [98]], user_ids=["a", "b"])


def test_times_go_with_their_items(model: pk.PatchedCausalLM) -> None:
    policy = pk.TimeSessions(gap=10, keep_text=1)
    with pytest.warns(PartialListsWarning):
        got = model.recommend(pk.Histories([1, 99, 2, 3], [0, 4], [0, 5, 100, 101]), policy, 3, 12, unknown="drop")
    assert got == model.recommend(pk.Histories([1, 2, 3], [0, 3], [0, 100, 101]), policy, 3, 12)


def test_a_cache_with_short_lists(model: pk.PatchedCausalLM) -> None:
    cache = pk.UserCache(model, 1 << 20)
    options: dict[str, Any] = {"k": 5, "num_beams": 12, "exclude_seen": True, "short": "allow", "user_ids": NAMES}
    expected, _ = counted(model, HISTORIES, **options)
    for _ in range(2):
        got, _ = counted(model, HISTORIES, user_cache=cache, **options)
        assert [[i for i, _ in user] for user in got] == [[i for i, _ in user] for user in expected]
    assert set(NAMES) == {name for name in NAMES if name in cache}


def test_strings_name_items_and_users() -> None:
    titles = make_titles(6, ids="str")
    model = make_model(titles)
    first = next(iter(titles))
    with pytest.raises(ValueError, match=r"got 'gone' at position 1 of user 'ada'"):
        model.recommend([[first, "gone"]], POLICIES["text"], 2, 2, user_ids=["ada"])
    with pytest.warns(PartialListsWarning):
        got = model.recommend([[first, "gone"], ["gone"]], POLICIES["text"], 6, 6, unknown="drop")
    for row, table in zip(got, forced_scores(model, "llama", [[first], []], POLICIES["text"], titles), strict=True):
        assert [item for item, _ in row] == ranked(table, titles, 6)


def test_the_keys_of_a_mapping_are_names(model: pk.PatchedCausalLM) -> None:
    given = {"ada": [1, 2], "bob": list(range(12))}
    with pytest.raises(ValueError, match="that user 'bob' has not seen, got 3"):
        model.recommend(given, POLICIES["text"], 3, 3, exclude_seen=True)
    lists, summary = counted(model, given, k=3, num_beams=12, exclude_seen=True, short="allow")
    assert [len(user) for user in lists] == [3, 0] and summary.short_examples == ("bob",)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"short": "shorter"}, "short: expected one of error, allow, got 'shorter'"),
        ({"short": True}, "short: expected one of error, allow, got True"),
        ({"unknown": None}, "unknown: expected one of error, drop, got None"),
        ({"memory_budget": "600KiB"}, r"memory_budget: .* of user 'bob', whose"),
    ],
)
def test_errors_name_argument_and_user(options: dict[str, Any], message: str, model: pk.PatchedCausalLM) -> None:
    with pytest.raises(ValueError, match=message):
        model.recommend([[1], [1] * 200, []], POLICIES["text"], 2, 2, user_ids=["ada", "bob", "eve"], **options)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_prompt_that_the_model_does_not_take_is_named_before_others_are_computed(batch_size: int) -> None:
    model = make_model(TITLES, "gpt2")

    def prompt_logits(*_: Any) -> Any:
        raise AssertionError("computed")

    model.prompt_logits = prompt_logits  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"histories: expected at most 256 rows .* \(user 'bob'\)"):
        model.recommend([[1], [1] * 300], POLICIES["text"], 2, 2, batch_size=batch_size, user_ids=["ada", "bob"])


def test_summaries_add_up_and_go_through_json() -> None:
    one = Summary(users=3, short_lists=2, short_examples=("a", "b"))
    two = Summary(users=2, unknown_items=4, short_examples=("c", "d"), unknown_examples=(7,))
    total = one + two
    assert (total.users, total.short_lists, total.unknown_items) == (5, 2, 4)
    assert total.short_examples == ("a", "b", "c") and total.unknown_examples == (7,)
    assert Summary.from_dict({**total.as_dict(), "short_examples": ["a", "b", "c"], "later": 1}) == total
