# SPDX-License-Identifier: Apache-2.0
"""Train a recommender over item ids, rank the test users' items by it, and compare: what patchkern stands beside.

    python recipes/baselines/train.py --model sasrec --data ml-100k --output_dir runs/sasrec
    python recipes/baselines/train.py --model gru4rec --data ml-1m --output_dir runs/gru --prior transitions linear
    python recipes/baselines/train.py --model caser --setting paper --data ml-100k --output_dir runs/caser
    python recipes/baselines/train.py --model morec --encoder all-MiniLM-L6-v2 --data ml-1m --output_dir runs/morec
    python recipes/baselines/train.py --evaluate_only --output_dir runs/sasrec --data ml-100k --seen_items allowed

--setting tuned trains well: cross-entropy over all items at every position; --setting paper as the PatchRec paper's
baselines: one random item against the target, at the last position alone. The weights of the best validation are kept,
and what a killed run goes on from with --resume.

What is ranked and how it is counted is as in recipes/evaluate.py, with items of the whole history left out or allowed
(--seen_items takes both), alone and with priors whose weights are fitted on the validation split. One line per sample
goes to a CSV beside the weights, of which recipes/compare.py compares any two, of evaluate.py too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).resolve().parents[2]))  # an installed patchkern comes first

import patchkern as pk
from patchkern.data import Interactions, samples_of
from patchkern.data.preparation import load
from patchkern.evaluation import Evaluation
from recipes.baselines.batches import TrainingHistories
from recipes.baselines.evaluation import rank
from recipes.baselines.flags import chosen_settings, parse
from recipes.baselines.losses import bf16_pays
from recipes.baselines.morec import title_vectors
from recipes.baselines.networks import Recommender
from recipes.baselines.runs import Run, fingerprint, load_run
from recipes.baselines.scoring import Ranker
from recipes.baselines.training import Training

VALIDATION_SAMPLES = 2000
# With the settings, what decides how a run goes on.
DECIDE = ("model", "setting", "data", "min_rating", "min_interactions", "k_core", "split_by", "encoder", "seed")


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, list[Evaluation]]]:
    """Returns evaluations by what is done about seen items, and by name as in the printed tables."""
    args = parse(__doc__, argv)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    data = load(args)
    samples_of(data, args.split)
    catalog = pk.Catalog.from_titles(data.titles, lambda title: list(title.encode()))
    run = Run(args.output_dir)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not args.evaluate_only:
        train(run, data, catalog, args, device)
    model, settings = load_run(run, catalog)
    return rank(model.to(device), Ranker(data, catalog, settings.window), args, run.folder)


def train(run: Run, data: Interactions, catalog: pk.Catalog, args: argparse.Namespace, device: torch.device) -> None:
    """Train, keep the best weights in the run's folder, and print what it took."""
    settings, histories = chosen_settings(args), TrainingHistories(data, catalog)
    validation = samples_of(data, "val").spread(VALIDATION_SAMPLES)
    titles = None if args.model != "morec" else title_vectors(args.encoder, list(data.titles.values()))
    arguments: dict[str, Any] = {name: getattr(args, name) for name in DECIDE} | {
        "settings": asdict(settings),
        "items": fingerprint(catalog),
        "title_width": None if titles is None else titles.shape[1],
        "bf16": settings.loss == "softmax" and bf16(args, run, len(catalog), settings.width, device),
    }
    run.start(arguments, args.resume)
    torch.manual_seed(args.seed)
    model = Recommender(args.model, len(catalog), settings, titles).to(device)
    print(
        f"patchkern {pk.__version__}, torch {torch.__version__}, {device}, {torch.get_num_threads()} threads\n{data}\n"
        f"{args.model}, {args.setting}: {sum(map(torch.numel, model.parameters())):,} parameters, bfloat16 "
        f"{'on' if arguments['bf16'] else 'off'}, {settings}",
        flush=True,
    )
    ranker = Ranker(data, catalog, settings.window)
    training = Training(model, histories, ranker, validation, settings, seed=args.seed, bf16=arguments["bf16"])
    record = training.run(run)
    best = max(record["epochs"], key=lambda epoch: epoch["NDCG@20"])
    print(
        f"{record['steps']:,} steps, {record['seconds']:.1f} s ({record['cpu_seconds']:.1f} s of a CPU), "
        f"{record['targets'] / record['seconds']:,.0f} targets/s; validating {record['validation_seconds']:.1f} s\n"
        f"best epoch {record['epochs'].index(best) + 1}: validation NDCG@20 {best['NDCG@20']:.4f}, HR@20 "
        f"{best['HR@20']:.4f}; saved: {run.folder}",
        flush=True,
    )


def bf16(args: argparse.Namespace, run: Run, n_items: int, width: int, device: torch.device) -> bool:
    """As asked for, else as it was before the run was killed, else measured."""
    if args.bf16 is not None:
        return bool(args.bf16 == "true")
    before = run.arguments()
    return bf16_pays(n_items, width, device) if before is None else bool(before.get("bf16"))


if __name__ == "__main__":
    main()
