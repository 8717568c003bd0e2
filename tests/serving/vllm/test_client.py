# SPDX-License-Identifier: Apache-2.0
"""The client against ``recommend``, over a server that computes with the model itself; and what it sends."""

from __future__ import annotations

import contextlib
import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer
from vllm_cases import HISTORIES, ITEMS, fake_server, save_run

import patchkern as pk
from patchkern.serving.vllm.client import ServerError, VllmClient
from patchkern.serving.vllm.export import export_model
from patchkern.serving.vllm.prompt_rows import PromptRows
from patchkern.serving.vllm.requests import check_args, request_args
from patchkern.serving.vllm.served import read_served

SESSIONS = pk.SessionPatches(2, max_items=None, align="start")


def assert_same(got: Any, expected: Any) -> None:
    assert [[item for item, _ in user] for user in got] == [[item for item, _ in user] for user in expected]
    for one, two in zip(got, expected, strict=True):
        assert [score for _, score in one] == pytest.approx([score for _, score in two], abs=1e-9)


@pytest.fixture(scope="module", params=["titles", "items"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp(request.param)
    model = save_run(folder / "run", tied=False, dtype=torch.float64, item_embeddings=True, item_head=True)
    export_model(folder / "run", folder / "served", request.param)
    with fake_server(model, folder / "served") as (url, bodies):
        yield model, folder / "served", url, bodies


@pytest.mark.parametrize(
    "options",
    [
        {"k": 5, "num_beams": 6},
        {"k": 4, "num_beams": 9, "exclude_seen": True},
        {"k": 3, "num_beams": 3, "allowed_items": [ITEMS[i] for i in (0, 1, 13, 6, 7)]},
        {"k": 2, "num_beams": 4, "exclude_seen": True, "allowed_items": [ITEMS[i::4] for i in range(4)]},
    ],
)
def test_the_lists_of_recommend(served: Any, options: dict[str, Any]) -> None:
    model, folder, url, _ = served
    histories = HISTORIES[:3] if options.get("exclude_seen") else HISTORIES
    if "allowed_items" in options and isinstance(options["allowed_items"][0], list):
        options = options | {"allowed_items": options["allowed_items"][: len(histories)]}
    client = VllmClient(url, folder)
    search = "items" if client.served.head == "items" else "beam"
    assert_same(client.recommend(histories, **options), model.recommend(histories, search=search, **options))


def test_sessions_as_rows(served: Any) -> None:
    model, folder, url, bodies = served
    client = VllmClient(url, folder, SESSIONS, rows=PromptRows(folder))
    bodies.clear()
    if client.served.head == "items":
        got = client.recommend(HISTORIES, k=6)
        assert_same(got, model.recommend(HISTORIES, SESSIONS, k=6, search="items"))
    else:
        scores = model.score_items(HISTORIES, SESSIONS)
        for user, ((item, score),) in enumerate(client.recommend(HISTORIES, k=1, num_beams=1)):
            assert score == pytest.approx(float(scores[user, ITEMS.index(item)]), abs=1e-9)
        with pytest.raises(ValueError, match=r"num_beams: expected 1 with prompts of embeddings"):
            client.recommend(HISTORIES, k=2, num_beams=2)
    assert len(bodies) == len(HISTORIES) and all("prompt" not in body for body in bodies)
    with pytest.raises(ValueError, match=r"layout: expected patches of one item each.*PromptRows"):
        VllmClient(url, folder, SESSIONS).recommend(HISTORIES)


def test_one_request_a_user_where_one_is_enough(served: Any) -> None:
    model, folder, url, bodies = served
    client = VllmClient(url, folder, concurrency=1, api_key="secret")
    bodies.clear()
    client.recommend(HISTORIES[:2], k=1, num_beams=1, exclude_seen=True)
    assert len(bodies) == 2
    end = model.prompt.response_end
    for body, history in zip(bodies, HISTORIES, strict=False):
        assert body.pop("authorization") == "Bearer secret"
        assert body["model"] == "served" and body["temperature"] == 0 and body["logprobs"] == 1
        assert body["cache_salt"] == client.served.identity == body["vllm_xargs"]["patchkern_catalog"]
        assert body["vllm_xargs"]["patchkern_excluded"] == sorted(set(model.catalog.index_of(history).tolist()))
        assert body.get("stop_token_ids") == (None if client.served.head == "items" else list(end))
    assert any(max(body["prompt"]) >= client.served.vocab_size for body in bodies)


def test_whoever_is_served_by_another_folder_hears_of_it(served: Any, tmp_path: Path) -> None:
    _, folder, url, _ = served
    head = read_served(folder).head
    other = save_run(tmp_path / "run", dtype=torch.float64, item_head=True)
    titles = {item: f"{title} II" for item, title in zip(ITEMS, other.catalog.titles or (), strict=True)}
    catalog = pk.Catalog.from_titles(titles, AutoTokenizer.from_pretrained(tmp_path / "run"))
    renamed = pk.PatchedCausalLM(other.hf_model, catalog, other.prompt, other.policy, item_head=True)
    renamed.save_pretrained(tmp_path / "renamed", tokenizer=AutoTokenizer.from_pretrained(tmp_path / "run"))
    export_model(tmp_path / "renamed", tmp_path / "served", head)
    for num_beams in (1, 3):
        with pytest.raises(ServerError, match=r"is another folder served"):
            VllmClient(url, tmp_path / "served").recommend(HISTORIES, k=1, num_beams=num_beams)


def test_a_server_without_masks_is_noticed(served: Any) -> None:
    model, folder, _, _ = served
    with fake_server(model, folder, is_masked=False) as (url, _):
        client = VllmClient(url, folder)
        # an item that would come first is among those left out
        ((best, _),) = model.recommend([HISTORIES[0]], k=1, search="items")[0]
        with pytest.raises(ServerError, match=r"without patchkern.serving.vllm.masks:ItemMasks"):
            client.recommend([[best, *HISTORIES[0]]], k=10, exclude_seen=True)


@contextmanager
def endpoint(*behaviours: str) -> Iterator[tuple[str, threading.Event]]:
    """A server that names its model "0", "1", ... by how often it was asked, and behaves as told each time.

    "late" answers when the event is set, "hangs up" closes the connection behind an answer that does not say so.
    """
    asked, released = itertools.count(), threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            number = next(asked)
            content = json.dumps({"data": [{"id": str(number)}]}).encode()
            if behaviours[number] == "late":
                released.wait(30)
            with contextlib.suppress(OSError):  # who asked may be gone
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)
            self.close_connection = behaviours[number] == "hangs up"

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", released
    finally:
        released.set()
        server.shutdown()
        thread.join()
        server.server_close()


def test_after_an_answer_that_did_not_come_the_next_is_of_its_own_request(served: Any) -> None:
    """Not the late one, and not a refusal to send anything over a connection that still waits."""
    with endpoint("late", "answers") as (url, released):
        client = VllmClient(url, served[1], timeout=2.0)
        with pytest.raises(TimeoutError):
            client.model  # noqa: B018
        released.set()
        time.sleep(0.1)
        assert client.model == "1"


def test_a_kept_connection_that_the_server_closed_is_opened_again(served: Any) -> None:
    with endpoint("hangs up", "answers") as (url, _):
        client = VllmClient(url, served[1])
        assert client.model == "0"
        time.sleep(0.1)
        client._model = None
        assert client.model == "1"


def test_no_users(served: Any) -> None:
    _, folder, url, _ = served
    assert VllmClient(url, folder).recommend([]) == []


def test_refused(served: Any, tmp_path: Path) -> None:
    _, folder, url, bodies = served
    for make, message in (
        (lambda: VllmClient("localhost:8000", folder), r"url: expected http://host:port"),
        (lambda: VllmClient(url, tmp_path), r"folder: expected an exported model"),
        (lambda: VllmClient(url, folder, concurrency=0), r"concurrency: .*got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    client = VllmClient(url, folder)
    client.model  # noqa: B018  (asked once)
    bodies.clear()
    calls: list[tuple[Callable[[], Any], str]] = [
        (lambda: client.recommend(HISTORIES, k=0), r"k: .*got 0"),
        (lambda: client.recommend(HISTORIES, num_beams=0), r"num_beams: .*got 0"),
        (lambda: client.recommend([[ITEMS[0], 5]]), r"histories: expected item ids of the catalog, got 5"),
        (lambda: client.recommend([ITEMS], k=2, exclude_seen=True, user_ids=["ada"]), r"k: .*user 'ada'"),
        (lambda: client.recommend(HISTORIES, allowed_items=[ITEMS[0]], k=2), r"k: expected at most 1"),
    ]
    for call, message in calls:
        with pytest.raises(ValueError, match=message):
            call()
    assert bodies == []
    with pytest.raises(ServerError, match=r"the server answered 400: .*patchkern_allowed: expected a list"):
        client._complete({"prompt": [0]}, {"patchkern_catalog": "x", "patchkern_allowed": ["a"]}, 1)


def test_arguments_of_a_request(served: Any) -> None:
    folder = read_served(served[1])
    arguments = request_args(folder, allowed=[3, 1], excluded=torch.tensor([2]).numpy(), title_at=7)
    assert arguments == {
        "patchkern_catalog": folder.identity,
        "patchkern_allowed": [3, 1],
        "patchkern_excluded": [2],
        "patchkern_title_at": 7,
    }
    check_args(arguments)
    check_args({"another": "processor's"})
    with pytest.raises(ValueError, match=r"allowed: expected catalogue positions in 0..22"):
        request_args(folder, allowed=[23])
    with pytest.raises(TypeError, match=r"excluded: expected a list"):
        request_args(folder, excluded=["a"])  # type: ignore[list-item]
    for wrong, message in (
        ({"patchkern_alowed": [1]}, r"arguments that patchkern knows, got patchkern_alowed"),
        ({"patchkern_allowed": [1]}, r"patchkern_catalog: expected the identity"),
        ({**arguments, "patchkern_excluded": [True]}, r"patchkern_excluded: expected a list"),
        ({**arguments, "patchkern_excluded": [-1]}, r"patchkern_excluded: expected a list"),
        ({**arguments, "patchkern_title_at": 1.5}, r"patchkern_title_at: expected a place"),
    ):
        with pytest.raises(ValueError, match=message):
            check_args(wrong)
