# SPDX-License-Identifier: Apache-2.0
"""Runs that held items out, compared: what they know of these, against the library asked one sample at a time."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import patchkern as pk
from patchkern.data import hold_out_items, open_dataset, synthetic, write_parquet
from patchkern.training import find_model
from recipes import cold_items, evaluate, models, train

SCRATCH = ("--model", "tiny", "--vocab_size", "300", "--no_separator", "--head", "items")
KINDS = {
    "vectors": (*SCRATCH, "--item_embeddings", "--vector_dropout", "0.3"),
    "ids": (*SCRATCH, "--item_tokens"),
    "titles": ("--model", "tiny", "--vocab_size", "300"),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("data") / "small"
    write_parquet(synthetic(60, 50, mean_length=20.0, num_genres=4), path)
    return str(path)


def trained(data: str, output: Path, *flags: str) -> Path:
    argv = ["--stage", "items", "--data", data, "--output_dir", str(output), "--use_cpu", "--max_items", "10"]
    argv += ["--rows_per_pass", "600", "--max_steps", "4", "--bf16", "False", "--disable_tqdm", "True", *flags]
    train.main(argv)
    return output


@pytest.fixture(scope="module")
def runs(data: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return {
        kind: trained(data, folder / kind, *flags, "--hold_out_items", "0.2", "--learning_rate", "0.01")
        for kind, flags in KINDS.items()
    }


def by_hand(scores: NDArray[np.floating], among: Sequence[int], target: int, k: int) -> float:
    """A hit, or the chance of one among equal scores."""
    if target not in among:
        return 0.0
    own = scores[target]
    better = sum(scores[item] > own + 1e-5 for item in among)
    equal = sum(abs(scores[item] - own) <= 1e-5 for item in among)
    return min(max((k - better) / equal, 0.0), 1.0)


def test_measures_are_those_of_the_library(data: str, runs: dict[str, Path], tmp_path: Path) -> None:
    output = tmp_path / "cold.csv"
    k = 3
    command = [*map(str, runs.values()), "--data", data, "--k", str(k), "--output", str(output)]
    found = cold_items.main(command)
    whole = open_dataset(data)
    cold = set(whole.titles) - set(hold_out_items(whole, 0.2).titles)
    assert len(cold) > 5
    samples = whole.samples("test")
    targets = whole.targets(samples)
    for kind, path in runs.items():
        run = found[str(path)]
        assert set(run.cold.tolist()) == cold
        model, _ = models.load_model(str(path), whole.titles)
        model.eval()
        head = "titles" if kind == "titles" else "items"
        tables = model.score_items(whole.before(samples), head=head)
        places = model.catalog.index_of(targets)
        some = model.catalog.index_of(np.array(sorted(cold))).tolist()
        for number, (scores, target) in enumerate(zip(tables, places.tolist(), strict=True)):
            seen = set(model.catalog.index_of(whole.before(samples.take([number])).items).tolist())
            everything = [item for item in range(len(model.catalog)) if item not in seen]
            chosen = [item for item in some if item not in seen]
            among = run.measures[f"HR@{k} among cold"][number]
            assert run.measures[f"HR@{k}"][number] == pytest.approx(by_hand(scores, everything, target, k), abs=1e-6)
            total = np.log(np.exp(scores - scores.max()).sum()) + scores.max()
            assert run.measures["NLL"][number] == pytest.approx(total - scores[target], rel=1e-4)
            if targets[number] in cold:
                assert among == pytest.approx(by_hand(scores, chosen, target, k), abs=1e-6)
                assert run.chance[f"HR@{k} by chance"][number] == pytest.approx(min(k / len(chosen), 1))
            else:
                assert np.isnan(among)
    # one token for all that are new: what cannot be told apart has what chance has
    alike = found[str(runs["ids"])].measures[f"HR@{k} among cold"]
    unseen = alike > 0
    assert unseen.any()
    np.testing.assert_allclose(alike[unseen], found[str(runs["ids"])].chance[f"HR@{k} by chance"][unseen], rtol=1e-6)

    rows = list(csv.DictReader(output.open()))
    (mean,) = [
        float(row["mean"])
        for row in rows
        if (row["run"], row["slice"], row["measure"]) == (str(runs["vectors"]), "cold", f"HR@{k} among cold")
    ]
    assert mean == pytest.approx(np.nanmean(found[str(runs["vectors"])].measures[f"HR@{k} among cold"]))
    counted = [int(row["samples"]) for row in rows if row["measure"] == "NLL" and row["run"] == str(runs["ids"])]
    every, warm, held_out, *by_count = counted
    assert every == samples.users.size == warm + held_out and sum(by_count) == warm
    text = output.with_suffix(".md").read_text()
    assert "among cold, chance 0." in text and f"minus {runs['vectors']}" in text
    assert not list(tmp_path.glob("*.part"))


def test_histories_are_cut_as_asked(data: str, runs: dict[str, Path], tmp_path: Path) -> None:
    whole = open_dataset(data)
    samples = whole.samples("test")
    histories, targets = whole.before(samples), whole.targets(samples)
    assert (histories.lengths > 10).any()
    model, _ = models.load_model(str(runs["vectors"]), whole.titles)
    policy = replace(model.eval().policy, cut_every=7)
    command = [str(runs["vectors"]), "--data", data, "--output", str(tmp_path / "cold.csv"), "--cut_every"]
    (run,) = cold_items.main([*command, "7"]).values()
    scores = model.score_items(histories, policy, head="items").astype(np.float64)
    expected = -scores[np.arange(len(histories)), model.catalog.index_of(targets)]
    np.testing.assert_allclose(run.measures["NLL"], expected, rtol=1e-4)
    differs = model.score_items(histories, head="items")
    assert not np.allclose(differs, scores, rtol=1e-4)
    with pytest.raises(SystemExit):
        cold_items.main([*command, "0"])


def test_runs_remember_what_they_held_out(data: str, runs: dict[str, Path], tmp_path: Path) -> None:
    saved = pk.PatchedCausalLM.from_pretrained(find_model(str(runs["vectors"]), "run"))
    kept = hold_out_items(open_dataset(data), 0.2)
    assert saved.catalog.item_ids.tolist() == list(kept.titles) and saved.vector_dropout == 0.3
    assert json.loads((runs["vectors"] / "arguments.json").read_text())["hold_out_items"] == 0.2
    # the next stage goes on without them, and evaluate.py ranks them by their titles
    trained(data, tmp_path / "next", "--from", str(runs["vectors"]))
    following = pk.PatchedCausalLM.from_pretrained(find_model(str(tmp_path / "next"), "run"))
    assert following.catalog.fingerprint == saved.catalog.fingerprint and following.vector_dropout == 0.3
    flags = ["--data", data, "--search", "items", "--output", str(tmp_path / "test.csv")]
    for kind in ("vectors", "ids"):
        found = evaluate.main([str(runs[kind]), *flags])["this model"][0]
        assert found.ranks.size == open_dataset(data).samples("test").users.size


def test_runs_that_cannot_be_compared(data: str, runs: dict[str, Path], tmp_path: Path) -> None:
    whole = trained(data, tmp_path / "whole", *KINDS["ids"])
    other = trained(data, tmp_path / "other", *KINDS["ids"], "--hold_out_items", "0.1")
    for paths, message in (
        ([whole], "runs: expected some that were trained with --hold_out_items, got .*whole, which knows all"),
        ([runs["ids"], other], "runs: expected all to have held the same items out, got .* in .*ids and .* in .*other"),
        (["no-such-run"], "runs: expected a run of recipes/train.py, got 'no-such-run'"),
    ):
        with pytest.raises(ValueError, match=message):
            cold_items.main([*map(str, paths), "--data", data, "--output", str(tmp_path / "cold.csv")])
    assert not list(tmp_path.glob("cold*"))


def test_where_tables_go_is_known_before_the_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cold_items.main(["somewhere", "--data", "synthetic", "--output", "cold.md"])
    assert "--output: expected a name for the CSV, beside which the tables are .md, got cold.md" in (
        capsys.readouterr().err
    )
    with pytest.raises(IsADirectoryError, match="--output: expected a file, got a folder"):
        cold_items.main(["somewhere", "--data", "synthetic", "--output", str(tmp_path)])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([*KINDS["ids"], "--hold_out_items", "1"], "--hold_out_items: expected at least 0 and below 1, got 1.0"),
        ([*KINDS["ids"], "--vector_dropout", "0.3"], "--vector_dropout: expected only with --item_embeddings"),
        ([*KINDS["vectors"], "--vector_dropout", "-1"], "--vector_dropout: expected at least 0 and below 1, got -1.0"),
        (["--model", "some-folder", "--item_tokens"], "--item_tokens: expected only with --model tiny or small"),
    ],
)
def test_flags(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train.main(["--stage", "items", "--data", "synthetic", "--output_dir", "unused", *flags])
    assert message in capsys.readouterr().err
