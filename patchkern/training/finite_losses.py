# SPDX-License-Identifier: Apache-2.0
"""Losses that are no numbers, noticed where they come from and without waiting for a GPU."""

from __future__ import annotations

from collections import deque

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Samples = tuple[NDArray[np.int64], NDArray[np.int64]]

_NAMED = 8  # samples in a message


class FiniteLosses:
    """Raises for the first loss that is NaN or infinite, naming the samples of its batch.

    A loss on the CPU is looked at at once. One on a GPU is copied to the host beside the work that goes on, and looked
    at when it is there: with one of the next losses, or in `wait`.
    """

    def __init__(self) -> None:
        self._on_the_way: deque[tuple[Tensor, torch.cuda.Event | None, int, Samples | None]] = deque()

    def add(self, loss: Tensor, step: int, samples: Samples | None) -> None:
        """Take note of a loss.

        Args:
            loss: a scalar.
            step: in which it was computed, for the message.
            samples: ``users`` (n,) and ``positions``, (n,) or first and last ones (n, 2), of its batch.

        Raises:
            FloatingPointError: for this loss or an earlier one.
        """
        loss, event = loss.detach(), None
        if loss.is_cuda:
            loss = torch.empty_like(loss, device="cpu", pin_memory=True).copy_(loss, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._on_the_way.append((loss, event, step, samples))
        while self._on_the_way:
            event = self._on_the_way[0][1]
            if event is not None and not event.query():
                break
            self._look()

    def wait(self) -> None:
        """Look at all that are on the way."""
        while self._on_the_way:
            event = self._on_the_way[0][1]
            if event is not None:
                event.synchronize()
            self._look()

    def _look(self) -> None:
        loss, _, step, samples = self._on_the_way.popleft()
        if not bool(torch.isfinite(loss).all()):
            raise FloatingPointError(
                f"loss: expected a finite number, got {float(loss)} in step {step}{_described(samples)}; an earlier "
                "step may have spoilt the weights: a lower learning rate, a lower max_grad_norm or bfloat16 instead of "
                "float16 help"
            )


def _described(samples: Samples | None) -> str:
    if samples is None:
        return ""
    each = [
        f"user {user} at position{f's {place[0]} to {place[-1]}' if len(place) > 1 else f' {place[0]}'}"
        for user, place in zip(
            samples[0][:_NAMED].tolist(), samples[1].reshape(len(samples[1]), -1)[:_NAMED].tolist(), strict=True
        )
    ]
    rest = len(samples[0]) - len(each)
    return f", whose batch has {', '.join(each)}{f' and {rest} more' if rest else ''} (numbers in histories)"
