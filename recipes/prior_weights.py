# SPDX-License-Identifier: Apache-2.0
"""How much recipes/evaluate.py trusts each prior: as it is told, or as the validation split says."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

import patchkern as pk
from patchkern.batch.policy_kinds import AnyPolicy
from patchkern.data import Interactions, Samples
from patchkern.search.weights import fit_weights
from patchkern.training import TrainableModel
from recipes.priors import names_of
from recipes.ranking import cache_of, head_scores, prior_scores

K = 20
"""of the NDCG that weights are fitted by"""


def weights_beside_head(
    model: TrainableModel,
    data: Interactions,
    policy: AnyPolicy,
    sets: Sequence[Mapping[str, Any]],
    args: argparse.Namespace,
) -> list[dict[str, float]]:
    """As `fitted_weights`, of several sets of priors, from one pass over the histories of the validation samples."""
    if not sets or args.prior_weight is not None:
        return [given_weights(priors, args) for priors in sets]
    samples = validation_samples(data, args)
    own = head_scores(model, data, samples, policy, unseen=args.exclude_seen)
    return weights_beside_scores(own, data, model.catalog, samples, sets)


def weights_beside_scores(
    own: NDArray[np.floating[Any]],
    data: Interactions,
    catalog: pk.Catalog,
    samples: Samples,
    sets: Sequence[Mapping[str, Any]],
) -> list[dict[str, float]]:
    """The best weights of several sets of priors beside a model's ``(S, n_items)`` scores of validation samples."""
    targets = catalog.index_of(data.targets(samples))
    every = {name: prior for priors in sets for name, prior in priors.items()}
    scores = {name: prior_scores(prior, data, samples).astype(np.float32) for name, prior in every.items()}
    scores[""] = own
    found = []
    for priors in sets:
        weights = fit_weights(np.stack([scores[name] for name in ("", *priors)], axis=2), targets, k=K).tolist()
        found.append(dict(zip(priors, weights, strict=True)))
        told = f"fitted by NDCG@{K} on {samples.users.size:,} validation samples"
        print(f"{' + '.join(priors)}: {_numbers(tuple(weights))}, {told}", flush=True)
    return found


def given_weights(priors: Mapping[str, Any], args: argparse.Namespace) -> dict[str, float]:
    given = dict(zip(names_of(args.prior), args.prior_weight, strict=True))
    return {name: given[name] for name in priors}


def validation_samples(data: Interactions, args: argparse.Namespace) -> Samples:
    """Spread evenly over the split."""
    samples = data.samples("val").spread(args.fit_limit)
    if not samples.users.size:
        raise ValueError("--prior_weight: expected one for data without validation samples to fit it on")
    return samples


def fitted_weights(
    model: TrainableModel,
    data: Interactions,
    policy: AnyPolicy,
    priors: Mapping[str, Any],
    args: argparse.Namespace,
) -> dict[str, float]:
    """Of each prior --prior_weight, else the best on validation samples."""
    if args.prior_weight is not None:
        return given_weights(priors, args)
    samples = validation_samples(data, args)
    histories = data.before(samples)
    rows = int(pk.row_counts(model.catalog, histories, policy, model.prompt).sum())
    several = list(priors.values())
    fit = pk.fit_prior_weight(
        model,
        histories,
        data.targets(samples),
        policy,
        several if len(several) > 1 else several[0],
        k=K,
        exclude_seen=args.exclude_seen,
        batch_size=args.batch_size,
        memory_budget=args.memory_budget,
        search=args.search,
        user_cache=cache_of(model, rows, args.memory_budget),  # it searches twice
    )
    curve = "  ".join(f"{_numbers(weight)}: {found.ndcg(K):.4f}" for weight, found in fit.curve.items())
    told = f"NDCG@{K} on {samples.users.size:,} validation samples by weight"
    print(f"{' + '.join(priors)}: {told}: {curve}", flush=True)
    weight: Any = fit.weight
    return dict(zip(priors, weight if len(several) > 1 else [weight], strict=True))


def with_priors(weights: Mapping[str, float]) -> str:
    """What the model with these priors is called."""
    return f"+ {' + '.join(weights)} (weight {_numbers(tuple(weights.values()))})"


def together(priors: Mapping[str, Any], weights: Mapping[str, float]) -> Any:
    """The weighted sum of priors, as one of weight 1."""
    return lambda histories: sum(weights[name] * prior(histories) for name, prior in priors.items())


def _numbers(weights: Any) -> str:
    return ", ".join(f"{weight:g}" for weight in (weights if isinstance(weights, tuple) else (weights,)))
