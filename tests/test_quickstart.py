# SPDX-License-Identifier: Apache-2.0
"""The README's first command, cut short."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="the quickstart draws with matplotlib")

from patchkern.data import synthetic, write_parquet
from recipes import evaluate, quickstart

SHORT = ["--samples", "64", "--batch_size", "16", "--limit", "24", "--max_items", "12", "--threads", "1"]


def test_quickstart_trains_recommends_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = quickstart.main([*SHORT, "--output", str(tmp_path), "--name", "short"])
    printed = capsys.readouterr().out
    folder = tmp_path / "short"
    names = ["most popular", "transitions", "text", "item patches", "session patches"]
    assert [result.name for result in results] == names
    rows = [result.rows for result in results[2:]]
    assert all(row is not None and row.size == 24 for row in rows)
    means = [float(row.mean()) for row in rows if row is not None]
    assert means[0] > means[1] > means[2]
    report = (folder / "report.md").read_text(encoding="utf-8")
    for name in names:
        assert f"| {name}" in report and f"| {name}" in printed
    users = [line for line in report.splitlines() if line.startswith("### User")]
    assert len(users) == len(set(users)) == 3
    for plot in ("accuracy.png", "rows.png"):
        assert (folder / plot).read_bytes().startswith(b"\x89PNG") and f"]({plot})" in report
    assert not list(folder.glob("*.part"))


def test_its_models_are_evaluated_like_any_other(tmp_path: Path) -> None:
    write_parquet(synthetic(60, 80, name="data"), tmp_path / "data")
    every_sample = [argument for argument in SHORT if argument not in ("--limit", "24")]
    arguments = ["--data", str(tmp_path / "data")]
    results = quickstart.main([*every_sample, *arguments, "--output", str(tmp_path / "runs")])
    ranks = {result.name: result.evaluation.ranks.tolist() for result in results}
    evaluate.main([str(tmp_path / "runs/data/item-patches"), *arguments, "--exclude_seen"])
    with (tmp_path / "runs/data/item-patches/test-strict.csv").open(encoding="utf-8") as file:
        assert [int(row["rank"]) for row in csv.DictReader(file)] == ranks["item patches"]
