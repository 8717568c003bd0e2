# SPDX-License-Identifier: Apache-2.0
"""The quickstart's two plots. Every mark is named where it stands, so neither needs a legend."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

GREY = "0.45"


class Point(NamedTuple):
    """One model: what it reads and how often it is right, alone and with the prior, each (HR@20, standard error)."""

    name: str
    rows: NDArray[np.int64]
    alone: tuple[float, float]
    with_prior: tuple[float, float] | None
    users_per_second: float


def accuracy(points: Sequence[Point], yardsticks: dict[str, float]) -> Figure:
    """HR@20 against rows per user; yardsticks, which read no rows, are lines named in the right margin."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = _plain(figure.add_subplot())
    shown = [value for point in points for value, _ in (point.alone, point.with_prior or point.alone)]
    top = 1.2 * max(*shown, *yardsticks.values(), 0.05)
    axes.set(xlim=(0, 1.2 * max(float(point.rows.mean()) for point in points)), ylim=(0, top))
    axes.set(
        xlabel="rows that the model reads per user (further left: cheaper)",
        ylabel="HR@20 (higher: better)",
        title="Filled: the model alone. Hollow: with the prior. Bars: ± one standard error.",
    )
    axes.title.set_fontsize(10)
    heights = spread_out(list(yardsticks.values()), 0.05 * top)
    for (name, value), height in zip(yardsticks.items(), heights, strict=True):
        axes.axhline(value, linestyle="--", linewidth=1, color=GREY, zorder=0)
        axes.text(1.01, height, name, transform=axes.get_yaxis_transform(), va="center", color=GREY, fontsize=9)
    for number, point in enumerate(points):
        x, color = float(point.rows.mean()), f"C{number}"
        marks = [(point.alone, point.name, color)]
        if point.with_prior is not None:
            marks.append((point.with_prior, "+ prior", "white"))
        lowest = min(value for (value, _), _, _ in marks)
        for (value, error), name, fill in marks:
            axes.errorbar(x, value, yerr=error, fmt="o", color=color, markerfacecolor=fill, capsize=3)
            below = value == lowest and value > 0.15 * top
            axes.annotate(
                name,
                (x, value - error if below else value + error),
                (0, -5 if below else 5),
                textcoords="offset points",
                ha="center",
                va="top" if below else "bottom",
                color=color,
                fontsize=9,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
            )
    return figure


def cost(points: Sequence[Point]) -> Figure:
    """What a user costs: rows, with those of the tenth and the ninetieth of a hundred users, and users per second."""
    figure = Figure(figsize=(8, 0.9 + 0.5 * len(points)), layout="constrained")
    left, right = (_plain(axes) for axes in figure.subplots(1, 2, sharey=True))
    names = [point.name for point in points]
    rows = [float(point.rows.mean()) for point in points]
    shares = [np.percentile(point.rows, (10, 90)) for point in points]
    ranges = [f"{mean:.0f} ({low:.0f} to {high:.0f})" for mean, (low, high) in zip(rows, shares, strict=True)]
    speed = [point.users_per_second for point in points]
    _bars(left, names, rows, ranges, "rows per user (shorter: cheaper)")
    _bars(right, names, speed, [f"{each:.0f}" for each in speed], "users per second (longer: faster)")
    left.invert_yaxis()
    return figure


def save(figure: Figure, path: Path) -> None:
    """Under a temporary name first, so that an unfinished picture is never taken for one."""
    unfinished = path.with_suffix(".part")
    figure.savefig(unfinished, dpi=120, format="png")
    unfinished.replace(path)


def spread_out(heights: Sequence[float], gap: float) -> list[float]:
    """The heights, in their order, moved up where one is closer than ``gap`` above another."""
    moved = list(heights)
    order = sorted(range(len(moved)), key=moved.__getitem__)
    for below, above in zip(order, order[1:], strict=False):
        moved[above] = max(moved[above], moved[below] + gap)
    return moved


def _bars(axes: Any, names: Sequence[str], values: Sequence[float], labels: Sequence[str], title: str) -> None:
    axes.barh(names, values, color=[f"C{number}" for number in range(len(names))], height=0.6)
    for place, (value, label) in enumerate(zip(values, labels, strict=True)):
        axes.annotate(label, (value, place), (4, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_xlim(0, 1.5 * max(values))
    axes.set_xlabel(title, fontsize=9)


def _plain(axes: Any) -> Any:
    axes.spines[["top", "right"]].set_visible(False)
    return axes
