# SPDX-License-Identifier: Apache-2.0
"""Learned rows are added, and nothing that was there changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import item_model_cases
import pytest
import torch
from model_cases import CATALOG, PROMPT, VOCABULARY, batch_of, lora, tiny

import patchkern as pk
from patchkern.models.learned_rows import add_experts


@pytest.mark.parametrize("kind", ["llama", "llama tied", "gemma", "ids"])
def test_rows_are_added_and_the_rest_stays(kind: str, tmp_path: Path) -> None:
    if kind == "ids":
        model: Any = item_model_cases.make_model()
        histories, size = item_model_cases.HISTORIES, item_model_cases.N_ITEMS + 1
        layout = pk.build_layout(model.catalog, histories, model.policy, model.prompt)
    else:
        model = pk.PatchedCausalLM(tiny(kind).eval(), CATALOG, PROMPT, pk.ItemPatches(2))
        histories, size = batch_of([5, 9])[0], VOCABULARY
        layout = pk.build_layout(model.catalog, histories, model.policy, model.prompt)
    before = model(layout).logits
    table = model.hf_model.get_input_embeddings().weight.detach().clone()
    add_experts(model, 40)
    assert model.prompt.experts == tuple(range(size, size + 40))
    weight = model.hf_model.get_input_embeddings().weight
    assert weight.requires_grad and torch.equal(weight[:size], table) and weight.shape[0] == size + 40
    after = model(layout).logits
    torch.testing.assert_close(after[:, : before.shape[1]], before, rtol=0, atol=1e-6)
    new = weight[size:].detach()
    assert (new.mean() - table.mean()).abs() < 0.2 * table.std() and 0.8 < new.std() / table.std() < 1.25
    add_experts(model, 4)
    assert model.prompt.experts == tuple(range(size, size + 4))
    model.save_pretrained(tmp_path)
    saved = type(model).from_pretrained(tmp_path, dtype=weight.dtype)
    assert saved.prompt == model.prompt and torch.equal(saved.hf_model.get_input_embeddings().weight, weight)


def test_an_adapter_is_refused() -> None:
    model = pk.PatchedCausalLM(lora(tiny("llama"), target_modules=["q_proj"]), CATALOG, PROMPT)
    with pytest.raises(ValueError, match="model: expected one without an adapter"):
        add_experts(model, 2)
    add_experts(model, 0)
