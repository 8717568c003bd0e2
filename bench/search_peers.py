# SPDX-License-Identifier: Apache-2.0
"""Constrained searches by others' means, on the model that patchkern searches, and whether they find the same."""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

import patchkern as pk
from patchkern.search.recommend import DIVERSITY_PENALTY

TOLERANCE = 1e-3


def plain_model(model: pk.PatchedCausalLM) -> Any:
    """A copy as transformers has it, for the peers."""
    plain: Any = copy.deepcopy(model.hf_model)
    plain.set_attn_implementation("sdpa")
    return plain


class TokenTree:
    """The titles as nested dictionaries, which is what ``prefix_allowed_tokens_fn`` usually walks."""

    def __init__(self, model: pk.PatchedCausalLM) -> None:
        self.root: dict[int, Any] = {}
        self.depth = 0
        for item in range(len(model.catalog)):
            tokens = [*model.catalog.tokens(item).tolist(), *model.prompt.response_end]
            self.depth = max(self.depth, len(tokens))
            node = self.root
            for token in tokens:
                node = node.setdefault(token, {})

    def follow(self, tokens: Sequence[int]) -> dict[int, Any]:
        node = self.root
        for token in tokens:
            node = node.get(token, {})
        return node


def padded_prompts(model: pk.PatchedCausalLM, histories: pk.Histories, policy: pk.Policy) -> tuple[Tensor, Tensor]:
    """(B, L, D) embeddings padded on the left, and their mask."""
    layout = pk.build_layout(model.catalog, histories, policy, model.prompt)
    rows = model.embed(layout.to(model.device)).split(layout.cu_seqlens.diff().tolist())
    longest = max(map(len, rows))
    embeds = torch.stack([torch.cat([row.new_zeros(longest - len(row), row.shape[1]), row]) for row in rows])
    mask = torch.stack([(torch.arange(longest) >= longest - len(row)).long() for row in rows])
    return embeds, mask.to(embeds.device)


@torch.no_grad()
def by_generate(
    model: pk.PatchedCausalLM, plain: Any, histories: pk.Histories, policy: pk.Policy, width: int
) -> list[list[float]]:
    """Every user's scores, best first, from transformers' constrained beam search."""
    embeds, mask = padded_prompts(model, histories, policy)
    tree = TokenTree(model)
    end = model.prompt.response_end[-1]

    def allowed(user: int, tokens: Tensor) -> list[int]:
        return list(tree.follow(tokens.tolist())) or [end]

    output = plain.generate(
        inputs_embeds=embeds,
        attention_mask=mask,
        num_beams=width,
        num_return_sequences=width,
        do_sample=False,
        max_new_tokens=tree.depth,
        prefix_allowed_tokens_fn=allowed,
        length_penalty=0.0,
        early_stopping="never",
        eos_token_id=end,
        pad_token_id=end,
        return_dict_in_generate=True,
        output_scores=True,
    )
    scores: list[list[float]] = output.sequences_scores.view(-1, width).tolist()
    return scores


@torch.no_grad()
def as_published(
    model: pk.PatchedCausalLM, plain: Any, histories: pk.Histories, policy: pk.Policy, groups: int
) -> list[list[float]]:
    """Every user's log-probabilities as the authors decode: groups of one beam, no cache, copies of the prompt."""
    embeds, mask = padded_prompts(model, histories, policy)
    n_users = len(histories)
    embeds, mask = embeds.repeat_interleave(groups, 0), mask.repeat_interleave(groups, 0)
    tree, end = TokenTree(model), model.prompt.response_end[-1]
    weight = plain.get_input_embeddings().weight
    tokens: list[list[int]] = [[] for _ in range(n_users * groups)]
    totals, penalised = [0.0] * len(tokens), [0.0] * len(tokens)
    done = [False] * len(tokens)
    while not all(done):
        fed = torch.tensor(tokens, dtype=torch.int64, device=embeds.device)
        inputs = torch.cat([embeds, weight[fed]], dim=1)
        seen = torch.cat([mask, mask.new_ones(fed.shape)], dim=1)
        logits = plain(inputs_embeds=inputs, attention_mask=seen, use_cache=False, logits_to_keep=1).logits[:, -1]
        log_probs = logits.float().log_softmax(-1).cpu()
        for user in range(n_users):
            chosen: dict[int, int] = {}
            for beam in range(user * groups, (user + 1) * groups):
                if done[beam]:
                    tokens[beam].append(end)
                    continue
                allowed = list(tree.follow(tokens[beam]))
                gains = log_probs[beam, allowed]
                counts = torch.tensor([chosen.get(token, 0) for token in allowed])
                best = int((gains - DIVERSITY_PENALTY * counts).argmax())
                token = allowed[best]
                totals[beam] += float(gains[best])
                penalised[beam] += float(gains[best] - DIVERSITY_PENALTY * counts[best])
                tokens[beam].append(token)
                done[beam] = token == end
                if not done[beam]:
                    chosen[token] = chosen.get(token, 0) + 1
    return [sorted(totals[user * groups : (user + 1) * groups], reverse=True) for user in range(n_users)]


def right_and_no_better(name: str, got: list[list[float]], ours: list[list[float]], every: np.ndarray) -> None:
    """Refuse to time where scores are not those of titles, or a list is better than ours.

    Equal lists cannot be asked for: transformers drops a title that ends below the best ``num_beams`` candidates of
    its step, where we keep it.
    """
    for user, (one, two) in enumerate(zip(got, ours, strict=True)):
        scores = np.array(one)
        distance = np.abs(every[user] - scores[:, None]).min(axis=1)
        wrong = (distance > TOLERANCE * np.abs(scores)).sum()
        better = (scores > np.array(two) + TOLERANCE * np.abs(scores)).sum()
        if wrong or better:
            sys.exit(f"{name}: {wrong} scores of no title, {better} better than ours, user {user}; nothing was timed")


def same_scores(name: str, got: list[list[float]], expected: list[list[float]]) -> None:
    """Refuse to time what finds other titles; where two are as good, rounding may choose."""
    agree = [np.allclose(one, two, rtol=TOLERANCE) for one, two in zip(got, expected, strict=True)]
    if np.mean(agree) < 0.95:
        sys.exit(f"{name}: {len(agree) - sum(agree)} of {len(agree)} users have other scores; nothing was timed")
