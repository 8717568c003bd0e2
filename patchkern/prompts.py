# SPDX-License-Identifier: Apache-2.0
"""The model's part of a search: the prompts of a batch of users, and one more token of every hypothesis."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from patchkern import attention
from patchkern.layout import PatchLayout
from patchkern.packed import packed_kwargs
from patchkern.prefix_cache import PrefixCache, StepShape

if TYPE_CHECKING:
    from patchkern.model import PatchedCausalLM


class Prompts:
    """The prompts of a batch of users, computed, and what follows them, token by token or in whole trees.

    Args:
        model: in evaluation mode, see `inference`.
        layout: the prompts.
        max_rows: tokens that all steps together may feed, until `forget`.
    """

    def __init__(self, model: PatchedCausalLM, layout: PatchLayout, max_rows: int) -> None:
        self.num_users = layout.num_users
        self._model = model.hf_model
        layout = layout.to(model.device, non_blocking=True)
        self._cache = PrefixCache(layout, max_rows)
        rows = model.embed(layout)
        last = layout.cu_seqlens[1:].long() - 1
        output = self._model(
            inputs_embeds=rows[None], logits_to_keep=last, span_cache=self._cache, **packed_kwargs(layout)
        )
        n_layers = model.config.get_text_config().num_hidden_layers
        if self._cache.num_layers != n_layers:
            raise ValueError(
                f"model: search needs {attention.NAME} attention in all {n_layers} layers of "
                f"{type(self._model).__name__}, got it in {self._cache.num_layers}"
            )
        self.logits = _wide(output.logits[0])
        """``(B, V)``, what follows each prompt; float32 or float64."""

    def step(self, parent: Tensor, user: Tensor, token: Tensor, shape: StepShape | None = None) -> Tensor:
        """``(N, V)`` logits after one more token of N hypotheses.

        Args:
            parent: ``(N,)`` the row that each token continues, -1 the prompt. Rows are numbered over all steps, in the
                order in which they were fed; a row of this step may be continued too.
            user: ``(N,)``, ascending. A user that is left out may be dropped, and must not come back.
            token: ``(N,)``.
            shape: of this step; computed, with host synchronisations, where not given.
        """
        position = self._cache.advance(parent, user, shape)
        output = self._model(
            input_ids=token[:, None], position_ids=position[:, None], use_cache=False, span_cache=self._cache
        )
        return _wide(output.logits[:, -1])

    @property
    def num_rows(self) -> int:
        """Tokens fed so far; the number of the next row."""
        return self._cache.suffixes.num_rows

    def live(self, rows: Tensor, depth: int) -> Tensor:
        """The given rows and all on their way to the prompt; see `Suffixes.live`."""
        return self._cache.suffixes.live(rows, depth)

    def keep(self, is_live: Tensor, count: int) -> Tensor:
        """Drop the other rows and number those that stay anew; see `Suffixes.keep`."""
        return self._cache.suffixes.keep(is_live, count)

    def forget(self) -> None:
        """Drop all rows fed after the prompts and number from 0 again."""
        self._cache.suffixes.forget()


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def check_spans(model: PatchedCausalLM, layout: PatchLayout, depth: int) -> None:
    """All that would make the search silently wrong, or fail in the model."""
    config = model.config.get_text_config()
    if layout.num_rows and int(layout.cu_seqlens.diff().min()) == 0:
        raise ValueError("histories: expected at least one row per user to predict from, got a user without rows")
    longest = layout.max_seqlen + depth - 1  # nothing follows the last token, so it is never fed
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and longest > limit:
        raise ValueError(
            f"histories: expected at most {limit} rows per user and title, the positions of {config.model_type}, got "
            f"{layout.max_seqlen} rows and titles of up to {depth} tokens; keep fewer items (max_items) or compress "
            "them more"
        )
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention"])
    unknown = kinds - {"full_attention", "sliding_attention"}
    if unknown:
        raise ValueError(f"model: search needs full attention in every layer, got {', '.join(sorted(unknown))}")
    window = getattr(config, "sliding_window", None)
    if window is not None and "sliding_attention" in kinds and longest > window:
        raise ValueError(f"model: search needs full attention, got {longest} rows and a sliding window of {window}")


@contextmanager
def inference(model: PatchedCausalLM) -> Iterator[None]:
    """Evaluation mode, no gradients, and the attention that knows `PrefixCache`; restored afterwards."""
    training = [module for module in model.modules() if module.training]
    implementation = model.config._attn_implementation
    model.eval()
    try:
        if implementation != attention.NAME:
            model.hf_model.set_attn_implementation(attention.NAME)
        with torch.no_grad():
            yield
    finally:
        if implementation != attention.NAME:
            model.hf_model.set_attn_implementation(implementation)
        for module in training:
            module.training = True
