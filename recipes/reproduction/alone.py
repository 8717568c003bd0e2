# SPDX-License-Identifier: Apache-2.0
"""What needs no network, as a file with one line per sample: a yardstick, or a prior on its own.

    python recipes/reproduction/alone.py --data path/to/ml-100k --system linear-prior --output linear.csv

Whole histories are looked at; what is anywhere in them is left out unless it is allowed.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))  # an installed patchkern comes first

import patchkern as pk
from patchkern.data import samples_of
from patchkern.data.preparation import add_arguments, load
from patchkern.evaluation import evaluate, most_popular, transitions
from recipes.commands import Parser
from recipes.ranking import Lists, by_prior
from recipes.results import KS, Result, Results

PRIORS = {"transitions-prior": pk.TransitionPrior, "linear-prior": pk.LinearPrior}
YARDSTICKS = {"popular": most_popular, "transitions": transitions}


def main(argv: Sequence[str] | None = None) -> Result:
    parser = Parser(description=__doc__)
    add_arguments(parser)
    parser.add_argument("--system", required=True, choices=[*YARDSTICKS, *PRIORS])
    parser.add_argument("--seen_items", choices=["left_out", "allowed"], default="left_out")
    parser.add_argument("--limit", type=int, help="test samples, evenly spaced (default: all)")
    parser.add_argument("--output", required=True, help="the CSV")
    args = parser.parse_args(argv)
    if args.limit is not None and args.limit < 1:
        parser.error(f"--limit: expected at least 1, got {args.limit}")
    data = load(args)
    samples = samples_of(data, "test").spread(args.limit)
    catalog = pk.Catalog.from_titles(data.titles, lambda title: list(title.encode()))
    unseen, nll = args.seen_items == "left_out", {}
    lists: Lists
    if args.system in PRIORS:
        begun = time.process_time()
        prior = PRIORS[args.system](data, catalog)
        print(f"fitted in {time.process_time() - begun:.2f} CPU s", flush=True)
        scored = by_prior(data, catalog, samples, prior, max(KS), unseen=unseen)
        lists, nll = scored.ranking.as_lists(), {"NLL item": scored.nll}
    else:
        lists = YARDSTICKS[args.system](data, samples, max(KS), unseen=unseen, max_items=None).as_lists()
    found = evaluate(lists, data.targets(samples), KS, catalog=catalog, users=samples.users)
    results = Results(data, samples, catalog)
    results[args.system] = Result([found], lists, nll)
    results.write(args.system, Path(args.output))
    print(f"{args.system}: {found}", flush=True)
    return results[args.system]


if __name__ == "__main__":
    main()
