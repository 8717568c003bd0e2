# SPDX-License-Identifier: Apache-2.0
"""The API: lists are those of `recommend`, alone and among others; whatever else a client sends is a 4xx."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from server_cases import ITEMS, N_ITEMS, TITLES, assert_same, histories, item_model, language_model, lists_of, serving

import patchkern as pk
from patchkern.serving.server.limits import Limits

LIMITS = Limits(max_body="20kB", max_history=200, max_k=30, max_beams=40, max_users=20, max_waiting=64, max_batch=16)


@pytest.fixture(scope="module")
def model() -> pk.PatchedCausalLM:
    return language_model()[0]


@pytest.fixture(scope="module")
def client(model: pk.PatchedCausalLM) -> Iterator[Any]:
    with serving(model, LIMITS) as client:
        yield client


def body(**fields: Any) -> dict[str, Any]:
    return {"history": ITEMS[:5], "k": 3, **fields}


# ------------------------------------------------------------------ answers


@pytest.mark.parametrize("search", ["items", "beam"])
def test_lists_are_those_of_recommend(client: Any, model: pk.PatchedCausalLM, search: str) -> None:
    for history in histories(6):
        for options in ({"k": 7}, {"k": 25, "exclude_seen": True}, {"k": 4, "allowed_items": ITEMS[10:20]}):
            answer = client.post("/v1/recommend", json={"history": history, "search": search, **options})
            assert answer.status_code == 200, answer.text
            beams = max(20, options["k"])
            (expected,) = model.recommend([history], search=search, num_beams=beams, short="allow", **options)
            assert_same(*lists_of([answer.json()]), expected)
            assert [found["title"] for found in answer.json()["items"]] == [TITLES[item] for item, _ in expected]
            assert (answer.json()["dropped"], "history" in answer.json()) == (0, False)


def test_users_with_other_options_come_in_one_request(client: Any, model: pk.PatchedCausalLM) -> None:
    users = [
        {"history": history, "k": 1 + place % 3, "search": ("items", "beam")[place % 2], "exclude_seen": place % 5 == 0}
        for place, history in enumerate(histories(20, seed=1))
    ]
    answers = client.post("/v1/recommend:batch", json={"users": users}).json()["users"]
    for user, found in zip(users, lists_of(answers), strict=True):
        options = {name: user[name] for name in ("k", "search", "exclude_seen")}
        assert_same(found, *model.recommend([user["history"]], **options))


def test_a_burst_is_a_few_batches_and_nobody_gets_anothers_list(model: pk.PatchedCausalLM) -> None:
    users = histories(48, seed=2)
    expected = model.recommend(users, k=5, search="items", exclude_seen=True)
    with serving(model, LIMITS) as client, ThreadPoolExecutor(48) as pool:
        posted = pool.map(
            lambda history: client.post("/v1/recommend", json={"history": history, "k": 5, "exclude_seen": True}), users
        )
        found = lists_of([answer.json() for answer in posted])
        text = client.get("/metrics").text
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other)
    assert metric(text, "patchkern_users_total") == 48
    assert metric(text, "patchkern_batch_users_count") < 48


def test_titles_stand_for_items(client: Any) -> None:
    titles = [TITLES[item].upper() for item in ITEMS[:5]]
    by_titles = client.post("/v1/recommend", json={"titles": titles, "k": 3})
    assert by_titles.json() == client.post("/v1/recommend", json=body()).json()
    wrong = client.post("/v1/recommend", json={"titles": [titles[0], "the brasil 1"], "k": 3})
    assert wrong.status_code == 422
    (said,) = wrong.json()["detail"]
    assert said["loc"] == ["body", "titles", 1] and "did you mean 'The Brazil 1'" in said["msg"]


def test_unknown_items_are_left_out_on_request(client: Any, model: pk.PatchedCausalLM) -> None:
    history, allowed = [ITEMS[0], 10**6, ITEMS[4], -1], [*ITEMS[5:9], 10**7]
    answer = client.post("/v1/recommend", json=body(history=history, allowed_items=allowed, unknown="drop")).json()
    (expected,) = model.recommend([[ITEMS[0], ITEMS[4]]], k=3, search="items", allowed_items=ITEMS[5:9])
    assert_same(*lists_of([answer]), expected)
    assert answer["dropped"] == 3


def test_there_may_be_fewer_items_than_asked_for(client: Any) -> None:
    for search in ("items", "beam"):
        fields = {"search": search, "k": 30, "allowed_items": ITEMS[3:6], "exclude_seen": True}
        assert len(client.post("/v1/recommend", json=body(**fields)).json()["items"]) == 1
        assert client.post("/v1/recommend", json=body(search=search, allowed_items=[])).json()["items"] == []


def test_the_history_is_explained(client: Any, model: pk.PatchedCausalLM) -> None:
    history = (ITEMS * 2)[:9]
    said = client.post("/v1/recommend", json=body(history=history, explain=True)).json()["history"]
    layout = pk.build_layout(model.catalog, [history], model.policy, model.prompt)
    assert [entry["kind"] for entry in said["entries"]] == ["session"] * 2 + ["item"] * 3 + ["text"] * 2
    assert [found["item"] for entry in said["entries"] for found in entry["items"]] == history
    assert sum(entry["rows"] for entry in said["entries"]) == said["rows"] == layout.history_rows
    assert sum(entry["tokens"] for entry in said["entries"]) == said["tokens"] == layout.history_tokens
    of_head = pk.build_layout(model.catalog, [history], model.policy, model.prompt, head="items")
    assert said["prompt_rows"] == of_head.num_rows and said["ratio"] == pytest.approx(layout.compression_ratio)


def test_ids_may_be_strings_and_a_model_of_ids_is_served() -> None:
    model = item_model()
    with serving(model) as client:
        history = ["tt0", "tt3", "tt9"]
        answer = client.post("/v1/recommend", json={"history": history, "k": 5, "explain": True})
        assert_same(*lists_of([answer.json()]), *model.recommend([history], k=5))
        assert answer.json()["history"]["ratio"] == 1
        for wrong, loc in (([3], ["body", "history", 0]), (["tt0", "tt1"], ["body", "history", 1])):
            assert client.post("/v1/recommend", json={"history": wrong}).json()["detail"][0]["loc"] == loc
        assert client.post("/v1/recommend", json={"history": ["tt0"], "search": "beam"}).status_code == 422
        assert client.get("/v1/model").json()["searches"] == ["items"]


def test_policies_that_go_by_time_get_timestamps() -> None:
    model, _ = language_model(pk.TimeSessions(gap=10, keep_text=1, keep_items=1))
    history, times = ITEMS[:6], [0, 5, 9.5, 30, 31, 99]
    with serving(model) as client:
        answer = client.post("/v1/recommend", json={"history": history, "timestamps": times, "k": 4})
        expected = model.recommend(pk.Histories(history, [0, 6], times), k=4, search="items")
        assert_same(*lists_of([answer.json()]), *expected)
        dropped = {"history": [*history, -5], "timestamps": [*times, 100], "k": 4, "unknown": "drop"}
        assert_same(*lists_of([client.post("/v1/recommend", json=dropped).json()]), *expected)
        for wrong in (None, times[::-1], times[:3]):
            refused = client.post("/v1/recommend", json={"history": history, "timestamps": wrong})
            assert refused.status_code == 422 and refused.json()["detail"][0]["loc"] == ["body", "timestamps"]


def test_prompts_of_named_users_are_kept(model: pk.PatchedCausalLM) -> None:
    with serving(model, cache_bytes=1 << 20) as client:
        for user_id, history in (("ada", ITEMS[:7]), ("ada", ITEMS[:8]), (None, ITEMS[:3]), (7, ITEMS[:9])):
            answer = client.post("/v1/recommend", json={"history": history, "k": 5, "user_id": user_id})
            assert_same(*lists_of([answer.json()]), *model.recommend([history], k=5, search="items"))
        assert metric(client.get("/metrics").text, "patchkern_cached_users") == 2


# ------------------------------------------------------------------ the catalogue


def test_items_are_found_by_title(client: Any) -> None:
    found = client.get("/v1/items", params={"query": "amelie", "limit": 3}).json()
    assert found["total"] == N_ITEMS
    assert [item["title"] for item in found["items"]] == ["Amélie 0", "Amélie 4", "Amélie 8"]
    further = client.get("/v1/items", params={"query": "amelie", "limit": 2, "offset": 1}).json()
    assert further["items"] == found["items"][1:]
    page = client.get("/v1/items", params={"offset": N_ITEMS - 1}).json()["items"]
    assert page == [{"item": ITEMS[-1], "title": TITLES[ITEMS[-1]]}]
    assert client.get("/v1/items", params={"query": "nothing of the kind"}).json()["items"] == []
    for params in ({"limit": 0}, {"limit": 101}, {"offset": -1}, {"query": "x" * 201}, {"limit": "all"}):
        refused = client.get("/v1/items", params=params)
        assert refused.status_code == 422 and refused.json()["detail"][0]["loc"] == ["query", *params]


def test_the_model_says_what_it_is(client: Any, model: pk.PatchedCausalLM) -> None:
    said = client.get("/v1/model").json()
    assert (said["items"], said["catalog"], said["searches"]) == (N_ITEMS, model.catalog.fingerprint, ["items", "beam"])
    assert (said["max_history"], said["max_k"], said["max_users"]) == (200, 30, 20)


def test_the_interface_is_described_and_nothing_is_loaded_from_elsewhere(client: Any) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    assert set(paths) == {"/v1/recommend", "/v1/recommend:batch", "/v1/items", "/v1/model"}
    assert client.get("/docs").status_code == client.get("/redoc").status_code == 404
    page = client.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "http" not in page.text.replace("http://www.w3.org/2000/svg", "")


# ------------------------------------------------------------------ what is refused

NAMED: dict[str, tuple[dict[str, Any], list[Any]]] = {
    "no history": ({"history": None}, ["history"]),
    "history and titles": ({"titles": ["Alien 2"]}, ["history"]),
    "history is a text": ({"history": "30"}, ["history"]),
    "history is an object": ({"history": {"0": 3}}, ["history"]),
    "a string among integers": ({"history": [3, "3"]}, ["history", 1]),
    "a boolean": ({"history": [True]}, ["history", 0]),
    "a float": ({"history": [3.0]}, ["history", 0]),
    "nothing in a list": ({"history": [3, None]}, ["history", 1]),
    "a list in a list": ({"history": [[3]]}, ["history", 0]),
    "an unknown item": ({"history": [3, 6, 7]}, ["history", 2]),
    "an item beyond 64 bits": ({"history": [2**80]}, ["history"]),
    "too long a history": ({"history": [3] * 201}, ["history"]),
    "too many titles": ({"history": None, "titles": ["x"] * 201}, ["titles"]),
    "an unknown title": ({"history": None, "titles": ["Alien 2", "\x00"]}, ["titles", 1]),
    "half a character": ({"history": None, "titles": ["\ud800"]}, ["titles", 0]),
    "k is 0": ({"k": 0}, ["k"]),
    "k is too large": ({"k": 31}, ["k"]),
    "k is a text": ({"k": "3"}, ["k"]),
    "k is huge": ({"k": 10**30}, ["k"]),
    "k is a boolean": ({"k": True}, ["k"]),
    "k is a float": ({"k": 2.5}, ["k"]),
    "no such search": ({"search": "exact"}, ["search"]),
    "too many beams": ({"search": "beam", "num_beams": 41}, ["num_beams"]),
    "no beams": ({"search": "beam", "num_beams": 0}, ["num_beams"]),
    "exclude_seen is a number": ({"exclude_seen": 1}, ["exclude_seen"]),
    "an unknown allowed item": ({"allowed_items": [3, 4]}, ["allowed_items", 1]),
    "allowed_items is a number": ({"allowed_items": 3}, ["allowed_items"]),
    "timestamps too few": ({"timestamps": [1.0]}, ["timestamps"]),
    "a timestamp is a text": ({"timestamps": ["now"] * 5}, ["timestamps", 0]),
    "a timestamp is no number": ({"timestamps": [float("nan")] * 5}, ["timestamps", 0]),
    "a timestamp is infinite": ({"timestamps": [float("inf")] * 5}, ["timestamps", 0]),
    "user_id is a list": ({"user_id": []}, ["user_id", "int"]),
    "no such field": ({"temperature": 1}, ["temperature"]),
}


@pytest.mark.parametrize("case", NAMED)
def test_a_wrong_field_is_named(client: Any, case: str) -> None:
    fields, loc = NAMED[case]
    for path, content, start in (
        ("/v1/recommend", body(**fields), ["body"]),
        ("/v1/recommend:batch", {"users": [body(), body(**fields)]}, ["body", "users", 1]),
    ):
        refused = client.post(path, content=json.dumps(content), headers={"Content-Type": "application/json"})
        assert refused.status_code == 422, refused.text
        said = refused.json()["detail"][0]
        assert said["loc"] == [*start, *loc] and said["msg"] and len(refused.content) < 4000


MALFORMED: dict[str, tuple[bytes, int]] = {
    "nothing": (b"", 422),
    "no JSON": (b"history=3", 422),
    "cut off": (b'{"history": [3, 6', 422),
    "no UTF-8": (b'{"history": ["\xff"]}', 400),
    "a list": (b"[3, 6]", 422),
    "a number": (b"1e999", 422),
    "deep": (b"[" * 9000, 400),
    "many digits": (b'{"history": [' + b"9" * 5000 + b"]}", 400),
    "a long name": (b'{"' + b"x" * 9000 + b'": 1, "history": []}', 422),
    "half a name": (b'{"\\ud800": 1, "history": []}', 422),
    "too long": (b" " * 20001, 413),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_body_is_refused(client: Any, case: str) -> None:
    content, status = MALFORMED[case]
    for path in ("/v1/recommend", "/v1/recommend:batch"):
        for sent in (content, iter([content[:7], content[7:]])):  # the latter without a length
            refused = client.post(path, content=sent, headers={"Content-Type": "application/json"})
            assert refused.status_code == status, refused.text
            assert refused.json()["detail"][0]["msg"] and len(refused.content) < 4000
    assert client.post("/v1/recommend", json=body()).status_code == 200


def test_other_requests_are_refused(client: Any) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        refused = client.post("/v1/recommend", content=b"{}", headers={"Content-Type": kind})
        assert refused.status_code == 422 and refused.json()["detail"][0]["loc"] == ["header", "content-type"]
    of_a_version = {"Content-Type": "Application/vnd.lists+json; charset=utf-8"}
    assert client.post("/v1/recommend", content=json.dumps(body()), headers=of_a_version).status_code == 200
    refused = client.post("/v1/recommend", content=b"[3, 6]", headers={"Content-Type": "application/json"})
    assert refused.json()["detail"] == [{"loc": ["body"], "msg": "expected an object, got list", "type": "model_type"}]
    for method, path, status in (
        ("get", "/v1/recommend", 405),
        ("get", "/nothing", 404),
        ("post", "/admin/reload", 404),
    ):
        refused = getattr(client, method)(path)
        assert refused.status_code == status and refused.json()["detail"][0]["msg"]
    for users, loc in (([], ["body", "users"]), ([body()] * 21, ["body", "users"]), ([3], ["body", "users", 0])):
        refused = client.post("/v1/recommend:batch", json={"users": users})
        assert refused.status_code == 422 and refused.json()["detail"][0]["loc"] == loc


def test_paths_that_clients_make_up_make_no_metrics(client: Any) -> None:
    for path in ("/a", "/b"):
        client.get(path)
    text = client.get("/metrics").text
    assert 'path="other",status="404"' in text and 'path="/a"' not in text
    assert 'path="/v1/recommend",status="200"' in text


def metric(text: str, name: str) -> float:
    (value,) = [float(line.split()[-1]) for line in text.splitlines() if line.split()[:1] == [name]]
    return value
