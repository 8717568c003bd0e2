# SPDX-License-Identifier: Apache-2.0
"""What was measured of policies on whole histories: a table, a CSV and a plot."""

from __future__ import annotations

import argparse
import csv
import platform
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib import ticker
from matplotlib.figure import Figure

import patchkern as pk
from patchkern.data import Interactions
from patchkern.evaluation import Estimate
from recipes.long_history_results import Result
from recipes.plots import save
from recipes.tables import markdown_table

NAMES = {"text": "text", "items": "item patches", "sessions": "session patches"}


def table(results: Sequence[Result], k: int) -> list[str]:
    """A row per policy, see `markdown_table`."""
    header = ["", "items/user", "rows/user", "most rows", "s/user", "speed-up", "predicted MiB", "measured MiB"]
    header += ["users at once", "longest history"]
    trained = results[0].accuracy is not None
    if trained:
        header += ["test items", f"HR@{k}"]
    lines = [header]
    for result in results:
        faster = speed_up(result, results)
        line = [
            NAMES[result.name],
            f"{result.items.mean():.1f}",
            f"{result.rows.mean():.1f}",
            f"{result.rows.max()}",
            f"{result.seconds_per_user:.4f}",
            "" if faster is None else f"{faster:.2f}",
            mebibytes(result.predicted),
            mebibytes(result.measured),
            f"{result.users_at_once}",
            f"{result.longest:,}",
        ]
        if result.accuracy is not None:
            scores = result.accuracy.evaluation.as_dict()
            hits = Estimate(scores[f"HR@{k}"], scores[f"HR@{k} ±"])
            line += [f"{result.accuracy.items.mean():.1f}", str(hits)]
        lines.append(line)
    return markdown_table(lines)


def speed_up(result: Result, results: Sequence[Result]) -> float | None:
    """Against text, where that was measured."""
    text = next((other for other in results if other.name == "text"), None)
    return None if text is None else text.seconds_per_user / result.seconds_per_user


def mebibytes(count: int) -> str:
    return f"{count / 2**20:,.1f}"


def write_csv(path: Path, results: Sequence[Result], data: Interactions, args: argparse.Namespace) -> None:
    """One line per policy, then what it was measured with."""
    device = torch.device(args.device)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    shared = {
        "num_beams": args.num_beams,
        "k": args.k,
        "budget_bytes": args.budget,
        "data": data.name,
        "model": args.checkpoint or args.shape,
        "dtype": args.dtype,
        "device": gpu or f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "patchkern": pk.__version__,
    }
    lines = []
    for result in results:
        found = result.accuracy
        scores = {} if found is None else found.evaluation.as_dict()
        lines.append(
            {
                "policy": result.name,
                "users": result.rows.size,
                "items_per_user": result.items.mean(),
                "rows_per_user": result.rows.mean(),
                "most_rows": result.rows.max(),
                "seconds_per_user": result.seconds_per_user,
                "speed_up": speed_up(result, results),
                "predicted_bytes": result.predicted,
                "measured_bytes": result.measured,
                "users_at_once": result.users_at_once,
                "chunk_rows": result.chunk_rows,
                "longest_history": result.longest,
                "limited_by": result.limit,
                "samples": None if found is None else found.items.size,
                "items_per_sample": None if found is None else found.items.mean(),
                "hr": scores.get(f"HR@{args.k}"),
                "hr_error": scores.get(f"HR@{args.k} ±"),
                **shared,
            }
        )
    unfinished = path.with_suffix(".part")
    with unfinished.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    unfinished.replace(path)


def plot(path: Path, results: Sequence[Result], args: argparse.Namespace) -> None:
    figure = Figure(figsize=(10, 7), layout="constrained")
    (times, memory), (rows, histories) = figure.subplots(2, 2)
    names = [NAMES[result.name] for result in results]
    place = np.arange(len(results))
    times.bar_label(times.bar(names, [result.seconds_per_user for result in results]), fmt="{:.3g}")
    times.set(ylabel="s", title="Time per user")
    for shift, label in ((-0.2, "predicted"), (0.2, "measured")):
        bars = memory.bar(place + shift, [getattr(result, label) / 2**20 for result in results], 0.4, label=label)
        memory.bar_label(bars, fmt="{:,.0f}")
    memory.set(ylabel="MiB", title=f"Peak memory, of {mebibytes(args.budget)} MiB", xticks=place, xticklabels=names)
    memory.margins(y=0.2)
    memory.legend(frameon=False, loc="upper right", ncols=2)
    for result in results:
        share = np.arange(1, result.rows.size + 1) / result.rows.size
        rows.step(np.sort(result.rows), share, where="post", label=NAMES[result.name])
    rows.set(xscale="log", xlabel="rows", ylabel="share of users with at most so many", title="Rows per user")
    rows.set_ylim(0, 1.02)
    rows.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    rows.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,g}"))
    rows.xaxis.set_minor_locator(ticker.NullLocator())
    rows.legend(frameon=False)
    histories.bar_label(histories.bar(names, [result.longest for result in results]), fmt="{:,.0f}")
    histories.set(yscale="log", ylabel="items", title="Longest history that fits")
    for axes in (times, memory, rows, histories):
        axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)
