# SPDX-License-Identifier: Apache-2.0
"""Models of item ids whose last layer computes the wanted rows alone: what it computes for all, in every use."""

from __future__ import annotations

import itertools
from typing import Any

import expert_model_cases as experts
import memory_model_cases as memories
import numpy as np
import pytest
import torch
from item_model_cases import HISTORIES, POLICIES, make_model, scores_of
from torch import Tensor, nn
from wanted_rows_cases import Chooses

import patchkern as pk

BLOCKS = ("sasrec", "hstu")


@pytest.fixture
def choose(monkeypatch: pytest.MonkeyPatch) -> Chooses:
    return Chooses(monkeypatch)


def training_layout(model: pk.ItemModel, policy: str) -> pk.PatchLayout:
    ranges = np.array([(0, len(items) - 1) for items in HISTORIES])
    return pk.build_training_layout(model.catalog, HISTORIES, POLICIES[policy], model.prompt, ranges, head="items")


def output_rows(model: pk.ItemModel) -> list[int]:
    """How many rows the last layer's output is made of, in every pass from now on."""
    last: Any = model.hf_model.layers[-1]
    counts: list[int] = []
    output = last.output if model.config.block == "hstu" else last.attention_output
    output.register_forward_pre_hook(lambda module, given: counts.append(given[0].shape[1]))
    return counts


def close(few: Any, every: Any) -> None:
    torch.testing.assert_close(few, every, rtol=0, atol=1e-12)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("policy", ["items", "sessions"])
@pytest.mark.parametrize("block", BLOCKS)
def test_states_and_gradients(block: str, policy: str, layers: int, choose: Chooses) -> None:
    model = make_model(block=block, layers=layers)
    layout = training_layout(model, policy)
    every = layout.num_rows
    counts = output_rows(model)
    for rows in (torch.tensor([every - 1, 0, 3, 3]), torch.randperm(every), layout.item_rows, torch.arange(0)):
        weights = torch.randn(rows.shape[0], 8, dtype=torch.float64)

        def gradients(rows: Tensor = rows, weights: Tensor = weights) -> list[Tensor]:
            states = model.row_states(layout, None, rows)
            parameters = list(model.hf_model.parameters())
            return [states, *torch.autograd.grad((states * weights).sum(), parameters, materialize_grads=True)]

        few, all_ = choose.both(gradients)
        close(few, all_)
        close(few[0], model.row_states(layout)[rows])
        assert counts[-3:] == [rows.shape[0], every, every]


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("kind", experts.POLICIES)
def test_behind_experts(block: str, kind: str, choose: Chooses) -> None:
    policy = experts.POLICIES[kind]
    model = experts.model_for(policy, block)
    layout = pk.build_layout(model.catalog, experts.PLACES, policy, model.prompt, head="items")
    expected = [
        experts.state_of(model, experts.rows_of(model, items, policy))[-1].detach() for items in experts.HISTORIES
    ]
    choose(True)
    close(model.item_states(layout).detach(), torch.stack(expected))
    counts = output_rows(model)
    states = pk.UserStates(model)
    states.update(range(len(experts.PLACES)), experts.PLACES)
    assert set(counts) == {0}, "to compress, keys and values are all that is needed"
    for options in ({}, {"user_states": states}):
        few, every = choose.both(lambda options=options: scores(model, experts.PLACES, policy, **options))
        np.testing.assert_allclose(few, every, rtol=0, atol=1e-12)


def scores(model: Any, histories: Any, policy: Any = None, **options: Any) -> np.ndarray:
    """Of all items, in catalogue order, by way of lists."""
    lists = model.recommend(dict(enumerate(histories)), policy, k=len(model.catalog), **options)
    return np.array([[score for _, score in sorted(items)] for items in lists])


@pytest.mark.parametrize("block", BLOCKS)
def test_lists_in_one_pass_in_many_and_from_a_cache(block: str, choose: Chooses) -> None:
    model = make_model(block=block)
    expected = np.array(
        [
            [row[place] for place in np.argsort(model.catalog.item_ids)]
            for row in scores_of(model, HISTORIES, POLICIES["items"])
        ]
    )
    budgets = (None, "1600kB")
    caches = [pk.UserCache(model, 1 << 20) for _ in range(2)]
    cached = itertools.cycle(caches)
    for shorter, budget in itertools.product((2, 1, 0), budgets):
        histories = [items[: len(items) - shorter] for items in HISTORIES]

        def lists(histories: Any = histories, budget: Any = budget) -> np.ndarray:
            return scores(model, histories, memory_budget=budget, user_cache=next(cached))

        few, every = choose.both(lists)
        np.testing.assert_allclose(few, every, rtol=0, atol=1e-12)
    np.testing.assert_allclose(few, expected, rtol=0, atol=1e-10)
    few, every = choose.both(lambda: model.score_items(HISTORIES, batch_size=2))
    np.testing.assert_allclose(few, every, rtol=0, atol=1e-12)


@pytest.mark.parametrize("mode", ["overwrite", "append"])
@pytest.mark.parametrize("block", BLOCKS)
def test_behind_memories(block: str, mode: str, choose: Chooses) -> None:
    memory = memories.make_memory(block, mode)
    histories = [memories.HISTORIES[user] for user in range(len(memories.HISTORIES))]
    few, every = choose.both(lambda: memory.score_items(histories))
    np.testing.assert_allclose(few, every, rtol=0, atol=1e-12)
    batch = memory.planner.training(memories.HISTORIES, memories.RANGES, head="items")

    def gradients() -> list[Tensor]:
        loss = memory(batch).loss
        return [loss, *torch.autograd.grad(loss, list(memory.parameters()))]

    close(*choose.both(gradients))


@pytest.mark.parametrize("block", BLOCKS)
def test_recomputed_activations(block: str, choose: Chooses) -> None:
    model = make_model(block=block).train()
    layout = training_layout(model, "sessions")
    choose(True)

    def step() -> list[Tensor]:
        torch.manual_seed(3)  # of what is dropped
        return list(torch.autograd.grad(model(layout).loss, list(model.parameters())))

    kept = step()
    model.gradient_checkpointing_enable()
    for ours, theirs in zip(step(), kept, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("block", BLOCKS)
def test_autocast(block: str, choose: Chooses) -> None:
    model = make_model(torch.float32, block=block)
    layout = training_layout(model, "sessions")
    exact = make_model(block=block).item_states(layout)

    def states() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model.item_states(layout)

    few, every = choose.both(states)
    assert few.dtype == every.dtype
    assert (few - exact).abs().max() <= 2 * (every - exact).abs().max()


@pytest.mark.parametrize("block", BLOCKS)
def test_an_adapter_around_a_projection_is_called(block: str, choose: Chooses) -> None:
    class Adapted(nn.Linear):
        def forward(self, rows: Tensor) -> Tensor:
            return super().forward(rows) + rows[..., :1]

    model = make_model(block=block)
    last: Any = model.hf_model.layers[-1]
    name = "projection" if block == "hstu" else "query_key_value"
    plain = getattr(last, name)
    adapted = Adapted(plain.in_features, plain.out_features, plain.bias is not None).double()
    adapted.load_state_dict(plain.state_dict())
    layout = training_layout(model, "items")
    before = model.item_states(layout)
    setattr(last, name, adapted)
    few, every = choose.both(lambda: model.item_states(layout))
    close(few, every)
    assert (few - before).abs().max() > 1e-3


@pytest.mark.parametrize("block", BLOCKS)
def test_it_is_done_where_that_saves_time(block: str) -> None:
    if not pk.backends()["native"].usable:
        pytest.skip(f"the native backend is not usable: {pk.backends()['native'].reason}")
    model = make_model(torch.float32, block=block, width=64, max_positions=700)
    counts = output_rows(model)
    long = [item for item in HISTORIES[2] for _ in range(45)]
    model.recommend([long, HISTORIES[0]], k=1)
    assert counts.pop() == 2
    model.recommend([HISTORIES[2]], k=1)
    assert counts.pop() == 15, "too few rows for it to matter"
    ranges = np.array([(0, len(long) - 1)])
    every = pk.build_training_layout(model.catalog, [long], model.policy, model.prompt, ranges, head="items")
    model(every.with_transpose()).loss.backward()
    assert counts.pop() == every.num_rows, "nearly all rows have labels"
    last = pk.build_layout(model.catalog, [long], model.policy, model.prompt, [long[0]], head="items", transpose=True)
    model(last).loss.backward()
    assert counts.pop() == 1
