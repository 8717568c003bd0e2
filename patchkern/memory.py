# SPDX-License-Identifier: Apache-2.0
"""How many users fit into a memory budget, and running a search over them in batches of that size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from patchkern.histories import Histories
from patchkern.layout import PatchLayout, build_layout
from patchkern.policies import AnyPolicy
from patchkern.prompts import check_spans

if TYPE_CHECKING:
    from patchkern.model import PatchedCausalLM

Users = NDArray[np.int64]
T = TypeVar("T")


def in_batches(
    model: PatchedCausalLM,
    histories: Histories,
    policy: AnyPolicy,
    num_beams: int,
    depth: int,
    compute: Callable[[Users, PatchLayout], T],
    memory_budget: int | None = None,
    batch_size: int = 64,
) -> Iterator[tuple[Users, T]]:
    """Users of about equal length together; the longest first, so that what is too large fails early.

    Args:
        model, histories, policy, memory_budget, batch_size: as in `patchkern.search.recommend`.
        num_beams: hypotheses per user and step.
        depth: tokens of the longest title with its ``response_end``.
        compute: what is asked for the users of a batch, whose prompts are the layout.

    Returns:
        The users of each batch, as indices into ``histories``, and what ``compute`` returned for them.
    """
    kept = histories.latest(policy.max_items)
    model.catalog.index_of(kept.items, "histories")
    waiting = np.argsort(-kept.lengths, kind="stable")
    while waiting.size:
        users = waiting[:batch_size]
        layout = build_layout(model.catalog, histories.take(users), policy, model.prompt)
        check_spans(model, layout, depth)
        needed = _predicted_bytes(model, layout, num_beams, depth)
        if memory_budget is None or needed <= memory_budget:
            waiting = waiting[batch_size:]
            yield users, compute(users, layout)
        elif users.size > 1:
            batch_size = users.size // 2
        else:
            raise ValueError(
                f"memory_budget: expected at least {needed} bytes for {num_beams} beams of user {users[0]}, whose "
                f"prompt has {layout.num_rows} rows, got {memory_budget}"
            )


def _predicted_bytes(model: PatchedCausalLM, layout: PatchLayout, num_beams: int, depth: int) -> int:
    """Keys and values of prompts and hypotheses, and the logits of a step with their exponentials."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    item_size = torch.finfo(model.hf_model.dtype).bits // 8
    per_row = 2 * config.num_hidden_layers * heads * width * item_size
    hypotheses = layout.num_users * num_beams
    logits = config.vocab_size * (item_size + 2 * max(item_size, 4))
    return per_row * layout.num_users * layout.max_seqlen + hypotheses * (per_row * depth + logits)
