# SPDX-License-Identifier: Apache-2.0
"""HR, NDCG and MRR against tables worked out by hand, and the paper's count against its own arithmetic."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import patchkern as pk
from patchkern.evaluation import evaluate, standard_error

TITLES = {10: "Alien", 11: "Aliens", 12: "Heat", 13: "Heat", 14: "Fargo", 15: "Alien 3"}
CATALOG = pk.Catalog.from_titles(TITLES, lambda title: [ord(letter) for letter in title])


def ranks(lists: list[list[Any]], targets: list[Any], metric: str = "strict") -> list[int]:
    return evaluate(lists, targets, metric=metric, catalog=CATALOG).ranks.tolist()


@pytest.mark.parametrize(
    ("row", "target", "strict", "paper"),
    [
        ([14, 11, 10], 10, 3, 3),
        ([14, 11, 10], 14, 1, 1),
        ([10, 11, 15, 14], 10, 1, 3),  # "Aliens" and "Alien 3" begin with "Alien", and the last one counts
        ([11, 14], 10, 0, 1),  # the paper counts a longer title
        ([10, 14], 11, 0, 0),  # but not a shorter one
        ([12, 13, 14], 13, 1, 2),  # 12 and 13 share a title
        ([12, 13, 14], 14, 2, 3),  # ranked by distinct titles; by entries
        ([12, 14], 13, 1, 1),
        ([14, 12, 14], 14, 1, 3),  # a title generated twice
        ([], 14, 0, 0),
    ],
)
def test_ranks_by_hand(row: list[int], target: int, strict: int, paper: int) -> None:
    assert ranks([row], [target]) == [strict]
    assert ranks([row], [target], "paper") == [paper]


def test_scores_beside_the_items_change_nothing() -> None:
    assert ranks([[(14, -0.5), (12, -1.0)]], [13]) == [2]


def test_table_by_hand() -> None:
    result = evaluate([[10, 11], [14, 12, 11], [14], [11, 14, 10]], [10, 11, 12, 10], ks=(1, 3), catalog=CATALOG)
    assert result.ranks.tolist() == [1, 3, 0, 3]
    assert result.ambiguous.tolist() == [False, False, True, False] and result.num_ambiguous == 1
    assert result.hr(1) == 0.25 and result.hr(3) == 0.75
    assert result.ndcg(1) == 0.25 and result.ndcg(3) == pytest.approx((1 + 0.5 + 0 + 0.5) / 4)
    assert result.mrr(1) == 0.25 and result.mrr(3) == pytest.approx((1 + 1 / 3 + 0 + 1 / 3) / 4)
    row = result.as_dict()
    assert list(row) == [f"{name}@{k}{tail}" for name in ("HR", "NDCG", "MRR") for k in (1, 3) for tail in ("", " ±")]
    assert row["HR@3"] == 0.75 and row["NDCG@3"] == pytest.approx(0.5)
    # hits 1 1 0 1: variance 0.25 with three degrees of freedom, over four users
    assert row["HR@3 ±"] == pytest.approx(math.sqrt(0.25 / 4))
    assert "HR@3 0.7500" in str(result) and str(result).endswith("(strict, 4 samples, 1 with a shared title)")
    assert repr(result) == f"Evaluation({result})"


def test_errors_are_over_users() -> None:
    lists, targets = [[10], [10], [14], [14]], [10, 10, 10, 10]
    result = evaluate(lists, targets, [1], catalog=CATALOG, users=["x", "x", "y", "y"])
    assert result.users is not None and result.users.tolist() == [0, 0, 1, 1] and result.num_users == 2
    assert result.as_dict()["HR@1 ±"] == pytest.approx(0.5)
    assert str(result).endswith("(strict, 4 samples of 2 users, 0 with a shared title)")


def test_two_recommenders_on_the_same_samples() -> None:
    users, targets = [5, 5, 9], [10, 11, 12]
    one = evaluate([[10], [11], [14]], targets, [1], catalog=CATALOG, users=users)
    other = evaluate([[10], [14], [14]], targets, [1], catalog=CATALOG, users=users)
    found = one.minus(other)
    assert list(found) == ["HR@1", "NDCG@1", "MRR@1"]
    assert found["HR@1"].mean == pytest.approx(1 / 3)
    assert found["HR@1"].error == pytest.approx(standard_error([0, 1, 0], users))
    for changed, message in (
        ({"ks": (2,)}, r"other: expected ks \(1,\), got \(2,\)"),
        ({"metric": "paper"}, "other: expected metric strict, got paper"),
        ({"users": np.array([0, 1, 1])}, "other: expected the same samples, got others: their users differ"),
        ({"users": None}, "other: expected the same samples, got others: their users differ"),
    ):
        with pytest.raises(ValueError, match=message):
            one.minus(replace(other, **changed))
    with pytest.raises(ValueError, match="other: expected 3 samples, got 2"):
        one.minus(other.take([0, 1]))


def test_no_users() -> None:
    result = evaluate([], [], catalog=CATALOG)
    assert result.ranks.shape == (0,) and math.isnan(result.hr(10)) and math.isnan(result.as_dict()["HR@10 ±"])


@given(st.lists(st.lists(st.sampled_from(sorted(TITLES)), max_size=6), min_size=1, max_size=5), st.data())
def test_paper_metric_is_the_authors_arithmetic(lists: list[list[int]], data: st.DataObject) -> None:
    targets = [data.draw(st.sampled_from(sorted(TITLES))) for _ in lists]
    k = 4
    places = []  # from 0, and 20 for a miss
    for row, target in zip(lists, targets, strict=True):
        real, place = TITLES[target], 20
        for at, item in enumerate(row):
            if TITLES[item][: len(real)] == real:
                place = at
        places.append(place)
    result = evaluate(lists, targets, ks=[k], metric="paper", catalog=CATALOG)
    assert result.hr(k) == np.mean([place < k for place in places])
    # scikit-learn's ndcg_score with one relevant entry among k, scored in list order
    assert result.ndcg(k) == pytest.approx(np.mean([1 / math.log2(place + 2) if place < k else 0 for place in places]))


def test_string_ids() -> None:
    catalog = pk.Catalog.from_titles({"a": "x", "b": "y"}, lambda title: [ord(letter) for letter in title])
    assert evaluate([["b", "a"], [("b", -1.0)]], ["a", "a"], catalog=catalog).ranks.tolist() == [2, 0]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"metric": "loose"}, ValueError, "metric: expected one of strict, paper, got 'loose'"),
        ({"catalog": None}, TypeError, "catalog: expected a Catalog, got NoneType"),
        ({"ks": ()}, ValueError, "ks: expected at least one"),
        ({"ks": (10, 0)}, ValueError, "ks: expected integers of at least 1, got 0"),
        ({"ks": (1.5,)}, TypeError, "ks: expected integers, got 1.5"),
        ({"ks": 10}, TypeError, "ks: expected integers, got 10"),
        ({"recommendations": iter([[10]])}, TypeError, "recommendations: expected one list per sample, got list_iter"),
        ({"targets": [[10], 11]}, TypeError, r"targets\[1\]: expected a sequence of item ids, got int"),
        ({"targets": [[10.0]]}, TypeError, r"targets\[0\]: expected integer or string item ids, got dtype float64"),
        ({"targets": [[10], ["a"]]}, TypeError, "targets: expected item ids of one kind, got integers and strings"),
        ({"targets": [10, 11]}, ValueError, r"targets: expected one per list \(1\), got 2"),
        ({"targets": [99]}, ValueError, "targets: .*99"),
        ({"users": [1, 2]}, ValueError, r"users: expected one per sample \(1\), got shape \(2,\)"),
        ({"recommendations": [[99]]}, ValueError, r"recommendations\[0\]: .*99"),
        ({"recommendations": [{10: 0.5}]}, TypeError, r"recommendations\[0\]: expected a list of items, got dict"),
        (
            {"recommendations": [[10, True]]},
            TypeError,
            r"recommendations\[0\]: .* got bool, int",
        ),
        ({"targets": [True]}, TypeError, "targets: expected all integers or all strings, got bool"),
    ],
)
def test_errors_name_the_argument(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        evaluate(**{"recommendations": [[10]], "targets": [10], "catalog": CATALOG, **arguments})


def test_ids_of_two_kinds_are_not_made_one() -> None:
    """NumPy would make text of 1 beside "b", and find the item "1"."""
    catalog = pk.Catalog.from_token_ids([5, 6], [0, 1, 2], item_ids=["1", "b"])
    with pytest.raises(TypeError, match="targets: expected all integers or all strings, got int, str"):
        evaluate([["1"], ["b"]], [1, "b"], catalog=catalog)
    with pytest.raises(TypeError, match=r"recommendations\[1\]: expected all integers or all strings, got int, str"):
        evaluate([["1"], [1, "b"]], ["1", "b"], catalog=catalog)
    with pytest.raises(TypeError, match="users: expected all integers or all strings, got int, str"):
        evaluate([["1"], ["b"]], ["1", "b"], catalog=catalog, users=[1, "1"])


def test_none_of_the_samples() -> None:
    found = evaluate([[10], [11]], [10, 11], catalog=CATALOG)
    assert found.take([]).num_samples == 0 and math.isnan(found.take([]).hr(10))


def test_paper_metric_needs_text() -> None:
    catalog = pk.Catalog.from_token_ids(CATALOG.token_ids, CATALOG.offsets, CATALOG.item_ids)
    assert evaluate([[12]], [13], catalog=catalog).ranks.tolist() == [1]
    with pytest.raises(ValueError, match=r'catalog: metric="paper" compares titles as text'):
        evaluate([[12]], [13], metric="paper", catalog=catalog)


# ------------------------------------------------------------------ several targets


def test_several_targets_by_hand() -> None:
    lists = [[14, 10, 11], [12], [15, 14]]
    targets = [[10, 14, 15], [13, 12], [11]]  # 12 and 13 share a title, and are one
    result = evaluate(lists, targets, ks=(1, 2, 3), catalog=CATALOG, users=["a", "a", "b"])
    assert result.ranks.tolist() == [2, 1, 0, 1, 0] and result.offsets.tolist() == [0, 3, 4, 5]
    assert result.ambiguous.tolist() == [False, True, False] and result.num_samples == 3 and result.num_users == 2
    assert [result.hits(k).tolist() for k in (1, 3)] == [[1, 1, 0], [1, 1, 0]]
    assert result.recalls(1).tolist() == [1 / 3, 1, 0] and result.recalls(2).tolist() == [2 / 3, 1, 0]
    assert result.gains(1).tolist() == [1, 1, 0]
    best = 1 + 1 / math.log2(3)
    assert result.gains(2) == pytest.approx([1, 1, 0])
    assert result.gains(3) == pytest.approx([best / (best + 1 / 2), 1, 0])
    assert result.reciprocals(3).tolist() == [1, 1, 0]
    assert result.first_ranks.tolist() == [1, 1, 0]
    assert result.recall(2) == pytest.approx(5 / 9) and result.hr(2) == pytest.approx(2 / 3)
    assert list(result.per_sample())[-3:] == ["Recall@1", "Recall@2", "Recall@3"] and "3 samples of 2 users" in str(
        result
    )
    some = result.take([2, 0])
    assert some.ranks.tolist() == [0, 2, 1, 0] and some.offsets.tolist() == [0, 1, 4] and some.users.tolist() == [1, 0]
    assert result.take(np.array([True, False, True])).recalls(2).tolist() == [2 / 3, 0]
    other = evaluate(lists[::-1], targets, ks=(1, 2, 3), catalog=CATALOG, users=["a", "a", "b"])
    assert result.minus(other)["HR@3"].mean == pytest.approx(-1 / 3)
    with pytest.raises(ValueError, match="they have other numbers of targets"):
        result.minus(evaluate(lists, [[10], [12], [11]], ks=(1, 2, 3), catalog=CATALOG, users=["a", "a", "b"]))


@given(
    st.lists(
        st.tuples(st.lists(st.sampled_from([10, 12, 14, 15]), unique=True), st.sampled_from(list(TITLES))), max_size=6
    )
)
def test_lists_of_one_target_are_targets(samples: list[tuple[list[int], int]]) -> None:
    lists = [row for row, _ in samples]
    one = evaluate(lists, [target for _, target in samples], ks=(1, 4), catalog=CATALOG)
    if samples:
        each = evaluate(lists, pk.Histories.coerce([[target] for _, target in samples]), ks=(1, 4), catalog=CATALOG)
        for name, values in one.per_sample().items():
            assert each.per_sample()[name].tolist() == values.tolist()
        assert each.recalls(4).tolist() == one.recalls(4).tolist() == one.hits(4).tolist()
        assert each.ambiguous.tolist() == one.ambiguous.tolist()


def test_several_targets_are_refused() -> None:
    with pytest.raises(ValueError, match=r"targets\[1\]: expected at least one item id, got none"):
        evaluate([[10], [11]], [[10], []], catalog=CATALOG)
    with pytest.raises(ValueError, match=r"targets: expected one list per list \(1\), got 2"):
        evaluate([[10]], [[10], [11]], catalog=CATALOG)
    with pytest.raises(ValueError, match='targets: expected one item id each with metric="paper"'):
        evaluate([[10]], [[10, 11]], metric="paper", catalog=CATALOG)
    nobody = evaluate([], pk.Histories.coerce([]), catalog=CATALOG)
    assert math.isnan(nobody.recall(10)) and nobody.num_samples == 0


@pytest.mark.parametrize(("k", "error"), [(0, ValueError), (-1, ValueError), (1.5, TypeError), ("2", TypeError)])
def test_list_lengths_that_are_none(k: Any, error: type[Exception]) -> None:
    found = evaluate([[10], [11]], [10, 11], catalog=CATALOG)
    for measure in (found.hr, found.ndcg, found.mrr, found.recall):
        with pytest.raises(error, match="k: expected an integer"):
            measure(k)
    with pytest.raises(TypeError, match="other: expected an Evaluation, got int"):
        found.minus(5)  # type: ignore[arg-type]
