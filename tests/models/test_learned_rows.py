# SPDX-License-Identifier: Apache-2.0
"""Learned rows are added, and nothing that was there changes; whose tokens they are, and whether they are trained."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import item_model_cases
import numpy as np
import pytest
import torch
import training_cases
from memory_model_cases import make_memory
from model_cases import CATALOG, POLICIES, PROMPT, VOCABULARY, batch_of, lora, tiny

import patchkern as pk
from patchkern.batch.prompt import reserved_tokens
from patchkern.models.learned_rows import add_experts, experts_are_trained, reserve_experts
from patchkern.models.scratch import fit_tokenizer
from patchkern.training import PatchTrainer


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


def test_a_memory_is_refused_as_it_is() -> None:
    memory = make_memory()
    before = {name: tuple(value.shape) for name, value in memory.state_dict().items()}
    for model in (memory, memory.hf_model, None):
        with pytest.raises(TypeError, match="model: expected a PatchedCausalLM or an ItemModel"):
            add_experts(model, 9)
    assert {name: tuple(value.shape) for name, value in memory.state_dict().items()} == before
    add_experts(memory.model, 9)
    assert len(memory.prompt.experts) == 9


PATCHES = pk.ItemPatches(0, None)


def assert_drawn_like(rows: torch.Tensor, others: torch.Tensor) -> None:
    """Near their mean, number by number, as far as they vary, and no two alike."""
    distance = ((rows - others.mean(0)) / others.std(0, correction=0)).detach()
    assert 0.5 < float(distance.square().mean().sqrt()) < 2
    assert len({tuple(row) for row in rows.tolist()}) == len(rows)


def test_an_item_model_grows() -> None:
    model = item_model_cases.make_model(torch.float32)
    expected = model.score_items(item_model_cases.HISTORIES)
    state, before = torch.get_rng_state(), model.hf_model.items.weight.clone()
    pk.add_experts(model, 3, max_positions=50, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.prompt.experts == (24, 25, 26) and model.config.vocab_size == 27
    assert model.hf_model.positions.num_embeddings == model.config.max_position_embeddings == 50
    assert torch.equal(model.hf_model.items.weight[:24], before)
    assert_drawn_like(model.hf_model.items.weight[24:].detach(), before)
    np.testing.assert_array_equal(model.score_items(item_model_cases.HISTORIES), expected)
    again = copy.deepcopy(model)
    pk.add_experts(again, 3, max_positions=20)
    assert torch.equal(again.hf_model.items.weight, model.hf_model.items.weight), "it has them already"
    pk.add_experts(model, 4)
    assert model.prompt.experts == (24, 25, 26, 27)
    with pytest.raises(ValueError, match="count: expected an integer in 0"):
        pk.add_experts(model, -1)


def test_what_was_saved_is_read_again(tmp_path: Path) -> None:
    policy = pk.Experts(PATCHES, count=2, keep=2, block=3)
    model = item_model_cases.make_model(torch.float32, policy=policy)
    pk.add_experts(model, 2)
    model.save_pretrained(tmp_path / "ids")
    again = pk.ItemModel.from_pretrained(tmp_path / "ids").eval()
    assert again.policy == policy and again.prompt == model.prompt
    assert again.recommend(item_model_cases.HISTORIES, k=5) == model.recommend(item_model_cases.HISTORIES, k=5)
    titled, tokenizer = training_cases.make_model()
    titled.tokenizer, titled.policy = tokenizer, pk.Experts(PATCHES, pk.TextOnly(None), count=2, keep=2, block=3)
    pk.add_experts(titled, 2)
    titled.save_pretrained(tmp_path / "titles")
    read = pk.PatchedCausalLM.from_pretrained(tmp_path / "titles")
    histories, _ = training_cases.make_data()
    assert read.policy == titled.policy and read.prompt == titled.prompt
    assert read.recommend(histories, k=3, num_beams=3) == titled.recommend(histories, k=3, num_beams=3)
    ids = read.tokenizer.convert_tokens_to_ids(["<|expert_0|>", "<|expert_1|>"])
    assert list(read.prompt.experts) == ids and read.tokenizer.decode(ids) == "<|expert_0|><|expert_1|>"
    assert_drawn_like(read.get_input_embeddings().weight[ids].detach(), titled.get_input_embeddings().weight.detach())


def test_reserved_tokens_come_first() -> None:
    """Those that the prompt has taken stay its own; without enough of them new ones are added."""
    hf_model = tiny("llama", vocab_size=320)
    tokenizer = fit_tokenizer(["Alien", "Aliens"], 280)
    names = [f"<|reserved_special_token_{number}|>" for number in range(6)]
    tokenizer.add_special_tokens({"additional_special_tokens": names}, replace_extra_special_tokens=False)
    ids = reserved_tokens(tokenizer)
    assert tokenizer.convert_ids_to_tokens(ids) == names
    prompt = pk.Prompt(prefix=[5, ids[0]], separator=[ids[1]], suffix=[ids[2]], response_end=[2])
    before = hf_model.get_input_embeddings().weight.detach().clone()
    some = reserve_experts(hf_model, prompt, tokenizer, 3)
    assert list(some.experts) == ids[3:6] and hf_model.get_input_embeddings().num_embeddings == 320
    after = hf_model.get_input_embeddings().weight.detach()
    changed = (after != before).any(dim=1)
    assert changed.nonzero().flatten().tolist() == ids[3:6]
    assert_drawn_like(after[ids[3:6]], before)
    size = len(tokenizer)
    more = reserve_experts(hf_model, prompt, tokenizer, 4)
    assert list(more.experts) == list(range(size, size + 4)) and len(tokenizer) == size + 4


def test_without_a_tokenizer_the_embedding_grows() -> None:
    hf_model = tiny("llama")
    model = pk.PatchedCausalLM(hf_model, CATALOG, PROMPT, POLICIES["items"])
    layout = pk.build_layout(CATALOG, [[1, 2, 3]], model.policy, model.prompt)
    before = model(layout).logits.detach()
    pk.add_experts(model, 2)
    assert model.prompt.experts == (83, 84)
    torch.testing.assert_close(model(layout).logits[:, :83], before)
    policy = pk.Experts(PATCHES, count=2, keep=1, block=2)
    layout = pk.build_training_layout(CATALOG, [[1, 2, 3, 4, 5]], policy, model.prompt, [[0, 4]])
    model(layout).loss.backward()
    assert hf_model.get_input_embeddings().weight.grad[[83, 84]].abs().sum(1).min() > 0


# ------------------------------------------------------------------ adapters


def adapted(reserve: bool) -> tuple[Any, pk.Prompt, Any]:
    from patchkern.models.adapters import add_lora

    hf_model = tiny("llama", vocab_size=320)
    tokenizer = fit_tokenizer(["Alien", "Aliens"], 280)
    prompt = reserve_experts(hf_model, PROMPT, tokenizer, 2) if reserve else PROMPT
    return add_lora(hf_model, 2, prompt, tokenizer), prompt, tokenizer


def test_an_adapter_trains_experts_that_it_knows(tmp_path: Path) -> None:
    histories, samples = pk.Histories.coerce([[1, 2, 3, 4, 5, 6]]), (np.array([0]), np.array([5]))
    policy = pk.Experts(PATCHES, count=2, keep=1, block=2)
    settings = training_cases.UNTUNED.arguments(
        "items", tmp_path, max_steps=2, save_strategy="no", use_cpu=True, disable_tqdm=True
    )

    def trained(model: pk.PatchedCausalLM) -> torch.Tensor:
        ids = torch.tensor(model.prompt.experts)
        before = model.get_input_embeddings()(ids).detach().clone()
        PatchTrainer(model, settings, histories, samples, policy, rows_per_pass=200).train()
        return (model.get_input_embeddings()(ids) != before).any(dim=1)

    network, prompt, _ = adapted(reserve=True)
    model = pk.PatchedCausalLM(network, CATALOG, prompt, policy)
    assert experts_are_trained(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="model: expected experts")
        assert trained(model).all()
    network, prompt, _ = adapted(reserve=False)
    model = pk.PatchedCausalLM(network, CATALOG, prompt.with_special(experts=[300, 301]), policy)
    assert not experts_are_trained(model)
    with pytest.warns(UserWarning, match=r"model: expected experts whose embeddings are trained, got frozen ones"):
        assert not trained(model).any()
    bare = pk.PatchedCausalLM(network, CATALOG, prompt, policy)
    with pytest.raises(ValueError, match="model: expected one without an adapter"):
        pk.add_experts(bare, 2)
