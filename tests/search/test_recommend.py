# SPDX-License-Identifier: Apache-2.0
"""Searches against forced decoding: every title through plain transformers, without cache or our attention."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from cases import POLICIES, make_catalog, make_histories, make_titles
from hypothesis import given, settings
from hypothesis import strategies as st
from search_oracle import (
    HF_MODELS,
    PROMPT,
    VOCABULARY,
    assert_ranked,
    diverse_by_definition,
    forced_scores,
    make_model,
    narrow_beam,
)
from transformers import Qwen3Config, Qwen3ForCausalLM

import patchkern as pk
from patchkern.evaluation.metrics import evaluate
from patchkern.search.recommend import generate_titles, recommend

# ------------------------------------------------------------------ beam search


@pytest.mark.parametrize("policy", ["text", "items", "sessions-end", "sessions-start-cut"])
@pytest.mark.parametrize("family", HF_MODELS)
def test_scores_are_those_of_forced_decoding(family: str, policy: str) -> None:
    titles = make_titles(17, ids="str")
    model = make_model(titles, family)
    histories = make_histories(titles, [12, 1, 0, 5])
    got = model.recommend(histories, POLICIES[policy], k=17, num_beams=17)
    for row, table in zip(got, forced_scores(model, family, histories, POLICIES[policy], titles), strict=True):
        assert_ranked(row, table, titles, 17)


tries = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4), min_size=1, max_size=12)


@settings(max_examples=40)
@given(tries, st.lists(st.integers(95, 97), max_size=2), st.sampled_from(["llama", "gpt2"]), st.booleans(), st.data())
def test_wide_beam_is_exhaustive(
    sequences: list[list[int]], end: list[int], family: str, exclude_seen: bool, data: st.DataObject
) -> None:
    """Titles that begin others or are shared; with and without a response end."""
    titles = dict(enumerate(sequences))
    model = make_model(titles, family, pk.Prompt(prefix=[90], separator=[92], suffix=[93], response_end=end))
    histories = data.draw(st.lists(st.lists(st.sampled_from(sorted(titles)), max_size=4), min_size=1, max_size=3))
    unseen = min(len(set(titles) - set(history)) for history in histories)
    k = data.draw(st.integers(1, max(unseen, 1))) if exclude_seen else data.draw(st.integers(1, len(titles)))
    policy = POLICIES["items"]
    if exclude_seen and unseen < k:
        with pytest.raises(ValueError, match="k: expected at most 0"):
            model.recommend(histories, policy, k, len(titles), exclude_seen=True)
        return
    got = model.recommend(histories, policy, k, max(len(titles), k), exclude_seen=exclude_seen)
    tables = forced_scores(model, family, histories, policy, titles)
    for row, table, history in zip(got, tables, histories, strict=True):
        assert_ranked(row, table, titles, k, history if exclude_seen else ())


@settings(max_examples=25)
@given(tries, st.integers(1, 4), st.data())
def test_narrow_beam_is_its_definition(sequences: list[list[int]], num_beams: int, data: st.DataObject) -> None:
    titles = dict(enumerate(dict.fromkeys(map(tuple, sequences))))
    model = make_model({item: list(title) for item, title in titles.items()})
    k = data.draw(st.integers(1, min(num_beams, len(titles))))
    histories = [[0], [0] * 5]
    got = model.recommend(histories, POLICIES["text"], k, num_beams)
    for row, history in zip(got, histories, strict=True):
        expected = narrow_beam(model, titles, history, POLICIES["text"], k, num_beams)
        assert [(*titles[item], 96) for item, _ in row] == list(expected)
        np.testing.assert_allclose([score for _, score in row], list(expected.values()), rtol=0, atol=1e-9)


def test_never_fewer_than_k() -> None:
    titles = make_titles(23)
    model = make_model(titles)
    histories = make_histories(titles, [9, 3])
    for k in (1, 2, 5, 20):
        assert [len(row) for row in model.recommend(histories, POLICIES["text"], k, num_beams=k)] == [k, k]


def test_single_precision_is_close() -> None:
    titles = make_titles(17)
    model = make_model(titles)
    histories = make_histories(titles, [12, 4])
    exact = model.recommend(histories, POLICIES["items"], k=17, num_beams=17)
    model.hf_model.float()
    for row, truth in zip(model.recommend(histories, POLICIES["items"], k=17, num_beams=17), exact, strict=True):
        assert dict(row).keys() == dict(truth).keys()
        for item, score in row:
            assert abs(score - dict(truth)[item]) < 1e-4


def test_half_precision_runs() -> None:
    titles = make_titles(9)
    model = make_model(titles)
    model.hf_model.bfloat16()
    rows = model.recommend(make_histories(titles, [3, 8]), POLICIES["items"], k=5, num_beams=5)
    assert [len(row) for row in rows] == [5, 5] and all(np.isfinite(score) for row in rows for _, score in row)


def test_equal_scores_are_in_catalogue_order() -> None:
    titles = {"c": [7], "a": [5], "b": [6], "a again": [5], "d": [8]}
    model = make_model(titles)
    head = model.hf_model.lm_head.weight
    with torch.no_grad():
        head[[5, 6, 7, 8]] = head[5].clone()
        model.get_input_embeddings().weight[[5, 6, 7, 8]] = model.get_input_embeddings().weight[5].clone()
    row = model.recommend([[]], POLICIES["text"], k=5, num_beams=5)[0]
    assert [item for item, _ in row] == ["c", "a", "a again", "b", "d"]
    assert len({score for _, score in row}) == 1
    assert [item for item, _ in model.recommend([[]], POLICIES["text"], k=2, num_beams=2)[0]] == ["c", "a"]


def test_shared_titles_with_one_seen() -> None:
    titles = {0: [5], 1: [6, 7], 2: [5], 3: [8]}
    model = make_model(titles)
    row = model.recommend([[0]], POLICIES["text"], k=3, num_beams=3, exclude_seen=True)[0]
    assert {item for item, _ in row} == {1, 2, 3}


def test_exclude_seen_looks_behind_the_cut() -> None:
    titles = make_titles(12)
    model = make_model(titles)
    row = model.recommend([list(range(10))], pk.TextOnly(max_items=2), k=2, num_beams=12, exclude_seen=True)[0]
    assert {item for item, _ in row} == {10, 11}


@pytest.mark.parametrize("search", ["beam", "diverse"])
def test_users_do_not_depend_on_their_batch(search: str) -> None:
    titles = make_titles(23)
    model = make_model(titles)
    histories = make_histories(titles, [3, 40, 0, 17, 3, 8, 25])
    together = model.recommend(histories, POLICIES["items"], 6, 6, search)
    for batch_size in (1, 2, 3):
        in_batches = recommend(model, histories, POLICIES["items"], 6, 6, search, batch_size=batch_size)
        for row, other in zip(together, in_batches, strict=True):
            assert [item for item, _ in row] == [item for item, _ in other]
            np.testing.assert_allclose([s for _, s in row], [s for _, s in other], rtol=0, atol=1e-9)


def test_no_users() -> None:
    model = make_model(make_titles(5))
    assert model.recommend([], POLICIES["text"], k=2, num_beams=2) == []
    assert generate_titles(model, [], POLICIES["text"], num_beams=2) == []
    for mask in (np.ones((0, 5), bool), np.ones(5, bool)):
        assert model.recommend([], POLICIES["text"], k=2, allowed_items=mask, exclude_seen=True) == []


def test_one_item_catalogue() -> None:
    model = make_model({"only": [3, 4]})
    for search in ("beam", "diverse"):
        assert [
            [item for item, _ in row] for row in model.recommend([["only"], []], POLICIES["text"], 1, 1, search)
        ] == [
            ["only"],
            ["only"],
        ]


# ------------------------------------------------------------------ diverse search


@settings(max_examples=25)
@given(tries, st.lists(st.integers(95, 97), max_size=2), st.booleans(), st.booleans(), st.data())
def test_diverse_search_is_its_definition(
    sequences: list[list[int]], end: list[int], leaves_only: bool, exclude_seen: bool, data: st.DataObject
) -> None:
    titles = dict(enumerate(sequences))
    model = make_model(titles, prompt=pk.Prompt(prefix=[90], separator=[92], suffix=[93], response_end=end))
    groups = data.draw(st.integers(1, 6))
    histories = [[0], [len(titles) - 1] * 4]
    policy = POLICIES["text"]
    first = {(*title, *end): item for item, title in reversed(titles.items())}
    generated = generate_titles(model, histories, policy, groups, leaves_only)
    for row, history in zip(generated, histories, strict=True):
        leaves = {
            item
            for item, title in titles.items()
            if not leaves_only or not any(o[: len(title)] == title and o != title for o in sequences)
        }
        expected = diverse_by_definition(model, titles, history, policy, groups, leaves)
        assert [item for item, _ in row] == [first[path] for path, _ in expected]
        np.testing.assert_allclose([s for _, s in row], [s for _, s in expected], rtol=0, atol=1e-9)
    k = min(groups, len(titles) - exclude_seen)
    if k == 0:
        return
    rows = recommend(model, histories, policy, k, groups, "diverse", exclude_seen)
    for row, history in zip(rows, histories, strict=True):
        allowed = set(titles) - set(history) if exclude_seen else set(titles)
        expected = diverse_by_definition(model, titles, history, policy, groups, allowed)
        items = [i for path, _ in dict(expected).items() for i in titles if i in allowed and (*titles[i], *end) == path]
        assert [item for item, _ in row] == items[:k]


def test_diverse_groups_differ() -> None:
    titles = {number: [number, number + 1] for number in range(40)}
    model = make_model(titles)
    rows = generate_titles(model, [[1, 2, 3]], POLICIES["text"], num_beams=20)
    assert len(rows[0]) == 20
    assert len({item for item, _ in rows[0]}) > 5


def test_generated_titles_feed_the_paper_metric() -> None:
    titles = {"Alien": [65, 66], "Aliens": [65, 66, 67], "Heat": [72]}
    catalog = pk.Catalog.from_titles({name: name for name in titles}, lambda name: titles[name])
    model = pk.PatchedCausalLM(copy.deepcopy(HF_MODELS["llama"]), catalog, PROMPT)
    rows = generate_titles(model, [["Heat"]], POLICIES["text"], num_beams=3)
    assert "Alien" not in {item for item, _ in rows[0]}  # the authors' tree cannot stop there
    assert evaluate(rows, ["Alien"], ks=[3], metric="paper", catalog=catalog).hr(3) == 1.0
    assert evaluate(rows, ["Alien"], ks=[3], catalog=catalog).hr(3) == 0.0


# ------------------------------------------------------------------ memory, state, seams


@pytest.mark.parametrize("fails", [False, True])
def test_model_is_left_as_it_was(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    titles = make_titles(9)
    catalog = make_catalog(titles)
    model = pk.PatchedCausalLM(copy.deepcopy(HF_MODELS["llama"]), catalog, PROMPT, attn_implementation="sdpa")
    other = make_model(titles)
    model.train()
    model.hf_model.model.layers[0].eval()
    states = [module.training for module in model.modules()]
    histories = make_histories(titles, [5, 2])
    if fails:
        with torch.no_grad():
            model.hf_model.lm_head.weight.fill_(float("nan"))
        with pytest.raises(ValueError, match="model: expected finite logits, got NaN or infinity"):
            model.recommend(histories, POLICIES["text"], 3, 3)
    else:
        assert model.recommend(histories, POLICIES["text"], 3, 3) == other.recommend(histories, POLICIES["text"], 3, 3)
    assert [module.training for module in model.modules()] == states
    assert model.config._attn_implementation == "sdpa" and torch.is_grad_enabled()


def test_adapters_take_part() -> None:
    """LoRA on the attention and on the embedding, both away from zero: prompt rows and hypotheses go through it."""
    peft = pytest.importorskip("peft")
    titles = make_titles(9)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"], init_lora_weights=False)
    adapted = peft.get_peft_model(copy.deepcopy(HF_MODELS["llama"]), config).double().eval()
    plain = copy.deepcopy(adapted)
    model = pk.PatchedCausalLM(adapted, make_catalog(titles), PROMPT)
    history = list(titles)[:4]
    got = dict(model.recommend([history], POLICIES["text"], 9, 9)[0])
    tokens = [*PROMPT.prefix]
    for number, item in enumerate(history):
        tokens += [*(PROMPT.separator if number else ()), *titles[item]]
    tokens += PROMPT.suffix
    for item, title in titles.items():
        response = torch.tensor([*title, *PROMPT.response_end])
        with torch.no_grad():
            logits = plain(torch.cat([torch.tensor(tokens), response])[None], use_cache=False).logits[0]
        expected = logits[len(tokens) - 1 : -1].log_softmax(-1).gather(1, response[:, None]).sum()
        assert abs(got[item] - float(expected)) < 1e-9


def test_policy_of_the_model_is_used() -> None:
    titles = make_titles(9)
    histories = make_histories(titles, [12])
    policy = POLICIES["sessions-end"]
    own = pk.PatchedCausalLM(copy.deepcopy(HF_MODELS["llama"]), make_catalog(titles), PROMPT, policy)
    assert own.recommend(histories, k=3, num_beams=3) == make_model(titles).recommend(histories, policy, 3, 3)


def test_positions_run_out() -> None:
    titles = make_titles(9)
    model = make_model(titles, "gpt2")
    with pytest.raises(
        ValueError, match="histories: expected at most 256 rows per user and title, the positions of gpt2"
    ):
        model.recommend([list(titles)[:5] * 20], pk.TextOnly(max_items=None), 2, 2)


def test_sliding_windows_are_refused_where_they_matter() -> None:
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, use_sliding_window=True, sliding_window=30, max_window_layers=1,
    )  # fmt: skip
    titles = make_titles(9)
    model = pk.PatchedCausalLM(Qwen3ForCausalLM(config).double(), make_catalog(titles), PROMPT)
    assert len(model.recommend([[0]], POLICIES["text"], 2, 2)[0]) == 2
    with pytest.raises(ValueError, match=r"model: search needs full attention, got .* and a sliding window of 30"):
        model.recommend([list(titles)], POLICIES["text"], 2, 2)


def test_a_layer_that_attends_twice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The keys and values of one of the two would be taken for both's."""
    model = make_model(make_titles(9))
    layer = model.hf_model.model.layers[1].self_attn
    attend = layer.forward
    monkeypatch.setattr(layer, "forward", lambda *args, **kwargs: (attend(*args, **kwargs), attend(*args, **kwargs))[1])
    for search in ("beam", "exact"):
        with pytest.raises(ValueError, match=r"model: search needs one attention in .*, got a second one in layer 1"):
            model.recommend([[0]], POLICIES["text"], 2, 2, search)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"k": 0}, ValueError, "k: expected at least 1, got 0"),
        ({"k": 2.0}, TypeError, r"k: expected an integer, got 2\.0"),
        ({"k": 10, "num_beams": 10}, ValueError, "k: expected at most 9, the items of the catalog, got 10"),
        ({"num_beams": 2, "search": "exact"}, ValueError, "num_beams: expected at least k=3, to find .*, got 2"),
        ({"num_beams": 2, "search": "diverse"}, ValueError, "num_beams: expected at least k=3, to find .*, got 2"),
        ({"num_beams": 2**70}, ValueError, "num_beams: expected at least 1 and below .*, got 1180591620717411303424"),
        ({"num_beams": 2**60, "search": "exact"}, ValueError, "num_beams: expected at least 1 and below"),
        ({"max_expansions": 2**63, "search": "exact"}, ValueError, "max_expansions: expected at least 1 and below"),
        ({"length_penalty": 500}, ValueError, "length_penalty: expected one with which .*float64.*, got 500"),
        ({"length_penalty": -1e9}, ValueError, "length_penalty: expected one with which .*, got -1000000000.0"),
        ({"normalize": np.zeros(2), "search": "exact"}, ValueError, "normalize: expected one of titles, items or None"),
        ({"short": np.array(["allow"] * 2)}, ValueError, "short: expected one of error, allow, got array"),
        ({"prior": torch.zeros(9).to_sparse()}, TypeError, "prior: expected a dense tensor, got torch.sparse_coo"),
        ({"search": "greedy"}, ValueError, "search: expected one of beam, exact, diverse, items, got 'greedy'"),
        ({"exclude_seen": 1}, TypeError, "exclude_seen: expected a bool, got 1"),
        ({"memory_budget": 0}, ValueError, "memory_budget: expected at least 1, got 0"),
        ({"memory_budget": "40 G"}, ValueError, "memory_budget: expected bytes, such as .*\"40GiB\".*, got '40 G'"),
        ({"memory_budget": 1e9}, TypeError, "memory_budget: expected an integer or a text, got float"),
        ({"batch_size": 0}, ValueError, "batch_size: expected at least 1, got 0"),
        ({"policy": "text"}, TypeError, "policy: expected a policy with max_items and levels, got str"),
        ({"policy": None}, ValueError, "policy: expected one"),
        ({"histories": [[0], [77]]}, ValueError, "histories: .* got 77 at position 0 of user 1;"),
        ({"histories": [[0], [77]], "exclude_seen": True}, ValueError, "histories: .*77"),
        (
            {"histories": [[0], list(range(8))], "exclude_seen": True},
            ValueError,
            r"k: expected at most 1, the items of the catalog \(9\) that user 1 has not seen, got 3",
        ),
    ],
)
def test_errors_name_the_argument(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    model = make_model(make_titles(9))
    given = {"histories": [[0]], "policy": POLICIES["text"], "k": 3, "num_beams": 3, **arguments}
    with pytest.raises(error, match=message):
        model.recommend(**given)


def test_a_user_without_rows() -> None:
    model = make_model(make_titles(4), prompt=pk.Prompt(prefix=[], separator=[], suffix=[], response_end=[96]))
    for histories in ([[0], []], [[]], [[], []]):
        for search in ("beam", "exact", "diverse"):
            with pytest.raises(ValueError, match="histories: expected at least one row per user to predict from"):
                model.recommend(histories, POLICIES["text"], 1, 1, search=search)
        with pytest.raises(ValueError, match="histories: expected at least one row per user to predict from"):
            model.score_items(histories, POLICIES["text"])
    assert model.recommend([], POLICIES["text"], 1, 1) == []


def test_more_recommendations_than_items() -> None:
    model = make_model(make_titles(3))
    with pytest.raises(ValueError, match=r"k: expected at most 3, the items of the catalog, got 4"):
        model.recommend([[0]], POLICIES["text"], k=4, num_beams=4)
    for k, error in ((0, ValueError), (-1, ValueError), (2.0, TypeError), (True, TypeError), ("2", TypeError)):
        with pytest.raises(error, match=r"k: expected"):
            model.recommend([[0]], POLICIES["text"], k=k)
