# SPDX-License-Identifier: Apache-2.0
"""`PatchTrainer` on a model of item ids: it learns, resumes to the same losses and is validated by its own search."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_cases import EARLY, evaluations_of, held_out_samples, losses_of, make_id_trainer
from transformers import PreTrainedModel

import patchkern as pk
from patchkern.evaluation.metrics import evaluate


@pytest.mark.parametrize("policy", [pk.ItemPatches(0, None), pk.SessionPatches(2, 10)], ids=["items", "sessions"])
@pytest.mark.parametrize("rows_per_pass", [None, 100], ids=["samples", "passes"])
def test_it_learns(rows_per_pass: int | None, policy: Any, tmp_path: Path) -> None:
    options = {"per_device_train_batch_size": 64, "learning_rate": 2e-2, "max_steps": 40}
    trainer = make_id_trainer(tmp_path, policy, dropout=0.0, rows_per_pass=rows_per_pass, **options)
    before = [parameter.clone() for parameter in trainer.model.parameters()]
    trainer.train()
    losses = losses_of(trainer)
    assert len(losses) == 40 and np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])
    moved = [not torch.equal(*pair) for pair in zip(before, trainer.model.parameters(), strict=True)]
    assert all(moved)


def test_resuming_continues_the_run(tmp_path: Path) -> None:
    options: dict[str, Any] = {"rows_per_pass": 60, "jitter": 2.0, "max_steps": 4}
    options |= {"save_strategy": "steps", "save_steps": 2}
    whole = make_id_trainer(tmp_path, **options)
    whole.train()
    resumed = make_id_trainer(tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses_of(resumed)[-2:] == losses_of(whole)[-2:]
    for (name, ours), theirs in zip(resumed.model.named_parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    saved = pk.ItemModel.from_pretrained(tmp_path / "checkpoint-4")
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), whole.model.parameters(), strict=True))


def test_the_best_model_is_found_by_what_it_recommends(tmp_path: Path) -> None:
    trainer = make_id_trainer(tmp_path, rows_per_pass=60, max_steps=6, **EARLY)
    trainer.train()
    found = evaluations_of(trainer)
    assert [entry["step"] for entry in found] == [2, 4, 6]
    assert trainer.state.best_metric == max(entry["eval_HR@20"] for entry in found)
    histories, (users, positions) = trainer.eval_dataset.histories, held_out_samples()
    lists = trainer.model.recommend(histories.before(users, positions), k=20, exclude_seen=True)
    counted = evaluate(lists, histories.at(users, positions), (20,), catalog=trainer.model.catalog)
    assert counted.hr(20) == pytest.approx(trainer.state.best_metric)


def test_activations_are_recomputed_to_the_same_losses(tmp_path: Path) -> None:
    named = "activation" if hasattr(PreTrainedModel, "activation_checkpointing_enable") else "gradient"
    losses = []
    for recomputed in (False, True):
        trainer = make_id_trainer(tmp_path, rows_per_pass=60, max_steps=3, **{f"{named}_checkpointing": recomputed})
        trainer.train()
        assert all(layer.gradient_checkpointing == recomputed for layer in trainer.model.hf_model.layers)
        losses.append(losses_of(trainer))
    assert losses[0] == losses[1] and len(losses[0]) == 3


def test_titles_are_not_learned(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="head: expected one of items for ItemModel, got 'titles'"):
        make_id_trainer(tmp_path, head="titles")
