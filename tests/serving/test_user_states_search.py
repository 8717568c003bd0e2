# SPDX-License-Identifier: Apache-2.0
"""Searches behind kept users: the lists of searches without, whatever of the users is kept."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from store_cases import Opener

import patchkern as pk
from patchkern.serving.stores import StoreError

pytest.importorskip("transformers", reason="transformers is not installed")
import model_cases
import model_families as families
import torch
from item_model_cases import ITEM_IDS, N_ITEMS, make_model

PATCH = pk.ItemPatches(0, None)
POLICIES = {
    "one": pk.Experts(PATCH, count=2, keep=3, block=4),
    "blocks": pk.Experts(PATCH, count=2, block=4, parts="blocks"),
}
MEMORIES = {
    "overwrite": pk.PreferenceMemory(PATCH, slots=2, block=4),
    "append": pk.PreferenceMemory(PATCH, slots=2, block=4, mode="append"),
}
NAMES = ["ada", "bob", 3, b"eve"]


def model_of(kind: str, policy: Any) -> Any:
    if kind == "titles":
        titles = [[token % 60 + 9 for token in title] for title in model_cases.TITLES]
        catalog = pk.Catalog.from_token_ids(np.concatenate(titles), np.cumsum([0, *map(len, titles)]))
        prompt = model_cases.PROMPT.with_special(experts=[80, 81])
        model: Any = pk.PatchedCausalLM(model_cases.tiny("llama").double().eval(), catalog, prompt, policy)
    else:
        prompt = pk.Prompt(prefix=(N_ITEMS,), experts=[N_ITEMS + 1, N_ITEMS + 2])
        model = make_model(torch.float64, policy=policy, prompt=prompt)
    return pk.RecurrentMemory(model).eval() if isinstance(policy, pk.PreferenceMemory) else model


def histories_of(kind: str, seed: int = 0) -> list[list[Any]]:
    ids: Any = range(40) if kind == "titles" else ITEM_IDS
    draw = np.random.default_rng(seed)
    return [[ids[item] for item in draw.integers(0, N_ITEMS, length)] for length in (13, 2, 22, 9)]


def assert_same_scores(model: Any, histories: Any, expected: np.ndarray, **options: Any) -> None:
    found = model.score_items(histories, user_ids=NAMES, **options)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def assert_alike(found: list[Any], expected: list[Any]) -> None:
    for own, other in zip(found, expected, strict=True):
        assert [item for item, _ in own] == [item for item, _ in other]
        np.testing.assert_allclose([score for _, score in own], [score for _, score in other], atol=1e-10)


@pytest.mark.parametrize(
    ("name", "subject", "kind"),  # in this process, and in each other store a few
    [
        (name, subject, kind)
        for n, name in enumerate([*POLICIES, *MEMORIES])
        for s, subject in enumerate(["titles", "items"])
        for kind in ("memory", ("lmdb", "sqlite", "redis")[(n + s) % 3])
    ],
    indirect=["kind"],
)
def test_lists_are_those_without_states(name: str, subject: str, open_one: Opener) -> None:
    model = model_of(subject, (POLICIES | MEMORIES)[name])
    options: dict[str, Any] = {"k": 5} | ({"num_beams": 5} if subject == "titles" else {"search": "items"})
    longer = histories_of(subject)
    expected = model.recommend(longer, **options)
    states = pk.UserStates(model, store=open_one())

    def found() -> list[Any]:
        lists: list[Any] = model.recommend(longer, user_states=states, user_ids=NAMES, **options)
        return lists

    assert_alike(found(), expected)  # nobody is kept, and none by a search
    assert len(states) == 0
    states.update(NAMES, [history[:8] for history in longer])
    assert len(states) == 3
    assert_alike(found(), expected)  # what is kept is behind
    states.update(NAMES[:3], longer[:3])
    assert_alike(found(), expected)  # some are up to date
    states.update(NAMES, histories_of(subject, seed=1))
    assert_alike(found(), expected)  # of other pasts
    states.update(NAMES, longer)
    assert_alike(found(), expected)
    assert states.update(NAMES, longer).unchanged == 3
    assert_alike(model.recommend(longer, user_states=states, **options), expected)  # by other names
    cache = pk.UserCache(model, 1 << 20)
    for _ in range(2):
        lists = model.recommend(longer, user_states=states, user_cache=cache, user_ids=NAMES, **options)
        assert_alike(lists, expected)


@pytest.mark.parametrize("name", [*POLICIES, *MEMORIES])
def test_a_name_that_is_there_twice_has_the_states_of_neither_by_mistake(name: str) -> None:
    model, (first, _, second, _) = model_of("items", (POLICIES | MEMORIES)[name]), histories_of("items")
    states = pk.UserStates(model)
    states.update(["ada"], [first])
    for histories in ([first, second], [second, first]):
        found = model.recommend(histories, k=5, user_states=states, user_ids=["ada", "ada"])
        assert_alike(found, model.recommend(histories, k=5))


@pytest.mark.parametrize("subject", ["titles", "items"])
@pytest.mark.parametrize("name", [*POLICIES, *MEMORIES])
def test_scores_are_those_without_states(name: str, subject: str) -> None:
    model = model_of(subject, (POLICIES | MEMORIES)[name])
    histories = histories_of(subject)
    expected = model.score_items(histories)
    states = pk.UserStates(model)
    for kept in ([], [0, 3], [0, 1, 2, 3]):  # nobody, some, and all
        states.update([NAMES[user] for user in kept], [histories[user][:-1] for user in kept])
        for more in ({}, {"batch_size": 1}, {"memory_budget": "64MiB"}):
            assert_same_scores(model, histories, expected, user_states=states, **more)
    states.update(NAMES, histories_of(subject, seed=1))
    assert_same_scores(model, histories, expected, user_states=states)  # of other pasts


def test_what_is_kept_is_what_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists come from the store: with another's experts in it they would be wrong, and nothing old is computed."""
    model, history = model_of("items", POLICIES["blocks"]), histories_of("items")[2]
    states = pk.UserStates(model)
    states.update(["ada"], [history])
    expected = model.recommend([history], k=5)
    rows = list[int]()
    embed = model.embed

    def counted(layout: pk.PatchLayout, *vectors: Any) -> torch.Tensor:
        rows.append(layout.num_rows)
        made: torch.Tensor = embed(layout, *vectors)
        return made

    monkeypatch.setattr(model, "embed", counted)
    assert_alike(model.recommend([history], k=5, user_states=states, user_ids=["ada"]), expected)
    assert sum(rows) == 1 + 2  # what starts a history, and two recent items
    scores = model.score_items([history])
    rows.clear()
    np.testing.assert_allclose(model.score_items([history], user_states=states, user_ids=["ada"]), scores, atol=1e-12)
    assert sum(rows) == 1 + 2
    with states.store.reading([b"sada"]) as (value,):
        assert value is not None
        changed = bytearray(value)
    states.store.put({b"sada": changed[:-1] + b"?"})
    with pytest.raises(StoreError, match="user 'ada': expected a whole compressed user, got a torn one"):
        model.recommend([history], k=5, user_states=states, user_ids=["ada"])
    with pytest.raises(StoreError, match="user 'ada': expected a whole compressed user, got a torn one"):
        model.score_items([history], user_states=states, user_ids=["ada"])


def test_states_of_another_model_or_policy_are_refused() -> None:
    model, other = (model_of("items", POLICIES[name]) for name in ("one", "blocks"))
    states = pk.UserStates(model)
    history = histories_of("items")[2]
    for wrong in (other, model_of("items", POLICIES["one"])):
        with pytest.raises(ValueError, match="user_states: expected those made for this model, got another model's"):
            wrong.recommend([history], k=5, user_states=states)
        with pytest.raises(ValueError, match="user_states: expected those made for this model, got another model's"):
            wrong.score_items([history], user_states=states)
    with pytest.raises(ValueError, match=r"user_states: expected those made under this policy, .*one.*blocks"):
        model.recommend([history], POLICIES["blocks"], k=5, user_states=states)
    with pytest.raises(ValueError, match="user_states: expected None under ItemPatches, which compresses no old items"):
        model.score_items([history], PATCH, user_states=states)
    with pytest.raises(TypeError, match="user_states: expected UserStates or None, got dict"):
        model.score_items([history], user_states={"ada": None})
    with pytest.raises(TypeError, match="user_ids: expected an integer, a string or bytes for a store, got tuple"):
        model.recommend([history], k=5, user_states=states, user_ids=[("a", 1)])
    prompt, model.prompt = model.prompt, model.prompt.with_special(experts=model.prompt.experts[::-1])
    with pytest.raises(ValueError, match="user_states: expected the model as it was when they were made"):
        model.recommend([history], k=5, user_states=states)
    model.prompt = prompt
    with torch.no_grad():
        next(model.parameters()).add_(0.5)
    with pytest.raises(ValueError, match="user_states: expected the model as it was when they were made"):
        model.recommend([history], k=5, user_states=states)


@pytest.mark.parametrize("name", ["llama", "deepseek_v3"])
def test_bytes_of_a_user_are_those_that_are_kept(name: str) -> None:
    """Keys of one width and values of another, too."""
    if name not in families.names():
        pytest.skip(f"the installed transformers has no {name}")
    policy = POLICIES["blocks"]
    model = pk.PatchedCausalLM(families.tiny_model(name, reach=64), families.CATALOG, families.PROMPT, policy)
    pk.add_experts(model, policy.count)
    states = pk.UserStates(model)
    states.update(["ada"], [range(policy.block + policy.keep)])
    with states.store.reading(list(states.store)) as (value,):
        assert value is not None and value.nbytes == states.bytes_per_user
