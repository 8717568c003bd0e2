# SPDX-License-Identifier: Apache-2.0
"""The paper's tables from one command: plans, costs, records, and the same files after being killed."""

from __future__ import annotations

import csv
import fcntl
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import REPOSITORY

import patchkern as pk
from patchkern.data import open_dataset, synthetic, write_parquet
from patchkern.evaluation import estimate, paired_difference
from recipes import per_sample, reproduce
from recipes.reproduction import paper, steps, tables
from recipes.reproduction.cost import SHAPES, Reader, Shape, at_rates, recorded
from recipes.reproduction.names import LABELS
from recipes.reproduction.plan import Options, Planner
from recipes.reproduction.report import report
from recipes.reproduction.steps import Folder, Step, Work

SMALL = ["--seeds", "0", "--limit", "20", "--peers", "--max_steps", "2", "--vocab_size", "300"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("data") / "few"
    write_parquet(synthetic(100, 40, mean_length=20.0, num_genres=4), path)
    return str(path)


@pytest.fixture(scope="module")
def done(data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which tables 1 and 4 have been made."""
    folder = tmp_path_factory.mktemp("done") / "run"
    reproduce.main(command(data, folder, "--table", "1", "4", "--metric", "left_out"))
    return folder


def command(data: str, folder: Path, *flags: str) -> list[str]:
    return [*flags, "--data", data, "--output_dir", str(folder), *SMALL]


def planner(data: str, **fields: Any) -> Planner:
    interactions = open_dataset(data)
    reader = Reader.of("tiny", interactions, **fields)
    return Planner(Options(data_flags=("--data", data), name="few", model="tiny", seeds=(0, 1)), reader)


# ------------------------------------------------------------------ from a command to files


def test_a_table_is_what_the_recipes_count(done: Path) -> None:
    rows = list(csv.DictReader((done / "results/table-4.csv").open()))
    assert {row["system"] for row in rows} == {"text", "items", "items-direct", "dropout", "latest"}
    one = per_sample.read(done / "csv/dropout-s0.left_out.csv")
    for row in rows:
        if row["system"] == "dropout" and row["measure"] in ("HR@10", "HR@20", "NDCG@20"):
            found = estimate(one.measures()[row["measure"]], one.users)
            assert (float(row["mean"]), float(row["error over users"])) == pytest.approx(tuple(found))
    (measure, value), *_ = [
        (row["measure"], row["value"]) for row in csv.DictReader((done / "results/table-1.csv").open())
    ]
    assert (measure, value) == ("users", "100")
    record = json.loads((done / "steps/dropout-s0.json").read_text())
    assert "--item_dropout" in record["command"] and record["attempts"] == 1
    assert record["seconds"] > 0 and record["cpu_seconds"] > 0 and record["versions"]["patchkern"] == pk.__version__
    assert not list(done.rglob("*.part"))


def test_what_is_done_is_not_done_again(done: Path, data: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in (done / "steps").iterdir()}
    written = reproduce.main(command(data, done, "--table", "4", "--metric", "left_out"))
    assert written == [done / "results/table-4.md"]
    assert {path: path.stat().st_mtime_ns for path in (done / "steps").iterdir()} == before
    assert f"{len([path for path in before if path.stem != 'pretrain'])} steps" in capsys.readouterr().out


def test_other_settings_are_refused(done: Path, data: str) -> None:
    with pytest.raises(
        ValueError, match=r"(?s)--output_dir: expected a folder of the same settings.*\n.*num_train_epochs 2"
    ):
        reproduce.main(command(data, done, "--table", "4", "--metric", "left_out", "--num_train_epochs", "2"))


def test_a_folder_is_worked_in_once(done: Path, data: str) -> None:
    with (done / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(RuntimeError, match="--output_dir: another process works in"):
            reproduce.main(command(data, done, "--table", "1"))


def test_a_plan_needs_no_weights(data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", "Llama-3.2-1B-Instruct", "--scale", "paper", "--table", "2", "3", "--figure", "5"]
    asked = [*flags, "--data", data, "--output_dir", str(tmp_path / "run"), "--gpu", "A800", "--settings", "ml-100k"]
    assert reproduce.main([*asked, "--dry_run"]) == []
    printed = capsys.readouterr().out
    assert (
        "1,235.7 M parameters" in printed and "items-keep20-s0.left_out" in printed and "hours on one A800" in printed
    )
    assert not (tmp_path / "run").exists()
    with pytest.raises(FileNotFoundError, match="--model: expected one with weights but for --dry_run"):
        reproduce.main(asked)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--table, --figure: expected at least one of them"),
        (["--table", "2", "--limit", "0"], "--limit: expected more than 0, got 0"),
        (["--table", "2", "--learning_rat", "1"], "--learning_rat: expected --learning_rate?"),
        (["--table", "2", "--utilization", "40"], r"--utilization: expected a share in 0..1, got 40"),
    ],
)
def test_wrong_flags(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        reproduce.main([*flags, "--data", "synthetic"])
    assert message in capsys.readouterr().err


def test_the_table_of_all_systems_has_what_was_put_there(done: Path, data: str, tmp_path: Path) -> None:
    folder = Folder(shutil.copytree(done, tmp_path / "run"))
    shutil.copy(folder / "csv/text-s0.left_out.csv", folder / "csv/mine-s3.left_out-transitions-linear.csv")
    paths = report(folder, planner(data, limit=20), ["all"], ["1", "2", "5", "7"])
    assert [path.name for path in paths] == ["all.md", "figure-1.md", "figure-2.md", "figure-5.md", "figure-7.md"]
    rows = {row["system"]: row for row in csv.DictReader((folder / "measured/all.csv").open())}
    text = tables.entries(folder)["text", "left_out", ""].cell("HR@20").mean
    assert float(rows["text"]["HR@20"]) == float(rows["mine"]["HR@20 with priors"]) == pytest.approx(text)
    assert rows["mine"]["HR@20"] == "" and float(rows["items"]["trained, CPU s"]) >= 0
    (point,) = [row for row in csv.DictReader((folder / "results/figure-2.csv").open()) if "text" in row["series"]]
    assert float(point["HR@20"]) == pytest.approx(text), "no shorter histories were evaluated"
    assert {path.name for path in (folder / "measured").glob("*.png")} == {"figure-7.png", "figure-7-training.png"}


# ------------------------------------------------------------------ steps


def test_a_step_that_fails_names_its_log_and_leaves_no_record(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "run")
    step = Step("bad", "recipes/yardsticks.py", ("/nowhere",))
    with folder.locked(), pytest.raises(RuntimeError, match=r"bad failed: path: .*; see .*bad\.log"):
        steps.run(step, folder)
    assert folder.record("bad") is None and "FileNotFoundError" in (folder / "logs/bad.log").read_text()


def test_steps_are_shared_between_tables(data: str) -> None:
    every = planner(data)
    keys = [step.key for step in every.plan(["2", "3", "4"], ["1", "2", "5"])]
    assert len(set(keys)) == len(keys)
    assert keys.index("pretrain-s1") < keys.index("items-s1") < keys.index("items-s1.left_out")
    assert {"items@5-s0.left_out", "items-keep10-s0", "sessions-longer-s1", "dropout-s0"} <= set(keys)
    assert "items-keep10-s1" not in keys, "a sweep is of one seed"
    with pytest.raises(ValueError, match="expected one command of that name"):
        steps.distinct([Step("a", "x.py", ("1",)), Step("a", "x.py", ("2",))])


def test_sessions_are_of_the_published_form_whatever_small_models_prefer(data: str) -> None:
    reader = Reader.of("tiny", open_dataset(data), head="items", max_items=30)
    options = Options(data_flags=("--data", data), name="few", model="tiny", head="items")
    items, published = Planner(options, reader), pk.SessionPatches(5, 30)
    assert items.settings.align == "start" and items.policy(items.training("sessions")) == published
    (step,) = (step for step in items.plan(["2"], []) if step.key == "sessions-s0")
    flags = dict(zip(step.arguments[:-1], step.arguments[1:], strict=True))
    assert flags["--align"] == "end" and flags["--sessions_keep_text"] == "5"


def test_dropped_and_latest_items_leave_the_rows_of_patches(data: str) -> None:
    every = planner(data, max_items=30)
    samples = every.reader.data.samples("train")
    past = every.reader.data.before(samples)
    wanted = every.reader.prompts(past, every.policy(every.training("items"))).sum()
    for name, tolerance in {"dropout": 0.03, "latest": 0.15}.items():
        rows = every.reader.prompts(past, every.policy(every.training(name))).sum()
        assert rows == pytest.approx(wanted, rel=tolerance), name
        assert rows < 0.8 * every.reader.prompts(past, pk.TextOnly(30)).sum()


# ------------------------------------------------------------------ cost


def test_flops_by_hand() -> None:
    shape = Shape(hidden=8, intermediate=16, layers=3, heads=4, kv_heads=2, vocabulary=10)
    weights = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16  # query, key and value, output, MLP
    assert shape.parameters == 3 * weights + 80
    assert shape.flops(Work("rank", rows=5)) == 2 * 5 * 3 * weights
    assert shape.flops(Work("search", rows=0, pairs=7, logits=2)) == 4 * 7 * 3 * 8 + 2 * 2 * 80
    assert shape.flops(Work("train", rows=5)) == 3 * 2 * 5 * 3 * weights
    assert SHAPES["Llama-3.2-1B-Instruct"].parameters == pytest.approx(1.236e9, rel=1e-3)


def test_rates_are_of_steps_in_one_go() -> None:
    record = {"kind": "train", "rows": 100.0, "cpu_seconds": 8.0, "threads": 2, "device": "CPU", "attempts": 1}
    resumed = record | {"rows": 1e9, "attempts": 2}
    rates = recorded({"a": record, "b": record | {"rows": 300.0}, "c": resumed})
    assert rates == {"train": 50.0}
    wanted = [Step("x", "y.py", (), Work("train", rows=25.0)), Step("z", "y.py", (), Work("rank", rows=1.0))]
    assert at_rates(wanted, rates) == {"x": 0.5, "z": None}


# ------------------------------------------------------------------ tables


def write(folder: Folder, name: str, ranks: list[int], **more: list[int]) -> None:
    size = len(ranks)
    columns = {
        "user": np.array([1, 1, 2, 3][:size]), "position": np.arange(size), "target": np.arange(size),
        "rank": np.array(ranks), **{key.replace("_at_", "@"): np.array(value) for key, value in more.items()},
        "history_length": np.arange(size), "training_count": np.arange(size),
    }  # fmt: skip
    for k in (10, 20):
        hits = np.array(more.get(f"rank_at_{k}", ranks))
        columns[f"hit@{k}"] = ((hits > 0) & (hits <= k)).astype(int)
    per_sample.write(folder / f"csv/{name}.csv", columns)


def test_seeds_and_users(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    write(folder, "text-s0.left_out", [1, 0, 12, 3])
    write(folder, "text-s1.left_out", [1, 2, 0, 0])
    write(folder, "items-s0.left_out", [1, 1, 1, 0])
    write(folder, "items-s0.paper", [15, 0, 0, 0], rank_at_10=[2, 0, 0, 0])
    found = tables.entries(folder)
    text, items = found["text", "left_out", ""], found["items", "left_out", ""]
    cell = text.cell("HR@20")
    assert cell.mean == pytest.approx(5 / 8) and cell.deviation == pytest.approx(np.std([3 / 4, 2 / 4], ddof=1))
    users = np.array(["1", "1", "2", "3"])
    assert cell.error == pytest.approx(estimate(np.array([1, 0.5, 0.5, 0.5]), users).error)
    assert str(items.cell("HR@20")).startswith("0.7500 (")
    assert items.above(text, "HR@20") == paired_difference([1, 1, 1, 0], [1, 0.5, 0.5, 0.5], users)
    of_paper = found["items", "paper", ""]
    assert of_paper.cell("NDCG@10").mean == pytest.approx(1 / np.log2(3) / 4), "of the search for ten"
    assert of_paper.cell("NDCG@20").mean == pytest.approx(1 / np.log2(16) / 4)
    write(folder, "mine", [1])
    with pytest.raises(ValueError, match=r"mine\.csv: expected a name like text-s0\.left_out\.csv"):
        tables.entries(folder)


def test_the_papers_numbers_say_where_from() -> None:
    known = paper.paper()
    for entry in known["numbers"]:
        assert entry["status"] in known["status"] and entry["status"] != "not found" and entry["value"] > 0
        assert entry["system"] in {"", *LABELS, "gru4rec", "sasrec", "mamba4rec"}
    assert paper.number("2", "ml-100k", "sessions", "compression") == 3.85
    assert paper.number("3", "ml-100k", "items", "HR@20") is None
    assert "not at hand" in paper.note("3", "ml-100k")


# ------------------------------------------------------------------ killed


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for name in ("results", "csv")
        for path in sorted((folder / name).rglob("*"))
        if path.is_file()
    }


@pytest.mark.slow
def test_killed_ten_times(data: str, tmp_path: Path) -> None:
    """At random moments, wherever it is: the files are those of a run that was left alone."""
    flags = ["--table", "2", "3", "--figure", "1", "--metric", "paper", "left_out"]
    longer = ["--max_steps", "12"]  # the last one counts

    def start(folder: Path) -> subprocess.Popen[str]:
        arguments = [sys.executable, str(REPOSITORY / "recipes/reproduce.py"), *command(data, folder, *flags), *longer]
        return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)

    def first_step(process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if "rows/s" in line:
                return

    whole = start(tmp_path / "whole")
    first_step(whole)
    begun = time.monotonic()
    assert whole.wait() == 0
    lasted = time.monotonic() - begun
    rng = random.Random(0)
    killed = 0
    while killed < 10:
        process = start(tmp_path / "killed")
        first_step(process)
        try:
            process.wait(rng.uniform(0, lasted / 6))
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed += 1
    assert killed == 10
    process = start(tmp_path / "killed")
    assert process.communicate()[0] and process.returncode == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    attempts = [record["attempts"] for record in Folder(tmp_path / "killed").records().values()]
    assert max(attempts) > 1
