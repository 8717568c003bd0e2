# SPDX-License-Identifier: Apache-2.0
"""Tiny transformers models of every family, adapters on them, and a catalogue to train them on."""

from __future__ import annotations

from typing import Any

import numpy as np
import oracle
import peft
import torch
import transformers
from torch import nn

import patchkern as pk

VOCABULARY = 83
PROMPT = pk.Prompt(prefix=[3, 4, 5], separator=[6], suffix=[7, 8], response_end=[2])
PARTS = oracle.Parts([3, 4, 5], [6], [7, 8], [2])
TITLES = [np.random.default_rng(i).integers(9, VOCABULARY, 1 + i % 5).tolist() for i in range(40)]
CATALOG = pk.Catalog.from_token_ids(np.concatenate(TITLES), np.cumsum([0, *map(len, TITLES)]))

POLICIES = {
    "text": pk.TextOnly(max_items=12),
    "items": pk.ItemPatches(keep_text=3, max_items=None),
    "sessions, end": pk.SessionPatches(group_size=3, max_items=20),
    "sessions, start": pk.SessionPatches(group_size=3, max_items=None, align="start"),
    "random": pk.RandomItemPatches(probability=0.5, max_items=15, seed=5),
}
MODELS = ["llama", "llama tied", "qwen2", "qwen3", "gpt2 tied", "gpt2 untied", "gemma", "gemma3"]


def tiny(kind: str, **overrides: Any) -> transformers.PreTrainedModel:
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": kind.endswith(" tied") or kind in ("qwen3", "gemma", "gemma3"),
    }
    if kind.startswith("gpt2"):
        shape = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
        shape |= {"tie_word_embeddings": kind == "gpt2 tied", "bos_token_id": 1, "eos_token_id": 2}
        shape |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    if kind == "gemma3":
        shape |= {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
    configs = {
        "llama": transformers.LlamaConfig,
        "qwen2": transformers.Qwen2Config,
        "qwen3": transformers.Qwen3Config,
        "gpt2": transformers.GPT2Config,
        "gemma": transformers.GemmaConfig,
        "gemma3": transformers.Gemma3TextConfig,
    }
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(configs[kind.split()[0]](**shape | overrides))
    with torch.no_grad():
        for parameter in model.parameters():  # away from the initial state, where biases and norms are 0 and 1
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.train()


def batch_of(lengths: list[int], seed: int = 0) -> tuple[list[list[int]], list[int]]:
    """Histories of these lengths, and targets."""
    draw = np.random.default_rng(seed)
    return [draw.integers(0, len(TITLES), n).tolist() for n in lengths], draw.integers(
        0, len(TITLES), len(lengths)
    ).tolist()


def lora(hf_model: transformers.PreTrainedModel, **arguments: Any) -> nn.Module:
    model = peft.get_peft_model(hf_model, peft.LoraConfig(r=4, task_type="CAUSAL_LM", **arguments))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
            elif "trainable_tokens_delta" in name or "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter))
    return model


ADAPTERS = {
    "q and v": {"target_modules": ["q_proj", "v_proj"]},
    "embed_tokens": {"target_modules": ["q_proj", "embed_tokens"]},
    "trainable tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 6, 7, 20, 30]},
    "modules to save": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
}
