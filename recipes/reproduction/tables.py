# SPDX-License-Identifier: Apache-2.0
"""From files with one line per sample to tables: one way of counting for all systems, the paper's numbers beside."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from patchkern.evaluation import Difference, estimate, paired_difference
from recipes import per_sample
from recipes.per_sample import PerSample
from recipes.reproduction import paper
from recipes.reproduction.names import FORMS, label
from recipes.reproduction.steps import Folder
from recipes.results import KS
from recipes.tables import markdown_table

MEASURES = tuple(f"{name}@{k}" for k in KS for name in ("HR", "NDCG"))
MAIN = f"HR@{KS[-1]}"
_NAME = re.compile(r"(?P<system>.+?)(-s(?P<seed>\d+))?\.(?P<form>paper|allowed|left_out)(-(?P<priors>[a-z-]+))?\.csv")


class Cell(NamedTuple):
    """A measure of a system.

    Attributes:
        mean: over samples and seeds.
        deviation: of the seeds' means, NaN for one seed.
        error: over users, of the mean over seeds.
    """

    mean: float
    deviation: float
    error: float

    def __str__(self) -> str:
        spread = "" if self.deviation != self.deviation else f" ± {self.deviation:.4f}"
        error = "" if self.error != self.error else f" ({self.error:.3f})"
        return f"{self.mean:.4f}{spread}{error}"


@dataclass(frozen=True)
class Entry:
    """One system in one form: a file per seed, all of the same samples."""

    system: str
    form: str
    priors: str
    files: Mapping[int, PerSample]

    @property
    def first(self) -> PerSample:
        return next(iter(self.files.values()))

    def values(self, measure: str, order: PerSample | None = None) -> NDArray[np.float64]:
        """``(seeds, S)``, samples in the order of a file, by default the first seed's."""
        each = (one.as_in(order or self.first) for one in self.files.values())
        return np.stack([_measure(one, measure) for one in each])

    def cell(self, measure: str) -> Cell:
        values = self.values(measure)
        seeds = values.mean(axis=1)
        deviation = float(seeds.std(ddof=1)) if seeds.size > 1 else float("nan")
        return Cell(float(values.mean()), deviation, estimate(values.mean(axis=0), self.first.users).error)

    def above(self, other: Entry, measure: str) -> Difference:
        """By how much it is above another on the same samples, both averaged over their seeds."""
        theirs = other.values(measure, self.first).mean(axis=0)
        return paired_difference(self.values(measure).mean(axis=0), theirs, self.first.users)


def entries(folder: Folder) -> dict[tuple[str, str, str], Entry]:
    """``{(system, form, priors): ...}`` of all files in ``csv``, whoever put them there.

    Their names are ``<system>[-s<seed>].<form>[-<priors>].csv``.

    Raises:
        ValueError: a file of another name, or not one with a line per sample.
    """
    files: dict[tuple[str, str, str], dict[int, PerSample]] = {}
    for path in sorted((folder / "csv").glob("*.csv")):
        found = _NAME.fullmatch(path.name)
        if found is None:
            raise ValueError(f"{path}: expected a name like text-s0.left_out.csv, with one of {', '.join(FORMS)}")
        key = (found["system"], found["form"], found["priors"] or "")
        files.setdefault(key, {})[int(found["seed"] or 0)] = per_sample.read(path)
    return {key: Entry(*key, dict(sorted(seeds.items()))) for key, seeds in files.items()}


def _measure(one: PerSample, measure: str) -> NDArray[np.float64]:
    name, _, k = measure.partition("@")
    hit = one.columns[f"hit@{k}"] > 0
    if name == "HR":
        return hit.astype(np.float64)
    rank = one.columns.get(f"rank@{k}", one.columns["rank"])  # the paper decodes anew for each k
    return np.where(hit, 1 / np.log2(np.maximum(rank, 1) + 1), 0.0)


# ------------------------------------------------------------------ tables


@dataclass(frozen=True)
class Table:
    """Rows that are written as Markdown and, without words, as CSV."""

    name: str
    title: str
    rows: list[list[str]]
    notes: list[str]
    tidy: list[dict[str, Any]]

    def markdown(self) -> str:
        return "\n".join([f"### {self.title}", "", *markdown_table(self.rows), "", *self.notes]) + "\n"


def write(folder: Folder, name: str, tables: Sequence[Table], place: str = "results") -> Path:
    """``<name>.md`` and ``<name>.csv``."""
    lines = [line for table in tables for line in table.tidy]
    columns = list(dict.fromkeys(column for line in lines for column in line))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    folder.write(f"{place}/{name}.csv", text.getvalue())
    return folder.write(f"{place}/{name}.md", "\n".join(table.markdown() for table in tables))


def compared(
    number: str,
    form: str,
    systems: Iterable[str],
    found: Mapping[tuple[str, str, str], Entry],
    data: str,
    extra: Mapping[str, Mapping[str, str]] | None = None,
    pairs: Sequence[tuple[str, str]] = (),
) -> Table | None:
    """One form of a table: systems below each other; None where none of them was evaluated so.

    Args:
        extra: ``{column: {system: cell}}`` further columns.
        pairs: systems whose difference stands below.
    """
    chosen = [found[system, form, ""] for system in systems if (system, form, "") in found]
    if not chosen:
        return None
    beside = [measure for measure in paper.known(number, data) if measure in (*MEASURES, *(extra or {}))]
    beside = [measure for measure in beside if form == "paper" or measure not in MEASURES]
    header = ["", *(extra or {}), *MEASURES, *(f"paper: {measure}" for measure in beside)]
    rows, tidy = [header], []
    for entry in chosen:
        cells = {measure: entry.cell(measure) for measure in MEASURES}
        theirs = {measure: paper.number(number, data, _of_paper(entry.system), measure) for measure in beside}
        rows.append([
            label(entry.system),
            *(column.get(entry.system, "") for column in (extra or {}).values()),
            *map(str, cells.values()),
            *("" if value is None else f"{value:g}" for value in theirs.values()),
        ])  # fmt: skip
        for measure, cell in cells.items():
            value = paper.number(number, data, _of_paper(entry.system), measure) if form == "paper" else None
            tidy.append({
                "table": number, "data": data, "form": form, "system": entry.system, "measure": measure,
                "seeds": len(entry.files), "mean": cell.mean, "sd of seeds": _empty(cell.deviation),
                "error over users": _empty(cell.error), "paper": "" if value is None else value,
            })  # fmt: skip
    users = np.unique(chosen[0].first.users).size
    notes = [
        f"{len(chosen[0].first.samples):,} samples of {users:,} users, {FORMS[form]}. Mean ± standard deviation of the "
        "seeds (standard error over users).",
        paper.note(number, data),
    ]
    for one, other in pairs:
        if {(one, form, ""), (other, form, "")} <= found.keys():
            difference = found[one, form, ""].above(found[other, form, ""], MAIN)
            notes.append(f"- {label(one)} minus {label(other)}, {MAIN}: {difference}")
    return Table(f"{number}-{form}", f"{data}, {FORMS[form]}", rows, notes, tidy)


def _of_paper(system: str) -> str:
    """A peer that is trained as the paper's is the paper's."""
    return system.removesuffix("-paper")


def _empty(value: float) -> float | str:
    return "" if value != value else value
