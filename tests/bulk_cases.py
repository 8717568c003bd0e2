# SPDX-License-Identifier: Apache-2.0
"""A saved model and a file of users, for recipes that recommend in bulk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import patchkern as pk
from patchkern.models.scratch import from_scratch

TITLES = {10 + item: f"film {'abc'[item % 3] * (item % 4 + 1)} {item}" for item in range(60)}


def save_model(folder: Path) -> None:
    made = from_scratch(TITLES, hidden_size=16, intermediate_size=32, num_attention_heads=2, num_hidden_layers=1)
    model = pk.PatchedCausalLM(*made, pk.ItemPatches(1, 20), item_head=True)
    model.item_head.start_from_counts(np.arange(60))
    model.save_pretrained(folder)


def write_users(path: Path, n_users: int, first: int = 0, **options: Any) -> None:
    """Users ``u0``, ``u1`` and so on, some without a history, some with items that the model does not know."""
    draw = np.random.default_rng(first)
    offsets = np.cumsum([0, *draw.integers(0, 25, n_users)])
    items = pa.LargeListArray.from_arrays(offsets, draw.integers(8, 70, offsets[-1]))
    names = [f"u{first + user}" for user in range(n_users)]
    pq.write_table(pa.table({"user": names, "items": items}), path, **options)
