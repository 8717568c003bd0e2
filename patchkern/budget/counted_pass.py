# SPDX-License-Identifier: Apache-2.0
"""A model's forward pass followed on the meta device, and what it holds counted: no memory, next to no time."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, PretrainedConfig

from patchkern.budget.live_bytes import LiveBytes


class AttentionShape(NamedTuple):
    """Of what one layer's attention is given, which no configuration tells of every family."""

    heads: int
    """of queries"""
    kv_heads: int
    key_width: int
    """of queries, too"""
    value_width: int

    @property
    def group(self) -> int:
        """Heads of queries to one of keys."""
        return self.heads // self.kv_heads

    @property
    def width(self) -> int:
        """The larger one."""
        return max(self.key_width, self.value_width)

    @property
    def stored(self) -> int:
        """Numbers in a row's keys and values."""
        return self.kv_heads * (self.key_width + self.value_width)


class PassBytes(NamedTuple):
    """Bytes that one forward pass holds, per row."""

    peak: int
    """anywhere but in attention, at most"""
    at_attention: int
    """when attention begins, at most"""
    attentions: tuple[AttentionShape, ...]
    """in the order of the layers"""


class _Attention:
    """Stands in for the attention of a model on the meta device, and notes what the model holds when it is called."""

    NAME = "patchkern_counted"

    def __init__(self, counter: LiveBytes) -> None:
        self._counter = counter
        self.live = 0
        self.shapes: list[AttentionShape] = []

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        self.live = max(self.live, self._counter.live)
        self.shapes.append(AttentionShape(query.shape[1], key.shape[1], key.shape[3], value.shape[3]))
        return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])


def _attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **kwargs: Any) -> Any:
    if (stand_in := kwargs.get("span_cache")) is None:
        raise ValueError(
            f"model: expected one whose attention is told of spans, to count its memory; {type(module).__name__} is not"
        )
    return stand_in.attend(module, query, key, value, kwargs.get("scaling")), None


def _no_mask(*_: Any, **__: Any) -> None:
    return None


AttentionInterface.register(_Attention.NAME, _attention)
AttentionMaskInterface.register(_Attention.NAME, _no_mask)

_COUNTED_ROWS = 1024


def place_of(model: Any, device: Any) -> torch.device:
    """Where something runs: on ``device`` if there is one, else on the model's, and of a configuration on the CPU.

    Raises:
        TypeError, ValueError: neither a model nor a configuration, or no device; the message names the argument.
    """
    inner = getattr(model, "hf_model", model)
    if not (isinstance(inner, PretrainedConfig) or hasattr(inner, "config")):
        raise TypeError(f"model: expected a transformers causal LM or its configuration, got {type(model).__name__}")
    if device is None:
        return torch.device("cpu" if isinstance(inner, PretrainedConfig) else inner.device)
    if not isinstance(device, (str, torch.device)):
        raise TypeError(f"device: expected a torch.device or its name, got {type(device).__name__}")
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device: expected one that torch knows, got {device!r}") from error


def check_weights_dtype(dtype: Any) -> None:
    """Raise unless it is None or a dtype that weights can have."""
    if not (dtype is None or isinstance(dtype, torch.dtype)):
        raise TypeError(f"dtype: expected a torch.dtype or None, got {type(dtype).__name__}")
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype: expected one of floating-point numbers, got {dtype}")


def count_pass(model: Any, packed: bool) -> PassBytes:
    """Follow one forward pass: of packed prompts, or of one more token of hypotheses."""

    def made(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    rows = _COUNTED_ROWS
    with torch.no_grad(), LiveBytes() as counter:
        stand_in = _Attention(counter)
        if packed:
            cuts = made(2, dtype=torch.int32)
            inputs = {
                "inputs_embeds": made(1, rows, model.config.get_text_config().hidden_size, dtype=model.dtype),
                "position_ids": made(1, rows),
                "cu_seq_lens_q": cuts,
                "cu_seq_lens_k": cuts,
                "max_length_q": rows,
                "max_length_k": rows,
                "logits_to_keep": made(1),
            }
        else:
            inputs = {"inputs_embeds": model.get_input_embeddings()(made(rows, 1)), "position_ids": made(rows, 1)}
        try:
            model(**inputs, use_cache=False, span_cache=stand_in)
        except (RuntimeError, NotImplementedError) as error:
            raise ValueError(
                f"model: expected one whose forward pass runs on the meta device, to count its memory; "
                f"{type(model).__name__} does not: {error}"
            ) from error
    return PassBytes(-(-counter.peak // rows), -(-stand_in.live // rows), tuple(stand_in.shapes))


def on_meta(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """A tensor that has no memory, for `without_memory`."""
    return torch.empty(shape, dtype=dtype, device="meta")


def without_memory(model: Any, dtype: torch.dtype | None, empty: Callable[[torch.Size, torch.dtype], Tensor]) -> Any:
    """The model, or one of the configuration, of tensors that ``empty`` makes in place of the model's own.

    Its attention is ``span_cache.attend`` of the keyword argument ``span_cache`` that its forward pass then takes.
    """
    if isinstance(model, PretrainedConfig):
        dtype = dtype or getattr(model, "dtype", None) or torch.float32
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                copy.deepcopy(model), dtype=dtype, attn_implementation=_Attention.NAME
            )
    if not hasattr(model, "config"):
        raise TypeError(f"model: expected a transformers causal LM or its configuration, got {type(model).__name__}")
    _check_tensors(model)
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        wanted = tensor.dtype if dtype is None or not tensor.is_floating_point() else dtype
        made = empty(tensor.shape, wanted)
        memo[id(tensor)] = nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made
    copied = copy.deepcopy(model, memo)
    if copied.config._attn_implementation != _Attention.NAME:
        copied.set_attn_implementation(_Attention.NAME)
    return copied


def _check_tensors(model: Any) -> None:
    """Only a plain tensor has the bytes that it seems to have, and an empty copy that computes alike."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if type(tensor) not in (Tensor, nn.Parameter):
            raise TypeError(
                f"model: expected plain tensors, to predict what a memory_budget allows, got a {type(tensor).__name__} "
                f"({name}); leave memory_budget out and choose a batch_size"
            )
