# SPDX-License-Identifier: Apache-2.0
"""What a step learns from: windows of histories of which every position is a target, or the last alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import patchkern as pk
from patchkern.data import Interactions, Samples
from recipes.baselines.settings import Settings

_ALIKE = 0.1  # how far apart the lengths may be of windows that come together, as they need little padding then

Integers = NDArray[np.int64]


class Batch(NamedTuple):
    """Windows of histories and what follows in them.

    Attributes:
        histories: ``(B, L)`` int64 catalogue positions, oldest first, padded at the end.
        rows: ``(M,)`` int64, which of the ``B * L`` positions predict.
        targets: ``(M,)`` int64 catalogue positions, what follows each of these.
    """

    histories: Tensor
    rows: Tensor
    targets: Tensor


class Windows:
    """Parts of histories, as catalogue positions: from ``begins``, of so many items.

    Args:
        items: ``(N,)`` of all users, one after the other.
        begins, lengths: ``(W,)`` of each window, in ``items``; another item follows it there.
        every: whether all positions are targets, not the last alone.
    """

    def __init__(self, items: Integers, begins: Integers, lengths: Integers, *, every: bool) -> None:
        self.items, self.begins, self.lengths, self.every = items, begins, lengths, every

    def batch(self, chosen: Integers) -> Batch:
        """Some of them, padded to the longest."""
        begins, lengths = self.begins[chosen, None], self.lengths[chosen, None]
        within = np.arange(int(lengths.max()))
        places = begins + np.minimum(within, lengths - 1)
        predicts = within < lengths if self.every else within == lengths - 1
        tensors = self.items[places], np.flatnonzero(predicts), self.items[places[predicts] + 1]
        return Batch(*map(torch.from_numpy, tensors))

    def parts(self, size: int, random: np.random.Generator | None = None) -> list[Integers]:
        """All windows, those of like length together, in parts of at most ``size`` positions, padding included.

        Of so many windows where the last position alone is a target. Alike and in order without ``random``.
        """
        noise = 1.0 if random is None else random.uniform(1 - _ALIKE, 1 + _ALIKE, self.lengths.size)
        order = np.argsort(-self.lengths * noise, kind="stable")
        parts, longest, begin = [], 0, 0
        for place, length in enumerate(self.lengths[order].tolist()):
            longest = max(longest, length)
            if place > begin and (longest if self.every else 1) * (place + 1 - begin) > size:
                parts.append(order[begin:place])
                begin, longest = place, length
        parts.append(order[begin:])
        return parts if random is None else [parts[part] for part in random.permutation(len(parts))]


class TrainingHistories:
    """Every user's items before the validation range."""

    def __init__(self, data: Interactions, catalog: pk.Catalog) -> None:
        self.data, self.items = data, item_positions(data, catalog)
        self.begins, self.lengths = data.histories.offsets[:-1], data.ranges["train"][:, 1]
        if not (self.lengths > 1).any():
            raise ValueError(f"--data: expected a user with two training interactions, got none in {data.name!r}")

    def windows(self, settings: Settings, random: np.random.Generator) -> Windows:
        """Those of an epoch.

        Where all positions are targets, a history longer than the window is cut at a random place and at every window's
        length from there, and every item but a user's first is a target once. Else each training sample has its own.
        """
        if settings.targets == "last":
            return sample_windows(self.data, self.items, self.data.samples("train"), settings.window)
        begins, lengths = [], []
        for begin, length in zip(self.begins.tolist(), (self.lengths - 1).tolist(), strict=True):
            if length < 1:
                continue
            first = length if length <= settings.window else int(random.integers(1, settings.window + 1))
            cuts = [0, *range(first, length, settings.window), length]
            begins += [begin + cut for cut in cuts[:-1]]
            lengths += [end - cut for cut, end in zip(cuts[:-1], cuts[1:], strict=True)]
        return Windows(self.items, np.array(begins, np.int64), np.array(lengths, np.int64), every=True)

    def batches(self, settings: Settings, random: np.random.Generator) -> tuple[int, Iterator[Batch]]:
        """How many an epoch has, and these."""
        windows = self.windows(settings, random)
        parts = windows.parts(settings.batch, random)
        return len(parts), (windows.batch(part) for part in parts)


def item_positions(data: Interactions, catalog: pk.Catalog) -> Integers:
    """``(N,)`` catalogue positions of all interactions."""
    return catalog.index_of(data.histories.items).astype(np.int64)


def sample_windows(data: Interactions, items: Integers, samples: Samples, window: int) -> Windows:
    """The latest items before each sample's target."""
    lengths = np.minimum(samples.positions, window)
    begins = data.histories.offsets[samples.users] + samples.positions - lengths
    return Windows(items, begins, lengths, every=False)
