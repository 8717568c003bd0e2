# SPDX-License-Identifier: Apache-2.0
"""Validation while training: what is recommended, when, and what becomes of the best model."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_cases import EARLY, USERS, evaluations_of, held_out_samples, losses_of, make_data, make_trainer
from transformers import EarlyStoppingCallback, TrainerCallback

import patchkern as pk
from patchkern.evaluation.metrics import evaluate
from patchkern.models.patched_lm import PatchedCausalLM
from patchkern.training import PatchTrainer, checkpoints
from patchkern.training.passes import SlotDataset


def test_evaluation_recommends_for_the_held_out_samples(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, config={"dropout": 0.5}, validate={"eval_options": {"batch_size": 5}})
    model, (users, positions) = trainer.model, held_out_samples()
    histories, _ = make_data()
    before = torch.random.get_rng_state()
    model.train()
    found = trainer.evaluate()
    assert torch.equal(torch.random.get_rng_state(), before) and model.training
    lists = model.recommend(histories.before(users, positions), k=20, exclude_seen=True)
    expected = evaluate(lists, histories.at(users, positions), catalog=model.catalog)
    for name, value in expected.as_dict().items():
        assert "±" in name or found[f"eval_{name}"] == pytest.approx(value)
    assert set(found) == {
        *("eval_loss", "eval_HR@10", "eval_HR@20", "eval_NDCG@10", "eval_NDCG@20", "eval_MRR@10", "eval_MRR@20"),
        *("eval_runtime", "eval_samples_per_second", "epoch"),
    }
    assert evaluations_of(trainer)[0]["eval_HR@20"] == found["eval_HR@20"]
    seen = make_trainer(
        tmp_path, config={"dropout": 0.5}, validate={"eval_options": {"exclude_seen": False}}
    ).evaluate()
    assert seen["eval_loss"] == pytest.approx(found["eval_loss"]) and seen["eval_NDCG@20"] != found["eval_NDCG@20"]
    assert trainer.evaluate(metric_key_prefix="val")["val_HR@20"] == found["eval_HR@20"]


def test_evaluation_takes_evenly_spread_samples(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, validate={"eval_limit": 4})
    validation = trainer.eval_dataset
    assert [validation[number] for number in range(len(validation))] == [(0, 5), (3, 8), (7, 6), (11, 10)]
    assert len(make_trainer(tmp_path, validate={"eval_limit": None}).eval_dataset) == USERS


def test_another_eval_dataset_is_evaluated_as_by_any_trainer(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, validate={}, label_smoothing_factor=0.3)
    dataset = SlotDataset(*held_out_samples(), steps=1, samples_per_step=USERS, seed=0)
    found = trainer.evaluate(dataset)
    assert "eval_HR@20" not in found and np.isfinite(found["eval_loss"])


def test_validation_in_mixed_precision(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, rows_per_pass=250, max_steps=2, bf16=True, **EARLY)
    trainer.train()
    (found,) = evaluations_of(trainer)
    # recommendations are those of the weights, which are float32
    histories, (users, positions) = make_data()[0], held_out_samples()
    lists = trainer.model.recommend(histories.before(users, positions), exclude_seen=True)
    expected = evaluate(lists, histories.at(users, positions), catalog=trainer.model.catalog)
    assert found["eval_NDCG@20"] == pytest.approx(expected.ndcg(20))
    assert np.isfinite(found["eval_loss"])


def test_training_stops_early_and_ends_with_the_best_model(tmp_path: Path) -> None:
    """Without a learning rate nothing ever gets better than it was at the first evaluation."""
    patient = [EarlyStoppingCallback(2)]
    trainer = make_trainer(tmp_path, rows_per_pass=250, max_steps=20, learning_rate=0.0, callbacks=patient, **EARLY)
    trainer.train()
    assert [entry["step"] for entry in evaluations_of(trainer)] == [2, 4, 6]
    assert trainer.state.global_step == 6
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-6"]
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    for path in checkpoints(tmp_path):
        state = json.loads((path / "trainer_state.json").read_text())
        assert state["best_model_checkpoint"] == str(tmp_path / "checkpoint-2")


@pytest.mark.parametrize("rows_per_pass", [None, 250])
def test_every_epoch_is_evaluated_and_saved(rows_per_pass: int | None, tmp_path: Path) -> None:
    often = dict.fromkeys(("eval_strategy", "save_strategy", "logging_strategy"), "epoch")
    arguments = {"num_train_epochs": 3, "per_device_train_batch_size": 16, **often}
    trainer = make_trainer(tmp_path, rows_per_pass=rows_per_pass, validate={"eval_limit": 2}, max_steps=-1, **arguments)
    total, samples = trainer.args.max_steps, len(make_data()[1][0])
    epoch = total * samples // trainer.train_dataset.num_targets
    ends = sorted({epoch, 2 * epoch, 3 * epoch})
    assert total // 4 < epoch <= total // 3 and 0 <= total - 3 * epoch < 3
    trainer.train()
    assert [entry["step"] for entry in evaluations_of(trainer)][:3] == ends
    assert [path.name for path in checkpoints(tmp_path)][:3] == [f"checkpoint-{step}" for step in ends]
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == ends


@pytest.mark.parametrize("kind", ["model", "items", "adapter"])
def test_the_best_checkpoint_is_loaded_at_the_end(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = {"max_steps": 8, "learning_rate": 3e-2, "lr_scheduler_type": "constant", "save_total_limit": 1}
    made = make_trainer(tmp_path, **EARLY | arguments)
    model, base = made.model, copy.deepcopy(made.model.hf_model)
    if kind == "items":
        model = PatchedCausalLM(model.hf_model, model.catalog, model.prompt, item_embeddings=True)
    if kind == "adapter":
        peft = pytest.importorskip("peft")
        adapter = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        model = PatchedCausalLM(peft.get_peft_model(model.hf_model, adapter), model.catalog, model.prompt)
    worth = iter([0.1, 0.4, 0.2, 0.3])
    monkeypatch.setattr("patchkern.training.trainer.summary", lambda parts: {"HR@20": next(worth)})
    trainer = PatchTrainer(model, made.args, *make_data(), pk.ItemPatches(5, 10), eval_samples=held_out_samples())
    weights = _Weights()
    trainer.add_callback(weights)
    trainer.train()
    assert next(worth, None) is None and trainer.state.best_metric == 0.4
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-4"]
    base_model = base if kind == "adapter" else None
    saved = PatchedCausalLM.from_pretrained(tmp_path / "checkpoint-4", model.catalog, base_model=base_model)
    for (name, parameter), expected in zip(model.named_parameters(), saved.parameters(), strict=True):
        assert torch.equal(parameter, expected) and torch.equal(parameter, weights.at[4][name]), name
    assert any(not torch.equal(value, weights.at[8][name]) for name, value in model.named_parameters())


class _Weights(TrainerCallback):
    def __init__(self) -> None:
        self.at: dict[int, dict[str, torch.Tensor]] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.at[state.global_step] = {name: value.detach().clone() for name, value in model.named_parameters()}


def test_a_resumed_run_remembers_what_was_best(tmp_path: Path) -> None:
    config = {"dropout": 0.3}
    arguments = {"rows_per_pass": 200, "max_steps": 16, "label_smoothing_factor": 0.1, "learning_rate": 1e-2}
    early = {**EARLY, **arguments, "save_total_limit": None}

    def trainer() -> PatchTrainer:
        return make_trainer(tmp_path / "run", config=config, callbacks=[EarlyStoppingCallback(3)], **early)

    whole = trainer()
    whole.train()
    assert len({entry["eval_HR@20"] for entry in evaluations_of(whole)}) > 1
    names = [path.name for path in checkpoints(tmp_path / "run")]
    for path in checkpoints(tmp_path / "run")[2:]:
        shutil.rmtree(path)
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert losses_of(resumed) == losses_of(whole) and evaluations_of(resumed) == evaluations_of(whole)
    assert [path.name for path in checkpoints(tmp_path / "run")] == names
    assert resumed.state.best_model_checkpoint == whole.state.best_model_checkpoint
    for parameter, expected in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(parameter, expected)
    # evaluating leaves no trace in the training
    plain = make_trainer(tmp_path / "plain", config=config, **arguments)
    plain.train()
    assert losses_of(plain)[: len(losses_of(whole))] == losses_of(whole)
