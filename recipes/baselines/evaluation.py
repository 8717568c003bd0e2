# SPDX-License-Identifier: Apache-2.0
"""Ranking the items of test users, alone and with priors, counted and written as recipes/evaluate.py does."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from patchkern.data import samples_of
from patchkern.evaluation import Evaluation
from recipes.baselines.networks import Recommender
from recipes.baselines.scoring import Ranker
from recipes.evaluate import beside, counted, keep
from recipes.prior_weights import given_weights, validation_samples, weights_beside_scores, with_priors
from recipes.priors import make_priors
from recipes.ranking import ScoredItems, parts_of, prior_alone, prior_scores
from recipes.results import KS, Results

SEEN = ("left_out", "allowed")
ALONE = "this model"

Weights = dict[str, float]


def rank(
    model: Recommender, ranker: Ranker, args: argparse.Namespace, folder: Path
) -> dict[str, dict[str, list[Evaluation]]]:
    """``{"left_out" or "allowed": {row of the table: evaluations}}``, all from one pass over the histories.

    Prints tables; writes a line per sample to ``<folder>/<split>-<seen items>[-<priors>].csv``.
    """
    data, catalog = ranker.data, ranker.catalog
    samples = samples_of(data, args.split).spread(args.limit)
    priors = make_priors(args.prior, data, catalog, device=model.bias.device)
    rows: dict[str, dict[str, Weights]] = {}
    found: dict[str, dict[str, ScoredItems]] = {}
    for seen in args.seen_items:
        unseen = seen == "left_out"
        beside_it = weights_of(priors, model, ranker, args, unseen=unseen)
        rows[seen] = {ALONE: {}} | {with_priors(weights): weights for weights in beside_it}
        names = [*rows[seen], *(prior_alone(name) for name in priors)]
        found[seen] = {name: ScoredItems(data, samples, catalog, max(KS), unseen) for name in names}
    wall = cpu = 0.0
    for numbers in parts_of(samples, catalog):
        part = samples.take(numbers)
        begin = time.perf_counter(), time.process_time()
        scores = ranker.table(model, part, unseen=False)
        found[args.seen_items[0]][ALONE].add(numbers, scores)
        wall += time.perf_counter() - begin[0]
        cpu += time.process_time() - begin[1]
        tables = {name: prior_scores(prior, data, part) for name, prior in priors.items()}
        for seen, own in rows.items():
            for name, weights in own.items():
                if name != ALONE or seen != args.seen_items[0]:
                    found[seen][name].add(numbers, sum((w * tables[p] for p, w in weights.items()), scores))
            for name, table in tables.items():
                found[seen][prior_alone(name)].add(numbers, table)
    count = samples.users.size
    print(f"{count / wall:.1f} users/s, {count / cpu:.1f} in a second of a CPU", flush=True)

    every = {}
    for seen, scored in found.items():
        results = Results(data, samples, catalog)
        print(f"\n{count:,} {args.split} samples of {results.num_users:,} users, seen items {seen}")
        path = folder / f"{args.split}-{seen}.csv"
        for name, ranked in scored.items():
            result = counted(results, ranked.ranking.as_lists(), {"NLL item": ranked.nll})
            if name in rows[seen]:
                keep(results, name, result, beside(path, rows[seen][name]) if rows[seen][name] else path)
            else:
                results[name] = result
        print(f"± one standard error over {results.num_users:,} users\n")
        for lines in (results.table(), results.further()):
            print("\n".join([*lines, ""]))
        print(f"per sample: {path}", flush=True)
        every[seen] = {name: result.found for name, result in results.items()}
    return every


def weights_of(
    priors: Mapping[str, Any], model: Recommender, ranker: Ranker, args: argparse.Namespace, *, unseen: bool
) -> list[Weights]:
    """Of each prior, and of all together: --prior_weight, else the best on validation samples."""
    sets = [{name: prior} for name, prior in priors.items()]
    if len(priors) > 1:
        sets.append(dict(priors))
    if not sets or args.prior_weight is not None:
        return [given_weights(some, args) for some in sets]
    samples = validation_samples(ranker.data, args)
    own = ranker.table(model, samples, unseen=unseen)
    return weights_beside_scores(own, ranker.data, ranker.catalog, samples, sets)
