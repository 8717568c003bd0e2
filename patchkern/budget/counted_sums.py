# SPDX-License-Identifier: Apache-2.0
"""Sums of gradients in a training step that is counted: where autograd adds one to another in its place.

A gradient that comes in parts is summed by autograd as the parts arrive. It adds to the first, unless that is a view or
someone else still needs it; then it makes a third tensor for the sum. While a `TorchDispatchMode` is active, though, it
always makes one: a count has to decide by itself.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

References = tuple[int, int]
"""To a tensor and to its storage."""


def is_in_place(func: Any, args: tuple[Any, ...], sole: References) -> bool:
    """Whether this operator, inside the ``__torch_dispatch__`` of a mode, would add to its first argument.

    Args:
        sole: of `sole_references`.
    """
    return _is_sum_of_gradients(func) and not args[0]._is_view() and _references(args[0]) == sole


def _is_sum_of_gradients(func: Any) -> bool:
    """A sum in a backward pass, but not in what is computed again: only that records gradients."""
    if func is not torch.ops.aten.add.Tensor or torch.is_grad_enabled():
        return False
    return torch._C._current_graph_task_id() != -1


def _references(tensor: Tensor) -> References:
    """Those of the call included."""
    return tensor._use_count(), torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)  # type: ignore[attr-defined]


class _Probe(TorchDispatchMode):
    """Notes the references to a gradient that nothing but autograd has."""

    def __init__(self) -> None:
        super().__init__()
        self.found: References = (0, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        self._note(func, args)
        return func(*args, **(kwargs or {}))

    def _note(self, func: Any, args: tuple[Any, ...]) -> None:
        """At the depth of calls at which `is_in_place` looks."""
        if _is_sum_of_gradients(func):
            self.found = _references(args[0])


@cache
def sole_references() -> References:
    """Of a gradient that nobody else needs, as `is_in_place` sees it; outside of any backward pass."""
    with torch.enable_grad():
        leaf = torch.empty(2, device="meta", requires_grad=True)
        with _Probe() as probe:
            (leaf.exp() + leaf.sin()).sum().backward()
    return probe.found
