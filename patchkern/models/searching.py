# SPDX-License-Identifier: Apache-2.0
"""A transformers model made ready for a search, and asked whether one would be right."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PretrainedConfig

from patchkern.batch.layout import PatchLayout
from patchkern.models.attention import NAME


def check_spans(config: PretrainedConfig, layout: PatchLayout, depth: int) -> None:
    """All that would make the search silently wrong, or fail in the model."""
    config = config.get_text_config()
    if layout.num_rows and int(layout.cu_seqlens.diff().min()) == 0:
        raise ValueError("histories: expected at least one row per user to predict from, got a user without rows")
    longest = layout.max_seqlen + depth - 1  # nothing follows the last token, so it is never fed
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and longest > limit:
        raise ValueError(
            f"histories: expected at most {limit} rows per user and title, the positions of {config.model_type}, got "
            f"{layout.max_seqlen} rows and titles of up to {depth} tokens; keep fewer items (max_items) or compress "
            "them more"
        )
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention"])
    unknown = kinds - {"full_attention", "sliding_attention"}
    if unknown:
        raise ValueError(f"model: search needs full attention in every layer, got {', '.join(sorted(unknown))}")
    window = getattr(config, "sliding_window", None)
    if window is not None and "sliding_attention" in kinds and longest > window:
        raise ValueError(f"model: search needs full attention, got {longest} rows and a sliding window of {window}")
    rope = getattr(config, "rope_parameters", None) or {}
    original = rope.get("original_max_position_embeddings")
    if rope.get("rope_type") == "longrope" and original is not None and longest > original:
        raise ValueError(
            f"model: search needs positions that mean the same in prompts of any length, got {longest} rows and "
            f"longrope beyond {original}"
        )


@contextmanager
def attention_for_search(model: Any) -> Iterator[None]:
    """Evaluation mode, no gradients, and the attention that knows `SpanCache`; restored afterwards."""
    training = [module for module in model.modules() if module.training]
    implementation = model.config._attn_implementation
    model.eval()
    try:
        if implementation != NAME:
            model.hf_model.set_attn_implementation(NAME)
        with torch.no_grad():
            yield
    finally:
        if implementation != NAME:
            model.hf_model.set_attn_implementation(implementation)
        for module in training:
            module.training = True
