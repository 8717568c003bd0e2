# SPDX-License-Identifier: Apache-2.0
"""The experts stage from its command line: from an earlier stage, from scratch, on item ids; evaluated as saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import patchkern as pk
from patchkern.training import checkpoints
from recipes import evaluate, train

FAST = ["--use_cpu", "--disable_tqdm", "True", "--logging_steps", "1", "--bf16", "False", "--max_steps", "2"]
FAST += ["--rows_per_pass", "500"]
CUTS = ["--keep", "3", "--block", "5"]


def run(stage: str, data: str, output: Path, *flags: str) -> Any:
    return train.main(["--stage", stage, "--data", data, "--output_dir", str(output), *FAST, *flags])


def evaluated(output: Path, data: str, *flags: str) -> Any:
    return evaluate.main([str(output), "--data", data, "--split", "test", "--limit", "10", "--exclude_seen", *flags])


def test_it_goes_on_from_another_stage_and_from_itself(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scratch = ("--model", "tiny", "--vocab_size", "300", "--max_items", "12")
    run("items", folder, tmp_path / "items", *scratch)
    trainer = run("experts", folder, tmp_path / "experts", "--from", str(tmp_path / "items"), "--experts", "2", *CUTS)
    expected = pk.Experts(pk.ItemPatches(1, None), count=2, keep=3, block=5)
    assert trainer.model.policy == expected
    saved = pk.PatchedCausalLM.from_pretrained(checkpoints(tmp_path / "experts")[-1])
    assert saved.policy == expected and len(saved.prompt.experts) == 2
    printed = capsys.readouterr().out
    assert f"stage experts, {expected}: " in printed
    (found,) = evaluated(tmp_path / "experts", folder)["this model"]
    assert found.num_samples == 10
    again = run("experts", folder, tmp_path / "more", "--from", str(tmp_path / "experts"), "--boundaries", "0")
    assert again.model.policy == pk.Experts(pk.ItemPatches(1, None), count=2, keep=3, block=5, boundaries=None)
    assert again.model.prompt == saved.prompt
    text = run("experts", folder, tmp_path / "text", "--from", str(tmp_path / "experts"), "--keep_text", "3")
    assert text.model.policy == pk.Experts(pk.ItemPatches(3, None), count=2, keep=3, block=5)


@pytest.mark.parametrize(
    "flags", [["--backbone", "hstu"], ["--model", "tiny", "--vocab_size", "300", "--head", "items"]]
)
@pytest.mark.parametrize("parts", ["one", "blocks"])
def test_from_scratch(folder: str, tmp_path: Path, parts: str, flags: list[str]) -> None:
    cuts = ["--block", "5", "--parts", parts, *(["--keep", "3"] if parts == "one" else [])]
    trainer = run("experts", folder, tmp_path, *flags, *cuts)
    policy = trainer.model.policy
    assert (policy.parts, policy.count, policy.block, policy.keep) == (parts, 4, 5, 3 if parts == "one" else 1)
    (found,) = evaluated(tmp_path, folder, "--search", "items")["this model"]
    assert found.num_samples == 10


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--stage", "items", "--experts", "2"], "--experts: expected only with --stage experts"),
        (["--stage", "items", "--keep", "2"], "--keep: expected only with --stage experts"),
        (["--stage", "experts", "--max_items", "9"], "--max_items: expected none with --stage experts"),
    ],
)
def test_flags_that_do_not_go_together(
    flags: list[str], message: str, folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        train.main([*flags, "--data", folder, "--output_dir", str(tmp_path), "--backbone", "sasrec"])
    assert message in capsys.readouterr().err
