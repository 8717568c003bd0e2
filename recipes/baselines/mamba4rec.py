# SPDX-License-Identifier: Apache-2.0
"""Mamba4Rec (Liu et al., 2024): a selective state space over the items of a history, in plain PyTorch."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recipes.baselines.sasrec import Blocks
from recipes.baselines.settings import Settings

STATES, EXPAND, KERNEL = 16, 2, 4
CHUNK = 8
"""positions whose states are in memory at once, few enough for a cache"""


def selective_scan(inputs: Tensor, steps: Tensor, rates: Tensor, write: Tensor, read: Tensor) -> Tensor:
    """What is read from a state that decays and is written to, position by position; differentiable in all arguments.

    With time t, sequence b, channel e and entry n of a channel's state,

        state[t, b, e, n] = exp(steps[t, b, e] * rates[e, n]) * state[t - 1, b, e, n]
                            + steps[t, b, e] * inputs[t, b, e] * write[t, b, n]
        output[t, b, e]   = sum over n of read[t, b, n] * state[t, b, e, n]

    States are N times as large as everything else. Only those between chunks are kept, the others are computed again
    for the gradients.

    Args:
        inputs, steps: ``(L, B, E)``; time comes first, so that a position is one piece of memory.
        rates: ``(E, N)``, below 0.
        write, read: ``(L, B, N)``.

    Returns:
        ``(L, B, E)``.
    """
    output: Tensor = _SelectiveScan.apply(inputs, steps, rates, write, read)
    return output


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, steps: Tensor, rates: Tensor, write: Tensor, read: Tensor) -> Tensor:
        output = torch.empty_like(inputs)
        state = inputs.new_zeros(inputs.shape[1], *rates.shape)
        kept = []
        for begin in range(0, inputs.shape[0], CHUNK):
            part = slice(begin, begin + CHUNK)
            kept.append(state)
            _, states = _states(state, inputs[part], steps[part], rates, write[part])
            output[part] = (states @ read[part].unsqueeze(3)).squeeze(3)
            state = states[-1].clone()
        ctx.save_for_backward(inputs, steps, rates, write, read, *kept)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        inputs, steps, rates, write, read, *kept = ctx.saved_tensors
        of_inputs, of_steps, of_write, of_read = map(torch.empty_like, (inputs, steps, write, read))
        of_rates = torch.zeros_like(rates)
        later = torch.zeros_like(kept[0])  # the gradient of a chunk's last state by all that comes after
        for number, before in reversed(list(enumerate(kept))):
            part = slice(number * CHUNK, (number + 1) * CHUNK)
            decay, states = _states(before, inputs[part], steps[part], rates, write[part])
            of_read[part] = (grad[part].unsqueeze(2) @ states).squeeze(2)
            of_states = grad[part].unsqueeze(3) * read[part].unsqueeze(2)
            of_states[-1] += later
            for time in range(len(of_states) - 2, -1, -1):
                of_states[time].addcmul_(decay[time + 1], of_states[time + 1])
            later = decay[0] * of_states[0]
            stepped = (of_states @ write[part].unsqueeze(3)).squeeze(3)
            of_inputs[part] = stepped * steps[part]
            of_write[part] = ((inputs[part] * steps[part]).unsqueeze(2) @ of_states).squeeze(2)
            # of the exponents: the decay times what it multiplied
            states[1:] = states[:-1].clone()
            states[0] = before
            exponents = of_states.mul_(decay).mul_(states)
            of_steps[part] = stepped * inputs[part] + (exponents * rates).sum(3)
            of_rates += (exponents * steps[part].unsqueeze(3)).sum((0, 1))
        return of_inputs, of_steps, of_rates, of_write, of_read


def _states(state: Tensor, inputs: Tensor, steps: Tensor, rates: Tensor, write: Tensor) -> tuple[Tensor, Tensor]:
    """``(T, B, E, N)`` decays and states of a chunk that begins after ``state``."""
    decay = (steps.unsqueeze(3) * rates).exp_()
    states = (steps * inputs).unsqueeze(3) * write.unsqueeze(2)
    for time in range(len(states)):
        states[time].addcmul_(decay[time], state)
        state = states[time]
    return decay, states


class SelectiveStateSpace(nn.Module):
    """Mamba's block (Gu and Dao, 2023): ``(B, L, D)`` to ``(B, L, D)``, in `STATES` entries a channel.

    How far a state decays, what is written to it and what is read from it depend on the item.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        width, inner = settings.width, EXPAND * settings.width
        self.rank = math.ceil(width / 16)
        self.inputs = nn.Linear(width, 2 * inner, bias=False)
        self.latest = nn.Conv1d(inner, inner, KERNEL, groups=inner)
        self.selects = nn.Linear(inner, self.rank + 2 * STATES, bias=False)
        self.steps = nn.Linear(self.rank, inner)
        self.log_rates = nn.Parameter(torch.arange(1, STATES + 1.0).log().repeat(inner, 1))
        self.skip = nn.Parameter(torch.ones(inner))
        self.output = nn.Linear(inner, width, bias=False)

    def start_steps(self) -> None:
        """Steps between 0.001 and 0.1, evenly in the logarithm: memories of different lengths."""
        with torch.no_grad():
            steps = torch.exp(torch.rand_like(self.steps.bias) * math.log(100) + math.log(0.001))
            self.steps.bias.copy_(steps + torch.log(-torch.expm1(-steps)))  # the inverse of softplus
            nn.init.uniform_(self.steps.weight, -(self.rank**-0.5), self.rank**-0.5)

    def forward(self, vectors: Tensor) -> Tensor:
        inner, gate = self.inputs(vectors).chunk(2, dim=2)
        inner = F.silu(self.latest(F.pad(inner.transpose(1, 2), (KERNEL - 1, 0)))).permute(2, 0, 1)  # (L, B, E)
        steps, write, read = self.selects(inner).split([self.rank, STATES, STATES], dim=2)
        steps = F.softplus(self.steps(steps))
        output = selective_scan(inner, steps, -self.log_rates.exp(), write, read) + self.skip * inner
        mixed: Tensor = self.output(output.transpose(0, 1) * F.silu(gate))
        return mixed


def mamba4rec(settings: Settings) -> nn.Module:
    return Blocks(settings, SelectiveStateSpace, positions=False)
