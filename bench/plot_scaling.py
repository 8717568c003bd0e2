# SPDX-License-Identifier: Apache-2.0
"""Draw how a search grows with the history, from the table of bench_search.py.

    python bench/plot_scaling.py                          # the published table
    python bench/plot_scaling.py runs/bench/search.csv

Across: rows of the prompt. Up: bytes of all keys and values with one hypothesis and with many, seconds to compute the
prompt, seconds of one step. Thin lines grow in proportion to the rows.
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

sys.path.append(str(Path(__file__).resolve().parents[1]))  # an installed patchkern comes first

from bench import output

PUBLISHED = Path(__file__).with_name("results") / "search.csv"
# what a metric's name begins with -> its panel
PANELS = {"keys and values": "keys and values, bytes", "prompt": "computing the prompt, s", "step": "one step, s"}


class Point(NamedTuple):
    """One measurement at one length of the prompt."""

    rows: int
    p20: float
    p50: float
    p80: float


def read(path: Path) -> tuple[dict[str, list[Point]], str]:
    """Metric name to its points by rows, and a line about the machine.

    Raises:
        ValueError: the table has no rows of that part.
    """
    points: dict[str, list[Point]] = defaultdict(list)
    title = ""
    with path.open(newline="") as file:
        for line in csv.DictReader(file):
            if line["mode"] != "scaling":
                continue
            config = json.loads(line["config"])
            points[line["metric"]].append(Point(config["rows"], *(float(line[x]) for x in ("p20", "p50", "p80"))))
            where = line.get("gpu") or f"{line['cpu']}, {line['threads']} thread(s)"
            model = f"{config['shape']} model, {config['policy']}"
            title = f"{model}\n{where}, torch {line['torch']}, {line['commit']}, {line['date']}"
    if not points:
        raise ValueError(f'{path}: expected the part "scaling" of bench_search.py, found none')
    return {name: sorted(found) for name, found in points.items()}, title


def draw(points: dict[str, list[Point]], title: str, path: Path) -> None:
    """One panel per kind of cost; writes a PNG."""
    figure, panels = plt.subplots(1, len(PANELS), figsize=(13, 4), layout="constrained")
    for (kind, title_of_panel), panel in zip(PANELS.items(), panels, strict=True):
        names = [name for name in points if name == kind or name.startswith(f"{kind}, ")]
        for name in (name for name in names if not name.endswith("per row")):
            rows, low, middle, high = np.array(points[name]).T
            label = name.removeprefix(f"{kind}, ")
            panel.errorbar(rows, middle, [middle - low, high - middle], marker="o", label=label)
            panel.plot(rows, middle[-1] * rows / rows[-1], color="grey", linewidth=0.5)
        panel.set(xscale="log", yscale="log", title=title_of_panel, xlabel="rows of the prompt")
        panel.grid(linewidth=0.3)
        panel.legend()
    figure.suptitle(title, fontsize=10)
    temporary = path.with_name(f"{path.name}.tmp")
    figure.savefig(temporary, dpi=90, format="png")
    temporary.replace(path)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("table", type=Path, nargs="?", default=PUBLISHED, help="default: bench/results/search.csv")
    output.add_option(parser, "search-scaling.png")
    args = parser.parse_args(argv)
    points, title = read(args.table)
    path = output.prepare(args.output, "search-scaling.png")
    draw(points, title, path)
    print(f"wrote {output.shown(path)}")


if __name__ == "__main__":
    main()
