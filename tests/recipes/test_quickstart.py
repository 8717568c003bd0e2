# SPDX-License-Identifier: Apache-2.0
"""The README's first command, cut short."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="the quickstart draws with matplotlib")

from patchkern.data import synthetic, write_parquet
from recipes import evaluate, quickstart

EVERY_SAMPLE = ["--epochs", "0.01", "--session_epochs", "0.01", "--rows_per_pass", "2048", "--fit_limit", "24"]
SHORT = [*EVERY_SAMPLE, "--limit", "24", "--threads", "1"]
MODELS = ["text", "item patches", "session patches"]


def test_quickstart_trains_recommends_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = quickstart.main([*SHORT, "--output", str(tmp_path), "--name", "short"])
    printed = capsys.readouterr().out
    folder = tmp_path / "short"
    yardsticks, models = results[:2], results[2:]
    assert [result.name for result in yardsticks] == ["most popular", "transitions"]
    # each model alone, and in a row of its own with the prior
    assert [result.name for result in models[::2]] == MODELS
    assert [" ".join(result.name.split(" ")[:-3]) for result in models[1::2]] == MODELS
    assert all(result.name.endswith(" transitions") for result in models[1::2])
    rows = [result.rows for result in models[::2]]
    assert all(row is not None and row.size == 24 for row in rows)
    means = [float(row.mean()) for row in rows if row is not None]
    assert means[0] > means[1] > means[2]
    report = (folder / "report.md").read_text(encoding="utf-8")
    for result in results:
        assert f"| {result.name}" in report and f"| {result.name}" in printed
    users = [line for line in report.splitlines() if line.startswith("### User")]
    assert len(users) == len(set(users)) == 3
    for plot in ("accuracy.png", "rows.png"):
        assert (folder / plot).read_bytes().startswith(b"\x89PNG") and f"]({plot})" in report
    assert not list(folder.glob("*.part"))


def test_tuning_sees_no_prior(tmp_path: Path) -> None:
    """The prior's weight is fitted on the validation split, and would flatter there."""
    results = quickstart.main([*SHORT, "--split", "val", "--output", str(tmp_path)])
    assert [result.name for result in results] == ["most popular", "transitions", *MODELS]


def test_its_models_are_evaluated_like_any_other(tmp_path: Path) -> None:
    write_parquet(synthetic(60, 80, name="data"), tmp_path / "data")
    arguments = ["--data", str(tmp_path / "data")]
    results = quickstart.main([*EVERY_SAMPLE, "--threads", "1", *arguments, "--output", str(tmp_path / "runs")])
    ranks = {result.name: result.evaluation.ranks.tolist() for result in results}
    evaluate.main([str(tmp_path / "runs/data/item-patches"), *arguments, "--exclude_seen"])
    with (tmp_path / "runs/data/item-patches/test-strict.csv").open(encoding="utf-8") as file:
        assert [int(row["rank"]) for row in csv.DictReader(file)] == ranks["item patches"]
