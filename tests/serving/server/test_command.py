# SPDX-License-Identifier: Apache-2.0
"""The command and what it reads: folders, files of titles; signals; what it says where something is missing."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from server_cases import ITEMS, TITLES, TOKEN, assert_same, item_model, language_model, lists_of

import patchkern as pk
from patchkern.data.parquet import import_pyarrow
from patchkern.serving.__main__ import main
from patchkern.serving.server.catalog_source import read_titles
from patchkern.serving.server.served import Source

REPOSITORY = Path(__file__).resolve().parents[3]


def write_lines(path: Path, titles: dict[Any, str], **more: dict[Any, str]) -> Path:
    rows = [
        {"item_id": item, "title": title} | {name: of[item] for name, of in more.items()}
        for item, title in titles.items()
    ]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return path


# ------------------------------------------------------------------ files of titles


def test_titles_are_read_from_lines_and_from_parquet(tmp_path: Path) -> None:
    pa, pq = import_pyarrow()
    assert read_titles(write_lines(tmp_path / "titles.jsonl", TITLES)) == (TITLES, None)
    texts = {item: f"{title} (film)" for item, title in TITLES.items()}
    assert read_titles(write_lines(tmp_path / "titles.jsonl", TITLES, text=texts)) == (TITLES, texts)
    named = {f"é{item}": title for item, title in TITLES.items()}
    pq.write_table(pa.table({"title": list(named.values()), "item_id": list(named)}), tmp_path / "titles.parquet")
    assert read_titles(tmp_path / "titles.parquet") == (named, None)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ('{"item_id": 1, "title": "a"}\n{"item_id"', "line 2: expected JSON"),
        ("[1, 2]", "line 1: expected an object with an item_id"),
        ('{"item_id": [1], "title": "a"}', "line 1: expected an object with an item_id"),
        ('{"item": 1, "title": "a"}', "line 1: expected item_id, title, got item, title"),
        ('{"item_id": 1, "title": null}', "line 1: expected text as title, got None"),
        ('{"item_id": 1, "title": "a"}\n\n{"item_id": 1, "title": "b"}', "line 3: expected distinct item ids, got 1"),
        (
            '{"item_id": 1, "title": "a", "text": "b"}\n{"item_id": 2, "title": "a"}',
            "line 2: expected item_id, title, text",
        ),
        (
            '{"item_id": 1, "title": "a"}\n{"item_id": "2", "title": "b"}',
            "item_id: expected all integers or all strings",
        ),
    ],
)
def test_what_is_wrong_with_a_file_is_said_by_line(tmp_path: Path, lines: str, said: str) -> None:
    (tmp_path / "titles.jsonl").write_text(lines)
    with pytest.raises((TypeError, ValueError), match=re.escape(said)):
        read_titles(tmp_path / "titles.jsonl")


# ------------------------------------------------------------------ folders


def test_models_are_read_from_folders_and_runs(tmp_path: Path) -> None:
    model, tokenizer = language_model()
    model.save_pretrained(tmp_path / "run" / "checkpoint-7", tokenizer=tokenizer)
    served = Source(str(tmp_path / "run")).read()
    assert (served.search, served.searches, len(served.titles)) == ("items", ("items", "beam"), len(TITLES))
    assert served.model.recommend([ITEMS[:4]], k=5, search="items") == model.recommend([ITEMS[:4]], k=5, search="items")
    titles = {item: TITLES[item] for item in ITEMS[5:]} | {1000: "Entirely New"}
    other = Source(str(tmp_path / "run"), str(write_lines(tmp_path / "titles.jsonl", titles)), search="beam").read()
    assert (other.search, other.titles[-1], len(other.titles)) == ("beam", "Entirely New", 36)
    assert other.number > served.number
    for learned, search in ((("titles",), "beam"), (("titles", "items"), "items"), (("items",), "items")):
        model.learned = learned
        model.save_pretrained(tmp_path / "learned", tokenizer=tokenizer)
        assert Source(str(tmp_path / "learned")).read().search == search

    of_ids = item_model()
    of_ids.save_pretrained(tmp_path / "ids")
    assert Source(str(tmp_path / "ids")).read().searches == ("items",)
    named = {f"tt{item}": title for item, title in titles.items()}
    again = Source(str(tmp_path / "ids"), str(write_lines(tmp_path / "named.jsonl", named))).read()
    assert len(again.titles) == 36 and isinstance(again.model, pk.ItemModel)


def test_new_titles_need_the_models_tokenizer(tmp_path: Path) -> None:
    language_model()[0].save_pretrained(tmp_path / "run")
    with pytest.raises(ValueError, match="saved without the tokenizer that new titles need"):
        Source(str(tmp_path / "run"), str(write_lines(tmp_path / "titles.jsonl", TITLES))).read()


# ------------------------------------------------------------------ the command


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "serve: RUN: expected a model saved by patchkern"),
        (["nowhere", "--memory_budget", "much"], "serve: memory_budget: expected bytes"),
        (["nowhere", "--max_waiting", "10"], "serve: max_users: expected at most max_waiting"),
        (["nowhere", "--admin_token_file", os.devnull], "serve: admin_token_file: expected at least 16 letters"),
        (["nowhere", "--port", "99999"], "serve: port: expected a number from 0 to 65535, got 99999"),
        (["nowhere", "--port", "-1"], "serve: port: expected a number from 0 to 65535, got -1"),
        (["nowhere", "--host", "a" * 300], "serve: host: expected a name or an address of this machine"),
        (["nowhere", "--cache", "1GiB", "--memory_budget", "1GiB"], "serve: cache: expected less than memory_budget"),
        (["nowhere", "--states_bytes", "1MiB"], "serve: states_bytes: expected with states"),
        (["nowhere", "--renamed", "allow"], 'serve: renamed: expected "allow" with catalog'),
        (["nowhere", "--timeout", "1e6"], "serve: timeout: expected seconds above 0 and below 1,000,000, got 1000000"),
        (["nowhere", "--device", "nonsense"], "serve: device: expected one that torch can use here, got 'nonsense'"),
        (["nowhere", "--device", "meta"], "serve: device: expected one that torch can use here, got 'meta'"),
    ],
)
def test_wrong_arguments_are_said_in_one_line(arguments: list[str], said: str) -> None:
    with pytest.raises(SystemExit, match=re.escape(said)) as stopped:
        main(["serve", "--port", "0", *arguments])
    assert len(str(stopped.value).splitlines()) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a torch without CUDA")
def test_a_device_that_is_missing_is_said_in_one_line() -> None:
    with pytest.raises(SystemExit, match=r"^serve: device: expected one that torch can use here, got 'cuda'"):
        main(["serve", "nowhere", "--port", "0", "--device", "cuda"])


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0", ""])
def test_a_port_that_is_taken_is_said_before_the_model_is_read(host: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SystemExit, match=rf"^serve: port: expected one that is free .*, got {port} "):
            main(["serve", "nowhere", "--host", host, "--port", str(port)])
    with pytest.raises(SystemExit, match=r"^serve: RUN: expected a model"):  # it is free again, and was left so
        main(["serve", "nowhere", "--host", host, "--port", str(port)])


@pytest.mark.parametrize("kind", ["titles", "ids"])
def test_what_the_first_search_refuses_is_said_in_one_line(kind: str, tmp_path: Path) -> None:
    model = item_model() if kind == "ids" else language_model()[0]
    model.save_pretrained(tmp_path)
    with pytest.raises(
        SystemExit, match=r"^serve: memory_budget: expected at least \d+ bytes .*, got 1024,"
    ) as stopped:
        main(["serve", str(tmp_path), "--port", "0", "--memory_budget", "1KiB"])
    assert len(str(stopped.value).splitlines()) == 1


@pytest.mark.parametrize("package", ["fastapi", "uvicorn", "prometheus_client"])
def test_a_package_that_is_missing_is_named(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("patchkern.serving.server.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit, match=re.escape(f"serve needs {package}, which is not installed: pip install")):
        main(["serve", "nowhere"])


@contextmanager
def command(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str, list[str]]]:
    """The process of a server, its address, and what it says."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "patchkern.serving", "serve", *arguments, "--port", "0"],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    said: list[str] = []
    reader = threading.Thread(target=lambda: said.extend(process.stderr or ()), daemon=True)
    reader.start()
    try:
        end = time.monotonic() + 120
        while not (found := re.search(r"running on (http://\S+)", "".join(said))):
            assert process.poll() is None and time.monotonic() < end, "".join(said)
            time.sleep(0.05)
        yield process, found[1], said
    finally:
        process.kill()
        process.wait()
        reader.join(10)


def ask(address: str, path: str, content: Any = None, **headers: str) -> Any:
    body = None if content is None else json.dumps(content).encode()
    request = urllib.request.Request(address + path, body, {"Content-Type": "application/json", **headers})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())


@pytest.mark.slow
def test_signals_reload_and_end_the_server(tmp_path: Path) -> None:
    model, tokenizer = language_model()
    model.save_pretrained(tmp_path / "run", tokenizer=tokenizer)
    token = tmp_path / "token"
    token.write_text(TOKEN + "\n")
    titles = write_lines(tmp_path / "titles.jsonl", TITLES)
    asked = {"history": ITEMS[:5], "k": 4, "exclude_seen": True}
    arguments = [str(tmp_path / "run"), "--catalog", str(titles), "--admin_token_file", str(token)]
    with command(*arguments) as (process, address, said):
        answer = ask(address, "/v1/recommend", asked)
        assert_same(*lists_of([answer]), *model.recommend([asked["history"]], k=4, search="items", exclude_seen=True))
        write_lines(titles, TITLES | {1000: "Entirely New"})
        process.send_signal(signal.SIGHUP)
        end = time.monotonic() + 60
        while ask(address, "/v1/items")["total"] != 41:
            assert time.monotonic() < end, "".join(said)
            time.sleep(0.05)
        titles.write_text("nothing of the kind")
        process.send_signal(signal.SIGHUP)
        while "not reloaded" not in "".join(said):
            assert time.monotonic() < end, "".join(said)
            time.sleep(0.05)
        write_lines(titles, TITLES)
        assert ask(address, "/admin/reload", {}, Authorization=f"Bearer {TOKEN}")["items"] == 40
        answers: list[Any] = []
        several = {"users": [asked | {"search": "beam", "num_beams": 100, "k": 40}] * 60}
        waiting = threading.Thread(target=lambda: answers.append(ask(address, "/v1/recommend:batch", several)))
        waiting.start()
        while "waiting_users 0.0" in urllib.request.urlopen(address + "/metrics").read().decode() and not answers:
            time.sleep(0.005)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        waiting.join()
        assert len(answers[0]["users"]) == 60 and all(len(user["items"]) for user in answers[0]["users"])
