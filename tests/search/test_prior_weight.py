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
    assert fit.weight == planted
    assert list(fit.curve) == sorted(WEIGHTS)
    gains = [found.ndcg(20) for found in fit.curve.values()]
    assert gains[-1] < 0.9 and sorted(gains)[-2] < max(gains)
    if candidates >= 60:  # a beam of 20 may lose a target
        assert max(gains) == 1.0


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
        ({"weights": [1, -1]}, ValueError, r"weights: expected finite numbers of at least 0, got \[1, -1\]"),
        ({"weights": [math.nan]}, ValueError, "weights: expected finite numbers of at least 0"),
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
