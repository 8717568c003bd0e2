# SPDX-License-Identifier: Apache-2.0
"""The table of what compression is worth: every kind of row, in seconds; going on; the numbers of evaluate.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import patchkern as pk
from patchkern.data import open_dataset
from patchkern.evaluation.metrics import evaluate
from recipes import learned_compression, models, per_sample, train, training_flags

ROWS = ["recent", "recent-1", "mean-1", "experts", "memory", "memory-once"]


@pytest.fixture(scope="module", autouse=True)
def tinier_models() -> None:
    """As they are: so they are in the processes that are started."""


def test_the_table(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--data", folder, "--output_dir", str(tmp_path), "--width", "8", "--layers", "1", "--heads", "1"]
    flags += ["--epochs", "0.5", "--block", "4", "--keep", "2", "--targets_per_step", "60", "--rows_per_pass", "900"]
    flags += ["--seeds", "0", "--rows"]
    numbers = learned_compression.main([*flags, *ROWS[:1]])
    assert list(numbers) == ROWS[:1]
    written = (tmp_path / "recent-0" / "result.json").stat().st_mtime_ns
    numbers = learned_compression.main([*flags, *ROWS])
    assert list(numbers) == ROWS
    assert (tmp_path / "recent-0" / "result.json").stat().st_mtime_ns == written, "what is finished stays"
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert sum(line.startswith(tuple(f"| {name}:" for name in ROWS)) for line in lines) == len(ROWS)
    assert any(line.startswith("| memory - mean-1") for line in lines)

    data = open_dataset(folder)
    samples = data.samples("test")
    memory = pk.RecurrentMemory.from_pretrained(tmp_path / "memory-0" / "model")
    assert memory.policy == pk.PreferenceMemory(pk.ItemPatches(0, None), 4, 4)
    for name, once in (("memory", False), ("memory-once", True)):
        memory.one_time = once
        lists = memory.recommend(data.before(samples), k=20, exclude_seen=True)
        found = evaluate(lists, data.targets(samples), (20,), catalog=memory.catalog)
        assert numbers[name]["HR@20"] == pytest.approx(found.hr(20))
    absorbed = memory.policy.absorbed(data.before(samples).lengths)
    assert numbers["memory"]["bytes"] == pytest.approx((absorbed > 0).mean() * 4 * 8 * 4)
    assert numbers["recent"]["bytes"] == 0 < numbers["experts"]["bytes"]
    assert numbers["recent-1"]["rows"] < numbers["memory"]["rows"] < numbers["recent-1"]["rows"] + 4.1
    kept = per_sample.read(tmp_path / "memory-0" / "test.csv")
    assert len(kept.samples) == samples.users.size

    capsys.readouterr()
    with pytest.raises(ValueError, match="output_dir: expected the arguments of the runs there, got other epochs"):
        learned_compression.main([*flags, "recent", "--epochs", "3"])
    for wrong, message in (("nothing", "expected some of full, recent"), ("memory-once", "expected memory beside")):
        with pytest.raises(SystemExit):
            learned_compression.main([*flags, wrong])
        assert message in capsys.readouterr().err


def test_language_models_in_several_processes(folder: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """One of them fails at first, which ends no other."""
    flags = ["--data", folder, "--model", "tiny", "--epochs", "0.1", "--block", "4", "--targets_per_step", "60"]
    flags += ["--seeds", "0", "--rows"]
    several, alone = tmp_path / "several", tmp_path / "alone"
    (several / "memory-0").mkdir(parents=True)
    (several / "memory-0" / "model").touch()  # where a folder should be
    rows = ["mean-1", "memory", "memory-once"]
    with pytest.raises(RuntimeError, match="expected all runs to finish, got errors, which are above, of memory-0;"):
        learned_compression.main(["--output_dir", str(several), "--processes", "2", *flags, *rows])
    told = capfd.readouterr()
    assert "Process memory-0:" in told.err and "memory-0: failed (1)" in told.out and "mean-1-0: done" in told.out
    assert (several / "mean-1-0" / learned_compression.RESULT).exists() and not (several / "memory-once-0").exists()
    (several / "memory-0" / "model").unlink()
    rows.pop()
    numbers = learned_compression.main(["--output_dir", str(several), *flags, *rows])
    assert list(numbers) == rows
    assert learned_compression.main(["--output_dir", str(several), "--processes", "2", *flags, *rows]) == numbers
    assert ", model tiny, seeds 0" in (several / "table.md").read_text()
    numbers |= learned_compression.main(["--output_dir", str(alone), *flags, "mean-1", "experts-blocks"])
    assert (alone / "mean-1-0" / "test.csv").read_bytes() == (several / "mean-1-0" / "test.csv").read_bytes()
    assert not (alone / "mean-1-0" / learned_compression.LOG).exists()
    assert "mean-1, seed 0: HR@" in (several / "mean-1-0" / learned_compression.LOG).read_text()

    data = open_dataset(folder)
    lengths = data.before(data.samples("test")).lengths
    old = np.maximum(lengths - 1, 0) // 4
    row = 2 * 2 * 128 * 4  # layers, keys and values
    assert numbers["mean-1"]["rows"] == pytest.approx((3 + lengths - 4 * old + (old > 0)).mean())
    assert numbers["experts-blocks"]["bytes"] == pytest.approx((old * 4 * row).mean())
    assert numbers["memory"]["bytes"] == pytest.approx((old > 0).mean() * 4 * 128 * 4)
    for runs, name in ((alone, "mean-1"), (alone, "experts-blocks"), (several, "memory")):
        model = models.load_saved(runs / f"{name}-0" / "model", torch.float32)
        lists = model.recommend(data.before(data.samples("test")), k=20, exclude_seen=True, search="items")
        found = evaluate(lists, data.targets(data.samples("test")), (20,), catalog=model.catalog)
        assert numbers[name]["HR@20"] == pytest.approx(found.hr(20))


def test_a_language_model_is_the_one_of_the_training_recipe(folder: str) -> None:
    data = open_dataset(folder)
    common = ["--data", folder, "--model", "tiny", "--output_dir", "nowhere"]
    args = learned_compression.parse(common)
    model, tokenizer = learned_compression.make_model(learned_compression.all_rows(args)["full"], 3, args, data)
    flags = ["--stage", "items", "--head", "items", "--item_embeddings", "--no_separator", *common]
    theirs = training_flags.parse(training_flags.make_parser(None), flags)
    _, settings = train.choose_settings(theirs, data)
    expected, other = train.load_model(theirs, data, settings, 3)
    assert learned_compression.settings_of(args) == settings and args.learning_rate == settings.learning_rate
    assert model.prompt == expected.prompt and tokenizer.get_vocab() == other.get_vocab()
    found, wanted = model.state_dict(), expected.state_dict()
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert type(model.hf_model) is type(expected.hf_model)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--width", "8"], "--width: expected none with --model, whose sizes have their own, got 8"),
        (["--backbone", "hstu"], "not allowed with argument"),
        (["--processes", "0"], "--processes: expected at least 1, got 0"),
    ],
)
def test_what_does_not_go_together(wrong: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        learned_compression.parse(["--data", "synthetic", "--output_dir", "nowhere", "--model", "tiny", *wrong])
    assert message in capsys.readouterr().err
