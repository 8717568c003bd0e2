# SPDX-License-Identifier: Apache-2.0
"""`PatchTrainer` on a recurrent memory: it learns, resumes to the same losses, is validated as it recommends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_cases import EARLY, TITLES, UNTUNED, evaluations_of, held_out_samples, losses_of, make_data
from training_cases import make_model as make_lm

import patchkern as pk
from patchkern.evaluation.metrics import evaluate
from patchkern.training import PatchTrainer
from patchkern.training.collators import MemoryCollator

INNER = pk.ItemPatches(keep_text=0, max_items=None)


def make_memory(kind: str, inner: Any = INNER, item_embeddings: bool = False, **options: Any) -> pk.RecurrentMemory:
    policy = pk.PreferenceMemory(inner, slots=2, block=4)
    if kind == "lm":
        model, _ = make_lm(item_head=True, vector_dropout=0.0 if item_embeddings else None, vocab_size=290)
        model.policy = policy
        model.prompt = model.prompt.with_special(experts=[model.config.vocab_size - 1, model.config.vocab_size - 2])
    else:
        n_items = len(TITLES)
        prompt = pk.Prompt(prefix=[n_items]).with_special(experts=[n_items + 1, n_items + 2])
        catalog = pk.Catalog.from_token_ids(range(n_items), range(n_items + 1), list(TITLES))
        model = pk.ItemModel(catalog, policy, block=kind, width=16, max_positions=32, prompt=prompt)
    return pk.RecurrentMemory(model, **options)


def make_trainer(folder: Path, kind: str = "sasrec", memory: Any = None, **options: Any) -> PatchTrainer:
    histories, samples = make_data()
    taken = ("jitter", "head", "targets_per_step", "policy", "pretrain")
    of_trainer = {name: options.pop(name) for name in taken if name in options}
    of_trainer["rows_per_pass"] = options.pop("rows_per_pass", 150)
    if options.pop("validate", None) is not None:
        of_trainer["eval_samples"] = held_out_samples()
    memory = make_memory(kind) if memory is None else memory
    arguments = {"logging_steps": 1, "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "seed": 3}
    arguments |= {"learning_rate": 1e-2, "max_grad_norm": 1.0, **options}
    return PatchTrainer(memory, UNTUNED.arguments("items", folder, **arguments), histories, samples, **of_trainer)


@pytest.mark.parametrize(("kind", "head"), [("sasrec", "items"), ("hstu", "items"), ("lm", "titles"), ("lm", "both")])
def test_it_learns(kind: str, head: str, tmp_path: Path) -> None:
    rows = 150 if kind != "lm" else 1200
    trainer = make_trainer(tmp_path, kind, head=head, max_steps=30, rows_per_pass=rows, learning_rate=2e-2)
    before = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    losses = losses_of(trainer)
    assert len(losses) == 30 and np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])
    still = [name for name, parameter in trainer.model.named_parameters() if torch.equal(parameter, before[name])]
    assert still == ([] if head != "titles" else [name for name in before if "item_head" in name])


def test_passes_hold_as_many_rows_as_they_count() -> None:
    histories, _ = make_data()
    for memory, head in ((make_memory("sasrec", reference_loss=1.0), "items"), (make_memory("lm"), "both")):
        collator = MemoryCollator(memory.planner, histories, bool(memory.reference_loss), head=head)
        ranges = np.array([[3, 5], [4, 4], [9, 16], [0, 1]])
        chosen = np.array([1, 3, 11, 2])
        together = memory.planner.training(
            histories.take(chosen), ranges, head=head, reference=bool(memory.reference_loss)
        )
        assert collator.rows(chosen, ranges).sum() == together.num_rows
        alone = [
            memory.planner.training(histories.take([user]), [own], head=head, reference=bool(memory.reference_loss))
            for user, own in zip(chosen, ranges.tolist(), strict=True)
        ]
        assert collator.rows(chosen, ranges).tolist() == [batch.num_rows for batch in alone]


def test_accumulation_weighs_passes_by_their_targets(tmp_path: Path) -> None:
    """A step in several passes has the next items' loss of one pass, whatever its cuts."""
    memory = make_memory("sasrec", consistency=0.0)
    for module in memory.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    losses = []
    for rows in (4000, 400):
        trainer = make_trainer(tmp_path, memory=memory, rows_per_pass=rows, targets_per_step=138, max_steps=1,
                               learning_rate=0.0)  # fmt: skip
        trainer.train()
        losses.append((trainer.args.gradient_accumulation_steps, losses_of(trainer)[0]))
    assert losses[0][0] == 1 and losses[1][0] > 1
    assert losses[0][1] == pytest.approx(losses[1][1], rel=1e-5)


@pytest.mark.parametrize("own", [False, True], ids=["plain", "item embeddings"])
def test_resuming_continues_the_run(own: bool, tmp_path: Path) -> None:
    options: dict[str, Any] = {"kind": "lm", "head": "items", "rows_per_pass": 1200, "jitter": 2.0, "max_steps": 4}
    options |= {"save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(tmp_path, memory=make_memory("lm", rollout=0.5, item_embeddings=own), **options)
    whole.train()
    resumed = make_trainer(tmp_path, memory=make_memory("lm", rollout=0.5, item_embeddings=own), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses_of(resumed)[-2:] == losses_of(whole)[-2:]
    for (name, ours), theirs in zip(resumed.model.named_parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    saved = pk.RecurrentMemory.from_pretrained(tmp_path / "checkpoint-4")
    assert saved.options == whole.model.options
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), whole.model.parameters(), strict=True))


def test_the_best_model_is_found_by_what_it_recommends(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=6, **EARLY)
    trainer.train()
    found = evaluations_of(trainer)
    assert [entry["step"] for entry in found] == [2, 4, 6]
    histories, (users, positions) = trainer.eval_dataset.histories, held_out_samples()
    before = histories.before(users, positions)
    lists = trainer.model.recommend(before, k=20, exclude_seen=True)
    counted = evaluate(lists, histories.at(users, positions), (20,), catalog=trainer.model.catalog)
    assert counted.hr(20) == pytest.approx(trainer.state.best_metric)
    index = trainer.model.catalog.index_of(histories.at(users, positions), "targets")
    scores = trainer.model.score_items(before)
    best = next(entry for entry in found if entry["eval_HR@20"] == trainer.state.best_metric)
    assert best["eval_loss"] == pytest.approx(-scores[np.arange(users.size), index].mean(), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows_per_pass": None}, "rows_per_pass: expected a number with a PreferenceMemory, got None"),
        ({"pretrain": True}, "pretrain: expected False with a RecurrentMemory"),
        ({"policy": INNER}, "policy: expected a PreferenceMemory with a RecurrentMemory, .* got ItemPatches with Rec"),
    ],
)
def test_what_a_memory_cannot_learn_from(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **options)


def test_a_model_alone_has_no_memory(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"policy: expected a PreferenceMemory with a RecurrentMemory, .* ItemModel"):
        make_trainer(tmp_path, memory=make_memory("sasrec").model)
