# SPDX-License-Identifier: Apache-2.0
"""A transformers model made ready for a search."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from patchkern.models.attention import NAME


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
