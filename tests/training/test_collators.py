# SPDX-License-Identifier: Apache-2.0
"""Batches of samples, of passes, and of text beside patches, against layouts built sample by sample."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_cases import make_data, make_model, make_passes, make_trainer

import patchkern as pk
from patchkern.training.collators import LayoutCollator, PassCollator, RawAndPatched
from patchkern.training.passes import Pass, SlotDataset


def _collator(pretrain_steps: int | None, policy: pk.Policy) -> LayoutCollator:
    histories, _ = make_data()
    model, _ = make_model()
    return LayoutCollator(model.catalog, histories, policy, model.prompt, pretrain_steps, seed=5)


def _slots(step: int, numbers: range) -> list[Any]:
    _, (users, positions) = make_data()
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
    model, _ = make_model()
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


@pytest.mark.parametrize("policy", [pk.ItemDropout(0.5, keep_text=1, max_items=10), pk.RandomItemPatches(0.5, 10)])
def test_what_a_policy_draws_is_drawn_anew_in_every_batch(policy: Any) -> None:
    """The same user and targets at the same place: only the number of the batch tells one from the other."""
    of_samples = _collator(None, policy)
    fields = (of_samples.catalog, of_samples.histories, policy, of_samples.prompt)
    of_passes = PassCollator(*fields, seed=5)
    (slot,) = _slots(0, range(1))
    one = Pass(0, 0, np.array([11]), np.array([[8, 9]]))

    def rows(number: int) -> tuple[list[int], list[int]]:
        batches = (
            of_samples([slot._replace(user=11, position=8, number=number)]),
            of_passes([one._replace(number=number)]),
        )
        return batches[0]["layout"].lo.tolist(), batches[1]["layout"].lo.tolist()

    numbered = [rows(number) for number in range(8)]
    for batches in zip(*numbered, strict=True):
        assert len(set(map(tuple, batches))) > 4
    assert rows(3) == numbered[3], "whenever it is made"


def test_jitter_is_drawn_anew_in_every_pass_and_shows_nothing_later(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, rows_per_pass=500, max_steps=2, jitter=4.0)
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


def test_a_pass_has_the_loss_of_its_samples(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, rows_per_pass=300, max_steps=1)
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


def test_history_text_is_supervised_within_each_span() -> None:
    histories, _ = make_data()
    model, _ = make_model()
    collator = PassCollator(model.catalog, histories, pk.TextOnly(None), model.prompt, supervise_history=True)
    layout = collator([make_passes(10_000, steps=1)[0]])["layout"]
    firsts = set(layout.cu_seqlens[:-1].tolist())
    assert set((layout.logit_rows + 1).tolist()) == set(range(layout.num_rows)) - firsts
    assert torch.equal(layout.labels[layout.logit_rows + 1], layout.logit_labels)
    assert torch.isfinite(model(layout).loss)
