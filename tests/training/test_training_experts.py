# SPDX-License-Identifier: Apache-2.0
"""`PatchTrainer` under `Experts`: passes keep to their rows, borders are drawn per pass, and experts carry the past."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_cases import UNTUNED, losses_of, make_data

import patchkern as pk
from patchkern.training import PatchTrainer
from patchkern.training.collators import PassCollator
from patchkern.training.passes import Pass

N_CLASSES, N_NOISE, N_USERS = 4, 6, 48
COUNT = 2
ARGUMENTS: dict[str, Any] = {"logging_steps": 1, "save_strategy": "no", "use_cpu": True, "disable_tqdm": True}


def make_model(n_items: int, policy: pk.Experts, item_ids: Any = None, **options: Any) -> pk.ItemModel:
    catalog = pk.Catalog.from_token_ids(range(n_items), range(n_items + 1), item_ids)
    prompt = pk.Prompt(prefix=(n_items,), experts=range(n_items + 1, n_items + 1 + policy.count))
    return pk.ItemModel(catalog, policy, width=16, max_positions=48, prompt=prompt, **options)


def repeated(seed: int) -> tuple[pk.Histories, tuple[np.ndarray, np.ndarray]]:
    """Users who begin with an item of their own and end with it, after others that say nothing."""
    rng = np.random.default_rng(seed)
    own = np.arange(N_USERS) % N_CLASSES
    between = rng.integers(N_CLASSES, N_CLASSES + N_NOISE, (N_USERS, 10))
    items = np.concatenate([np.tile(own[:, None], 3), between, own[:, None]], axis=1)
    return pk.Histories.coerce(items), (np.arange(N_USERS), np.full(N_USERS, items.shape[1] - 1))


@pytest.mark.parametrize("kind", ["one", "blocks", "none"])
def test_the_past_is_learned_through_experts_alone(kind: str, tmp_path: Path) -> None:
    histories, samples = repeated(0)
    policy = pk.Experts(
        pk.ItemPatches(0, None),
        count=0 if kind == "none" else COUNT,
        block=5,
        parts="blocks" if kind == "blocks" else "one",
        keep=None if kind == "blocks" else 2,
        boundaries=None,
    )
    model = make_model(N_CLASSES + N_NOISE, policy, dropout=0.0)
    settings = UNTUNED.arguments("items", tmp_path, max_steps=60, learning_rate=2e-2, max_grad_norm=1.0, **ARGUMENTS)
    PatchTrainer(model, settings, histories, samples, rows_per_pass=4096).train()
    histories, samples = repeated(1)
    layout = pk.build_layout(
        model.catalog, histories.before(*samples), policy, model.prompt, histories.at(*samples), head="items"
    )
    with torch.no_grad():
        loss = model.eval()(layout).loss.item()
    assert loss > 0.9 * np.log(N_CLASSES) if kind == "none" else loss < 0.5


def test_passes_keep_to_their_rows_and_draw_anew(tmp_path: Path) -> None:
    histories, samples = make_data()
    policy = pk.Experts(pk.ItemPatches(0, None), count=COUNT, keep=2, block=3, boundaries=1)
    model = make_model(30, policy, list(range(10, 40)))
    settings = UNTUNED.arguments("items", tmp_path, max_steps=6, **ARGUMENTS)
    trainer = PatchTrainer(model, settings, histories, samples, rows_per_pass=90)
    layouts = [trainer.data_collator([trainer.train_dataset[number]])["layout"] for number in range(6)]
    assert all(layout.num_rows <= 90 for layout in layouts)
    before = model.hf_model.items.weight.detach().clone()
    trainer.train()
    assert len(losses_of(trainer)) == 6 and np.isfinite(losses_of(trainer)).all()
    moved = (model.hf_model.items.weight != before).any(dim=1)
    assert moved[list(model.prompt.experts)].all()
    collator = PassCollator(model.catalog, histories, policy, model.prompt, head="items")
    users, ranges = np.array([9, 10, 11]), np.array([[3, 14], [3, 15], [3, 16]])
    drawn = [collator([Pass(number, 0, users, ranges)])["layout"] for number in (0, 0, 1, 2, 3, 4)]
    places = [tuple(torch.nonzero(layout.lo == -1 - model.prompt.experts[0]).flatten().tolist()) for layout in drawn]
    assert places[0] == places[1] and len(set(places)) > 2
    assert all(len(place) == 3 for place in places), "one border for each user"
    assert all(layout.num_rows <= collator.rows(users, ranges).sum() for layout in drawn)


def test_items_are_not_learned_that_could_not_be_read(tmp_path: Path) -> None:
    """With ``keep=0`` a history of whole blocks ends with experts, of which a search keeps no state."""
    histories, samples = make_data()
    settings = UNTUNED.arguments("items", tmp_path, **ARGUMENTS)
    for count in (COUNT, 0):
        policy = pk.Experts(pk.ItemPatches(0, None), count=count, keep=0, block=4)
        model = make_model(40, policy)
        if count == 0:  # nothing is old, and nothing compressed
            assert PatchTrainer(model, settings, histories, samples, rows_per_pass=500).model.policy == policy
            continue
        with pytest.raises(ValueError, match=r"\(keep\) for an item head, got 0: .* only keys and values are kept"):
            PatchTrainer(model, settings, histories, samples, rows_per_pass=500)
        for head in ("titles", "both"):
            policy.check_head(head)
