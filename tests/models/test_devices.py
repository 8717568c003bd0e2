# SPDX-License-Identifier: Apache-2.0
"""Whole models on a device, in the dtypes that they are used in, against themselves in float64 on the CPU."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import expert_model_cases
import item_model_cases
import memory_model_cases
import numpy as np
import pytest
import torch
from autocast_cases import like_cuda
from model_cases import CATALOG, POLICIES, PROMPT, VOCABULARY, batch_of, lora, tiny
from torch import nn
from training_cases import losses_of, make_trainer
from wanted_rows_cases import Chooses

import patchkern as pk
from patchkern.ops import span_rows
from patchkern.serving.stores import MemoryStore
from patchkern.serving.user_states import UserStates

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
on_devices = pytest.mark.parametrize("device", DEVICES, indirect=True)
# Of the norm of what is compared. Some hundred sums and roundings lie between a model's weights and its results.
TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 8e-2}
in_dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)

LENGTHS = [0, 3, 40, 17, 8]
HISTORIES, TARGETS = batch_of(LENGTHS)
RANGES = [(0, len(history) - 1) for history in HISTORIES]
EXPERTS = {
    "one": pk.Experts(pk.ItemPatches(0, None), recent=pk.TextOnly(None), count=2, keep=3, block=5),
    "blocks": pk.Experts(pk.ItemPatches(0, None), count=2, block=5, parts="blocks"),
}


def language_model(kind: str = "llama", head: bool = True, experts: int = 0, **options: Any) -> pk.PatchedCausalLM:
    """In float64."""
    prompt = PROMPT.with_special(experts=range(VOCABULARY, VOCABULARY + experts)) if experts else PROMPT
    inner = tiny(kind, vocab_size=VOCABULARY + experts).double()
    model = pk.PatchedCausalLM(inner, CATALOG, prompt, item_head=head, **options)
    return model.eval()


def on(model: Any, device: torch.device, dtype: torch.dtype) -> Any:
    return copy.deepcopy(model).to(device=device, dtype=dtype)


def assert_close(got: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], dtype: torch.dtype) -> None:
    """Each within the tolerance of its norm."""
    for ours, theirs in zip(got, expected, strict=True):
        assert (ours.double().cpu() - theirs).norm() <= TOLERANCE[dtype] * max(float(theirs.norm()), 1e-2)


def loss_and_gradients(model: nn.Module, *arguments: Any, **options: Any) -> list[torch.Tensor]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    loss = model(*arguments, **options).loss
    found = torch.autograd.grad(loss, trained, allow_unused=True)
    return [loss.detach(), *(torch.zeros(()) if grad is None else grad for grad in found)]


def check_training(model: Any, device: torch.device, dtype: torch.dtype, batch: Callable[[Any], Any]) -> None:
    """The loss and every gradient; ``batch`` makes what a model is called with."""
    copied = on(model, device, dtype)
    exact = on(copied, torch.device("cpu"), torch.float64)  # of the weights as they are rounded
    assert_close(loss_and_gradients(copied, batch(copied)), loss_and_gradients(exact, batch(exact)), dtype)


def check_lists(model: Any, device: torch.device, recommend: Callable[[Any], Any]) -> None:
    """The same items; where two scores are within rounding of each other either may come first."""
    copied = on(model, device, torch.float32)
    for ours, theirs in zip(recommend(copied), recommend(model), strict=True):
        got, expected = ([score for _, score in items] for items in (ours, theirs))
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=2e-3)
        for place, ((one, _), (other, score)) in enumerate(zip(ours, theirs, strict=True)):
            gaps = np.abs(np.delete(np.asarray(expected), place) - score)
            assert one == other or place == len(ours) - 1 or gaps.min() < 4e-3


# ------------------------------------------------------------------ language models


@on_devices
@in_dtypes
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2 tied"])
def test_titles_of_samples(kind: str, policy: str, dtype: torch.dtype, device: torch.device) -> None:
    model = language_model(kind, head=False)
    layout = pk.build_layout(CATALOG, HISTORIES, POLICIES[policy], PROMPT, TARGETS)
    check_training(model, device, dtype, lambda of: layout.to(of.device))


@on_devices
@in_dtypes
@pytest.mark.parametrize("head", ["titles", "items", "both"])
@pytest.mark.parametrize("policy", ["text", "items", "sessions, start", "random"])
def test_all_targets_of_a_pass(policy: str, head: Any, dtype: torch.dtype, device: torch.device) -> None:
    model = language_model(item_embeddings=True)
    layout = pk.build_training_layout(CATALOG, HISTORIES, POLICIES[policy], PROMPT, RANGES, head=head)
    check_training(model, device, dtype, lambda of: layout.with_identities().to(of.device))


@on_devices
@pytest.mark.parametrize("kind", ["gemma", "gemma3", "qwen2", "llama tied"])
def test_other_families(kind: str, device: torch.device) -> None:
    model = language_model(kind, head=False)
    for policy in ("text", "sessions, end"):
        layout = pk.build_layout(CATALOG, HISTORIES, POLICIES[policy], PROMPT, TARGETS)
        check_training(model, device, torch.float32, lambda of, layout=layout: layout.to(of.device))


@on_devices
def test_checkpointing_and_adapters(device: torch.device) -> None:
    model = language_model()
    model.hf_model = lora(model.hf_model.float(), target_modules=["q_proj", "v_proj"]).double()
    layout = pk.build_training_layout(CATALOG, HISTORIES, POLICIES["items"], PROMPT, RANGES)
    expected = loss_and_gradients(model, layout)
    copied = on(model, device, torch.float32).train()
    copied.activation_checkpointing_enable()
    assert_close(loss_and_gradients(copied, layout.to(device)), expected, torch.float32)


@on_devices
@pytest.mark.parametrize("parts", EXPERTS)
def test_experts(parts: str, device: torch.device) -> None:
    model = language_model(experts=2, policy=EXPERTS[parts])
    for head in ("titles", "items"):
        layout = pk.build_training_layout(CATALOG, HISTORIES, model.policy, model.prompt, RANGES, head=head)
        check_training(model, device, torch.float32, lambda of, layout=layout: layout.to(of.device))
    for search in ("items", "beam"):
        check_lists(model, device, lambda of, search=search: of.recommend(HISTORIES, k=5, search=search))


@on_devices
@pytest.mark.parametrize("least", [0, None])
@pytest.mark.parametrize("search", ["items", "beam", "exact", "diverse"])
def test_searches(search: str, least: int | None, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with a last layer that computes wanted rows alone, which it does not for a model as small as this."""
    if least is not None:
        monkeypatch.setattr(span_rows, "_LEAST_PRODUCT", least)
    model = language_model(item_embeddings=True)
    for policy in ("items", "sessions, start"):
        check_lists(
            model,
            device,
            lambda of, policy=policy: of.recommend(
                HISTORIES, POLICIES[policy], 5, search=search, exclude_seen=True, short="allow"
            ),
        )


@on_devices
def test_scores_and_kept_prompts(device: torch.device) -> None:
    model = language_model()
    copied = on(model, device, torch.float32)
    for head in ("titles", "items"):
        got = copied.score_items(HISTORIES, POLICIES["items"], head=head)
        np.testing.assert_allclose(got, model.score_items(HISTORIES, POLICIES["items"], head=head), atol=2e-3)
    names = list(range(len(HISTORIES)))
    caches = [pk.UserCache(one, 2**20) for one in (copied, model)]
    for cut in (2, 0):
        pasts = [history[: max(len(history) - cut, 0)] for history in HISTORIES]
        found = [
            one.recommend(pasts, POLICIES["items"], k=5, user_cache=cache, user_ids=names)
            for one, cache in zip((copied, model), caches, strict=True)
        ]
        for ours, theirs in zip(*found, strict=True):
            np.testing.assert_allclose([score for _, score in ours], [score for _, score in theirs], atol=2e-3)


@on_devices
@pytest.mark.parametrize("stage", ["pretrain", "sessions", "items"])
def test_training_on_a_device(stage: str, device: torch.device, tmp_path: Path) -> None:
    """With the trainer's own defaults for the device, bfloat16 autocast among them."""
    trainer = make_trainer(
        tmp_path, stage, num_train_epochs=4, learning_rate=1e-2, max_grad_norm=1.0, use_cpu=device.type == "cpu"
    )
    trainer.train()
    assert trainer.model.device.type == device.type
    losses = losses_of(trainer)
    assert np.mean(losses[-3:]) < 0.75 * np.mean(losses[:3])


@on_devices
@pytest.mark.parametrize("wanted_alone", [False, True])
@pytest.mark.parametrize("kind", ["titles", "items", "both", "sessions", "experts", "sasrec", "hstu", "memory"])
def test_training_under_autocast(
    kind: str, wanted_alone: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights in float32, products in bfloat16; on the CPU by the rules of CUDA's autocast, which are not its own."""
    Chooses(monkeypatch)(wanted_alone)
    model, batch = autocast_case(kind)
    copied = on(model, device, torch.float32)
    with like_cuda() if device.type == "cpu" else nullcontext():
        with torch.autocast(device.type, torch.bfloat16):
            output = copied(batch.to(device))
        output.loss.backward()
    assert output.loss.dtype == torch.float32
    trained = [parameter for parameter in copied.parameters() if parameter.requires_grad]
    found = [torch.zeros(()) if parameter.grad is None else parameter.grad for parameter in trained]
    expected = loss_and_gradients(on(copied, torch.device("cpu"), torch.float64), batch)
    assert_close([output.loss.detach(), *found], expected, torch.bfloat16)


def autocast_case(kind: str) -> tuple[Any, Any]:
    """A model and a batch of its training."""
    if kind == "memory":
        memory = memory_model_cases.make_memory()
        ranges = memory_model_cases.RANGES
        return memory, memory.planner.training(memory_model_cases.HISTORIES, ranges, head="items").planned()
    if kind in ("sasrec", "hstu"):
        model: Any = item_model_cases.make_model(block=kind)
        histories, head = item_model_cases.HISTORIES, "items"
    else:
        policies = {"experts": EXPERTS["blocks"], "sessions": POLICIES["sessions, start"]}
        policy = policies.get(kind, POLICIES["items"])
        model = language_model(experts=2 if kind == "experts" else 0, policy=policy, item_embeddings=True)
        histories, head = HISTORIES, kind if kind in ("titles", "both") else "items"
    ranges = np.array([(0, len(items) - 1) for items in histories])
    layout = pk.build_training_layout(model.catalog, histories, model.policy, model.prompt, ranges, head=head)
    return model, layout.with_identities()


# ------------------------------------------------------------------ models of item ids


@on_devices
@in_dtypes
@pytest.mark.parametrize("policy", item_model_cases.POLICIES)
@pytest.mark.parametrize("block", ["sasrec", "hstu"])
def test_item_models(block: str, policy: str, dtype: torch.dtype, device: torch.device) -> None:
    histories = item_model_cases.HISTORIES
    model = item_model_cases.make_model(block=block, policy=item_model_cases.POLICIES[policy])
    ranges = np.array([(0, len(items) - 1) for items in histories])
    layout = pk.build_training_layout(model.catalog, histories, model.policy, model.prompt, ranges, head="items")
    check_training(model, device, dtype, lambda of: layout.to(of.device))
    if dtype == torch.float32:
        check_lists(model, device, lambda of: of.recommend(histories, k=5))


@on_devices
@in_dtypes
@pytest.mark.parametrize("block", ["sasrec", "hstu"])
@pytest.mark.parametrize("kind", expert_model_cases.POLICIES)
def test_item_models_under_experts(kind: str, block: str, dtype: torch.dtype, device: torch.device) -> None:
    places = expert_model_cases.PLACES
    model = expert_model_cases.model_for(expert_model_cases.POLICIES[kind], block)
    ranges = np.array([(0, len(items) - 1) for items in places])
    layout = pk.build_training_layout(model.catalog, places, model.policy, model.prompt, ranges, head="items")
    check_training(model, device, dtype, lambda of: layout.to(of.device))
    if dtype == torch.float32:
        check_lists(model, device, lambda of: of.recommend(places, k=5))


@on_devices
@pytest.mark.parametrize(
    ("kind", "mode", "inner"),
    [("sasrec", "overwrite", "items"), ("hstu", "append", "items"), ("sasrec", "append", "sessions")],
)
def test_recurrent_memories(kind: str, mode: str, inner: str, device: torch.device) -> None:
    cases = memory_model_cases
    memory = cases.make_memory(kind, mode, inner)
    batch = memory.planner.training(cases.HISTORIES, cases.RANGES, head="items").planned()
    check_training(memory, device, torch.float32, lambda of: batch.to(of.device))
    copied = on(memory, device, torch.float32)
    for one_time in (False, True):
        got, expected = (one.compress(cases.HISTORIES, one_time=one_time).vectors for one in (copied, memory))
        assert_close([got], [expected], torch.float32)
    check_lists(memory, device, lambda of: of.recommend(cases.HISTORIES, k=5))


@on_devices
@pytest.mark.parametrize("kind", ["experts", "memory"])
def test_users_kept_compressed(kind: str, device: torch.device) -> None:
    """Written by events, and read: the lists of the whole histories."""
    if kind == "experts":
        model: Any = expert_model_cases.model_for(expert_model_cases.POLICIES["blocks"], "sasrec")
        histories = expert_model_cases.PLACES
    else:
        model = memory_model_cases.make_memory()
        histories = [items.tolist() for items in memory_model_cases.HISTORIES]
    names = list(range(len(histories)))

    def recommend(of: Any) -> Any:
        states = UserStates(of, None, MemoryStore(2**20))
        for cut in (3, 0):
            states.update(names, [items[: max(len(items) - cut, 0)] for items in histories])
        return of.recommend(histories, k=5, user_states=states, user_ids=names)

    check_lists(model, device, recommend)


# ------------------------------------------------------------------ torch's default device


def test_the_default_device_plays_no_part() -> None:
    """On "meta" no tensor has values, so that one which somebody did not place is seen."""
    model = language_model(item_embeddings=True)
    nn.init.normal_(model.item_embedding, std=0.1)

    def results() -> list[Any]:
        cache = pk.UserCache(model, 1 << 20)
        searches = [{"search": "beam"}, {"search": "exact"}, {"search": "items"}, {"search": "diverse", "k": 3}]
        lists = [
            model.recommend(HISTORIES, POLICIES["items"], **{"k": 4, "num_beams": 5, "user_cache": cache, **options})
            for options in searches
        ]
        some = {"allowed_items": [[1, 2, 3]] * 5, "prior": np.linspace(0, 1, len(CATALOG)), "memory_budget": "1GiB"}
        lists.append(model.recommend(HISTORIES, POLICIES["items"], 2, **some))
        layout = pk.build_training_layout(CATALOG, HISTORIES, POLICIES["items"], PROMPT, RANGES, head="both")
        return [*lists, float(model(layout).loss), model.score_items(HISTORIES, POLICIES["text"]).tolist()]

    expected = results()
    with torch.device("meta"):
        assert results() == expected
        copied = pk.PatchedCausalLM(model.hf_model, CATALOG, PROMPT)  # which is probed
    assert copied.device.type == "cpu"
    memory = memory_model_cases.make_memory()
    expected = memory.recommend(memory_model_cases.HISTORIES, k=2)
    with torch.device("meta"):
        assert memory.recommend(memory_model_cases.HISTORIES, k=2) == expected
