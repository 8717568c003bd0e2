# SPDX-License-Identifier: Apache-2.0
"""What a run consumes, in order: slots of one sample each, or passes of many targets.

A run is a row of *slots*, one per sample it consumes. Slot n belongs to optimisation step n // (samples per step) and
to epoch n // (samples of the data set), whose permutation gives its sample. So shuffling, the patch pre-training
schedule and its draws depend on the slot alone: the same under data-loader workers, data parallelism and resuming.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset


class Slot(NamedTuple):
    """One sample at its place in the run."""

    number: int
    step: int
    user: int
    position: int


class SlotDataset(Dataset[Slot]):
    """All slots of a run, in order; read them sequentially.

    Every step is full: what the last one lacks comes from the next epoch's permutation.

    Args:
        users, positions: ``(S,)`` the samples, as in `Histories.before`.
        steps: optimisation steps of the run.
        samples_per_step: over all processes and accumulated batches.
        seed: of the permutations.
    """

    def __init__(
        self, users: NDArray[np.int64], positions: NDArray[np.int64], steps: int, samples_per_step: int, seed: int
    ) -> None:
        self.users, self.positions = users, positions
        self.steps, self.samples_per_step, self.seed = steps, samples_per_step, seed

    def __len__(self) -> int:
        return self.steps * self.samples_per_step

    @property
    def num_targets(self) -> int:
        """Targets that the whole run learns, repeated ones included."""
        return len(self)

    def __getitem__(self, number: int) -> Slot:
        epoch, nth = divmod(number, self.users.size)
        sample = _permutation(self.seed, epoch, self.users.size)[nth]
        return Slot(number, number // self.samples_per_step, int(self.users[sample]), int(self.positions[sample]))


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, size: int) -> NDArray[np.int64]:
    return np.random.default_rng((seed, epoch)).permutation(size)


# ------------------------------------------------------------------ passes


class Pass(NamedTuple):
    """Targets that one forward pass learns together, at their place in the run."""

    number: int
    step: int
    users: NDArray[np.int64]
    ranges: NDArray[np.int64]
    """``(n, 2)`` first and last target position of each user"""


class PassDataset(Dataset[Pass]):
    """All passes of a run, in order; read them sequentially.

    Every epoch is a new permutation of the users, packed greedily into passes of at most ``rows_per_pass`` rows. A user
    whose targets need more than that is cut into runs of consecutive targets.

    Args:
        users, positions: ``(S,)`` the samples, as in `Histories.before`.
        count_rows: the rows that ``(n,)`` users with ``(n, 2)`` target ranges take.
        rows_per_pass: the most rows of a pass.
        epochs: passes over the samples that make the run, where ``steps`` is None.
        steps: optimisation steps of the run.
        passes_per_step: over all processes and accumulated batches.
        seed: of the permutations.

    Raises:
        ValueError: a target that alone needs more than ``rows_per_pass`` rows.
    """

    def __init__(
        self,
        users: NDArray[np.int64],
        positions: NDArray[np.int64],
        count_rows: Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.int64]],
        rows_per_pass: int,
        epochs: float,
        steps: int | None,
        passes_per_step: int,
        seed: int,
    ) -> None:
        self._users, self._ranges, rows = cut_to_passes(users, positions, count_rows, rows_per_pass)
        self.passes_per_step = passes_per_step
        stream = _pack(rows, rows_per_pass, seed)
        self._passes: list[NDArray[np.int64]] = []
        if steps is None:
            left = math.ceil(epochs * rows.size)
            while left > 0:
                self._passes.append(next(stream))
                left -= self._passes[-1].size
            steps = math.ceil(len(self._passes) / passes_per_step)
        self.steps = steps
        while len(self._passes) < len(self):
            self._passes.append(next(stream))

    def __len__(self) -> int:
        return self.steps * self.passes_per_step

    @property
    def num_targets(self) -> int:
        """Targets that the whole run learns, repeated ones included."""
        counts = self._ranges[:, 1] - self._ranges[:, 0] + 1
        return int(sum(counts[runs].sum() for runs in self._passes))

    def __getitem__(self, number: int) -> Pass:
        runs = self._passes[number]
        return Pass(number, number // self.passes_per_step, self._users[runs], self._ranges[runs])


def cut_to_passes(
    users: NDArray[np.int64],
    positions: NDArray[np.int64],
    count_rows: Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.int64]],
    rows_per_pass: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Users, ranges and rows of the longest runs of consecutive targets that fit a pass; arguments of `PassDataset`."""
    order = np.lexsort((positions, users))
    users, positions = users[order], positions[order]
    begins = np.append(True, (np.diff(users) != 0) | (np.diff(positions) != 1)) if users.size else np.zeros(0, bool)
    while True:
        first = np.flatnonzero(begins)
        last = np.append(first[1:], users.size) - 1
        ranges = np.stack([positions[first], positions[last]], axis=1)
        rows = count_rows(users[first], ranges)
        large = np.flatnonzero(rows > rows_per_pass)
        if large.size == 0:
            return users[first], ranges, rows
        alone = large[first[large] == last[large]]
        if alone.size:
            at = int(alone[0])
            raise ValueError(
                f"rows_per_pass: expected at least {rows[at]} for the target of user {users[first[at]]} at position "
                f"{positions[first[at]]}, got {rows_per_pass}"
            )
        begins[(first[large] + last[large] + 1) // 2] = True


def _pack(rows: NDArray[np.int64], rows_per_pass: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """Runs of one permutation after the other, in passes that are full but for what does not fit any more."""
    taken: list[int] = []
    filled = 0
    for epoch in itertools.count():
        for run in np.random.default_rng((seed, epoch)).permutation(rows.size).tolist():
            if taken and filled + rows[run] > rows_per_pass:
                yield np.array(taken)
                taken, filled = [], 0
            taken.append(run)
            filled += int(rows[run])
