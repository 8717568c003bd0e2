# SPDX-License-Identifier: Apache-2.0
"""Models whose old items become learned rows, and what is kept of their users."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from item_model_cases import ITEM_IDS, N_ITEMS, make_model
from server_cases import assert_same, lists_of, serving

import patchkern as pk
from patchkern.serving.server.kept_users import KeptUsers
from patchkern.serving.server.limits import Limits
from patchkern.serving.server.served import Source
from patchkern.serving.stores import MemoryStore, StoreError

PATCH = pk.ItemPatches(0, None)
POLICIES = {
    "experts": pk.Experts(PATCH, count=2, block=4, parts="blocks"),
    "memory": pk.PreferenceMemory(PATCH, slots=2, block=4),
}


def model_of(name: str, seed: int = 0) -> Any:
    prompt = pk.Prompt(prefix=(N_ITEMS,), experts=[N_ITEMS + 1, N_ITEMS + 2])
    model = make_model(torch.float64, seed, policy=POLICIES[name], prompt=prompt)
    return pk.RecurrentMemory(model).eval() if name == "memory" else model


def histories(seed: int = 0) -> list[list[str]]:
    draw = np.random.default_rng(seed)
    return [[ITEM_IDS[item] for item in draw.integers(0, N_ITEMS, length)] for length in (13, 2, 22, 9)]


def asked(users: list[list[str]], **fields: Any) -> dict[str, Any]:
    return {"users": [{"history": history, "k": 4, "user_id": at, **fields} for at, history in enumerate(users)]}


@pytest.mark.parametrize("budget", [None, "64MiB"])
@pytest.mark.parametrize("name", POLICIES)
def test_lists_are_those_of_recommend(name: str, budget: str | None) -> None:
    model, users = model_of(name), histories()
    with serving(model, Limits(memory_budget=budget)) as client:
        answers = client.post("/v1/recommend:batch", json=asked(users, explain=True)).json()["users"]
    for found, expected in zip(lists_of(answers), model.recommend(users, k=4, search="items"), strict=True):
        assert_same(found, expected)
    for answer, history in zip(answers, users, strict=True):
        said = answer["history"]
        entries = said["entries"]
        assert [item["item"] for entry in entries for item in entry["items"]] == history
        old = (len(history) - 1) // 4 * 4
        kinds = (["memory"] if old else []) + ["item"] * (len(history) - old)
        assert [entry["kind"] for entry in entries] == kinds
        learned = 0 if not old else 2 * (old // 4 if name == "experts" else 1)
        assert said["rows"] == learned + len(history) - old and said["prompt_rows"] == said["rows"] + 1


@pytest.mark.parametrize("name", POLICIES)
def test_users_are_kept_and_gone_on_from(name: str) -> None:
    model, users = model_of(name), histories()
    states = pk.UserStates(model, store=MemoryStore())
    with serving(model, states=states) as client:
        for more in range(0, 5, 2):
            grown = [history + ITEM_IDS[:more] for history in users]
            answers = client.post("/v1/recommend:batch", json=asked(grown)).json()["users"]
            for found, expected in zip(lists_of(answers), model.recommend(grown, k=4, search="items"), strict=True):
                assert_same(found, expected)
        assert len(states) == 4
        unnamed = client.post("/v1/recommend", json={"history": users[0], "k": 4})
        assert unnamed.status_code == 200 and len(states) == 4
        too_long = client.post("/v1/recommend", json={"history": users[0], "user_id": "é" * 256})
        assert too_long.status_code == 422 and too_long.json()["detail"][0]["loc"] == ["body", "user_id"]


LONG = {"experts": pk.Experts(PATCH, count=2, block=50, parts="blocks"), "memory": pk.PreferenceMemory(PATCH, 2, 500)}


@pytest.mark.parametrize("name", LONG)
def test_ten_thousand_items(name: str) -> None:
    prompt = pk.Prompt(prefix=(N_ITEMS,), experts=[N_ITEMS + 1, N_ITEMS + 2])
    model: Any = make_model(torch.float64, policy=LONG[name], prompt=prompt, max_positions=11_000)
    model = pk.RecurrentMemory(model).eval() if name == "memory" else model
    draw = np.random.default_rng(0)
    users = [[ITEM_IDS[item] for item in draw.integers(0, N_ITEMS, length)] for length in (10_000, 3)]
    expected, states = model.recommend(users, k=4, search="items"), pk.UserStates(model)
    states.update(range(2), [history[:-60] for history in users])
    states.update(range(2), users)
    for found, own in zip(model.recommend(users, k=4, user_states=states, user_ids=range(2)), expected, strict=True):
        assert_same(found, own)
    for kept in (None, pk.UserStates(model, store=MemoryStore())):
        with serving(model, Limits(memory_budget="64MiB"), states=kept) as client:
            answers = client.post("/v1/recommend:batch", json=asked(users)).json()["users"]
        for found, own in zip(lists_of(answers), expected, strict=True):
            assert_same(found, own)
    assert kept is not None and len(kept) == 1
    with serving(model, Limits(memory_budget="1MiB"), states=states) as client:
        answer = client.post("/v1/recommend", json=asked(users)["users"][0])
        assert answer.status_code == 422 and "memory_budget: expected at least" in answer.json()["detail"][0]["msg"]


def test_a_store_that_fails_costs_time_and_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    model, users = model_of("experts"), histories()
    states = pk.UserStates(model, store=MemoryStore())

    def failing(values: Any) -> int:
        raise StoreError("store: no room")

    monkeypatch.setattr(states.store, "put", failing)
    with serving(model, states=states) as client:
        answers = client.post("/v1/recommend:batch", json=asked(users)).json()["users"]
        for found, expected in zip(lists_of(answers), model.recommend(users, k=4, search="items"), strict=True):
            assert_same(found, expected)
        assert client.get("/health").status_code == 200


def test_every_model_has_its_own_store(tmp_path: Path) -> None:
    pytest.importorskip("lmdb", reason="the package lmdb is not installed")
    kept = KeptUsers(str(tmp_path / "users"), max_bytes=1 << 20)
    source = Source(str(tmp_path / "run"), users=kept)
    counts = []
    for seed in (0, 0, 1):
        model_of("memory", seed).save_pretrained(tmp_path / "run")
        served = source.read()
        assert isinstance(served.model, pk.RecurrentMemory) and served.states is not None
        with serving(lambda served=served: served) as client:
            assert client.post("/v1/recommend:batch", json=asked(histories())).status_code == 200
        counts.append(len(served.states))
    assert counts == [3, 3, 3]  # the second reload found the users of the first
    assert len(list((tmp_path / "users").glob("*.lmdb"))) == 2
