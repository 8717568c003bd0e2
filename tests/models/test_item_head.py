# SPDX-License-Identifier: Apache-2.0
"""The item head against its definition: one history at a time, one item at a time, in plain transformers."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cases
import model_cases
import numpy as np
import oracle
import pytest
import search_oracle
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import patchkern as pk
from patchkern.models import wrapped
from patchkern.models.item_head import output_weight
from patchkern.ops import item_softmax

TITLES = cases.make_titles(23)
PARTS = oracle.Parts([90, 91], [92], [], [])  # of the prompt, what is before and in a history
HISTORIES = cases.make_histories(TITLES, [9, 1, 30, 0])
RANGES = [[3, 8], [0, 0], [24, 29], [0, -1]]
POLICIES = {
    "text": pk.TextOnly(None),
    "items": pk.ItemPatches(3, None),
    "items-no-text": pk.ItemPatches(0, None),
    "sessions": pk.SessionPatches(3, None),
}


@pytest.fixture(autouse=True)
def float64_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers normalises in float32, which turns differences of 1e-16 into some of 1e-8."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)

    for norm in (LlamaRMSNorm, Qwen3RMSNorm):
        monkeypatch.setattr(norm, "forward", forward)


def make_model(
    family: str = "llama", item_embeddings: bool = False, titles: Any = None, seed: int | None = 0
) -> pk.PatchedCausalLM:
    """Float64; with random vectors, biases and map, or as a new one where ``seed`` is None."""
    model = pk.PatchedCausalLM(
        copy.deepcopy(search_oracle.HF_MODELS[family]),
        cases.make_catalog(titles or TITLES),
        search_oracle.PROMPT,
        item_embeddings=item_embeddings,
        item_head=True,
    )
    if seed is not None:
        randomise(model, seed)
    return model


def randomise(model: pk.PatchedCausalLM, seed: int = 0) -> None:
    draw = torch.Generator().manual_seed(seed)
    own = [*model.item_head.parameters(), *([] if model.item_embedding is None else [model.item_embedding])]
    with torch.no_grad():
        for parameter in own:
            parameter.add_(torch.randn(parameter.shape, generator=draw).to(parameter), alpha=0.3)


# ------------------------------------------------------------------ the definition


def dense_scores(model: pk.PatchedCausalLM, plain: Any, history: Sequence[Any], policy: Any) -> Tensor:
    """``(n_items,)``; differentiable in ``plain`` and in what the head of ``model`` consists of."""
    titles, head, own = list(TITLES.values()), model.item_head, model.item_embedding
    weight = plain.get_input_embeddings().weight
    entries = cases.oracle_entries(policy, len(history))
    rows = oracle.torch_path(weight, oracle.user_rows([TITLES[item] for item in history], entries, PARTS).rows)
    if own is not None:
        rows, at = list(rows), len(PARTS.prefix)
        for number, (kind, positions) in enumerate(entries):
            at += len(PARTS.separator) * (number > 0)
            if kind != "text":
                places = [list(TITLES).index(history[position]) for position in positions]
                rows[at] = rows[at] + torch.stack([own[place] for place in places]).mean(0)
            at += len(TITLES[history[positions[0]]]) if kind == "text" else 1
        rows = torch.stack(rows)
    decoder = plain.get_decoder() if hasattr(plain, "get_decoder") else plain.model
    state = decoder(inputs_embeds=rows[None], use_cache=False).last_hidden_state[0, -1]
    output = plain.get_output_embeddings().weight
    scores = []
    for place, title in enumerate(titles):
        vector = torch.stack([output[token] for token in title]).mean(0)
        vector = vector if own is None else vector + own[place]
        query = head.transform.weight @ state
        scores.append(head.log_temperature.exp() * (query @ vector) + head.bias[place])
    return torch.stack([score.reshape(()) for score in scores])


def dense_loss(model: pk.PatchedCausalLM, plain: Any, policy: Any) -> Tensor:
    """The mean over the targets of `RANGES`."""
    losses = [
        -dense_scores(model, plain, history[:at], policy).log_softmax(0)[list(TITLES).index(history[at])]
        for history, (first, last) in zip(HISTORIES, RANGES, strict=True)
        for at in range(first, last + 1)
    ]
    return torch.stack(losses).mean()


def training_layout(model: pk.PatchedCausalLM, policy: Any, head: str = "items") -> pk.PatchLayout:
    return pk.build_training_layout(model.catalog, HISTORIES, policy, model.prompt, RANGES, head=head)


def scores_of(model: pk.PatchedCausalLM, layout: pk.PatchLayout) -> Tensor:
    """``(M, n_items)`` of a layout's item rows."""
    with torch.no_grad(), wrapped.hidden_states(model.hf_model) as states:
        model(layout)
        return model.item_scores(states[0][layout.item_rows])


# ------------------------------------------------------------------ scores and gradients


@pytest.mark.parametrize("item_embeddings", [False, True], ids=["text", "vectors"])
@pytest.mark.parametrize("family", search_oracle.HF_MODELS)
@pytest.mark.parametrize("policy", ["text", "sessions"])
def test_scores_by_definition(policy: str, family: str, item_embeddings: bool) -> None:
    model = make_model(family, item_embeddings)
    got = model.score_items(HISTORIES, POLICIES[policy], head="items")
    with torch.no_grad():
        expected = [
            dense_scores(model, search_oracle.PLAIN[family], history, POLICIES[policy]).log_softmax(0).numpy()
            for history in HISTORIES
        ]
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, np.stack(expected), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("family", "item_embeddings"),
    [("llama", False), ("gpt2", True), ("qwen3", True)],
    ids=["untied", "tied", "tied, grouped heads"],
)
@pytest.mark.parametrize("policy", POLICIES)
def test_loss_and_gradients_by_definition(policy: str, family: str, item_embeddings: bool) -> None:
    model = make_model(family, item_embeddings)
    plain = copy.deepcopy(search_oracle.PLAIN[family])
    got = model(training_layout(model, POLICIES[policy])).loss
    own = {name: p for name, p in model.named_parameters() if not name.startswith("hf_model.")}
    of_model = dict(model.hf_model.named_parameters())
    grads = torch.autograd.grad(got, [*own.values(), *of_model.values()], allow_unused=True)
    expected = dense_loss(model, plain, POLICIES[policy])
    of_plain = dict(plain.named_parameters())
    assert list(of_plain) == list(of_model)
    wanted = torch.autograd.grad(expected, [*own.values(), *of_plain.values()], allow_unused=True)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=0)
    for name, one, two in zip([*own, *of_model], grads, wanted, strict=True):
        if two is None:  # vectors of items, under text alone
            assert one is None or not one.any(), name
            continue
        torch.testing.assert_close(one, two, rtol=0, atol=1e-10 * max(1.0, float(two.abs().max())), msg=name)


def test_scaled_embeddings_score_with_what_makes_the_logits() -> None:
    """Gemma multiplies its tied matrix by a number when it reads, and not when it writes."""
    hf_model = model_cases.tiny("gemma").eval()
    model = pk.PatchedCausalLM(hf_model, model_cases.CATALOG, model_cases.PROMPT, item_head=True)
    weight = hf_model.get_output_embeddings().weight
    vectors = torch.stack([weight[title].mean(0) for title in model_cases.TITLES])
    torch.testing.assert_close(model.item_head.vectors(weight, None), vectors, rtol=1e-6, atol=1e-6)
    layout = pk.build_layout(model.catalog, [[0, 3, 9]], pk.ItemPatches(1), model.prompt, head="items")
    with torch.no_grad(), wrapped.hidden_states(hf_model) as states:
        model(layout)
    # a title of one token has the logit of that token
    single = [place for place, title in enumerate(model_cases.TITLES) if len(title) == 1]
    logits = hf_model.lm_head(states[0][layout.item_rows])[0, [model_cases.TITLES[place][0] for place in single]]
    scores = model.item_scores(states[0][layout.item_rows])[0, single]
    torch.testing.assert_close(scores - scores[0], logits - logits[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("head", ["items", "both"])
def test_targets_see_neither_themselves_nor_the_future(head: str, policy: str) -> None:
    """Another item at a position, and no score of that target or an earlier one moves, bit for bit."""
    model = make_model(item_embeddings=True)
    history = cases.make_histories(TITLES, [40])[0]
    lengths = {item: len(title) for item, title in TITLES.items()}
    at, other = next(
        (position, item)
        for position in range(20, 39)
        for item in lengths
        if lengths[item] == lengths[history[position]] and TITLES[item] != TITLES[history[position]]
    )
    changed = [*history[:at], other, *history[at + 1 :]]
    tables = [
        scores_of(
            model,
            pk.build_training_layout(model.catalog, [items], POLICIES[policy], model.prompt, [[0, 39]], head=head),
        )
        for items in (history, changed)
    ]
    assert torch.equal(tables[0][: at + 1], tables[1][: at + 1])
    assert ((tables[0] - tables[1])[at + 1 :].abs().amax(dim=1) > 1e-9).all()


@pytest.mark.parametrize("policy", POLICIES)
def test_users_are_apart(policy: str) -> None:
    model = make_model()
    mine, theirs = cases.make_histories(TITLES, [30, 30])
    lengths = {}
    for item, title in TITLES.items():
        lengths.setdefault(len(title), []).append(item)
    others = [lengths[len(TITLES[item])][-1] for item in theirs]
    assert others != theirs
    tables = [
        scores_of(
            model,
            pk.build_training_layout(
                model.catalog, [mine, users], POLICIES[policy], model.prompt, [[0, 29]] * 2, head="items"
            ),
        )
        for users in (theirs, others)
    ]
    assert torch.equal(tables[0][:30], tables[1][:30]) and not torch.equal(tables[0], tables[1])


# ------------------------------------------------------------------ losses


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.3, 2.0), (0.0, 1.0), (1.0, 0.0)], ids=str)
def test_both_is_the_weighted_sum(weights: tuple[float, float]) -> None:
    model = make_model()
    titles, items, both = (
        model(training_layout(model, POLICIES["items"], head), title_weight=weights[0], item_weight=weights[1])
        for head in ("titles", "items", "both")
    )
    assert torch.equal(both.logits, titles.logits) and items.logits.shape == (0, search_oracle.VOCABULARY)
    torch.testing.assert_close(both.loss, titles.loss + items.loss, rtol=1e-6, atol=0, check_dtype=False)
    alone = [model(training_layout(model, POLICIES["items"], head)).loss for head in ("titles", "items")]
    expected = weights[0] * alone[0] + weights[1] * alone[1]
    torch.testing.assert_close(both.loss, expected, rtol=1e-6, atol=0, check_dtype=False)
    both.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert bool(model.item_head.bias.grad.any()) == (weights[1] > 0)


def test_counts_divide_the_sums() -> None:
    model = make_model()
    layouts = {head: training_layout(model, POLICIES["items"], head) for head in ("titles", "items", "both")}
    tokens, items = layouts["titles"].logit_labels.numel(), layouts["items"].item_labels.numel()
    of_titles, of_items = (model(layouts[head]).loss for head in ("titles", "items"))
    for count in (5 * items, torch.tensor(5 * items)):
        torch.testing.assert_close(model(layouts["items"], num_items_in_batch=count).loss, of_items / 5)
        torch.testing.assert_close(
            model(layouts["titles"], num_items_in_batch=count).loss * 5 * items, tokens * of_titles
        )
    both = model(layouts["both"], num_items_in_batch=torch.tensor([2 * tokens, 4 * items])).loss
    torch.testing.assert_close(both, of_titles / 2 + of_items / 4, rtol=1e-6, atol=0, check_dtype=False)
    for wrong in (7, torch.tensor(7), torch.tensor([1, 2, 3])):
        with pytest.raises(ValueError, match="num_items_in_batch: expected two numbers, of tokens and of items, for"):
            model(layouts["both"], num_items_in_batch=wrong)


@pytest.mark.parametrize("adapted", [False, True], ids=["whole", "LoRA"])
@pytest.mark.parametrize("head", ["items", "both"])
@pytest.mark.parametrize("policy", ["text", "sessions"])
def test_recomputed_activations_change_nothing(
    policy: str, head: str, adapted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, with branches, with items that are dropped, and with a softmax in more than one chunk."""
    monkeypatch.setattr(item_softmax, "_LEAST_ROWS", 2)
    monkeypatch.setattr(item_softmax, "_CPU_ELEMENTS", 1)
    hf_model: Any = copy.deepcopy(search_oracle.HF_MODELS["llama"])
    if adapted:
        pytest.importorskip("peft")
        torch.manual_seed(0)
        hf_model = model_cases.lora(hf_model, target_modules="all-linear").double()
    own: dict[str, Any] = {"item_embeddings": True, "item_head": True, "vector_dropout": 0.4}
    model = pk.PatchedCausalLM(hf_model, cases.make_catalog(TITLES), search_oracle.PROMPT, **own).train()
    randomise(model)
    layout = training_layout(model, POLICIES[policy], head)
    calls: list[str] = []
    layers = [(name, module) for name, module in model.named_modules() if name.endswith(".mlp")]
    for name, module in layers:
        module.register_forward_pre_hook(lambda module, inputs, name=name: calls.append(name))

    def run() -> list[Tensor]:
        model.zero_grad()
        calls.clear()
        torch.manual_seed(3)
        loss = model(layout).loss
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    kept = run()
    assert len(calls) == len(layers) > 0
    model.activation_checkpointing_enable()
    recomputed = run()
    assert len(calls) == 2 * len(layers)
    assert len(kept) == len(recomputed) > 5
    assert all(torch.equal(one, two) for one, two in zip(kept, recomputed, strict=True))


def test_smoothing_is_that_of_cross_entropy() -> None:
    model = make_model()
    layout = training_layout(model, POLICIES["items"])
    expected = F.cross_entropy(scores_of(model, layout), layout.item_labels, label_smoothing=0.1)
    torch.testing.assert_close(model(layout, smoothing=0.1).loss, expected, rtol=1e-10, atol=0)


def test_batches_without_users() -> None:
    model = make_model()
    layout = pk.build_layout(model.catalog, [], pk.TextOnly(), model.prompt, [], head="items")
    output = model(layout)
    assert not output.loss.any() and output.logits.shape == (0, search_oracle.VOCABULARY)
    output.loss.backward()
    unlabelled = pk.build_layout(model.catalog, [[1, 2]], pk.TextOnly(), model.prompt, head="items")
    assert model(unlabelled).loss is None


def test_more_items_than_sampled_above_are_sampled_in_training_only() -> None:
    model = make_model()
    layout = training_layout(model, POLICIES["items"])
    whole = model(layout).loss
    model.item_head.sampled_above, model.item_head.num_sampled = 22, 5000
    assert torch.equal(model(layout).loss, whole), "a new head is in the mode of its model"
    model.train()
    sampled = torch.stack([model(layout).loss.detach() for _ in range(20)])
    assert sampled.std() > 1e-4
    # the log of an unbiased estimate is a little low
    torch.testing.assert_close(sampled.mean(), whole.detach(), rtol=0, atol=0.05)
    model.item_head.sampled_above = 23
    assert torch.equal(model(layout).loss, whole)


def test_training_with_sampled_items_learns() -> None:
    model = make_model("gpt2", seed=None)
    model.item_head.sampled_above, model.item_head.num_sampled = 5, 8
    layout = training_layout(model, POLICIES["items"])
    before = model.eval()(layout).loss
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    model.train()
    for _ in range(15):
        optimizer.zero_grad()
        model(layout).loss.backward()
        optimizer.step()
    assert model.eval()(layout).loss < 0.7 * before


# ------------------------------------------------------------------ the head itself


def test_a_new_head_scores_with_the_models_own_logits() -> None:
    head = make_model(seed=None).item_head
    assert torch.equal(head.transform.weight, torch.eye(32, dtype=torch.float64))
    assert not head.log_temperature.any() and not head.bias.any()
    assert head.bias.shape == (23,) and head.bias.dtype == torch.float64
    assert "23 items" in repr(head)


def test_start_from_counts() -> None:
    head = make_model().item_head
    counts = np.arange(23)
    head.start_from_counts(counts)
    logs = torch.arange(23).double().log1p()
    torch.testing.assert_close(head.bias.detach(), logs - logs.mean())
    for wrong in (counts[1:], -counts, counts[None], np.full(23, np.nan)):
        with pytest.raises(ValueError, match="counts: expected 23 numbers of at least 0, one per item, got shape"):
            head.start_from_counts(wrong)


def test_some_vectors_are_those_of_all() -> None:
    model = make_model(item_embeddings=True)
    weight, own = model.hf_model.lm_head.weight, model.item_embedding
    some = torch.tensor([7, 0, 22, 7])
    every = model.item_head.vectors(weight, own)
    assert torch.equal(model.item_head.vectors(weight, own, some), every[some])
    assert every.shape == (23, 32)
    grads = [
        torch.autograd.grad(v.square().sum(), (weight, own))
        for v in (every[some], model.item_head.vectors(weight, own, some))
    ]
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-12)


def test_scores_see_every_change_of_what_they_are_made_of() -> None:
    model, other = make_model(item_embeddings=True), make_model(item_embeddings=True, seed=1)
    states = torch.randn(3, 32, dtype=torch.float64)

    def check() -> Tensor:
        head, weight = model.item_head, model.hf_model.lm_head.weight
        logits = head.queries(states.to(weight)) @ head.vectors(weight, model.item_embedding).T + head.bias
        got = model.item_scores(states.to(weight))
        torch.testing.assert_close(
            got, logits.log_softmax(1), rtol=0, atol=1e-12 if got.dtype == torch.float64 else 1e-4
        )
        return got

    tables = [check()]
    with torch.no_grad():
        for parameter in (model.hf_model.lm_head.weight, model.item_embedding, model.item_head.bias):
            parameter.mul_(1.5)
            tables.append(check())
    model.load_state_dict(other.state_dict())
    tables.append(check())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(training_layout(model, POLICIES["items"])).loss.backward()
    optimizer.step()
    tables.append(check())
    model.item_embedding = nn.Parameter(torch.randn_like(model.item_embedding))
    tables.append(check())
    assert all((one - two).abs().max() > 1e-6 for i, one in enumerate(tables) for two in tables[:i])
    model.float()
    assert check().dtype == torch.float32
    assert not model.item_scores(states.float()).requires_grad


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_copies_score_the_same_and_are_their_own(copied: Any) -> None:
    model = make_model(item_embeddings=True)
    layout = training_layout(model, POLICIES["items"])
    expected = scores_of(model, layout)
    other = copied(model)
    assert torch.equal(scores_of(other, layout), expected)
    with torch.no_grad():
        model.item_head.bias.add_(torch.arange(23))
    assert torch.equal(scores_of(other, layout), expected) and not torch.equal(scores_of(model, layout), expected)


# ------------------------------------------------------------------ files


def test_saved_heads_load_bit_for_bit(tmp_path: Path) -> None:
    model = make_model(item_embeddings=True)
    model.save_pretrained(tmp_path / "m")
    loaded = pk.PatchedCausalLM.from_pretrained(tmp_path / "m")
    assert all(torch.equal(one, two) for one, two in zip(loaded.parameters(), model.parameters(), strict=True))
    layout = training_layout(model, POLICIES["items"])
    assert torch.equal(scores_of(loaded, layout), scores_of(model, layout))
    half = pk.PatchedCausalLM.from_pretrained(tmp_path / "m", dtype=torch.bfloat16).item_head
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert torch.equal(half.bias, model.item_head.bias.bfloat16())


def test_folders_without_a_head(tmp_path: Path) -> None:
    model = make_model()
    plain = pk.PatchedCausalLM(model.hf_model, model.catalog, model.prompt)
    model.save_pretrained(tmp_path / "m")
    assert (tmp_path / "m" / "item_head.safetensors").is_file()
    plain.save_pretrained(tmp_path / "m")
    assert not list((tmp_path / "m").glob("item*"))
    assert pk.PatchedCausalLM.from_pretrained(tmp_path / "m").item_head is None
    added = pk.PatchedCausalLM.from_pretrained(tmp_path / "m", item_head=True).item_head
    assert torch.equal(added.transform.weight, torch.eye(32, dtype=torch.float64)) and not added.bias.any()
    # as versions before the head wrote it
    path = tmp_path / "m" / "patchkern.json"
    description = json.loads(path.read_text())
    del description["item_head"]
    path.write_text(json.dumps(description))
    assert pk.PatchedCausalLM.from_pretrained(tmp_path / "m").item_head is None


@pytest.mark.parametrize("ids", ["int", "gaps", "str"])
def test_biases_follow_their_items_to_another_catalogue(ids: str, tmp_path: Path) -> None:
    titles = cases.make_titles(23, ids=ids)
    model = make_model(titles=titles)
    model.save_pretrained(tmp_path / "m")
    names = list(titles)
    new = {"int": 1000, "gaps": 10**9, "str": "new"}[ids]
    other = {name: titles[name] for name in [names[7], *names[20:], *names[:5]]} | {new: [4, 2]}
    loaded = pk.PatchedCausalLM.from_pretrained(tmp_path / "m", cases.make_catalog(other))
    places = [7, 20, 21, 22, 0, 1, 2, 3, 4]
    assert torch.equal(loaded.item_head.bias[:-1], model.item_head.bias[places])
    assert loaded.item_head.bias[-1] == 0
    assert torch.equal(loaded.item_head.transform.weight, model.item_head.transform.weight)
    # what is left of the old scores is in the old order, and the new item has those of its text
    states = torch.randn(2, 32, dtype=torch.float64)
    old, got = model.item_scores(states)[:, places], loaded.item_scores(states)
    torch.testing.assert_close(got[:, :-1] - got[:, :1], old - old[:, :1], rtol=0, atol=1e-10)


def test_state_dicts_hold_the_head(tmp_path: Path) -> None:
    model, other = make_model(), make_model(seed=1)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    other.load_state_dict(state)
    other.save_pretrained(tmp_path / "m", state_dict=state)
    loaded = pk.PatchedCausalLM.from_pretrained(tmp_path / "m").item_head
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, state[f"item_head.{name}"]), name


def test_malformed_files(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = make_model()
    model.save_pretrained(tmp_path / "m")
    path = tmp_path / "m" / "item_head.safetensors"
    tensors, ids = load_file(path), {"item_ids": json.dumps(list(TITLES))}
    for name in tensors:
        save_file({other: value for other, value in tensors.items() if other != name}, path, ids)
        with pytest.raises(ValueError, match=r"item_head\.safetensors: not an item head that this version reads"):
            model.item_head.load(tmp_path / "m")
    save_file(tensors | {"transform.weight": torch.eye(16)}, path, ids)
    with pytest.raises(ValueError, match=r"folder: expected an item head of width 32, got shape \(16, 16\)"):
        model.item_head.load(tmp_path / "m")
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"item_head\.safetensors: not an item head that this version reads"):
        model.item_head.load(tmp_path / "m")
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"folder: expected item_head\.safetensors in"):
        pk.PatchedCausalLM.from_pretrained(tmp_path / "m")


@pytest.mark.parametrize("mode_is_set", [False, True])
def test_scores_follow_what_torch_does_not_count(mode_is_set: bool) -> None:
    """A fused optimiser, transformers' default, writes without raising the version of a parameter."""
    model = make_model().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    states = torch.randn(2, 32, dtype=torch.float64)
    before, version = model.item_scores(states), model.get_input_embeddings().weight._version
    model(training_layout(model, POLICIES["items"])).loss.backward()
    if mode_is_set:
        model.eval().item_scores(states)
        model.train()
    optimizer.step()
    assert model.get_input_embeddings().weight._version == version
    assert not torch.equal(model.item_scores(states), before)
    assert torch.equal(model.item_scores(states), copy.deepcopy(model).item_scores(states))


@pytest.mark.parametrize("part", ["lm_head.weight", "item_embedding"])
def test_scores_follow_writes_past_the_version(part: str) -> None:
    """As of moving averages and loaders, which write through `.data`."""
    model = make_model(item_embeddings=True).eval()
    states = torch.randn(2, 32, dtype=torch.float64)
    before = model.item_scores(states)
    parameter = model.item_embedding if part == "item_embedding" else model.hf_model.lm_head.weight
    parameter.data.mul_(1.5)
    assert not torch.equal(model.item_scores(states), before)
    assert torch.equal(model.item_scores(states), copy.deepcopy(model).item_scores(states))


def test_a_head_that_is_moved_keeps_nothing_where_it_was() -> None:
    model = make_model().eval()
    states = torch.randn(2, 32, dtype=torch.float64)
    model.item_scores(states)
    assert model.item_head._known is not None and model.item_head._layout is not None
    model.to(torch.float32)
    assert model.item_head._known is None and model.item_head._layout is None
    assert model.item_scores(states.float()).dtype == torch.float32


def test_what_inference_mode_leaves_behind_can_be_trained_with() -> None:
    model = make_model(item_embeddings=True)
    states = torch.randn(2, 32, dtype=torch.float64)
    with torch.inference_mode():
        inside = model.item_scores(states)
    assert torch.equal(model.item_scores(states), inside) and not model.item_scores(states).is_inference()
    model(training_layout(model, POLICIES["items"])).loss.backward()
    assert model.item_embedding.grad.any()
    with torch.inference_mode():
        assert torch.equal(model.item_scores(states), inside)


def test_labels_of_another_catalogue_are_refused() -> None:
    model = make_model()
    others = cases.make_catalog(dict(reversed(TITLES.items())))
    exchanged = cases.make_catalog(dict(zip(reversed(TITLES), TITLES.values(), strict=True)))
    for catalog in (others, exchanged):
        for layout in (
            pk.build_training_layout(catalog, HISTORIES, POLICIES["items"], model.prompt, RANGES, head="items"),
            pk.build_layout(catalog, HISTORIES, POLICIES["items"], model.prompt, [0] * 4, head="items"),
        ):
            with pytest.raises(ValueError, match="layout: expected one of the model's catalog, whose items its labels"):
                model(layout)
    model(pk.build_layout(others, HISTORIES, POLICIES["items"], model.prompt, [0] * 4))  # of titles, which are tokens


# ------------------------------------------------------------------ adapters, errors


def test_adapters_train_and_keep_the_head(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    base = model_cases.tiny("llama").eval()
    adapted: Any = model_cases.lora(copy.deepcopy(base), target_modules=["q_proj", "v_proj"]).eval()
    model = pk.PatchedCausalLM(adapted, model_cases.CATALOG, model_cases.PROMPT, item_head=True)
    randomise(model)
    layout = pk.build_training_layout(
        model.catalog, [[0, 3, 9, 1]], pk.ItemPatches(1), model.prompt, [[1, 3]], head="items"
    )
    model(layout).loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {"item_head.bias", "item_head.transform.weight", "item_head.log_temperature"} <= trained
    model.save_pretrained(tmp_path / "m")
    loaded = pk.PatchedCausalLM.from_pretrained(tmp_path / "m", base_model=base)
    torch.testing.assert_close(scores_of(loaded.eval(), layout), scores_of(model, layout), rtol=0, atol=1e-5)


def test_a_copy_of_the_output_embedding_that_is_trained_makes_the_vectors() -> None:
    pytest.importorskip("peft")
    adapted: Any = model_cases.lora(
        model_cases.tiny("llama").eval(), target_modules=["q_proj"], modules_to_save=["lm_head"]
    )
    model = pk.PatchedCausalLM(adapted, model_cases.CATALOG, model_cases.PROMPT, item_head=True)
    layout = pk.build_layout(model.catalog, [[0, 3]], pk.ItemPatches(1), model.prompt, [5], head="items")
    model(layout).loss.backward()
    wrapper = adapted.get_output_embeddings()
    trained = wrapper.modules_to_save["default"].weight
    assert trained.grad.any() and wrapper.original_module.weight.grad is None
    assert output_weight(adapted) is trained
    with adapted.disable_adapter():
        assert output_weight(adapted) is wrapper.original_module.weight


def test_lora_on_the_output_embedding_is_refused() -> None:
    pytest.importorskip("peft")
    adapted: Any = model_cases.lora(model_cases.tiny("llama"), target_modules=["q_proj", "lm_head"])
    with pytest.raises(ValueError, match=r"item_head: expected an output embedding without LoRA, .*modules_to_save"):
        pk.PatchedCausalLM(adapted, model_cases.CATALOG, model_cases.PROMPT, item_head=True)
    assert pk.PatchedCausalLM(adapted, model_cases.CATALOG, model_cases.PROMPT).item_head is None


def test_models_without_a_head() -> None:
    model = search_oracle.make_model(TITLES)
    layout = training_layout(model, POLICIES["items"])
    with pytest.raises(ValueError, match="layout: expected one for titles from a model without an item head"):
        model(layout)
    with pytest.raises(ValueError, match="model: expected one with an item head"):
        model.item_scores(torch.zeros(1, 32))
    for call in (
        lambda: model.recommend(HISTORIES, POLICIES["items"], search="items"),
        lambda: model.score_items(HISTORIES, POLICIES["items"], head="items"),
    ):
        with pytest.raises(ValueError, match=r'expected a model with an item head \(item_head=True\) for "items"'):
            call()
    with pytest.raises(TypeError, match="item_head: expected a bool, got int"):
        pk.PatchedCausalLM(model.hf_model, model.catalog, model.prompt, item_head=1)


def test_a_model_without_output_embedding() -> None:
    hf_model = copy.deepcopy(search_oracle.HF_MODELS["llama"])
    hf_model.lm_head = nn.Sequential(hf_model.lm_head)
    with pytest.raises(ValueError, match="item_head: expected a model with an output embedding of one weight"):
        pk.PatchedCausalLM(hf_model, cases.make_catalog(TITLES), search_oracle.PROMPT, item_head=True)


def test_autocast_trains_it() -> None:
    model = make_model().float()
    layout = training_layout(model, POLICIES["items"])
    exact = model(layout).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(layout).loss
    loss.backward()
    assert loss.dtype == torch.float32 and (loss - exact).abs() < 0.05 * exact
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.item_head.parameters())
