# SPDX-License-Identifier: Apache-2.0
"""The wrapped transformers model: what it must be, and what is asked of it, by the name that its version has."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from patchkern.batch.catalog import Catalog
from patchkern.batch.control_tokens import configured_tokens
from patchkern.batch.sample_layout import title_with


class WrappedLM(nn.Module):
    """A module around a transformers causal language model: what trainers, tools and a search ask of it."""

    hf_model: PreTrainedModel

    @property
    def config(self) -> PretrainedConfig:
        """The wrapped model's configuration."""
        return self.hf_model.config

    @property
    def _text_config(self) -> PretrainedConfig:
        return self.config.get_text_config()

    @property
    def device(self) -> torch.device:
        """Where layouts go."""
        return self.hf_model.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the wrapped model's parameters and activations."""
        return self.hf_model.dtype

    def get_input_embeddings(self) -> nn.Module:
        """The wrapped model's input embedding."""
        return self.hf_model.get_input_embeddings()

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Recompute activations in the backward pass instead of keeping them."""
        checkpointing(self.hf_model, "enable")(activation_checkpointing_kwargs, **kwargs)

    def activation_checkpointing_disable(self) -> None:
        """Keep activations again."""
        checkpointing(self.hf_model, "disable")()

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """`activation_checkpointing_enable`, by the name it has had for longer."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)

    def gradient_checkpointing_disable(self) -> None:
        """`activation_checkpointing_disable`, by the name it has had for longer."""
        self.activation_checkpointing_disable()


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
