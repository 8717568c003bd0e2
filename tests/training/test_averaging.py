# SPDX-License-Identifier: Apache-2.0
"""The average of the weights: what it is, that training goes on as without it, and that it survives being killed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_cases import (
    EARLY,
    evaluations_of,
    held_out_samples,
    losses_of,
    make_data,
    make_id_trainer,
    make_memory_trainer,
    make_model,
    make_trainer,
)
from transformers import TrainerCallback

import patchkern as pk
from patchkern.models.patched_lm import PatchedCausalLM
from patchkern.training import PatchTrainer, checkpoints
from patchkern.training.averaging import WeightAverage

SAVING = {"save_strategy": "steps", "save_steps": 2}
FEW = {"validate": {"eval_limit": 4}}


class _Record(TrainerCallback):
    """The weights after every step."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.weights.append({name: value.detach().double() for name, value in model.named_parameters()})


def _averages(weights: list[dict[str, Tensor]], decay: float) -> list[dict[str, Tensor]]:
    averages = [weights[0]]
    for one in weights[1:]:
        averages.append({name: decay * averages[-1][name] + (1 - decay) * one[name] for name in one})
    return averages


def _assert_equal(model: nn.Module, expected: nn.Module) -> None:
    for parameter, other in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(parameter, other)


@pytest.mark.parametrize("stage", ["items", "sessions"])
def test_the_model_is_the_average_of_the_weights_after_each_step(stage: str, tmp_path: Path) -> None:
    record = _Record()
    trainer = make_trainer(tmp_path, stage, max_steps=5, ema_decay=0.7, callbacks=[record], **SAVING)
    trainer.train()
    averages = _averages(record.weights, 0.7)
    for step in (2, 4, 5):
        saved = PatchedCausalLM.from_pretrained(tmp_path / f"checkpoint-{step}")
        for name, parameter in saved.named_parameters():
            torch.testing.assert_close(parameter.double(), averages[step - 1][name], rtol=1e-6, atol=1e-8)
    _assert_equal(saved, trainer.model)
    assert not torch.equal(
        trainer.model.get_input_embeddings().weight, record.weights[-1]["hf_model.model.embed_tokens.weight"].float()
    )


@pytest.mark.parametrize(
    "how",
    [
        {"stage": "pretrain"},
        {"head": "items", "config": {"vector_dropout": 0.3}, "rows_per_pass": 250, "targets_per_step": 20},
        {"gradient_accumulation_steps": 2, "config": {"attention_dropout": 0.2}},
    ],
    ids=["pretrain", "items in passes", "accumulation"],
)
def test_training_goes_on_as_without_and_resumes_bit_by_bit(how: dict[str, Any], tmp_path: Path) -> None:
    early = {**EARLY, "load_best_model_at_end": False, "save_total_limit": None, "max_steps": 4, **FEW, **how}
    plain = make_trainer(tmp_path / "plain", **early)
    plain.train()
    whole = make_trainer(tmp_path / "whole", ema_decay=0.8, **early)
    whole.train()
    assert losses_of(whole) == losses_of(plain)
    assert evaluations_of(whole) != evaluations_of(plain)
    resumed = make_trainer(tmp_path / "whole", ema_decay=0.8, **early)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert losses_of(resumed) == losses_of(whole)
    assert evaluations_of(resumed) == evaluations_of(whole)
    _assert_equal(resumed.model, whole.model)


@pytest.mark.parametrize("kind", ["ids", "memory", "memory of ids"])
def test_other_models_resume_bit_by_bit(kind: str, tmp_path: Path) -> None:
    def trainer() -> PatchTrainer:
        options = {"rows_per_pass": 250, "max_steps": 4, "ema_decay": 0.8, **SAVING}
        if "memory" in kind:
            return make_memory_trainer(tmp_path, kind == "memory", **options)
        return make_id_trainer(tmp_path, **options)

    whole, resumed = trainer(), trainer()
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses_of(resumed) == losses_of(whole)
    _assert_equal(resumed.model, whole.model)


def test_validation_and_the_best_model_are_of_the_average(tmp_path: Path) -> None:
    worst = {**EARLY, **FEW, "save_total_limit": None, "metric_for_best_model": "loss", "greater_is_better": True}
    trainer = make_trainer(tmp_path, max_steps=6, learning_rate=0.03, ema_decay=0.8, **worst)
    trainer.train()
    logged = evaluations_of(trainer)
    for entry in logged:
        saved = PatchedCausalLM.from_pretrained(tmp_path / f"checkpoint-{entry['step']}")
        alone = PatchTrainer(saved, trainer.args, *make_data(), eval_samples=held_out_samples(), eval_limit=4)
        assert alone.evaluate()["eval_loss"] == pytest.approx(entry["eval_loss"], rel=1e-6)
    best = max(logged, key=lambda entry: entry["eval_loss"])["step"]
    assert best != 6  # else it would be the last model in any case
    _assert_equal(trainer.model, PatchedCausalLM.from_pretrained(tmp_path / f"checkpoint-{best}"))
    trainer.save_model(str(tmp_path / "saved"))
    _assert_equal(trainer.model, PatchedCausalLM.from_pretrained(tmp_path / "saved"))


def test_only_what_is_trained_has_an_average(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    def trainer(folder: str) -> PatchTrainer:
        made = make_trainer(tmp_path / folder, max_steps=4, **SAVING)
        torch.manual_seed(0)
        adapter = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        lora = PatchedCausalLM(peft.get_peft_model(made.model.hf_model, adapter), made.model.catalog, made.model.prompt)
        return PatchTrainer(lora, made.args, *make_data(), pk.ItemPatches(5, 10), ema_decay=0.5)

    whole, resumed = trainer("whole"), trainer("resumed")
    whole.train()
    weights = torch.load(tmp_path / "whole" / "checkpoint-2" / "trained_weights.pt", weights_only=True)["weights"]
    assert weights and all("lora" in name for name in weights)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert losses_of(resumed) == losses_of(whole)
    _assert_equal(resumed.model, whole.model)


def test_a_checkpoint_without_the_weights_goes_on_with_its_model(tmp_path: Path) -> None:
    make_trainer(tmp_path, max_steps=2, ema_decay=0.9, save_only_model=True, **SAVING).train()
    (saved,) = checkpoints(tmp_path)
    assert not (saved / "trained_weights.pt").exists()
    record = _Record()
    trainer = make_trainer(tmp_path, max_steps=3, ema_decay=0.9, callbacks=[record])
    trainer.train(resume_from_checkpoint=str(saved))
    before = {name: value.double() for name, value in PatchedCausalLM.from_pretrained(saved).named_parameters()}
    (expected,) = _averages([before, *record.weights], 0.9)[1:]
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(parameter.double(), expected[name], rtol=1e-6, atol=1e-8)


def test_sharded_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As accelerate has it once it has been told to shard, which it does on a GPU alone."""
    made = PatchTrainer.create_accelerator_and_postprocess

    def sharded(self: PatchTrainer) -> None:
        made(self)
        self.is_fsdp_enabled = True

    monkeypatch.setattr(PatchTrainer, "create_accelerator_and_postprocess", sharded)
    make_trainer(tmp_path)
    with pytest.raises(ValueError, match=r"ema_decay: expected None where processes share the .* parameters, got 0\.9"):
        make_trainer(tmp_path, ema_decay=0.9)


def test_what_cannot_be_averaged_is_refused(tmp_path: Path) -> None:
    for decay in (0.0, 1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match="ema_decay: expected a finite number above 0 and below 1, got"):
            make_trainer(tmp_path, ema_decay=decay)
    model = make_model()[0].bfloat16()
    with pytest.raises(ValueError, match=r"ema_decay: expected trained weights in float32, got torch\.bfloat16"):
        WeightAverage(0.9, model)
    WeightAverage(0.9, model.requires_grad_(False))
    make_trainer(tmp_path, max_steps=2, ema_decay=0.9, **SAVING).train()
    with pytest.raises(ValueError, match=r"ema_decay: expected that of the checkpoint, 0\.9, got 0\.8"):
        make_trainer(tmp_path, max_steps=4, ema_decay=0.8).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match=r"ema_decay: expected that of the checkpoint, .* got None"):
        make_trainer(tmp_path, max_steps=4).train(resume_from_checkpoint=True)
