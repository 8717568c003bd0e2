# SPDX-License-Identifier: Apache-2.0
"""bfloat16: whether it pays to compute in it, and where weights in it stand still."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from patchkern.batch.layout import PatchLayout
from patchkern.training.modes import in_mode
from patchkern.training.protocol import TrainableModel

_ROUNDS = 4
_SECONDS = 3.0  # after which no further round begins
_PRODUCT = 512  # rows and columns
_GAIN = 1.2  # a gain that is smaller may be another one the next time


class Speed(NamedTuple):
    """Seconds of a forward and backward pass."""

    float32: float
    bfloat16: float

    @property
    def bfloat16_pays(self) -> bool:
        """By a fifth or more, so that two starts of one run seldom differ."""
        return self.bfloat16 * _GAIN <= self.float32

    def __str__(self) -> str:
        return f"float32 {self.float32:.3f} s, bfloat16 {self.bfloat16:.3f} s a pass"


def measure_autocast(model: TrainableModel, layout: PatchLayout) -> Speed:
    """The best of a few passes in each, in turns: seconds at most, unless a single pass takes longer.

    Weights, gradients, mode and random numbers are left as they were.

    Args:
        model: with float32 weights, where it will be trained.
        layout: with targets, and of a few hundred rows.
    """
    gradients = [parameter.grad for parameter in model.parameters()]
    best = {torch.float32: float("inf"), torch.bfloat16: float("inf")}
    started = time.perf_counter()
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), in_mode(model, training=True):
        for number in range(_ROUNDS):
            for dtype in best:
                begin = time.perf_counter()
                with torch.autocast(model.device.type, torch.bfloat16, enabled=dtype is torch.bfloat16):
                    loss = model(layout).loss
                loss.backward()
                float(loss.detach())  # waits for a GPU
                best[dtype] = min(best[dtype], time.perf_counter() - begin)
            if number and time.perf_counter() - started > _SECONDS:
                break
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        parameter.grad = gradient
    return Speed(best[torch.float32], best[torch.bfloat16])


def product_ratio(device: torch.device) -> float:
    """How many times as long a product in bfloat16 takes as one in float32: ten and more where a CPU must emulate it.

    Milliseconds to tell what a pass would take minutes for.
    """
    best = []
    for dtype in (torch.float32, torch.bfloat16):
        rows = torch.ones(_PRODUCT, _PRODUCT, dtype=dtype, device=device)
        seconds = []
        for _ in range(_ROUNDS):
            begin = time.perf_counter()
            float((rows @ rows)[0, 0])  # waits for a GPU
            seconds.append(time.perf_counter() - begin)
        best.append(min(seconds))
    return best[1] / best[0]


def share_at_rest(parameters: Iterable[Tensor], learning_rate: float) -> float:
    """Share of the bfloat16 weights that a step of ``learning_rate`` rounds back to what they were.

    An optimiser of Adam's kind moves a weight by about its rate, and bfloat16 has eight binary digits. 0 without any
    weight in bfloat16.
    """
    weights = at_rest = 0
    for parameter in parameters:
        if parameter.dtype is torch.bfloat16:
            exponent = torch.frexp(parameter.detach().float()).exponent
            half_a_digit = torch.exp2(exponent.float() - 9)
            weights += parameter.numel()
            at_rest += int((half_a_digit > learning_rate).sum())
    return at_rest / weights if weights else 0.0
