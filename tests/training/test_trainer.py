# SPDX-License-Identifier: Apache-2.0
"""Training: slots, batches, loss normalisation, checkpoints, and resuming after SIGKILL."""

from __future__ import annotations

import copy
import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
import socket
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments

import patchkern as pk
from patchkern.budget.live_bytes import peak_memory
from patchkern.evaluation.metrics import evaluate
from patchkern.models.patched_lm import PatchedCausalLM
from patchkern.models.scratch import fit_tokenizer, scratch_model, scratch_prompt
from patchkern.training import SETTINGS, STAGES, PatchTrainer, Settings, checkpoints
from patchkern.training.checkpoints import keep
from patchkern.training.collators import LayoutCollator, PassCollator, RawAndPatched
from patchkern.training.passes import Pass, PassDataset, SlotDataset

USERS, ITEMS = 12, 30
UNTUNED = Settings(learning_rate=1e-3, sessions_learning_rate=3e-4)
TITLES = {10 + item: f"{'ABC'[item % 3] * 3} of {item}" for item in range(ITEMS)}


def _data() -> tuple[pk.Histories, tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(0)
    histories = pk.Histories.from_sequences([rng.integers(10, 10 + ITEMS, 6 + user).tolist() for user in range(USERS)])
    positions = [np.arange(3, length) for length in histories.lengths]
    return histories, (np.repeat(np.arange(USERS), histories.lengths - 3), np.concatenate(positions))


def _held_out() -> tuple[np.ndarray, np.ndarray]:
    """Samples to validate on, of users who have not seen 20 items or more."""
    return np.arange(USERS), 5 + np.arange(USERS) % 6


def _model(tokenizer: Any = None, **config: Any) -> tuple[PatchedCausalLM, Any]:
    tokenizer = tokenizer or fit_tokenizer(TITLES.values(), 280)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, **config}
    catalog = pk.Catalog.from_titles(TITLES, tokenizer)
    return PatchedCausalLM(scratch_model(tokenizer, **shape), catalog, scratch_prompt(tokenizer)), tokenizer


def _trainer(
    folder: Path | str,
    stage: str = "items",
    *,
    callbacks: Any = None,
    config: Any = None,
    rows_per_pass: int | None = None,
    jitter: float = 0.0,
    validate: dict[str, Any] | None = None,
    **arguments: Any,
) -> PatchTrainer:
    histories, samples = _data()
    model, tokenizer = _model(**(config or {}))
    defaults = {
        "per_device_train_batch_size": 8,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
        "dataloader_pin_memory": False,
    }
    return PatchTrainer(
        model,
        UNTUNED.arguments(stage, folder, **{**defaults, **arguments}),
        histories,
        samples,
        UNTUNED.policy(stage, max_items=10),
        pretrain=stage == "pretrain",
        rows_per_pass=rows_per_pass,
        jitter=jitter,
        **({} if validate is None else {"eval_samples": _held_out(), **validate}),
        processing_class=tokenizer,
        callbacks=callbacks,
    )


def _evaluations(trainer: PatchTrainer) -> list[dict[str, float]]:
    """What `evaluate` logged, without the times."""
    logged = [entry for entry in trainer.state.log_history if "eval_HR@20" in entry]
    names = ("step", "eval_loss", "eval_HR@10", "eval_HR@20", "eval_NDCG@10", "eval_NDCG@20")
    return [{name: entry[name] for name in names} for entry in logged]


def _losses(trainer: PatchTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


# ------------------------------------------------------------------ slots and batches


def test_slots_visit_every_sample_once_an_epoch() -> None:
    users, positions = np.arange(10), np.arange(10) + 100
    slots = [SlotDataset(users, positions, steps=6, samples_per_step=4, seed=1)[n] for n in range(24)]
    assert [slot.number for slot in slots] == list(range(24))
    assert [slot.step for slot in slots] == [n // 4 for n in range(24)]
    epochs = [[slot.user for slot in slots[start : start + 10]] for start in (0, 10)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(10))
    assert epochs[0] != epochs[1]
    assert all(slot.position == slot.user + 100 for slot in slots)
    # The same slot of a shorter run holds the same sample, and another seed another one.
    assert SlotDataset(users, positions, steps=2, samples_per_step=4, seed=1)[7] == slots[7]
    other = [SlotDataset(users, positions, steps=6, samples_per_step=4, seed=2)[n].user for n in range(10)]
    assert other != epochs[0]


def _collator(pretrain_steps: int | None, policy: pk.Policy) -> LayoutCollator:
    histories, _ = _data()
    model, _ = _model()
    return LayoutCollator(model.catalog, histories, policy, model.prompt, pretrain_steps, seed=5)


def _slots(step: int, numbers: range) -> list[Any]:
    _, (users, positions) = _data()
    dataset = SlotDataset(users, positions, steps=5, samples_per_step=8, seed=0)
    return [dataset[number]._replace(step=step) for number in numbers]


def test_batch_is_the_layout_of_its_samples() -> None:
    collator = _collator(None, pk.ItemPatches(2, max_items=6))
    slots = _slots(0, range(8))
    batch = collator(slots)
    histories = [collator.histories[slot.user][: slot.position] for slot in slots]
    targets = [collator.histories[slot.user][slot.position] for slot in slots]
    expected = pk.build_layout(collator.catalog, histories, collator.policy, collator.prompt, targets)
    for name in ("lo", "hi", "items", "token_ids", "cu_seqlens", "labels"):
        assert torch.equal(getattr(batch["layout"], name), getattr(expected, name)), name
    assert batch["labels"] is batch["layout"].logit_labels


def test_a_supervised_history_gives_the_loss_of_a_language_model() -> None:
    collator = replace(_collator(None, pk.TextOnly(max_items=6)), supervise_history=True)
    batch = collator(_slots(0, range(8)))
    layout = batch["layout"]
    model, _ = _model()
    loss = model(layout).loss
    ends = layout.cu_seqlens.tolist()
    total, count = 0.0, 0
    for begin, end in zip(ends, ends[1:], strict=False):
        tokens = -1 - layout.lo[begin:end].long()[None]
        total += model.hf_model(input_ids=tokens, labels=tokens, use_cache=False).loss.item() * (end - begin - 1)
        count += end - begin - 1
    assert batch["labels"].numel() == count
    torch.testing.assert_close(loss.item(), total / count, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize(("step", "share"), [(0, 0.0), (3, 0.6), (5, 1.0)])
def test_pretraining_feeds_text_and_patches_in_one_batch(step: int, share: float) -> None:
    collator = _collator(5, pk.ItemPatches(2, max_items=10))
    slots = _slots(step, range(64))
    layout = collator(slots)["layout"]
    text = _collator(None, pk.TextOnly(max_items=10))(slots)["layout"]
    assert layout.num_users == 2 * len(slots)
    half = int(layout.cu_seqlens[len(slots)])
    assert torch.equal(layout.lo[:half], text.lo)
    entries = int((layout.hi[half:] > 0).sum())
    items = collator.histories.before([s.user for s in slots], [s.position for s in slots], 10).items.size
    assert entries / items == pytest.approx(share, abs=0.07)
    # Drawn from the slot: the same again for this batch, different for the next.
    assert torch.equal(layout.lo, collator(slots)["layout"].lo)


def test_draws_differ_between_batches() -> None:
    policies = [RawAndPatched(0.5, None, seed) for seed in (1, 2)]
    histories = pk.Histories.from_sequences([range(40)] * 4)
    first, second = (policy.levels(histories) for policy in policies)
    assert not first[:80].any() and not second[:80].any()
    assert (first[80:] != second[80:]).any()
    collator = _collator(5, pk.TextOnly(max_items=10))
    slots = _slots(3, range(8))
    moved = [slot._replace(number=slot.number + 8) for slot in slots]
    assert collator(slots)["layout"].num_rows != collator(moved)["layout"].num_rows


# ------------------------------------------------------------------ the loss


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_learns(stage: str, tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, stage, num_train_epochs=4, learning_rate=1e-2, max_grad_norm=1.0)
    trainer.train()
    losses = _losses(trainer)
    assert len(losses) == trainer.args.max_steps
    assert np.mean(losses[-3:]) < 0.75 * np.mean(losses[:3])
    assert trainer.model.policy == UNTUNED.policy(stage, max_items=10)


@pytest.mark.parametrize("stage", ["sft", "sessions"])
def test_accumulation_does_not_change_the_run(stage: str, tmp_path: Path) -> None:
    """Titles differ in length, so a mean of the small batches' means would be another loss."""
    runs = []
    for batch_size, accumulation in ((8, 1), (2, 4), (1, 8)):
        trainer = _trainer(
            tmp_path,
            stage,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            max_steps=4,
        )
        trainer.train()
        runs.append((_losses(trainer), [p.detach().clone() for p in trainer.model.parameters()]))
    for losses, parameters in runs[1:]:
        assert losses == pytest.approx(runs[0][0], rel=1e-5)
        for parameter, expected in zip(parameters, runs[0][1], strict=True):
            torch.testing.assert_close(parameter, expected, rtol=0, atol=2e-4)


def test_loss_is_the_mean_over_supervised_tokens(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, "pretrain", max_steps=1)
    batch = trainer.data_collator([trainer.train_dataset[n] for n in range(8)])
    output = trainer.model(batch["layout"])
    expected = torch.nn.functional.cross_entropy(output.logits.double(), batch["labels"])
    trainer.train()
    assert _losses(trainer) == [pytest.approx(expected.item(), rel=1e-6)]


@pytest.mark.slow
def test_loader_workers_do_not_change_the_run(tmp_path: Path) -> None:
    runs = []
    for workers in (0, 2):
        trainer = _trainer(tmp_path, "pretrain", dataloader_num_workers=workers, max_steps=6)
        trainer.train()
        runs.append(_losses(trainer))
    assert runs[0] == runs[1]


@pytest.mark.parametrize("rows_per_pass", [None, 250], ids=["samples", "passes"])
def test_activation_checkpointing_does_not_change_the_run(rows_per_pass: int | None, tmp_path: Path) -> None:
    fields = {field.name for field in dataclasses.fields(TrainingArguments)}
    flag = next(name for name in ("activation_checkpointing", "gradient_checkpointing") if name in fields)
    runs = []
    for enabled in (False, True):
        # dropped numbers must be dropped again in the second computation
        config = {"dropout": 0.3, "attention_dropout": 0.2}
        trainer = _trainer(tmp_path, rows_per_pass=rows_per_pass, config=config, max_steps=3, **{flag: enabled})
        layer = trainer.model.hf_model.model.layers[0]
        computed = _Calls()
        layer.mlp.register_forward_pre_hook(computed)
        trainer.train()
        assert computed.number == (6 if enabled else 3)
        runs.append(_losses(trainer))
    assert runs[0] == runs[1]


class _Calls:
    number = 0

    def __call__(self, module: Any, inputs: Any) -> None:
        self.number += 1


def test_activation_checkpointing_keeps_long_trunks_small() -> None:
    """Trunks and branches of a deep, narrow model: the same gradients from less than half the memory."""
    model, _ = _model(hidden_size=32, num_hidden_layers=12, dropout=0.2)
    histories, samples = _data()
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


def test_settings_are_the_papers(tmp_path: Path) -> None:
    table = {name: asdict(settings) for name, settings in SETTINGS.items()}
    assert {name: table[name]["learning_rate"] for name in ("ml-1m", "goodreads", "ml-100k")} == {
        "ml-1m": 8e-6,
        "goodreads": 5e-5,
        "ml-100k": 1e-5,
    }
    assert {name: table[name]["batch_size"] for name in ("ml-1m", "goodreads", "ml-100k")} == {
        "ml-1m": 64,
        "goodreads": 32,
        "ml-100k": 64,
    }
    arguments = SETTINGS["ml-100k"].arguments("sessions", tmp_path)
    assert arguments.learning_rate == 3e-6
    assert (arguments.lr_scheduler_type, arguments.warmup_steps, arguments.max_grad_norm) == ("cosine", 0.05, 0.3)
    assert (arguments.num_train_epochs, arguments.weight_decay, arguments.report_to) == (1, 0.0, [])
    assert "adamw" in arguments.optim
    assert SETTINGS["ml-100k"].arguments("items", tmp_path, learning_rate=0.5).learning_rate == 0.5
    assert SETTINGS["ml-100k"].policy("sessions") == pk.SessionPatches(20, 100)
    assert SETTINGS["ml-1m"].policy("items", None) == pk.ItemPatches(5, None)
    assert SETTINGS["ml-1m"].policy("sft") == pk.TextOnly(100)


def test_epochs_count_passes_over_the_samples(tmp_path: Path) -> None:
    _, (users, _) = _data()
    assert _trainer(tmp_path, num_train_epochs=1).args.max_steps == -(-users.size // 8)
    assert _trainer(tmp_path, num_train_epochs=2.5).args.max_steps == -(-5 * users.size // 16)
    assert _trainer(tmp_path, max_steps=7, num_train_epochs=2).args.max_steps == 7


def _pieces(folder: Path) -> dict[str, Any]:
    histories, samples = _data()
    arguments = SETTINGS["scratch"].arguments("items", folder, use_cpu=True)
    return {"model": _model()[0], "args": arguments, "histories": histories, "samples": samples}


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
            r"k: expected at most 18, the items of the catalog \(30\) that user 1 has not seen, got 20",
        ),
        (
            lambda p: {"policy": pk.TextOnly(), "eval_samples": _held_out(), "eval_limit": 0},
            "eval_limit: expected an integer in 1..2147483647, got 0",
        ),
        (
            lambda p: {"policy": pk.TextOnly(), "eval_samples": _held_out(), "eval_options": {"k": 5}},
            "eval_options: expected none that the training decides, got k",
        ),
        (
            lambda p: {"policy": pk.TextOnly(), "eval_samples": _held_out(), "eval_options": {"num_beams": 5}},
            "num_beams: expected at least k=20",
        ),
        (lambda p: {"policy": pk.TextOnly(), "jitter": 2.0}, "jitter: expected .* 0 without rows_per_pass, got 2.0"),
        (lambda p: {"policy": pk.TextOnly(), "jitter": -1.0, "rows_per_pass": 500}, "jitter: expected .* got -1.0"),
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


@pytest.mark.parametrize("call", [SETTINGS["ml-1m"].policy, lambda stage: SETTINGS["ml-1m"].arguments(stage, "x")])
def test_unknown_stage_is_named(call: Callable[[str], Any]) -> None:
    with pytest.raises(ValueError, match="stage: expected one of sft, pretrain, items, sessions, got 'patch'"):
        call("patch")


# ------------------------------------------------------------------ checkpoints


def test_checkpoint_is_a_model_folder(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, "sessions", max_steps=5, save_strategy="steps", save_steps=2, save_total_limit=2)
    trainer.train()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-4", "checkpoint-5"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-4", "checkpoint-5"]
    saved = PatchedCausalLM.from_pretrained(checkpoints(tmp_path)[-1], trainer.model.catalog)
    assert saved.policy == pk.SessionPatches(5, 10)
    for parameter, expected in zip(saved.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(parameter, expected)


@pytest.mark.parametrize("tied", [True, False])
def test_resume_continues_the_run(tied: bool, tmp_path: Path) -> None:
    config = {"tie_word_embeddings": tied, "attention_dropout": 0.2}
    saving = {"save_strategy": "steps", "save_steps": 4, "num_train_epochs": 1.5}
    whole = _trainer(tmp_path / "whole", "pretrain", config=config, **saving)
    whole.train()
    resumed = _trainer(tmp_path / "whole", "pretrain", config=config, **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert len(_losses(whole)) == whole.args.max_steps > 10
    assert _losses(resumed) == _losses(whole)
    for parameter, expected in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(parameter, expected)


def test_adapter_checkpoints_resume(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    def trainer() -> PatchTrainer:
        made = _trainer(tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
        torch.manual_seed(0)
        adapter = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        lora = PatchedCausalLM(peft.get_peft_model(made.model.hf_model, adapter), made.model.catalog, made.model.prompt)
        return PatchTrainer(lora, made.args, *_data(), pk.ItemPatches(5, 10))

    whole, resumed = trainer(), trainer()
    whole.train()
    assert (tmp_path / "checkpoint-2" / "adapter_model.safetensors").exists()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert _losses(resumed) == _losses(whole)


class _Kill(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def _killed_run(folder: str, step: int | None) -> None:
    """A run that dies in ``step``, or, for None, between the model and the state of its second checkpoint."""
    torch.set_num_threads(1)
    callbacks = [] if step is None else [_Kill(step)]
    trainer = _trainer(folder, "pretrain", save_strategy="steps", save_steps=4, callbacks=callbacks)
    if step is None:

        def die(output_dir: str) -> None:
            if output_dir.endswith("-8"):
                os.kill(os.getpid(), signal.SIGKILL)

        trainer._save_rng_state = die
    trainer.train()


def _spawn(target: Callable[..., None], *arguments: Any) -> int | None:
    process = multiprocessing.get_context("spawn").Process(target=target, args=arguments)
    process.start()
    process.join(timeout=300)
    return process.exitcode


@pytest.mark.parametrize("step", [7, None], ids=["in-mid-epoch", "in-a-checkpoint"])
def test_killed_run_resumes_to_the_same_losses(step: int | None, tmp_path: Path) -> None:
    assert _spawn(_killed_run, str(tmp_path / "killed"), step) == -signal.SIGKILL
    assert [path.name for path in checkpoints(tmp_path / "killed")] == ["checkpoint-4"]
    whole = _trainer(tmp_path / "whole", "pretrain", save_strategy="steps", save_steps=4)
    whole.train()
    resumed = _trainer(tmp_path / "killed", "pretrain", save_strategy="steps", save_steps=4)
    resumed.train(resume_from_checkpoint=True)
    assert _losses(resumed) == _losses(whole)
    assert {path.name for path in (tmp_path / "killed").iterdir()} == {
        path.name for path in (tmp_path / "whole").iterdir()
    }


# ------------------------------------------------------------------ label smoothing


@pytest.mark.parametrize("rows_per_pass", [None, 250], ids=["samples", "passes"])
def test_label_smoothing_is_torchs_over_all_supervised_tokens_of_a_step(
    rows_per_pass: int | None, tmp_path: Path
) -> None:
    kept = _KeepGradients()
    trainer = _trainer(
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
    assert _losses(trainer)[0] == pytest.approx(expected.item(), rel=1e-5)
    for got, gradient in zip(kept.gradients, gradients, strict=True):
        assert (got - gradient).abs().max() <= 1e-5 * gradient.abs().max()

    users, positions = _held_out()
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


# ------------------------------------------------------------------ validation


def test_evaluation_recommends_for_the_held_out_samples(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, config={"dropout": 0.5}, validate={"eval_options": {"batch_size": 5}})
    model, (users, positions) = trainer.model, _held_out()
    histories, _ = _data()
    before = torch.random.get_rng_state()
    model.train()
    found = trainer.evaluate()
    assert torch.equal(torch.random.get_rng_state(), before) and model.training
    lists = model.recommend(histories.before(users, positions), k=20, exclude_seen=True)
    expected = evaluate(lists, histories.at(users, positions), catalog=model.catalog)
    for name, value in expected.as_dict().items():
        assert "±" in name or found[f"eval_{name}"] == pytest.approx(value)
    assert set(found) == {
        *("eval_loss", "eval_HR@10", "eval_HR@20", "eval_NDCG@10", "eval_NDCG@20"),
        *("eval_runtime", "eval_samples_per_second", "epoch"),
    }
    assert _evaluations(trainer)[0]["eval_HR@20"] == found["eval_HR@20"]
    seen = _trainer(tmp_path, config={"dropout": 0.5}, validate={"eval_options": {"exclude_seen": False}}).evaluate()
    assert seen["eval_loss"] == pytest.approx(found["eval_loss"]) and seen["eval_NDCG@20"] != found["eval_NDCG@20"]
    assert trainer.evaluate(metric_key_prefix="val")["val_HR@20"] == found["eval_HR@20"]


def test_evaluation_takes_evenly_spread_samples(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, validate={"eval_limit": 4})
    validation = trainer.eval_dataset
    assert [validation[number] for number in range(len(validation))] == [(0, 5), (3, 8), (7, 6), (11, 10)]
    assert len(_trainer(tmp_path, validate={"eval_limit": None}).eval_dataset) == USERS


def test_another_eval_dataset_is_evaluated_as_by_any_trainer(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, validate={}, label_smoothing_factor=0.3)
    dataset = SlotDataset(*_held_out(), steps=1, samples_per_step=USERS, seed=0)
    found = trainer.evaluate(dataset)
    assert "eval_HR@20" not in found and np.isfinite(found["eval_loss"])


def test_validation_needs_a_whole_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = PatchTrainer.create_accelerator_and_postprocess

    def sharded(self: PatchTrainer) -> None:
        original(self)
        self.is_fsdp_enabled = True

    monkeypatch.setattr(PatchTrainer, "create_accelerator_and_postprocess", sharded)
    with pytest.raises(ValueError, match="eval_samples: expected None under FSDP"):
        _trainer(tmp_path, validate={})


def test_validation_in_mixed_precision(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, rows_per_pass=250, max_steps=2, bf16=True, **EARLY)
    trainer.train()
    (found,) = _evaluations(trainer)
    # recommendations are those of the weights, which are float32
    histories, (users, positions) = _data()[0], _held_out()
    lists = trainer.model.recommend(histories.before(users, positions), exclude_seen=True)
    expected = evaluate(lists, histories.at(users, positions), catalog=trainer.model.catalog)
    assert found["eval_NDCG@20"] == pytest.approx(expected.ndcg(20))
    assert np.isfinite(found["eval_loss"])


EARLY = {
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_strategy": "steps",
    "save_steps": 2,
    "metric_for_best_model": "HR@20",
    "load_best_model_at_end": True,
    "save_total_limit": 2,
    "restore_callback_states_from_checkpoint": True,
    "validate": {},
}


def test_training_stops_early_and_ends_with_the_best_model(tmp_path: Path) -> None:
    """Without a learning rate nothing ever gets better than it was at the first evaluation."""
    patient = [EarlyStoppingCallback(2)]
    trainer = _trainer(tmp_path, rows_per_pass=250, max_steps=20, learning_rate=0.0, callbacks=patient, **EARLY)
    trainer.train()
    assert [entry["step"] for entry in _evaluations(trainer)] == [2, 4, 6]
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
    trainer = _trainer(tmp_path, rows_per_pass=rows_per_pass, validate={"eval_limit": 2}, max_steps=-1, **arguments)
    total, samples = trainer.args.max_steps, len(_data()[1][0])
    epoch = total * samples // trainer.train_dataset.num_targets
    ends = sorted({epoch, 2 * epoch, 3 * epoch})
    assert total // 4 < epoch <= total // 3 and 0 <= total - 3 * epoch < 3
    trainer.train()
    assert [entry["step"] for entry in _evaluations(trainer)][:3] == ends
    assert [path.name for path in checkpoints(tmp_path)][:3] == [f"checkpoint-{step}" for step in ends]
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == ends


@pytest.mark.parametrize("kind", ["model", "items", "adapter"])
def test_the_best_checkpoint_is_loaded_at_the_end(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = {"max_steps": 8, "learning_rate": 3e-2, "lr_scheduler_type": "constant", "save_total_limit": 1}
    made = _trainer(tmp_path, **EARLY | arguments)
    model, base = made.model, copy.deepcopy(made.model.hf_model)
    if kind == "items":
        model = PatchedCausalLM(model.hf_model, model.catalog, model.prompt, item_embeddings=True)
    if kind == "adapter":
        peft = pytest.importorskip("peft")
        adapter = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        model = PatchedCausalLM(peft.get_peft_model(model.hf_model, adapter), model.catalog, model.prompt)
    worth = iter([0.1, 0.4, 0.2, 0.3])
    monkeypatch.setattr("patchkern.training.trainer.summary", lambda parts: {"HR@20": next(worth)})
    trainer = PatchTrainer(model, made.args, *_data(), pk.ItemPatches(5, 10), eval_samples=_held_out())
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
    arguments = {"rows_per_pass": 250, "max_steps": 16, "label_smoothing_factor": 0.1, "learning_rate": 1e-2}
    early = {**EARLY, **arguments, "save_total_limit": None}

    def trainer() -> PatchTrainer:
        return _trainer(tmp_path / "run", config=config, callbacks=[EarlyStoppingCallback(3)], **early)

    whole = trainer()
    whole.train()
    assert len({entry["eval_HR@20"] for entry in _evaluations(whole)}) > 1
    names = [path.name for path in checkpoints(tmp_path / "run")]
    for path in checkpoints(tmp_path / "run")[2:]:
        shutil.rmtree(path)
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert _losses(resumed) == _losses(whole) and _evaluations(resumed) == _evaluations(whole)
    assert [path.name for path in checkpoints(tmp_path / "run")] == names
    assert resumed.state.best_model_checkpoint == whole.state.best_model_checkpoint
    for parameter, expected in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(parameter, expected)
    # evaluating leaves no trace in the training
    plain = _trainer(tmp_path / "plain", config=config, **arguments)
    plain.train()
    assert _losses(plain)[: len(_losses(whole))] == _losses(whole)


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


# ------------------------------------------------------------------ data parallelism


TOGETHER: dict[str, dict[str, Any]] = {
    "samples": {},
    "passes": {"rows_per_pass": 250, "label_smoothing_factor": 0.1},
    "pre-training on passes": {"rows_per_pass": 500, "stage": "pretrain"},
}
_SHORT = EARLY | {"max_steps": 4, "learning_rate": 1e-3, "lr_scheduler_type": "constant"}


def _rank(rank: int, port: int, folder: str, kind: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    trainer = _trainer(
        folder,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        ddp_backend="gloo",
        **_SHORT | TOGETHER[kind],
    )
    trainer.train()
    result = {"losses": _losses(trainer), "evaluations": _evaluations(trainer)}
    Path(folder, f"rank-{rank}.json").write_text(json.dumps(result | {"best": trainer.state.best_model_checkpoint}))
    torch.save(trainer.model.state_dict(), Path(folder, f"rank-{rank}.pt"))
    # Not by way of the destructors: that of DDP's reducer can wait for a gloo thread that waits for the GIL.
    os._exit(0)


@pytest.mark.parametrize("kind", TOGETHER)
def test_two_processes_train_as_one(kind: str, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_rank, args=(rank, port, str(tmp_path), kind)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=300)
    assert [process.exitcode for process in processes] == [0, 0]
    arguments = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, **_SHORT, **TOGETHER[kind]}
    alone = _trainer(tmp_path / "alone", **arguments)
    alone.train()
    best = str(alone.state.best_model_checkpoint).replace("alone/", "")
    evaluations = _evaluations(alone)
    assert len(evaluations) == 2
    for rank in range(2):
        found = json.loads((tmp_path / f"rank-{rank}.json").read_text())
        assert found["losses"] == pytest.approx(_losses(alone), rel=1e-6)
        for got, expected in zip(found["evaluations"], evaluations, strict=True):
            assert got == pytest.approx(expected, rel=1e-5)
        assert found["best"] == best, "both processes know where it is in the end"
        for name, value in torch.load(tmp_path / f"rank-{rank}.pt").items():
            torch.testing.assert_close(value, alone.model.state_dict()[name], rtol=0, atol=2e-4)
    saved = PatchedCausalLM.from_pretrained(best, alone.model.catalog)
    for parameter, expected in zip(saved.parameters(), alone.model.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=0, atol=2e-4)


# ------------------------------------------------------------------ all targets of a user in one pass


def _passes(rows_per_pass: int, steps: int | None = None, pretrain: bool = False, per_step: int = 1) -> PassDataset:
    histories, samples = _data()
    model, _ = _model()
    collator = PassCollator(model.catalog, histories, pk.ItemPatches(2, 10), model.prompt, 1 if pretrain else None)
    return PassDataset(*samples, collator.rows, rows_per_pass, 2.0, steps, per_step, seed=0)


@pytest.mark.parametrize("rows_per_pass", [200, 500, 100_000])
@pytest.mark.parametrize("pretrain", [False, True])
def test_passes_teach_every_target_once_an_epoch(rows_per_pass: int, pretrain: bool) -> None:
    histories, (users, positions) = _data()
    dataset = _passes(rows_per_pass, pretrain=pretrain)
    model, _ = _model()
    steps = dataset.steps if pretrain else None
    collator = PassCollator(model.catalog, histories, pk.ItemPatches(2, 10), model.prompt, steps)
    taught = []
    for number in range(len(dataset)):
        one = dataset[number]
        assert one.number == one.step == number
        taught += [(u, p) for u, (a, b) in zip(one.users, one.ranges, strict=True) for p in range(a, b + 1)]
        layout = collator([one])["layout"]
        assert 0 < layout.num_rows <= rows_per_pass
        if not pretrain:
            assert layout.num_rows == collator.rows(one.users, one.ranges).sum()
    assert len(taught) == dataset.num_targets
    once = sorted(zip(users.tolist(), positions.tolist(), strict=True))
    if rows_per_pass < 100_000:  # else the passes run over from one epoch to the next
        assert sorted(taught[: len(once)]) == once
        assert sorted(taught[len(once) : 2 * len(once)]) == once
    else:
        assert set(taught) == set(once)


def test_jitter_is_drawn_anew_in_every_pass_and_shows_nothing_later(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, rows_per_pass=500, max_steps=2, jitter=4.0)
    collator: Any = trainer.data_collator
    assert isinstance(collator, PassCollator)
    one = Pass(0, 0, np.array([11]), np.array([[3, 12]]))
    in_order, blurred, again, other = (
        with_jitter([drawn])["layout"].logit_labels
        for with_jitter, drawn in (
            (replace(collator, jitter=0.0), one),
            (collator, one),
            (collator, one),
            (collator, one._replace(number=1)),
        )
    )
    assert torch.equal(blurred, again)
    assert not torch.equal(blurred, in_order) and not torch.equal(blurred, other)
    until = [history[:13] for history in collator.histories]
    nothing_later = replace(collator, histories=pk.Histories.from_sequences(until))([one])["layout"]
    assert torch.equal(nothing_later.lo, collator([one])["layout"].lo)
    assert torch.equal(nothing_later.logit_labels, blurred)


def test_passes_are_the_same_from_run_to_run_and_fill_every_step() -> None:
    one, two = _passes(200, per_step=4), _passes(200, per_step=4)
    assert len(one) == 4 * one.steps and one[len(one) - 1].step == one.steps - 1
    for number in range(len(one)):
        assert one[number].users.tolist() == two[number].users.tolist()
    assert len(_passes(200, steps=7, per_step=2)) == 14
    with pytest.raises(ValueError, match=r"rows_per_pass: expected at least \d+ for the target of user"):
        _passes(10)


def test_a_pass_has_the_loss_of_its_samples(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, rows_per_pass=300, max_steps=1)
    model, collator = trainer.model, trainer.data_collator
    one = trainer.train_dataset[0]
    assert isinstance(collator, PassCollator)
    users = np.repeat(one.users, one.ranges[:, 1] - one.ranges[:, 0] + 1)
    positions = np.concatenate([np.arange(first, last + 1) for first, last in one.ranges])
    # within max_items, where the two are the same
    policy = replace(model.policy, max_items=None)
    histories = collator.histories.before(users, positions)
    targets = collator.histories.at(users, positions)
    samples = pk.build_layout(model.catalog, histories, policy, model.prompt, targets)
    passed = replace(collator, policy=policy)([one])["layout"]
    assert passed.num_rows < samples.num_rows
    torch.testing.assert_close(model(passed).loss, model(samples).loss, rtol=1e-5, atol=0)


@pytest.mark.parametrize("stage", ["sft", "pretrain", "items", "sessions"])
def test_training_on_passes_resumes_and_does_not_depend_on_accumulation(stage: str, tmp_path: Path) -> None:
    whole = _trainer(tmp_path / "whole", stage, rows_per_pass=250, max_steps=4, save_strategy="steps", save_steps=2)
    whole.train()
    resumed = _trainer(tmp_path / "resumed", stage, rows_per_pass=250, max_steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert _losses(resumed) == _losses(whole) and len(_losses(whole)) == 4
    assert all(np.isfinite(_losses(whole)))


def test_accumulated_passes_weigh_by_targets(tmp_path: Path) -> None:
    """Two passes in a step: the loss is the mean over all their supervised tokens."""
    trainer = _trainer(tmp_path, rows_per_pass=250, max_steps=1, gradient_accumulation_steps=2, learning_rate=0.0)
    model = trainer.model
    with torch.no_grad():
        parts = [trainer.data_collator([trainer.train_dataset[number]])["layout"] for number in range(2)]
        losses, counts = zip(*((model(part).loss, part.logit_labels.numel()) for part in parts), strict=True)
    trainer.train()
    expected = sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
    assert counts[0] != counts[1]
    assert _losses(trainer)[0] == pytest.approx(float(expected), rel=1e-4)


def test_history_text_is_supervised_within_each_span() -> None:
    histories, _ = _data()
    model, _ = _model()
    collator = PassCollator(model.catalog, histories, pk.TextOnly(None), model.prompt, supervise_history=True)
    layout = collator([_passes(10_000, steps=1)[0]])["layout"]
    firsts = set(layout.cu_seqlens[:-1].tolist())
    assert set((layout.logit_rows + 1).tolist()) == set(range(layout.num_rows)) - firsts
    assert torch.equal(layout.labels[layout.logit_rows + 1], layout.logit_labels)
    assert torch.isfinite(model(layout).loss)
