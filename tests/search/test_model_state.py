# SPDX-License-Identifier: Apache-2.0
"""Every change that makes a model compute other keys and values makes another state, and nothing else does."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cases import POLICIES, make_catalog, make_histories, make_titles
from search_oracle import HF_MODELS, PROMPT, VOCABULARY, make_model
from torch import nn
from transformers import Phi3Config, Phi3ForCausalLM

import patchkern as pk
from patchkern.search.model_state import model_state
from patchkern.search.user_cache import UserCache

TITLES = make_titles(13)
LORA = {"r": 2, "target_modules": ["k_proj", "v_proj"], "init_lora_weights": False}


def adapted() -> pk.PatchedCausalLM:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(copy.deepcopy(HF_MODELS["llama"]), peft.LoraConfig(**LORA)).double().eval()
    model.add_adapter("other", peft.LoraConfig(**LORA))
    return pk.PatchedCausalLM(model.double(), make_catalog(TITLES), PROMPT)


def first_layer(model: pk.PatchedCausalLM) -> Any:
    return next(module for module in model.modules() if hasattr(module, "k_proj"))


def scaled(model: pk.PatchedCausalLM) -> None:
    first_layer(model).k_proj.scaling["default"] = np.float64(3.0)


def scaled_by_its_method(model: pk.PatchedCausalLM) -> None:
    first_layer(model).v_proj.scale_layer(1.5)


def switched(model: pk.PatchedCausalLM) -> None:
    model.hf_model.set_adapter("other")


def two_at_once(model: pk.PatchedCausalLM) -> None:
    model.hf_model.base_model.set_adapter(["default", "other"])


def disabled(model: pk.PatchedCausalLM) -> None:
    model.hf_model.base_model.disable_adapter_layers()


def merged(model: pk.PatchedCausalLM) -> None:
    model.hf_model.merge_adapter()


def rotary(model: pk.PatchedCausalLM) -> None:
    next(module for module in model.modules() if hasattr(module, "attention_scaling")).attention_scaling = 2.0


def slower_rotation(model: pk.PatchedCausalLM) -> None:
    module: Any = next(module for module in model.modules() if hasattr(module, "inv_freq"))
    module.inv_freq = module.inv_freq / 2  # a buffer that no state dict has


def epsilon(model: pk.PatchedCausalLM) -> None:
    next(module for module in model.modules() if hasattr(module, "variance_epsilon")).variance_epsilon = 0.1


def configured(model: pk.PatchedCausalLM) -> None:
    model.config.rope_parameters["rope_theta"] = 5.0


def hooked(model: pk.PatchedCausalLM) -> None:
    first_layer(model).k_proj.register_forward_hook(lambda module, inputs, output: output * 2)


def replaced_forward(model: pk.PatchedCausalLM) -> None:
    layer = first_layer(model).v_proj
    original = layer.forward
    layer.forward = lambda x: -original(x)


def replaced_module(model: pk.PatchedCausalLM) -> None:
    mlp = next(module for module in model.modules() if hasattr(module, "act_fn"))
    mlp.act_fn = nn.Tanh()


def a_list_of_tensors(model: pk.PatchedCausalLM) -> None:
    first_layer(model).extra = {"keys": [torch.ones(3)]}


CHANGES = [scaled, scaled_by_its_method, switched, two_at_once, disabled, merged, rotary, slower_rotation, epsilon]
CHANGES += [configured, hooked, replaced_forward, replaced_module, a_list_of_tensors]


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_makes_another_state(change: Callable[[pk.PatchedCausalLM], None]) -> None:
    model = adapted()
    before = model_state(model)
    assert model_state(model) == before
    change(model)
    assert model_state(model) != before


@pytest.mark.parametrize("change", [scaled, switched, disabled, rotary, slower_rotation, epsilon, hooked])
def test_no_list_comes_from_an_earlier_state(change: Callable[[pk.PatchedCausalLM], None]) -> None:
    model = adapted()
    cache = UserCache(model, 1 << 20)
    histories = make_histories(TITLES, [9, 4])
    before = model.recommend(histories, POLICIES["text"], 5, 5, user_cache=cache)
    change(model)
    expected = model.recommend(histories, POLICIES["text"], 5, 5)
    assert expected != before
    assert model.recommend(histories, POLICIES["text"], 5, 5, user_cache=cache) == expected


def test_what_a_list_of_tensors_holds_is_part_of_the_state() -> None:
    model = make_model(TITLES)
    a_list_of_tensors(model)
    before = model_state(model)
    first_layer(model).extra["keys"][0].mul_(2)
    assert model_state(model) != before


def long_rope() -> pk.PatchedCausalLM:
    """A model that writes its rotary frequencies, as they were, in every pass."""
    rope = {
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4,
        "original_max_position_embeddings": 300,
    }  # fmt: skip
    size = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Phi3Config(
        **size, intermediate_size=48, max_position_embeddings=512, original_max_position_embeddings=300,
        rope_parameters=rope, pad_token_id=0,
    )  # fmt: skip
    return pk.PatchedCausalLM(Phi3ForCausalLM(config).eval(), make_catalog(TITLES), PROMPT)


@pytest.mark.parametrize("family", [*HF_MODELS, "longrope"])
def test_searches_and_modes_leave_the_state(family: str) -> None:
    model = long_rope() if family == "longrope" else make_model(TITLES, family)
    before = model_state(model)
    model.recommend(make_histories(TITLES, [9, 4]), POLICIES["items"], 5, 5)
    model.train()
    assert model_state(model) == before
    for buffer in itertools.islice(model.buffers(), 1):
        buffer.data[-1] += 1  # not counted by torch
        assert model_state(model) != before


def test_inference_tensors_and_complex_buffers_have_a_state() -> None:
    with torch.inference_mode():
        model = pk.PatchedCausalLM(copy.deepcopy(HF_MODELS["llama"]), make_catalog(TITLES), PROMPT)
        first_layer(model).register_buffer("turns", torch.polar(torch.ones(4), torch.arange(4.0)))
    before = model_state(model)
    assert model_state(model) == before
    with torch.inference_mode():
        first_layer(model).turns.imag[1] += 1
    assert model_state(model) != before


def test_a_tensor_subclass_is_what_it_consists_of() -> None:
    two = pytest.importorskip("torch.testing._internal.two_tensor").TwoTensor
    model = make_model(TITLES)
    layer = first_layer(model).k_proj
    weight = layer.weight.detach()
    layer.weight = nn.Parameter(two(weight, weight.clone()), requires_grad=False)
    before = model_state(model)
    assert model_state(model) == before
    with torch.no_grad():
        layer.weight.data.b[0] += 1
    assert model_state(model) != before
