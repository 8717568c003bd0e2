# SPDX-License-Identifier: Apache-2.0
"""What needs no network, on the test split: yardsticks, priors alone, and priors together.

    python recipes/yardsticks.py path/to/ml-100k path/to/ml-1m
    python recipes/yardsticks.py path/to/ml-1m --seen_items allowed

Prints a Markdown table per data set: HR and NDCG by item with standard errors over users, and the seconds that fitting
took. Whole histories are looked at; what is anywhere in them is left out unless it is allowed. Weights of priors
together are fitted on the validation split.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# an installed patchkern comes first
sys.path.append(str(Path(__file__).resolve().parents[1]))

import patchkern as pk
from patchkern.data import Interactions, open_dataset, prepare
from patchkern.evaluation import evaluate, most_popular, transitions
from recipes.commands import Parser
from recipes.ranking import by_prior

Lists = list[list[Any]]

KS = (10, 20)
PRIORS: dict[str, tuple[Any, dict[str, Any]]] = {
    "transitions": (pk.TransitionPrior, {}),
    "ridge": (pk.LinearPrior, {}),
    "EASE": (pk.LinearPrior, {"form": "ease"}),
}
TOGETHER = (("ridge", "transitions"), ("EASE", "transitions"), ("ridge", "EASE", "transitions"))


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__)
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
    test, val = data.samples("test").spread(limit), data.samples("val").spread(limit)
    targets = data.targets(test)
    rows = []

    def add(name: str, lists: Lists, seconds: float | None = None) -> None:
        found = evaluate(lists, targets, KS, catalog=catalog, users=test.users).as_dict()
        measures = [f"{measure}@{k}" for measure in ("HR", "NDCG") for k in KS]
        cells = [f"{found[measure]:.4f} ± {found[f'{measure} ±']:.4f}" for measure in measures]
        rows.append(f"| {' | '.join([name, *cells, '' if seconds is None else f'{seconds:.1f}'])} |")

    def ranked(prior: Any) -> Lists:
        return by_prior(data, catalog, test, prior, max(KS), unseen=unseen).ranking.as_lists()

    add("most popular", most_popular(data, test, max(KS), unseen=unseen, max_items=None).as_lists())
    add("transitions", transitions(data, test, max(KS), unseen=unseen, max_items=None).as_lists())
    fitted: dict[str, tuple[Any, float]] = {}
    for name, (kind, settings) in PRIORS.items():
        begin = time.process_time()
        prior = kind(data, catalog, **settings)
        fitted[name] = prior, time.process_time() - begin
        add(f"{name} alone", ranked(prior), fitted[name][1])
    for names in TOGETHER:
        parts = [fitted[name][0] for name in names]
        both = pk.CombinedPrior.fit(
            parts, catalog, data.before(val), data.targets(val), k=max(KS), exclude_seen=unseen
        )  # fmt: skip
        weighted = " + ".join(f"{weight:.2g} {name}" for name, weight in zip(names, both.weights, strict=True))
        add(weighted, ranked(both), sum(fitted[name][1] for name in names))
    columns = " | ".join([*(f"HR@{k}" for k in KS), *(f"NDCG@{k}" for k in KS)])
    head = f"| {data.name} | {columns} | fit s |\n| --- |{' --: |' * (2 * len(KS) + 1)}\n"
    return head + "\n".join(rows) + "\n"


if __name__ == "__main__":
    main()
