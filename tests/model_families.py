# SPDX-License-Identifier: Apache-2.0
"""Every causal language model that the installed transformers has a configuration for, tiny and with random weights.

    python tests/model_families.py docs/models.md       # writes the table of families there

A configuration is shrunk by the names of its fields, and every kind of layer that it has by default is kept. What
limits how far a row sees (windows, chunks, the keys that an indexer picks) becomes a few rows: short users meet it.
"""

from __future__ import annotations

import re
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import patchkern as pk
from patchkern.models.isolation import EVERYWHERE
from patchkern.models.patched_lm import PatchedCausalLM

VOCABULARY = 99
TITLES = [np.random.default_rng(i).integers(9, VOCABULARY, 1 + i % 3).tolist() for i in range(30)]
CATALOG = pk.Catalog.from_token_ids(np.concatenate(TITLES), np.cumsum([0, *map(len, TITLES)]))
PROMPT = pk.Prompt(prefix=[3], separator=[4], suffix=[5, 6], response_end=[2])

_REACH = -1  # stands for the rows that a windowed or sparse layer sees

# the first pattern that matches a field's whole name decides
_SIZES: tuple[tuple[str, int], ...] = (
    (r".*vocab_size(_per_layer_input)?|.*group_vocab", VOCABULARY),
    (r"(num|n)_(attention_)?heads?|.*attention_heads|.*_n_heads|.*linear_num_(value_)?heads|mamba_num_heads", 4),
    (r"(.*_)?num_(key_value|kv|key)_heads", 2),
    (
        r"hidden_size|d_model|n_embd|emb_dim|embedding_size|word_embed_proj_dim|lru_width|hidden_size_per_layer_input",
        32,
    ),
    (r".*head_dim|.*d_head|dim_head|kv_channels", 8),
    (r".*intermediate_size|.*ffn_dim|.*ffn_hidden_size|n_inner|dff|dim_ff|.*mamba_d_ssm", 64),
    (r".*_rank|.*state_size|.*d_state", 8),
    (r"rotary_dim|d_rel", 4),
    (r"num_experts|num_local_experts|n_routed_experts|moe_num_experts|zero_expert_num", 4),
    (r"num_experts_per_tok(en)?|moe_topk|top_k_experts|moe_k", 2),
    (r"n_group|num_expert_group|topk_group|.*n_groups", 1),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|model_max_length", 128),
    (
        r"sliding_window(_size)?|window_size|attention_window_size|local_attention|floor_scale|log_scaling_n_floor",
        _REACH,
    ),
    (r"index_topk|index_block_size|indexer_budget|rel_extent|keep_window_size|.*chunk_size|block_size", _REACH),
    (r"index_topk_blocks", 1),
)
_LAYERS = r"num_hidden_layers|n_layers?|num_layers|.*(de|en)coder_layers|num_layers_per_stack|num_(de|en)coder_layers"
_KINDS = r"(mlp_)?layer_types|layers_block_type|block_types|attention_layers|indexer_types"
_DERIVED = {"qk_head_dim"}

# what the names of fields do not tell
_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
_FAMILIES: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_heads": 8, "attn_layer_indices": [1]},
    "bloom": {"n_head": 4},
    "cohere_compass_text": {
        "layer_types": ["full_attention", "sliding_attention"],
        "rope_parameters": dict.fromkeys(["full_attention", "sliding_attention"], _ROPE | {"mrope_section": [1, 1, 2]}),
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10_000.0, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dots3_note_text": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 8,
        "swa_kv_lora_rank": 8,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 8,
    },
    "falcon_h1": {"mamba_n_heads": 8},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.0] * 4,
        "intermediate_size": [64] * 4,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "granitemoehybrid": {"mamba_n_heads": 8},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8, "num_experts": 4, "moe_topk": 2},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "llama4_text": {"no_rope_layers": [1, 0], "intermediate_size_mlp": 64},
    "longcat_flash": {"head_dim": 8},
    "mamba2": {"num_heads": 8},
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"]},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": {
        "hc_lowrank": 8,
        "ple_embed_dim": 32,
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": _REACH,
        "indexer_compress_ratio": 2,
    },
    "reformer": {"axial_pos_shape": (8, 16), "axial_pos_embds_dim": (16, 16), "attn_layers": ["local", "local"]},
    "xlm": {"emb_dim": 32, "causal": True},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}


def names() -> list[str]:
    """The model types that transformers maps to a causal language model, in its order."""
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def multimodal(name: str) -> str | None:
    """Why a model type is no text model of its own; None where it is one."""
    parts = sorted(getattr(CONFIG_MAPPING[name], "sub_configs", {}))
    if any(re.search(r"vision|audio|vq|text|decoder", part) for part in parts):
        return "more than a text model: has " + ", ".join(parts)
    return None


def tiny_config(name: str, reach: int = 4) -> PretrainedConfig:
    """The configuration of a few thousand weights; ``reach`` is the rows that windows, chunks and the like span."""
    kind = CONFIG_MAPPING[name]
    default = kind().to_dict()
    chosen = _FAMILIES.get(name, {})
    layer_kinds = {
        field: list(dict.fromkeys(value))
        for field, value in default.items()
        if re.fullmatch(_KINDS, field) and isinstance(value, (list, tuple)) and value and isinstance(value[0], str)
    }
    layers = max([2, *(len(value) for value in layer_kinds.values())])
    fields: dict[str, Any] = {field: (value * layers)[:layers] for field, value in layer_kinds.items()}
    for field, value in default.items():
        if isinstance(value, bool) or not isinstance(value, int) or field in _DERIVED:
            continue
        if re.fullmatch(_LAYERS, field):
            fields[field] = layers
        elif size := next((size for pattern, size in _SIZES if re.fullmatch(pattern, field)), None):
            fields[field] = size
    if "qk_rope_head_dim" in default:  # latent attention: heads are not grouped, and their width is a sum
        fields.pop("head_dim", None)
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    for field in default:
        if field.endswith("_token_id") and default[field] is not None:
            fields[field] = 0 if field == "pad_token_id" else 1
    if "is_decoder" in default:
        fields["is_decoder"] = True
    fields |= chosen
    return kind(**{field: reach if value == _REACH else value for field, value in fields.items()})


def tiny_model(name: str, reach: int = 4, seed: int = 0) -> PreTrainedModel:
    """In evaluation mode and float32, with weights that no part of the model is silent with."""
    config = tiny_config(name, reach)
    kind = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = kind(config).float().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape), alpha=0.1)
    return model


# ------------------------------------------------------------------ what the library says of them


class Verdict(NamedTuple):
    """What the library makes of a family with an attention implementation.

    Attributes:
        model: None where it is refused.
        refused: why; None where it is not.
        no_branches: why its branches are; None where they are not.
    """

    model: PatchedCausalLM | None
    refused: str | None = None
    no_branches: str | None = None


def verdict(model: PreTrainedModel, implementation: str) -> Verdict:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="whether")  # nothing may be left for the first forward
        try:
            wrapped = PatchedCausalLM(model, CATALOG, PROMPT, attn_implementation=implementation)
        except ValueError as error:
            return Verdict(None, str(error))
    layout = pk.build_training_layout(CATALOG, [[0, 1, 2, 3]], pk.TextOnly(), PROMPT, [[1, 3]])
    try:
        with torch.no_grad():
            wrapped(layout)
        wrapped.recommend([[0, 1]], pk.TextOnly(), 1, 1)
    except ValueError as error:
        return Verdict(wrapped, None, str(error))
    return Verdict(wrapped)


# what the errors say, in the words of the table
_REASONS = (
    (r"carries rows", "a state or a convolution runs on into the next user"),
    (r"place in the batch", "what a layer sees depends on the place in the batch (sparse or chunked attention)"),
    (r"can't keep packed sequences apart without", "a gated delta rule, which needs flash-linear-attention"),
    (r"does not implement `(\w+)`", r"uses `\1`, which `patchkern_varlen` has not"),
    (r"logits_to_keep", "takes no `logits_to_keep`"),
    (r"differs from the same user alone", "positions are not those of `position_ids`"),
    (r"keeps '(\w+)'", r"keeps its own `\1` attention"),
    (r"rows change a user's", "masks do not know where users begin"),
    (r"branch differs", "hands no spans to attention"),
    (r"one attention in every layer", "attends twice in a layer, of which a search keeps one pair of keys and values"),
    (r"reverse the embedding", "needs token ids beside embeddings"),
    (r"is bidirectional", "attention that does not say that it is causal"),
    (r"fails in it \((.*)\)", r"fails on a packed batch (\1)"),
)


def _why(error: str) -> str:
    for pattern, words in _REASONS:
        if found := re.search(pattern, error):
            return found.expand(words)
    return error


def row(name: str) -> tuple[str, ...]:
    """A family's row: yes or no per implementation, branches after the first, and why not."""
    model = tiny_model(name, reach=64)
    verdicts = {implementation: verdict(model, implementation) for implementation in EVERYWHERE}
    marks = ["no" if v.refused else "yes" for v in verdicts.values()]
    first, *others = verdicts.values()
    marks.insert(1, "no" if first.refused or first.no_branches else "yes")
    errors = [first.refused or first.no_branches, *(other.refused for other in others)]
    reasons = [_why(error) for error in errors if error and "does not support an attention" not in error]
    return (*marks, "; ".join(dict.fromkeys(reasons)))


def table() -> str:
    """The families in Markdown, those with the same row together."""
    groups: dict[tuple[str, ...], list[str]] = {}
    left_out: dict[str, list[str]] = {}
    for name in names():
        if reason := multimodal(name):
            left_out.setdefault(reason, []).append(name)
        else:
            groups.setdefault(row(name), []).append(name)
    tried = sum(map(len, groups.values()))
    passed = sum(len(members) for marks, members in groups.items() if "yes" in marks[:4])
    ours = sum(len(members) for marks, members in groups.items() if marks[0] == "yes")
    lines = [
        f"transformers {transformers.__version__}: {tried} text families tried, {passed} keep users apart with some "
        f"attention ({ours} with `patchkern_varlen`), {tried - passed} are refused; "
        f"{sum(map(len, left_out.values()))} are more than text models and were not tried.",
        "",
        "| `patchkern_varlen` | branches, searches | `sdpa` | `eager` | families | why not |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for (*marks, why), members in sorted(groups.items(), key=lambda group: (group[0][:4], group[0][4]), reverse=True):
        lines.append(f"| {' | '.join(marks)} | {', '.join(members)} | {why} |")
    others = sorted(name for members in left_out.values() for name in members)
    lines += ["", f"Not tried, as they are more than text models: {', '.join(others)}."]
    return "\n".join(lines) + "\n"


BEGIN, END = "<!-- families: begin -->\n", "<!-- families: end -->\n"


def rows_of(page: str) -> dict[str, tuple[str, ...]]:
    """The families' rows in a page that has the table."""
    rows = {}
    for line in page.partition(BEGIN)[2].partition(END)[0].splitlines():
        if line.startswith(("| yes", "| no")):
            *marks, members, why = (cell.strip() for cell in line[1:-1].split("|"))
            rows.update(dict.fromkeys(members.split(", "), (*marks, why)))
    return rows


def main(path: str) -> None:
    page = Path(path).read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    Path(path).write_text(before + BEGIN + table() + END + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    main(sys.argv[1])
