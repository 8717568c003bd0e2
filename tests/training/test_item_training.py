# SPDX-License-Identifier: Apache-2.0
"""Training the item head: it learns, and no cut of a step into batches or runs changes what it learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from training_cases import held_out_samples, losses_of, make_data, make_model, make_trainer

import patchkern as pk
from patchkern.batch.sample_layout import build_layout
from patchkern.evaluation.metrics import evaluate
from patchkern.models import wrapped
from patchkern.models.item_head import CatalogHead
from patchkern.training import PatchTrainer
from patchkern.training.collators import PassCollator
from patchkern.training.passes import Pass
from patchkern.training.validation import Validation


def item_loss(model: pk.PatchedCausalLM, layout: pk.PatchLayout) -> float:
    """Summed over the targets of a layout, in float64."""
    with torch.no_grad(), wrapped.hidden_states(model.hf_model) as states:
        model(layout)
        scores = model.item_scores(states[0][layout.item_rows]).double()
    return float(F.cross_entropy(scores, layout.item_labels, reduction="sum"))


# ------------------------------------------------------------------ learning


@pytest.mark.parametrize("rows_per_pass", [None, 1500], ids=["samples", "passes"])
@pytest.mark.parametrize(("stage", "head"), [("sft", "items"), ("items", "both"), ("sessions", "items")])
def test_it_learns(stage: str, head: str, rows_per_pass: int | None, tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path,
        stage,
        head=head,
        rows_per_pass=rows_per_pass,
        per_device_train_batch_size=64,
        max_steps=30,
        learning_rate=2e-2,
        max_grad_norm=1.0,
    )
    trainer.train()
    losses = losses_of(trainer)
    assert len(losses) == 30 and np.mean(losses[-3:]) < 0.9 * np.mean(losses[:3])
    assert all(parameter.abs().sum() > 0 for parameter in trainer.model.item_head.parameters())


@pytest.mark.parametrize(("head", "usual"), [("titles", "beam"), ("items", "items"), ("both", "beam")])
def test_a_model_recommends_by_what_it_learned_last(head: str, usual: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, head=head, config={"item_head": True}, max_steps=1)
    model = trainer.model
    histories = [model.catalog.item_ids[:3], model.catalog.item_ids[3:5]]
    assert model.learned == ()
    assert model.recommend(histories, k=3) == model.recommend(histories, k=3, search="beam")
    model.learned = ("items",) if head == "titles" else ("titles",)  # an earlier training
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    for read in (model, pk.PatchedCausalLM.from_pretrained(tmp_path / "saved")):
        assert read.learned == (("titles", "items") if head == "both" else (head,))
        assert read.recommend(histories, k=3) == read.recommend(histories, k=3, search=usual)
        scores = read.score_items(histories, head="items" if usual == "items" else "titles")
        np.testing.assert_array_equal(read.score_items(histories), scores)
    assert read.recommend(histories, k=3) != read.recommend(histories, k=3, search={"beam": "items"}.get(usual, "beam"))


def test_what_has_no_weight_is_not_learned(tmp_path: Path) -> None:
    for name, learned in (("title_weight", ("items",)), ("item_weight", ("titles",))):
        trainer = make_trainer(tmp_path / name, head="both", weights={name: 0.0}, max_steps=1)
        trainer.train()
        assert trainer.model.learned == learned


@pytest.mark.parametrize("head", ["items", "both"])
def test_accumulation_does_not_change_the_run(head: str, tmp_path: Path) -> None:
    """With both heads tokens and items are counted apart: a sample has one item and several tokens."""
    runs = []
    for batch_size, accumulation in ((8, 1), (2, 4)):
        trainer = make_trainer(
            tmp_path,
            head=head,
            weights={"title_weight": 0.5, "item_weight": 2.0},
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            max_steps=3,
        )
        trainer.train()
        runs.append((losses_of(trainer), [p.detach().clone() for p in trainer.model.parameters()]))
    assert runs[1][0] == pytest.approx(runs[0][0], rel=1e-5)
    for parameter, expected in zip(runs[1][1], runs[0][1], strict=True):
        torch.testing.assert_close(parameter, expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("head", ["items", "both"])
def test_passes_of_a_step_are_one_batch(head: str, tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path,
        head=head,
        weights={"title_weight": 0.5, "item_weight": 2.0},
        rows_per_pass=300,
        gradient_accumulation_steps=4,
        max_steps=1,
    )
    batches = [trainer.data_collator([trainer.train_dataset[n]]) for n in range(4)]
    assert len({batch["item_labels"].numel() for batch in batches}) > 1
    items = sum(item_loss(trainer.model, batch["layout"]) for batch in batches)
    expected = 2.0 * items / sum(batch["item_labels"].numel() for batch in batches)
    if head == "both":
        logits = [trainer.model(batch["layout"]).logits.double() for batch in batches]
        tokens = torch.cat([batch["labels"] for batch in batches])
        expected += 0.5 * float(F.cross_entropy(torch.cat(logits), tokens))
    trainer.train()
    assert losses_of(trainer) == [pytest.approx(expected, rel=1e-5)]


@pytest.mark.parametrize("rows_per_pass", [None, 400], ids=["samples", "passes"])
def test_resuming_continues_the_run(rows_per_pass: int | None, tmp_path: Path) -> None:
    options: dict[str, Any] = {"head": "both", "rows_per_pass": rows_per_pass, "max_steps": 4}
    options["config"] = {"vector_dropout": 0.4}  # drawn as dropout is
    options |= {"save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(tmp_path, **options)
    whole.train()
    resumed = make_trainer(tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses_of(resumed)[-2:] == losses_of(whole)[-2:]
    for (name, ours), theirs in zip(resumed.model.named_parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    assert resumed.model.item_head.bias.any() and resumed.model.item_embedding.any()


def test_smoothing_is_of_training_alone(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, head="items", label_smoothing_factor=0.2, max_steps=1)
    batch = trainer.data_collator([trainer.train_dataset[n] for n in range(8)])
    expected = trainer.model(batch["layout"], smoothing=0.2).loss.item()
    trainer.train()
    assert losses_of(trainer) == [pytest.approx(expected, rel=1e-6)]


def test_titles_alone_leave_the_head_alone(tmp_path: Path) -> None:
    histories, samples = make_data()
    model, _ = make_model(item_head=True)
    before = {name: value.clone() for name, value in model.item_head.state_dict().items()}
    args = make_trainer(tmp_path, max_steps=2).args
    trainer = PatchTrainer(model, args, histories, samples, pk.ItemPatches(2, 10))
    trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in model.item_head.state_dict().items())


# ------------------------------------------------------------------ batches


@pytest.mark.parametrize("rows_per_pass", [None, 400], ids=["samples", "passes"])
def test_batches_have_the_labels_that_are_counted(rows_per_pass: int | None, tmp_path: Path) -> None:
    for head in ("titles", "items", "both"):
        trainer = make_trainer(tmp_path, head=head, rows_per_pass=rows_per_pass, max_steps=2)
        numbers = range(1) if rows_per_pass else range(8)
        batch = trainer.data_collator([trainer.train_dataset[n] for n in numbers])
        layout = batch["layout"]
        assert batch["labels"] is (layout.item_labels if head == "items" else layout.logit_labels)
        assert batch["item_labels"] is layout.item_labels
        assert (layout.item_labels is None) == (head == "titles")
        counted = trainer._get_num_items_in_batch([batch, batch], torch.device("cpu"))
        expected = [2 * batch["labels"].numel()]
        if head == "both":
            expected.append(2 * layout.item_labels.numel())
        assert torch.as_tensor(counted).reshape(-1).tolist() == expected


@pytest.mark.parametrize("head", ["titles", "items", "both"])
def test_passes_take_the_rows_that_were_counted(head: str) -> None:
    histories, (users, _) = make_data()
    model, _ = make_model(item_head=True)
    collator = PassCollator(model.catalog, histories, pk.ItemPatches(0, 4), model.prompt, head=head)
    everyone = np.unique(users)
    ranges = np.stack([np.full(everyone.size, 3), histories.lengths - 1], axis=1)
    one = type("Pass", (), {"users": everyone, "ranges": ranges, "number": 0, "step": 0})
    layout = collator([one])["layout"]
    assert layout.num_rows == collator.rows(everyone, ranges).sum()
    assert len(layout.item_labels if head != "titles" else []) == (
        (histories.lengths - 3).sum() if head != "titles" else 0
    )


@pytest.mark.parametrize("cut_every", [2, 4])
def test_histories_that_are_cut_are_learned_as_they_are_read(cut_every: int) -> None:
    histories, _ = make_data()
    model, _ = make_model(item_head=True)
    model.double().eval()
    policy = pk.ItemPatches(0, 4, cut_every=cut_every)
    collator = PassCollator(model.catalog, histories, policy, model.prompt, head="items")
    one = Pass(0, 0, np.array([11, 5]), np.array([[3, 16], [2, 10]]))
    users, positions = np.repeat(one.users, [14, 9]), np.concatenate([np.arange(3, 17), np.arange(2, 11)])
    read = build_layout(
        model.catalog, histories.before(users, positions, 4, cut_every), policy, model.prompt, head="items"
    )
    assert read.cu_seqlens.diff().unique().numel() > cut_every, "histories of several lengths"
    learned = collator([one])["layout"]
    torch.testing.assert_close(model.item_states(learned), model.item_states(read), rtol=1e-6, atol=1e-6)
    exactly = build_layout(model.catalog, histories.before(users, positions, 4), policy, model.prompt, head="items")
    assert (model.item_states(exactly) - model.item_states(read)).abs().max() > 1e-3


# ------------------------------------------------------------------ validation


def test_validation_is_of_items(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, head="items", validate={}, max_steps=1, per_device_eval_batch_size=5)
    histories, _ = make_data()
    users, positions = held_out_samples()
    model = trainer.model
    got = trainer.evaluate()
    before, targets = histories.before(users, positions), histories.at(users, positions)
    lists = model.recommend(before, k=20, search="items", exclude_seen=True)
    found = evaluate(lists, targets, [10, 20], catalog=model.catalog)
    assert got["eval_HR@20"] == found.hr(20) and got["eval_NDCG@10"] == found.ndcg(10)
    kept = histories.before(users, positions, model.policy.max_items)
    layout = build_layout(model.catalog, kept, model.policy, model.prompt, targets, head="items")
    model.eval()
    assert got["eval_loss"] == pytest.approx(item_loss(model, layout) / users.size, rel=1e-5)


def test_what_is_validated_can_be_chosen(tmp_path: Path) -> None:
    both = make_trainer(tmp_path, head="both", validate={}, max_steps=1)
    assert isinstance(both.eval_dataset, Validation) and both.eval_dataset.head == "titles"
    chosen = make_trainer(tmp_path, head="both", validate={"eval_options": {"search": "items"}}, max_steps=1)
    assert chosen.eval_dataset.head == "items"
    beams = make_trainer(tmp_path, head="items", validate={"eval_options": {"search": "beam"}}, max_steps=1)
    assert beams.eval_dataset.head == "titles"
    assert chosen.evaluate().keys() >= {"eval_loss", "eval_HR@20"}


# ------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("item_head", "options", "message"),
    [
        (True, {"head": "item"}, "head: expected one of titles, items, both, got 'item'"),
        (False, {"head": "items"}, "head: expected \"titles\" for a model without an item head, got 'items'"),
        (True, {"head": "items", "supervise_history": True}, 'supervise_history: expected False with head="items"'),
        (True, {"head": "both", "item_weight": -1.0}, "item_weight: expected a finite number of at least 0, got -1.0"),
        (True, {"head": "both", "title_weight": float("nan")}, "title_weight: expected a finite number of at least 0"),
    ],
)
def test_wrong_arguments(item_head: bool, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    histories, samples = make_data()
    model, _ = make_model(item_head=item_head)
    args = make_trainer(tmp_path, max_steps=1).args
    with pytest.raises(ValueError, match=message):
        PatchTrainer(model, args, histories, samples, pk.ItemPatches(2, 10), **options)


def test_labels_are_not_smoothed_where_items_are_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CatalogHead, "sampled_above", 5)
    with pytest.raises(ValueError, match=r"label_smoothing_factor: expected 0 with more than 5 items, .*, got 0\.1"):
        make_trainer(tmp_path, head="items", max_steps=1, label_smoothing_factor=0.1)
    make_trainer(tmp_path, head="titles", max_steps=1, label_smoothing_factor=0.1)
