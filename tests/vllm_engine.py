# SPDX-License-Identifier: Apache-2.0
"""A program for vLLM's environment: one engine answers batches of prompts; `tests/serving/vllm` calls it as a process.

An engine of its own for each test leaves nothing behind in the tests' process. Requests and answers are torch files.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from patchkern.serving.vllm.requests import LOGITS_PROCESSOR

SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
"""of the environment: little memory, any core, no network"""

OPTIONS = {
    "dtype": "float32",
    "max_model_len": 512,
    "max_num_seqs": 16,
    "block_size": 32,
    "logprobs_mode": "processed_logits",
    "max_logprobs": 1000,
}


def answers(
    folder: Path, work: Path, batches: list[list[dict[str, Any]]], **options: Any
) -> list[list[dict[str, Any]]]:
    """What an engine over ``folder`` says to these batches, one after the other.

    Args:
        folder: an exported one.
        work: for files.
        batches: of requests, with "prompt", token ids or ``(rows, D)`` float32, and fields of `SamplingParams`.
        options: of the engine, besides `OPTIONS`.

    Returns:
        Per request "tokens", "log_probs", per token ``(V,)`` with -inf where it has none, and "cached", the rows of the
        prompt that were not computed.
    """
    torch.save({"folder": str(folder), "batches": batches, "options": OPTIONS | options}, work / "requests.pt")
    command = [sys.executable, __file__, str(work / "requests.pt"), str(work / "answers.pt")]
    root = Path(__file__).resolve().parents[1]
    environment = {**os.environ, **SETTINGS, "PYTHONPATH": str(root)}
    if options.get("tensor_parallel_size", 1) > 1:
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "0|1"
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    found: list[list[dict[str, Any]]] = torch.load(work / "answers.pt", weights_only=True)
    return found


def _main(given: str, written: str) -> None:
    from vllm import LLM, SamplingParams

    job = torch.load(given, weights_only=True)
    engine = LLM(job["folder"], logits_processors=[LOGITS_PROCESSOR], **job["options"])
    every = engine.llm_engine.model_config.get_vocab_size()
    results = []
    for batch in job["batches"]:
        prompts: list[Any] = []
        settings = []
        for request in batch:
            prompt = request.pop("prompt")
            is_rows = isinstance(prompt, torch.Tensor)
            prompts.append({"prompt_embeds": prompt} if is_rows else {"prompt_token_ids": prompt})
            settings.append(SamplingParams(**{"temperature": 0.0, "logprobs": every, "detokenize": False} | request))
        found = []
        for output in engine.generate(prompts, settings, use_tqdm=False):
            (one,) = output.outputs
            log_probs = torch.full((len(one.token_ids), every), float("-inf"))
            for step, values in enumerate(one.logprobs):
                for token, value in values.items():
                    log_probs[step, token] = value.logprob
            found.append({"tokens": list(one.token_ids), "log_probs": log_probs, "cached": output.num_cached_tokens})
        results.append(found)
    torch.save(results, written)


if __name__ == "__main__":
    _main(*sys.argv[1:])
