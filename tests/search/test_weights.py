# SPDX-License-Identifier: Apache-2.0
"""`fit_weights`: planted weights, a likelihood's minimum, ranks by brute force, and how little they scatter."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from cases import make_catalog, make_histories, make_titles
from prior_cases import Lookup

import patchkern as pk
from patchkern.search.weights import _GRID, MAX_WEIGHT, _ahead_on_grid, fit_weights, shortlist


def drawn(weights: list[float], n_users: int, n_candidates: int = 50, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Scores, and targets drawn from the softmax of their weighted sum."""
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(n_users, n_candidates, len(weights)))
    noise = rng.gumbel(size=(n_users, n_candidates))
    return scores, (scores @ np.array(weights) + noise).argmax(axis=1)


def test_who_is_ahead_at_every_weight() -> None:
    """Against each weight tried, with ties, candidates that never pass, and users with fewer."""
    rng = np.random.default_rng(0)
    base, slope = rng.integers(-4, 5, (2, 40, 30)) / 4.0
    base[3:9, 20:] = -math.inf
    first, grid = rng.random((40, 30)) < 0.5, np.append(0.0, _GRID)
    assert ((base[:, :, None] + grid * slope[:, :, None] == 0).sum(axis=(0, 1)) > 0).sum() > 5
    total = base[:, :, None] + grid * slope[:, :, None]
    expected = ((total > 0) | ((total == 0) & first[:, :, None])).sum(axis=1)
    assert np.array_equal(_ahead_on_grid(base, slope, first, grid), expected)


@pytest.mark.parametrize("objective", ["ndcg", "nll"])
@pytest.mark.parametrize("weights", [[1.0, 0.5], [0.5, 2.0], [1.0, 0.3, 1.5], [1.0, 1.0, 0.0]])
def test_known_weights_are_recovered(weights: list[float], objective: str) -> None:
    scores, targets = drawn([3 * weight for weight in weights], 2000)
    found = fit_weights(scores, targets, objective)
    expected = np.array(weights[1:]) / weights[0]
    np.testing.assert_allclose(found, expected, rtol=0.15 if objective == "nll" else 0.35, atol=0.05)
    assert np.array_equal(fit_weights(scores, targets, objective), found)


def test_the_likeliest_weights_are_a_minimum() -> None:
    """Of the float64 likelihood, as autograd differentiates it, with users of fewer candidates and without a target."""
    scores, targets = drawn([1.0, 0.7, 0.4], 300, 12, seed=3)
    scores[5:40, 9:] = -math.inf
    targets[5:40] = np.minimum(targets[5:40], 8)
    targets[50:60] = -1
    found = fit_weights(scores, targets, "nll")
    kept = np.flatnonzero(targets >= 0)
    x = torch.from_numpy(scores[kept])
    x[x == -math.inf] = -1e9

    def loss(weights: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy((x * weights).sum(-1), torch.from_numpy(targets[kept]))

    model = torch.ones((), dtype=torch.float64)
    for _ in range(60):  # the common factor, which is left out of the result, by Newton's method
        model = model.detach().requires_grad_()
        (slope,) = torch.autograd.grad(loss(model * torch.tensor([1.0, *found])), model, create_graph=True)
        (curvature,) = torch.autograd.grad(slope, model)
        model = model - slope / curvature
    weights = (model.detach() * torch.tensor([1.0, *found])).requires_grad_()
    (gradient,) = torch.autograd.grad(loss(weights), weights)
    assert gradient.abs().max() < 1e-3  # the shrinkage, 1e-4 of a weight
    worse = fit_weights(scores, np.roll(targets, 1), "nll")
    assert not np.allclose(worse, found, rtol=0.2)


def test_what_helps_nothing_gets_nothing() -> None:
    scores, targets = drawn([3.0, 0.0], 400)
    for objective in ("ndcg", "nll"):
        assert fit_weights(scores * [1, 0], targets, objective).tolist() == [0.0]
        assert fit_weights(scores * [1, 0] - [0, 3], targets, objective).tolist() == [0.0]
        with pytest.warns(UserWarning, match="targets: expected some among the candidates, got none"):
            assert fit_weights(scores, np.full(400, -1), objective).tolist() == [0.0]
    assert fit_weights(np.concatenate([scores, scores[:, :, :1] * -1], axis=2), targets, "nll")[1] == 0
    best = scores[:, :, 1].argmax(axis=1)
    assert fit_weights(scores * [0, 1], best, "nll").tolist() == [MAX_WEIGHT]
    assert fit_weights(scores * [0, 1], best)[0] > 0  # where the model says nothing, any weight will do


def test_a_sample_more_or_less_moves_them_little() -> None:
    """40 users of 25 samples, drawn anew as whole users: within a factor of two, where a list's best weight jumps."""
    scores, targets = drawn([1.0, 1.0], 1000, 60)
    rng = np.random.default_rng(0)
    found = []
    for _ in range(6):
        users = rng.integers(0, 40, 40)
        rows = (users[:, None] * 25 + np.arange(25)).ravel()
        found.append([fit_weights(scores[rows], targets[rows], objective)[0] for objective in ("ndcg", "nll")])
    spread = np.max(found, axis=0) / np.min(found, axis=0)
    assert spread[0] < 2.5 and spread[1] < 1.6, spread


def test_only_the_top_plays_a_part() -> None:
    rng = np.random.default_rng(0)
    scores, targets = rng.normal(size=(6, 30, 2)), np.array([0, 5, 29, 3, 4, -1])
    scores[0, 10:, 0] = -math.inf
    short, places = shortlist(scores, targets, 4)
    for user in range(6):
        exists = np.flatnonzero(np.isfinite(scores[user]).all(axis=1))
        top = {item for column in range(2) for item in exists[np.argsort(-scores[user, exists, column])[:4]]}
        kept = sorted(top)
        np.testing.assert_array_equal(short[user, : len(kept)], scores[user, kept])
        assert (short[user, len(kept) :] == -math.inf).all()
        assert places[user] == (kept.index(targets[user]) if targets[user] in top else -1)
    assert np.array_equal(fit_weights(scores, targets, k=4, depth=4), fit_weights(short, places, k=4, depth=4))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"scores": np.zeros((2, 3, 2), int)}, TypeError, "scores: expected floating-point numbers, got int64"),
        ({"scores": np.zeros((2, 3))}, ValueError, r"scores: expected shape \(B, C, 1 \+ P\).*got \(2, 3\)"),
        ({"scores": np.zeros((2, 3, 1))}, ValueError, r"scores: expected shape .*got \(2, 3, 1\)"),
        ({"scores": np.full((2, 3, 2), math.nan)}, ValueError, "scores: expected finite numbers or -inf"),
        ({"scores": np.full((2, 3, 2), math.inf)}, ValueError, "scores: expected finite numbers or -inf"),
        ({"targets": [0.0, 1.0]}, TypeError, "targets: expected integers, got float64"),
        ({"targets": [0]}, ValueError, r"targets: expected one per user \(2\), got shape \(1,\)"),
        ({"targets": [0, 3]}, ValueError, r"targets: expected -1\.\.2, got 0\.\.3"),
        ({"objective": "hr"}, ValueError, "objective: expected one of ndcg, nll, got 'hr'"),
        ({"k": 0}, ValueError, "k: expected an integer in 1"),
        ({"depth": 19}, ValueError, "depth: expected an integer in 20"),
    ],
)
def test_wrong_arguments_are_refused_by_name(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fit_weights(**{"scores": np.zeros((2, 3, 2)), "targets": [0, 1], **arguments})


# ------------------------------------------------------------------ several priors as one


def test_a_combined_prior_is_the_product() -> None:
    histories = pk.Histories.coerce(make_histories(make_titles(40), range(300)))
    one, two = np.random.default_rng(0).normal(size=(2, 300, 40)) * 4
    priors = [Lookup(histories, one), Lookup(histories, two)]
    both = pk.CombinedPrior(priors, [1.0, 0.5])
    table = np.exp(both(histories))
    np.testing.assert_allclose(table.sum(axis=1), 1)
    expected = np.exp(one) * np.exp(two) ** 0.5
    np.testing.assert_allclose(table, expected / expected.sum(axis=1, keepdims=True), rtol=1e-9)
    assert both.fingerprint != pk.CombinedPrior(priors, [1.0, 0.6]).fingerprint

    catalog = make_catalog(make_titles(40))
    noise = np.random.default_rng(1).gumbel(size=one.shape)
    targets = catalog.item_ids[(one + 0.5 * two + noise).argmax(axis=1)]
    for objective in ("ndcg", "nll"):
        found = pk.CombinedPrior.fit(priors, catalog, histories, targets, objective=objective)
        assert found.weights[0] == 1 and found.weights[1] == pytest.approx(0.5, rel=0.25)
    assert max(len(asked) for asked in priors[0].asked[1:]) == 256  # never a table of all

    unseen = targets[:20]  # the target of user u is among what others have seen, too
    fit = pk.CombinedPrior.fit(priors, catalog, histories.take(np.arange(20)), unseen, exclude_seen=True)
    tables = np.stack([one, two], axis=2)[:20]
    for user in range(20):
        tables[user, catalog.index_of(histories[user])] = -math.inf
    assert fit.weights[1:] == tuple(fit_weights(tables, catalog.index_of(unseen)))


@pytest.mark.parametrize(
    ("priors", "weights", "error", "message"),
    [
        ([], [], TypeError, r"priors: expected callables, at least one, got \[\]"),
        ([np.zeros(3)], [1], TypeError, "priors: expected callables"),
        (len, [1], TypeError, "priors: expected callables, at least one, got <built-in"),
        ([len], 0.5, TypeError, "weights: expected one number per prior, got 0.5"),
        ([len], [1, 2], ValueError, r"weights: expected one per prior \(1\), got 2"),
        ([len], [-1], ValueError, r"weights\[0\]: expected a finite number of at least 0, got -1"),
    ],
)
def test_combining_names_the_argument(priors: Any, weights: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pk.CombinedPrior(priors, weights)
    catalog = make_catalog(make_titles(9))
    for several, targets, said in (
        ([len], [0], "at least two"),
        ([len, len], [0, 1], "targets: expected one per user"),
    ):
        with pytest.raises(ValueError, match=said):
            pk.CombinedPrior.fit(several, catalog, [[1]], targets)
    with pytest.raises(TypeError, match="catalog: expected a Catalog, got dict"):
        pk.CombinedPrior.fit([len, len], {}, [[1]], [0])  # type: ignore[arg-type]
