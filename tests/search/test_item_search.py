# SPDX-License-Identifier: Apache-2.0
"""search="items" is score_items(head="items"), sorted: filters, priors, normalisation, caches, budgets, files."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import cases
import memory_cases
import numpy as np
import prior_cases
import pytest
import search_oracle
import torch
from prompt_cases import computed_rows

import patchkern as pk
from patchkern.budget.live_bytes import peak_memory
from patchkern.evaluation.metrics import evaluate
from patchkern.search.results import read_recommendations, recommend_to_disk
from patchkern.search.summary import PartialListsWarning
from patchkern.search.user_cache import UserCache

TITLES = cases.make_titles(30)
WEIGHTS = (0.0, 0.1, 0.3, 0.7, 1.5, 2.0)
HISTORIES = cases.make_histories(TITLES, [9, 1, 30, 0, 14])
POLICY = pk.ItemPatches(2, None)


def make_model(titles: Any = TITLES, dtype: torch.dtype = torch.float64, tell_apart: bool = True) -> pk.PatchedCausalLM:
    """With random vectors, biases and map; without ``tell_apart`` items of one title have equal scores."""
    model = pk.PatchedCausalLM(
        search_oracle.make_hf_model(dtype=dtype), cases.make_catalog(titles), search_oracle.PROMPT, POLICY,
        item_embeddings=tell_apart, item_head=True,
    )  # fmt: skip
    with torch.no_grad():
        model.item_head.transform.weight.add_(torch.randn(32, 32), alpha=0.1)
        if tell_apart:
            model.item_embedding.normal_(std=0.3)
            model.item_head.bias.normal_()
    return model


def ranked(scores: np.ndarray, k: int, is_allowed: Any = None) -> list[list[tuple[Any, float]]]:
    """Sorted by definition: the best first, equal ones in catalogue order, -inf not at all."""
    names = list(TITLES)
    lists = []
    for user, row in enumerate(scores):
        places = [
            place
            for place in range(len(row))
            if row[place] > -math.inf and (is_allowed is None or is_allowed(user, names[place]))
        ]
        places.sort(key=lambda place: (-row[place], place))
        lists.append([(names[place], float(row[place])) for place in places[:k]])
    return lists


def assert_lists(got: Any, expected: Any, atol: float = 1e-9) -> None:
    assert [[item for item, _ in user] for user in got] == [[item for item, _ in user] for user in expected]
    for one, two in zip(got, expected, strict=True):
        np.testing.assert_allclose([score for _, score in one], [score for _, score in two], rtol=0, atol=atol)


def scores_of(model: pk.PatchedCausalLM, histories: Any = HISTORIES, **options: Any) -> np.ndarray:
    return model.score_items(histories, POLICY, head="items", **options)


# ------------------------------------------------------------------ lists


@pytest.mark.parametrize("k", [1, 7, 30])
@pytest.mark.parametrize("batch_size", [2, 64])
def test_lists_are_the_sorted_scores(k: int, batch_size: int) -> None:
    model = make_model()
    got = model.recommend(HISTORIES, k=k, search="items", batch_size=batch_size)
    assert_lists(got, ranked(scores_of(model), k))
    scores = scores_of(model, batch_size=batch_size)
    np.testing.assert_allclose(np.exp(scores).sum(axis=1), 1.0, rtol=0, atol=1e-12)


@pytest.mark.parametrize("k", [1, 2, 5, 11, 29])
def test_equal_scores_are_in_catalogue_order(k: int) -> None:
    """More items have one title than are looked at beyond the k-th, and two more share another."""
    titles = {item: [7, 7, 8] if item % 4 else [5, item % 8] for item in range(60)}
    model = make_model(titles, tell_apart=False)
    (user,) = model.recommend([[3, 8]], k=k, search="items")
    scores = scores_of(model, [[3, 8]])[0]
    assert len(set(scores.tolist())) == 3
    assert [item for item, _ in user] == sorted(titles, key=lambda item: (-scores[item], item))[:k]


def test_the_order_of_beams_does_not_matter() -> None:
    model = make_model()
    assert model.recommend(HISTORIES, k=5, search="items", num_beams=1) == model.recommend(
        HISTORIES, k=5, search="items"
    )


def test_float32_scores_are_float32() -> None:
    model, exact = make_model(dtype=torch.float32), make_model()
    exact.load_state_dict(model.state_dict())
    scores = scores_of(model)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, scores_of(exact), rtol=0, atol=2e-3)


def test_some_columns() -> None:
    model = make_model()
    every = scores_of(model)
    np.testing.assert_allclose(scores_of(model, items=[7, 0, 7]), every[:, [7, 0, 7]], rtol=0, atol=1e-12)
    assert scores_of(model, items=[]).shape == (5, 0) and scores_of(model, []).shape == (0, 30)
    assert model.recommend([], k=3, search="items") == []


def test_titles_are_found_as_without_a_head() -> None:
    model = make_model()
    plain = pk.PatchedCausalLM(model.hf_model, model.catalog, model.prompt, item_embeddings=True)
    plain.item_embedding = model.item_embedding
    assert model.recommend(HISTORIES, k=5) == plain.recommend(HISTORIES, POLICY, k=5)


# ------------------------------------------------------------------ filters and priors


def test_seen_items_are_left_out() -> None:
    model = make_model()
    got = model.recommend(HISTORIES, pk.ItemPatches(1, 4), k=5, search="items", exclude_seen=True)
    scores = model.score_items(HISTORIES, pk.ItemPatches(1, 4), head="items")
    assert_lists(got, ranked(scores, 5, lambda user, item: item not in HISTORIES[user]))


@pytest.mark.parametrize(
    "allowed",
    [
        range(2, 20),
        [[5 + user, 3, 4, 12, 20 + user] for user in range(5)],
        np.arange(150).reshape(5, 30) % 3 > 0,
        torch.arange(30) % 2 == 0,
    ],
    ids=["for all", "per user", "booleans", "tensor"],
)
def test_allowed_items(allowed: Any) -> None:
    model = make_model()

    def is_allowed(user: int, item: int) -> bool:
        if isinstance(allowed, range):
            return item in allowed
        if isinstance(allowed, list):
            return item in allowed[user]
        return bool(allowed[user, item] if allowed.ndim == 2 else allowed[item])

    got = model.recommend(HISTORIES, k=5, search="items", allowed_items=allowed)
    assert_lists(got, ranked(scores_of(model), 5, is_allowed))


@pytest.mark.parametrize("called", [False, True])
def test_priors_are_added(called: bool) -> None:
    model = make_model()
    table = prior_cases.random_prior(5, 30)
    table[1, 4] = table[0, :3] = -math.inf
    prior = prior_cases.Lookup(HISTORIES, table) if called else table
    options = {"exclude_seen": True, "allowed_items": range(28)}
    got = model.recommend(HISTORIES, k=4, search="items", prior=prior, prior_weight=0.7, **options)
    expected = scores_of(model) + np.where(table == -math.inf, -math.inf, 0.7 * table)
    assert_lists(got, ranked(expected, 4, lambda user, item: item < 28 and item not in HISTORIES[user]))


@pytest.mark.parametrize("with_prior", [False, True])
def test_normalised_over_the_allowed_items(with_prior: bool) -> None:
    model = make_model()
    prior = {"prior": prior_cases.random_prior(5, 30)} if with_prior else {}
    got = model.recommend(HISTORIES, k=6, search="items", normalize="items", allowed_items=range(6), **prior)
    for user in got:
        assert math.fsum(math.exp(score) for _, score in user) == pytest.approx(1.0, abs=1e-9)
    plain = model.recommend(HISTORIES, k=6, search="items", allowed_items=range(6), **prior)
    for one, two in zip(got, plain, strict=True):
        assert [item for item, _ in one] == [item for item, _ in two]
        shift = one[0][1] - two[0][1]
        np.testing.assert_allclose([s for _, s in one], [s + shift for _, s in two], rtol=0, atol=1e-9)


def test_short_lists() -> None:
    model = make_model()
    allowed = [[0, 1, 2], [5], [], [7, 8], [9]]
    with pytest.raises(ValueError, match=r"k: expected at most 1, the allowed_items of user 1, got 3"):
        model.recommend(HISTORIES, k=3, search="items", allowed_items=allowed)
    with pytest.warns(PartialListsWarning) as caught:
        got = model.recommend(HISTORIES, k=3, search="items", allowed_items=allowed, short="allow")
    assert_lists(got, ranked(scores_of(model), 3, lambda user, item: item in allowed[user]))
    assert [len(user) for user in got] == [3, 1, 0, 2, 1]
    assert caught[0].message.summary.short_lists == 4


def test_unknown_items_are_dropped() -> None:
    model = make_model()
    strange = [[*history, 999] for history in HISTORIES]
    with pytest.warns(PartialListsWarning):
        got = model.recommend(strange, k=3, search="items", unknown="drop")
    assert_lists(got, model.recommend(HISTORIES, k=3, search="items"))
    with pytest.warns(PartialListsWarning):
        np.testing.assert_allclose(scores_of(model, strange, unknown="drop"), scores_of(model), rtol=0, atol=1e-10)


# ------------------------------------------------------------------ caches, budgets, files


def test_user_caches_are_shared_with_other_searches(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    cache = UserCache(model, 1 << 20)
    policy = pk.SessionPatches(3, None, align="start")
    first = [history[:-2] for history in HISTORIES]
    for histories in (first, HISTORIES, HISTORIES):
        rows = computed_rows(monkeypatch)
        got = model.recommend(histories, policy, k=5, search="items", user_cache=cache)
        cached = sum(rows)
        assert_lists(got, model.recommend(histories, policy, k=5, search="items"))
    assert cached == len(HISTORIES)  # the last rows again, for their states
    beams = model.recommend(HISTORIES, policy, k=5, user_cache=cache)
    assert_lists(beams, model.recommend(HISTORIES, policy, k=5))
    assert_lists(model.recommend(HISTORIES, policy, k=5, search="items", user_cache=cache), got)
    # what decides the scores alone changes no prompt
    with torch.no_grad():
        model.item_head.bias.normal_()
    changed = model.recommend(HISTORIES, policy, k=5, search="items", user_cache=cache)
    assert_lists(changed, model.recommend(HISTORIES, policy, k=5, search="items"))


def test_memory_budgets_are_kept() -> None:
    plain = memory_cases.make_model(n_items=60)
    model = pk.PatchedCausalLM(plain.hf_model, plain.catalog, plain.prompt, item_embeddings=True, item_head=True)
    with torch.no_grad():
        model.item_embedding.normal_(), model.item_head.bias.normal_()
    histories = memory_cases.users(*range(0, 400, 20))
    policy = pk.ItemPatches(5, None)
    expected = model.recommend(histories, policy, k=4, search="items")
    weights = sum(parameter.nbytes for parameter in model.parameters())
    budget = weights + (12 << 20)
    with peak_memory("cpu") as peak:
        got = model.recommend(histories, policy, k=4, search="items", memory_budget=budget)
    assert weights + peak.bytes <= budget
    assert_lists(got, expected, atol=1e-4)
    with pytest.raises(ValueError, match="memory_budget"):
        model.recommend(histories, policy, k=4, search="items", memory_budget=weights + 1000)


def test_parts_on_disk(tmp_path: Path) -> None:
    model = make_model()
    histories = pk.Histories.from_sequences(HISTORIES)
    options = {"k": 4, "search": "items", "exclude_seen": True}
    folder = recommend_to_disk(model, histories, tmp_path / "run", users_per_part=2, **options)
    users, lists = read_recommendations(folder)
    assert users.tolist() == list(range(5))
    assert_lists(lists, model.recommend(histories, **options), atol=1e-5)


# ------------------------------------------------------------------ weights of priors, the head as a prior


@pytest.mark.parametrize("planted", [0.0, 0.3, 1.5])
def test_a_planted_weight_is_recovered(planted: float) -> None:
    titles = cases.make_titles(60)
    model = make_model(titles)
    histories = cases.make_histories(titles, range(40))
    prior = prior_cases.random_prior(40, 60, scale=2.0)
    targets = (scores_of(model, histories) + planted * prior).argmax(axis=1)
    fit = pk.fit_prior_weight(model, histories, targets, POLICY, prior, weights=WEIGHTS, candidates=60, search="items")
    assert fit.weight == planted and fit.curve[planted].ndcg(20) == 1.0
    for weight in (0.1, 2.0):
        rows = model.recommend(histories, k=20, search="items", prior=prior, prior_weight=weight)
        assert fit.curve[weight].ranks.tolist() == evaluate(rows, targets, [20], catalog=model.catalog).ranks.tolist()


@pytest.mark.parametrize("search", ["beam", "exact"])
def test_the_head_as_a_prior(search: str) -> None:
    model = make_model()
    prior = pk.ItemHeadPrior(model)
    table = scores_of(model)
    np.testing.assert_allclose(prior(pk.Histories.from_sequences(HISTORIES)), table, rtol=0, atol=1e-10)
    options = {"k": 5, "num_beams": 30, "search": search, "prior_weight": 0.6, "exclude_seen": True}
    got = model.recommend(HISTORIES, prior=prior, batch_size=2, **options)
    assert_lists(got, model.recommend(HISTORIES, prior=table, **options))
    assert got != model.recommend(HISTORIES, k=5, num_beams=30, search=search, exclude_seen=True)


@pytest.mark.parametrize("planted", [0.0, 0.7])
def test_the_weight_of_the_head_is_found(planted: float) -> None:
    titles = cases.make_titles(60)
    model = make_model(titles)
    model.train()
    histories = cases.make_histories(titles, range(30))
    targets = (model.score_items(histories, POLICY) + planted * scores_of(model, histories)).argmax(axis=1)
    fit = pk.fit_prior_weight(
        model, histories, targets, POLICY, pk.ItemHeadPrior(model), weights=WEIGHTS, candidates=60
    )
    assert fit.weight == planted and model.training


def test_priors_are_known_by_what_decides_them(tmp_path: Path) -> None:
    model = make_model()
    prior = pk.ItemHeadPrior(model)
    assert prior.fingerprint == pk.ItemHeadPrior(copy.deepcopy(model), POLICY, batch_size=3).fingerprint
    others = [pk.ItemHeadPrior(model, pk.TextOnly(None)), pk.ItemHeadPrior(make_model(dtype=torch.float32))]
    assert len({prior.fingerprint, *(other.fingerprint for other in others)}) == 3
    histories = pk.Histories.from_sequences(HISTORIES)
    options = {"k": 3, "num_beams": 30, "prior": prior}
    folder = recommend_to_disk(model, histories, tmp_path / "run", users_per_part=2, **options)
    assert_lists(read_recommendations(folder)[1], model.recommend(histories, **options), atol=1e-5)
    before = prior.fingerprint
    with torch.no_grad():
        model.item_head.bias.add_(1.0)
    assert prior.fingerprint != before


# ------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"search": "item"}, ValueError, "search: expected one of beam, exact, diverse, items, got 'item'"),
        ({"length_penalty": 0.5}, ValueError, 'length_penalty: expected 0 with search="items", which has no titles'),
        ({"normalize": "titles"}, ValueError, 'normalize: expected "items" or None with search="items"'),
        ({"max_expansions": 9}, ValueError, 'max_expansions: expected None or search="exact", got 9 with'),
        ({"k": 31}, ValueError, "k: expected at most 30, the items of the catalog, got 31"),
        ({"user_cache": 3}, TypeError, "user_cache: expected a UserCache or None, got int"),
        ({"prior_weight": 2.0}, ValueError, "prior: expected one for a prior_weight of 2.0, got None"),
        ({"prior": np.zeros(3)}, ValueError, r"prior: expected shape \(30,\) or \(5, 30\), .* got \(3,\)"),
        ({"memory_budget": "much"}, ValueError, "memory_budget: expected"),
        ({"policy": "text"}, TypeError, "policy: expected a policy"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make_model().recommend(HISTORIES, **{"k": 3, "search": "items", **options})


def test_scores_that_are_no_numbers_are_no_lists() -> None:
    model = make_model()
    with torch.no_grad():
        model.item_head.bias[3] = -math.inf  # never comes
    assert [len(user) for user in model.recommend(HISTORIES, k=30, search="items", short="allow")] == [29] * 5
    with torch.no_grad():
        model.item_head.bias[4] = math.nan
    for call in (
        lambda: model.recommend(HISTORIES, k=3, search="items"),
        lambda: model.score_items(HISTORIES, head="items"),
    ):
        with pytest.raises(ValueError, match="model: expected finite logits, got NaN"):
            call()


def test_wrong_heads() -> None:
    model = make_model()
    with pytest.raises(ValueError, match="head: expected titles or items, got 'both'"):
        model.score_items(HISTORIES, head="both")
    plain = search_oracle.make_model(TITLES)
    with pytest.raises(ValueError, match="model: expected one with an item head"):
        pk.ItemHeadPrior(plain, POLICY)
    with pytest.raises(TypeError, match="model: expected a PatchedCausalLM, got int"):
        pk.ItemHeadPrior(3)
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        pk.ItemHeadPrior(model, batch_size=0)
    model.policy = None
    with pytest.raises(ValueError, match="policy: expected one"):
        pk.ItemHeadPrior(model)


def test_users_without_rows_are_named() -> None:
    prompt = pk.Prompt(prefix=[], separator=[92], suffix=[93, 94], response_end=[96])
    model = pk.PatchedCausalLM(
        search_oracle.make_hf_model(), cases.make_catalog(TITLES), prompt, POLICY, item_head=True
    )
    assert len(model.recommend([[1], [4, 5]], k=3, search="items")) == 2
    with pytest.raises(ValueError, match=r"prompt: expected a prefix, .*1 histories without items \(user 'b'\)"):
        model.recommend({"a": [1], "b": []}, k=3, search="items")
    with pytest.raises(ValueError, match=r"prompt: expected a prefix, .*1 histories without items \(user 1\)"):
        model.score_items([[1], [], [2]], head="items")
