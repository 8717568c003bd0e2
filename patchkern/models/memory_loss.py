# SPDX-License-Identifier: Apache-2.0
"""What trains a recurrent memory: which options its loss has, the loss's parts, and the map of states to rows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from patchkern.batch.layout import PatchLayout
from patchkern.batch.policies import SessionPatches
from patchkern.batch.preference_memory import PreferenceMemory
from patchkern.models import wrapped

REDUCTIONS = ("mean", "sum")
"""Of the squared differences between a memory and its reference."""

_EPSILON = 1e-6


@dataclass(frozen=True)
class MemoryOptions:
    """How a `patchkern.RecurrentMemory` is trained, which documents them, and makes memories.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came; among them options with which
            nothing would train what a memory says.
    """

    consistency: float = 1.0
    reduction: str = "mean"
    detach_memory: bool = False
    detach_reference: bool = True
    reference_loss: float = 0.0
    rollout: float = 0.0
    one_time: bool = False

    def __post_init__(self) -> None:
        for name in ("detach_memory", "detach_reference", "one_time"):
            switch = getattr(self, name)
            if not isinstance(switch, bool):
                raise TypeError(f"{name}: expected a bool, got {type(switch).__name__}")
        for name in ("consistency", "reference_loss", "rollout"):
            number = getattr(self, name)
            if isinstance(number, bool) or not isinstance(number, (int, float)):
                raise TypeError(f"{name}: expected a number, got {type(number).__name__}")
            if not 0 <= number < (1 if name == "rollout" else math.inf):
                below = "below 1" if name == "rollout" else "finite"
                raise ValueError(f"{name}: expected a number of at least 0, {below}, got {number}")
            object.__setattr__(self, name, float(number))
        if self.reduction not in REDUCTIONS:
            raise ValueError(f"reduction: expected one of {', '.join(REDUCTIONS)}, got {self.reduction!r}")
        if self.detach_memory and (self.detach_reference or self.consistency == 0):
            raise ValueError(
                "detach_memory: expected False with detach_reference or without consistency, as nothing would train "
                "what a memory says, got True"
            )

    def check_model(self, policy: PreferenceMemory, item_head: Any) -> None:
        """Raise a ValueError for a model that cannot be trained so."""
        if self.reference_loss and item_head is None:
            raise ValueError("reference_loss: expected 0 for a model without an item head, got more")
        if self.reference_loss and isinstance(policy.policy, SessionPatches):
            raise ValueError("reference_loss: expected 0 with sessions, whose items have no rows, got more")


@dataclass
class MemoryOutput(ModelOutput):
    """What a training pass gives, `RecurrentMemory.forward`.

    Attributes:
        loss: the sum of the others, each with its weight.
        next_item: of the targets, read from memory and recent items.
        consistency: between updates and references, not yet weighted.
        reference: of the same targets, read from the whole history; None without ``reference_loss``.
    """

    loss: Tensor | None = None
    next_item: Tensor | None = None
    consistency: Tensor | None = None
    reference: Tensor | None = None


class MemoryMap(nn.Module):
    """g: a language model's last states as rows that it can read, ``RMSNorm(x) * scale``.

    Attributes:
        scale: ``(D,)``, at first the root mean square of the embedding's entries.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        rms = weight.detach().float().square().mean().sqrt()
        self.scale = nn.Parameter(rms.to(weight.dtype).expand(weight.shape[1]).clone())

    def forward(self, states: Tensor) -> Tensor:
        """``(..., D)``."""
        wide = states.to(torch.promote_types(states.dtype, torch.float32))
        normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + _EPSILON)
        return normed.to(states.dtype) * self.scale


def distance(updates: Tensor, references: Tensor, reduction: str) -> Tensor:
    """The mean over ``(U, C, D)`` memories of their squared distance, 0 without any."""
    wide = torch.promote_types(updates.dtype, torch.float32)
    squared = (updates.to(wide) - references.to(wide)).square().flatten(1)
    each = squared.mean(dim=1) if reduction == "mean" else squared.sum(dim=1)
    return each.sum() / max(each.shape[0], 1)


def share(layout: PatchLayout, counts: wrapped.Counts) -> Any:
    """Of a step's labels, those of this pass."""
    if layout.logit_labels is not None:
        return 1.0 if counts.titles is None else layout.logit_labels.shape[0] / counts.titles
    count = 0 if layout.item_labels is None else layout.item_labels.shape[0]
    return 1.0 if counts.items is None else count / counts.items
