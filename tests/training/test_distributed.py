# SPDX-License-Identifier: Apache-2.0
"""Two processes over gloo give the loss and the gradients of one: data parallel, and sharded with FSDP2."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from step_processes import (
    CATALOG,
    WORLD,
    accumulated_passes,
    data_parallel,
    data_parallel_both,
    data_parallel_items,
    embedding_apart,
    layers_and_root,
    make_layout,
    make_model,
    make_passes,
    saving,
    sharded_both,
    sharded_items,
    wrong_root,
)

import patchkern as pk
from patchkern.models.patched_lm import PatchedCausalLM


def results(two_processes: Path, case: Callable[..., Any]) -> list[dict[str, Any]]:
    return [
        torch.load(two_processes / "steps" / f"{case.__name__}.{rank}.pt", weights_only=True) for rank in range(WORLD)
    ]


@pytest.mark.parametrize(
    ("case", "tied", "head"),
    [
        (data_parallel, True, "titles"),
        (layers_and_root, True, "titles"),
        (embedding_apart, False, "titles"),
        (data_parallel_items, False, "items"),
        (data_parallel_both, True, "both"),
        (sharded_items, True, "items"),
        (sharded_both, False, "both"),
    ],
    ids=["DDP", "FSDP2", "FSDP2, embedding apart", "DDP, items", "DDP, both", "FSDP2, items", "FSDP2, apart, both"],
)
def test_two_processes_equal_one(two_processes: Path, case: Callable[..., Any], tied: bool, head: str) -> None:
    model = make_model(tied, item_head=head != "titles")
    torch.manual_seed(7)
    loss = model(make_layout(slice(None), head)).loss
    loss.backward()
    for result in results(two_processes, case):
        torch.testing.assert_close(result["loss"], loss.detach(), rtol=1e-5, atol=0)
        expected = {name: parameter.grad for name, parameter in model.named_parameters()}
        assert result["gradients"].keys() == expected.keys()
        for name, gradient in expected.items():
            error = (result["gradients"][name] - gradient).abs().max()
            assert error <= 1e-5 * gradient.abs().max(), name


def test_passes_of_two_processes_equal_one_of_all_users(two_processes: Path) -> None:
    model = make_model(tied=True)
    whole = pk.join_layouts(make_passes()).with_transpose()
    loss = model(whole).loss
    loss.backward()
    for result in results(two_processes, accumulated_passes):
        torch.testing.assert_close(result["loss"], loss.detach(), rtol=1e-6, atol=0)
        for name, parameter in model.named_parameters():
            error = (result["gradients"][name] - parameter.grad).abs().max()
            assert error <= 1e-5 * parameter.grad.abs().max(), name


def test_sharded_parameters_are_saved_when_gathered(two_processes: Path) -> None:
    for result in results(two_processes, saving):
        assert "state_dict: expected one, because the parameters are sharded" in result["message"]
        assert result["folders"] == ["gathered"]
    layout = make_layout(slice(None))
    loaded = PatchedCausalLM.from_pretrained(two_processes / "steps" / "gathered", CATALOG)
    with torch.no_grad():
        assert torch.equal(loaded(layout).logits, make_model(tied=True)(layout).logits)


def test_sharding_the_inner_model_says_what_to_shard(two_processes: Path) -> None:
    for result in results(two_processes, wrong_root):
        assert "call fully_shard on the PatchedCausalLM" in result["message"]
