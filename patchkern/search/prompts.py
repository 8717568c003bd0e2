# SPDX-License-Identifier: Apache-2.0
"""The model's part of a search: the prompts of a batch of users, and one more token of every hypothesis."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from patchkern.batch.layout import PatchLayout
from patchkern.models import attention
from patchkern.ops.packed import packed_kwargs
from patchkern.search.prefill import Pass, plan_passes, shared_literals
from patchkern.search.prefix_cache import PrefixCache, StepShape

if TYPE_CHECKING:
    from patchkern.models.patched_lm import PatchedCausalLM
    from patchkern.search.user_cache import UserCache


class Prompts:
    """The prompts of a batch of users, computed, and what follows them, token by token or in whole trees.

    Args:
        model: in evaluation mode, see `inference`.
        layout: the prompts, on the CPU unless they are there already.
        max_rows: tokens that all steps together may feed, until `forget`.
        chunk_rows: rows of the prompts that go through the model together, at most; bounds the memory of activations.
        user_cache: keeps the prompts' keys and values for later calls, and is asked for them first.
        user_ids: ``B`` hashable names of the users in ``user_cache``.
    """

    def __init__(
        self,
        model: PatchedCausalLM,
        layout: PatchLayout,
        max_rows: int,
        *,
        chunk_rows: int | None = None,
        user_cache: UserCache | None = None,
        user_ids: Sequence[Any] | None = None,
    ) -> None:
        self.num_users = layout.num_users
        self._model = model.hf_model
        layout = layout.to("cpu")
        cu_seqlens = layout.cu_seqlens.numpy().astype(np.int64)
        on_device = layout.cu_seqlens.to(model.device, non_blocking=True)
        self._cache = PrefixCache(on_device, layout.num_rows, max_rows)
        cached = None
        stored = np.zeros(self.num_users, np.int64)
        if user_cache is not None:
            cached = user_cache.begin(model, layout, user_ids)
            stored = cached.load(self._cache)
        shared = shared_literals(layout.lo.numpy(), cu_seqlens)
        for number, spans in enumerate(plan_passes(cu_seqlens, stored, shared, chunk_rows)):
            ending = self._prefill(model, layout, spans)
            if number == 0:
                self.logits = ending.new_empty(self.num_users, ending.shape[1])
                """``(B, V)``, what follows each prompt; float32 or float64."""
            self.logits[torch.from_numpy(spans.users).to(model.device, non_blocking=True)] = ending
        self._check_layers(model)
        if cached is not None:
            cached.save(self._cache)

    def _prefill(self, model: PatchedCausalLM, layout: PatchLayout, spans: Pass) -> Tensor:
        """Compute rows of the prompts; returns the logits (k, V) of those that end one."""
        self._cache.prefill(spans)
        packed = _packed(layout, spans)
        rows = model.embed(packed)
        kwargs = {"logits_to_keep": torch.from_numpy(spans.last), **packed_kwargs(packed)}
        on_device = {
            name: value.to(rows.device, non_blocking=True) if isinstance(value, Tensor) else value
            for name, value in kwargs.items()
        }
        output = self._model(inputs_embeds=rows[None], span_cache=self._cache, **on_device)
        return _wide(output.logits[0])

    def _check_layers(self, model: PatchedCausalLM) -> None:
        n_layers = model.config.get_text_config().num_hidden_layers
        if len(self._cache.layers) != n_layers:
            raise ValueError(
                f"model: search needs {attention.NAME} attention in all {n_layers} layers of "
                f"{type(self._model).__name__}, got it in {len(self._cache.layers)}"
            )

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


def _packed(layout: PatchLayout, spans: Pass) -> PatchLayout:
    """The rows of a pass as a layout of their own, which has the titles of all."""
    rows = torch.from_numpy(spans.rows)
    values = {
        "lo": layout.lo[rows],
        "hi": layout.hi[rows],
        "position_ids": layout.position_ids[rows],
        "cu_seqlens": torch.from_numpy(spans.cu_seqlens).int(),
        "max_seqlen": spans.max_seqlen,
        "labels": None,
        "logit_rows": None,
        "logit_labels": None,
        "transpose": None,
        "identities": None,
    }
    return PatchLayout._trusted({**layout.__dict__, **values})


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
    rope = getattr(config, "rope_parameters", None) or {}
    original = rope.get("original_max_position_embeddings")
    if rope.get("rope_type") == "longrope" and original is not None and longest > original:
        raise ValueError(
            f"model: search needs positions that mean the same in prompts of any length, got {longest} rows and "
            f"longrope beyond {original}"
        )


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
