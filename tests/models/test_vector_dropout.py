# SPDX-License-Identifier: Apache-2.0
"""Items without their vectors in training: the same ones in the history and in the head, and nothing else changes."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import cases
import pytest
import search_oracle
import torch
from torch import Tensor

import patchkern as pk
from patchkern.ops.vector_dropout import drop_vectors

TITLES = cases.make_titles(23)
HISTORIES = cases.make_histories(TITLES, [9, 1, 30, 0])
RANGES = [[3, 8], [0, 0], [24, 29], [0, -1]]
SHARE = 0.4


def make_model(vector_dropout: float) -> pk.PatchedCausalLM:
    """Float64, in training, with random vectors and biases."""
    hf_model = copy.deepcopy(search_oracle.HF_MODELS["llama"])
    model = pk.PatchedCausalLM(
        hf_model,
        cases.make_catalog(TITLES),
        search_oracle.PROMPT,
        item_embeddings=True,
        item_head=True,
        vector_dropout=vector_dropout,
    )
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in (model.item_embedding, *model.item_head.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=draw, dtype=torch.float64), alpha=0.3)
    return model.train()


def loss_and_gradients(model: pk.PatchedCausalLM, layout: pk.PatchLayout) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(layout).loss
    loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    return loss.detach(), {name: gradient for name, gradient in found.items() if gradient is not None}


@pytest.mark.parametrize("sampled", [False, True], ids=["whole catalogue", "sampled"])
@pytest.mark.parametrize("head", ["titles", "items", "both"])
@pytest.mark.parametrize("policy", [pk.ItemPatches(2, None), pk.SessionPatches(3, None)], ids=["items", "sessions"])
def test_a_dropped_item_has_no_vector_anywhere(policy: Any, head: str, sampled: bool) -> None:
    model, plain = make_model(SHARE), make_model(0.0)
    layout = pk.build_training_layout(model.catalog, HISTORIES, policy, model.prompt, RANGES, head=head)
    if sampled:
        for one in (model, plain):
            one.item_head.sampled_above, one.item_head.num_sampled = 5, 12
    torch.manual_seed(11)
    kept = torch.rand(len(TITLES), 1) >= SHARE
    assert 5 < kept.sum() < 20
    with torch.no_grad():
        plain.item_embedding.mul_(kept)
    expected, gradients = loss_and_gradients(plain, layout)  # whose sampling goes on from the same draw
    torch.manual_seed(11)
    got, ours = loss_and_gradients(model, layout)
    assert torch.equal(got, expected)
    gradients["item_embedding"] = gradients["item_embedding"] * kept
    assert ours.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert torch.equal(ours[name], gradient), name
    assert ours["item_embedding"][kept[:, 0]].any() and ("item_head.bias" in ours) == (head != "titles")


def test_draws_are_of_training_alone_and_of_each_pass() -> None:
    model = make_model(SHARE)
    layout = pk.build_training_layout(
        model.catalog, HISTORIES, pk.ItemPatches(0, None), model.prompt, RANGES, head="items"
    )
    losses = [model(layout).loss.item() for _ in range(4)]
    assert len(set(losses)) == 4
    for quiet in (model.eval(), make_model(0.0)):
        before = torch.get_rng_state()
        assert quiet(layout).loss.item() not in losses
        assert torch.equal(torch.get_rng_state(), before), "nothing is drawn"


def test_the_share_that_is_dropped() -> None:
    torch.manual_seed(0)
    vectors = torch.ones(20_000, 3, dtype=torch.bfloat16)
    got = drop_vectors(vectors, 0.3)
    assert got.dtype == torch.bfloat16 and set(got.unique().tolist()) == {0.0, 1.0}, "not scaled"
    assert torch.equal(got.amin(1), got.amax(1)), "whole items"
    assert abs(got[:, 0].float().mean() - 0.7) < 5 * (0.3 * 0.7 / 20_000) ** 0.5


def test_files_keep_it(tmp_path: Path) -> None:
    model = make_model(SHARE)
    model.save_pretrained(tmp_path)
    read = pk.PatchedCausalLM.from_pretrained
    assert read(tmp_path).vector_dropout == SHARE
    assert read(tmp_path, vector_dropout=0.0).vector_dropout == 0.0
    path = tmp_path / "patchkern.json"
    description = json.loads(path.read_text())
    del description["vector_dropout"]  # as earlier versions wrote it
    path.write_text(json.dumps(description))
    assert read(tmp_path).vector_dropout == 0.0
    path.write_text(json.dumps(description | {"vector_dropout": 1.5}))
    with pytest.raises(ValueError, match=r"patchkern\.json: not a description .*: vector_dropout: expected a prob"):
        read(tmp_path)


@pytest.mark.parametrize("wrong", [1.0, -0.1, float("nan"), True, "0.3"])
def test_wrong_probabilities(wrong: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="vector_dropout: expected a "):
        make_model(wrong)


def test_it_needs_vectors() -> None:
    hf_model = search_oracle.HF_MODELS["llama"]
    with pytest.raises(ValueError, match=r"vector_dropout: expected 0 without item embeddings, .* got 0\.3"):
        pk.PatchedCausalLM(hf_model, cases.make_catalog(TITLES), search_oracle.PROMPT, vector_dropout=0.3)
