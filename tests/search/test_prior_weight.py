# SPDX-License-Identifier: Apache-2.0
"""`fit_prior_weight`: a planted weight comes out, and the curve is what `recommend` gives."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from cases import POLICIES, make_histories, make_titles
from prior_cases import Lookup, random_prior, table_with
from search_oracle import make_model

import patchkern as pk
from patchkern.data import synthetic
from patchkern.evaluation.metrics import evaluate
from patchkern.search.prior_weight import WEIGHTS
from patchkern.search.summary import PartialListsWarning

pytestmark = pytest.mark.filterwarnings("error::patchkern.search.recommend.UnprovenSearchWarning")


@pytest.mark.parametrize("planted", [0.0, 0.3, 1.5])
@pytest.mark.parametrize("candidates", [20, 100])
def test_a_planted_weight_is_recovered(planted: float, candidates: int) -> None:
    titles = make_titles(60)
    model = make_model(titles)
    histories = make_histories(titles, range(40))
    prior = random_prior(40, 60, scale=6.0)
    targets = (model.score_items(histories, POLICIES["text"]) + planted * prior).argmax(axis=1)
    fit = pk.fit_prior_weight(model, histories, targets, POLICIES["text"], prior, candidates=candidates)
    assert fit.weight == pytest.approx(planted, rel=0.2, abs=1e-9)
    assert list(fit.curve) == sorted({*WEIGHTS, fit.weight})
    gains = [found.ndcg(20) for found in fit.curve.values()]
    assert gains[-1] < 0.9 and fit.curve[fit.weight].ndcg(20) > 0.97 * max(gains)
    tried = pk.fit_prior_weight(
        model, histories, targets, POLICIES["text"], prior, weights=WEIGHTS, candidates=candidates
    )
    assert tried.weight == planted and list(tried.curve) == sorted(WEIGHTS)
    if candidates >= 60:  # a beam of 20 may lose a target
        assert max(gains) > 0.97 and tried.curve[planted].ndcg(20) == 1.0


@pytest.mark.parametrize("objective", ["ndcg", "nll"])
def test_planted_weights_of_several_priors_are_recovered(objective: str) -> None:
    titles = make_titles(60)
    model = make_model(titles)
    histories = make_histories(titles, range(60))
    one, two = random_prior(60, 60, scale=6.0), random_prior(60, 60, scale=6.0, seed=1)
    targets = (model.score_items(histories, POLICIES["text"]) + 0.5 * one + 1.5 * two).argmax(axis=1)
    fit = pk.fit_prior_weight(
        model, histories, targets, POLICIES["text"], [one, np.zeros(60), two], objective=objective, candidates=60
    )
    assert fit.weight[0] == pytest.approx(0.5, rel=0.3) and fit.weight[2] == pytest.approx(1.5, rel=0.3)
    assert fit.weight[1] < 0.05 or objective == "nll"
    assert list(fit.curve) == [(0.0, 0.0, 0.0), fit.weight] and fit.curve[fit.weight].ndcg(20) > 0.9
    tried = [(0.0, 0.0, 1.0), (0.5, 0, 1.5)]
    given = pk.fit_prior_weight(
        model, histories, targets, POLICIES["text"], [one, np.zeros(60), two], weights=tried, candidates=60
    )
    assert given.weight == (0.5, 0.0, 1.5) and given.curve[given.weight].ndcg(20) == 1.0


def test_several_priors_are_their_sum() -> None:
    """In the search, in the curve, with items left out by either; arrays, and a callable."""
    titles = make_titles(24)
    model = make_model(titles)
    histories = make_histories(titles, [3, 9, 0, 14, 5, 7, 2, 11])
    one, two = random_prior(8, 24), random_prior(1, 24, seed=1)[0]
    one[np.random.default_rng(1).random(one.shape) < 0.1] = -math.inf
    several = [Lookup(histories, one), two]
    summed = 0.3 * one + 2.0 * two
    targets = np.random.default_rng(2).integers(0, 24, 8)
    for search in ("beam", "exact"):
        got = model.recommend(histories, POLICIES["items"], 6, 24, search, prior=several, prior_weight=[0.3, 2.0])
        expected = model.recommend(histories, POLICIES["items"], 6, 24, search, prior=summed)
        assert [[item for item, _ in row] for row in got] == [[item for item, _ in row] for row in expected]
        np.testing.assert_allclose([[s for _, s in row] for row in got], [[s for _, s in row] for row in expected])
    assert model.recommend(histories, POLICIES["items"], 6, prior=several, prior_weight=0.5) == model.recommend(
        histories, POLICIES["items"], 6, prior=several, prior_weight=(0.5, 0.5)
    )
    fit = pk.fit_prior_weight(model, histories, targets, POLICIES["items"], several, weights=[(0.3, 2.0)], k=6)
    rows = model.recommend(histories, POLICIES["items"], 6, 24, prior=summed)
    assert fit.curve[0.3, 2.0].ranks.tolist() == evaluate(rows, targets, [6], catalog=model.catalog).ranks.tolist()
    with pytest.raises(ValueError, match=r"prior\[1\]: expected -inf, or numbers .* got nan"):
        model.recommend(histories, POLICIES["items"], 6, prior=[two, np.full(24, math.nan)])
    for given, message in (
        ([1.0], r"prior_weight: expected a number, or one per prior \(2\), got 1 of them"),
        ([1.0, -1.0], r"prior_weight\[1\]: expected at least 0, got -1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            model.recommend(histories, POLICIES["items"], 6, prior=several, prior_weight=given)
    with pytest.raises(ValueError, match="prior_weight: expected a number for one prior, got 1 of them"):
        model.recommend(histories, POLICIES["items"], 6, prior=two, prior_weight=[1.0])


def test_the_curve_is_what_recommend_gives() -> None:
    """With titles that are shared, items that are seen, allowed or left out, and a length penalty."""
    titles = {**make_titles(24), **{24 + i: title for i, title in enumerate(list(make_titles(24).values())[:6])}}
    model = make_model(titles)
    histories = make_histories(titles, [3, 9, 0, 14, 5, 7, 2, 11])
    table = random_prior(8, 30)
    table[np.random.default_rng(1).random(table.shape) < 0.1] = -math.inf
    targets = np.random.default_rng(2).integers(0, 30, 8)
    common: dict[str, Any] = {"exclude_seen": True, "allowed_items": range(2, 30), "length_penalty": 0.5}
    weights = (1, 0, 0.25)
    fit = pk.fit_prior_weight(
        model, histories, targets, POLICIES["items"], Lookup(histories, table), weights=weights, k=6, **common
    )
    assert list(fit.curve) == [0.0, 0.25, 1.0]
    for weight, found in fit.curve.items():
        rows = model.recommend(histories, POLICIES["items"], 6, 30, prior=table, prior_weight=weight, **common)
        assert found.ranks.tolist() == evaluate(rows, targets, [6], catalog=model.catalog).ranks.tolist()
    assert len({tuple(found.ranks.tolist()) for found in fit.curve.values()}) == 3
    assert fit.weight == max(fit.curve, key=lambda weight: fit.curve[weight].ndcg(6))


def test_a_prior_that_tells_nothing_gets_no_weight() -> None:
    titles = make_titles(30)
    model = make_model(titles)
    histories = make_histories(titles, range(10))
    fit = pk.fit_prior_weight(model, histories, [0] * 10, POLICIES["text"], np.zeros(30), k=5)
    assert fit.weight == 0.0 and len({found.ndcg(5) for found in fit.curve.values()}) == 1


def test_the_weight_is_found_on_data() -> None:
    """A model that knows nothing leaves it all to the transitions."""
    data = synthetic(150, 200, seed=0)
    model = make_model({item: [item % 30, 30 + item // 30] for item in data.titles})
    with torch.no_grad():
        model.hf_model.lm_head.weight.zero_()
    samples = data.samples("val")
    fit = pk.fit_prior_weight(
        model, data.before(samples), data.targets(samples), pk.ItemPatches(2), pk.TransitionPrior(data, model.catalog),
        exclude_seen=True,
    )  # fmt: skip
    assert fit.weight > 0 and fit.curve[fit.weight].hr(20) > 2 * fit.curve[0.0].hr(20)


def test_samples_that_tell_nothing_are_left_out() -> None:
    """A target that left the catalogue, and a user with too few items left: the fit is that of all others."""
    titles = make_titles(12)
    model = make_model(titles)
    histories, targets = [[1, 2, 99], [3, 4], list(range(10)), [5]], [4, 77, 11, 6]
    table = np.random.default_rng(0).normal(size=(4, 12))
    allowed = [list(range(12))] * 4
    options: dict[str, Any] = {"policy": POLICIES["text"], "k": 3, "candidates": 4, "exclude_seen": True}
    with pytest.warns(PartialListsWarning, match=r"targets: 2 of 4 samples have .* or fewer than k=3 items left"):
        got = pk.fit_prior_weight(
            model, histories, targets, prior=table, allowed_items=allowed, short="allow", unknown="drop", **options
        )
    expected = pk.fit_prior_weight(model, [[1, 2], [5]], [4, 6], prior=table[[0, 3]], **options)
    assert got.weight == expected.weight
    assert [x.ranks.tolist() for x in got.curve.values()] == [x.ranks.tolist() for x in expected.curve.values()]
    for given, error in (
        ({"unknown": "drop"}, "k: expected at most 2, .* user 'eve' .*got 3"),
        ({"short": "allow"}, "targets: expected item ids of the catalog, got 77 for user 'bob'"),
        ({"short": "allow", "targets": [4, 5, 11, 6]}, "histories: .* got 99 at position 2 of user 'ada'"),
        ({"short": "allow", "unknown": "drop", "targets": [77] * 4}, "targets: expected samples to fit on, got none"),
    ):
        arguments: dict[str, Any] = {"targets": targets, "prior": table, "user_ids": ["ada", "bob", "eve", "joe"]}
        with pytest.raises(ValueError, match=error):
            pk.fit_prior_weight(model, histories, **{**arguments, **options, **given})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"targets": [0]}, ValueError, r"targets: expected one per user \(2\) and at least one, got shape \(1,\)"),
        ({"targets": [0, 77]}, ValueError, "targets: expected item ids of the catalog, got 77"),
        ({"histories": [], "targets": []}, ValueError, r"targets: expected one per user \(0\) and at least one"),
        ({"weights": []}, TypeError, r"weights: expected a sequence of numbers, got \[\]"),
        ({"weights": 1.0}, TypeError, "weights: expected a sequence of numbers, got 1.0"),
        ({"weights": ["a lot"]}, TypeError, "weights: expected numbers, got 'a lot'"),
        ({"weights": [(1, 2)]}, TypeError, r"weights: expected numbers, got \(1, 2\)"),
        ({"weights": [1, -1]}, ValueError, r"weights: expected finite numbers of at least 0, got \[1, -1\]"),
        ({"weights": [math.nan]}, ValueError, "weights: expected finite numbers of at least 0"),
        ({"prior": [np.zeros(9)], "weights": [1]}, ValueError, r"weights: expected one number per prior \(1\) in each"),
        ({"prior": []}, TypeError, "prior: expected at least one"),
        ({"objective": "hr"}, ValueError, "objective: expected one of ndcg, nll, got 'hr'"),
        ({"k": 0}, ValueError, "k: expected an integer in 1"),
        ({"k": 8, "exclude_seen": True}, ValueError, "k: expected at most 7, .* user 1 has not seen, got 8"),
        ({"candidates": 2}, ValueError, "candidates: expected an integer in 3"),
        ({"prior": None}, TypeError, "prior: expected an array or a tensor, .* got NoneType"),
        ({"prior": table_with(math.nan)}, ValueError, "prior: expected -inf, or numbers .* got nan"),
        ({"policy": None}, ValueError, "policy: expected one"),
    ],
)
def test_fitting_names_the_argument(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    model = make_model(make_titles(9))
    given = {"histories": [[5], [0, 1]], "targets": [3, 4], "policy": POLICIES["text"], "prior": np.zeros(9), "k": 3}
    with pytest.raises(error, match=message):
        pk.fit_prior_weight(model, **{**given, **arguments})
