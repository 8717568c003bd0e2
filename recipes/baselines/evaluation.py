# SPDX-License-Identifier: Apache-2.0
"""Ranking the items of test users, alone and with priors, counted and written as recipes/evaluate.py does."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from patchkern.data import samples_of
from patchkern.evaluation import Evaluation
from recipes.baselines.networks import Recommender
from recipes.baselines.scoring import Ranker
from recipes.evaluate import PRIORS, K, beside, counted, keep
from recipes.prior_weights import given_weights, together, validation_samples, weights_beside_scores, with_priors
from recipes.ranking import ScoredItems, by_prior
from recipes.results import Results

SEEN = ("left_out", "allowed")
ALONE = "this model"


def rank(
    model: Recommender, ranker: Ranker, args: argparse.Namespace, folder: Path
) -> dict[str, dict[str, list[Evaluation]]]:
    """``{"left_out" or "allowed": {row of the table: evaluations}}``, from one pass over the histories for each.

    Prints tables, writes a line per sample to ``<folder>/<split>-<seen items>[-<priors>].csv``.
    """
    data, catalog = ranker.data, ranker.catalog
    samples = samples_of(data, args.split).spread(args.limit)
    priors = {name: PRIORS[name](data, catalog) for name in args.prior}
    sets = [{name: priors[name]} for name in priors]
    if len(priors) > 1:
        sets.append(dict(priors))
    every = {}
    for seen in args.seen_items:
        unseen, path = seen == "left_out", folder / f"{args.split}-{seen}.csv"
        rows: dict[str, Any] = {ALONE: None}
        files = {ALONE: path}
        for chosen, weights in zip(sets, weights_of(sets, model, ranker, args, unseen=unseen), strict=True):
            rows[with_priors(weights)] = together(chosen, weights)
            files[with_priors(weights)] = beside(path, chosen)
        results = Results(data, samples, catalog)
        print(f"\n{samples.users.size:,} {args.split} samples of {results.num_users:,} users, seen items {seen}")
        found = {name: ScoredItems(data, samples, catalog, K, unseen) for name in rows}
        alone, begin = 0.0, time.perf_counter()
        for numbers, scores in ranker.scores(model, samples):
            found[ALONE].add(numbers, scores)
            alone += time.perf_counter() - begin
            past = data.before(samples.take(numbers))
            for name, prior in rows.items():
                if prior is not None:
                    found[name].add(numbers, scores + prior(past))
            begin = time.perf_counter()
        for name, scored in found.items():
            keep(results, name, counted(results, scored.ranking.as_lists(), {"NLL item": scored.nll}), files[name])
        for name, prior in priors.items():
            by_itself = by_prior(data, catalog, samples, prior, K, unseen=unseen)
            results[f"{name} prior alone"] = counted(results, by_itself.ranking.as_lists(), {"NLL item": by_itself.nll})
        print(f"{samples.users.size / alone:.1f} users/s; ± one standard error over {results.num_users:,} users\n")
        for part in (results.table(), results.further()):
            print("\n".join([*part, ""]))
        print(f"per sample: {path}", flush=True)
        every[seen] = {name: result.found for name, result in results.items()}
    return every


def weights_of(
    sets: list[dict[str, Any]], model: Recommender, ranker: Ranker, args: argparse.Namespace, *, unseen: bool
) -> list[dict[str, float]]:
    """Of each set of priors: --prior_weight, else the best on validation samples."""
    if not sets or args.prior_weight is not None:
        return [given_weights(priors, args) for priors in sets]
    samples = validation_samples(ranker.data, args)
    own = ranker.table(model, samples, unseen=unseen)
    return weights_beside_scores(own, ranker.data, ranker.catalog, samples, sets)
