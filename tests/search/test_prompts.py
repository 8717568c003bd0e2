# SPDX-License-Identifier: Apache-2.0
"""Prompts against plain transformers, one user at a time: in chunks or not, shared beginnings computed once or not."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from cases import POLICIES, make_catalog, make_histories, make_titles
from hypothesis import given, settings
from hypothesis import strategies as st
from prompt_cases import LONG, compute, computed_rows
from search_oracle import HF_MODELS, VOCABULARY, make_hf_model, make_model
from torch import Tensor
from transformers import Phi3Config, Phi3ForCausalLM

import patchkern as pk
from patchkern.search import prefill
from patchkern.search.prefill import plan_passes, plan_spans, shared_literals, with_beginnings
from patchkern.search.prefix_cache import PrefixCache

TITLES = make_titles(23)
HISTORIES = make_histories(TITLES, [9, 1, 40, 0, 17])


def plain_logits(
    model: pk.PatchedCausalLM, family: str, histories: Sequence[Any], policy: Any, tokens: Sequence[Sequence[int]]
) -> Tensor:
    """What follows each user's prompt and tokens: one ordinary forward pass per user."""
    plain = copy.deepcopy(HF_MODELS[family])
    plain.set_attn_implementation("sdpa")
    weight = plain.get_input_embeddings().weight.detach()
    rows = []
    for history, following in zip(histories, tokens, strict=True):
        prompt = pk.compress_batch(weight, model.catalog, [history], policy, model.prompt).inputs_embeds
        with torch.no_grad():
            rows.append(
                plain(inputs_embeds=torch.cat([prompt, weight[list(following)]])[None], use_cache=False).logits[0, -1]
            )
    return torch.stack(rows)


# ------------------------------------------------------------------ results


@pytest.mark.parametrize(
    ("chunk_rows", "prompt", "through_operator"),  # every two values of two of them meet
    [
        pytest.param(None, None, False, id="whole, short prompt"),
        pytest.param(None, LONG, True, id="whole, long prompt, operator"),
        pytest.param(7, None, False, id="chunks, short prompt"),
        pytest.param(7, LONG, True, id="chunks, long prompt, operator"),
        pytest.param(1, LONG, False, id="rows, long prompt"),
        pytest.param(1, None, True, id="rows, short prompt, operator"),
    ],
)
@pytest.mark.parametrize("family", HF_MODELS)
def test_logits_are_those_of_each_user_alone(
    family: str,
    chunk_rows: int | None,
    prompt: pk.Prompt | None,
    through_operator: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Prompts, two tokens after each, and a token of two hypotheses that share the token before."""
    if through_operator:  # as on devices other than the CPU
        monkeypatch.setattr(PrefixCache, "_has_flash", lambda *args: False)
    model = make_model(TITLES, family) if prompt is None else make_model(TITLES, family, prompt)
    policy = POLICIES["items"]
    computed, _ = compute(model, HISTORIES, policy, max_rows=30, chunk_rows=chunk_rows)
    assert_close(computed.logits, plain_logits(model, family, HISTORIES, policy, [[]] * 5))
    users = torch.arange(5)
    with model.searching():
        logits = computed.step(torch.full((5,), -1), users, users + 11)
        assert_close(logits, plain_logits(model, family, HISTORIES, policy, [[u + 11] for u in range(5)]))
        # users 1 and 3 have ended; 2 goes on twice
        parent = torch.tensor([0, 2, 2, 4])
        logits = computed.step(parent, parent, torch.tensor([21, 22, 23, 24]))
    chosen = [HISTORIES[u] for u in parent]
    following = [[u + 11, 21 + n] for n, u in enumerate(parent.tolist())]
    assert_close(logits, plain_logits(model, family, chosen, policy, following))


def assert_close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk_rows", [None, 16])
def test_narrow_dtypes_err_little_more_than_plain_ones(dtype: torch.dtype, chunk_rows: int | None) -> None:
    policy = POLICIES["items"]
    exact = plain_logits(make_model(TITLES), "llama", HISTORIES, policy, [[7]] * 5)
    narrow = make_hf_model().to(dtype)
    model = pk.PatchedCausalLM(narrow, make_catalog(TITLES), LONG)
    weight = narrow.get_input_embeddings().weight.detach()
    error, plain_error = 0.0, 0.0
    computed, _ = compute(model, HISTORIES, policy, max_rows=5, chunk_rows=chunk_rows)
    with model.searching():
        got = computed.step(torch.full((5,), -1), torch.arange(5), torch.full((5,), 7))
    exact = plain_logits(make_model(TITLES, prompt=LONG), "llama", HISTORIES, policy, [[7]] * 5)
    narrow.set_attn_implementation("sdpa")
    for user, history in enumerate(HISTORIES):
        prompt = pk.compress_batch(weight, model.catalog, [history], policy, LONG).inputs_embeds
        with torch.no_grad():
            plain = narrow(inputs_embeds=torch.cat([prompt, weight[[7]]])[None], use_cache=False).logits[0, -1]
        error = max(error, float((got[user] - exact[user]).abs().max()))
        plain_error = max(plain_error, float((plain - exact[user]).abs().max()))
    # two partial softmaxes, each rounded, instead of one
    assert error <= 2 * plain_error + torch.finfo(dtype).eps * float(exact.abs().max())


def test_under_autocast() -> None:
    policy = POLICIES["items"]
    model = pk.PatchedCausalLM(make_hf_model().float(), make_catalog(TITLES), LONG)
    with torch.autocast("cpu", torch.bfloat16):
        computed, _ = compute(model, HISTORIES, policy, max_rows=5, chunk_rows=30)
        with model.searching():
            logits = computed.step(torch.full((5,), -1), torch.arange(5), torch.full((5,), 7))
    assert {x.dtype for pair in computed._cache.layers.values() for x in pair} == {torch.bfloat16}
    exact = plain_logits(make_model(TITLES, prompt=LONG), "llama", HISTORIES, policy, [[7]] * 5)
    # eight significant bits through two layers
    assert float((logits - exact).abs().max()) < 0.1 * float(exact.abs().max())


# ------------------------------------------------------------------ what is computed and stored


@pytest.mark.parametrize("chunk_rows", [None, 9])
def test_prompts_are_stored_once_without_padding(chunk_rows: int | None) -> None:
    model = make_model(TITLES)
    computed, layout = compute(model, HISTORIES, POLICIES["items-all"], max_rows=100, chunk_rows=chunk_rows)
    before = {layer: [x.data_ptr() for x in pair] for layer, pair in computed._cache.layers.items()}
    with model.searching():
        computed.step(torch.full((100,), -1), torch.arange(5).repeat_interleave(20), torch.arange(100))
    stored = computed._cache.layers
    assert {layer: [tuple(x.shape) for x in pair] for layer, pair in stored.items()} == {
        layer: [(2, layout.num_rows, 8)] * 2 for layer in range(2)
    }
    assert {layer: [x.data_ptr() for x in pair] for layer, pair in stored.items()} == before


def test_chunks_bound_the_rows_of_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = computed_rows(monkeypatch)
    _, layout = compute(make_model(TITLES), HISTORIES, POLICIES["items"], chunk_rows=13)
    assert max(rows) == 13 and sum(rows) == layout.num_rows and len(rows) == -(-layout.num_rows // 13)


def test_what_all_users_share_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = computed_rows(monkeypatch)
    _, layout = compute(make_model(TITLES, prompt=LONG), HISTORIES, POLICIES["items"])
    assert rows == [layout.num_rows - 4 * 30]
    rows.clear()
    _, layout = compute(make_model(TITLES), HISTORIES, POLICIES["items"])
    assert rows == [layout.num_rows]  # two tokens are not worth an attention with prefixes


def test_shared_literals() -> None:
    def of(*users: list[int]) -> int:
        return shared_literals(np.array([t for user in users for t in user]), np.cumsum([0, *map(len, users)]))

    assert of([-5, -6, -7], [-5, -6, -8]) == 2
    assert of([-5, -6, -7], [-5, -6, -7]) == 2  # the last row is everybody's own
    assert of([-5, -6], [-5, -6, -7]) == 1
    assert of([-5, 3, -7], [-5, 3, -7]) == 1  # a patch of the same number is not the same patch
    assert of([3, -6, -7], [3, -6, -7]) == 0
    assert of([-5, -6, -7], [-4, -6, -7]) == 0
    assert of([-5, -6, -7]) == 0 and of([-5], [-5]) == 0 and of() == 0


@settings(max_examples=200)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.none() | st.integers(1, 12), st.data())
def test_passes_compute_every_row_when_what_it_sees_is_there(
    lengths: list[int], chunk_rows: int | None, data: st.DataObject
) -> None:
    cu_seqlens = np.cumsum([0, *lengths])
    stored = np.array([data.draw(st.integers(0, length)) for length in lengths])
    shared = data.draw(st.integers(0, min(lengths) - 1))
    there = np.zeros(cu_seqlens[-1], bool)
    for user, count in enumerate(stored):
        there[cu_seqlens[user] : cu_seqlens[user] + count] = True
    ended = []
    for spans in plan_passes(cu_seqlens, stored, shared, chunk_rows):
        assert 0 < spans.rows.size <= (chunk_rows or cu_seqlens[-1])
        owner = np.searchsorted(cu_seqlens, spans.rows, side="right") - 1
        there[spans.rows] = True
        place, copied = (
            rows - cu_seqlens[np.searchsorted(cu_seqlens, rows, side="right") - 1]
            for rows in (spans.copied_from, spans.copied_to)
        )
        assert there[spans.copied_from].all() and (place == copied).all() and (place < shared).all()
        there[spans.copied_to] = True
        for begin, end, (first, until) in zip(spans.cu_seqlens[:-1], spans.cu_seqlens[1:], spans.prefix, strict=True):
            assert begin < end and len(set(owner[begin:end])) == 1
            assert (np.diff(spans.rows[begin:end]) == 1).all()
            assert first == cu_seqlens[owner[begin]] and until == spans.rows[begin]
            assert there[first:until].all()
        assert spans.max_seqlen == np.diff(spans.cu_seqlens).max()
        assert spans.max_prefix == np.diff(spans.prefix).max()
        assert (spans.rows[spans.last] == cu_seqlens[spans.users + 1] - 1).all()
        ended += spans.users.tolist()
    assert there.all() and sorted(ended) == list(range(len(lengths)))


@settings(max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=1, max_size=6),
       st.integers(0, 3), st.none() | st.integers(1, 9), st.data())  # fmt: skip
def test_spans_are_computed_when_what_they_see_is_there(
    sizes: list[tuple[int, bool]], shared: int, chunk_rows: int | None, data: st.DataObject
) -> None:
    """Users of a beginning and two spans, of which each sees the beginning and another that is computed before."""
    cu_seqlens = np.cumsum([0, *(rows for size, _ in sizes for rows in (shared, size, size))])
    n_spans = cu_seqlens.size - 1
    order = np.array([span for span in data.draw(st.permutations(range(n_spans))) if span % 3], np.int64)
    ranges = np.zeros((n_spans, 2, 2), np.int64)
    begins = cu_seqlens[:-1:3][: len(sizes)]
    for nth, span in enumerate(order):
        if sizes[span // 3][1]:
            ranges[span, 0] = begins[span // 3] + np.array([0, shared])
        if nth and data.draw(st.booleans()):
            other = data.draw(st.sampled_from(order[:nth].tolist()))
            ranges[span, 1] = cu_seqlens[[other, other + 1]]
    there = np.zeros(cu_seqlens[-1], bool)
    seen: dict[int, set[int]] = {}
    passes = with_beginnings(plan_spans(cu_seqlens, ranges, order, chunk_rows), begins, shared, chunk_rows)
    for spans in passes:
        assert 0 < spans.rows.size <= (chunk_rows or cu_seqlens[-1])
        assert not there[spans.rows].any()
        there[spans.rows] = True
        there[spans.copied_to] = True
        prefixes = spans.prefix.reshape(len(spans.prefix), -1, 2)
        for begin, end, prefix in zip(spans.cu_seqlens[:-1], spans.cu_seqlens[1:], prefixes, strict=True):
            rows = [row for low, high in prefix for row in range(low, high)]
            assert there[rows].all() and len(set(rows)) == len(rows)
            for place, row in enumerate(spans.rows[begin:end].tolist()):
                seen[row] = {*rows, *spans.rows[begin : begin + place].tolist()}
    assert there.all()
    for span in order:
        for row in range(*cu_seqlens[[span, span + 1]]):
            expected = {other for low, high in ranges[span] for other in range(low, high)}
            assert seen[row] == expected | set(range(cu_seqlens[span], row))


def test_leader_has_the_most_and_the_others_start_behind() -> None:
    cu_seqlens = np.array([0, 10, 20, 30])
    (spans,) = plan_passes(cu_seqlens, np.array([0, 3, 8]), 6)
    assert spans.rows.tolist() == [*range(13, 20), *range(6, 10), *range(28, 30)]
    assert spans.copied_from.tolist() == list(range(10, 16)) and spans.copied_to.tolist() == [list(range(6))]


def test_no_sharing_where_it_saves_little(monkeypatch: pytest.MonkeyPatch) -> None:
    cu_seqlens = np.array([0, 100, 200])
    (spans,) = plan_passes(cu_seqlens, np.zeros(2, np.int64), 20)
    assert spans.rows.size == 200 and spans.copied_to.size == 0
    monkeypatch.setattr(prefill, "_WORTH_SHARING", 0.1)
    (spans,) = plan_passes(cu_seqlens, np.zeros(2, np.int64), 20)
    assert spans.rows.size == 180 and spans.copied_to.size == 20


# ------------------------------------------------------------------ guards


def test_every_layer_must_come_by(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(TITLES)
    monkeypatch.setattr(model.config, "num_hidden_layers", 3)
    with pytest.raises(ValueError, match=r"model: search needs span attention in all 3 layers of .* in 2"):
        compute(model, HISTORIES, POLICIES["items"])


def test_positions_that_depend_on_the_longest_user_are_refused() -> None:
    """longrope rotates all rows of a batch another way once one of them is beyond the original length."""
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 64}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    config = Phi3Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=512, original_max_position_embeddings=64, pad_token_id=0,
        rope_parameters=rope,
    )  # fmt: skip
    model = pk.PatchedCausalLM(Phi3ForCausalLM(config).eval(), make_catalog(TITLES), LONG)
    short, long = (pk.build_layout(model.catalog, [[0] * n], pk.ItemPatches(0), LONG) for n in (10, 40))
    model.check_search(short, 5)
    with pytest.raises(ValueError, match=r"model: search needs positions that .*, got .* rows and longrope beyond 64"):
        model.check_search(long, 5)
