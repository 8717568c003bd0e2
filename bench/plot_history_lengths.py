# SPDX-License-Identifier: Apache-2.0
"""Draw what a user costs by the length of the history, from the table of bench_history_lengths.py.

    python bench/plot_history_lengths.py                                  # the published table
    python bench/plot_history_lengths.py runs/bench/history-lengths.csv

Across: items of the history. Up: seconds of a read and of one more event, bytes that are kept of the user; a row of
panels for each model. Dashed lines are events with their share of the border that a block of items has, where that is
more than the events alone. A line that ends in a cross was stopped there: the next read would have taken too long or
too much memory. Thin grey lines grow in proportion to the items, and to their square.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

sys.path.append(str(Path(__file__).resolve().parents[1]))  # an installed patchkern comes first

from bench import output

PUBLISHED = Path(__file__).with_name("results") / "history-lengths.csv"
PANELS = {"read": "a read, s", "event": "one more event and the list, s", "kept": "kept of the user, bytes"}
MEAN = "event, mean"
STOPPED = "line ends"


class Point(NamedTuple):
    """One measurement at one length."""

    items: int
    p20: float
    p50: float
    p80: float


Line = dict[str, list[Point]]  # by metric


def read(path: Path) -> tuple[dict[str, dict[str, Line]], str]:
    """Model to form to its line, and a sentence about machine and limits.

    Raises:
        ValueError: the table has no such rows.
    """
    models: dict[str, dict[str, Line]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    title = ""
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            if row["metric"] not in (*PANELS, MEAN, STOPPED):
                continue
            config = json.loads(row["config"])
            point = Point(config.get("items", 0), *(float(row[x]) for x in ("p20", "p50", "p80")))
            models[row["mode"]][row["provider"]][row["metric"]].append(point)
            limits = f"lines end before reads of {config['limit']:g} s or {config['memory']}"
            title = f"{config['data']}, {row['cpu']}, {row['threads']} thread(s), {limits}\n"
            title += f"torch {row['torch']}, {row['commit']}, {row['date']}"
    if not models:
        raise ValueError(f"{path}: expected a table of bench_history_lengths.py, found none of its rows")
    return models, title


def draw(models: dict[str, dict[str, Line]], title: str, path: Path) -> None:
    """A row of panels per model; writes a PNG."""
    size = (14, 4.6 * len(models))
    figure, rows = plt.subplots(len(models), len(PANELS), figsize=size, layout="constrained", squeeze=False)
    forms = list(dict.fromkeys(form for lines in models.values() for form in lines))
    for (model, lines), panels in zip(models.items(), rows, strict=True):
        for (metric, unit), panel in zip(PANELS.items(), panels, strict=True):
            for form, line in lines.items():
                draw_line(panel, form, line, metric, f"C{forms.index(form)}")
            panel.set(xscale="log", yscale="log", title=f"{model}: {unit}", xlabel="items of the history")
            panel.grid(linewidth=0.3)
            slopes(panel)
        panels[0].legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    temporary = path.with_name(f"{path.name}.tmp")
    figure.savefig(temporary, dpi=75, format="png")
    temporary.replace(path)
    plt.close(figure)


def draw_line(panel: Axes, form: str, line: Line, metric: str, color: str) -> None:
    if not line[metric]:
        return
    items, low, middle, high = np.array(sorted(line[metric])).T
    panel.errorbar(items, middle, [middle - low, high - middle], marker=".", label=form, color=color, linewidth=1.3)
    if line[STOPPED]:
        panel.plot(items[-1], middle[-1], marker="X", markersize=7, color=color)
    if metric == "event" and line[MEAN]:
        items, _, mean, _ = np.array(sorted(line[MEAN])).T
        panel.plot(items, mean, color=color, linewidth=1, linestyle="--")


def slopes(panel: Axes) -> None:
    """Lines through a corner of the panel, of exponents 1 and 2, which leave its limits as they are."""
    (left, right), (bottom, top) = panel.get_xlim(), panel.get_ylim()
    for power in (1, 2):
        panel.plot([left, right], [bottom, bottom * (right / left) ** power], color="grey", linewidth=0.5)
    panel.set_xlim(left, right)
    panel.set_ylim(bottom, top)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "table", type=Path, nargs="?", default=PUBLISHED, help="default: bench/results/history-lengths.csv"
    )
    output.add_option(parser, "history-lengths.png")
    args = parser.parse_args(argv)
    models, title = read(args.table)
    path = output.prepare(args.output, "history-lengths.png")
    draw(models, title, path)
    print(f"wrote {output.shown(path)}")


if __name__ == "__main__":
    main()
