# SPDX-License-Identifier: Apache-2.0
"""A pass of which few rows are read: the others need no more of the last layer than its keys and values.

A search reads what the model gives for the rows that end a prompt, and keeps keys and values of all. So of the last
layer the feed-forward network, most of a layer's work, takes those few rows alone, and on a CPU its attention does too.
What the pass gives for the other rows means nothing then.
"""

from __future__ import annotations

import weakref
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from patchkern.models.probe import base_of
from patchkern.ops.span_rows import are_few, worthwhile

_FEED_FORWARD = ("mlp", "feed_forward", "ffn", "block_sparse_moe")
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}

# whether a network takes each row by itself
_row_by_row: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


@contextmanager
def only(hf_model: Any, wanted: Tensor, rows: Tensor) -> Generator[Mapping[str, Any], None, None]:
    """Where it is open, the last layer computes little more than it must for the rows that are wanted.

    Args:
        hf_model: the model, in the state for a search.
        wanted: ``(M,)`` int64, on the rows' device.
        rows: ``(T, D)`` that the pass is over.

    Yields:
        Arguments of the model for this pass, which `patchkern.models.attention` reads.
    """
    layer = _last_layer(hf_model) if are_few(rows, wanted.shape[0]) else None
    if layer is None:
        yield {}
        return
    wanted = wanted if wanted.shape[0] else wanted.new_zeros(1)  # not every network takes no rows
    network = _feed_forward(layer, rows)
    total = rows.shape[0]

    def choose(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        states, *others = arguments
        return states[:, wanted.to(states.device)], *others

    def put_back(_: nn.Module, arguments: tuple[Any, ...], states: Tensor) -> Tensor:
        whole = states.new_zeros(states.shape[0], total, states.shape[2])
        return whole.index_copy_(1, wanted.to(states.device), states)

    handles = []
    try:
        if network is not None:
            handles.append(network.register_forward_pre_hook(choose))
            handles.append(network.register_forward_hook(put_back))
        yield {"wanted_rows": wanted} if worthwhile(rows, wanted.shape[0]) else {}
    finally:
        for handle in handles:
            handle.remove()


def _last_layer(hf_model: Any) -> nn.Module | None:
    """The decoder's; None where it is not known, compiled, or somebody listens to what the model or the layer gives."""
    decoder = base_of(hf_model).get_decoder()
    count = decoder.config.get_text_config().num_hidden_layers
    stacks = [part for part in decoder.children() if isinstance(part, nn.ModuleList) and len(part) == count]
    if len(stacks) != 1:
        return None
    layer = stacks[0][-1]
    around = (hf_model, base_of(hf_model), decoder, *layer.modules())
    return None if any(module._forward_hooks or _is_compiled(module) for module in around) else layer


def _is_compiled(module: nn.Module) -> bool:
    """The compiler does not see that hooks come and go."""
    return module._compiled_call_impl is not None or hasattr(module, "_orig_mod")


def _feed_forward(layer: nn.Module, rows: Tensor) -> nn.Module | None:
    """The layer's network of rows one by one, if it is one."""
    network = next((part for name in _FEED_FORWARD if (part := getattr(layer, name, None)) is not None), None)
    if not isinstance(network, nn.Module) or network._forward_pre_hooks:
        return None
    if network not in _row_by_row:
        _row_by_row[network] = _takes_rows_apart(network, rows)
    return network if _row_by_row[network] else None


def _takes_rows_apart(network: nn.Module, rows: Tensor) -> bool:
    """By a try: the same of a row alone as among others."""
    try:
        few = rows[None, torch.arange(4, device=rows.device) % rows.shape[0]]
        together, alone = network(few), network(few[:, 1:2])
    except Exception:  # more arguments than rows, more results: another kind of network
        return False
    if not isinstance(together, Tensor) or together.shape != few.shape:
        return False
    return torch.allclose(together[:, 1:2], alone, rtol=0, atol=_TOLERANCE[few.dtype] * float(together.abs().max()))
