# SPDX-License-Identifier: Apache-2.0
"""The logits processor of vLLM's V1 engine for titles and items. Imported by vLLM, in its own environment.

Named on the command line, not found by an entry point: the engine hands on the tokens of asynchronous steps to
processors of the command line alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from patchkern.search.trie import Trie
from patchkern.serving.vllm.requests import ALLOWED, CATALOG, EXCLUDED, TITLE_AT, check_args
from patchkern.serving.vllm.served import read_served
from patchkern.serving.vllm.title_masks import TitleMasks, Writing, mask_items


class ItemMasks(LogitsProcessor):
    """Titles of the catalogue, or items, for requests that ask for them (`request_args`); others are left alone."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        config, mode = vllm_config.model_config.hf_config, vllm_config.model_config.logprobs_mode
        if mode != "processed_logits":
            raise ValueError(
                f"logprobs_mode: expected processed_logits, for which masked tokens have no log-probability and the "
                f"others are over the whole vocabulary, got {mode} (--logprobs-mode processed_logits)"
            )
        self._requests: dict[int, Writing] = {}
        self._served = read_served(vllm_config.model_config.model, config.patchkern)
        self._titles: TitleMasks | None = None
        if self._served.head == "titles":
            end = self._served.prompt.response_end
            trie = Trie.from_catalog(self._served.catalog, end)
            self._titles = TitleMasks(trie, end[-1], device)

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        check_args(sampling_params.extra_args or {})

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        process_dict_updates(self._requests, batch_update, self._request)

    def _request(self, params: SamplingParams, prompt: list[int] | None, output: list[int]) -> Writing | None:
        arguments: dict[str, Any] = params.extra_args or {}
        if CATALOG not in arguments:
            return None
        excluded = np.unique(np.array(arguments.get(EXCLUDED, []), np.int64))
        allowed = arguments.get(ALLOWED)
        if arguments[CATALOG] != self._served.identity:
            allowed = []  # of another catalogue, whose positions would be other items
        listed = excluded if allowed is None else np.setdiff1d(np.array(allowed, np.int64), excluded)
        begun = [] if prompt is None or TITLE_AT not in arguments else prompt[arguments[TITLE_AT] :]
        writing = Writing(listed, allowed is not None, output, begun)
        if self._titles is not None:
            self._titles.begin(writing)
        return writing

    def apply(self, logits: Tensor) -> Tensor:
        if not self._requests:
            return logits
        rows, writings = list(self._requests), list(self._requests.values())
        if self._titles is None:
            return mask_items(logits, self._served.vocab_size, rows, writings)
        self._titles.advance(writings)
        return self._titles.apply(logits, rows, writings)
