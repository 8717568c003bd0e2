# SPDX-License-Identifier: Apache-2.0
"""What recommenders did on the same samples: tables, slices, differences, and the files that keep them."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import patchkern as pk
from patchkern.data import Interactions, Samples
from patchkern.evaluation import (
    HISTORY_LENGTHS,
    TRAINING_COUNTS,
    Evaluation,
    coverage,
    estimate,
    evaluate,
    log_popularity,
    paired_difference,
    slices,
    training_counts,
)
from recipes import per_sample
from recipes.ranking import Lists

KS = (10, 20)


@dataclass(frozen=True)
class Result:
    """One recommender: its evaluations (one for all k, or one per k), its lists, and how likely it finds the targets.

    Attributes:
        nll: ``{"NLL title" or "NLL item": (S,)}`` in nats, where it is known.
    """

    found: list[Evaluation]
    lists: Lists
    nll: dict[str, NDArray[np.float64]] = field(default_factory=dict)

    def measures(self) -> dict[str, NDArray[np.float64]]:
        """``{name: (S,)}`` all that is known of each sample."""
        parts = [part.per_sample() for part in self.found]
        names = dict.fromkeys(name.partition("@")[0] for part in parts for name in part)
        ordered = {name: part[name] for kind in names for part in parts for name in part if name.startswith(f"{kind}@")}
        return ordered | self.nll


class Results(dict[str, Result]):
    """Results of recommenders, by name, all of the same samples.

    Args:
        targets: several for each sample; None: the one item that came next.
        ks: the list lengths counted.
    """

    def __init__(
        self,
        data: Interactions,
        samples: Samples,
        catalog: pk.Catalog,
        targets: pk.Histories | None = None,
        ks: Sequence[int] = KS,
    ) -> None:
        super().__init__()
        self.data, self.samples, self.catalog, self.ks = data, samples, catalog, tuple(ks)
        self.has_several = targets is not None
        self.targets = pk.Histories.coerce(data.targets(samples)[:, None]) if targets is None else targets
        self.counts = training_counts(data, catalog)
        counts = self.counts[catalog.index_of(self.targets.items, "targets")]
        # of several targets their mean, rounded down
        self.target_counts = np.add.reduceat(counts, self.targets.offsets[:-1]) // self.targets.lengths

    @property
    def main(self) -> str:
        """The measure that says most in one number."""
        return f"{'Recall' if self.has_several else 'HR'}@{max(self.ks)}"

    def evaluate(self, lists: Lists) -> Evaluation:
        """What lists are worth, counted by item."""
        targets: Any = self.targets if self.has_several else self.targets.items
        return evaluate(lists, targets, self.ks, catalog=self.catalog, users=self.samples.users)

    @property
    def num_users(self) -> int:
        return int(np.unique(self.samples.users).size)

    def estimate(self, values: NDArray[np.float64]) -> str:
        return str(estimate(values, self.samples.users))

    # -------------------------------------------------------------- what is printed

    def table(self) -> list[str]:
        """Hit rates and NDCG, of several targets also recall, with errors over users."""
        kinds = ("HR", "Recall", "NDCG") if self.has_several else ("HR", "NDCG")
        columns = [f"{measure}@{k}" for measure in kinds for k in self.ks]
        rows = [["", *columns]]
        for name, result in self.items():
            measures = result.measures()
            rows.append([name, *(self.estimate(measures[column]) for column in columns)])
        return aligned(rows)

    def further(self) -> list[str]:
        """Likelihood of the targets, reciprocal rank, how much of the catalogue is shown, and how popular that is."""
        k = max(self.ks)
        likelihoods = list(dict.fromkeys(name for result in self.values() for name in result.nll))
        header = [f"MRR@{k}", *likelihoods, f"coverage@{k}", f"log popularity@{k}"]
        rows = [["", *header]]
        for name, result in self.items():
            measures = result.measures()
            popular = log_popularity(result.lists, k, self.counts, catalog=self.catalog)
            listed = np.isfinite(popular)
            rows.append([
                name,
                *(self.estimate(measures[column]) if column in measures else "" for column in header[:-2]),
                f"{coverage(result.lists, k, catalog=self.catalog):.4f}",
                str(estimate(popular[listed], self.samples.users[listed])),
            ])  # fmt: skip
        taken = np.log1p(self.target_counts.astype(np.float64))
        return [*aligned(rows), f"what users took: log popularity {self.estimate(taken)}, log(1 + training count)"]

    def differences(self) -> list[str]:
        """The model, alone and with priors, beside each of the others on the same samples."""
        measure = self.main
        values = {name: result.measures()[measure] for name, result in self.items()}
        first, *others = values
        pairs = [(first, other) for other in others if not other.startswith("+ ")]
        pairs += [(own, other) for own in others if own.startswith("+ ") for other in values if other != own]
        rows = [
            (one, f"- {other}", str(paired_difference(values[one], values[other], self.samples.users)))
            for one, other in pairs
        ]
        return [f"difference of {measure} on the same samples", *aligned([list(row) for row in rows])]

    def slices(self) -> dict[str, dict[str, NDArray[np.bool_]]]:
        return {
            "history length": slices(self.samples.positions, HISTORY_LENGTHS),
            "training interactions of the target (0: cold)": slices(self.target_counts, TRAINING_COUNTS),
        }

    def by_slices(self) -> list[str]:
        lines: list[str] = []
        values = {name: result.measures() for name, result in self.items()}
        shown = [self.main, *dict.fromkeys(name for result in self.values() for name in result.nll)]
        for by, parts in self.slices().items():
            for measure in shown:
                known = {name: own[measure] for name, own in values.items() if measure in own}
                rows = [["", "samples", "users", *known]]
                for name, chosen in parts.items():
                    users = self.samples.users[chosen]
                    cells = [str(estimate(own[chosen], users)) if users.size else "" for own in known.values()]
                    rows.append([name, f"{users.size:,}", f"{np.unique(users).size:,}", *cells])
                lines += ["", f"{measure} by {by}", *aligned(rows)]
        return lines[1:]

    # -------------------------------------------------------------- what is written

    def write(self, name: str, path: Path) -> None:
        """One line per sample; a rank of 0: not in the list. With one list per k, ``rank`` is that of the longest.

        Of several targets ``rank`` is that of the first in the list.
        """
        result, samples = self[name], self.samples
        hits = {f"hit@{k}": part.hits(k).astype(int) for part in result.found for k in part.ks}
        ranks: dict[str, NDArray[Any]] = {f"rank@{part.ks[-1]}": part.ranks for part in result.found[:-1]}
        targets = self.targets.items
        if self.has_several:
            (part,) = result.found
            ranks |= {f"Recall@{k}": part.recalls(k) for k in part.ks} | {f"NDCG@{k}": part.gains(k) for k in part.ks}
            targets = np.array([" ".join(map(str, items.tolist())) for items in self.targets])
        columns: dict[str, NDArray[Any]] = {
            "user": self.data.user_ids[samples.users],
            "position": samples.positions,
            "target": targets,
            "rank": result.found[-1].first_ranks,
            **ranks,
            **hits,
            **result.nll,
            "shared_title": result.found[-1].ambiguous.astype(int),
            "history_length": samples.positions,
            "training_count": self.target_counts,
        }
        per_sample.write(path, columns)

    def write_slices(self, path: Path) -> None:
        """A line per result, slice and measure."""
        every = {"all": {"all": np.ones(self.samples.users.size, bool)}}
        unfinished = path.with_suffix(".part")
        with unfinished.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["result", "by", "slice", "samples", "users", "measure", "mean", "error"])
            for name, result in self.items():
                for measure, values in result.measures().items():
                    for by, parts in (every | self.slices()).items():
                        for part, chosen in parts.items():
                            users = self.samples.users[chosen]
                            numbers = ["" if value != value else value for value in estimate(values[chosen], users)]
                            by_name = by.partition(" (")[0]
                            sizes = [users.size, np.unique(users).size]
                            writer.writerow([name, by_name, part, *sizes, measure, *numbers])
        unfinished.replace(path)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as lines, numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
