# SPDX-License-Identifier: Apache-2.0
"""What is minimised, given the states that predict."""

from __future__ import annotations

import time

import torch
from torch import Tensor
from torch.nn import functional as F

from patchkern.ops.item_softmax import item_softmax


def softmax(states: Tensor, vectors: Tensor, bias: Tensor, targets: Tensor, *, bf16: bool) -> Tensor:
    """The mean cross-entropy over all items, exact but for the rounding of products where these are in bfloat16.

    Args:
        states: ``(M, D)``.
        vectors, bias: ``(n, D)`` and ``(n,)`` of the items.
        targets: ``(M,)`` int64.
    """
    with torch.autocast(states.device.type, torch.bfloat16, enabled=bf16):
        return item_softmax(states, vectors, bias, targets) / len(targets)


def binary(states: Tensor, vectors: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    """The mean binary cross-entropy of each target against one other item, drawn at random from all.

    Arguments as of `softmax`.
    """
    drawn = torch.randint(len(vectors) - 1, targets.shape, device=targets.device)
    both = torch.stack([targets, drawn + (drawn >= targets)], dim=1)
    scores = (F.embedding(both, vectors) * states[:, None]).sum(2) + F.embedding(both, bias[:, None]).squeeze(2)
    return F.softplus(torch.stack([-scores[:, 0], scores[:, 1]])).sum(0).mean()


def bf16_pays(n_items: int, width: int, device: torch.device) -> bool:
    """Whether products of the softmax are faster in bfloat16: on a CPU a short measurement."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        rows, items = torch.ones(128, width, dtype=dtype), torch.ones(n_items, width, dtype=dtype)
        times = []
        for _ in range(5):
            begin = time.perf_counter()
            rows @ items.T
            times.append(time.perf_counter() - begin)
        seconds[dtype] = min(times)
    return seconds[torch.bfloat16] < seconds[torch.float32]
