# SPDX-License-Identifier: Apache-2.0
"""Models of item ids under `Experts`, and what they compute by the dense mask of the rule."""

from __future__ import annotations

from typing import Any

import expert_cases as cases
import numpy as np
import torch
from item_model_cases import ITEM_IDS, N_ITEMS, _norm, make_model
from torch import Tensor

import patchkern as pk

POLICIES: dict[str, pk.Experts] = {
    "one": pk.Experts(cases.PATCH, count=2, keep=3, block=4, boundaries=None),
    "one, sessions": pk.Experts(cases.SESSIONS, count=3, keep=2, block=4, boundaries=None),
    "blocks": pk.Experts(cases.PATCH, count=2, block=4, parts="blocks"),
}
HISTORIES = [np.random.default_rng(n).integers(0, N_ITEMS, n).tolist() for n in (13, 2, 9, 6)]
PLACES = [[ITEM_IDS[item] for item in items] for items in HISTORIES]


def model_for(policy: pk.Experts, block: str, dtype: torch.dtype = torch.float64) -> pk.ItemModel:
    """With the experts' ids after the row that starts a history."""
    prompt = pk.Prompt(prefix=(N_ITEMS,), experts=range(N_ITEMS + 1, N_ITEMS + 1 + policy.count))
    return make_model(dtype, policy=policy, block=block, prompt=prompt)


def state_of(model: pk.ItemModel, rows: list[cases.Row]) -> Tensor:
    """``(T, D)`` after each row, from its dense mask alone."""
    net: Any = model.hf_model
    table = net.items.weight
    vectors = [
        table[content[1]] if content[0] == "token" else sum(table[item] for item in content[1:]) / (len(content) - 1)
        for content, _, _ in rows
    ]
    x = torch.stack(vectors) + net.positions.weight[[row.position for row in rows]]
    mask = torch.zeros(len(rows), len(rows), dtype=torch.bool)
    for row, (_, _, sees) in enumerate(rows):
        mask[row, [*sees, row]] = True
    for layer in net.layers:
        x = MASKED[net.config.block](layer, x, net.config, mask)
    return _norm(x, net.norm)


def sasrec(layer: Any, x: Tensor, config: Any, mask: Tensor) -> Tensor:
    width = config.hidden_size // config.num_attention_heads
    packed = _norm(x, layer.attention_norm) @ layer.query_key_value.weight.T + layer.query_key_value.bias
    query, key, value = (part.unflatten(1, (-1, width)) for part in packed.split(config.hidden_size, dim=1))
    scores = torch.einsum("qhd,khd->hqk", query, key) / width**0.5
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    seen = torch.einsum("hqk,khd->qhd", weights, value).flatten(1)
    x = x + seen @ layer.attention_output.weight.T + layer.attention_output.bias
    inner = torch.nn.functional.gelu(_norm(x, layer.inner_norm) @ layer.inner.weight.T + layer.inner.bias)
    return x + inner @ layer.inner_output.weight.T + layer.inner_output.bias


def hstu(layer: Any, x: Tensor, config: Any, mask: Tensor) -> Tensor:
    width = config.hidden_size // config.num_attention_heads
    made = torch.nn.functional.silu(_norm(x, layer.norm) @ layer.projection.weight.T)
    gate, value, query, key = made.split(config.hidden_size, dim=1)
    query, key, value = (part.unflatten(1, (-1, width)) for part in (query, key, value))
    weights = torch.nn.functional.silu(torch.einsum("qhd,khd->hqk", query, key)) * mask
    seen = torch.einsum("hqk,khd->qhd", weights, value).flatten(1) / config.normalizer
    return x + (gate * _norm(seen, layer.output_norm)) @ layer.output.weight.T + layer.output.bias


MASKED = {"sasrec": sasrec, "hstu": hstu}


def rows_of(model: pk.ItemModel, items: list[int], policy: pk.Experts) -> list[cases.Row]:
    return cases.rows_of(items, policy, model.catalog, model.prompt, [])
