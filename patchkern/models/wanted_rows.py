# SPDX-License-Identifier: Apache-2.0
"""A pass of which few rows are read: the others need no more of the last layer than its keys and values.

A search reads what the model gives for the rows that end a prompt, and a loss what it gives for the rows with a label.
So of the last layer the feed-forward network, most of a layer's work, takes those few rows alone; in a search on a CPU
its attention does too, from their queries to its output. What the pass gives for the other rows means nothing then.
"""

from __future__ import annotations

import weakref
from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from patchkern.models.probe import base_of
from patchkern.ops.last_layer import decoder_of, feed_forward, for_rows, last_layer, query_and_output, recomputes
from patchkern.ops.span_rows import are_few, worthwhile

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}

# whether a network takes each row by itself
_row_by_row: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


@contextmanager
def only(hf_model: Any, wanted: Tensor, rows: Tensor) -> Generator[Mapping[str, Any], None, None]:
    """Where it is open, the last layer computes little more than it must for the rows that are wanted.

    Args:
        hf_model: the model, which no other thread runs meanwhile.
        wanted: ``(M,)`` int64, on the rows' device.
        rows: ``(T, D)`` that the pass is over.

    Yields:
        Arguments of the model for this pass if it is a search's, which `patchkern.models.attention` reads.
    """
    layer = _last_layer(hf_model) if are_few(rows, wanted.shape[0]) and not torch.compiler.is_compiling() else None
    if layer is None:
        yield {}
        return
    wanted = wanted if wanted.shape[0] else wanted.new_zeros(1)  # not every network takes no rows
    with ExitStack() as opened:
        network = feed_forward(layer)
        if network is not None and not network._forward_pre_hooks and _takes_rows_apart(network, rows):
            opened.enter_context(for_rows(network, wanted))
        attends = worthwhile(rows, wanted.shape[0])
        if attends and not torch.is_grad_enabled():
            for projection in query_and_output(layer):
                if not projection._forward_pre_hooks:
                    opened.enter_context(for_rows(projection, wanted))
        yield {"wanted_rows": wanted} if attends else {}


def _last_layer(hf_model: Any) -> nn.Module | None:
    """The decoder's; None where it is not known, or others would see that hooks come and go, or that rows are zeros."""
    base, decoder = base_of(hf_model), decoder_of(hf_model)
    layer = last_layer(decoder)
    if layer is None or recomputes(decoder, layer):
        return None
    after = [part for part in decoder.children() if not isinstance(part, (nn.ModuleList, nn.Embedding))]
    around = (hf_model, base, decoder, *after, *layer.modules())
    return None if any(module._forward_hooks or _is_wrapped(module) for module in around) else layer


def _is_wrapped(module: nn.Module) -> bool:
    """By the compiler, or to recompute activations."""
    is_compiled = module._compiled_call_impl is not None
    return is_compiled or hasattr(module, "_orig_mod") or hasattr(module, "_checkpoint_wrapped_module")


def _takes_rows_apart(network: nn.Module, rows: Tensor) -> bool:
    if network not in _row_by_row:
        training = [module for module in network.modules() if module.training]
        try:
            for module in training:
                module.training = False
            _row_by_row[network] = _is_alone_as_among_others(network, rows)
        finally:
            for module in training:
                module.training = True
    return _row_by_row[network]


@torch.no_grad()
def _is_alone_as_among_others(network: nn.Module, rows: Tensor) -> bool:
    try:
        few = rows[None, torch.arange(4, device=rows.device) % rows.shape[0]]
        together, alone = network(few), network(few[:, 1:2])
    except Exception:  # more arguments than rows, more results: another kind of network
        return False
    if not isinstance(together, Tensor) or together.shape != few.shape:
        return False
    tolerance = _TOLERANCE[together.dtype] * float(together.abs().max())
    return torch.allclose(together[:, 1:2], alone, rtol=0, atol=tolerance)
