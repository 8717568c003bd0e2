# SPDX-License-Identifier: Apache-2.0
"""What a compressed past is still worth when it has not been updated for a while: the lists behind old states.

    python recipes/stale_states.py --data ml-1m --output_dir runs/learned     # after learned_compression.py there
    python recipes/stale_states.py --data ml-1m --output_dir runs/learned --rows experts memory --lags 1 2 4

Each test sample is read with the recent items that it is always read with, and with its past as that was compressed so
many blocks of items earlier: the items in between are neither in the state nor recent, and nowhere else. "no state" has
the recent items alone. All rows and columns are of the same samples: those whose past has more blocks than the longest
lag. Errors are over users; the second table is of differences from the state that is up to date, 0 blocks old.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

sys.path.append(str(Path(__file__).resolve().parents[1]))  # an installed patchkern comes first

import patchkern as pk
from patchkern.data import Interactions, Samples
from patchkern.data.preparation import add_arguments, load
from patchkern.evaluation import estimate, paired_difference
from patchkern.training import item_log_probs
from recipes.commands import Parser
from recipes.learned_compression import device_of_runs
from recipes.models import load_saved
from recipes.ranking import ScoredItems
from recipes.tables import markdown_table

ROWS = ("experts", "experts-blocks", "memory", "memory-append")
K = 20
NOTHING = "no state"


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    args = parse(argv)
    data = load(args)
    models = {row: [read_model(folder) for folder in own] for row, own in args.runs.items()}
    policies = [own[0].policy for own in models.values()]
    samples = with_past(data, data.samples("test").spread(args.limit), policies, args.lags[-1] + 1)
    users = data.user_ids[samples.users].astype(str)
    lags = [*map(str, args.lags), NOTHING]
    tables: list[list[list[str]]] = [[["HR@20", *lags]], [["difference", *lags[1:]]]]
    numbers = {}
    for row, own in models.items():
        found = [[hits(model, data, samples, lag) for lag in (*args.lags, None)] for model in own]
        means = np.mean(found, axis=0)
        tables[0].append([row, *(str(estimate(column, users)) for column in means)])
        tables[1].append([row, *(str(paired_difference(column, means[0], users)) for column in means[1:])])
        numbers[row] = dict(zip(lags, means.mean(axis=1).tolist(), strict=True))
    print(
        f"{data.name}, seeds {' '.join(map(str, args.seeds))}, {users.size:,} samples; columns: how many blocks of "
        f"{policies[0].block} items ago the state was made; ± one standard error over users"
    )
    for cells in tables:
        print("\n".join(["", *markdown_table(cells)]), flush=True)
    return numbers


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add_arguments(parser)
    parser.add_argument("--output_dir", required=True, type=Path, help="of recipes/learned_compression.py")
    parser.add_argument("--rows", nargs="+", choices=ROWS, help="all that were trained, where not given")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--lags", type=int, nargs="+", default=[1, 2, 4], help="blocks; 0 is always there")
    parser.add_argument("--limit", type=int, help="test samples, spread over all, before those with a past are taken")
    args = parser.parse_args(argv)
    if min(args.lags) < 0:
        parser.error(f"--lags: expected numbers of at least 0, got {min(args.lags)}")
    args.lags = sorted({0, *args.lags})
    runs = {row: [args.output_dir / f"{row}-{seed}" / "model" for seed in args.seeds] for row in args.rows or ROWS}
    args.runs = runs if args.rows else {row: own for row, own in runs.items() if all(map(Path.exists, own))}
    missing = [folder for own in (args.runs or runs).values() for folder in own if not folder.exists()]
    if missing:
        parser.error(f"--output_dir: expected runs of recipes/learned_compression.py, got no {missing[0]}")
    return args


def read_model(folder: Path) -> Any:
    """The best model of a run."""
    model: Any = load_saved(folder, torch.float32)
    return model.to(device_of_runs()).eval()


def with_past(data: Interactions, samples: Samples, policies: Sequence[Any], blocks: int) -> Samples:
    """Those of whose past at least so many blocks are compressed under each of the policies."""
    lengths = data.before(samples).lengths
    chosen = np.all([compressed(policy, lengths) >= blocks * policy.block for policy in policies], axis=0)
    if not chosen.any():
        raise ValueError(f"--lags: expected some sample with {blocks} blocks of {policies[0].block} items, got none")
    return samples.take(chosen)


def compressed(policy: Any, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """``(S,)`` how many items of histories of these lengths are in their users' states."""
    found: NDArray[np.int64] = policy.cuts(lengths) if isinstance(policy, pk.Experts) else policy.absorbed(lengths)
    return found


def hits(model: Any, data: Interactions, samples: Samples, lag: int | None) -> NDArray[np.float64]:
    """``(S,)`` whether each target is in the list behind a state of so many blocks ago, or behind none."""
    histories = gapped(data.before(samples), model.policy, lag)
    numbers, positions = np.arange(len(histories)), histories.lengths
    items = np.insert(histories.items, histories.offsets[1:], data.targets(samples))
    whole = pk.Histories(items, histories.offsets + np.arange(len(histories) + 1))
    scored = ScoredItems(data, samples, model.catalog, K, unseen=True)
    for chosen, scores in item_log_probs(model, whole, (numbers, positions), model.policy):
        scored.add(chosen, scores)
    lists = scored.ranking.items
    found: NDArray[np.float64] = (lists == data.targets(samples)[:, None]).any(axis=1).astype(np.float64)
    return found


def gapped(histories: pk.Histories, policy: Any, lag: int | None) -> pk.Histories:
    """Histories without the items that came after the state and are not recent.

    What is compressed of such a history is what was compressed ``lag`` blocks earlier, as borders lie at multiples of a
    block, and its recent items are the same.
    """
    until = compressed(policy, histories.lengths)
    kept = np.zeros_like(until) if lag is None else np.maximum(until - lag * policy.block, 0)
    place = np.arange(histories.items.size) - np.repeat(histories.offsets[:-1], histories.lengths)
    chosen = (place < np.repeat(kept, histories.lengths)) | (place >= np.repeat(until, histories.lengths))
    lengths = histories.lengths - until + kept
    return pk.Histories(histories.items[chosen], np.append(0, np.cumsum(lengths)))


if __name__ == "__main__":
    main()
