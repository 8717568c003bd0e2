# SPDX-License-Identifier: Apache-2.0
"""Slots and passes: every sample and every target once an epoch, the same from run to run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from training_cases import make_data, make_model, make_passes

import patchkern as pk
from patchkern.data import open_dataset
from patchkern.models.scratch import fit_tokenizer, scratch_prompt
from patchkern.training.collators import PassCollator
from patchkern.training.passes import PassDataset, SlotDataset


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


def test_a_refusal_says_how_many_rows_are_enough_for_all() -> None:
    with pytest.raises(ValueError, match=r"rows_per_pass: expected at least \d+ for the target of user") as refused:
        make_passes(10)
    enough = int(str(refused.value).split("at least ")[1].split()[0])
    assert make_passes(enough).num_targets == make_passes(200).num_targets
    with pytest.raises(ValueError, match=f"expected at least {enough} for"):
        make_passes(enough - 1)


@pytest.mark.parametrize("per_step", [1, 3])
@pytest.mark.parametrize("wanted", [7, 40])
def test_steps_have_the_targets_that_are_wanted(wanted: int, per_step: int) -> None:
    """However many passes of 200 rows that takes, and each target once an epoch."""
    _, (users, positions) = make_data()
    dataset = make_passes(200, per_step=per_step, targets_per_step=wanted)
    assert dataset.passes_per_step % per_step == 0
    passes = [dataset[number] for number in range(len(dataset))]
    assert [one.step for one in passes] == [number // dataset.passes_per_step for number in range(len(passes))]
    by_step = [0] * dataset.steps
    taught = []
    for one in passes:
        assert one.users.size, "no process is without targets"
        by_step[one.step] += int((one.ranges[:, 1] - one.ranges[:, 0] + 1).sum())
        taught += [(u, p) for u, (a, b) in zip(one.users, one.ranges, strict=True) for p in range(a, b + 1)]
    assert by_step == dataset.step_targets().tolist() and max(by_step) == wanted
    assert min(by_step) >= 0.9 * wanted and sum(by_step) == dataset.num_targets == len(taught)
    once = sorted(zip(users.tolist(), positions.tolist(), strict=True))
    assert sorted(taught[: len(once)]) == once
    assert sorted(taught[len(once) : 2 * len(once)]) == once
    with pytest.raises(ValueError, match=r"targets_per_step: expected at least \d+, the passes of a step, got 1"):
        make_passes(200, per_step=2, targets_per_step=1)


@pytest.mark.parametrize("rows_per_pass", [1536, 4096, 16384])
@pytest.mark.parametrize("policy", [pk.TextOnly(100), pk.ItemPatches(1, 100)])
def test_passes_over_real_users_are_full(shared_data: Path, policy: pk.Policy, rows_per_pass: int) -> None:
    data = open_dataset(shared_data / "ml-100k")
    tokenizer = fit_tokenizer(data.titles.values(), 4096)
    catalog = pk.Catalog.from_titles(data.titles, tokenizer)
    collator = PassCollator(catalog, data.histories, policy, scratch_prompt(tokenizer))
    dataset = PassDataset(*data.samples("train"), collator.rows, rows_per_pass, 1.0, None, 1, seed=0)
    rows = [int(collator.rows(*dataset[number][2:]).sum()) for number in range(len(dataset))]
    assert max(rows) <= rows_per_pass and sum(rows) >= 0.95 * rows_per_pass * len(rows)
    assert dataset.fullness() == pytest.approx(sum(rows) / rows_per_pass / len(rows))
    # a second epoch is another order, and a longer run begins as a shorter one
    longer = PassDataset(*data.samples("train"), collator.rows, rows_per_pass, 2.0, None, 1, seed=0)
    assert [longer[number].users.tolist() for number in range(len(rows))] == [
        dataset[number].users.tolist() for number in range(len(rows))
    ]


@pytest.mark.parametrize("probability", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("head", ["titles", "items"])
@pytest.mark.parametrize("policy", [pk.ItemDropout, pk.RandomItemPatches])
def test_passes_of_what_is_drawn_anew(policy: Any, head: str, probability: float) -> None:
    """Rows that passes are packed by are the user's own, whoever is asked about with them, and hardly ever exceeded."""
    histories, (users, positions) = make_data()
    model, _ = make_model()
    collator = PassCollator(model.catalog, histories, policy(probability, max_items=40), model.prompt, head=head)
    whole = np.array([(positions[users == user].min(), positions[users == user].max()) for user in np.unique(users)])
    together = collator.rows(np.unique(users), whole)
    alone = [collator.rows(np.array([user]), whole[[at]])[0] for at, user in enumerate(np.unique(users))]
    assert together.tolist() == alone
    grown = [collator.rows(users[:1], np.array([[whole[0, 0], last]]))[0] for last in range(*(whole[0] + 1))]
    assert grown == sorted(grown)
    dataset = PassDataset(users, positions, collator.rows, int(together.max()), 3.0, None, 1, seed=0)
    taken = [collator([dataset[number]])["layout"].num_rows for number in range(len(dataset))]
    packed = [collator.rows(*dataset[number][2:]).sum() for number in range(len(dataset))]
    assert np.mean(np.array(taken) <= packed) >= 0.9 and max(np.array(taken) / packed) < 1.1
    if probability in (0.0, 1.0):
        assert taken == packed
    assert sum(taken) >= 0.6 * sum(packed)
