# SPDX-License-Identifier: Apache-2.0
"""Room for learned rows: tokens of their own in a model that has none yet, or fewer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from patchkern.batch.histories import check_count
from patchkern.models.item_model import ItemModel
from patchkern.models.patched_lm import PatchedCausalLM


def add_experts(model: PatchedCausalLM | ItemModel, count: int, *, seed: int = 0) -> None:
    """Give a model's prompt so many learned rows (`patchkern.Prompt.experts`), those that it has first.

    New ones are new rows of the embedding, drawn like those that are there: with their mean and deviation, number by
    number. Nothing that the model computed before changes, but that a language model has so many more tokens to tell
    apart, whose outputs begin as the mean of all.

    Args:
        model: changed in place.
        count: of learned rows.
        seed: of what is drawn.

    Raises:
        TypeError, ValueError: a negative count, or an adapter, whose base would not have the rows.
    """
    check_count("count", count, minimum=0)
    known = model.prompt.experts[:count]
    lacking = count - len(known)
    if lacking == 0:
        model.prompt = model.prompt.with_special(experts=known)
        return
    network: Any = model.hf_model
    if hasattr(network, "peft_config"):
        raise ValueError(
            "model: expected one without an adapter, whose base has no rows for them; name unused tokens instead "
            "(Prompt.with_special)"
        )
    before: Tensor = network.get_input_embeddings().weight
    size = before.shape[0]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        values = before.detach().float().cpu()
        drawn = torch.randn(lacking, values.shape[1], generator=generator) * values.std(dim=0) + values.mean(dim=0)
        drawn = drawn.to(before.device, before.dtype)
        if isinstance(model, ItemModel):
            network.items = nn.Embedding.from_pretrained(torch.cat([before, drawn]), freeze=False)
            network.config.vocab_size = size + lacking
        else:
            network.resize_token_embeddings(size + lacking, mean_resizing=False)
            network.get_input_embeddings().weight[size:] = drawn
            output = network.get_output_embeddings().weight
            if output is not network.get_input_embeddings().weight:
                output[size:] = output[:size].mean(dim=0)
    model.prompt = model.prompt.with_special(experts=(*known, *range(size, size + lacking)))
    if isinstance(model, PatchedCausalLM):
        model.watch_embedding()
