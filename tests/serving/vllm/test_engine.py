# SPDX-License-Identifier: Apache-2.0
"""vLLM itself against `PatchedCausalLM`: log-probabilities, titles, items, sessions, its prefix cache, its server.

In an environment of its own: ``make test-vllm``.
"""

from __future__ import annotations

import http.client
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import vllm_engine
from vllm_cases import HISTORIES, ITEMS, save_run

import patchkern as pk
from patchkern.serving.vllm.client import ServerError, VllmClient
from patchkern.serving.vllm.export import export_model
from patchkern.serving.vllm.item_tokens import item_token_ids
from patchkern.serving.vllm.prompt_rows import PromptRows
from patchkern.serving.vllm.requests import request_args
from patchkern.serving.vllm.served import read_served

pytest.importorskip("vllm", reason="vLLM is not installed here (make test-vllm)")
pytestmark = pytest.mark.slow

SESSIONS = pk.SessionPatches(3, max_items=None, align="start")
TOLERANCE = 1e-5
GROWING = [ITEMS[::2] * 10 + ITEMS[:end] for end in (0, 1, 4)]
"""a history that grows, with more rows than a block of the prefix cache has"""


def served_model(tmp_path: Path, head: str = "titles", **settings: Any) -> tuple[pk.PatchedCausalLM, Path]:
    model = save_run(tmp_path / "run", **settings)
    export_model(tmp_path / "run", tmp_path / "served", head)
    return model, tmp_path / "served"


def after_prompts(model: pk.PatchedCausalLM, layout: pk.PatchLayout) -> torch.Tensor:
    with torch.no_grad():
        return model(layout).logits.log_softmax(-1)


def worst(found: list[dict[str, Any]], expected: torch.Tensor, columns: slice) -> float:
    """The largest difference of the first token's log-probabilities in these columns; the others must be -inf."""
    got = torch.stack([one["log_probs"][0] for one in found])
    others = torch.ones(got.shape[1], dtype=torch.bool)
    others[columns] = False
    assert bool(got[:, others].isneginf().all())
    return float((got[:, columns] - expected).abs().max())


@pytest.mark.parametrize(
    ("family", "tied", "item_embeddings", "eager"),
    [
        ("llama", True, False, True),
        ("llama", False, True, False),
        ("qwen2", True, True, True),
        ("qwen3", False, False, True),
        ("phi3", True, True, True),
    ],
)
def test_titles(tmp_path: Path, family: str, tied: bool, item_embeddings: bool, eager: bool) -> None:
    model, folder = served_model(tmp_path, family=family, tied=tied, item_embeddings=item_embeddings)
    served, rows = read_served(folder), PromptRows(folder)
    tokens = slice(0, served.vocab_size)
    layout = pk.build_layout(model.catalog, HISTORIES, model.policy, model.prompt)
    sessions = pk.build_layout(model.catalog, HISTORIES, SESSIONS, model.prompt)
    growing = pk.build_layout(model.catalog, GROWING, model.policy, model.prompt)
    growing_sessions = pk.build_layout(model.catalog, GROWING, SESSIONS, model.prompt)
    prompts = [ids.tolist() for ids in item_token_ids(layout, model.catalog, served.vocab_size)]
    longer = [ids.tolist() for ids in item_token_ids(growing, model.catalog, served.vocab_size)]
    longer_rows = rows(growing_sessions)
    index = [model.catalog.index_of(history).tolist() for history in HISTORIES]
    only = model.catalog.index_of(ITEMS[5:8]).tolist()
    titles = {"max_tokens": 24, "stop_token_ids": list(model.prompt.response_end), "ignore_eos": False}
    batches = [
        [{"prompt": ids, "max_tokens": 1} for ids in prompts],
        [{"prompt": one, "max_tokens": 1} for one in rows(sessions)],
        # the best title of each user, of all, of those that it has not seen, and of three
        [{"prompt": ids, "extra_args": request_args(served), **titles} for ids in prompts],
        [
            {"prompt": ids, "extra_args": request_args(served, excluded=seen), **titles}
            for ids, seen in zip(prompts[:3], index, strict=False)
        ],
        [{"prompt": ids, "extra_args": request_args(served, allowed=only), **titles} for ids in prompts],
        *([{"prompt": ids, "max_tokens": 1}] for ids in longer),
        *([{"prompt": one, "max_tokens": 1}] for one in longer_rows),
        [{"prompt": prompts[0], "max_tokens": 3}],  # an ordinary request, beside which nothing is masked
    ]
    found = vllm_engine.answers(folder, tmp_path, batches, enforce_eager=eager, enable_prompt_embeds=True)
    assert worst(found[0], after_prompts(model, layout), tokens) < TOLERANCE
    assert worst(found[1], after_prompts(model, sessions), tokens) < TOLERANCE

    scores = model.score_items(HISTORIES)
    sequences = [[*model.catalog.tokens(item).tolist(), *model.prompt.response_end] for item in range(len(ITEMS))]
    for answers, items in ((found[2], [None] * 4), (found[3], index), (found[4], [None] * 4)):
        for user, (answer, seen) in enumerate(zip(answers, items, strict=False)):
            (item, *_) = (i for i, sequence in enumerate(sequences) if sequence == answer["tokens"])
            steps = zip(answer["log_probs"], answer["tokens"], strict=True)
            score = sum(float(step[token]) for step, token in steps)
            assert abs(score - scores[user, item]) < TOLERANCE * len(answer["tokens"])
            assert seen is None or item not in seen
            assert answers is not found[4] or item in only
    for answers, kept in (
        (found[5:8], after_prompts(model, growing)),
        (found[8:11], after_prompts(model, growing_sessions)),
    ):
        for user, (answer,) in enumerate(answers):
            assert worst([answer], kept[user : user + 1], tokens) < TOLERANCE
        assert answers[0][0]["cached"] < 32 <= answers[1][0]["cached"] <= answers[2][0]["cached"]
    assert len(found[11][0]["tokens"]) == 3


def test_items(tmp_path: Path) -> None:
    model, folder = served_model(tmp_path, "items", tied=False, item_embeddings=True, item_head=True)
    served = read_served(folder)
    layout = pk.build_layout(model.catalog, HISTORIES, model.policy, model.prompt, head="items")
    sessions = pk.build_layout(model.catalog, HISTORIES, SESSIONS, model.prompt, head="items")
    prompts = [ids.tolist() for ids in item_token_ids(layout, model.catalog, served.vocab_size)]
    listed = request_args(served, allowed=[1, 2, 3, 4], excluded=[2])
    batches = [
        [{"prompt": ids, "max_tokens": 1} for ids in prompts],
        [{"prompt": one, "max_tokens": 1} for one in PromptRows(folder)(sessions)],
        [{"prompt": ids, "max_tokens": 1, "extra_args": listed} for ids in prompts],
    ]
    found = vllm_engine.answers(folder, tmp_path, batches, enforce_eager=True, enable_prompt_embeds=True)
    items = slice(served.vocab_size, served.vocab_size + len(ITEMS))
    scores = torch.from_numpy(model.score_items(HISTORIES, head="items"))
    assert worst(found[0], scores, items) < TOLERANCE
    of_sessions = torch.from_numpy(model.score_items(HISTORIES, SESSIONS, head="items"))
    assert worst(found[1], of_sessions, items) < TOLERANCE
    for user, answer in enumerate(found[2]):
        got = answer["log_probs"][0]
        assert got.isfinite().nonzero()[:, 0].tolist() == [served.vocab_size + item for item in (1, 3, 4)]
        assert float((got[got.isfinite()] - scores[user, [1, 3, 4]]).abs().max()) < TOLERANCE


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores")
def test_two_processes_share_the_vocabulary(tmp_path: Path) -> None:
    model, folder = served_model(tmp_path, item_embeddings=True)
    served = read_served(folder)
    layout = pk.build_layout(model.catalog, HISTORIES, model.policy, model.prompt)
    prompts = [ids.tolist() for ids in item_token_ids(layout, model.catalog, served.vocab_size)]
    batches = [[{"prompt": ids, "max_tokens": 1} for ids in prompts]]
    parallel = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    (found,) = vllm_engine.answers(folder, tmp_path, batches, enforce_eager=True, **parallel)
    assert worst(found, after_prompts(model, layout), slice(0, served.vocab_size)) < TOLERANCE


@contextmanager
def server(folder: Path, log: Path) -> Iterator[str]:
    """vLLM's server over an exported folder, on a port of this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    program += ["--logits-processors", vllm_engine.LOGITS_PROCESSOR, "--logprobs-mode", "processed_logits"]
    program += ["--max-logprobs", "200", "--dtype", "float32", "--block-size", "32", "--max-model-len", "512"]
    program += ["--max-num-seqs", "32", "--enforce-eager", "--host", "127.0.0.1", "--port", str(port)]
    root = Path(__file__).resolve().parents[3]
    environment = {**os.environ, **vllm_engine.SETTINGS, "PYTHONPATH": str(root)}
    del environment["VLLM_ENABLE_V1_MULTIPROCESSING"]
    with log.open("w") as lines:
        process = subprocess.Popen(program, env=environment, stdout=lines, stderr=lines)
    try:
        deadline = time.monotonic() + 300
        while not _is_up(port):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-4000:]
            time.sleep(1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)


def _is_up(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def test_the_client_of_its_server(tmp_path: Path) -> None:
    model, folder = served_model(tmp_path, item_embeddings=True)
    with server(folder, tmp_path / "log") as url:
        client = VllmClient(url, folder)
        for options in (
            {"k": 5, "num_beams": 8},
            {"k": 5, "num_beams": 20, "exclude_seen": True},
            {"k": 3, "num_beams": 4, "allowed_items": ITEMS[5:12]},
        ):
            histories = HISTORIES[:3] if "exclude_seen" in options else HISTORIES
            got, expected = client.recommend(histories, **options), model.recommend(histories, **options)
            assert [[item for item, _ in user] for user in got] == [[item for item, _ in user] for user in expected]
            for one, two in zip(got, expected, strict=True):
                assert [score for _, score in one] == pytest.approx([score for _, score in two], abs=1e-4)
        # one request a user: a title, token by token, with the score that all titles' scores have for it
        scores = model.score_items(HISTORIES)
        for user, ((item, score),) in enumerate(client.recommend(HISTORIES, k=1, num_beams=1)):
            assert score == pytest.approx(float(scores[user, ITEMS.index(item)]), abs=1e-4)
        past = client.served.vocab_size + len(ITEMS)
        for prompt, arguments, message in (
            ([past], {}, rf"400: .*{past} is out of vocabulary"),
            ([0], {"patchkern_catalog": "x", "patchkern_allowed": ["a"]}, r"400: .*expected a list of catalogue"),
        ):
            with pytest.raises(ServerError, match=message):
                client._complete({"prompt": prompt}, arguments, logprobs=1)
