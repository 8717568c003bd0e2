# SPDX-License-Identifier: Apache-2.0
"""Splits: which positions of each history are targets for training, validation and test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

import numpy as np

from patchkern.batch.arguments import check_count, check_number
from patchkern.batch.columns import is_sequence
from patchkern.data.interactions import SPLITS, Interactions, check_interactions


def temporal_split(interactions: Interactions, ratio: Sequence[float] = (48, 1, 1)) -> Interactions:
    """Cut all interactions by global time in the given ratio: nothing in a split is later than the next one's start.

    The borders are instants: with N interactions in order of time, training ends with number floor(N * 48 / 50), and
    what happened at the same instant as that one goes with it; validation likewise.

    Args:
        ratio: shares of train, val and test, in any unit; val and test may be 0.

    Raises:
        ValueError: no timestamps, or a ratio that is not three shares >= 0 with a training share.
    """
    check_interactions(interactions)
    times = interactions.histories.timestamps
    if times is None:
        raise ValueError(f"interactions: expected timestamps for a split by time, got none in {interactions.name!r}")
    if not is_sequence(ratio):
        raise TypeError(f"ratio: expected three shares, got {type(ratio).__name__}")
    for share in ratio:
        check_number("ratio", share)
    shares = [Fraction(str(share)) for share in ratio]
    if len(shares) != len(SPLITS) or min(shares) < 0 or shares[0] == 0:
        raise ValueError(f"ratio: expected three shares >= 0 with a training share above 0, got {tuple(ratio)}")
    ordered = np.sort(times)
    ends = [times.size * sum(shares[: i + 1]) // sum(shares) for i in range(2)]
    borders = [ordered[end - 1] if end else -np.inf for end in ends]
    # A history is in order of time, so each split is one run of positions; count how many are up to each border.
    reached = [np.concatenate([[0], np.cumsum(times <= border)])[interactions.histories.offsets] for border in borders]
    train_end, val_end = (np.diff(count) for count in reached)
    return _with_ends(interactions, train_end, val_end)


def leave_last_out(interactions: Interactions, count: int = 1) -> Interactions:
    """The last ``count`` items of each history are test targets, as many before them validation, all others training.

    Histories of no more than twice as many items are all training. This is not in order of time across users: one may
    be tested on what is older than what another is trained on.

    Raises:
        TypeError, ValueError: ``count`` is not an integer of at least 1.
    """
    check_interactions(interactions)
    check_count("count", count, minimum=1)
    lengths = interactions.histories.lengths
    held_out = count * (lengths > 2 * count)
    return _with_ends(interactions, lengths - 2 * held_out, lengths - held_out)


def leave_one_out(interactions: Interactions) -> Interactions:
    """`leave_last_out` of one item: the last of each history is tested on, the one before it validates."""
    return leave_last_out(interactions, 1)


def _with_ends(interactions: Interactions, train_end: np.ndarray, val_end: np.ndarray) -> Interactions:
    borders = [np.zeros_like(train_end), train_end, val_end, interactions.histories.lengths]
    ranges = {split: np.stack([borders[i], borders[i + 1]], axis=1) for i, split in enumerate(SPLITS)}
    return replace(interactions, ranges=ranges)
