# SPDX-License-Identifier: Apache-2.0
"""The table of recipes/learned_compression.py, of what its runs left in their folders."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from patchkern.data import Interactions
from patchkern.evaluation import estimate, paired_difference
from recipes import per_sample
from recipes.learned_compression_rows import Row
from recipes.results import KS
from recipes.tables import markdown_table

MEASURES = [f"{kind}@{k}" for kind in ("HR", "NDCG") for k in KS]


def table(
    rows: dict[str, Row], args: argparse.Namespace, data: Interactions, folder: Path
) -> tuple[list[str], dict[str, dict[str, float]]]:
    """Means over seeds; errors over users, of each sample's mean over seeds; and the numbers by row and column."""
    values: dict[str, dict[str, NDArray[np.float64]]] = {}
    users: dict[str, NDArray[np.str_]] = {}
    numbers: dict[str, dict[str, float]] = {}
    header = ["row", *MEASURES, "sd over seeds", "rows read", "bytes a user", "rows a target", "s training"]
    cells = [header]
    for name, row in rows.items():
        files = [per_sample.read(folder / f"{name}-{seed}" / f"{row.split}.csv") for seed in args.seeds]
        known = [json.loads((folder / f"{name}-{seed}" / "result.json").read_text("utf-8")) for seed in args.seeds]
        of_seeds = [measures_of(file.columns["rank"]) for file in files]
        users[name] = files[0].users
        values[name] = {measure: np.mean([own[measure] for own in of_seeds], axis=0) for measure in MEASURES}
        main = [float(own[MEASURES[1]].mean()) for own in of_seeds]
        spread = float(np.std(main, ddof=1)) if len(main) > 1 else float("nan")
        means = {key: float(np.mean([own[key] for own in known])) for key in known[0]}
        seconds = f"{means['seconds']:,.0f}{'+' * bool(means['resumed'])}" if "seconds" in means else ""
        cells.append([
            f"{name}: {row.what}",
            *(str(estimate(values[name][measure], users[name])) for measure in MEASURES),
            "" if np.isnan(spread) else f"{spread:.4f}",
            f"{means['rows']:.1f}",
            f"{means['bytes']:,.0f}",
            f"{means['rows per target']:.2f}" if "rows per target" in means else "",
            seconds,
        ])  # fmt: skip
        numbers[name] = {measure: float(values[name][measure].mean()) for measure in MEASURES} | means
    shape = f"model {args.model}" if args.model else f"{args.backbone}, {args.layers} layers of {args.width}"
    lines = [
        f"{data.name}, {shape}, seeds {', '.join(map(str, args.seeds))}, "
        f"{args.epochs:g} epochs, block {args.block}, keep {args.keep}; ± one standard error over users; +: resumed",
        "",
        *markdown_table(cells),
    ]
    differences = [["difference on the same samples", *MEASURES[1::2]]]
    for name, row in rows.items():
        if row.beside in rows:
            pairs = ((values[name][measure], values[row.beside][measure]) for measure in MEASURES[1::2])
            found = [str(paired_difference(one, other, users[name])) for one, other in pairs]
            differences.append([f"{name} - {row.beside}", *found])
    if len(differences) > 1:
        lines += ["", *markdown_table(differences)]
    return lines, numbers


def measures_of(ranks: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """``{measure: (S,)}`` of the ranks of the targets, 0 where they are not in the list."""
    found = {}
    for k in KS:
        listed = (ranks > 0) & (ranks <= k)
        found[f"HR@{k}"] = listed.astype(np.float64)
        found[f"NDCG@{k}"] = listed / np.log2(np.maximum(ranks, 1) + 1)
    return {measure: found[measure] for measure in MEASURES}
