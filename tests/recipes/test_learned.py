# SPDX-License-Identifier: Apache-2.0
"""The stages that compress a past: trained, resumed, evaluated and handed on by the recipes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import patchkern as pk
from patchkern.data import open_dataset
from patchkern.evaluation.metrics import evaluate as count
from recipes import evaluate, train

FAST = ["--use_cpu", "--logging_steps", "1", "--disable_tqdm", "true", "--bf16", "false"]
FAST += ["--rows_per_pass", "600"]


def _train(stage: str, data: str, output: Path, *flags: str) -> Any:
    slots = ["--slots", "2"] if stage == "memory" else []
    return train.main(["--stage", stage, "--data", data, "--output_dir", str(output), *FAST, *slots, *flags])


def _losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_a_memory_is_trained_resumed_and_evaluated(folder: str, tmp_path: Path) -> None:
    flags: tuple[str, ...] = ("--width", "16", "--heads", "1", "--max_steps", "4")
    flags += ("--backbone", "hstu", "--save_strategy", "steps", "--save_steps", "2", "--block", "5", "--mode", "append")
    flags += ("--rollout", "0.5")
    trainer = _train("memory", folder, tmp_path / "run", *flags)
    inner = pk.ItemPatches(keep_text=0, max_items=None)
    assert trainer.model.policy == pk.PreferenceMemory(inner, slots=2, block=5, mode="append")
    losses = _losses(trainer)
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    resumed = _train("memory", folder, tmp_path / "run", *flags, "--resume")
    assert _losses(resumed)[-2:] == losses[-2:]

    output = tmp_path / "users.csv"
    found = evaluate.main([str(tmp_path / "run"), "--data", folder, "--exclude_seen", "--output", str(output)])
    data = open_dataset(folder)
    samples = data.samples("test")
    lists = resumed.model.recommend(data.before(samples), k=20, exclude_seen=True)
    expected = count(lists, data.targets(samples), (10, 20), catalog=resumed.model.catalog)
    assert found["this model"][0].ranks.tolist() == expected.ranks.tolist()


def test_a_memory_comes_from_an_items_checkpoint_and_goes_on(folder: str, tmp_path: Path) -> None:
    scratch = ("--model", "tiny", "--vocab_size", "300", "--head", "items", "--max_steps", "1")
    before = _train("items", folder, tmp_path / "items", *scratch).model
    flags = ("--max_steps", "1", "--learning_rate", "0", "--block", "4", "--consistency", "0.5")
    memory = _train("memory", folder, tmp_path / "memory", "--from", str(tmp_path / "items"), *flags).model
    size = before.config.vocab_size
    assert memory.prompt.experts == (size, size + 1) and memory.consistency == 0.5
    assert memory.policy.policy == pk.ItemPatches(before.policy.keep_text, max_items=None)
    old, new = (model.hf_model.get_input_embeddings().weight for model in (before, memory))
    assert torch.equal(new[:size], old) and torch.equal(memory.item_head.bias, before.item_head.bias)
    assert len(evaluate.main([str(tmp_path / "memory"), "--data", folder, "--limit", "5", "--search", "items"])) > 1
    with torch.no_grad():
        memory.map.scale.mul_(3.0)
    memory.save_pretrained(tmp_path / "other")
    third = _train("memory", folder, tmp_path / "third", "--from", str(tmp_path / "other"), *flags, "--head", "items",
                   "--settings", "scratch-head").model  # fmt: skip
    assert third.prompt == memory.prompt and torch.equal(third.map.scale, memory.map.scale)
    plain = _train("items", folder, tmp_path / "plain", "--from", str(tmp_path / "memory"), "--max_steps", "1").model
    assert isinstance(plain, pk.PatchedCausalLM) and plain.prompt == memory.prompt


@pytest.mark.parametrize("stage", ["memory", "experts"])
def test_a_budget_chooses_the_passes(
    stage: str, folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], one_layer: None
) -> None:
    flags: tuple[str, ...] = ("--model", "tiny", "--vocab_size", "300", "--max_steps", "1", "--block", "5")
    flags += ("--rows_per_pass", "3000")
    places = {"cpu": "80MiB", "cuda": "20MiB"} if stage == "memory" else {"cpu": "80MiB"}
    for device, budget in places.items():
        with pytest.raises(SystemExit) as left:
            _train(stage, folder, tmp_path / "dry", *flags, "--dry_run", device, "--memory_budget", budget)
        assert not left.value.code and not (tmp_path / "dry").exists()
    fits, *fits_not = capsys.readouterr().out.split("dry run: ")[1:]
    (rows,) = (int(line.split()[0].replace(",", "")) for line in fits.splitlines() if "rows per pass, all" in line)
    assert 2048 <= rows < 3000
    assert len(fits_not) == len(places) - 1
    assert all("does not fit: --memory_budget: budget: expected at least" in printed for printed in fits_not)
    trainer = _train(stage, folder, tmp_path / "run", *flags, "--memory_budget", "80MiB")
    assert trainer.train_dataset.rows_per_pass == rows
    batch = trainer.data_collator([trainer.train_dataset[0]])["layout"]
    assert 0.8 * rows < batch.num_rows <= rows


def test_a_memory_goes_on_as_it_was_trained(folder: str, tmp_path: Path) -> None:
    """Its positions, too, are enough for more slots than a history has items."""
    flags = ("--width", "16", "--heads", "1", "--max_steps", "1", "--block", "5", "--mode", "append", "--slots", "60")
    before = _train("memory", folder, tmp_path / "first", "--backbone", "sasrec", *flags).model.policy
    assert (before.slots, before.block, before.mode) == (60, 5, "append")
    command = ["--stage", "memory", "--data", folder, "--from", str(tmp_path / "first"), "--output_dir"]
    after = train.main([*command, str(tmp_path / "second"), *FAST, "--max_steps", "1"]).model.policy
    assert after == before


def test_what_a_memory_cannot_be_trained_with(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for flag, message in (
        ("--supervise_history", "--supervise_history: expected none with --stage memory"),
        ("--targets_per_pass=one", "--targets_per_pass: expected all with --stage memory"),
    ):
        with pytest.raises(SystemExit):
            _train("memory", "synthetic", tmp_path, "--model", "tiny", flag)
        assert message in capsys.readouterr().err
    for stage, flag, stages in (
        ("experts", "--slots=2", "memory"),
        ("experts", "--mode=append", "memory"),
        ("items", "--consistency=1", "memory"),
        ("items", "--reference_loss=0", "memory"),
        ("items", "--rollout=0.5", "memory"),
        ("items", "--block=4", "experts or memory"),
    ):
        with pytest.raises(SystemExit):
            _train(stage, "synthetic", tmp_path, "--model", "tiny", flag)
        name = flag.partition("=")[0]
        assert f"{name}: expected only with --stage {stages}, got {stage}" in capsys.readouterr().err
