# SPDX-License-Identifier: Apache-2.0
"""Prompts whose last layer computes little more than the rows that are read: what it gives for all, in every use."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import model_families as families
import numpy as np
import peft
import pytest
import torch
import transformers
from model_families import CATALOG, PROMPT, TITLES
from torch import Tensor, nn
from wanted_rows_cases import Chooses

import patchkern as pk
from patchkern.models import wanted_rows
from patchkern.models.scratch import from_scratch

NAMES = {item: f"Title {item} of {'ab' * (item % 3)}" for item in range(40)}
POLICY = pk.ItemPatches(keep_text=2)
HISTORIES = [[(7 * user + 5 * place) % 30 for place in range(n)] for user, n in enumerate([9, 1, 14, 3, 30])]
RANGES = [(len(history) // 2, len(history) - 1) for history in HISTORIES]
# a feed-forward network by name in most, one of experts in some, none that takes rows alone in opt
FAMILIES = ["llama", "gemma3_text", "qwen3", "qwen3_moe", "mixtral", "gpt2", "gpt_neox", "opt", "phi", "phi3", "olmo2"]
FAMILIES += ["granite", "cohere2"]
# has its output matrix where others have their decoder
FAMILIES += ["modernbert-decoder"]


@pytest.fixture
def choose(monkeypatch: pytest.MonkeyPatch) -> Chooses:
    return Chooses(monkeypatch)


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(before)


def make_model(layers: int = 2, seed: int = 0) -> pk.PatchedCausalLM:
    parts = from_scratch(
        NAMES, hidden_size=16, intermediate_size=32, num_attention_heads=2, num_hidden_layers=layers, seed=seed
    )
    model = pk.PatchedCausalLM(*parts, POLICY, item_head=True).double().eval()
    with torch.no_grad():
        model.item_head.bias.normal_(generator=torch.Generator().manual_seed(1))
    return model


def scores(model: Any, search: str, histories: Any = HISTORIES, **options: Any) -> np.ndarray:
    """Of all items in the order of their ids, by way of lists."""
    k = len(model.catalog)
    lists = model.recommend(histories, k=k, num_beams=k, search=search, **options)
    return np.array([[score for _, score in sorted(user)] for user in lists])


def close(few: np.ndarray, every: np.ndarray, tolerance: float = 1e-12) -> None:
    np.testing.assert_allclose(few, every, rtol=0, atol=tolerance)


def counted(module: nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows it takes in every pass from now on; no hook, which would keep the rows whole."""
    counts: list[int] = []
    forward = module.forward

    def count(rows: Tensor) -> Tensor:
        counts.append(rows.shape[1])
        return forward(rows)

    monkeypatch.setattr(module, "forward", count)
    return counts


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("search", ["beam", "exact", "items"])
def test_searches(search: str, layers: int, choose: Chooses) -> None:
    model = make_model(layers)
    close(*choose.both(lambda: scores(model, search)))
    close(*choose.both(lambda: scores(model, search, memory_budget="4MiB", batch_size=2)))
    cache = pk.UserCache(model, 1 << 23)
    for end in (1, 7, 30):
        past = [history[:end] for history in HISTORIES]
        choose(True)
        cached = scores(model, search, past, user_cache=cache)
        choose(False)
        close(cached, scores(model, search, past))


@pytest.mark.parametrize("search", ["beam", "items"])
def test_the_rows_that_are_computed(search: str, choose: Chooses, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(3)
    first, last = (model.hf_model.model.layers[at] for at in (0, 2))
    every = counted(first.mlp, monkeypatch)
    few = [counted(part, monkeypatch) for part in (last.mlp, last.self_attn.q_proj, last.self_attn.o_proj)]
    keys = counted(last.self_attn.k_proj, monkeypatch)
    choose(True)
    model.recommend(HISTORIES, k=1, search=search)
    whole = pk.build_layout(model.catalog, HISTORIES, POLICY, model.prompt, head="items").num_rows
    assert max(every) >= whole / 2, "all, but for what users share"
    assert max(keys) == max(every)
    for counts in few:
        assert len(HISTORIES) in counts
        assert max(every) not in counts


@torch.no_grad()
def test_what_else_is_called_as_a_projection(choose: Chooses) -> None:
    """In the feed-forward network, and in a layer of two attentions, of which nobody knows which is whose."""
    model = make_model()
    rows, asked = torch.randn(7, 16, dtype=torch.float64), torch.tensor([2, 6])
    layer = model.hf_model.model.layers[-1]
    layer.mlp.out_proj, layer.self_attn.o_proj.q_proj = nn.Linear(16, 16), None
    choose(True)
    with wanted_rows.only(model.hf_model, asked, rows):
        assert not layer.mlp.out_proj._forward_hooks and not layer.self_attn.q_proj._forward_hooks
    del layer.self_attn.o_proj.q_proj
    with wanted_rows.only(model.hf_model, asked, rows):
        assert not layer.mlp.out_proj._forward_hooks and not layer.self_attn.k_proj._forward_hooks
        assert layer.self_attn.q_proj._forward_hooks and layer.self_attn.o_proj._forward_hooks
    with torch.enable_grad(), wanted_rows.only(model.hf_model, asked, rows):
        assert not layer.self_attn.q_proj._forward_hooks, "a loss reads attention of all rows"


def test_chunks_that_end_no_prompt(choose: Chooses, monkeypatch: pytest.MonkeyPatch) -> None:
    """What their last layer gives is not read at all."""
    model = make_model()
    policy = pk.Experts(pk.ItemPatches(0, None), count=2, keep=2, block=3)
    pk.add_experts(model, policy.count)
    few, every = choose.both(lambda: scores(model, "items", policy=policy))
    close(few, every)
    last = counted(model.hf_model.model.layers[-1].mlp, monkeypatch)
    choose(True)
    pk.UserStates(model, policy=policy).update(range(2), HISTORIES[2:4])
    assert set(last) <= {1, 4}, "one row for none, and what was tried: whether rows are taken one by one"


def gradients(model: Any, layout: pk.PatchLayout) -> list[Tensor]:
    """The loss, and what it gives every parameter."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    loss = model(layout, title_weight=0.7).loss
    return [loss.detach(), *torch.autograd.grad(loss, trained, materialize_grads=True)]


def same(few: list[Tensor], every: list[Tensor], tolerance: float = 1e-12) -> None:
    for one, other in zip(few, every, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("head", ["titles", "items", "both"])
@pytest.mark.parametrize("policy", [pk.TextOnly(), pk.ItemPatches(2), pk.SessionPatches(3, align="start")], ids=str)
def test_losses_and_gradients(policy: Any, head: Any, choose: Chooses) -> None:
    model = make_model(3)
    layout = pk.build_training_layout(model.catalog, HISTORIES, policy, model.prompt, RANGES, head=head)
    same(*choose.both(lambda: gradients(model, layout)))
    samples = pk.build_layout(model.catalog, HISTORIES, policy, model.prompt, [1, 2, 3, 4, 5], head=head)
    same(*choose.both(lambda: gradients(model, samples)))


def test_rows_with_two_labels(choose: Chooses) -> None:
    """Each gives its row's gradient once."""
    model = make_model()
    layout = pk.build_training_layout(model.catalog, HISTORIES, POLICY, model.prompt, RANGES, head="items")
    twice = torch.tensor([0, 1, 0, 2, 0])
    layout = dataclasses.replace(layout, item_rows=layout.item_rows[twice], item_labels=layout.item_labels[:5])
    same(*choose.both(lambda: gradients(model, layout)))


def test_the_rows_of_a_step(choose: Chooses, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model().train()
    layout = pk.build_training_layout(model.catalog, HISTORIES[4:], POLICY, model.prompt, [(20, 29)])
    first, last = (counted(layer.mlp, monkeypatch) for layer in model.hf_model.model.layers)
    choose(True)
    model(layout).loss.backward()
    assert first[-1:] == [layout.num_rows] and last[-1:] == [len(layout.logit_labels)]
    model.activation_checkpointing_enable()
    model(layout).loss.backward()
    assert last[-2:] == [layout.num_rows] * 2, "nobody chooses when activations are computed again"


def test_networks_that_drop_out(choose: Chooses, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are tried without, and nothing is drawn for it."""
    model = pk.PatchedCausalLM(families.tiny_model("gpt2", reach=64), CATALOG, PROMPT).train()
    network = model.hf_model.transformer.h[-1].mlp
    network.dropout.p = 0.5
    layout = pk.build_training_layout(CATALOG, HISTORIES[:1], pk.ItemPatches(0), PROMPT, [(8, 8)])
    counts = counted(network, monkeypatch)
    choose(True)
    before = torch.get_rng_state()
    with wanted_rows.only(model.hf_model, layout.logit_rows, model.embed(layout)):
        assert counts == [4, 1] and network.training and network.dropout.training
        torch.testing.assert_close(torch.get_rng_state(), before)
    model(layout).loss.backward()
    assert counts[2:] == [len(layout.logit_labels)]


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name: str, choose: Chooses) -> None:
    hf_model = families.tiny_model(name, reach=64)
    model = pk.PatchedCausalLM(hf_model, CATALOG, PROMPT, pk.ItemPatches(keep_text=2), item_head=True).eval()
    past = [history[:9] for history in HISTORIES]
    for search in ("beam", "items"):
        few, every = choose.both(lambda search=search: scores(model, search, past))
        close(few, every, 2e-5 * float(np.abs(every).max()))
        assert few.shape == (len(past), len(TITLES))


def test_adapters(choose: Chooses) -> None:
    model = make_model()
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj", "down_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model.hf_model, config)
    model = pk.PatchedCausalLM(adapted, model.catalog, model.prompt, POLICY, item_head=True).double()
    close(*choose.both(lambda: scores(model, "items")))


def test_who_listens_gets_whole_rows(choose: Chooses) -> None:
    model = make_model()
    heard: list[Tensor] = []
    few, every = choose.both(lambda: scores(model, "items"))
    layer = model.hf_model.model.layers[-1]
    for module in (layer, layer.mlp, model.hf_model.model):
        with module.register_forward_hook(lambda _, given, output: heard.append(output)):
            few, every = choose.both(lambda: scores(model, "items"))
        one, other = (x if isinstance(x, Tensor) else x[0] for x in heard)
        torch.testing.assert_close(one, other, rtol=0, atol=0)
        heard.clear()
        close(few, every)


def test_what_is_compiled_is_left_alone(choose: Chooses) -> None:
    """A graph that was traced with hooks is run without them, and the other way around."""
    choose(True)
    rows = torch.randn(7, 16, dtype=torch.float64)
    for compile_part in (
        lambda model: model.hf_model.compile(backend="eager"),
        lambda model: model.hf_model.model.layers[-1].compile(backend="eager"),
        lambda model: setattr(
            model.hf_model.model.layers[-1], "mlp", torch.compile(model.hf_model.model.layers[-1].mlp, backend="eager")
        ),
    ):
        model = make_model()
        compile_part(model)
        with wanted_rows.only(model.hf_model, torch.tensor([2, 6]), rows) as arguments:
            assert not arguments and not model.hf_model.model.layers[-1].mlp._forward_hooks


def test_an_error_within_leaves_the_model_as_it_was(choose: Chooses, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    every = scores(model, "items")
    network = model.hf_model.model.layers[-1].mlp
    choose(True)
    scores(model, "items")  # it has been tried
    with monkeypatch.context() as patched:
        patched.setattr(network, "forward", lambda rows: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model.recommend(HISTORIES, k=1, search="items")
    assert not network._forward_hooks and not network._forward_pre_hooks
    close(scores(model, "items"), every)


class OverRows(nn.Module):
    """No network of rows one by one: each has something of all before it."""

    def forward(self, rows: Tensor) -> Tensor:
        return rows.cumsum(1)


@pytest.mark.parametrize("count", [1, 7])
def test_networks_over_rows_are_left_alone(count: int, choose: Chooses, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randn(count, 16, dtype=torch.float64)
    model = make_model()
    choose(True)
    model.hf_model.model.layers[-1].mlp = OverRows()
    counts = counted(model.hf_model.model.layers[-1].mlp, monkeypatch)
    with torch.no_grad(), wanted_rows.only(model.hf_model, torch.tensor([count - 1]), rows):
        output = model.hf_model.model.layers[-1].mlp(rows[None])
    assert counts == [4, 1, count], "a try, and then all rows"
    torch.testing.assert_close(output, rows[None].cumsum(1), rtol=0, atol=0)
