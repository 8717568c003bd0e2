# SPDX-License-Identifier: Apache-2.0
"""The trainer: every stage learns, accumulation and checkpointing change nothing, the loss is what it says."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_cases import (
    UNTUNED,
    held_out_samples,
    losses_of,
    make_data,
    make_model,
    make_trainer,
)
from transformers import TrainerCallback, TrainingArguments

import patchkern as pk
from patchkern.budget.live_bytes import peak_memory
from patchkern.models.patched_lm import PatchedCausalLM
from patchkern.training import SETTINGS, STAGES, PatchTrainer
from patchkern.training.collators import PassCollator
from patchkern.training.passes import PassDataset

# ------------------------------------------------------------------ the loss


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_learns(stage: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, stage, num_train_epochs=4, learning_rate=1e-2, max_grad_norm=1.0)
    trainer.train()
    losses = losses_of(trainer)
    assert len(losses) == trainer.args.max_steps
    assert np.mean(losses[-3:]) < 0.75 * np.mean(losses[:3])
    assert trainer.model.policy == UNTUNED.policy(stage, max_items=10)


@pytest.mark.parametrize("stage", ["sft", "sessions"])
def test_accumulation_does_not_change_the_run(stage: str, tmp_path: Path) -> None:
    """Titles differ in length, so a mean of the small batches' means would be another loss."""
    runs = []
    for batch_size, accumulation in ((8, 1), (2, 4), (1, 8)):
        trainer = make_trainer(
            tmp_path,
            stage,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            max_steps=4,
        )
        trainer.train()
        runs.append((losses_of(trainer), [p.detach().clone() for p in trainer.model.parameters()]))
    for losses, parameters in runs[1:]:
        assert losses == pytest.approx(runs[0][0], rel=1e-5)
        for parameter, expected in zip(parameters, runs[0][1], strict=True):
            torch.testing.assert_close(parameter, expected, rtol=0, atol=2e-4)


def test_loss_is_the_mean_over_supervised_tokens(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, "pretrain", max_steps=1)
    batch = trainer.data_collator([trainer.train_dataset[n] for n in range(8)])
    output = trainer.model(batch["layout"])
    expected = torch.nn.functional.cross_entropy(output.logits.double(), batch["labels"])
    trainer.train()
    assert losses_of(trainer) == [pytest.approx(expected.item(), rel=1e-6)]


@pytest.mark.slow
def test_loader_workers_do_not_change_the_run(tmp_path: Path) -> None:
    runs = []
    for workers in (0, 2):
        trainer = make_trainer(tmp_path, "pretrain", dataloader_num_workers=workers, max_steps=6)
        trainer.train()
        runs.append(losses_of(trainer))
    assert runs[0] == runs[1]


@pytest.mark.parametrize("rows_per_pass", [None, 250], ids=["samples", "passes"])
def test_activation_checkpointing_does_not_change_the_run(rows_per_pass: int | None, tmp_path: Path) -> None:
    fields = {field.name for field in dataclasses.fields(TrainingArguments)}
    flag = next(name for name in ("activation_checkpointing", "gradient_checkpointing") if name in fields)
    runs = []
    for enabled in (False, True):
        # dropped numbers must be dropped again in the second computation
        config = {"dropout": 0.3, "attention_dropout": 0.2}
        trainer = make_trainer(tmp_path, rows_per_pass=rows_per_pass, config=config, max_steps=3, **{flag: enabled})
        layer = trainer.model.hf_model.model.layers[0]
        computed = _Calls()
        layer.mlp.register_forward_pre_hook(computed)
        trainer.train()
        assert computed.number == (6 if enabled else 3)
        runs.append(losses_of(trainer))
    assert runs[0] == runs[1]


def spoil(trainer: PatchTrainer, step: int, value: float) -> None:
    """From this step on every loss is of this value."""

    def hook(module: Any, inputs: Any, output: Any) -> Any:
        if trainer.state.global_step + 1 >= step:
            output.loss = output.loss * value
        return output

    trainer.model.register_forward_hook(hook)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("rows_per_pass", [None, 250], ids=["samples", "passes"])
def test_a_loss_that_is_no_number_names_its_samples(rows_per_pass: int | None, value: float, tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 1, "logging_steps": 10}
    trainer = make_trainer(tmp_path, rows_per_pass=rows_per_pass, max_steps=5, **options)
    spoil(trainer, 3, value)
    with pytest.raises(FloatingPointError, match=r"loss: expected a finite number, got (nan|inf) in step 3") as error:
        trainer.train()
    batch = trainer.data_collator([trainer.train_dataset[n] for n in ([2] if rows_per_pass else range(16, 24))])
    users, positions = batch["samples"]
    named = re.findall(r"user (\d+) at positions? (\d+(?: to \d+)?)", str(error.value))
    first = [place if rows_per_pass is None else f"{place[0]} to {place[1]}" for place in positions.tolist()]
    assert named == [(str(user), str(place)) for user, place in zip(users.tolist(), first, strict=True)][:8]
    # the weights that were saved are those before it
    assert [path.name for path in tmp_path.glob("checkpoint-*") if path.name > "checkpoint-2"] == []


class _Calls:
    number = 0

    def __call__(self, module: Any, inputs: Any) -> None:
        self.number += 1


def test_activation_checkpointing_keeps_long_trunks_small() -> None:
    """Trunks and branches of a deep, narrow model: the same gradients from less than half the memory."""
    model, _ = make_model(hidden_size=32, num_hidden_layers=12, dropout=0.2)
    histories, samples = make_data()
    collator = PassCollator(model.catalog, histories, pk.TextOnly(None), model.prompt)
    dataset = PassDataset(*samples, collator.rows, 4000, 1.0, 1, 1, seed=0)
    layout = collator([dataset[0]])["layout"]
    assert layout.num_rows > 2000 and layout.max_prefix > 20
    model.train()
    found = []
    for enabled in (False, True):
        if enabled:
            model.activation_checkpointing_enable()
        model.zero_grad()
        torch.manual_seed(0)
        with peak_memory("cpu") as peak:
            loss = model(layout).loss
            loss.backward()
        found.append((peak.bytes, loss.detach(), [parameter.grad for parameter in model.parameters()]))
    (plain, loss, gradients), (small, again, recomputed) = found
    assert small < 0.5 * plain
    assert torch.equal(loss, again)
    for got, expected in zip(recomputed, gradients, strict=True):
        assert torch.equal(got, expected)


# ------------------------------------------------------------------ arguments


def test_epochs_count_passes_over_the_samples(tmp_path: Path) -> None:
    _, (users, _) = make_data()
    assert make_trainer(tmp_path, num_train_epochs=1).args.max_steps == -(-users.size // 8)
    assert make_trainer(tmp_path, num_train_epochs=2.5).args.max_steps == -(-5 * users.size // 16)
    assert make_trainer(tmp_path, max_steps=7, num_train_epochs=2).args.max_steps == 7


@pytest.mark.filterwarnings("error:.*pin_memory:UserWarning")
def test_memory_is_pinned_for_devices_only(tmp_path: Path) -> None:
    plain = TrainingArguments(str(tmp_path), max_steps=1, report_to="none", disable_tqdm=True, save_strategy="no")
    histories, samples = make_data()
    trainer = PatchTrainer(make_model()[0], plain, histories, samples, pk.TextOnly())
    trainer.train()
    assert plain.dataloader_pin_memory
    assert trainer.args.dataloader_pin_memory == (plain.device.type != "cpu")
    assert trainer.accelerator.non_blocking == trainer.args.dataloader_pin_memory
    assert not plain.accelerator_config.non_blocking


def _pieces(folder: Path) -> dict[str, Any]:
    histories, samples = make_data()
    arguments = SETTINGS["scratch"].arguments("items", folder, use_cpu=True)
    return {"model": make_model()[0], "args": arguments, "histories": histories, "samples": samples}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: {}, "policy: expected one, here or in the model, got None"),
        (
            lambda p: {"samples": (np.zeros(0, np.int64),) * 2, "policy": pk.TextOnly()},
            "samples: expected at least one",
        ),
        (
            lambda p: {"samples": (np.array([0]), np.array([6])), "policy": pk.TextOnly()},
            r"positions\[0\]: expected below 6, got 6",
        ),
        (
            lambda p: {"policy": pk.TextOnly(), "eval_samples": (np.zeros(0, np.int64),) * 2},
            "eval_samples: expected at least one",
        ),
        (
            lambda p: {"policy": pk.TextOnly(), "eval_samples": (np.array([0, 9]), np.array([5, 14]))},
            r"k: expected at most 18, the items of the catalog \(30\) that user 9 has not seen, got 20",
        ),
        (
            lambda p: {"policy": pk.TextOnly(), "eval_samples": held_out_samples(), "eval_limit": 0},
            "eval_limit: expected an integer in 1..2147483647, got 0",
        ),
        (
            lambda p: {"policy": pk.TextOnly(), "eval_samples": held_out_samples(), "eval_options": {"k": 5}},
            "eval_options: expected none that the training decides, got k",
        ),
        (
            lambda p: {"policy": pk.TextOnly(), "eval_samples": held_out_samples(), "eval_options": {"num_beams": 5}},
            "num_beams: expected at least k=20",
        ),
        (lambda p: {"policy": pk.TextOnly(), "jitter": 2.0}, "jitter: expected 0 without rows_per_pass, got 2.0"),
        (
            lambda p: {"policy": pk.TextOnly(), "targets_per_step": 9},
            "targets_per_step: expected None without rows_per",
        ),
        (lambda p: {"policy": pk.TextOnly(), "jitter": -1.0, "rows_per_pass": 500}, "jitter: expected .* got -1.0"),
        (
            lambda p: {"policy": pk.TextOnly(), "head_learning_rate": -0.1},
            "head_learning_rate: expected a finite number of at least 0, got -0.1",
        ),
        *(
            (
                lambda p, wrong=wrong: {
                    "args": SETTINGS["scratch"].arguments("items", p, use_cpu=True, **wrong),
                    "policy": pk.TextOnly(),
                },
                f"{next(iter(wrong))}: expected .* got {next(iter(wrong.values()))}",
            )
            for wrong in (
                {"num_train_epochs": 0},
                {"num_train_epochs": float("nan")},
                {"per_device_train_batch_size": 0},
                {"gradient_accumulation_steps": 0},
                {"label_smoothing_factor": 1.5},
                {"label_smoothing_factor": -0.1},
                {"fp16": True, "bf16": False},
            )
        ),
        (
            lambda p: (
                {"args": SETTINGS["scratch"].arguments("items", p, auto_find_batch_size=True)}
                | {"policy": pk.TextOnly()}
            ),
            "args: expected auto_find_batch_size=False",
        ),
    ],
)
def test_wrong_arguments_are_named(change: Callable[[Path], dict[str, Any]], message: str, tmp_path: Path) -> None:
    folder = tmp_path / "never-made"
    with pytest.raises(ValueError, match=message):
        PatchTrainer(**{**_pieces(folder), **change(folder)})
    assert not folder.exists()


# ------------------------------------------------------------------ label smoothing


@pytest.mark.parametrize("rows_per_pass", [None, 250], ids=["samples", "passes"])
def test_label_smoothing_is_torchs_over_all_supervised_tokens_of_a_step(
    rows_per_pass: int | None, tmp_path: Path
) -> None:
    kept = _KeepGradients()
    trainer = make_trainer(
        tmp_path,
        rows_per_pass=rows_per_pass,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        max_steps=1,
        learning_rate=0.0,
        max_grad_norm=0.0,
        label_smoothing_factor=0.3,
        validate={},
        callbacks=[kept],
    )
    model, size = trainer.model, trainer.args.train_batch_size
    with torch.no_grad():
        for parameter in model.parameters():  # at first all tokens are about as likely, and smoothing changes nothing
            parameter.add_(torch.randn_like(parameter) * 0.3)
    numbers = [range(size), range(size, 2 * size)]
    parts = [trainer.data_collator([trainer.train_dataset[n] for n in batch])["layout"] for batch in numbers]
    labels = [part.logit_labels for part in parts]
    assert labels[0].numel() != labels[1].numel()
    logits = torch.cat([model(part).logits for part in parts])
    expected = torch.nn.functional.cross_entropy(logits, torch.cat(labels), label_smoothing=0.3)
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    trainer.train()
    assert losses_of(trainer)[0] == pytest.approx(expected.item(), rel=1e-5)
    for got, gradient in zip(kept.gradients, gradients, strict=True):
        assert (got - gradient).abs().max() <= 1e-5 * gradient.abs().max()

    users, positions = held_out_samples()
    histories, targets = trainer.data_collator.histories, trainer.data_collator.histories.at(users, positions)
    held_out = pk.build_layout(
        model.catalog, histories.before(users, positions), model.policy, model.prompt, targets.tolist()
    )
    model.eval()
    with torch.no_grad():
        plain = model(held_out).loss.item()
        assert model(held_out, smoothing=0.3).loss.item() != pytest.approx(plain, rel=1e-3)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(plain, rel=1e-5)


class _KeepGradients(TrainerCallback):
    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.gradients = [parameter.grad.clone() for parameter in model.parameters()]


# ------------------------------------------------------------------ passes


@pytest.mark.parametrize(
    ("stage", "targets_per_step"),
    [("sft", None), ("pretrain", None), ("items", None), ("items", 60), ("sessions", None)],
)
def test_training_on_passes_resumes_and_does_not_depend_on_accumulation(
    stage: str, targets_per_step: int | None, tmp_path: Path
) -> None:
    passes = {"rows_per_pass": 250, "targets_per_step": targets_per_step, "max_steps": 4}
    whole = make_trainer(tmp_path / "whole", stage, **passes, save_strategy="steps", save_steps=2)
    assert (whole.args.gradient_accumulation_steps > 1) == (targets_per_step is not None)
    whole.train()
    resumed = make_trainer(tmp_path / "resumed", stage, **passes)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert losses_of(resumed) == losses_of(whole) and len(losses_of(whole)) == 4
    assert all(np.isfinite(losses_of(whole)))


def test_accumulated_passes_weigh_by_targets(tmp_path: Path) -> None:
    """Two passes in a step: the loss is the mean over all their supervised tokens."""
    trainer = make_trainer(tmp_path, rows_per_pass=250, max_steps=1, gradient_accumulation_steps=2, learning_rate=0.0)
    model = trainer.model
    with torch.no_grad():
        parts = [trainer.data_collator([trainer.train_dataset[number]])["layout"] for number in range(2)]
        losses, counts = zip(*((model(part).loss, part.logit_labels.numel()) for part in parts), strict=True)
    trainer.train()
    expected = sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
    assert counts[0] != counts[1]
    assert losses_of(trainer)[0] == pytest.approx(float(expected), rel=1e-4)


def test_the_heads_parameters_have_a_rate_of_their_own(tmp_path: Path) -> None:
    """On the same schedule, with and without weight decay, and after resuming."""
    histories, samples = make_data()
    wrapped, _ = make_model()

    def trainer(folder: str) -> PatchTrainer:
        torch.manual_seed(0)
        model = PatchedCausalLM(copy.deepcopy(wrapped.hf_model), wrapped.catalog, wrapped.prompt, item_embeddings=True)
        arguments = UNTUNED.arguments(
            "items", tmp_path / folder, max_steps=4, use_cpu=True, disable_tqdm=True, weight_decay=0.1, save_steps=2
        )
        return PatchTrainer(
            model,
            arguments,
            histories,
            samples,
            pk.ItemPatches(0, 10),
            rows_per_pass=250,
            head_learning_rate=0.05,
        )

    whole = trainer("whole")
    optimizer = whole.create_optimizer()
    of_head = [group for group in optimizer.param_groups if group["lr"] == 0.05]
    assert [parameter for group in of_head for parameter in group["params"]] == [whole.model.item_embedding]
    grouped = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(map(id, whole.model.parameters())), "each once"
    assert whole.create_optimizer() is optimizer and len(optimizer.param_groups) == 3
    whole.train()
    first, *_, last = whole.lr_scheduler.base_lrs
    assert (first, last) == (1e-3, 0.05)
    resumed = trainer("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for (name, ours), theirs in zip(resumed.model.named_parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
