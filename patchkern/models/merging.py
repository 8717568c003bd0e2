# SPDX-License-Identifier: Apache-2.0
"""A peft adapter merged into its base, also where it adapts one of two tied embeddings."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


def merge_and_unload(hf_model: Any) -> PreTrainedModel:
    """The base of a ``PeftModel`` with its active adapters in its weights; it gives what the adapted model gave.

    As peft's own, but that tied embeddings of which an adapter changes one, or each on its own, are untied first: there
    peft merges into both what belongs to one. The output embedding has a weight of its own then, and the configuration
    says so. Embeddings that are equal afterwards are tied as before.

    Args:
        hf_model: the adapted model; its base is changed and returned, as peft does it.

    Raises:
        TypeError: no ``PeftModel``.
        ValueError: its adapter is merged already (``merge_adapter``), into tied embeddings that cannot be told apart.

    Examples:
        >>> import patchkern as pk
        >>> from patchkern.models.adapters import add_lora
        >>> from patchkern.models.merging import merge_and_unload
        >>> from patchkern.models.scratch import fit_tokenizer, scratch_model, scratch_prompt
        >>> tokenizer = fit_tokenizer(["Alien", "Aliens"])
        >>> prompt = scratch_prompt(tokenizer)
        >>> adapted = add_lora(scratch_model(tokenizer, hidden_size=16, intermediate_size=32), 4, prompt, tokenizer)
        >>> type(merge_and_unload(adapted)).__name__
        'LlamaForCausalLM'
    """
    if not hasattr(hf_model, "merge_and_unload"):
        raise TypeError(f"hf_model: expected a PeftModel, got {type(hf_model).__name__}")
    check_merged(hf_model)
    base = hf_model.get_base_model()
    configs = {id(config): config for config in (base.config, base.config.get_text_config())}.values()
    saying_tied = [config for config in configs if getattr(config, "tie_word_embeddings", False)]
    tied = _tied(base)
    if tied:
        output = _without_adapter(base.get_output_embeddings())
        weight = output.weight
        output.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
        for config in saying_tied:
            config.tie_word_embeddings = False
    merged: PreTrainedModel = hf_model.merge_and_unload()
    if tied:
        ends: Any = merged.get_input_embeddings(), merged.get_output_embeddings()
        if torch.equal(ends[0].weight, ends[1].weight):
            ends[1].weight = ends[0].weight
            for config in saying_tied:
                config.tie_word_embeddings = True
    return merged


def check_merged(hf_model: Any) -> None:
    """Raise a ValueError where an adapter of one of two tied embeddings is merged in place, and so into the other.

    Args:
        hf_model: a transformers model, or a ``PeftModel`` around one.
    """
    if not hasattr(hf_model, "peft_config"):
        return
    ends = [hf_model.get_input_embeddings(), hf_model.get_output_embeddings()]
    adapters = [_adapter(end) for end in ends]
    merged = any(getattr(adapter, "merged", False) for adapter in adapters)
    if merged and not all(hasattr(adapter, "trainable_tokens_delta") for adapter in adapters) and _tied(hf_model):
        raise ValueError(
            "hf_model: expected an adapter that is apart from its base, whose embeddings are tied, got one that was "
            "merged into both (merge_adapter), which gives other lists; call unmerge_adapter, and "
            "patchkern.models.merging.merge_and_unload to merge it"
        )


def _tied(hf_model: Any) -> bool:
    """Whether the input and the output embedding, without their adapters, are one weight."""
    ends = [_without_adapter(end) for end in (hf_model.get_input_embeddings(), hf_model.get_output_embeddings())]
    weights = [getattr(end, "weight", None) for end in ends]
    return weights[0] is not None and weights[0] is weights[1]


def _adapter(end: Any) -> Any:
    """What adapts an embedding: a layer of peft, or the one that is beside the whole module."""
    return getattr(end, "token_adapter", end)


def _without_adapter(end: Any) -> Any:
    """An embedding without the layers that peft puts around it."""
    while isinstance(end, nn.Module):
        inner = dict(end.named_children())
        around = [name for name in ("token_adapter", "base_layer", "original_module") if name in inner]
        if not around:
            break
        end = inner[around[0]]
    return end
