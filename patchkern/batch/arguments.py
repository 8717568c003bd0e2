# SPDX-License-Identifier: Apache-2.0
"""What a caller gives, checked by name: numbers, counts, offsets."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray


def check_count(name: str, value: int, minimum: int, maximum: int = 2**31 - 1) -> None:
    """Raise unless ``value`` is an integer in ``minimum..maximum``."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
    if not minimum <= value <= maximum:
        raise ValueError(f"{name}: expected an integer in {minimum}..{maximum}, got {value}")


def check_number(
    name: str, value: float, *, minimum: float | None = None, above: float | None = None, below: float = math.inf
) -> None:
    """Raise unless ``value`` is a finite number in the range."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    is_high_enough = (minimum is None or value >= minimum) and (above is None or value > above)
    if not (math.isfinite(value) and is_high_enough and value < below):
        limits = [] if minimum is None else [f"of at least {minimum:g}"]
        limits += [] if above is None else [f"above {above:g}"]
        limits += [] if below == math.inf else [f"and below {below:g}" if limits else f"below {below:g}"]
        raise ValueError(f"{name}: expected {' '.join(['a finite number', *limits])}, got {value}")


def check_max_items(max_items: int | None, cut_every: int = 1) -> None:
    """Raise unless ``max_items`` is None or an integer of at least 1, and ``cut_every`` one too."""
    if max_items is not None:
        check_count("max_items", max_items, minimum=1)
    check_count("cut_every", cut_every, minimum=1)


def check_offsets(name: str, offsets: NDArray[np.integer[Any]], total: int) -> None:
    """Raise a ``ValueError`` unless ``offsets`` starts at 0, never falls and ends at ``total``."""
    if offsets.size == 0 or offsets[0] != 0:
        first = "no entry" if offsets.size == 0 else str(offsets[0])
        raise ValueError(f"{name}: expected offsets that start at 0, got {first}")
    if offsets[-1] != total:
        raise ValueError(f"{name}: expected a last offset of {total}, got {offsets[-1]}")
    falls = np.flatnonzero(offsets[1:] < offsets[:-1])
    if falls.size:
        at = int(falls[0])
        raise ValueError(f"{name}: expected non-decreasing offsets, got {offsets[at]} then {offsets[at + 1]} at {at}")
