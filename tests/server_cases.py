# SPDX-License-Identifier: Apache-2.0
"""Tiny models to serve, in float64 so that lists do not depend on who is computed together, and a client for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

import patchkern as pk
from patchkern.models.scratch import fit_tokenizer, scratch_model, scratch_prompt

pytest.importorskip("fastapi", reason="needs fastapi, of the extra serving")
pytest.importorskip("prometheus_client", reason="needs prometheus_client, of the extra serving")

from fastapi.testclient import TestClient

from patchkern.serving.server.app import create_app
from patchkern.serving.server.limits import Limits
from patchkern.serving.server.served import Served
from patchkern.serving.server.service import Service

N_ITEMS = 40
TITLES = {
    3 * item: f"{'The ' * (item % 2)}{word} {item}" for item, word in enumerate(["Amélie", "Brazil", "Alien", "M"] * 10)
}
ITEMS = list(TITLES)
TOKEN = "a token of an administrator"


def language_model(policy: Any = None, titles: Any = None, **options: Any) -> tuple[pk.PatchedCausalLM, Any]:
    """A language model with an item head, and its tokenizer."""
    titles = TITLES if titles is None else titles
    tokenizer = fit_tokenizer(titles.values())
    catalog = pk.Catalog.from_titles(titles, tokenizer)
    hf_model = scratch_model(tokenizer, hidden_size=16, intermediate_size=24, num_attention_heads=2)
    policy = pk.SessionPatches(2, None, align="start") if policy is None else policy
    model = pk.PatchedCausalLM(hf_model, catalog, scratch_prompt(tokenizer), policy, **{"item_head": True} | options)
    return away_from_zero(model), tokenizer


def item_model(policy: Any = None, titles: Any = None) -> pk.ItemModel:
    """A model of item ids, which are strings."""
    titles = {f"tt{item}": title for item, title in TITLES.items()} if titles is None else titles
    n_items = len(titles)
    catalog = pk.Catalog.from_token_ids(range(n_items), range(n_items + 1), list(titles), list(titles.values()))
    return away_from_zero(pk.ItemModel(catalog, policy or pk.ItemPatches(0, None), width=8, max_positions=64))


def away_from_zero(model: Any) -> Any:
    model = model.double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64), alpha=0.2)
    return model


def histories(count: int, longest: int = 15, items: Any = None, seed: int = 0) -> list[list[Any]]:
    draw = np.random.default_rng(seed)
    items = ITEMS if items is None else items
    return [[items[at] for at in draw.integers(0, len(items), draw.integers(0, longest + 1))] for _ in range(count)]


@contextmanager
def serving(model: Any, limits: Limits | None = None, token: str | None = None, **served: Any) -> Iterator[TestClient]:
    """A client of a server in this process; ``client.service`` is what it talks to."""
    read = model if callable(model) and not isinstance(model, torch.nn.Module) else lambda: Served(model, **served)
    service = Service(read, limits or Limits())
    with TestClient(create_app(service, token)) as client:
        client.service = service  # type: ignore[attr-defined]
        yield client


def lists_of(answers: list[Any]) -> list[list[tuple[Any, float]]]:
    return [[(found["item"], found["score"]) for found in answer["items"]] for answer in answers]


def assert_same(found: list[tuple[Any, float]], expected: list[tuple[Any, float]]) -> None:
    """The same items in the same order, and scores that differ by rounding alone."""
    assert [item for item, _ in found] == [item for item, _ in expected]
    np.testing.assert_allclose([score for _, score in found], [score for _, score in expected], rtol=0, atol=1e-9)
