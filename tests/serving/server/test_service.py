# SPDX-License-Identifier: Apache-2.0
"""Under pressure: too many users, too little time or memory, failures, reloads, the end."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
from server_cases import ITEMS, TITLES, TOKEN, assert_same, histories, item_model, language_model, lists_of, serving

import patchkern as pk
from patchkern.budget.search import SearchCost
from patchkern.search.batching import size_of_beams
from patchkern.search.item_search import size_of_items
from patchkern.search.trie_cache import catalog_trie
from patchkern.serving.server.computing import Computer
from patchkern.serving.server.limits import Limits
from patchkern.serving.server.middleware import BodyLimit
from patchkern.serving.server.served import Served

CACHE = 1 << 20
ASKED = {"history": ITEMS[:5], "k": 3}


@pytest.fixture(scope="module")
def model() -> pk.PatchedCausalLM:
    return language_model()[0]


@contextmanager
def busy(client: Any) -> Iterator[None]:
    """The thread that computes has something else to do."""
    release, begun = threading.Event(), threading.Event()
    client.service._batcher.call(lambda: (begun.set(), release.wait(30)))
    assert begun.wait(30)
    try:
        yield
    finally:
        release.set()


def wait_for(client: Any, users: int) -> None:
    end = time.monotonic() + 30
    while client.service._batcher.waiting < users:
        assert time.monotonic() < end
        time.sleep(0.005)


def post(client: Any, **fields: Any) -> Any:
    return client.post("/v1/recommend", json={**ASKED, **fields})


# ------------------------------------------------------------------ too many, too late


def test_more_users_than_may_wait_are_told_to_come_back(model: pk.PatchedCausalLM) -> None:
    with serving(model, Limits(max_waiting=4, max_users=4)) as client, ThreadPoolExecutor(4) as pool:
        with busy(client):
            waiting = [pool.submit(post, client) for _ in range(3)]
            wait_for(client, 3)
            assert client.get("/ready").status_code == 200
            both = client.post("/v1/recommend:batch", json={"users": [ASKED, ASKED]})  # of whom one could wait
            assert both.status_code == 503 and int(both.headers["retry-after"]) >= 1
            assert both.json()["detail"][0]["type"] == "overloaded"
            waiting.append(pool.submit(post, client))
            wait_for(client, 4)
            assert client.get("/ready").status_code == 503
            assert client.get("/health").status_code == 200
        assert [answer.result().status_code for answer in waiting] == [200] * 4
        assert client.get("/ready").status_code == 200


def test_who_gave_up_is_not_computed(model: pk.PatchedCausalLM) -> None:
    with serving(model, Limits(timeout=0.2)) as client:
        with busy(client):
            late = client.post("/v1/recommend:batch", json={"users": [ASKED, ASKED]})
            assert late.status_code == 504 and "0.2 seconds" in late.json()["detail"][0]["msg"]
        assert post(client).status_code == 200
        assert "patchkern_users_total 1.0" in client.get("/metrics").text


def test_a_body_that_does_not_come_is_not_waited_for() -> None:
    async def read_body(scope: Any, receive: Any, send: Any) -> None:
        while (await receive())["more_body"]:
            pass

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(60)
        return {}

    limited = BodyLimit(read_body, max_bytes=10, seconds=0.01)
    with pytest.raises(Exception, match=r"the whole body within 0\.01 seconds") as caught:
        asyncio.run(limited({"type": "http", "headers": []}, receive, None))  # type: ignore[arg-type]
    assert caught.value.status_code == 408  # type: ignore[attr-defined]


# ------------------------------------------------------------------ too little memory, too few positions


def test_batches_stay_within_the_budget(model: pk.PatchedCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    lists = Computer.lists
    monkeypatch.setattr(Computer, "lists", lambda self, batch: sizes.append(len(batch.jobs)) or lists(self, batch))
    users = histories(16, longest=12)
    longest = int(pk.row_counts(model.catalog, users, model.policy, model.prompt).max())
    trie = catalog_trie(model.catalog, model.prompt.response_end, model.device)
    for search, size in (("items", size_of_items(model, None, None)), ("beam", size_of_beams(trie, 20))):
        budget = SearchCost(model, size).needed(6, 6 * longest, longest).peak
        limits = Limits(memory_budget=budget + CACHE, max_batch=16)
        with serving(model, limits, cache_bytes=CACHE) as client:
            sizes.clear()
            asked = [{"history": history, "k": 4, "search": search} for history in users]
            answers = client.post("/v1/recommend:batch", json={"users": asked})
            for found, expected in zip(
                lists_of(answers.json()["users"]), model.recommend(users, k=4, search=search), strict=True
            ):
                assert_same(found, expected)
            assert 1 < len(sizes) < 16 and sum(sizes) == 16
            long = post(client, history=(ITEMS * 100)[:2500], search=search)
            assert long.status_code == 422 and long.json()["detail"][0]["loc"] == ["body", "history"]
            assert "memory_budget: expected at least" in long.json()["detail"][0]["msg"]


def test_a_prompt_that_is_too_long_for_the_model_is_its_users_alone() -> None:
    model = item_model()
    items = [f"tt{item}" for item in ITEMS]
    users = [items[:5], items * 2, items[:9]]
    with serving(model) as client, ThreadPoolExecutor(3) as pool:
        with busy(client):
            posted = [pool.submit(post, client, history=history) for history in users]
            wait_for(client, 3)
        answers = [answer.result() for answer in posted]
        for _ in range(6):
            assert post(client, history=users[1]).status_code == 422
        assert client.get("/health").status_code == 200
    assert [answer.status_code for answer in answers] == [200, 422, 200]
    assert answers[1].json()["detail"][0]["loc"] == ["body", "history"]
    assert "at most 64 rows per user" in answers[1].json()["detail"][0]["msg"]
    for place in (0, 2):
        assert_same(*lists_of([answers[place].json()]), *model.recommend([users[place]], k=3))


# ------------------------------------------------------------------ failures


def test_one_users_failure_is_not_anothers(model: pk.PatchedCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    lists = Computer.lists

    def failing(self: Computer, batch: Any) -> Any:
        if any(ITEMS[7] in job.items for job in batch.jobs):
            raise RuntimeError("a bug")
        return lists(self, batch)

    monkeypatch.setattr(Computer, "lists", failing)
    with serving(model) as client, ThreadPoolExecutor(3) as pool:
        with busy(client):
            posted = [pool.submit(post, client, history=ITEMS[:length]) for length in (5, 8, 6)]
            wait_for(client, 3)
        answers = [answer.result() for answer in posted]
        assert [answer.status_code for answer in answers] == [200, 500, 200]
        assert "a bug" not in answers[1].text and answers[1].json()["detail"][0]["type"] == "internal"
        assert client.get("/health").status_code == 200
        for _ in range(5):
            assert post(client, history=ITEMS[:8]).status_code == 500
        assert client.get("/health").status_code == client.get("/ready").status_code == 503
        assert post(client).status_code == 200
        assert client.get("/health").status_code == 200


# ------------------------------------------------------------------ another model


def test_a_reload_takes_the_place_of_the_model_and_fails_nobody(model: pk.PatchedCausalLM) -> None:
    fewer = {item: TITLES[item] for item in ITEMS[:30]}
    other, _ = language_model(titles=fewer)
    served: list[Any] = [model]
    with (
        serving(lambda: Served(served[0]), token=TOKEN) as client,
        ThreadPoolExecutor(4) as pool,
    ):
        bearer = {"Authorization": f"Bearer {TOKEN}"}
        number = client.get("/v1/model").json()["model"]
        for wrong in ({}, {"Authorization": TOKEN}, {"Authorization": "Bearer é".encode()}):
            assert client.post("/admin/reload", headers=wrong).status_code == 403
        served[0] = other
        with busy(client):
            early = pool.submit(post, client, history=[ITEMS[35]])  # which the other one lacks
            wait_for(client, 1)
            reload = pool.submit(client.post, "/admin/reload", headers=bearer)
            while not client.service._reloading:
                time.sleep(0.005)
            assert client.post("/admin/reload", headers=bearer).status_code == 409
            late = pool.submit(post, client, history=[ITEMS[35]])
            wait_for(client, 2)
        assert reload.result().json() == {"model": number + 1, "items": 30, "catalog": other.catalog.fingerprint}
        for answer in (early, late):
            assert answer.result().json()["model"] == number
            assert_same(*lists_of([answer.result().json()]), *model.recommend([[ITEMS[35]]], k=3, search="items"))
        assert post(client, history=[ITEMS[35]]).json()["detail"][0]["loc"] == ["body", "history", 0]
        assert_same(*lists_of([post(client).json()]), *other.recommend([ASKED["history"]], k=3, search="items"))
        assert client.get("/v1/items").json()["total"] == 30


def test_a_reload_that_fails_leaves_the_model(model: pk.PatchedCausalLM) -> None:
    read: list[Any] = [Served(model)]

    def once() -> Served:
        if not read:
            raise FileNotFoundError("folder: expected a model in 'nowhere'")
        return read.pop()

    with serving(once, token=TOKEN) as client:
        failed = client.post("/admin/reload", headers={"Authorization": f"Bearer {TOKEN}"})
        assert failed.status_code == 500 and "'nowhere'" in failed.json()["detail"][0]["msg"]
        assert post(client).status_code == 200
        assert 'patchkern_reloads_total{outcome="failed"} 1.0' in client.get("/metrics").text


@pytest.mark.parametrize("begun", [False, True])
def test_who_gives_up_a_reload_ends_nothing(model: pk.PatchedCausalLM, begun: bool) -> None:
    with serving(model) as client:
        ran, release = threading.Event(), threading.Event()
        with nullcontext() if begun else busy(client):
            asked = client.service._batcher.call(lambda: (ran.set(), release.wait(30)))
            assert not begun or ran.wait(30)
            assert asked.cancel() != begun
        release.set()
        assert post(client).status_code == 200 and client.service.sick is None
        assert ran.is_set() == begun


def test_a_model_that_cannot_be_served_is_said_at_once(model: pk.PatchedCausalLM) -> None:
    with pytest.raises(ValueError, match="search: expected one of items for this model, got 'beam"):
        Served(item_model(), search="beam")
    without = pk.PatchedCausalLM(model.hf_model, model.catalog, model.prompt)
    with pytest.raises(ValueError, match="policy: expected one"):
        Served(without)


# ------------------------------------------------------------------ the end


def test_whoever_waits_at_the_end_is_answered(model: pk.PatchedCausalLM) -> None:
    with serving(model, token=TOKEN) as client, ThreadPoolExecutor(8) as pool:
        with busy(client):
            waiting: list[Future[Any]] = [pool.submit(post, client, k=k) for k in (1, 2, 3)]
            wait_for(client, 3)
            closed = pool.submit(client.service.close)
            while not client.service._batcher._closing:
                time.sleep(0.005)
            refused = post(client)
            assert refused.status_code == 503 and refused.json()["detail"][0]["type"] == "closing"
            assert client.post("/admin/reload", headers={"Authorization": f"Bearer {TOKEN}"}).status_code == 503
        closed.result(30)
        assert [len(answer.result().json()["items"]) for answer in waiting] == [1, 2, 3]
        assert not client.service._batcher._thread.is_alive()


# ------------------------------------------------------------------ limits


@pytest.mark.parametrize(
    ("limit", "said"),
    [
        ({"max_k": 0}, "max_k: expected an integer in 1"),
        ({"max_batch": 2.5}, "max_batch: expected an integer, got float"),
        ({"memory_budget": "much"}, "memory_budget: expected bytes"),
        ({"max_body": -1}, "max_body: expected at least 1"),
        ({"timeout": 0}, "timeout: expected seconds above 0"),
        ({"max_waiting": 10, "max_users": 11}, "max_users: expected at most max_waiting"),
    ],
)
def test_wrong_limits_are_named(limit: dict[str, Any], said: str) -> None:
    with pytest.raises((TypeError, ValueError), match=said):
        Limits(**limit)
