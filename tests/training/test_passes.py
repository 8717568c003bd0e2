# SPDX-License-Identifier: Apache-2.0
"""Slots and passes: every sample and every target once an epoch, the same from run to run."""

from __future__ import annotations

import numpy as np
import pytest
from training_cases import make_data, make_model, make_passes

import patchkern as pk
from patchkern.training.collators import PassCollator
from patchkern.training.passes import SlotDataset


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


# ------------------------------------------------------------------ all targets of a user in one pass


@pytest.mark.parametrize("rows_per_pass", [200, 500, 100_000])
@pytest.mark.parametrize("pretrain", [False, True])
def test_passes_teach_every_target_once_an_epoch(rows_per_pass: int, pretrain: bool) -> None:
    histories, (users, positions) = make_data()
    dataset = make_passes(rows_per_pass, pretrain=pretrain)
    model, _ = make_model()
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


def test_passes_are_the_same_from_run_to_run_and_fill_every_step() -> None:
    one, two = make_passes(200, per_step=4), make_passes(200, per_step=4)
    assert len(one) == 4 * one.steps and one[len(one) - 1].step == one.steps - 1
    for number in range(len(one)):
        assert one[number].users.tolist() == two[number].users.tolist()
    assert len(make_passes(200, steps=7, per_step=2)) == 14
    with pytest.raises(ValueError, match=r"rows_per_pass: expected at least \d+ for the target of user"):
        make_passes(10)
