# SPDX-License-Identifier: Apache-2.0
"""Causal language models of vLLM with a token for every item. Imported by vLLM, in its own environment."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.phi3 import Phi3ForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM

from patchkern.models.files import read_item_embeddings
from patchkern.models.item_head import ItemHead
from patchkern.ops.item_table import item_table
from patchkern.serving.vllm.served import Served, read_served


class TokensAndItems(VocabParallelEmbedding):
    """A token embedding, followed by a row for each item: ids from ``org_vocab_size`` on are items."""

    items: VocabParallelEmbedding

    def forward(self, input_: Tensor) -> Tensor:
        is_item = input_ >= self.org_vocab_size
        tokens = super().forward(input_.masked_fill(is_item, 0))
        items = self.items((input_ - self.org_vocab_size).clamp(min=0))
        return torch.where(is_item[..., None], items, tokens)


class ItemTokens:
    """A mixin, before a causal language model of vLLM: prompts may hold items, whose rows are their patches.

    The network and its checkpoint stay what they are. The items' rows are pooled from the checkpoint's embedding when
    it is loaded, as `patchkern.item_table` pools them, plus the items' own vectors. Logits come as log-probabilities,
    float32: over the vocabulary, -inf for items; or, where the exported folder is for the item head, over the items,
    -inf for tokens.
    """

    embedding_name = "model.embed_tokens.weight"
    """in the checkpoint: the input embedding"""
    output_name = "lm_head.weight"
    """in the checkpoint: the output embedding, where it is not the input's"""

    item_vectors: Tensor
    """``(D, n_items)`` of the item head"""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", **rest: Any) -> None:
        model_config = vllm_config.model_config
        config = model_config.hf_config
        served = read_served(model_config.model, config.patchkern)
        if config.vocab_size != served.vocab_size + len(served.catalog):
            raise ValueError(
                f"vocab_size: expected {served.vocab_size} tokens and {len(served.catalog)} items together, got "
                f"{config.vocab_size}"
            )
        with _sized(config, served.vocab_size):
            super().__init__(vllm_config=vllm_config, prefix=prefix, **rest)  # type: ignore[call-arg]
        self._served: Served = served
        self._total: int = config.vocab_size
        self._dtype: torch.dtype = model_config.dtype
        self._add_items(config.hidden_size)
        self._head: ItemHead | None = None
        if served.head == "items":
            weight = next(self.parameters())  # type: ignore[attr-defined]
            self._head = ItemHead(served.catalog, config.hidden_size, model_config.dtype, weight.device)
            vectors = torch.zeros(
                config.hidden_size, len(served.catalog), dtype=model_config.dtype, device=weight.device
            )
            self.register_buffer("item_vectors", vectors, persistent=False)  # type: ignore[attr-defined]

    def _add_items(self, width: int) -> None:
        """Give the input embedding its items, unless another process of a pipeline has it."""
        embeddings = [
            module
            for module in self.modules()  # type: ignore[attr-defined]
            if isinstance(module, VocabParallelEmbedding) and not isinstance(module, ParallelLMHead)
        ]
        for tokens in embeddings:
            tokens.items = VocabParallelEmbedding(len(self._served.catalog), width, params_dtype=self._dtype)
            tokens.__class__ = TokensAndItems  # its weight keeps its name, and an output embedding that is tied to it

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """The checkpoint's, and what is made of its embeddings."""
        seen: dict[str, Tensor] = {}
        loaded: set[str] = super().load_weights(self._watched(weights, seen))  # type: ignore[misc]
        if self.embedding_name not in seen:
            raise ValueError(f"checkpoint: expected {self.embedding_name}, got none")
        dtype = self._dtype
        embedding = _frozen(seen[self.embedding_name], dtype)
        own = None
        if self._served.item_embeddings:
            own = read_item_embeddings(self._served.folder, self._served.catalog, embedding.shape[1]).to(dtype)
        rows = item_table(self._served.catalog, embedding).rows
        rows = rows if own is None else rows + own
        for module in self.modules():  # type: ignore[attr-defined]
            if isinstance(module, TokensAndItems):
                module.items.weight_loader(module.items.weight, rows)
        if self._head is not None:
            self._head.load(self._served.folder)
            output = _frozen(seen[self.output_name], dtype) if self.output_name in seen else embedding
            with torch.no_grad():
                self.item_vectors.copy_(self._head.vectors(output, own).T)
        # of ours too nothing is left to load
        ours = {name for name, _ in self.named_parameters() if ".items." in name or name.startswith("_head.")}  # type: ignore[attr-defined]
        return loaded | ours

    def _watched(self, weights: Iterable[tuple[str, Tensor]], seen: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Keep those that items are made of; a tied output embedding that a checkpoint has all the same is not one."""
        tied = self.config.tie_word_embeddings  # type: ignore[attr-defined]
        for name, weight in weights:
            if name == self.embedding_name or (name == self.output_name and not tied):
                seen[name] = weight
            yield name, weight

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """``(N, vocabulary and items)`` float32 log-probabilities."""
        tokens = self._served.vocab_size
        if self._head is None:
            logits: Tensor | None = super().compute_logits(hidden_states)  # type: ignore[misc]
            if logits is None:
                return None
            part = slice(0, tokens)
        else:
            logits = self._head.queries(hidden_states) @ self.item_vectors
            logits = logits.float() + self._head.bias
            part = slice(tokens, self._total)
        every = logits.new_full((logits.shape[0], self._total), float("-inf"), dtype=torch.float32)
        every[:, part] = logits.log_softmax(dim=-1, dtype=torch.float32)
        return every


@contextmanager
def _sized(config: Any, vocab_size: int) -> Generator[None, None, None]:
    """The configuration with another vocabulary, as long as a network is made from it."""
    total, config.vocab_size = config.vocab_size, vocab_size
    try:
        yield
    finally:
        config.vocab_size = total


def _frozen(weight: Tensor, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):
        return weight.detach().to("cpu", dtype, copy=True)


class PatchkernLlamaForCausalLM(ItemTokens, LlamaForCausalLM):
    """Llama, and others whose checkpoints name its architecture."""


class PatchkernQwen2ForCausalLM(ItemTokens, Qwen2ForCausalLM):
    """Qwen2 and Qwen2.5."""


class PatchkernQwen3ForCausalLM(ItemTokens, Qwen3ForCausalLM):
    """Qwen3."""


class PatchkernPhi3ForCausalLM(ItemTokens, Phi3ForCausalLM):
    """Phi-3 and Phi-4."""
