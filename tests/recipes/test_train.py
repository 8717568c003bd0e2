# SPDX-License-Identifier: Apache-2.0
"""The recipes from their command lines, and the two losses that the training benchmark compares."""

from __future__ import annotations

import csv
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import patchkern as pk
from bench.training_providers import make_model, patchkern_loss, reference_loss
from bench.workloads import POLICIES, stand_in
from patchkern.batch.control_tokens import MARKERS
from patchkern.data import open_dataset, synthetic, write_parquet
from patchkern.evaluation.metrics import evaluate as count
from patchkern.training import SETTINGS, PatchTrainer, checkpoints
from patchkern.training.precision import Speed
from recipes import evaluate, train, training_choices, training_flags

FAST = [
    "--use_cpu",
    "--disable_tqdm",
    "True",
    "--per_device_train_batch_size",
    "4",
    "--max_items",
    "12",
    "--logging_steps",
    "1",
    "--rows_per_pass",
    "800",
    "--bf16",  # else it is measured
    "False",
]


def _train(stage: str, data: str, output: Path, *flags: str) -> Any:
    return train.main(["--stage", stage, "--data", data, "--output_dir", str(output), *FAST, *flags])


def _losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


# ------------------------------------------------------------------ the whole way


def test_stages_follow_each_other_and_are_evaluated(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scratch = ("--model", "tiny", "--vocab_size", "300", "--supervise_history")
    first = _train("sft", folder, tmp_path / "sft", "--max_steps", "40", "--learning_rate", "2e-2", *scratch)
    assert np.mean(_losses(first)[-5:]) < 0.8 * np.mean(_losses(first)[:5])
    before = "sft"
    for stage in ("pretrain", "items", "sessions"):
        trainer = _train(stage, folder, tmp_path / stage, "--from", str(tmp_path / before), "--max_steps", "3")
        rates = SETTINGS["scratch"]
        rate = rates.sessions_learning_rate if stage == "sessions" else rates.learning_rate
        assert trainer.args.learning_rate == rate, "the settings of the first run are handed on"
        before = stage
    printed = capsys.readouterr().out
    assert "BACKEND" in printed and "targets/s, peak memory" in printed
    assert "SessionPatches(group_size=5, max_items=12" in printed

    output = tmp_path / "users.csv"
    command = [str(tmp_path / "sft"), "--data", folder, "--split", "test", "--output", str(output)]
    results = evaluate.main([*command, "--exclude_seen"])
    printed = capsys.readouterr().out
    assert "users/s" in printed and "transitions, unseen" in printed
    rows = list(csv.DictReader(output.open()))
    data = open_dataset(folder)
    samples = data.samples("test")
    assert [int(row["target"]) for row in rows] == data.targets(samples).tolist()
    assert [int(row["user"]) for row in rows] == data.user_ids[samples.users].tolist()
    (found,) = results["this model"]
    for k in (10, 20):
        assert np.mean([int(row[f"hit@{k}"]) for row in rows]) == pytest.approx(found.hr(k))
        ranks = np.array([int(row["rank"]) for row in rows])
        assert np.mean((ranks > 0) & (ranks <= k)) == pytest.approx(found.hr(k))
    assert not list(tmp_path.glob("*.part"))

    # Against the library called directly.
    model = first.model
    lists = model.recommend(data.before(samples), exclude_seen=True)
    expected = count(lists, data.targets(samples), catalog=model.catalog)
    assert found.ranks.tolist() == expected.ranks.tolist()

    capsys.readouterr()
    (short,) = evaluate.main([*command, "--max_items", "2"])["this model"]
    rows_each = pk.build_layout(model.catalog, data.before(samples), pk.TextOnly(2), model.prompt).num_rows
    assert f"{rows_each / samples.users.size:.1f} rows a prompt, compression 1.00" in capsys.readouterr().out
    lists = model.recommend(data.before(samples), pk.TextOnly(2))
    expected = count(lists, data.targets(samples), catalog=model.catalog)
    assert short.ranks.tolist() == expected.ranks.tolist() != found.ranks.tolist()


def test_a_prior_is_a_row_of_its_own(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weight is fitted on the validation split; the model's own row and file stay what they were."""
    _train("items", folder, tmp_path, "--model", "tiny", "--vocab_size", "300", "--max_steps", "1")
    output = tmp_path / "users.csv"
    command = [str(tmp_path), "--data", folder, "--output", str(output), "--exclude_seen"]
    alone = evaluate.main(command)["this model"][0]
    own = output.read_text()
    calls = []
    fit = pk.fit_prior_weight

    def fitting(model: Any, histories: Any, targets: Any, *arguments: Any, **options: Any) -> Any:
        calls.append((model, [history.tolist() for history in histories], targets.tolist(), options["exclude_seen"]))
        return fit(model, histories, targets, *arguments, **options)

    monkeypatch.setattr(pk, "fit_prior_weight", fitting)
    capsys.readouterr()
    both = evaluate.main([*command, "--prior", "transitions"])
    printed = capsys.readouterr().out
    data = open_dataset(folder)
    val, test = data.samples("val"), data.samples("test")
    (model, *asked), *others = calls
    assert not others
    assert asked == [[history.tolist() for history in data.before(val)], data.targets(val).tolist(), True]
    first, name, *_ = both
    weight = float(name.removeprefix("+ transitions (weight ").removesuffix(")"))
    assert f"transitions: NDCG@20 on {val.users.size} validation samples by weight: 0: " in printed
    assert first == "this model" and f"\n{name} " in printed
    assert both[first][0].ranks.tolist() == alone.ranks.tolist() and output.read_text() == own
    prior = pk.TransitionPrior(data, model.catalog)
    lists = model.recommend(data.before(test), exclude_seen=True, prior=prior, prior_weight=weight)
    expected = count(lists, data.targets(test), catalog=model.catalog).ranks.tolist()
    written = [int(row["rank"]) for row in csv.DictReader((tmp_path / "users-transitions.csv").open())]
    assert weight > 0 and both[name][0].ranks.tolist() == written == expected != alone.ranks.tolist()

    given = evaluate.main(
        [*command, "--split", "val", "--limit", "9", "--prior", "popularity", "--prior_weight", "0.5"]
    )
    assert list(given)[:2] == ["this model", "+ popularity (weight 0.5)"] and len(calls) == 1


def test_evaluation_by_the_papers_protocol(folder: str, tmp_path: Path) -> None:
    _train("sessions", folder, tmp_path, "--model", "tiny", "--vocab_size", "300", "--max_steps", "2")
    results = evaluate.main([str(tmp_path), "--data", folder, "--metric", "paper", "--limit", "5"])
    assert [part.ks for part in results["this model"]] == [(10,), (20,)]
    assert {part.metric for part in results["this model"]} == {"paper"}
    rows = list(csv.DictReader((checkpoints(tmp_path)[-1] / "test-paper.csv").open()))
    assert len(rows) == 5
    diverse = evaluate.main([str(tmp_path), "--data", folder, "--search", "diverse", "--limit", "5"])
    assert diverse["this model"][0].ks == (10, 20)


# ------------------------------------------------------------------ a run's folder


def test_resume_continues_the_run(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--model", "tiny", "--vocab_size", "300", "--max_steps", "6", "--save_steps", "2", "--ema_decay", "0.9")
    whole = _train("pretrain", folder, tmp_path, *flags)
    averages = [parameter.detach().clone() for parameter in whole.model.parameters()]
    shutil.rmtree(tmp_path / "checkpoint-6")
    shutil.rmtree(tmp_path / "checkpoint-4")
    original = PatchTrainer.train

    def timed(self: PatchTrainer, **options: Any) -> Any:
        output = original(self, **options)
        output.metrics["train_runtime"] = 2.0
        return output

    monkeypatch.setattr(PatchTrainer, "train", timed)
    written = json.loads((tmp_path / "arguments.json").read_text())
    del written["item_tokens"], written["hold_out_items"]  # as of a version that has no such flags
    (tmp_path / "arguments.json").write_text(json.dumps(written))
    capsys.readouterr()
    with pytest.raises(ValueError, match=r"--resume: expected .*, got other hold_out_items None -> 0\.1"):
        _train("pretrain", folder, tmp_path, *flags, "--resume", "--hold_out_items", "0.1")
    with pytest.raises(ValueError, match=r"--resume: expected .*, got other ema_decay 0\.9 -> 0\.5"):
        _train("pretrain", folder, tmp_path, *flags, "--resume", "--ema_decay", "0.5")
    resumed = _train("pretrain", folder, tmp_path, *flags, "--resume")
    # the steps before were another run's
    assert f"{resumed.train_dataset.num_targets * 4 / 6 / 2:.1f} targets/s" in capsys.readouterr().out
    assert _losses(resumed) == _losses(whole)
    assert all(map(torch.equal, resumed.model.parameters(), averages)), "the average is the uninterrupted run's too"
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]

    with pytest.raises(ValueError, match="--output_dir: expected a folder without checkpoints, or --resume"):
        _train("pretrain", folder, tmp_path, *flags)
    with pytest.raises(
        ValueError, match=r"--resume: expected the arguments of the run so far, got other seed '42' -> '7'"
    ):
        _train("pretrain", folder, tmp_path, *flags, "--resume", "--seed", "7")
    assert json.loads((tmp_path / "arguments.json").read_text())["seed"] == "42"


def test_early_stopping_saves_the_best_model_in_the_run(folder: str, tmp_path: Path) -> None:
    scratch = ("--model", "tiny", "--vocab_size", "300", "--dropout", "0.25", "--label_smoothing_factor", "0.2")
    flags = ("--max_steps", "40", "--early_stopping", "1", "--learning_rate", "0.0")
    trainer = _train("items", folder, tmp_path, *scratch, *flags)
    # nothing gets better, so the second evaluation is the last, and the first was the best
    evaluated = [entry["step"] for entry in trainer.state.log_history if "eval_HR@20" in entry]
    assert evaluated == [2, 4] and trainer.state.global_step == 4
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    assert trainer.args.label_smoothing_factor == 0.2
    assert trainer.model.config.resid_pdrop == 0.25
    results = evaluate.main([str(tmp_path), "--data", folder, "--limit", "5"])
    assert results["this model"][0].ranks.size == 5
    assert (tmp_path / "test-strict.csv").is_file(), "the run's own model was evaluated, not a checkpoint"

    after = _train("sessions", folder, tmp_path / "next", "--from", str(tmp_path), "--max_steps", "1")
    assert after.model.config.resid_pdrop == 0.25, "dropout is kept from stage to stage"
    assert _losses(after) and not [entry for entry in after.state.log_history if "eval_HR@20" in entry]


def test_patches_alone_without_separators(folder: str, tmp_path: Path) -> None:
    flags = ("--keep_text", "0", "--no_separator", "--jitter", "2", "--max_steps", "1")
    trainer = _train("items", folder, tmp_path / "items", "--model", "tiny", "--vocab_size", "300", *flags)
    assert isinstance(trainer.model.policy, pk.ItemPatches) and trainer.model.policy.keep_text == 0
    assert trainer.model.prompt.separator == () and trainer.data_collator.jitter == 2.0
    after = _train("sessions", folder, tmp_path / "sessions", "--from", str(tmp_path / "items"), "--max_steps", "1")
    assert after.model.prompt == trainer.model.prompt, "the prompt is kept from stage to stage"
    assert after.data_collator.jitter == SETTINGS["scratch"].jitter


def test_a_run_hands_its_histories_on(folder: str, tmp_path: Path) -> None:
    flags = ("--model", "tiny", "--vocab_size", "300", "--max_steps", "1", "--keep_text", "3", "--group_size", "4")
    _train("items", folder, tmp_path / "first", *flags, "--max_items", "9")
    second = _train("sessions", folder, tmp_path / "second", "--from", str(tmp_path / "first"), "--max_steps", "1")
    assert second.model.policy == pk.SessionPatches(4, 12), "but for what is given"
    # through a run that has no use for it
    third = _train("items", folder, tmp_path / "third", "--from", str(tmp_path / "second"), "--max_steps", "1")
    assert third.model.policy == pk.ItemPatches(3, 12)
    command = ["--stage", "items", "--data", folder, "--output_dir", str(tmp_path / "x"), "--from"]
    args = training_flags.parse(training_flags.make_parser(None), [*command, str(tmp_path / "first" / "checkpoint-1")])
    assert (args.max_items, args.settings) == (9, "scratch")


def test_the_seed_reaches_everything_that_is_drawn(folder: str, tmp_path: Path) -> None:
    flags = ("--model", "tiny", "--vocab_size", "300", "--max_steps", "1", "--dropout", "0.3", "--learning_rate", "0")
    runs = [
        _train("items", folder, tmp_path / str(number), *flags, "--seed", seed)
        for number, seed in enumerate(("5", "5", "6"))
    ]
    losses = [_losses(run) for run in runs]
    assert losses[0] == losses[1] != losses[2]
    weights = [run.model.get_input_embeddings().weight for run in runs]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    users = [run.train_dataset[0].users.tolist() for run in runs]
    assert users[0] == users[1] != users[2]


def test_help_lists_every_flag_once_and_ours_first(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train.main(["--help"])
    printed = capsys.readouterr().out
    order = [
        printed.index(flag) for flag in ("\n  --stage", "\n  --model", "\n  --rows_per_pass", "\n  --learning_rate")
    ]
    assert order == sorted(order)
    assert "--learning-rate" not in printed and "transformers.TrainingArguments:" in printed


def test_the_item_head_learns_and_is_validated_by_its_own_search(folder: str, tmp_path: Path) -> None:
    flags = ("--model", "tiny", "--vocab_size", "300", "--head", "items", "--item_embeddings", "--no_separator")
    flags += ("--max_steps", "40", "--early_stopping", "9", "--eval_steps", "20")
    flags += ("--save_steps", "20", "--metric_for_best_model", "NDCG@20", "--warmup_steps", "0")
    trainer = _train("items", folder, tmp_path / "head", *flags, "--head_learning_rate", "0.02")
    assert np.mean(_losses(trainer)[-5:]) < 0.9 * np.mean(_losses(trainer)[:5])
    assert trainer.eval_dataset.options["search"] == "items" and trainer.args.learning_rate == 2e-3
    assert trainer.state.best_metric == max(
        entry["eval_NDCG@20"] for entry in trainer.state.log_history if "eval_NDCG@20" in entry
    )
    assert trainer.lr_scheduler.base_lrs[-1] == 0.02 and trainer.model.policy == pk.ItemPatches(0, 12)

    then = ("--from", str(tmp_path / "head"), "--max_steps", "1")
    after = _train("items", folder, tmp_path / "next", *then, "--learning_rate", "0", "--head_learning_rate", "0")
    assert after.data_collator.head == "items" and torch.equal(after.model.item_head.bias, trainer.model.item_head.bias)
    both = _train("items", folder, tmp_path / "both", *then, "--head", "both", "--title_weight", "0.5")
    assert both.data_collator.head == "both" and len(_losses(both)) == 1


def test_a_model_of_item_ids_learns_and_is_evaluated(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags: tuple[str, ...] = ("--width", "16", "--heads", "1", "--rows_per_pass", "300", "--max_steps", "6")
    flags += ("--backbone", "sasrec", "--save_strategy", "steps", "--save_steps", "3", "--learning_rate", "1e-2")
    trainer = _train("items", folder, tmp_path / "run", *flags)
    assert isinstance(trainer.model, pk.ItemModel) and trainer.data_collator.head == "items"
    assert trainer.model.config.max_position_embeddings == 25, "a start, and histories of up to twice --max_items"
    assert trainer.model.policy == pk.ItemPatches(0, 12, cut_every=12), "read as passes of all targets are learned"
    assert trainer.model.config.dropout == SETTINGS["ids"].dropout
    losses = _losses(trainer)

    shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    resumed = _train("items", folder, tmp_path / "run", *flags, "--resume")
    assert _losses(resumed)[-3:] == losses[-3:]

    output = tmp_path / "users.csv"
    found = evaluate.main([str(tmp_path / "run"), "--data", folder, "--exclude_seen", "--output", str(output)])
    data = open_dataset(folder)
    samples = data.samples("test")
    lists = resumed.model.recommend(data.before(samples), k=20, exclude_seen=True)
    expected = count(lists, data.targets(samples), (10, 20), catalog=resumed.model.catalog)
    assert found["this model"][0].hr(20) == expected.hr(20)
    assert len(list(csv.DictReader(output.open()))) == samples.users.size
    later = _train("sessions", folder, tmp_path / "later", "--from", str(tmp_path / "run"), "--max_steps", "1")
    assert isinstance(later.model, pk.ItemModel) and later.data_collator.head == "items"
    for wrong, message in (
        (("--head", "titles"), "--head: expected items with --backbone"),
        (("--model", "tiny"), "--model, --from, --backbone: expected one of them"),
        (("--item_embeddings",), "--item_embeddings: expected none with --backbone"),
        (("--item_text", "title"), "--item_text: expected none with --backbone"),
        (("--title_weight", "0.5"), "--title_weight: expected none with --head items, which has no such loss"),
    ):
        with pytest.raises(SystemExit):
            _train("items", folder, tmp_path / "wrong", "--backbone", "sasrec", *wrong)
        assert message in capsys.readouterr().err
    for flag in ("--item_embeddings", "--vector_dropout=0.5", "--item_text=title"):
        with pytest.raises(SystemExit):
            _train("items", folder, tmp_path / "wrong", "--from", str(tmp_path / "run"), flag)
        name = flag.partition("=")[0]
        assert f"{name}: expected none with --from a model of item ids" in capsys.readouterr().err


def test_a_new_item_head_begins_with_what_is_popular(folder: str, tmp_path: Path) -> None:
    flags = ("--model", "tiny", "--vocab_size", "300", "--head", "items", "--max_steps", "1", "--learning_rate", "0")
    head = _train("items", folder, tmp_path, *flags).model.item_head
    data = open_dataset(folder)
    taken = pk.Catalog.index_of(head.catalog, data.targets(data.samples("train")))
    expected = np.log1p(np.bincount(taken, minlength=len(head.catalog)))
    expected -= expected.mean()
    np.testing.assert_allclose(head.bias.detach().numpy(), expected, rtol=1e-6)


def test_a_budget_chooses_the_passes(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], one_layer: None
) -> None:
    flags = ("--model", "tiny", "--vocab_size", "300", "--max_steps", "2", "--save_steps", "1")
    flags += ("--targets_per_step", "40", "--rows_per_pass", "4000", "--memory_budget")
    wide = _train("items", folder, tmp_path / "wide", *flags, "4GiB")
    assert wide.train_dataset.rows_per_pass == 4000 and not getattr(wide.args, training_choices.CHECKPOINTING)
    assert "4,000 rows per pass, all parameters, adamw_torch_fused: peak" in capsys.readouterr().out
    narrow = _train("items", folder, tmp_path / "narrow", *flags, "80MiB")
    assert 2048 <= narrow.train_dataset.rows_per_pass < 4000
    shutil.rmtree(tmp_path / "narrow" / "checkpoint-2")
    again = _train("items", folder, tmp_path / "narrow", *flags, "80MiB", "--resume")
    assert again.train_dataset.rows_per_pass == narrow.train_dataset.rows_per_pass and _losses(again) == _losses(narrow)
    # twice the rows, of which a growing share is patches
    twice = _train("pretrain", folder, tmp_path / "pretrain", *flags, "80MiB")
    assert 2048 <= twice.train_dataset.rows_per_pass < 4000
    with pytest.raises(ValueError, match=r"--memory_budget: (expected 8MiB to be enough|budget: expected)"):
        _train("items", folder, tmp_path / "none", *flags, "8MiB")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("pays", [True, False])
def test_bfloat16_is_measured_once_a_run(
    pays: bool, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured = []

    def measure(model: Any, layout: pk.PatchLayout) -> Speed:
        measured.append(layout.num_rows)
        return Speed(2.0, 1.0 if pays else 1.9)

    monkeypatch.setattr(training_choices, "measure_autocast", measure)
    monkeypatch.setattr(training_choices, "product_ratio", lambda device: 0.5)
    flags = ["--stage", "items", "--data", folder, "--output_dir", str(tmp_path), "--model", "tiny", "--vocab_size"]
    flags += ["300", "--max_items", "12", "--max_steps", "2", "--save_steps", "1", "--rows_per_pass", "600"]
    trainer = train.main(flags)
    assert trainer.args.bf16 == pays and trainer.model.dtype == torch.float32
    assert f"bfloat16 {'on' if pays else 'off'} (--bf16" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "checkpoint-2")
    monkeypatch.setattr(training_choices, "measure_autocast", lambda *_: pytest.fail("measured again"))
    assert train.main([*flags, "--resume"]).args.bf16 == pays
    assert len(measured) == 1 and 0 < measured[0] <= 400


def test_no_pass_is_tried_in_bfloat16_that_a_cpu_must_emulate(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(training_choices, "measure_autocast", lambda *_: pytest.fail("measured"))
    monkeypatch.setattr(training_choices, "product_ratio", lambda device: 12.34)
    flags = ["--stage", "items", "--data", folder, "--output_dir", str(tmp_path), "--model", "tiny", "--vocab_size"]
    assert not train.main([*flags, "300", "--max_items", "12", "--max_steps", "1", "--rows_per_pass", "600"]).args.bf16
    assert "bfloat16 products take 12.3 times as long as float32's here: bfloat16 off" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "tiny", "--early_stopping", "0"], "--early_stopping: expected at least 1, got 0"),
        (["--model", "tiny", "--ema_decay", "1"], "--ema_decay: expected above 0 and below 1, got 1.0"),
        (["--model", "tiny", "--ema_decay", "0.9", "--dry_run"], "--ema_decay: expected none with --memory_budget or"),
        (["--from", "runs/sft", "--dropout", "0.1"], "--dropout: expected only with --model tiny or small"),
        (
            ["--model", "tiny", "--item_weight", "2"],
            "--item_weight: expected none with --head titles, which has no such",
        ),
        (["--model", "tiny", "--item_tokens", "--item_text", "title"], "--item_text: expected none with --item_tokens"),
        (["--model", "somewhere", "--dropout", "0.1"], "--dropout: expected only with --model tiny or small"),
        (["--from", "runs/sft", "--no_separator"], "--no_separator: expected only with --model tiny or small"),
        ([], "--model, --from, --backbone: expected one of them"),
        (["--model", "tiny", "--from", "runs/sft"], "--model, --from, --backbone: expected one of them"),
        (["--model", "tiny", "--random_weights"], "--random_weights: expected only with a transformers --model"),
        (["--model", "x", "--targets_per_step", "9", "--targets_per_pass", "one"], "--targets_per_step: expected none"),
        (["--model", "x", "--load_in_4bit"], "--load_in_4bit: expected only with --lora"),
        (["--model", "tiny", "--width", "32"], "--width: expected only with --backbone"),
        (["--model", "tiny", "--jitter", "2", "--targets_per_pass", "one"], "--jitter: expected none with"),
        (["--model", "tiny", "--resume_from_checkpoint", "x"], "--resume_from_checkpoint: expected --resume, which"),
        (["--model", "tiny", "--head", "items", "--supervise_history"], "--supervise_history: expected none with"),
        (["--model", "tiny", "--lerning_rate", "1"], "--lerning_rate: expected --learning_rate?"),
        (["--model", "tiny", "--targets-per-pass", "one"], "--targets-per-pass: expected --targets_per_pass?"),
    ],
)
def test_flags_that_do_not_go_together(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train.main(["--stage", "sft", "--data", "synthetic", "--output_dir", "runs/none", *flags])
    assert message in capsys.readouterr().err


def test_activation_checkpointing_does_not_change_the_losses(folder: str, tmp_path: Path) -> None:
    flags = ("--model", "tiny", "--vocab_size", "300", "--max_steps", "2", "--rows_per_pass", "1000")
    named = "activation" if hasattr(PreTrainedModel, "activation_checkpointing_enable") else "gradient"
    plain = _train("items", folder, tmp_path / "plain", *flags)
    recomputed = _train("items", folder, tmp_path / "recomputed", *flags, f"--{named}_checkpointing")
    layers = recomputed.model.hf_model.model.layers
    assert all(layer.gradient_checkpointing for layer in layers)
    assert _losses(recomputed) == _losses(plain) and len(_losses(plain)) == 2


def test_other_batches_of_the_same_steps_go_on(folder: str, tmp_path: Path) -> None:
    """Two passes of a process are one of each of two; with as many samples it is the same run too."""
    flags = (
        "--model",
        "tiny",
        "--vocab_size",
        "300",
        "--max_steps",
        "2",
        "--save_steps",
        "1",
        "--rows_per_pass",
        "512",
    )
    whole = _train("items", folder, tmp_path, *flags, "--gradient_accumulation_steps", "2")
    shutil.rmtree(tmp_path / "checkpoint-2")
    with pytest.raises(ValueError, match="got other passes of a step '2' -> '1'"):
        _train("items", folder, tmp_path, *flags, "--resume")
    written = json.loads((tmp_path / "arguments.json").read_text())
    assert written["passes of a step"] == "2" and "dry_run" not in written

    one = ("--targets_per_pass", "one", *flags[:-2])
    first = _train("items", folder, tmp_path / "one", *one, "--gradient_accumulation_steps", "2")
    shutil.rmtree(tmp_path / "one" / "checkpoint-2")
    again = _train("items", folder, tmp_path / "one", *one, "--per_device_train_batch_size", "8", "--resume")
    assert _losses(again) == pytest.approx(_losses(first), rel=0.05) and len(_losses(whole)) == 2


@pytest.mark.parametrize(
    ("flags", "passes"),
    [([], 2), (["--targets_per_step", "60", "--head", "items"], 2), (["--backbone", "sasrec"], 2)],
    ids=["titles", "items", "ids"],
)
def test_a_dry_run_prints_what_each_process_holds(
    flags: list[str], passes: int, folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], one_layer: None
) -> None:
    flags = ["--rows_per_pass", "512", "--num_train_epochs", "0.2", *flags]
    if "--backbone" not in flags:
        flags += ["--model", "tiny", "--vocab_size", "300"]
    with pytest.raises(SystemExit) as left:
        _train("items", folder, tmp_path / "dry", *flags, "--dry_run", "--processes", "2")
    assert not left.value.code and not (tmp_path / "dry").exists()
    printed = capsys.readouterr().out
    assert printed.count("512 rows per pass, all parameters, adamw_torch_fused: peak ") == 2
    apart, together = (round(float(found) * 10) for found in re.findall(r"weights +([\d.]+) MiB", printed))
    assert apart == pytest.approx(2 * together, abs=2)
    accumulated = () if "--targets_per_step" in flags else ("--gradient_accumulation_steps", "2")
    trained = _train("items", folder, tmp_path / "run", *flags, *accumulated).train_dataset
    steps = f"{trained.num_targets:,} targets in {trained.steps:,} steps of "
    assert printed.count(steps) == 2, steps
    assert printed.count(f": {passes} passes a step, 1 by each process, ") == 2

    if "--backbone" not in flags:
        return  # whatever is followed, and a language model's many ways to fit take seconds each
    with pytest.raises(SystemExit):
        _train("items", folder, tmp_path / "dry", *flags, "--dry_run", "cpu", "--memory_budget", "1MiB")
    printed = capsys.readouterr().out
    assert "dry run: 1 process on CPUs, autocast None" in printed and "does not fit: --memory_budget: " in printed


def test_a_dry_run_packs_the_passes_of_the_run(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], one_layer: None
) -> None:
    flags = ("--backbone", "sasrec", "--data_seed", "5", "--rows_per_pass", "300", "--max_steps", "3")
    with pytest.raises(SystemExit):
        _train("items", folder, tmp_path, *flags, "--dry_run")
    trained = _train("items", folder, tmp_path, *flags).train_dataset.step_targets()
    assert f" ({trained.min():,} to {trained.max():,}): " in capsys.readouterr().out


def test_what_cannot_be_planned_is_no_lack_of_memory(folder: str, tmp_path: Path) -> None:
    flags = ("--backbone", "sasrec", "--dry_run")
    with pytest.raises(ValueError, match=r"^optimizer: expected one of .*, got 'adafactor'"):
        _train("items", folder, tmp_path, *flags, "--optim", "adafactor")
    with pytest.raises(ValueError, match=r"^--memory_budget: expected bytes, such as .*, got 'much'"):
        _train("items", folder, tmp_path, *flags, "--memory_budget", "much")


def test_a_rate_of_the_head_is_of_a_head(folder: str, tmp_path: Path) -> None:
    flags = ("--model", "tiny", "--vocab_size", "300", "--max_steps", "1", "--head_learning_rate", "0.1")
    with pytest.raises(ValueError, match="--head_learning_rate: expected only with an item head"):
        _train("items", folder, tmp_path, *flags)
    assert not tmp_path.joinpath("arguments.json").exists()
    _train("items", folder, tmp_path, *flags, "--item_embeddings")


def test_resume_without_a_checkpoint_starts(folder: str, tmp_path: Path) -> None:
    trainer = _train("sft", folder, tmp_path, "--model", "tiny", "--vocab_size", "300", "--max_steps", "1", "--resume")
    assert len(_losses(trainer)) == 1


@pytest.mark.parametrize(
    ("flags", "error", "message"),
    [
        (["--model", "huge"], FileNotFoundError, "--model: expected the folder of a model, a GGUF file or a hub id"),
        (["--from", "nowhere"], FileNotFoundError, "--from: expected a model saved by patchkern, or a run"),
        (["--model", "."], ValueError, "--settings: expected one of ml-1m, ml-100k, goodreads, pretrained"),
    ],
)
def test_wrong_flags_are_named_before_anything_is_written(
    flags: list[str], error: type[Exception], message: str, folder: str, tmp_path: Path
) -> None:
    if flags == ["--model", "huge"]:
        flags = [*flags, "--settings", "scratch"]
    with pytest.raises(error, match=message):
        _train("sft", folder, tmp_path / "run", *flags)
    assert not (tmp_path / "run").exists()


def test_filters_that_take_everything_are_named_before_anything_is_written(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    likes = tmp_path / "likes"  # implicit feedback, all ratings 1
    data = open_dataset(folder)
    write_parquet(replace(data, ratings=np.ones(data.num_interactions), ranges={}), likes)
    output = tmp_path / "run"
    for flags, message in (
        ((), r"no interaction is left of 'synthetic': rated above 3: 0 of .*\(--min_rating\) keeps more"),
        (
            ("--min_rating", "1", "--min_interactions", "999"),
            r"0 of 60 users kept \(min_interactions\)\. The most of a",
        ),
        (("--min_rating", "1", "--k_core", "999"), r"items with 999 interactions: 0 of .*\(--k_core\) keeps more"),
    ):
        with pytest.raises(ValueError, match=message):
            _train("sft", str(likes), output, "--model", "tiny", *flags)
    assert not output.exists()
    trainer = _train("sft", str(likes), output, "--model", "tiny", "--min_rating", "1", "--max_steps", "1")
    assert "rated 1 or better" in capsys.readouterr().out and trainer.state.global_step == 1
    with pytest.raises(ValueError, match="rated above 3: 0 of"):
        evaluate.main([str(output), "--data", str(likes)])
    short = ["--data", str(likes), "--min_rating", "1", "--split", "val", "--limit", "2"]
    assert "this model" in evaluate.main([str(output), *short])


def test_a_split_without_samples_is_named(folder: str, tmp_path: Path) -> None:
    data = open_dataset(folder)
    write_parquet(replace(data, ranges={"train": np.stack([0 * data.histories.lengths, data.histories.lengths], 1),
                                        "test": np.zeros((data.num_users, 2), int)}), tmp_path / "data")  # fmt: skip
    _train("sft", str(tmp_path / "data"), tmp_path / "run", "--model", "tiny", "--max_steps", "1")
    with pytest.raises(ValueError, match=r"samples: expected some in the test split of 'synthetic', got none"):
        evaluate.main([str(tmp_path / "run"), "--data", str(tmp_path / "data")])


def test_paper_metric_refuses_what_its_protocol_lacks(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        evaluate.main(["somewhere", "--data", "synthetic", "--metric", "paper", "--exclude_seen"])
    assert "--metric paper: expected none of --exclude_seen, --num_beams and --targets all" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prior_weight", "1"], "--prior_weight: expected a --prior that it weighs"),
        (["--prior", "transitions", "--split", "val"], "--prior_weight: expected with --split val"),
        (["--prior", "transitions", "--search", "diverse"], "--prior: expected none with --metric paper or --search"),
        (["--prior", "popularity", "--metric", "paper"], "--prior: expected none with --metric paper or --search"),
        (["--prior", "popularity", "--prior_weight", "-1"], "--prior_weight: expected at least 0, got -1.0"),
        (["--fit_limit", "0"], "--fit_limit: expected at least 1, got 0"),
        (["--max_items", "0"], "--max_items: expected at least 1, got 0"),
        (["--num_beams", "5"], "--num_beams: expected at least 20, the length of the lists, got 5"),
    ],
)
def test_flags_of_evaluation(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        evaluate.main(["somewhere", "--data", "synthetic", *flags])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "expected"), [("ml-1m", "ml-1m"), ("ml-100k-raw", "ml-100k"), ("goodreads_interactions", "goodreads")]
)
def test_settings_follow_the_name_of_the_data(name: str, expected: str) -> None:
    argv = ["--stage", "sft", "--data", "x", "--model", "somewhere", "--output_dir", "x"]
    args = training_flags.parse(training_flags.make_parser(None), argv)
    data = synthetic(20, 30, name=name, num_genres=3)
    assert train.choose_settings(args, data)[0] == expected


# ------------------------------------------------------------------ models that others made


def _llama(vocabulary: int, folder: Path) -> None:
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def test_llama_folder_is_trained_with_its_chat_template(folder: str, shared_data: Path, tmp_path: Path) -> None:
    source = tmp_path / "Llama-3.2-1B-Instruct"
    _llama(128_256, source)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(shared_data / "llama3-tokenizer" / name, source)
    trainer = _train(
        "sessions", folder, tmp_path / "run", "--model", str(source), "--settings", "ml-1m", "--max_steps", "2"
    )
    assert trainer.args.learning_rate == 8e-6
    model, tokenizer = trainer.model, trainer.processing_class
    assert model.hf_model.dtype == torch.float32
    assert model.get_input_embeddings().num_embeddings == 128_256
    assert "You recommend stories." in tokenizer.decode(model.prompt.prefix)
    markers = [model.prompt.prefix[-1], *model.prompt.separator, model.prompt.suffix[0]]
    assert all("reserved_special_token" in token for token in tokenizer.convert_ids_to_tokens(markers))
    evaluate.main([str(tmp_path / "run"), "--data", folder, "--limit", "2"])


def test_tokenizer_without_template_and_markers_gets_markers(folder: str, tmp_path: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE({token: i for i, token in enumerate(["<eos>", *alphabet])}, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    source = tmp_path / "plain"
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>").save_pretrained(source)
    _llama(257, source)
    trainer = _train(
        "items", folder, tmp_path / "run", "--model", str(source), "--settings", "scratch", "--max_steps", "2"
    )
    prompt = trainer.model.prompt
    assert prompt.prefix + prompt.separator + prompt.suffix == (257, 258, 259)
    assert prompt.response_end == (0,)
    assert trainer.model.get_input_embeddings().num_embeddings == 320
    again = _train("sessions", folder, tmp_path / "next", "--from", str(tmp_path / "run"), "--max_steps", "1")
    assert again.model.prompt == prompt
    assert again.processing_class.convert_tokens_to_ids(list(MARKERS)) == [257, 258, 259]


# ------------------------------------------------------------------ the benchmark


@pytest.mark.parametrize("mode", ["text", "items", "sessions"])
def test_benchmarked_losses_agree(mode: str) -> None:
    workload = stand_in()
    batch = workload.samples(3, seed=1)
    hf_model = make_model(16, 1, 128_256)
    losses, gradients = [], []
    for patched in (False, True):
        hf_model.zero_grad()
        if patched:
            loss = patchkern_loss(
                pk.PatchedCausalLM(hf_model, workload.catalog, workload.prompt), workload, *batch, POLICIES[mode]
            )
        else:
            loss = reference_loss(hf_model, workload, *batch, POLICIES[mode])
        loss.backward()
        losses.append(loss.item())
        gradients.append([parameter.grad.clone() for parameter in hf_model.parameters()])
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    for got, expected in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-7)
