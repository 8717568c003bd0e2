# SPDX-License-Identifier: Apache-2.0
"""What the wrapped transformers model must be, and what is asked of it by the name that its version has."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from patchkern.batch.catalog import Catalog
from patchkern.batch.control_tokens import configured_tokens
from patchkern.batch.sample_layout import title_with


def check_model(hf_model: Any) -> None:
    base = hf_model
    if hasattr(hf_model, "peft_config"):
        if hasattr(hf_model, "get_base_model"):
            base = hf_model.get_base_model()
        if any(adapter.is_prompt_learning for adapter in hf_model.peft_config.values()):
            raise ValueError(
                "hf_model: expected no prompt-learning adapter, whose tokens have no place in a packed batch"
            )
    if not isinstance(base, PreTrainedModel):
        raise TypeError(f"hf_model: expected a transformers causal LM, got {type(hf_model).__name__}")
    if "logits_to_keep" not in inspect.signature(base.forward).parameters:
        raise ValueError(
            f"hf_model: expected a causal LM whose forward takes logits_to_keep, got {type(base).__name__}"
        )


def warn_of_special_tokens(hf_model: Any, catalog: Catalog) -> None:
    """Not an error: configurations of models from scratch name ids by default, which mean nothing there."""
    named = configured_tokens(hf_model)
    found = title_with(catalog, named)
    if found is not None:
        token, title = found
        warnings.warn(
            f"catalog: expected no title with a special token of the model, got {token}, its {named[token]}, in "
            f"{title}; if it is an ordinary token, say so: hf_model.config.{named[token]} = None",
            stacklevel=3,
        )


def smoothed_loss(logits: Tensor, labels: Tensor, smoothing: float, num_items_in_batch: Tensor | int | None) -> Tensor:
    """In float32 and divided as transformers does it."""
    if num_items_in_batch is None:
        return F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)
    total = F.cross_entropy(logits.float(), labels, reduction="sum", label_smoothing=smoothing)
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch


def checkpointing(hf_model: PreTrainedModel, switch: str) -> Callable[..., None]:
    """The model's method, by the name that this version of transformers has for it."""
    name = "activation" if hasattr(hf_model, "activation_checkpointing_enable") else "gradient"
    method: Callable[..., None] = getattr(hf_model, f"{name}_checkpointing_{switch}")
    return method
