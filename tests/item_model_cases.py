# SPDX-License-Identifier: Apache-2.0
"""Small models of item ids, and what they must compute: one history at a time, row by row, head by head."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import patchkern as pk

N_ITEMS = 23
ITEM_IDS = [f"tt{item}" for item in range(N_ITEMS)]
CATALOG = pk.Catalog.from_titles({item: f"{'xyz' * (place % 3)} film {place}" for place, item in enumerate(ITEM_IDS)},
                                 lambda title: list(title.encode()))  # fmt: skip
HISTORIES = [
    [ITEM_IDS[item] for item in np.random.default_rng(length).integers(0, N_ITEMS, length)]
    for length in (9, 1, 14, 0, 6)
]
POLICIES: dict[str, Any] = {
    "text": pk.TextOnly(None),
    "items": pk.ItemPatches(0, None),
    "sessions": pk.SessionPatches(2, None, align="start"),
    "cut": pk.ItemPatches(0, 5),
}


def make_model(dtype: torch.dtype = torch.float64, seed: int = 0, **options: Any) -> pk.ItemModel:
    """With weights far from where they begin, so that nothing is small or zero."""
    options = {"policy": POLICIES["items"], "width": 8, "max_positions": 40, "seed": seed, **options}
    model = pk.ItemModel(CATALOG, **options).to(dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=dtype), alpha=0.3)
    return model


def groups_of(items: list[Any], policy: Any) -> list[list[int]]:
    """Catalogue positions of the items of each row, the policy's cut included."""
    items = items if policy.max_items is None else items[-policy.max_items :]
    levels = policy.levels(pk.Histories.from_sequences([items])) if items else []
    groups: list[list[int]] = []
    for item, level in zip(items, levels, strict=True):
        if level == pk.Level.JOIN:
            groups[-1].append(ITEM_IDS.index(item))
        else:
            groups.append([ITEM_IDS.index(item)])
    return groups


def state_of(model: pk.ItemModel, items: list[Any], policy: Any) -> Tensor:
    """``(D,)`` after a history: differentiable, nothing of the library but its weights."""
    net = model.hf_model
    table = net.items.weight
    rows = [table[N_ITEMS]] + [sum(table[item] for item in group) / len(group) for group in groups_of(items, policy)]
    x = torch.stack(rows) + net.positions.weight[: len(rows)]
    for layer in net.layers:
        x = BLOCKS[net.config.block](layer, x, net.config)
    return _norm(x, net.norm)[-1]


def sasrec(layer: Any, x: Tensor, config: Any) -> Tensor:
    width = config.hidden_size // config.num_attention_heads
    packed = _norm(x, layer.attention_norm) @ layer.query_key_value.weight.T + layer.query_key_value.bias
    query, key, value = packed.split(config.hidden_size, dim=1)
    seen = []
    for row in range(len(x)):
        heads = []
        for head in range(config.num_attention_heads):
            part = slice(head * width, (head + 1) * width)
            weights = torch.stack([query[row, part] @ key[other, part] for other in range(row + 1)]) / width**0.5
            heads.append(torch.softmax(weights, 0) @ value[: row + 1, part])
        seen.append(torch.cat(heads))
    x = x + torch.stack(seen) @ layer.attention_output.weight.T + layer.attention_output.bias
    inner = F.gelu(_norm(x, layer.inner_norm) @ layer.inner.weight.T + layer.inner.bias)
    return x + inner @ layer.inner_output.weight.T + layer.inner_output.bias


def hstu(layer: Any, x: Tensor, config: Any) -> Tensor:
    width = config.hidden_size // config.num_attention_heads
    gate, value, query, key = F.silu(_norm(x, layer.norm) @ layer.projection.weight.T).split(config.hidden_size, dim=1)
    seen = []
    for row in range(len(x)):
        total = torch.zeros(config.hidden_size, dtype=x.dtype)
        for other in range(row + 1):
            products = (query[row] * key[other]).view(-1, width).sum(1, keepdim=True)
            total = total + (F.silu(products) * value[other].view(-1, width)).flatten()
        seen.append(total / config.normalizer)
    return x + (gate * _norm(torch.stack(seen), layer.output_norm)) @ layer.output.weight.T + layer.output.bias


BLOCKS = {"sasrec": sasrec, "hstu": hstu}


def _norm(x: Tensor, norm: Any) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + norm.eps)
    return scaled if norm.weight is None else scaled * norm.weight + norm.bias


def logits_of(model: pk.ItemModel, state: Tensor) -> Tensor:
    """``(n_items,)``"""
    vectors = model.hf_model.items.weight[:N_ITEMS]
    if model.config.item_scores == "cosine":
        cosines = (vectors @ state) / (vectors.norm(dim=1) * state.norm())
        return 20 * cosines + model.item_head.bias
    return vectors @ state + model.item_head.bias


def scores_of(model: pk.ItemModel, histories: list[list[Any]], policy: Any) -> np.ndarray:
    """``(B, n_items)`` log-probabilities."""
    with torch.no_grad():
        states = [state_of(model, items, policy) for items in histories]
        return torch.stack([torch.log_softmax(logits_of(model, state), 0) for state in states]).numpy()
