# SPDX-License-Identifier: Apache-2.0
"""What a run consumes, in order: slots of one sample each, or passes of many targets.

A run is a row of *slots*, one per sample it consumes. Slot n belongs to optimisation step n // (samples per step) and
to epoch n // (samples of the data set), whose permutation gives its sample. So shuffling, the patch pre-training
schedule and its draws depend on the slot alone: the same under data-loader workers, data parallelism and resuming.
"""

from __future__ import annotations

import itertools
import math
import sys
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


CountRows = Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.int64]]

_LOOK_AHEAD = 128  # runs among which the one that fits best is looked for
_FULL_STEP = 0.9  # least share of its targets that a step must have where passes are too short for all


class Pass(NamedTuple):
    """Targets that one forward pass learns together, at their place in the run."""

    number: int
    step: int
    users: NDArray[np.int64]
    ranges: NDArray[np.int64]
    """``(n, 2)`` first and last target position of each user"""


class Run(NamedTuple):
    """Consecutive targets of a user."""

    user: int
    first: int
    last: int
    rows: int

    @property
    def targets(self) -> int:
        return self.last - self.first + 1


class PassDataset(Dataset[Pass]):
    """All passes of a run, in order; read them sequentially.

    A user whose targets need more than a pass is cut into runs of consecutive targets, each as long as fits. Every
    epoch is a new permutation of the runs. A pass begins with the first run that waits, and takes the largest of the
    next few that still fits, until none does; so passes are nearly full, and runs stay near their places.

    With ``targets_per_step`` a step ends with so many targets, cutting a run in two where need be, and has as many
    passes as that takes, evenly filled: the steps of a run are of one size, whatever the rows of its targets.

    Args:
        users, positions: ``(S,)`` the samples, as in `Histories.before`.
        count_rows: the rows that ``(n,)`` users with ``(n, 2)`` target ranges take.
        rows_per_pass: the most rows of a pass.
        epochs: passes over the samples that make the run, where ``steps`` is None.
        steps: optimisation steps of the run.
        passes_per_step: over all processes and accumulated batches; with ``targets_per_step`` it becomes the least
            multiple of this that holds a step.
        seed: of the permutations.
        targets_per_step: None: as many as the passes have.

    Raises:
        ValueError: a target that alone needs more than ``rows_per_pass`` rows, or a step of fewer targets than passes.
    """

    def __init__(
        self,
        users: NDArray[np.int64],
        positions: NDArray[np.int64],
        count_rows: CountRows,
        rows_per_pass: int,
        epochs: float,
        steps: int | None,
        passes_per_step: int,
        seed: int,
        targets_per_step: int | None = None,
    ) -> None:
        runs = cut_to_passes(users, positions, count_rows, rows_per_pass)
        packing = _Packing(runs, count_rows, rows_per_pass, seed, passes_per_step, targets_per_step)
        self.rows_per_pass, self.passes_per_step = rows_per_pass, packing.passes_per_step
        stream = packing.passes()
        self._passes: list[list[Run]] = []
        if steps is None:
            left = math.ceil(epochs * sum(run.targets for run in runs))
            while left > 0:
                self._passes.append(next(stream))
                left -= _targets(self._passes[-1])
            steps = math.ceil(len(self._passes) / self.passes_per_step)
        self.steps = steps
        self._passes += itertools.islice(stream, len(self) - len(self._passes))

    def __len__(self) -> int:
        return self.steps * self.passes_per_step

    @property
    def num_targets(self) -> int:
        """Targets that the whole run learns, repeated ones included."""
        return int(self.step_targets().sum())

    def step_targets(self) -> NDArray[np.int64]:
        """``(steps,)`` targets of each step."""
        return np.array([_targets(runs) for runs in self._passes]).reshape(self.steps, -1).sum(axis=1)

    def fullness(self) -> float:
        """Rows of all passes, as a share of the rows that they may have."""
        return sum(run.rows for runs in self._passes for run in runs) / (self.rows_per_pass * len(self))

    def __getitem__(self, number: int) -> Pass:
        runs = self._passes[number]
        users, ranges = (np.array(columns) for columns in ([run.user for run in runs], [run[1:3] for run in runs]))
        return Pass(number, number // self.passes_per_step, users, ranges)


def cut_to_passes(
    users: NDArray[np.int64], positions: NDArray[np.int64], count_rows: CountRows, rows_per_pass: int
) -> list[Run]:
    """The longest runs of consecutive targets that fit a pass; arguments of `PassDataset`."""
    order = np.lexsort((positions, users))
    users, positions = users[order], positions[order]
    begins = np.append(True, (np.diff(users) != 0) | (np.diff(positions) != 1)) if users.size else np.zeros(0, bool)
    first = np.flatnonzero(begins)
    last = np.append(first[1:], users.size) - 1

    def rows_of(first: NDArray[np.int64], last: NDArray[np.int64]) -> NDArray[np.int64]:
        return count_rows(users[first], np.stack([positions[first], positions[last]], axis=1))

    runs: list[Run] = []
    while first.size:
        # the last target of each run is found by bisection: more targets take more rows
        rows = rows_of(first, last)
        low, high = np.where(rows <= rows_per_pass, last, first), last.copy()
        while (between := np.flatnonzero(low < high)).size:
            middle = (low[between] + high[between] + 1) // 2
            fits = rows_of(first[between], middle) <= rows_per_pass
            low[between[fits]] = middle[fits]
            high[between[~fits]] = middle[~fits] - 1
        rows = rows_of(first, low)
        if (rows > rows_per_pass).any():
            each = np.arange(users.size)
            alone = rows_of(each, each)
            at = int(np.argmax(alone))
            raise ValueError(
                f"rows_per_pass: expected at least {alone[at]} for the target of user {users[at]} at position "
                f"{positions[at]}, which needs the most, got {rows_per_pass}"
            )
        columns = np.stack([users[first], positions[first], positions[low], rows], axis=1)
        runs += (Run(*run) for run in columns.tolist())
        rest = low < last
        first, last = low[rest] + 1, last[rest]
    return sorted(runs)


class _Packing:
    """Runs of one permutation after the other, in passes that are full but for what does not fit any more."""

    def __init__(
        self,
        runs: list[Run],
        count_rows: CountRows,
        rows_per_pass: int,
        seed: int,
        passes_per_step: int,
        targets_per_step: int | None,
    ) -> None:
        self.runs, self.count_rows, self.rows_per_pass, self.seed = runs, count_rows, rows_per_pass, seed
        self.targets_per_step, self.passes_per_step = targets_per_step, passes_per_step
        if targets_per_step is not None and runs:
            self._choose_passes(targets_per_step)

    def _choose_passes(self, targets_per_step: int) -> None:
        """The fewest passes in which the steps come out with their targets: those of the first epoch, tried."""
        multiple, targets = self.passes_per_step, _targets(self.runs)
        rows_per_step = targets_per_step * sum(run.rows for run in self.runs) / targets
        self.passes_per_step = math.ceil(rows_per_step / self.rows_per_pass / multiple) * multiple
        while self.passes_per_step <= targets_per_step:
            stream = self.passes()
            steps = (
                sum(map(_targets, itertools.islice(stream, self.passes_per_step)))
                for _ in range(math.ceil(targets / targets_per_step))
            )
            if all(step >= _FULL_STEP * targets_per_step for step in steps):
                return
            self.passes_per_step += multiple
        raise ValueError(
            f"targets_per_step: expected at least {self.passes_per_step}, the passes of a step, got {targets_per_step};"
            " more rows_per_pass, or fewer processes, make it fewer passes"
        )

    def passes(self) -> Iterator[list[Run]]:
        """Without end."""
        targets_per_step = self.targets_per_step or sys.maxsize
        taken: list[Run] = []
        room, passes, left = self.rows_per_pass, self.passes_per_step, targets_per_step
        share = math.ceil(left / passes)
        for epoch in itertools.count():
            waiting = iter(np.random.default_rng((self.seed, epoch)).permutation(len(self.runs)).tolist())
            window = [self.runs[number] for number in itertools.islice(waiting, _LOOK_AHEAD)]
            while window:
                fitting = [(run.rows, -at) for at, run in enumerate(window) if run.rows <= room]
                if share <= 0 or not fitting:
                    yield taken
                    passes -= 1
                    if passes == 0:
                        passes, left = self.passes_per_step, targets_per_step
                    taken, room, share = [], self.rows_per_pass, math.ceil(left / passes)
                    continue
                at = -max(fitting)[1] if taken else 0
                run = window.pop(at)
                most = left - (passes - 1)  # a target for each pass after this
                if run.targets > most:
                    run, rest = self._split(run, most)
                    window.insert(at, rest)
                taken.append(run)
                room, left, share = room - run.rows, left - run.targets, share - run.targets
                window += (self.runs[number] for number in itertools.islice(waiting, _LOOK_AHEAD - len(window)))

    def _split(self, run: Run, targets: int) -> tuple[Run, Run]:
        """The run's first targets, and the rest."""
        middle = run.first + targets
        ranges = np.array([(run.first, middle - 1), (middle, run.last)])
        first, second = self.count_rows(np.array([run.user] * 2), ranges).tolist()
        return Run(run.user, run.first, middle - 1, first), Run(run.user, middle, run.last, second)


def _targets(runs: list[Run]) -> int:
    return sum(run.targets for run in runs)
