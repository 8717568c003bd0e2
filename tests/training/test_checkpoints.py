# SPDX-License-Identifier: Apache-2.0
"""Checkpoints are model folders, the best is kept, and a run goes on from one, also after SIGKILL."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from training_cases import losses_of, make_data, make_trainer
from transformers import TrainerCallback

import patchkern as pk
from patchkern.models.patched_lm import PatchedCausalLM
from patchkern.training import PatchTrainer, checkpoints
from patchkern.training.checkpoints import keep


def test_checkpoint_is_a_model_folder(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, "sessions", max_steps=5, save_strategy="steps", save_steps=2, save_total_limit=2)
    trainer.train()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-4", "checkpoint-5"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-4", "checkpoint-5"]
    saved = PatchedCausalLM.from_pretrained(checkpoints(tmp_path)[-1])
    assert saved.catalog.titles == trainer.model.catalog.titles
    assert saved.catalog.fingerprint == trainer.model.catalog.fingerprint
    assert saved.tokenizer.get_vocab() == trainer.processing_class.get_vocab()
    assert saved.policy == pk.SessionPatches(5, 10)
    for parameter, expected in zip(saved.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(parameter, expected)


@pytest.mark.parametrize("tied", [True, False])
def test_resume_continues_the_run(tied: bool, tmp_path: Path) -> None:
    config = {"tie_word_embeddings": tied, "attention_dropout": 0.2}
    saving = {"save_strategy": "steps", "save_steps": 4, "num_train_epochs": 1.5}
    whole = make_trainer(tmp_path / "whole", "pretrain", config=config, **saving)
    whole.train()
    resumed = make_trainer(tmp_path / "whole", "pretrain", config=config, **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert len(losses_of(whole)) == whole.args.max_steps > 10
    assert losses_of(resumed) == losses_of(whole)
    for parameter, expected in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(parameter, expected)


def test_a_run_goes_on_at_its_rate(tmp_path: Path) -> None:
    """Which a checkpoint has: another one would do nothing."""
    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    make_trainer(tmp_path, **saving, learning_rate=1e-3).train()
    with pytest.raises(ValueError, match=r"learning_rate: expected the rates .*, \[0\.001.*, got \[0\.1"):
        make_trainer(tmp_path, **saving, learning_rate=0.1).train(resume_from_checkpoint=True)


def test_a_run_that_goes_on_without_its_optimiser_says_so(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 1, "save_only_model": True}
    make_trainer(tmp_path, max_steps=1, **saving).train()
    with pytest.warns(UserWarning, match=r"resume_from_checkpoint: .* was saved without its optimiser"):
        make_trainer(tmp_path, max_steps=2, **saving).train(resume_from_checkpoint=True)


def test_what_cannot_be_saved_is_refused_at_once(tmp_path: Path) -> None:
    made = make_trainer(tmp_path)
    with pytest.raises(TypeError, match="processing_class: expected a transformers tokenizer, got function"):
        PatchTrainer(made.model, made.args, *make_data(), processing_class=lambda title: [1])


def test_a_run_does_not_go_on_with_exchanged_ids(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    trainer = make_trainer(tmp_path, **saving)
    trainer.train()
    resumed = make_trainer(tmp_path, **saving | {"max_steps": 4})
    catalog = trainer.model.catalog
    titles = dict(zip(catalog.item_ids.tolist(), reversed(catalog.titles), strict=True))
    resumed.model.catalog = pk.Catalog.from_titles(titles, trainer.processing_class)
    with pytest.raises(ValueError, match=r"catalog: expected items with the titles that the model was saved with"):
        resumed.train(resume_from_checkpoint=True)


def test_adapter_checkpoints_resume(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    def trainer() -> PatchTrainer:
        made = make_trainer(tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
        torch.manual_seed(0)
        adapter = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        lora = PatchedCausalLM(peft.get_peft_model(made.model.hf_model, adapter), made.model.catalog, made.model.prompt)
        return PatchTrainer(lora, made.args, *make_data(), pk.ItemPatches(5, 10))

    whole, resumed = trainer(), trainer()
    whole.train()
    assert (tmp_path / "checkpoint-2" / "adapter_model.safetensors").exists()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses_of(resumed) == losses_of(whole)


class _Kill(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def _killed_run(folder: str, step: int | None) -> None:
    """A run that dies in ``step``, or, for None, between the model and the state of its second checkpoint."""
    callbacks = [] if step is None else [_Kill(step)]
    trainer = make_trainer(folder, "pretrain", save_strategy="steps", save_steps=4, callbacks=callbacks)
    if step is None:

        def die(output_dir: str) -> None:
            if output_dir.endswith("-8"):
                os.kill(os.getpid(), signal.SIGKILL)

        trainer._save_rng_state = die
    trainer.train()


def _killed_runs(runs: dict[str, int | None]) -> None:
    """Each in a fork of this process, which has imported everything and never computed a gradient."""
    torch.set_num_threads(1)
    for folder, step in runs.items():
        child = os.fork()
        if child == 0:
            try:
                _killed_run(folder, step)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_killed_runs_resume_to_the_same_losses(tmp_path: Path) -> None:
    runs = {"in-mid-epoch": 7, "in-a-checkpoint": None}
    process = multiprocessing.get_context("spawn").Process(
        target=_killed_runs, args=({str(tmp_path / name): step for name, step in runs.items()},)
    )
    process.start()
    process.join(timeout=300)
    assert process.exitcode == 0
    whole = make_trainer(tmp_path / "whole", "pretrain", save_strategy="steps", save_steps=4)
    whole.train()
    for name in runs:
        assert [path.name for path in checkpoints(tmp_path / name)] == ["checkpoint-4"]
        resumed = make_trainer(tmp_path / name, "pretrain", save_strategy="steps", save_steps=4)
        resumed.train(resume_from_checkpoint=True)
        assert losses_of(resumed) == losses_of(whole)
        assert {path.name for path in (tmp_path / name).iterdir()} == {
            path.name for path in (tmp_path / "whole").iterdir()
        }


@pytest.mark.parametrize(
    ("found", "best", "limit", "left"),
    [
        ("1 2 3", None, 0, "1 2 3"),
        ("1 2 3", None, 2, "2 3"),
        ("1 2 3", None, 1, "3"),
        ("1 2 3 4", "1", 2, "1 4"),
        ("1 2 3 4", "2", 3, "2 3 4"),
        ("1 2", "1", 1, "1 2"),
        ("1 2 3", "3", 1, "3"),
        ("1", "1", 1, "1"),
        ("3 4", "1", 1, "4"),
    ],
)
def test_the_oldest_checkpoints_go_but_for_the_best(
    found: str, best: str | None, limit: int, left: str, tmp_path: Path
) -> None:
    for step in found.split():
        (tmp_path / f"checkpoint-{step}").mkdir()
    keep(checkpoints(tmp_path), best and str(tmp_path / f"checkpoint-{best}"), limit)
    assert [path.name.partition("-")[2] for path in checkpoints(tmp_path)] == left.split()
