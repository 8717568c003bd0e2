# SPDX-License-Identifier: Apache-2.0
"""Recurrent memories on small models of item ids, and what they must compute: dense masks over one user's rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from item_model_cases import CATALOG, ITEM_IDS, N_ITEMS
from torch import Tensor

import patchkern as pk

SLOTS, BLOCK = 2, 4
LENGTHS = (17, 1, 6, 9, 13, 4, 5, 0)
HISTORIES = pk.Histories.from_sequences(
    [[ITEM_IDS[item] for item in np.random.default_rng(n).integers(0, N_ITEMS, n)] for n in LENGTHS]
)
RANGES = np.array([[0, 16], [0, 0], [2, 5], [5, 8], [12, 12], [0, 3], [4, 4], [0, -1]])
INNER: dict[str, Any] = {
    "items": pk.ItemPatches(keep_text=0, max_items=None),
    "sessions": pk.SessionPatches(2, max_items=None, align="start"),
}
PROMPT = pk.Prompt(prefix=(N_ITEMS,)).with_special(experts=(N_ITEMS + 1, N_ITEMS + 2))


def make_memory(
    kind: str = "sasrec", mode: str = "overwrite", inner: str = "items", seed: int = 0, **options: Any
) -> pk.RecurrentMemory:
    """In float64, with weights far from where they begin."""
    policy = pk.PreferenceMemory(INNER[inner], SLOTS, BLOCK, mode)
    model = pk.ItemModel(CATALOG, policy, block=kind, prompt=PROMPT, width=8, max_positions=60).double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64), alpha=0.3)
    return pk.RecurrentMemory(model, **options)


def dense(memory: pk.RecurrentMemory, rows: Tensor, positions: list[int], visible: Tensor) -> Tensor:
    """``(T, D)`` states of one user's rows, of which row t sees those where ``visible[t]``; position -1: none."""
    net: Any = memory.hf_model
    placed = [net.positions.weight[at] if at >= 0 else torch.zeros(8, dtype=torch.float64) for at in positions]
    x = rows + torch.stack(placed)
    for layer in net.layers:
        x = (_sasrec if net.config.block == "sasrec" else _hstu)(layer, x, visible, net.config)
    return F.layer_norm(x, (8,), net.norm.weight, net.norm.bias, net.norm.eps)


def _sasrec(layer: Any, x: Tensor, visible: Tensor, config: Any) -> Tensor:
    query, key, value = layer.query_key_value(layer.attention_norm(x)).chunk(3, 1)
    heads, seen = config.num_attention_heads, []
    for q, k, v in zip(*(part.chunk(heads, 1) for part in (query, key, value)), strict=True):
        weights = (q @ k.T / q.shape[1] ** 0.5).masked_fill(~visible, -torch.inf)
        seen.append(torch.softmax(weights, 1) @ v)
    x = x + layer.attention_output(torch.cat(seen, 1))
    return x + layer.inner_output(F.gelu(layer.inner(layer.inner_norm(x))))


def _hstu(layer: Any, x: Tensor, visible: Tensor, config: Any) -> Tensor:
    gate, value, query, key = F.silu(layer.projection(layer.norm(x))).chunk(4, 1)
    heads, seen = config.num_attention_heads, []
    for q, k, v in zip(*(part.chunk(heads, 1) for part in (query, key, value)), strict=True):
        seen.append((F.silu(q @ k.T) * visible) @ v / config.normalizer)
    return x + layer.output(gate * layer.output_norm(torch.cat(seen, 1)))


def rows_of(memory: pk.RecurrentMemory, items: list[Any], sessions: int = 1) -> Tensor:
    """``(n, D)`` items' vectors, or the means of so many each."""
    table: Any = memory.hf_model.get_input_embeddings().weight
    vectors = table[[ITEM_IDS.index(item) for item in items]]
    return vectors.view(-1, sessions, 8).mean(1)


def special(memory: pk.RecurrentMemory, *tokens: int) -> Tensor:
    table: Any = memory.hf_model.get_input_embeddings().weight
    return table[list(tokens)]


def causal(count: int) -> Tensor:
    return torch.ones(count, count, dtype=torch.bool).tril()


def reference(memory: pk.RecurrentMemory, items: list[Any], sessions: int = 1) -> Tensor:
    """``(n, C, D)`` the references of whole segments, by the mask of the interleaved sequence."""
    n = len(items) // BLOCK
    old = rows_of(memory, items[: n * BLOCK], sessions)
    rows, positions = [special(memory, N_ITEMS)], [0]
    kinds = [(-1, -1)]  # of each row: the segment of a query row, or -1; and of an item row, or -1
    per = BLOCK // sessions
    for h in range(n):
        rows.append(old[h * per : (h + 1) * per])
        positions += list(range(1 + h * per, 1 + (h + 1) * per))
        kinds += [(-1, h)] * per
        rows.append(special(memory, *PROMPT.experts))
        positions += [-1] * SLOTS
        kinds += [(h, -1)] * SLOTS
    visible = causal(len(kinds))
    for t, (of, _) in enumerate(kinds):
        for s, (other, _) in enumerate(kinds):
            visible[t, s] &= other == -1 or other == of
    states = dense(memory, torch.cat(rows), positions, visible)
    return states[[kind[0] >= 0 for kind in kinds]].view(n, SLOTS, 8)


def updated(memory: pk.RecurrentMemory, before: Tensor, items: list[Any], sessions: int = 1) -> Tensor:
    """``(C, D)`` of ``before`` (M, D) and a segment, as one causal sequence."""
    own = rows_of(memory, items, sessions)
    rows = torch.cat([special(memory, N_ITEMS), before, own, special(memory, *PROMPT.experts)])
    first = 1 + len(before)
    positions = [0] + [-1] * len(before) + list(range(first, first + len(own))) + [-1] * SLOTS
    return dense(memory, rows, positions, causal(len(rows)))[-SLOTS:]


def iterated(memory: pk.RecurrentMemory, items: list[Any], sessions: int = 1) -> Tensor:
    """``(M, D)`` the memory of whole segments, one after the other."""
    vectors = torch.zeros(0, 8, dtype=torch.float64)
    for begin in range(0, len(items), BLOCK):
        new = updated(memory, vectors, items[begin : begin + BLOCK], sessions)
        vectors = torch.cat([vectors, new]) if memory.policy.mode == "append" else new
    return vectors


def groups_of(items: list[Any], policy: Any) -> list[list[Any]]:
    """The items of each row of a history of its own."""
    groups: list[list[Any]] = []
    levels = policy.levels(pk.Histories.from_sequences([items])) if items else []
    for item, level in zip(items, levels, strict=True):
        if level == pk.Level.JOIN:
            groups[-1].append(item)
        else:
            groups.append([item])
    return groups
