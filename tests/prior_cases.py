# SPDX-License-Identifier: Apache-2.0
"""Priors of the tests' own making, and interactions to count the ready-made ones from."""

from __future__ import annotations

from typing import Any

import numpy as np
from cases import make_catalog

import patchkern as pk
from patchkern.data import Interactions, leave_one_out


def random_prior(n_users: int, n_items: int, scale: float = 3.0, seed: int = 0) -> np.ndarray:
    return scale * np.random.default_rng(seed).standard_normal((n_users, n_items))


class Lookup:
    """A prior of the user's own making: knows histories by their content, and notes how it is asked."""

    def __init__(self, histories: Any, table: Any) -> None:
        self.rows = {tuple(history): row for history, row in zip(histories, table, strict=True)}
        self.asked: list[list[tuple[Any, ...]]] = []

    def __call__(self, histories: pk.Histories) -> np.ndarray:
        self.asked.append([tuple(history.tolist()) for history in histories])
        return np.stack([self.rows[history] for history in self.asked[-1]])


def table_with(value: float) -> np.ndarray:
    table = np.zeros((2, 9))
    table[1, 4] = value
    return table


def toy(histories: list[list[int]], order: Any = range(8)) -> tuple[Interactions, pk.Catalog]:
    """Training interactions (all but two of each user), and a catalogue in some order of its own."""
    rows = [(user, item, time) for user, items in enumerate(histories) for time, item in enumerate(items)]
    table = np.array(rows, np.int64).reshape(-1, 3)
    data = leave_one_out(
        Interactions.from_columns(table[:, 0], table[:, 1], table[:, 2], {item: f"Title {item}" for item in range(8)})
    )
    return data, make_catalog({item: [item + 1] for item in order})
