# SPDX-License-Identifier: Apache-2.0
"""Searches by definition: plain transformers without a cache or our attention, Python loops over hypotheses."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from cases import make_catalog
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

import patchkern as pk
from patchkern.search.recommend import DIVERSITY_PENALTY

VOCABULARY = 101
PROMPT = pk.Prompt(prefix=[90, 91], separator=[92], suffix=[93, 94], response_end=[96])
Ranked = list[tuple[Any, float]]
Titles = Mapping[Any, list[int]]


def make_hf_model(family: str = "llama", dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(3)
    size = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    rest = {"intermediate_size": 48, "max_position_embeddings": 512, "initializer_range": 0.3}
    if family == "llama":
        model: Any = LlamaForCausalLM(LlamaConfig(**size, **rest, num_key_value_heads=2))
    elif family == "qwen3":
        model = Qwen3ForCausalLM(
            Qwen3Config(**size, **rest, num_key_value_heads=1, head_dim=8, tie_word_embeddings=True)
        )
    else:
        model = GPT2LMHeadModel(
            GPT2Config(vocab_size=VOCABULARY, n_positions=256, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3)
        )
    return model.to(dtype).eval()


HF_MODELS = {family: make_hf_model(family) for family in ("llama", "qwen3", "gpt2")}
# eager rounds the softmax to float32
PLAIN = {family: copy.deepcopy(model) for family, model in HF_MODELS.items()}
for _plain in PLAIN.values():
    _plain.set_attn_implementation("sdpa")


def make_model(titles: Titles, family: str = "llama", prompt: pk.Prompt = PROMPT) -> pk.PatchedCausalLM:
    return pk.PatchedCausalLM(copy.deepcopy(HF_MODELS[family]), make_catalog(dict(titles)), prompt)


def prompt_rows(model: pk.PatchedCausalLM, plain: Any, history: Sequence[Any], policy: Any) -> torch.Tensor:
    weight = plain.get_input_embeddings().weight.detach()
    return pk.compress_batch(weight, model.catalog, [list(history)], policy, model.prompt).inputs_embeds


def sequence_scores(plain: Any, rows: torch.Tensor, sequences: Sequence[Sequence[int]]) -> list[float]:
    """The log-probability of every sequence after the prompt, forced; the padding behind a sequence changes nothing."""
    weight = plain.get_input_embeddings().weight
    tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(sequence) for sequence in sequences], batch_first=True)
    inputs = torch.cat([rows.expand(len(sequences), -1, -1), weight[tokens]], dim=1)
    with torch.no_grad():
        steps = plain(inputs_embeds=inputs, use_cache=False).logits[:, len(rows) - 1 : -1].log_softmax(-1)
    values = steps.gather(2, tokens[..., None])[..., 0]
    return [float(value[: len(sequence)].sum()) for value, sequence in zip(values, sequences, strict=True)]


def forced_scores(
    model: pk.PatchedCausalLM, family: str, histories: Sequence[Any], policy: Any, titles: Titles
) -> list[dict[Any, float]]:
    """Per user the log-probability of every item's title and response end."""
    sequences = [[*title, *model.prompt.response_end] for title in titles.values()]
    tables = []
    for history in histories:
        rows = prompt_rows(model, PLAIN[family], history, policy)
        tables.append(dict(zip(titles, sequence_scores(PLAIN[family], rows, sequences), strict=True)))
    return tables


def ranked(table: Mapping[Any, float], titles: Titles, k: int, leave_out: Collection[Any] = ()) -> list[Any]:
    """The k best items; those of one title together, in catalogue order."""
    first = {tuple(title): item for item, title in reversed(titles.items())}
    place = {item: number for number, item in enumerate(titles)}
    items = [item for item in titles if item not in set(leave_out)]
    return sorted(items, key=lambda i: (-table[first[tuple(titles[i])]], place[first[tuple(titles[i])]], place[i]))[:k]


def assert_ranked(
    got: Ranked, table: Mapping[Any, float], titles: Titles, k: int, leave_out: Collection[Any] = ()
) -> None:
    assert [item for item, _ in got] == ranked(table, titles, k, leave_out)
    np.testing.assert_allclose([score for _, score in got], [table[item] for item, _ in got], rtol=0, atol=1e-9)


def with_length_penalty(
    table: Mapping[Any, float], titles: Titles, end: Sequence[int], penalty: float
) -> dict[Any, float]:
    """As transformers: the log-probability by a power of the generated length, end tokens included."""
    return {item: score / (len(titles[item]) + len(end)) ** penalty for item, score in table.items()}


def normalized(table: Mapping[Any, float], titles: Titles, allowed: Collection[Any], by_item: bool) -> dict[Any, float]:
    """log P(title or item | a title of the allowed items comes out)."""
    shared: dict[tuple[int, ...], list[Any]] = {}
    for item in titles:
        if item in set(allowed):
            shared.setdefault(tuple(titles[item]), []).append(item)
    mass = math.fsum(math.exp(table[items[0]]) for items in shared.values())
    return {
        item: table[item] - math.log(mass) - (math.log(len(items)) if by_item else 0.0)
        for items in shared.values()
        for item in items
    }


def narrow_beam(
    model: pk.PatchedCausalLM, titles: Titles, history: Any, policy: Any, k: int, num_beams: int
) -> dict[tuple[int, ...], float]:
    """The definition of the beam, with one forward pass per hypothesis and step: {finished sequence: score}."""
    plain = PLAIN["llama"]
    weight = plain.get_input_embeddings().weight.detach()
    prompt = prompt_rows(model, plain, history, policy)
    sequences = {(*title, *model.prompt.response_end) for title in titles.values()}
    frontier: dict[tuple[int, ...], float] = {(): 0.0}
    finished: dict[tuple[int, ...], float] = {}
    while frontier:
        longer = {}
        for path, score in frontier.items():
            rows = torch.cat([prompt, weight[list(path)]])
            with torch.no_grad():
                log_probs = plain(inputs_embeds=rows[None], use_cache=False).logits[0, -1].log_softmax(-1)
            for token in {s[len(path)] for s in sequences if s[: len(path)] == path and len(s) > len(path)}:
                longer[(*path, token)] = score + float(log_probs[token])
        finished |= {path: score for path, score in longer.items() if path in sequences}
        unfinished = {p: s for p, s in longer.items() if any(q[: len(p)] == p and q != p for q in sequences)}
        frontier = dict(sorted(unfinished.items(), key=lambda entry: -entry[1])[:num_beams])
    return dict(sorted(finished.items(), key=lambda entry: -entry[1])[:k])


def diverse_by_definition(
    model: pk.PatchedCausalLM, titles: Titles, history: Any, policy: Any, groups: int, allowed: Collection[Any]
) -> list[tuple[tuple[int, ...], float]]:
    """(sequence, log-probability) in the order of the list; one forward pass per group and step."""
    plain = PLAIN["llama"]
    weight = plain.get_input_embeddings().weight.detach()
    prompt = prompt_rows(model, plain, history, policy)
    end = model.prompt.response_end
    sequences = {(*titles[item], *end) for item in allowed}
    paths: list[tuple[int, ...]] = [()] * groups
    sums, penalised = [0.0] * groups, [0.0] * groups
    while any(path not in sequences for path in paths):
        chosen: list[int] = []
        for group, path in enumerate(paths):
            if path in sequences:
                continue
            rows = torch.cat([prompt, weight[list(path)]])
            with torch.no_grad():
                log_probs = plain(inputs_embeds=rows[None], use_cache=False).logits[0, -1].log_softmax(-1)
            tokens = sorted({s[len(path)] for s in sequences if s[: len(path)] == path and len(s) > len(path)})
            values = [float(log_probs[token]) - DIVERSITY_PENALTY * chosen.count(token) for token in tokens]
            best = int(np.argmax(values))
            paths[group] = (*path, tokens[best])
            sums[group] += float(log_probs[tokens[best]])
            penalised[group] += values[best]
            if not (end and paths[group] in sequences):
                chosen.append(tokens[best])
    order = sorted(range(groups), key=lambda group: -penalised[group] / len(paths[group]))
    return [(paths[group], sums[group]) for group in order]
