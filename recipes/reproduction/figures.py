# SPDX-License-Identifier: Apache-2.0
"""Plots of what was measured, each with a table of its points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

from recipes import plots
from recipes.reproduction.steps import Folder
from recipes.reproduction.tables import Table, write


class Point(NamedTuple):
    """``error``: of y, over users; 0 where y is exact."""

    x: float
    y: float
    error: float = 0.0
    label: str = ""


Series = Mapping[str, Sequence[Point]]


def draw(folder: Folder, name: str, title: str, x: str, y: str, series: Series, place: str = "results") -> Path | None:
    """``<name>.png``, ``.md`` and ``.csv``; None without points."""
    shown = {key: sorted(points) for key, points in series.items() if points}
    if not shown:
        return None
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    for number, (key, points) in enumerate(shown.items()):
        own = [[point[field] for point in points] for field in range(3)]
        axes.errorbar(own[0], own[1], yerr=own[2], marker="o", capsize=3, color=f"C{number}", label=key)
        for point in points:
            if point.label:
                axes.annotate(point.label, (point.x, point.y), (6, 6), textcoords="offset points", fontsize=9)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(title, fontsize=10)
    if len(shown) > 1:
        axes.legend(frameon=False, fontsize=9)
    target = folder / f"{place}/{name}.png"
    target.parent.mkdir(parents=True, exist_ok=True)
    plots.save(figure, target)
    rows = [["", x, y, "error over users"]]
    tidy = []
    for key, points in shown.items():
        for point in points:
            told = point.label or key
            rows.append([told, f"{point.x:g}", f"{point.y:.4f}", f"{point.error:.4f}" if point.error else ""])
            tidy.append({"figure": name, "series": key, "label": told, x: point.x, y: point.y, "error": point.error})
    notes = [f"![{title}]({target.name})", "", "Paper: its figures were not at hand; no number of theirs is given."]
    return write(folder, name, [Table(name, title, rows, notes, tidy)], place)
