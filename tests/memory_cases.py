# SPDX-License-Identifier: Apache-2.0
"""Models whose memory counts, and what a search with them takes at most."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from cases import make_catalog, make_histories, make_titles
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import patchkern as pk
from patchkern.budget.live_bytes import peak_memory

PROMPT = pk.Prompt(prefix=[990, 991], separator=[992], suffix=[993, 994], response_end=[996])
SIZE = {"vocab_size": 8000, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}


@functools.cache
def hf_model(family: str, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    rest = {"intermediate_size": 200, "max_position_embeddings": 20_000}
    if family == "llama":
        model: Any = LlamaForCausalLM(LlamaConfig(**SIZE, **rest, num_key_value_heads=2))
    elif family == "qwen3":
        config = Qwen3Config(**SIZE, **rest, num_key_value_heads=1, head_dim=32, tie_word_embeddings=True)
        model = Qwen3ForCausalLM(config)
    elif family == "qwen3_moe":
        experts = {"moe_intermediate_size": 104, "num_experts": 8, "num_experts_per_tok": 2}
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZE, **rest, **experts, num_key_value_heads=1, head_dim=32))
    elif family == "deepseek_v3":  # whose configuration says neither what its keys nor what its values are
        latent = {"q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 4}
        experts = {"moe_intermediate_size": 104, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2}
        experts |= {"topk_group": 1, "first_k_dense_replace": 1}
        model = DeepseekV3ForCausalLM(DeepseekV3Config(**SIZE, **rest, **latent, **experts, num_key_value_heads=4))
    elif family == "opt":  # whose attention takes more than its feed-forward network
        sizes = SIZE | {"ffn_dim": 64, "word_embed_proj_dim": 64, "max_position_embeddings": 20_000}
        model = OPTForCausalLM(OPTConfig(**sizes))
    elif family == "phi3":
        model = Phi3ForCausalLM(Phi3Config(**SIZE, **rest, num_key_value_heads=2, resid_pdrop=0.1, pad_token_id=0))
    else:
        model = GPT2LMHeadModel(GPT2Config(vocab_size=8000, n_positions=20_000, n_embd=64, n_layer=3, n_head=4))
    return model.to(dtype).eval()


def make_model(family: str = "llama", dtype: torch.dtype = torch.float32, n_items: int = 60) -> pk.PatchedCausalLM:
    return pk.PatchedCausalLM(copy.deepcopy(hf_model(family, dtype)), make_catalog(make_titles(n_items)), PROMPT)


def users(*lengths: int, n_items: int = 60) -> list[list[Any]]:
    return make_histories(make_titles(n_items), lengths)


def measured(model: pk.PatchedCausalLM, histories: Any, policy: Any, width: int, **options: Any) -> int:
    """Bytes that a search takes at most, the weights included."""
    weights = sum(parameter.nbytes for parameter in model.parameters())
    with peak_memory("cpu") as peak:
        model.recommend(histories, policy, width, num_beams=width, memory_budget="1GiB", **options)
    return weights + peak.bytes
