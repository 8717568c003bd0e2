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
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

import patchkern as pk
from patchkern.data import Interactions, Samples, open_dataset, prepare
from patchkern.evaluation import evaluate, most_popular, transitions

Lists = list[list[Any]]

KS = (10, 20)
PRIORS: dict[str, tuple[Any, dict[str, Any]]] = {
    "transitions": (pk.TransitionPrior, {}),
    "ridge": (pk.LinearPrior, {}),
    "EASE": (pk.LinearPrior, {"form": "ease"}),
}
TOGETHER = (("ridge", "transitions"), ("EASE", "transitions"), ("ridge", "EASE", "transitions"))
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

    def add(name: str, lists: Lists, seconds: float | None = None) -> None:
        found = evaluate(lists, targets, KS, catalog=catalog)
        means = [found.hr(k) for k in KS] + [found.ndcg(k) for k in KS]
        errors = [error_over_users(test, per(k)) for per in (found.hits, found.gains) for k in KS]
        cells = [f"{mean:.4f} ± {error:.4f}" for mean, error in zip(means, errors, strict=True)]
        rows.append(f"| {' | '.join([name, *cells, '' if seconds is None else f'{seconds:.1f}'])} |")

    add("most popular", most_popular(data, test, max(KS), unseen=unseen, max_items=None).as_lists())
    add("transitions", transitions(data, test, max(KS), unseen=unseen, max_items=None).as_lists())
    fitted: dict[str, tuple[Any, float]] = {}
    for name, (kind, settings) in PRIORS.items():
        begin = time.process_time()
        prior = kind(data, catalog, **settings)
        fitted[name] = prior, time.process_time() - begin
        add(f"{name} alone", likeliest(data, catalog, test, prior, unseen), fitted[name][1])
    for names in TOGETHER:
        parts = [fitted[name][0] for name in names]
        both = pk.CombinedPrior.fit(
            parts, catalog, data.before(val), data.targets(val), k=max(KS), exclude_seen=unseen
        )  # fmt: skip
        weighted = " + ".join(f"{weight:.2g} {name}" for name, weight in zip(names, both.weights, strict=True))
        add(weighted, likeliest(data, catalog, test, both, unseen), sum(fitted[name][1] for name in names))
    columns = " | ".join([*(f"HR@{k}" for k in KS), *(f"NDCG@{k}" for k in KS)])
    head = f"| {data.name} | {columns} | fit s |\n| --- |{' --: |' * (2 * len(KS) + 1)}\n"
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
