# SPDX-License-Identifier: Apache-2.0
"""The file with one line per sample that evaluate.py writes of each result, and compare.py reads."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

KEY = ("user", "position", "target")
"""Columns that say which sample a line is."""

NEEDED = (*KEY, "rank", "history_length", "training_count")


def write(path: Path, columns: Mapping[str, NDArray[Any]]) -> None:
    """``{name: (S,)}`` as a CSV, under a temporary name first. NaN is written as nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    with unfinished.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        rows = zip(*(column.tolist() for column in columns.values()), strict=True)
        writer.writerows(["" if value != value else value for value in row] for row in rows)
    unfinished.replace(path)


@dataclass(frozen=True)
class PerSample:
    """A file that was read.

    Attributes:
        path: where from.
        samples: user, position and target of each line; several targets with spaces between them.
        columns: ``{name: (S,) float64}`` of all other columns; NaN where nothing is written.
    """

    path: Path
    samples: list[tuple[str, str, str]]
    columns: dict[str, NDArray[np.float64]]

    @property
    def users(self) -> NDArray[np.str_]:
        """``(S,)`` whose sample each is."""
        return np.array([user for user, _, _ in self.samples], np.str_)

    def measures(self) -> dict[str, NDArray[np.float64]]:
        """``HR@k`` of every k, ``NDCG@k`` and ``MRR@k`` of the longest list, ``NLL`` of titles and of items.

        Of a file whose samples have several targets also ``Recall@k``, and ``NDCG@k`` of every k.
        """
        hits = {int(name[4:]): column for name, column in self.columns.items() if name.startswith("hit@")}
        found = {f"HR@{k}": hits[k] for k in sorted(hits)}
        longest, rank = max(hits), self.columns["rank"]
        listed = (rank > 0) & (rank <= longest)
        found[f"NDCG@{longest}"] = listed / np.log2(np.maximum(rank, 1) + 1)
        found[f"MRR@{longest}"] = listed / np.maximum(rank, 1)
        written = ("Recall@", "NDCG@", "NLL ")
        return found | {name: column for name, column in self.columns.items() if name.startswith(written)}

    def as_in(self, other: PerSample) -> PerSample:
        """Its lines in the other's order.

        Raises:
            ValueError: it is of other samples; the message says of which.
        """
        place = {sample: number for number, sample in enumerate(self.samples)}
        own, theirs = set(place), set(other.samples)
        if own != theirs:
            parts = [
                f"{len(only):,} only in {path}, such as the one of {_named(min(only))}"
                for path, only in ((self.path, own - theirs), (other.path, theirs - own))
                if only
            ]
            raise ValueError(f"{self.path}: expected the samples of {other.path}, got others: {'; '.join(parts)}")
        order = np.array([place[sample] for sample in other.samples], np.int64)
        return PerSample(self.path, other.samples, {name: column[order] for name, column in self.columns.items()})


def read(path: Path) -> PerSample:
    """Read what `write` wrote.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a file, or not a whole one; the message names the line.
    """
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.reader(file)
        header = next(reader, [])
        lacking = [name for name in NEEDED if name not in header]
        if lacking or not any(name.startswith("hit@") for name in header):
            raise ValueError(
                f"{path}: expected a file of evaluate.py, with {', '.join(NEEDED)} and hit@k, got columns "
                f"{', '.join(header) or 'none'}"
            )
        rows = list(reader)
    samples, values = [], np.zeros((len(rows), len(header)))
    others = [number for number, name in enumerate(header) if name not in KEY]
    keys = [header.index(name) for name in KEY]
    for number, row in enumerate(rows):
        try:
            samples.append((row[keys[0]], row[keys[1]], row[keys[2]]))
            values[number, others] = [float(row[place]) if row[place] else np.nan for place in others]
        except (IndexError, ValueError) as error:
            raise ValueError(f"{path}: expected {len(header)} values in line {number + 2}, got {row}") from error
    if len(set(samples)) < len(samples):
        twice = next(sample for sample in samples if samples.count(sample) > 1)
        raise ValueError(f"{path}: expected every sample once, got the one of {_named(twice)} twice")
    return PerSample(path, samples, {header[place]: values[:, place] for place in others})


def _named(sample: tuple[str, str, str]) -> str:
    user, position, target = sample
    return f"user {user} at position {position}, target {target}"
