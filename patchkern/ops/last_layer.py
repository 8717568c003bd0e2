# SPDX-License-Identifier: Apache-2.0
"""The last layer of a transformers decoder, and what of it takes each row by itself, for some rows of a pass alone.

Nothing comes after the last layer but what is read, so of the rows that are not read it owes the others no more than
its keys and values.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_FEED_FORWARD = ("mlp", "feed_forward", "ffn", "block_sparse_moe")
_OUTPUT = ("o_proj", "out_proj")


def decoder_of(hf_model: Any) -> nn.Module:
    """A transformers model, or one within adapters, without what makes logits of its states.

    Its ``get_decoder`` goes by names, and some models have their output matrix by such a name.
    """
    base = hf_model.get_base_model() if hasattr(hf_model, "get_base_model") else hf_model
    decoder: nn.Module = base.get_decoder()
    return base.base_model if decoder is base.get_output_embeddings() else decoder


def last_layer(decoder: Any) -> nn.Module | None:
    """The last of a decoder's layers; None where it is not known which these are."""
    count = decoder.config.get_text_config().num_hidden_layers
    stacks = [part for part in decoder.children() if isinstance(part, nn.ModuleList) and len(part) == count]
    return stacks[0][-1] if len(stacks) == 1 else None


def feed_forward(layer: nn.Module) -> nn.Module | None:
    """A layer's feed-forward network, by its name; None without one."""
    found = next((part for name in _FEED_FORWARD if (part := getattr(layer, name, None)) is not None), None)
    return found if isinstance(found, nn.Module) else None


def query_and_output(layer: nn.Module) -> list[nn.Linear]:
    """What makes the queries of a layer's attention and what its result goes through, by name; none of other kinds."""
    attentions = [part for part in layer.modules() if hasattr(part, "q_proj")]
    found = [getattr(part, name, None) for part in attentions for name in ("q_proj", *_OUTPUT)]
    return [part for part in found if isinstance(part, nn.Linear)] if len(attentions) == 1 else []


def recomputes(decoder: Any, layer: nn.Module) -> bool:
    """Whether the layer's activations are computed again in the backward pass, when no hook is there any more."""
    return layer.training and any(getattr(module, "gradient_checkpointing", False) for module in (decoder, layer))


@contextmanager
def for_rows(network: nn.Module, rows: Tensor) -> Generator[None, None, None]:
    """Where it is open, a network that takes ``(1, T, D)`` row by row computes some, and gives zeros for others.

    Differentiable, for rows that come twice as well.

    Args:
        network: its first argument are the rows, its only result as many.
        rows: ``(M,)`` int64, at least one.
    """
    total = 0

    def choose(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        nonlocal total
        states, *others = arguments
        total = states.shape[1]
        return states.index_select(1, rows.to(states.device)), *others

    def put_back(_: nn.Module, arguments: tuple[Any, ...], states: Tensor) -> Tensor:
        chosen = rows.to(states.device)
        if states.requires_grad:  # each of two that are one row gets the gradient of both
            count = chosen.new_zeros(total).index_add_(0, chosen, torch.ones_like(chosen))[chosen, None]
            states.register_hook(lambda gradient: gradient / count)
        return states.new_zeros(states.shape[0], total, states.shape[2]).index_copy_(1, chosen, states)

    before, after = network.register_forward_pre_hook(choose), network.register_forward_hook(put_back)
    try:
        yield
    finally:
        before.remove()
        after.remove()
