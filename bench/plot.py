# SPDX-License-Identifier: Apache-2.0
"""Draw how close `pool_rows` comes to the speed of memory, from a CSV of bench_pool_rows.py.

    python bench/plot.py                                   # the published table
    python bench/plot.py runs/bench/pool_rows_cuda.csv --width 2048 --dtype bfloat16

Across: the least bytes a call could move (every row written once, every distinct embedding and the layout read once).
Up: those bytes over the time it took. `copy` moves its bytes exactly once each way: nothing else can be much faster.
One marker per policy, one panel per direction; the batches of one policy are joined.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib import ticker

sys.path.append(str(Path(__file__).resolve().parents[1]))  # an installed patchkern comes first

from bench import output

PUBLISHED = Path(__file__).with_name("results") / "pool_rows.csv"
ELEMENT = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}
MARKERS = {"text": "o", "items": "s", "sessions": "^", "random": "D", "long": "v"}
COPY = "copy"
PANELS = {"forward": "forward", "backward": "gradient of the embeddings"}


class Point(NamedTuple):
    """One provider on one configuration."""

    mode: str
    provider: str
    policy: str
    megabytes: float
    rate: float  # GB/s at the median time
    low: float  # at the 80th percentile
    high: float  # at the 20th


def least_bytes(provider: str, mode: str, config: dict[str, Any]) -> int | None:
    """Bytes that a provider cannot avoid to move; None where a dense (V, D) gradient is most of them."""
    row = config["width"] * ELEMENT[config["dtype"]]
    if provider == COPY:
        return 2 * config["rows"] * row
    moved: int = (config["rows"] + config["distinct_tokens"]) * row
    if mode == "forward":
        # results of earlier versions do not say how large the layout was; lo and hi are most of it
        key = "least_bytes_table" if provider.endswith("+table") else "least_bytes"
        return int(config.get(key, moved + 8 * config["rows"]))
    compact = provider.endswith((" compact", " sparse"))
    return moved + 8 * (config["distinct_tokens"] + config["token_reads"]) if compact else None


def read(path: Path, width: int | None, dtype: str | None) -> tuple[list[Point], str]:
    """The points of one CSV, and a line about the machine.

    Raises:
        ValueError: it holds nothing of that width and dtype.
    """
    points, machine = [], ""
    with path.open(newline="") as file:
        for line in csv.DictReader(file):
            config = json.loads(line["config"])
            if line["metric"] != "time" or config["width"] != (width or config["width"]):
                continue
            moved = least_bytes(line["provider"], line["mode"], config)
            if moved is None or config["dtype"] != (dtype or config["dtype"]):
                continue
            p20, p50, p80 = (moved / float(line[column]) / 1e6 for column in ("p20", "p50", "p80"))
            points.append(Point(line["mode"], line["provider"], config["policy"], moved / 1e6, p50, p80, p20))
            where = line.get("gpu") or f"{line['cpu']}, {line['threads']} thread(s)"
            machine = f"{where}, torch {line['torch']}, {line['commit']}, {line['date']}"
    if not points:
        raise ValueError(f"{path}: expected rows with width {width} and dtype {dtype}, found none")
    return points, machine


def draw(points: Sequence[Point], title: str, path: Path) -> None:
    """One panel per direction; writes a PNG."""
    providers = list(dict.fromkeys(point.provider for point in points if point.provider != COPY))
    palette = plt.get_cmap("tab20")
    colors = {provider: palette((2 * i) % 20 + (i >= 10)) for i, provider in enumerate(providers)}
    figure, panels = plt.subplots(1, 2, figsize=(13, 6), layout="constrained")
    for (mode, name), panel in zip(PANELS.items(), panels, strict=True):
        here = [point for point in points if point.mode == mode]
        fastest = max((point.rate for point in here if point.provider == COPY), default=None)
        if fastest is not None:
            panel.axhline(fastest, color="black", linewidth=0.8, linestyle=":")
        for provider in (COPY, *providers):
            color = "black" if provider == COPY else colors[provider]
            for policy, mine in by_policy(point for point in here if point.provider == provider).items():
                x, y = [point.megabytes for point in mine], [point.rate for point in mine]
                spread = [[point.rate - point.low for point in mine], [point.high - point.rate for point in mine]]
                panel.errorbar(x, y, spread, color=color, marker=MARKERS[policy], markersize=6, linewidth=0.8)
        panel.set(xscale="log", yscale="log", title=name, xlabel="least bytes to move, MB", ylabel="those bytes, GB/s")
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
            axis.set_minor_locator(ticker.NullLocator())
        panel.grid(linewidth=0.3)
    policies = dict.fromkeys(point.policy for point in points)
    keys = [plt.Line2D([], [], color=colors.get(name, "black"), linewidth=3, label=name) for name in (COPY, *providers)]
    keys += [plt.Line2D([], [], color="grey", marker=MARKERS[name], linestyle="", label=name) for name in policies]
    figure.legend(handles=keys, loc="outside right center")
    figure.suptitle(title, fontsize=10)
    temporary = path.with_name(f"{path.name}.tmp")
    figure.savefig(temporary, dpi=120, format="png")
    temporary.replace(path)
    plt.close(figure)


def by_policy(points: Iterable[Point]) -> dict[str, list[Point]]:
    groups: dict[str, list[Point]] = defaultdict(list)
    for point in sorted(points, key=lambda point: point.megabytes):
        groups[point.policy].append(point)
    return groups


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("table", type=Path, nargs="?", default=PUBLISHED, help="default: bench/results/pool_rows.csv")
    parser.add_argument("--width", type=int, help="only this D; default: all of the table's")
    parser.add_argument("--dtype", choices=ELEMENT, help="only this one; default: all of the table's")
    output.add_option(parser, "pool_rows.png")
    args = parser.parse_args(argv)
    points, machine = read(args.table, args.width, args.dtype)
    path = output.prepare(args.output, "pool_rows.png")
    chosen = f"D = {args.width or 'all'}, {args.dtype or 'all dtypes'}"
    draw(points, f"pool_rows, {chosen}\n{machine}", path)
    print(f"wrote {output.shown(path)}")


if __name__ == "__main__":
    main()
