# SPDX-License-Identifier: Apache-2.0
"""What needs no network, on the test split: yardsticks, priors alone, and priors together.

    python recipes/yardsticks.py path/to/ml-100k path/to/ml-1m
    python recipes/yardsticks.py path/to/ml-1m --seen_items allowed

Prints a Markdown table per data set: HR and NDCG by item with standard errors over users, and the seconds that fitting
took. Whole histories are looked at; what is anywhere in them is left out unless it is allowed. Weights of priors
together are fitted on the validation split.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

import patchkern as pk
from patchkern.data import Interactions, Samples, open_dataset, prepare
from patchkern.evaluation import evaluate, most_popular, transitions

Lists = list[list[Any]]

KS = (10, 20)
_USERS_AT_ONCE = 256


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+", help="folders or files of data sets")
    parser.add_argument("--seen_items", choices=["left_out", "allowed"], default="left_out")
    parser.add_argument("--limit", type=int, help="samples of each split, evenly spaced (default: all)")
    args = parser.parse_args(argv)
    if args.limit is not None and args.limit < 1:
        parser.error(f"--limit: expected at least 1, got {args.limit}")
    for path in args.data:
        data = prepare(open_dataset(path))
        print(table(data, args.seen_items == "left_out", args.limit), flush=True)


def table(data: Interactions, unseen: bool, limit: int | None) -> str:
    """The Markdown of one data set."""
    catalog = pk.Catalog.from_titles(data.titles, lambda title: list(title.encode()))
    test, val = spaced(data.samples("test"), limit), spaced(data.samples("val"), limit)
    targets = data.targets(test)
    rows = []

    def add(name: str, lists: Lists, seconds: float) -> None:
        found = evaluate(lists, targets, KS, catalog=catalog)
        numbers = [f"{mean:.4f} ± {error_over_users(test, per_user):.4f}" for mean, per_user in (
            *((found.hr(k), found.hits(k)) for k in KS), *((found.ndcg(k), found.gains(k)) for k in KS),
        )]  # fmt: skip
        rows.append(f"| {name} | {' | '.join(numbers)} | {seconds:.1f} |")

    def timed(make: Callable[[], Any]) -> tuple[Any, float]:
        begin = time.process_time()
        return make(), time.process_time() - begin

    for name, rank in (("most popular", most_popular), ("transitions", transitions)):
        ranking, _ = timed(lambda rank=rank: rank(data, test, max(KS), unseen=unseen, max_items=None))
        add(name, ranking.as_lists(), 0.0)
    priors, seconds = {}, {}
    for name, make in (
        ("`TransitionPrior`", lambda: pk.TransitionPrior(data, catalog)),
        ("`LinearPrior`, ridge", lambda: pk.LinearPrior(data, catalog)),
        ("`LinearPrior`, EASE", lambda: pk.LinearPrior(data, catalog, "ease")),
    ):
        priors[name], seconds[name] = timed(make)
        add(name, likeliest(data, catalog, test, priors[name], unseen), seconds[name])
    first, *others = priors
    for names in (*((other, first) for other in others), (*others, first)):
        parts = [priors[name] for name in names]
        both = pk.CombinedPrior.fit(
            parts, catalog, data.before(val), data.targets(val), k=max(KS), exclude_seen=unseen
        )  # fmt: skip
        weighted = " + ".join(f"{weight:.2g} {name}" for name, weight in zip(names, both.weights, strict=True))
        add(weighted, likeliest(data, catalog, test, both, unseen), sum(seconds[name] for name in names))
    names = " | ".join([*(f"HR@{k}" for k in KS), *(f"NDCG@{k}" for k in KS)])
    head = f"| {data.name} | {names} | fit s |\n| --- |{' --: |' * (2 * len(KS) + 1)}\n"
    return head + "\n".join(rows) + "\n"


def spaced(samples: Samples, limit: int | None) -> Samples:
    if limit is None or samples.users.size <= limit:
        return samples
    chosen = np.linspace(0, samples.users.size - 1, limit).astype(np.int64)
    return Samples(samples.users[chosen], samples.positions[chosen])


def likeliest(data: Interactions, catalog: pk.Catalog, samples: Samples, prior: Any, unseen: bool) -> Lists:
    """What a prior finds likeliest, best first."""
    histories, lists = data.before(samples), []
    for begin in range(0, len(histories), _USERS_AT_ONCE):
        part = histories.take(np.arange(begin, min(begin + _USERS_AT_ONCE, len(histories))))
        scores = np.array(prior(part))
        if unseen:
            scores[np.repeat(np.arange(len(part)), part.lengths), catalog.index_of(part.items)] = -np.inf
        lists += catalog.item_ids[np.argsort(-scores, axis=1, kind="stable")[:, : max(KS)]].tolist()
    return lists


def error_over_users(samples: Samples, per_sample: NDArray[np.float64]) -> float:
    """Standard error of the mean; samples of one user are not independent."""
    _, user = np.unique(samples.users, return_inverse=True)
    misses = np.bincount(user, per_sample - per_sample.mean())
    n_users = misses.size
    return float(np.sqrt(n_users / (n_users - 1) * (misses**2).sum()) / user.size) if n_users > 1 else float("nan")


if __name__ == "__main__":
    main()
