# SPDX-License-Identifier: Apache-2.0
"""What a `Histories` does with its own items."""

from __future__ import annotations

import numpy as np
import pytest

import patchkern as pk


def numbered(lengths: list[int]) -> pk.Histories:
    """Every item is its own position."""
    return pk.Histories(np.concatenate([np.arange(n) for n in lengths]), np.cumsum([0, *lengths]), range(sum(lengths)))


def test_jitter_moves_items_a_little_and_only_before_the_ends() -> None:
    lengths, ends = [0, 1, 40, 200, 7], [0, 1, 25, 200, 0]
    histories = numbered(lengths)
    blurred = histories.jittered(6.0, ends, np.random.default_rng(0))
    assert np.array_equal(blurred.offsets, histories.offsets)
    assert blurred.timestamps is not None and np.array_equal(blurred.timestamps, np.arange(sum(lengths)))
    for items, length, end in zip(blurred, lengths, ends, strict=True):
        assert np.array_equal(np.sort(items), np.arange(length))
        assert np.array_equal(items[end:], np.arange(end, length))
        # an item that stands before another came at most 6 places after it
        latest = np.maximum.accumulate(items) if length else items
        assert ((latest - items) < 6).all()
    assert not np.array_equal(blurred[3], histories[3])


def test_jitter_is_of_the_generator_and_none_without_width() -> None:
    histories = numbered([30, 50])
    one, two = (histories.jittered(4, [30, 50], np.random.default_rng(7)) for _ in range(2))
    assert np.array_equal(one.items, two.items)
    assert np.array_equal(histories.jittered(0, [30, 50], np.random.default_rng(0)).items, histories.items)


@pytest.mark.parametrize(("width", "ends", "message"), [(-1.0, [5], "width"), (np.inf, [5], "width"), (2, [6], "pos")])
def test_jitter_refuses(width: float, ends: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        numbered([5]).jittered(width, ends, np.random.default_rng(0))
