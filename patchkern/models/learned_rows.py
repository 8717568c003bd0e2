# SPDX-License-Identifier: Apache-2.0
"""Room for learned rows: tokens of their own in a model that has none yet, or fewer; and whether they are trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from patchkern.batch.arguments import check_count
from patchkern.batch.prompt import Prompt, reserved_tokens
from patchkern.models.item_model import ItemModel
from patchkern.models.patched_lm import PatchedCausalLM

_NAME = "<|expert_{}|>"


def add_experts(
    model: PatchedCausalLM | ItemModel, count: int, *, max_positions: int | None = None, seed: int = 0
) -> None:
    """Give a model's prompt so many learned rows (`patchkern.Prompt.experts`), those that it has first.

    New ones are reserved tokens of the model's tokenizer where that has some to spare, and else new tokens, for which
    the embedding grows. Their rows are drawn like those that are there: with their mean and deviation, number by
    number. Nothing that the model computed before changes, but that a language model has so many more tokens to tell
    apart, whose outputs begin as the mean of all.

    Args:
        model: changed in place.
        count: of learned rows.
        max_positions: of an `ItemModel`, which has so many then, if it had fewer: learned rows take some, too.
        seed: of what is drawn; torch's global generator is left as it was.

    Raises:
        TypeError, ValueError: a negative count, or an adapter, whose base would not have the rows; give them to the
            base first, with `reserve_experts`.

    Examples:
        >>> import patchkern as pk
        >>> model = pk.ItemModel(pk.Catalog.from_token_ids(range(4), range(5)), width=8)
        >>> pk.add_experts(model, 2)
        >>> model.prompt.prefix, model.prompt.experts
        ((4,), (5, 6))
    """
    if not isinstance(model, (PatchedCausalLM, ItemModel)):
        raise TypeError(
            f"model: expected a PatchedCausalLM or an ItemModel, such as is inside a RecurrentMemory, got "
            f"{type(model).__name__}"
        )
    check_count("count", count, minimum=0)
    if max_positions is not None and isinstance(model, ItemModel):
        check_count("max_positions", max_positions, minimum=1)
        lacking = max_positions - model.config.max_position_embeddings
        if lacking > 0:
            model.hf_model.positions = _grown(model.hf_model.positions, lacking, seed + 1)
            model.config.max_position_embeddings = int(max_positions)
    known = model.prompt.experts[:count]
    if len(known) == count:
        model.prompt = model.prompt.with_special(experts=known)
    elif isinstance(model, ItemModel):
        size, lacking = model.config.vocab_size, count - len(known)
        model.hf_model.items = _grown(model.hf_model.items, lacking, seed)
        model.config.vocab_size = int(size + lacking)  # JSON has no numbers of NumPy's
        model.prompt = model.prompt.with_special(experts=(*known, *range(size, size + lacking)))
    elif hasattr(model.hf_model, "peft_config"):
        raise ValueError(
            "model: expected one without an adapter, whose base has no rows for them; name unused tokens instead "
            "(Prompt.with_special), or give the base experts before its adapter (reserve_experts)"
        )
    else:
        beyond = model.catalog.max_token_id
        model.prompt = reserve_experts(model.hf_model, model.prompt, model.tokenizer, count, beyond=beyond, seed=seed)
        model.watch_embedding()


def reserve_experts(
    hf_model: PreTrainedModel, prompt: Prompt, tokenizer: Any, count: int, *, beyond: int = -1, seed: int = 0
) -> Prompt:
    """`add_experts` for a language model that is not wrapped yet, such as one that is to get an adapter.

    Args:
        hf_model: its embedding grows if need be.
        prompt: its experts stay, the first ``count`` of them.
        tokenizer: of transformers, which gets new tokens if it has none to spare; None: there is none.
        count: of learned rows.
        beyond: the largest token id of a catalogue whose titles are not the tokenizer's.
        seed: of the rows.

    Returns:
        The prompt with experts.
    """
    known = prompt.experts[:count]
    lacking = count - len(known)
    if lacking == 0:
        return prompt.with_special(experts=known)
    embedding: Any = hf_model.get_input_embeddings()
    size: int = embedding.num_embeddings
    taken = {*prompt.control_ids, *prompt.prefix, *prompt.suffix}
    spare = [] if tokenizer is None else [token for token in reserved_tokens(tokenizer) if token not in taken]
    ids = [token for token in spare if token < size][:lacking]
    if len(ids) < lacking and (tokenizer is None or beyond >= len(tokenizer)):
        ids = list(range(size, size + lacking))
    elif len(ids) < lacking:
        names = [_NAME.format(place) for place in range(len(known), count)]
        tokenizer.add_special_tokens({"additional_special_tokens": names}, replace_extra_special_tokens=False)
        ids = tokenizer.convert_tokens_to_ids(names)
    with torch.no_grad():
        if max(ids) >= size:
            hf_model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
            embedding, output = hf_model.get_input_embeddings(), hf_model.get_output_embeddings()
            if output.weight is not embedding.weight:
                output.weight[size:] = output.weight[:size].mean(dim=0)
        embedding.weight[ids] = _drawn(embedding.weight[:size], lacking, seed)
    return prompt.with_special(experts=(*known, *ids))


def experts_are_trained(model: Any) -> bool:
    """Whether training changes the embeddings of a model's learned rows, which may be frozen beside an adapter."""
    embedding: nn.Module = model.hf_model.get_input_embeddings()
    trained = {name for name, parameter in embedding.named_parameters() if parameter.requires_grad}
    rows = getattr(getattr(embedding, "token_adapter", embedding), "token_indices", None)  # peft's, of some tokens
    if not trained or rows is None or any("trainable_tokens" not in name for name in trained):
        return bool(trained)
    known = {token for indices in rows.values() for token in indices}
    return known.issuperset(model.prompt.experts)


def _drawn(weight: Tensor, count: int, seed: int) -> Tensor:
    """``(count, D)`` rows like those of ``weight``, number by number."""
    rows = weight.detach().to("cpu", torch.float64)
    draw = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, rows.shape[1], dtype=rows.dtype, generator=draw, device="cpu")
    return (rows.mean(dim=0) + rows.std(dim=0, correction=0) * noise).to(weight.device, weight.dtype)


def _grown(embedding: nn.Embedding, count: int, seed: int) -> nn.Embedding:
    weight = embedding.weight.detach()
    grown = nn.Embedding.from_pretrained(torch.cat([weight, _drawn(weight, count, seed)]), freeze=False)
    grown.weight.requires_grad_(embedding.weight.requires_grad)
    return grown
