# SPDX-License-Identifier: Apache-2.0
"""Bodies that nobody would think of: an answer, or a 4xx that says why, never a failure of the server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import event, example, given, settings
from hypothesis import strategies as st
from server_cases import ITEMS, TITLES, language_model, serving

from patchkern.serving.server.limits import Limits

ODD = ["", "\x00", "\ud800", "a\x00", "tt3", "Amélie 0", *list(TITLES.values())[:3], "items", "beam", "drop", "error"]
NUMBERS = [0, 1, 3, -1, 0.5, 1e308, float("nan"), float("inf"), 2**31, 2**63, 2**64, 10**40, *ITEMS[:6]]
LEAVES = st.none() | st.booleans() | st.sampled_from(ODD) | st.sampled_from(NUMBERS) | st.text(max_size=4)
VALUES = st.recursive(
    LEAVES, lambda x: st.lists(x, max_size=6) | st.dictionaries(st.sampled_from(ODD), x, max_size=3), max_leaves=8
)
IDS = st.lists(st.sampled_from(ITEMS), max_size=8)
FIELDS = {
    "user_id": st.sampled_from([None, 7, "ada", "x" * 300, 2**70]),
    "k": st.integers(1, 30),
    "search": st.sampled_from(["items", "beam", None]),
    "num_beams": st.integers(1, 30),
    "exclude_seen": st.booleans(),
    "allowed_items": IDS,
    "unknown": st.sampled_from(["error", "drop", "drop"]),
    "explain": st.booleans(),
}
HISTORY = st.fixed_dictionaries({"history": IDS}) | st.fixed_dictionaries(
    {"titles": st.lists(st.sampled_from(list(TITLES.values())), max_size=5)}
)
USUAL = st.builds(dict.__or__, HISTORY, st.fixed_dictionaries({}, optional=FIELDS))
ODD_FIELDS = st.dictionaries(
    st.sampled_from(["history", "titles", "timestamps", "more", *FIELDS]), VALUES, min_size=1, max_size=2
)
ASKED = USUAL | USUAL | st.builds(dict.__or__, USUAL, ODD_FIELDS)
BODIES = ASKED | st.fixed_dictionaries({"users": st.lists(ASKED, max_size=4)}) | VALUES


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    with serving(language_model()[0], Limits(max_users=3), cache_bytes=1 << 16) as client:
        yield client


@settings(max_examples=80)
@given(body=BODIES, other_path=st.integers(0, 9))
@example(body={"history": ["\ud800"], "unknown": "drop"}, other_path=1)
@example(body={"\ud800": 1}, other_path=1)
@example(body={"titles": ["x" * 5000]}, other_path=1)
def test_no_body_makes_the_server_fail(client: Any, body: Any, other_path: int) -> None:
    is_batch = isinstance(body, dict) and "users" in body
    path = "/v1/recommend:batch" if is_batch != (other_path == 0) else "/v1/recommend"
    answer = client.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
    event(f"{answer.status_code}")
    assert answer.status_code in (200, 422), answer.text
    if answer.status_code == 422:
        assert all(said["msg"] and said["loc"][0] == "body" for said in answer.json()["detail"])
        assert len(answer.content) < 10_000
    assert client.get("/health").status_code == 200
