# SPDX-License-Identifier: Apache-2.0
"""What reading a history should cost, counted before anything is measured: rows through the model, and rows they see.

Counted are the layers' products and attention; not planning, hashing, copying, and scoring the items.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import patchkern as pk

Work = NDArray[np.float64]
"""``(2,)`` rows that go through the model, and pairs of a row and one that it sees."""


class Rows(NamedTuple):
    """How long everything is, in rows: the prompt's beginning, an item, and the learned rows of a part.

    ``fresh`` are those that an event computes behind a `patchkern.UserCache`: others before it change their form.
    """

    beginning: float
    item: float
    fresh: float
    learned: int
    keep: int
    block: int

    def cut(self, items: int) -> tuple[int, float]:
        """How many blocks of a history are old, and how many of its items are recent, on average over a block."""
        return max(items - self.keep, 0) // self.block, self.keep + (self.block - 1) / 2


def spans(rows: Any, seen: Any = 0.0) -> Work:
    """Of causal spans of so many rows, which also see others; the sum over all of them."""
    rows, seen = np.broadcast_arrays(np.asarray(rows, float), np.asarray(seen, float))
    return np.array([rows.sum(), (rows * (seen + rows / 2)).sum()])


class Cost(NamedTuple):
    """Of a form of keeping users, by items: a read from nothing, one more event behind what is kept, and what is kept.

    ``kept`` is in rows of keys and values, or in vectors for a memory.
    """

    read: Callable[[Rows, int], Work]
    event: Callable[[Rows, int], Work]
    kept: Callable[[Rows, int], float]


def _whole(rows: Rows, items: int) -> float:
    return rows.beginning + rows.item * items


def _one(rows: Rows, items: int) -> Work:
    old = rows.item * rows.block * rows.cut(items)[0]
    return spans(rows.beginning + old + rows.learned) + _behind(rows, items, rows.learned)


def _behind(rows: Rows, items: int, kept: float) -> Work:
    """Recent items that see keys and values that are kept."""
    return spans(rows.item * rows.cut(items)[1], rows.beginning + kept)


def _blocks(rows: Rows, items: int) -> Work:
    before = np.arange(rows.cut(items)[0])
    return spans(rows.item * rows.block + rows.learned, rows.beginning + rows.learned * before) + _behind(
        rows, items, _bank(rows, items)
    )


def _bank(rows: Rows, items: int) -> float:
    return rows.learned * rows.cut(items)[0]


def _prompt(rows: Rows, items: int, kept: float) -> Work:
    """A prompt with vectors, which are rows like others and computed every time."""
    return spans(rows.beginning + kept + rows.item * rows.cut(items)[1])


def _updates(rows: Rows, items: int, appends: bool) -> Work:
    number = np.arange(rows.cut(items)[0])
    memory = rows.learned * (number if appends else np.minimum(number, 1))
    kept = _bank(rows, items) if appends else rows.learned
    return spans(rows.beginning + memory + rows.item * rows.block + rows.learned) + _prompt(rows, items, kept)


COSTS = {
    "whole": Cost(
        lambda rows, items: spans(_whole(rows, items)),
        lambda rows, items: spans(rows.fresh, _whole(rows, items)),
        _whole,
    ),
    "one": Cost(_one, lambda rows, items: _behind(rows, items, rows.learned), lambda rows, items: rows.learned),
    "blocks": Cost(_blocks, lambda rows, items: _behind(rows, items, _bank(rows, items)), _bank),
    "overwrite": Cost(
        lambda rows, items: _updates(rows, items, False),
        lambda rows, items: _prompt(rows, items, rows.learned),
        lambda rows, items: rows.learned,
    ),
    "append": Cost(
        lambda rows, items: _updates(rows, items, True),
        lambda rows, items: _prompt(rows, items, _bank(rows, items)),
        _bank,
    ),
}


def kind_of(policy: Any) -> str:
    """Which of `COSTS` a policy has."""
    if isinstance(policy, pk.Experts):
        return policy.parts
    return policy.mode if isinstance(policy, pk.PreferenceMemory) else "whole"


class Network(NamedTuple):
    """A model as far as its operations go."""

    parameters: int  # of the layers' products
    attention: int  # heads times their width times layers
    row_bytes: int  # keys and values of a row
    vector_bytes: int

    @classmethod
    def of(cls, model: Any) -> Network:
        """Of any model of the library, in its dtype."""
        config = model.config.get_text_config()
        layers, heads = config.num_hidden_layers, config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        named = model.hf_model.named_parameters()
        products = sum(weight.numel() for name, weight in named if "layers." in name and weight.dim() == 2)
        size = model.dtype.itemsize
        return cls(products, heads * width * layers, 2 * layers * kv_heads * width * size, config.hidden_size * size)

    def flops(self, work: Work) -> float:
        """Operations."""
        return float(2 * self.parameters * work[0] + 4 * self.attention * work[1])


def exponent(items: Any, values: Any) -> float:
    """Of the power law through the last decade of lengths; NaN where there are fewer than two points."""
    items, values = np.asarray(items, float), np.asarray(values, float)
    last = items >= items.max(initial=0) / 10
    if last.sum() < 2:
        return float("nan")
    return float(np.polyfit(np.log(items[last]), np.log(values[last]), 1)[0])
