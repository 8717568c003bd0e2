# SPDX-License-Identifier: Apache-2.0
"""Compare two results on the same samples: is the second better than the first, and how sure is that?

    python recipes/evaluate.py runs/text  --data ml-1m --exclude_seen --output text.csv
    python recipes/evaluate.py runs/items --data ml-1m --exclude_seen --output items.csv
    python recipes/compare.py text.csv items.csv

Both are files of evaluate.py with one line per sample. Errors are over users, whose samples are not independent. That
of the difference is far smaller than that of either result, for what the samples have in common cancels. p: how often
a difference as large, in either direction, would come about if it were chance which of the two a user's results are of.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

sys.path.append(str(Path(__file__).resolve().parents[1]))  # an installed patchkern comes first

from patchkern.evaluation import (
    HISTORY_LENGTHS,
    TRAINING_COUNTS,
    Difference,
    Estimate,
    estimate,
    paired_difference,
    slices,
)
from recipes import per_sample
from recipes.commands import Parser
from recipes.per_sample import PerSample
from recipes.tables import markdown_table

Compared = dict[str, tuple[Estimate, Estimate, Difference]]


def main(argv: Sequence[str] | None = None) -> Compared:
    args = parse(argv)
    first, second = per_sample.read(args.first), per_sample.read(args.second)
    second = second.as_in(first)
    if first.measures().keys().isdisjoint(second.measures()):
        raise ValueError(
            f"{args.second}: expected some measure of {args.first} ({', '.join(first.measures())}), got "
            f"{', '.join(second.measures())}; --ks of evaluate.py says which"
        )
    users = np.unique(first.users).size
    print(f"{len(first.samples):,} samples of {users:,} users; the difference is {args.second} minus {args.first}\n")
    every = np.ones(len(first.samples), bool)
    compared = compare(first, second, every, args.draws)
    print("\n".join(table(compared)))
    if args.slices:
        for by, parts in sliced(first).items():
            for name, chosen in parts.items():
                print(f"\n{by} {name}: {int(chosen.sum()):,} samples of {np.unique(first.users[chosen]).size:,} users")
                if chosen.any():
                    print("\n".join(table(compare(first, second, chosen, args.draws))))
    return compared


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("first", type=Path, help="a file that evaluate.py wrote")
    parser.add_argument("second", type=Path, help="one of the same samples")
    parser.add_argument("--slices", action="store_true", help="also by length of history and by count in training")
    parser.add_argument("--draws", type=int, default=10_000, help="of the test (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.draws < 1:
        parser.error(f"--draws: expected at least 1, got {args.draws}")
    return args


def compare(first: PerSample, second: PerSample, chosen: NDArray[np.bool_], draws: int) -> Compared:
    """Per measure that both files have: the first, the second, and by how much the second is above the first."""
    theirs = second.measures()
    found: Compared = {}
    for name, one in first.measures().items():
        if name not in theirs:
            continue
        both = chosen & np.isfinite(one) & np.isfinite(theirs[name])
        a, b, users = one[both], theirs[name][both], first.users[both]
        found[name] = (estimate(a, users), estimate(b, users), paired_difference(b, a, users, draws=draws))
    return found


def sliced(samples: PerSample) -> dict[str, dict[str, NDArray[np.bool_]]]:
    lengths, counts = (samples.columns[name].astype(np.int64) for name in ("history_length", "training_count"))
    return {
        "history length": slices(lengths, HISTORY_LENGTHS),
        "training interactions of the target": slices(counts, TRAINING_COUNTS),
    }


def table(compared: Compared) -> list[str]:
    rows = [["", "first", "second", "difference", "p"]]
    for name, (first, second, difference) in compared.items():
        rows.append([name, str(first), str(second), difference.change, difference.chance])
    return markdown_table(rows)


if __name__ == "__main__":
    main()
