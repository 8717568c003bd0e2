# SPDX-License-Identifier: Apache-2.0
"""The README's first command, cut short, and its report."""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import re
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="the quickstart draws with matplotlib")

import patchkern as pk
from patchkern.data import Samples, synthetic, write_parquet
from patchkern.data.synthetic_titles import genre_of
from patchkern.evaluation.metrics import Evaluation
from patchkern.search.prior_weight import PriorFit
from recipes import evaluate, plots, quickstart
from recipes import report as reports

EPOCHS = ["--epochs", "0.01", "--session_epochs", "0.01", "--head_epochs", "0.01"]
EVERY_SAMPLE = [*EPOCHS, "--rows_per_pass", "2048", "--fit_limit", "24"]
SHORT = [*EVERY_SAMPLE, "--limit", "24", "--threads", "1"]
MODELS = ["text", "item patches", "session patches", "item head"]
YARDSTICKS = ["most popular", "transitions", "prior alone"]


@pytest.fixture(scope="module", autouse=True)
def tinier_models() -> None:
    """As they are: a model that learned little gets another weight of the prior here, fitted on lists' candidates,
    than in evaluate.py, fitted on all items."""


def ranks(*values: int) -> Evaluation:
    return Evaluation("strict", (10, 20), np.array(values), np.zeros(len(values), bool))


# ------------------------------------------------------------------ the run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[reports.Report, Path, str]:
    """A short run on synthetic users: what it returns, its folder, what it prints."""
    folder, printed = tmp_path_factory.mktemp("runs"), io.StringIO()
    with contextlib.redirect_stdout(printed):
        found = quickstart.main([*SHORT, "--output", str(folder), "--name", "short"])
    return found, folder / "short", printed.getvalue()


def test_quickstart_trains_recommends_and_reports(run: tuple[reports.Report, Path, str]) -> None:
    found, folder, printed = run
    assert [model.name for model in found.models] == MODELS and list(found.yardsticks) == YARDSTICKS
    assert all(model.rows.size == 24 for model in found.models)
    means = [float(model.rows.mean()) for model in found.models]
    assert means[0] > means[1] > means[2]
    assert all(model.lists != other.lists for model, other in itertools.combinations(found.models, 2))
    report = (folder / "report.md").read_text(encoding="utf-8")
    rows = [*YARDSTICKS, "text", "text + prior", *(f"**{name}** + prior" for name in MODELS[1:])]
    for row in rows:
        assert f"| {row} " in report and f"| {row} " in printed
    for plot in ("accuracy.png", "cost.png"):
        assert (folder / plot).read_bytes().startswith(b"\x89PNG") and f"]({plot})" in report
    assert not list(folder.glob("*.part"))
    assert "fit_limit 24" in report and "HR@k: the share of" in report and "compression: title tokens per row" in report


def test_the_examples_show_history_and_recommendations(run: tuple[reports.Report, Path, str]) -> None:
    found, folder, _ = run
    report, data = (folder / "report.md").read_text(encoding="utf-8"), found.data
    users = re.findall(r"### User (\d+), after (\d+) items", report)
    assert len(users) == len(set(users)) == 3
    for user, length in users:
        part = report.split(f"### User {user}, after {length} items")[1].split("###")[0]
        history = data.histories[int(user)].tolist()
        assert f" · {data.titles[history[int(length) - 1]]} (" in part
        assert f"Took next: **{data.titles[history[int(length)]]}**" in part
        sample = found.samples.users.tolist().index(int(user))
        first = [data.titles[model.lists[sample][0][0]] for model in found.models]
        (line,) = [line for line in part.splitlines() if line.startswith("| 1 ")]
        assert [cell.strip(" *") for cell in line.strip("|").split("|")[1:]] == first
        genres = next(line for line in part.splitlines() if line.startswith("| genres"))
        assert all(str(genre_of(title)) in genres for title in first)


def test_tuning_sees_no_prior(tmp_path: Path) -> None:
    """The prior's weight is fitted on the validation split, and would flatter there."""
    found = quickstart.main([*SHORT, "--split", "val", "--output", str(tmp_path)])
    assert list(found.yardsticks) == YARDSTICKS[:2]
    assert [model.name for model in found.models if model.with_prior is None and model.fit is None] == MODELS
    report = (tmp_path / "synthetic/report.md").read_text(encoding="utf-8")
    assert "prior" not in report.split("## Again")[0]
    assert "--split val" in report and "--prior" not in report


def test_the_report_of_real_data_repeats_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its commands and its Python as they stand; and no genres, which only synthetic items have."""
    folder = tmp_path / "two words"
    write_parquet(synthetic(60, 80, name="two words"), folder)
    monkeypatch.chdir(tmp_path)
    found = quickstart.main([*EVERY_SAMPLE, "--threads", "1", "--data", "two words"])
    report = (tmp_path / "runs/two words/report.md").read_text(encoding="utf-8")
    assert "genre" not in report and "synthetic:" not in report

    block = report.split("```sh\n")[1].split("```")[0].splitlines()
    commands = {script: rest for _, script, *rest in (shlex.split(line) for line in block if not line.startswith("#"))}
    again, numbers = commands["recipes/quickstart.py"], commands["recipes/evaluate.py"]
    assert quickstart.parse(again) == quickstart.parse([*EVERY_SAMPLE, "--threads", "1", "--data", "two words"])
    capsys.readouterr()
    evaluate.main(numbers)
    last = found.models[-1]
    assert last.with_prior is not None and last.fit is not None
    assert f"(weight {last.fit.weight:g})" in capsys.readouterr().out
    for name, expected in (("test-strict", last.alone), ("test-strict-transitions", last.with_prior)):
        with (tmp_path / f"runs/two words/item-head/{name}.csv").open(encoding="utf-8") as file:
            assert [int(row["rank"]) for row in csv.DictReader(file)] == expected.ranks.tolist()

    exec(report.split("```python")[1].split("```")[0], {})
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 5 and all(line[7:].strip() in found.data.titles.values() for line in shown)


def test_the_prior_alone_ranks_unseen_items_by_the_prior() -> None:
    data = synthetic(40, 60, seed=2)
    catalog = pk.Catalog.from_token_ids(np.arange(60), np.arange(61))
    samples = Samples(*(column[:7] for column in data.samples("test")))
    prior = pk.TransitionPrior(data, catalog)
    ranking = quickstart.by_prior(data, catalog, samples, prior).ranking
    for row, history in zip(ranking.as_lists(), data.before(samples), strict=True):
        own = prior(pk.Histories.coerce([history]))[0]
        left = sorted((item for item in range(60) if item not in set(history.tolist())), key=lambda item: -own[item])
        assert [item for item, _ in row] == left[:20]
        assert [score for _, score in row] == own[left[:20]].tolist()


# ------------------------------------------------------------------ what the report says


@pytest.mark.parametrize(
    ("one", "other", "said"),
    [
        ([1] * 40, [0] * 20 + [1] * 20, "better (+0.5000 ± 0.0801)"),
        ([0] * 20 + [1] * 20, [1] * 40, "worse (-0.5000 ± 0.0801)"),
        ([1, 0, 30, 5], [0, 2, 30, 5], "no difference that 4 samples could show (+0.0000 ± 0.4082)"),
        ([1] * 4, [2] * 4, "no difference that 4 samples could show (+0.0000 ± 0.0000)"),
    ],
)
def test_a_difference_needs_two_standard_errors(one: list[int], other: list[int], said: str) -> None:
    assert reports._verdict(ranks(*one), ranks(*other)) == said


def test_a_difference_is_judged_by_users() -> None:
    one, other = ranks(*[1] * 40), ranks(*[0] * 20, *[1] * 20)
    assert reports._verdict(one, other) == "better (+0.5000 ± 0.0801)"
    few = np.repeat([0, 1], 20)  # one user makes all of it
    said = "no difference that 2 users could show (+0.5000 ± 0.5000)"
    assert reports._verdict(replace(one, users=few), replace(other, users=few)) == said
    own, others = (replace(found, users=np.zeros(40, int)) for found in (one, other))
    assert reports._verdict(own, others) == "one user shows no difference (+0.5000)"
    assert reports._scores(own)[-1] == ""


def test_weights_as_good_as_the_best() -> None:
    best, same, worse = ranks(*[1] * 50), ranks(*[1] * 49, 0), ranks(*[0] * 50)
    curve = {0.0: worse, 1.0: same, 2.0: best, 5.0: worse, 10.0: same}
    assert reports.equally_good(PriorFit(2.0, curve)) == (1.0, 2.0)
    assert reports.equally_good(PriorFit(2.0, curve), users=np.arange(50)) == (1.0, 2.0)
    assert reports.equally_good(PriorFit(0.0, {0.0: best})) == (0.0, 0.0)


def test_a_table_is_markdown_and_aligned() -> None:
    assert reports.markdown_table([["", "HR"], ["text", "0.5"], ["a", "10"]]) == [
        "|      |  HR |",
        "| ---- | --: |",
        "| text | 0.5 |",
        "| a    |  10 |",
    ]
    assert reports.markdown_table([["", "x"], ["1", "ab"]], left=True)[1:] == ["| --- | --- |", "| 1   | ab  |"]


# ------------------------------------------------------------------ plots


@pytest.mark.parametrize(
    ("alone", "together", "yardsticks"),
    [
        ((0.264, 0.365, 0.365, 0.46), (0.401, 0.440, 0.401, 0.52), (0.074, 0.381, 0.390)),  # synthetic users
        ((0.190, 0.203, 0.181, 0.234), (0.258, 0.256, 0.258, 0.278), (0.125, 0.197, 0.2)),  # ml-100k
        ((0.264, 0.365, 0.365, 0.46), None, (0.074, 0.381)),  # without a prior
        ((0.0, 0.01, 0.02, 0.02), (0.3, 0.3, 0.0, 0.3), (0.3, 0.3, 0.3)),
    ],
)
def test_no_label_lies_over_another(
    alone: tuple[float, ...], together: tuple[float, ...] | None, yardsticks: tuple[float, ...]
) -> None:
    points = [
        plots.Point(name, np.full(10, rows), (hr, 0.015), None if together is None else (together[at], 0.015), 100.0)
        for at, (name, rows, hr) in enumerate(zip(MODELS, (354, 166, 65, 82), alone, strict=True))
    ]
    lines = dict(zip(YARDSTICKS, yardsticks, strict=False))
    figure = plots.accuracy(points, lines)
    figure.draw_without_rendering()
    (axes,) = figure.axes
    texts = [*axes.texts, *axes.get_yticklabels()]
    boxes = {text.get_text().partition("\n")[0]: text.get_window_extent() for text in texts}
    assert boxes.keys() == {*MODELS, *lines}
    for one, other in itertools.combinations(boxes, 2):
        assert not boxes[one].overlaps(boxes[other]), (one, other)
    inside = figure.bbox
    assert all(inside.contains(*box.min) and inside.contains(*box.max) for box in boxes.values())
    assert axes.get_legend() is None


def test_cost_is_labelled_within_the_picture() -> None:
    points = [
        plots.Point(name, np.arange(rows), (0.1, 0.1), None, 9.0)
        for name, rows in zip(MODELS, (900, 90, 9, 60), strict=True)
    ]
    figure = plots.cost(points)
    figure.draw_without_rendering()
    left, right = figure.axes
    assert [text.get_text() for text in left.texts] == ["450 (90 to 809)", "44 (9 to 80)", "4 (1 to 7)", "30 (6 to 53)"]
    assert [text.get_text() for text in right.texts] == ["9"] * 4
    for axes in (left, right):
        assert all(text.get_window_extent().x1 <= axes.get_window_extent().x1 for text in axes.texts)
