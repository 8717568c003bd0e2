# SPDX-License-Identifier: Apache-2.0
"""A little Llama in a GGUF file, with a tokenizer of bytes and a chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

CHAT = (
    "{% for m in messages %}<|begin|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|begin|>assistant\n{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|begin|>", "<|end|>", "<|file|>", "<|name|>", "<|stars|>")
WIDTH, HIDDEN, HEADS, LAYERS = 32, 64, 2, 1


def write_gguf(path: Path, quantised: bool = False) -> dict[str, Any]:
    """The file, and the weights as they can be read from it, by their names there."""
    gguf = pytest.importorskip("gguf", reason="the package gguf writes and reads GGUF files")
    tokenizers = pytest.importorskip("tokenizers", reason="knows the alphabet of bytes")
    tokens = [*SPECIAL, *sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()), "Al", "en"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(1024)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(1)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIAL else 1 for token in tokens])  # control tokens, and normal ones
    writer.add_token_merges(["A l", "e n"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(CHAT)
    key_value = WIDTH // HEADS
    shapes = {
        "token_embd.weight": (len(tokens), WIDTH),
        "output_norm.weight": (WIDTH,),
        "blk.0.attn_norm.weight": (WIDTH,),
        "blk.0.ffn_norm.weight": (WIDTH,),
        "blk.0.attn_q.weight": (WIDTH, WIDTH),
        "blk.0.attn_k.weight": (key_value, WIDTH),
        "blk.0.attn_v.weight": (key_value, WIDTH),
        "blk.0.attn_output.weight": (WIDTH, WIDTH),
        "blk.0.ffn_gate.weight": (HIDDEN, WIDTH),
        "blk.0.ffn_up.weight": (HIDDEN, WIDTH),
        "blk.0.ffn_down.weight": (WIDTH, HIDDEN),
    }
    draw = np.random.default_rng(0)
    weights = {}
    for name, shape in shapes.items():
        values = draw.normal(0, 0.1, shape).astype(np.float32)
        weights[name] = values
        if quantised and len(shape) == 2:
            kind = gguf.GGMLQuantizationType.Q4_1
            packed = gguf.quants.quantize(values, kind)
            weights[name] = gguf.quants.dequantize(packed, kind)
            writer.add_tensor(name, packed, raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights
