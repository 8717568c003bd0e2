# SPDX-License-Identifier: Apache-2.0
"""Small trained-looking models for vLLM, and what stands in for its server where there is no vLLM."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

import patchkern as pk
from patchkern.models.scratch import fit_tokenizer, scratch_prompt
from patchkern.search.trie import Trie
from patchkern.serving.vllm.requests import ALLOWED, CATALOG, EXCLUDED, TITLE_AT, check_args
from patchkern.serving.vllm.served import Served, read_served
from patchkern.serving.vllm.title_masks import TitleMasks, Writing, mask_items

# titles that begin others, and two that are equal
_WRITTEN = """
Alien|Aliens|The Third Man|Brazil|Vertigo|Rear Window|North by Northwest|The Thing|The Fly|Dune|Dune Part Two|Ran|Ikiru|
Alien|The Third|Stalker|Solaris|Mirror|Playtime|Mon Oncle|Jour de fete|Persona|Fanny and Alexander
"""
TITLES = dict(enumerate(_WRITTEN.replace("\n", "").split("|"), start=100))
ITEMS = list(TITLES)
HISTORIES = [ITEMS[:7], ITEMS[9:13], [ITEMS[2]], ITEMS[::-1] * 3]
CONFIGS: dict[str, Any] = {
    "llama": transformers.LlamaConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
    "phi3": transformers.Phi3Config,
}


def make_model(
    family: str = "llama", *, tied: bool = True, dtype: torch.dtype = torch.float32, **switches: bool
) -> tuple[pk.PatchedCausalLM, Any]:
    """A model with random weights, far from uniform, and its tokenizer."""
    tokenizer = fit_tokenizer(TITLES.values(), 320)
    torch.manual_seed(5)
    config = CONFIGS[family](
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.1,
        tie_word_embeddings=tied,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **({"head_dim": 32} if family == "qwen3" else {}),
    )
    hf_model = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    catalog = pk.Catalog.from_titles(TITLES, tokenizer)
    policy = pk.ItemPatches(keep_text=2, max_items=None)
    model = pk.PatchedCausalLM(hf_model, catalog, scratch_prompt(tokenizer), policy, **switches)
    with torch.no_grad():
        if model.item_embedding is not None:
            model.item_embedding.normal_(0, 0.3)
        if model.item_head is not None:
            model.item_head.bias.normal_(0, 0.5)
            model.item_head.transform.weight.add_(0.1 * torch.randn(64, 64, dtype=dtype))
    return model.eval(), tokenizer


def save_run(folder: Path, family: str = "llama", **settings: Any) -> pk.PatchedCausalLM:
    """A model as training leaves it."""
    model, tokenizer = make_model(family, **settings)
    model.save_pretrained(folder, tokenizer=tokenizer)
    return model


class _Engine:
    """What vLLM computes, by a `PatchedCausalLM` in one pass over each sequence."""

    def __init__(self, model: pk.PatchedCausalLM, served: Served, is_masked: bool) -> None:
        self.model, self.served, self.is_masked = model, served, is_masked
        weight = model.get_input_embeddings().weight.detach()
        items = pk.item_table(model.catalog, weight).rows
        if model.item_embedding is not None:
            items = items + model.item_embedding.detach()
        self.rows = torch.cat([weight, items])
        trie = Trie.from_catalog(model.catalog, model.prompt.response_end)
        self.masks = TitleMasks(trie, model.prompt.response_end[-1], "cpu")

    def logits(self, rows: Tensor) -> Tensor:
        """``(1, tokens and items)`` log-probabilities after the last row."""
        tokens, items = self.served.vocab_size, len(self.served.catalog)
        every = rows.new_full((1, tokens + items), float("-inf"))
        with torch.no_grad():
            if self.served.head == "titles":
                logits = self.model.hf_model(inputs_embeds=rows[None], use_cache=False).logits
                every[:, :tokens] = logits[0, -1:].log_softmax(-1)
            else:
                states = self.model.hf_model.model(inputs_embeds=rows[None], use_cache=False).last_hidden_state
                every[:, tokens:] = self.model.item_scores(states[0, -1:])
        return every

    def generate(self, rows: Tensor, prompt: list[int] | None, body: dict[str, Any]) -> list[dict[str, float]]:
        arguments = body.get("vllm_xargs") or {}
        output: list[int] = []
        listed = np.unique(np.array(arguments.get(EXCLUDED, []), np.int64))
        if ALLOWED in arguments:
            listed = np.setdiff1d(np.array(arguments[ALLOWED], np.int64), listed)
        begun = prompt[arguments[TITLE_AT] :] if prompt is not None and TITLE_AT in arguments else []
        writing = Writing(listed, ALLOWED in arguments, output, begun)
        if arguments[CATALOG] != self.served.identity:
            writing = Writing(np.zeros(0, np.int64), True, output, begun)
        self.masks.begin(writing)
        steps = []
        for _ in range(body["max_tokens"]):
            logits = self.logits(rows)
            if not self.is_masked:
                pass
            elif self.served.head == "titles":
                self.masks.advance([writing])
                self.masks.apply(logits, [0], [writing])
            else:
                mask_items(logits, self.served.vocab_size, [0], [writing])
            best = logits[0].topk(min(body["logprobs"], logits.shape[1]))
            pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            steps.append({f"token_id:{token}": max(value, -9999.0) for token, value in pairs})
            output.append(int(best.indices[0]))
            rows = torch.cat([rows, self.rows[output[-1:]]])
            if output[-1] in body.get("stop_token_ids", []):
                break
        return steps


@contextmanager
def fake_server(
    model: pk.PatchedCausalLM, folder: Path, is_masked: bool = True
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A server on this machine that answers as vLLM's does; its address, and the bodies that it was sent."""
    engine = _Engine(model, read_served(folder), is_masked)
    bodies: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def answer(self, status: int, content: dict[str, Any]) -> None:
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            self.answer(200, {"data": [{"id": "served"}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            bodies.append(body | {"authorization": self.headers.get("Authorization")})
            try:
                check_args(body["vllm_xargs"])
            except ValueError as error:
                self.answer(400, {"error": {"message": str(error)}})
                return
            if "prompt_embeds" in body:
                rows = torch.load(io.BytesIO(base64.b64decode(body["prompt_embeds"])), weights_only=True)
                prompts = [(rows, None)]
            else:
                given = body["prompt"] if isinstance(body["prompt"][0], list) else [body["prompt"]]
                prompts = [(engine.rows[ids], ids) for ids in given]
            choices = [
                {"index": index, "logprobs": {"top_logprobs": engine.generate(rows, ids, body)}}
                for index, (rows, ids) in enumerate(prompts)
            ]
            self.answer(200, {"choices": choices[::-1]})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", bodies
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
