# SPDX-License-Identifier: Apache-2.0
"""Users' prompts from the cache against prompts computed from the start; what is kept, dropped and refused."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from cases import POLICIES, make_catalog, make_histories, make_titles
from hypothesis import given, settings
from hypothesis import strategies as st
from prompt_cases import LONG, compute, computed_rows
from search_oracle import HF_MODELS, make_hf_model, make_model

import patchkern as pk
from patchkern.search.prompts import Prompts
from patchkern.search.user_cache import UserCache

TITLES = make_titles(23)
POLICY = POLICIES["sessions-start"]  # groups of 5, borders that never move
ROW_BYTES = 2 * 2 * 2 * 8 * 8  # keys and values, layers, heads, width, float64


def logits(model: pk.PatchedCausalLM, histories: Any, policy: Any = POLICY, **options: Any) -> torch.Tensor:
    """Of the prompts, and of a token after each."""
    prompts, _ = compute(model, histories, policy, max_rows=len(histories), **options)
    users = torch.arange(len(histories))
    with model.searching():
        return torch.stack([prompts.logits, prompts.step(torch.full_like(users, -1), users, users + 3)])


def assert_as_without(model: pk.PatchedCausalLM, histories: Any, policy: Any = POLICY, **options: Any) -> None:
    got, expected = logits(model, histories, policy, **options), logits(model, histories, policy)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


def check_places(cache: UserCache) -> None:
    """Every place of the pool belongs to one user or to none."""
    taken = [place for entry in cache._entries.values() for place in entry.places]
    free = cache._free[: cache._n_free].tolist()
    assert sorted(taken + free) == list(range(cache._free.size))
    assert all(entry.places.size == entry.hashes.size for entry in cache._entries.values())
    assert cache.num_bytes == len(taken) * cache._row_bytes <= cache.max_bytes


# ------------------------------------------------------------------ results


@pytest.mark.parametrize("first", [True, False])
def test_calls_in_inference_mode_and_others_share_a_cache(first: bool) -> None:
    model = make_model(TITLES)
    cache = UserCache(model, 1 << 20)
    whole = make_histories(TITLES, [20, 7])
    for new, inside in zip((5, 3, 0), (first, not first, first), strict=True):
        with torch.inference_mode(inside):
            assert_as_without(model, [history[: len(history) - new] for history in whole], user_cache=cache)


@pytest.mark.parametrize("chunk_rows", [None, 6])
@pytest.mark.parametrize("family", HF_MODELS)
def test_growing_histories(family: str, chunk_rows: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(TITLES, family)
    cache = UserCache(model, 1 << 20)
    whole = make_histories(TITLES, [60, 3, 44, 17])
    rows = computed_rows(monkeypatch)
    for new in (10, 9, 5, 1, 0, 0):
        histories = [history[: max(len(history) - new, 0)] for history in whole]
        rows.clear()
        got = logits(model, histories, user_cache=cache, chunk_rows=chunk_rows)
        computed = sum(rows)
        torch.testing.assert_close(got, logits(model, histories), rtol=0, atol=1e-10)
        check_places(cache)
    assert computed == 4  # the same prompts again: their last rows, for the logits


def test_only_what_is_new_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(TITLES)
    cache = UserCache(model, 1 << 24)
    (history,) = make_histories(TITLES, [1010])
    compute(model, [history[:1000]], POLICY, user_cache=cache)
    rows = computed_rows(monkeypatch)
    _, layout = compute(model, [history], POLICY, user_cache=cache)
    # at most two groups of patches and text turn into sessions, and their rows behind move
    assert sum(rows) < layout.num_rows / 4 and layout.num_rows > 400
    assert_as_without(model, [history], user_cache=cache)


def test_content_decides_not_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(TITLES)
    cache = UserCache(model, 1 << 20)
    a, b, c = make_histories(TITLES, [30, 30, 12])
    compute(model, [a, b], POLICY, user_cache=cache, user_ids=["a", "b"])
    assert_as_without(model, [b, a, c], user_cache=cache, user_ids=["a", "b", "a"])
    assert_as_without(model, [c, c, a], user_cache=cache, user_ids=["a", "a", "a"])
    check_places(cache)
    # another policy: other rows from the first on
    assert_as_without(model, [a], POLICIES["items"], user_cache=cache, user_ids=["a"])
    changed = [*a[:3], *b[3:]]
    assert_as_without(model, [changed], user_cache=cache, user_ids=["a"])
    # another batch order, and other users around
    rows = computed_rows(monkeypatch)
    compute(model, [b, changed], POLICY, user_cache=cache, user_ids=["b", "a"])
    compute(model, [changed], POLICY, user_cache=cache, user_ids=["a"])
    assert rows[-1] == 1


def test_single_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32: no more than the difference between one pass and chunks of it."""
    model = pk.PatchedCausalLM(make_hf_model().float(), make_catalog(TITLES), LONG)
    exact = pk.PatchedCausalLM(make_hf_model(), make_catalog(TITLES), LONG)
    cache = UserCache(model, 1 << 20)
    (history,) = make_histories(TITLES, [70])
    compute(model, [history[:50]], POLICY, user_cache=cache)
    truth = logits(exact, [history])
    plain_error = (logits(model, [history]) - truth).abs().max()
    error = (logits(model, [history], user_cache=cache) - truth).abs().max()
    assert error <= 2 * plain_error + torch.finfo(torch.float32).eps * truth.abs().max()


@settings(max_examples=25)
@given(st.integers(0, 200), st.data())
def test_any_sequence_of_calls(capacity: int, data: st.DataObject) -> None:
    """Budgets so small that users push each other out, also within a batch; names that repeat."""
    model = make_model(TITLES)
    cache = UserCache(model, max(capacity * ROW_BYTES, 1))
    whole = make_histories(TITLES, [30, 14, 55, 2])
    for _ in range(data.draw(st.integers(1, 4))):
        users = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=4))
        histories = [whole[user][: data.draw(st.integers(0, 55))] for user in users]
        names = [data.draw(st.sampled_from([user, 0])) for user in users]
        assert_as_without(model, histories, user_cache=cache, user_ids=names)
        check_places(cache)


# ------------------------------------------------------------------ memory


def test_least_recently_used_users_make_room() -> None:
    model = make_model(TITLES)
    a, b, c = make_histories(TITLES, [20, 20, 20])
    rows = [pk.build_layout(model.catalog, [h], POLICY, model.prompt).num_rows for h in (a, b, c)]
    cache = UserCache(model, (sum(rows) - min(rows)) * ROW_BYTES)
    for name, history in (("a", a), ("b", b), ("a", a), ("c", c)):
        compute(model, [history], POLICY, user_cache=cache, user_ids=[name])
        check_places(cache)
    assert "a" in cache and "b" not in cache and "c" in cache and len(cache) == 2
    cache.clear()
    assert len(cache) == 0 and cache.num_bytes == 0 and "a" not in cache


@pytest.mark.parametrize("max_bytes", [1, 10 * ROW_BYTES])
def test_prompts_that_do_not_fit_are_not_kept(max_bytes: int) -> None:
    model = make_model(TITLES)
    cache = UserCache(model, max_bytes)
    for _ in range(2):
        assert_as_without(model, make_histories(TITLES, [20, 30]), user_cache=cache)
        assert len(cache) == 0
        check_places(cache)


def test_bytes_are_those_of_the_rows() -> None:
    model = make_model(TITLES)
    cache = UserCache(model, 1 << 20)
    _, layout = compute(model, make_histories(TITLES, [20, 30]), POLICY, user_cache=cache)
    assert cache.num_bytes == layout.num_rows * ROW_BYTES
    pool = [x for pair in cache._pool.values() for x in pair]
    assert sum(x.numel() * x.element_size() for x in pool) == cache.max_bytes // ROW_BYTES * ROW_BYTES


# ------------------------------------------------------------------ changes of the model


def in_place(model: pk.PatchedCausalLM) -> None:
    with torch.no_grad():
        model.hf_model.model.layers[0].self_attn.q_proj.weight[0, 0] += 1


def behind_autograds_back(model: pk.PatchedCausalLM) -> None:
    model.hf_model.model.layers[0].self_attn.q_proj.weight.data.mul_(1.01)


def another_tensor(model: pk.PatchedCausalLM) -> None:
    weight = model.hf_model.model.layers[1].mlp.up_proj.weight
    weight.data = weight.data.flip(0)


def another_dtype(model: pk.PatchedCausalLM) -> None:
    model.hf_model.float()


def loaded(model: pk.PatchedCausalLM) -> None:
    model.load_state_dict({name: value + 0.01 for name, value in model.state_dict().items()})


@pytest.mark.parametrize("change", [in_place, behind_autograds_back, another_tensor, another_dtype, loaded])
def test_a_changed_model_starts_anew(change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(TITLES)
    cache = UserCache(model, 1 << 20)
    histories = make_histories(TITLES, [20, 7])
    compute(model, histories, POLICY, user_cache=cache)
    change(model)
    rows = computed_rows(monkeypatch)
    got = logits(model, histories, user_cache=cache)
    assert sum(rows) > 20
    assert torch.equal(got, logits(model, histories))
    rows.clear()
    compute(model, histories, POLICY, user_cache=cache)
    assert sum(rows) == 2


def test_adapters_switched_off_start_anew() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(copy.deepcopy(HF_MODELS["llama"]), config).double().eval()
    model = pk.PatchedCausalLM(adapted, make_catalog(TITLES), LONG)
    cache = UserCache(model, 1 << 20)
    histories = make_histories(TITLES, [20, 7])
    with_adapter = logits(model, histories, user_cache=cache)
    with adapted.disable_adapter():
        assert_as_without(model, histories, user_cache=cache)
        assert not torch.equal(logits(model, histories), with_adapter)
    assert_as_without(model, histories, user_cache=cache)


@pytest.mark.parametrize("chunk_rows", [None, 5])
def test_an_embedding_that_does_more_than_its_weight(chunk_rows: int | None) -> None:
    """It is called on the tokens of a pass, which are not those of all titles."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["embed_tokens"], init_lora_weights=False)
    adapted = peft.get_peft_model(copy.deepcopy(HF_MODELS["llama"]), config).double().eval()
    model = pk.PatchedCausalLM(adapted, make_catalog(TITLES), LONG)
    cache = UserCache(model, 1 << 20)
    whole = make_histories(TITLES, [20, 7])
    for new in (9, 1, 0):
        histories = [history[: max(len(history) - new, 0)] for history in whole]
        for policy in (POLICY, POLICIES["items"], POLICIES["text"]):
            got = logits(model, histories, policy, user_cache=cache, chunk_rows=chunk_rows)
            torch.testing.assert_close(got, logits(model, histories, policy), rtol=0, atol=1e-10)


def test_a_failure_half_way_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(TITLES)
    cache = UserCache(model, 1 << 20)
    a, b = make_histories(TITLES, [40, 30])
    compute(model, [a[:20], b], POLICY, user_cache=cache)

    def fails(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(Prompts, "_prefill", fails)
        with pytest.raises(RuntimeError, match="out of memory"):
            compute(model, [a, b], POLICY, user_cache=cache)
    check_places(cache)
    assert_as_without(model, [a, b], user_cache=cache)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "index_copy_", fails)
        with pytest.raises(RuntimeError, match="out of memory"):
            compute(model, [b, a], POLICY, user_cache=cache)
    assert_as_without(model, [a, b], user_cache=cache)
    check_places(cache)


# ------------------------------------------------------------------ arguments


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": HF_MODELS["llama"]}, TypeError, "model: expected a PatchedCausalLM, got LlamaForCausalLM"),
        ({"max_bytes": 0}, ValueError, "max_bytes: expected an integer in 1.*, got 0"),
        ({"max_bytes": "1GiB"}, TypeError, "max_bytes: expected an integer, got str"),
    ],
)
def test_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        UserCache(**{"model": make_model(TITLES), "max_bytes": 1, **arguments})


@pytest.mark.parametrize(
    ("user_ids", "error", "message"),
    [
        (["a"], ValueError, r"user_ids: expected one per user \(2\), got 1"),
        ("ab", TypeError, "user_ids: expected one per user, got str"),
        (["a", []], TypeError, r"user_ids\[1\]: expected something hashable, got list"),
    ],
)
def test_user_ids(user_ids: Any, error: type[Exception], message: str) -> None:
    model = make_model(TITLES)
    cache = UserCache(model, 1 << 20)
    with pytest.raises(error, match=message):
        compute(model, [[0], [1]], POLICY, user_cache=cache, user_ids=user_ids)
    assert len(cache) == 0


def test_ids_may_be_an_array() -> None:
    model = make_model(TITLES)
    cache = UserCache(model, 1 << 20)
    compute(model, [[0], [1]], POLICY, user_cache=cache, user_ids=np.array([7, 9]))
    assert 7 in cache and 9 in cache


def test_another_models_cache_is_refused() -> None:
    cache = UserCache(make_model(TITLES), 1 << 20)
    with pytest.raises(ValueError, match="user_cache: expected one made for this model, got another model's"):
        compute(make_model(TITLES), [[0]], POLICY, user_cache=cache)
