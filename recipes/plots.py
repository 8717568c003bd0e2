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
    """HR@20 of each model, beside the rows that it reads; yardsticks, which read none, are lines named above."""
    figure = Figure(figsize=(8, 1.6 + 0.55 * len(points) + 0.2 * len(yardsticks)), layout="constrained")
    axes = _plain(figure.add_subplot())
    shown = [value for point in points for value, _ in (point.alone, point.with_prior or point.alone)]
    axes.set(xlim=(0, 1.2 * max(*shown, *yardsticks.values(), 0.05)), ylim=(len(points) - 0.5, -0.5))
    axes.set_yticks(range(len(points)), [f"{point.name}\n{point.rows.mean():.0f} rows a user" for point in points])
    axes.set_xlabel(
        "HR@20 (further right: better). Filled: the model alone. Hollow: with the prior. Bars: ± one error."
    )
    axes.xaxis.label.set_fontsize(9)
    for height, (name, value) in enumerate(sorted(yardsticks.items(), key=lambda pair: -pair[1])):
        axes.axvline(value, linestyle="--", linewidth=1, color=GREY, zorder=0)
        at = 1.02 + height * 0.3 / len(points)
        axes.text(value, at, name, transform=axes.get_xaxis_transform(), ha="center", color=GREY, fontsize=9)
    for place, point in enumerate(points):
        marks = [(point.alone, f"C{place}")]
        if point.with_prior is not None:
            marks.append((point.with_prior, "white"))
        for (value, error), fill in marks:
            axes.errorbar(value, place, xerr=error, fmt="o", color=f"C{place}", markerfacecolor=fill, capsize=3)
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


def _bars(axes: Any, names: Sequence[str], values: Sequence[float], labels: Sequence[str], title: str) -> None:
    axes.barh(names, values, color=[f"C{number}" for number in range(len(names))], height=0.6)
    for place, (value, label) in enumerate(zip(values, labels, strict=True)):
        axes.annotate(label, (value, place), (4, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_xlim(0, 1.5 * max(values))
    axes.set_xlabel(title, fontsize=9)


def _plain(axes: Any) -> Any:
    axes.spines[["top", "right"]].set_visible(False)
    return axes
