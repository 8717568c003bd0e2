# SPDX-License-Identifier: Apache-2.0
"""Kept costs: counted once, and those of the model as it is."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import POLICIES, make_histories, make_titles
from search_oracle import make_model
from torch import nn

import patchkern as pk
from patchkern.budget.search import SearchCost, SearchSize
from patchkern.search import search_cost as module
from patchkern.search.search_cost import COSTS_PER_MODEL, search_cost

TITLES = make_titles(17)
SIZE = SearchSize(4, 9)


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> list[SearchSize]:
    """The sizes of the searches whose costs were counted since."""
    sizes: list[SearchSize] = []

    def counting(model: Any, size: SearchSize) -> SearchCost:
        sizes.append(size)
        return SearchCost(model, size)

    monkeypatch.setattr(module, "SearchCost", counting)
    return sizes


def test_calls_with_a_budget_count_a_model_once(counts: list[SearchSize]) -> None:
    model, histories = make_model(TITLES), make_histories(TITLES, [5, 2])
    unlimited = model.recommend(histories, POLICIES["items"], k=3, num_beams=4)
    assert counts == []
    for _ in range(2):
        assert model.recommend(histories, POLICIES["items"], k=3, num_beams=4, memory_budget="1GiB") == unlimited
    assert len(counts) == 1
    model.recommend(histories, POLICIES["items"], k=3, num_beams=5, memory_budget="1GiB")
    assert len(counts) == 2


def test_kept_costs_are_few_and_go_with_their_model(counts: list[SearchSize]) -> None:
    model = make_model(TITLES)
    for width in range(COSTS_PER_MODEL):
        search_cost(model, SearchSize(width, 9))
    first = search_cost(model, SearchSize(0, 9))  # used again, so it is no longer the one that goes
    search_cost(model, SIZE._replace(user_bytes=1))
    assert search_cost(model, SearchSize(0, 9)) is first
    counted = len(counts)
    search_cost(model, SearchSize(1, 9))
    assert len(counts) == counted + 1
    network = weakref.ref(model.hf_model)
    del model
    gc.collect()
    assert network() is None


def wider(model: pk.PatchedCausalLM) -> None:
    for layer in (part for part in model.modules() if hasattr(part, "gate_proj")):
        layer.gate_proj, layer.up_proj, layer.down_proj = (
            nn.Linear(*sizes, bias=False, dtype=model.dtype) for sizes in ((32, 640), (32, 640), (640, 32))
        )


def halved(model: pk.PatchedCausalLM) -> None:
    model.to(torch.bfloat16)


def hooked(model: pk.PatchedCausalLM) -> None:
    embedding = model.hf_model.get_input_embeddings()
    embedding.register_forward_hook(lambda module, inputs, output: output.repeat(1, 1, 50)[..., :32] * 1)


@pytest.mark.parametrize("change", [wider, halved, hooked])
def test_a_model_that_changes_is_counted_anew(
    change: Callable[[pk.PatchedCausalLM], None], counts: list[SearchSize]
) -> None:
    model = make_model(TITLES)
    before = search_cost(model, SIZE).needed(3, 100, 40)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)  # other weights take the same memory
    assert search_cost(model, SIZE).needed(3, 100, 40) == before and len(counts) == 1
    change(model)
    after = search_cost(model, SIZE).needed(3, 100, 40)
    assert after == SearchCost(model, SIZE).needed(3, 100, 40) != before
