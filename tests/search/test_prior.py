# SPDX-License-Identifier: Apache-2.0
"""Searches with a prior against brute force over the catalogue; how a prior is asked, and what it may be."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import POLICIES, make_catalog, make_histories, make_titles
from hypothesis import given, settings
from hypothesis import strategies as st
from prior_cases import Lookup, random_prior, table_with, toy
from search_oracle import HF_MODELS, PROMPT, Titles, forced_scores, make_model, with_length_penalty
from torch import Tensor

import patchkern as pk
from patchkern.budget import search as memory
from patchkern.budget.live_bytes import peak_memory
from patchkern.search.recommend import UnprovenSearchWarning
from patchkern.search.results import read_recommendations, recommend_to_disk
from patchkern.search.trie import Trie

pytestmark = pytest.mark.filterwarnings("error::patchkern.search.recommend.UnprovenSearchWarning")

# few tokens, so that titles begin each other, share their beginnings and are equal
catalogues = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5), min_size=1, max_size=16)
ends = st.lists(st.integers(95, 97), max_size=2)  # which no title may hold
values = st.sampled_from([-math.inf, -3.0, -1.0, -0.25, 0.0, 0.0, 0.5, 2.0, 40.0])
WEIGHTS = [0.0, 0.3, 1.0, 1e4]


def make_try(sequences: list[list[int]], end: list[int]) -> tuple[dict[int, list[int]], pk.PatchedCausalLM]:
    titles = dict(enumerate(sequences))
    return titles, make_model(titles, prompt=pk.Prompt(prefix=[90], separator=[92], suffix=[93], response_end=end))


def with_prior(table: dict[Any, float], titles: Titles, row: Any, weight: float) -> dict[Any, float]:
    """What every item gets; the left out ones are not in it."""
    first = {tuple(title): item for item, title in reversed(titles.items())}
    return {
        item: table[first[tuple(title)]] + weight * value
        for (item, title), value in zip(titles.items(), row, strict=True)
        if value > -math.inf
    }


def best(scores: dict[Any, float], titles: Titles, k: int, allowed: Any) -> list[Any]:
    """Equal scores: in the order of the titles, then of the items."""
    place = {item: number for number, item in enumerate(titles)}
    first = {tuple(title): place[item] for item, title in reversed(titles.items())}
    items = [item for item in scores if item in allowed]
    return sorted(items, key=lambda item: (-scores[item], first[tuple(titles[item])], place[item]))[:k]


# ------------------------------------------------------------------ the k best of all


@settings(max_examples=100)
@given(catalogues, ends, st.sampled_from(WEIGHTS), st.sampled_from([0.0, 0.0, 1.0, -0.7]), st.booleans(), st.data())
def test_brute_force(
    sequences: list[list[int]], end: list[int], weight: float, penalty: float, exact: bool, data: st.DataObject
) -> None:
    """Exact with beams far narrower than the catalogue; the beam with one that covers it."""
    titles, model = make_try(sequences, end)
    names, n = list(titles), len(titles)
    histories = data.draw(
        st.lists(st.lists(st.sampled_from(names), max_size=4), min_size=1, max_size=3, unique_by=tuple)
    )
    exclude_seen, filtered, shared = (data.draw(st.booleans()) for _ in range(3))
    allowed = [data.draw(st.sets(st.sampled_from(names))) if filtered else set(names) for _ in histories]
    rows = [data.draw(st.lists(values, min_size=n, max_size=n)) for _ in histories[: 1 if shared else None]]
    table = np.array(rows[0] if shared else rows)
    rows = rows * len(histories) if shared else rows
    forms = [table, torch.from_numpy(table)] if shared else [table, torch.from_numpy(table), Lookup(histories, table)]
    k = data.draw(st.integers(1, min(4, n)))
    options: dict[str, Any] = {"exclude_seen": exclude_seen, "length_penalty": penalty, "prior_weight": weight}
    options |= {"num_beams": data.draw(st.integers(k, k + 2)), "search": "exact", "max_expansions": 1000}
    if not exact:
        options |= {"num_beams": n, "search": "beam", "max_expansions": None}
    if filtered:
        options["allowed_items"] = [sorted(items) for items in allowed]
    left = [
        {i for i, value in zip(names, row, strict=True) if value > -math.inf and i in items}
        - set(history if exclude_seen else ())
        for row, items, history in zip(rows, allowed, histories, strict=True)
    ]
    for prior in forms:
        if min(map(len, left)) < k:
            with pytest.raises(ValueError, match=rf"k: expected at most \d, .* user \d.*, got {k}"):
                model.recommend(histories, POLICIES["text"], k, prior=prior, **options)
            continue
        got = model.recommend(histories, POLICIES["text"], k, prior=prior, **options)
        tables = forced_scores(model, "llama", histories, POLICIES["text"], titles)
        for found, forced, row, items in zip(got, tables, rows, left, strict=True):
            scores = with_prior(with_length_penalty(forced, titles, end, penalty), titles, row, weight)
            assert [item for item, _ in found] == best(scores, titles, k, items)
            np.testing.assert_allclose([s for _, s in found], [scores[i] for i, _ in found], rtol=1e-12, atol=1e-9)


@settings(max_examples=60)
@given(catalogues, st.lists(st.integers(0, 2), max_size=2), st.integers(1, 3), st.data())
def test_best_values_of_the_tree(sequences: list[list[int]], end: list[int], n_users: int, data: st.DataObject) -> None:
    trie = Trie.from_catalog(make_catalog(dict(enumerate(sequences))), end)
    table = torch.tensor(
        [data.draw(st.lists(values, min_size=len(sequences), max_size=len(sequences))) for _ in range(n_users)]
    )
    found = trie.best_of(table)
    ranges = zip(trie.begin.tolist(), trie.own_end.tolist(), trie.end.tolist(), strict=True)
    for node, (begin, own_end, ending) in enumerate(ranges):
        for user, row in enumerate(table[:, trie.items].tolist()):
            assert float(found.at[user, node]) == max(row[begin:own_end], default=-math.inf)
            assert float(found.below[user, node]) == max(row[own_end:ending], default=-math.inf)


@pytest.mark.parametrize(
    "options",
    [
        {"search": "beam"},
        {"search": "exact"},
        {"search": "exact", "normalize": "titles"},
        {"search": "exact", "normalize": "items"},
        {"search": "exact", "length_penalty": 1.0},
        {"search": "beam", "exclude_seen": True, "allowed_items": range(2, 24)},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_prior_of_zeros_changes_nothing(options: dict[str, Any], dtype: torch.dtype) -> None:
    """Bit for bit, also where titles are shared and where all scores are equal; but for sums over items, not titles."""
    rounding = 1e-5 if options.get("normalize") == "items" else 0.0
    titles = {**make_titles(20), **{20 + i: title for i, title in enumerate(list(make_titles(20).values())[:6])}}
    model = make_model(titles)
    model.hf_model.to(dtype)
    histories = make_histories(make_titles(20), [5, 0, 12])
    for equal in (False, True):
        if equal:
            with torch.no_grad():
                model.hf_model.lm_head.weight.zero_()
        plain = model.recommend(histories, POLICIES["items"], 9, 9, **options)
        priors: list[Any] = [np.zeros(26)[::-1], torch.zeros(3, 26), lambda some: np.zeros((len(some), 26), np.float32)]
        for prior, weight in [*((prior, 1.0) for prior in priors), (random_prior(3, 26), 0.0)]:
            rows = model.recommend(histories, POLICIES["items"], 9, 9, prior=prior, prior_weight=weight, **options)
            for row, other in zip(rows, plain, strict=True):
                assert [item for item, _ in row] == [item for item, _ in other]
                np.testing.assert_allclose([s for _, s in row], [s for _, s in other], rtol=rounding, atol=0)


def test_a_large_weight_rules_the_order() -> None:
    titles = make_titles(30)
    model = make_model(titles)
    histories = make_histories(titles, [5, 0, 9])
    order = np.stack([np.random.default_rng(user).permutation(30) for user in range(3)])
    prior = -order.argsort(axis=1).astype(np.float32)
    for search, num_beams in (("beam", 7), ("exact", 7), ("beam", 30)):
        rows = model.recommend(histories, POLICIES["text"], 7, num_beams, search, prior=prior, prior_weight=1e5)
        assert [[item for item, _ in row] for row in rows] == order[:, :7].tolist()


def test_a_narrow_beam_sees_what_lies_ahead() -> None:
    """Every item is found by a beam of one when the prior names it, however unlikely its first token."""
    titles = {number: [number % 3, number // 3 % 3, number // 9] for number in range(27)}
    model = make_model(titles)
    prior = np.where(np.eye(27, dtype=bool), 0.0, -1e4)
    rows = model.recommend([[1, 2]] * 27, POLICIES["text"], 1, 1, prior=prior)
    assert [row[0][0] for row in rows] == list(range(27))


def test_exact_is_never_worse_than_the_beam() -> None:
    titles = {number: [number % 4, number // 4 % 4, number // 16 % 4, number // 64] for number in range(256)}
    model = make_model(titles)
    histories = make_histories(titles, range(9))
    prior = random_prior(9, 256)
    better = 0
    for width in (1, 3):
        beam = model.recommend(histories, POLICIES["text"], width, width, prior=prior)
        exact = model.recommend(histories, POLICIES["text"], width, width, "exact", prior=prior, max_expansions=9999)
        for row, narrow in zip(exact, beam, strict=True):
            assert all(mine >= other - 1e-9 for (_, mine), (_, other) in zip(row, narrow, strict=True))
            better += row[-1][1] > narrow[-1][1] + 1e-9
    assert better


def test_items_that_share_a_title_are_told_apart() -> None:
    titles = {"a": [5, 6], "b": [5], "a 2": [5, 6], "c": [8], "a 3": [5, 6]}
    model = make_model(titles)
    prior = np.array([0.0, 0.0, 100.0, 50.0, -100.0])
    for search in ("beam", "exact"):
        rows = model.recommend([[]], POLICIES["text"], 5, 5, search, prior=prior)[0]
        items = [item for item, _ in rows]
        assert items[:2] == ["a 2", "c"] and items[-1] == "a 3" and {*items[2:4]} == {"a", "b"}
        assert [item for item, _ in model.recommend([[]], POLICIES["text"], 1, 1, search, prior=prior)[0]] == ["a 2"]


@pytest.mark.parametrize("normalize", ["items", "titles"])
def test_normalized_scores(normalize: str) -> None:
    titles = {**make_titles(9), 9: [5, 6], 10: [5, 6], 11: [5]}
    model = make_model(titles)
    histories, prior = [[1, 2], []], random_prior(2, 12)
    prior[0, 3] = -math.inf
    rows = model.recommend(histories, POLICIES["text"], 9, 12, "exact", True, prior=prior, normalize=normalize)
    tables = forced_scores(model, "llama", histories, POLICIES["text"], titles)
    for row, table, values_, seen in zip(rows, tables, prior, histories, strict=True):
        scores = with_prior(table, titles, values_, 1.0)
        scores = {item: score for item, score in scores.items() if item not in seen}
        shares = Counter(tuple(titles[item]) for item in scores)
        if normalize == "items":
            scores = {item: score - math.log(shares[tuple(titles[item])]) for item, score in scores.items()}
            mass = math.fsum(map(math.exp, scores.values()))
        else:
            tops: dict[tuple[int, ...], float] = defaultdict(lambda: -math.inf)
            for item, score in scores.items():
                tops[tuple(titles[item])] = max(score, tops[tuple(titles[item])])
            mass = math.fsum(map(math.exp, tops.values()))
        expected = {item: score - math.log(mass) for item, score in scores.items()}
        assert [item for item, _ in row] == best(expected, titles, 9, set(expected))
        np.testing.assert_allclose([s for _, s in row], [expected[i] for i, _ in row], rtol=0, atol=1e-9)


# ------------------------------------------------------------------ how a prior is asked


@pytest.mark.parametrize("search", ["beam", "exact"])
def test_a_callable_is_asked_for_each_batch_with_whole_histories(search: str) -> None:
    titles = make_titles(12)
    model = make_model(titles)
    histories = [[0, 1, 2, 3, 4, 5], [6], [], [7, 8, 9], [1, 1]]
    table = random_prior(5, 12)
    prior = Lookup(histories, table)
    rows = model.recommend(histories, pk.TextOnly(max_items=2), 3, 4, search, batch_size=2, prior=prior)
    assert [len(asked) for asked in prior.asked] == [2, 2, 1]
    assert sorted(history for asked in prior.asked for history in asked) == sorted(map(tuple, histories))
    whole = model.recommend(histories, pk.TextOnly(max_items=2), 3, 4, search, prior=torch.from_numpy(table))
    assert [[i for i, _ in row] for row in rows] == [[i for i, _ in row] for row in whole]


def test_timestamps_go_along() -> None:
    model = make_model(make_titles(6))
    histories = pk.Histories([0, 1, 2, 3], [0, 1, 4], timestamps=[5, 6, 7, 8])
    seen = []

    def newest(some: pk.Histories) -> Tensor:
        assert some.timestamps is not None
        seen.append(some.timestamps[some.offsets[1:] - 1].tolist())
        return torch.zeros(len(some), 6, dtype=torch.float16)

    model.recommend(histories, POLICIES["text"], 2, 2, prior=newest)
    assert seen == [[8, 5]]  # the longest first


def test_no_users_are_not_asked_for() -> None:
    model = make_model(make_titles(5))
    assert model.recommend([], POLICIES["text"], 2, 2, prior=Lookup([], [])) == []
    assert model.recommend([], POLICIES["text"], 2, 2, prior=np.zeros((0, 5))) == []


def test_one_item() -> None:
    model = make_model({"only": [3, 4]})
    for search in ("beam", "exact"):
        row = model.recommend([["only"]], POLICIES["text"], 1, 1, search, prior=np.array([2.0]), prior_weight=3)[0]
        plain = model.recommend([["only"]], POLICIES["text"], 1, 1, search)[0]
        assert row[0][0] == "only" and row[0][1] == pytest.approx(plain[0][1] + 6.0, abs=1e-12)


ERRORS: list[tuple[Any, type[Exception], str]] = [
    (table_with(math.nan), ValueError, "prior: expected -inf, or numbers .* got nan for user 1 and item 4"),
    (table_with(math.inf), ValueError, "prior: expected -inf, or numbers .* got inf for user 1 and item 4"),
    (table_with(1e300), ValueError, r"finite in torch\.float32 .* prior_weight=2\.0, got 1e\+300 for user 1"),
    (table_with(-1e300), ValueError, r"finite in torch\.float32 .* prior_weight=2\.0, got -1e\+300 for user 1"),
    (np.zeros((2, 9), np.int64), TypeError, "prior: expected .*floating-point numbers, got int64"),
    (torch.zeros(2, 9).bool(), TypeError, r"prior: expected .*floating-point numbers, got torch\.bool"),
    (np.zeros((2, 9), np.longdouble), TypeError, "prior: expected .*floating-point numbers, got (float|longdouble)"),
    (np.zeros((3, 9)), ValueError, r"prior: expected .*\(2, 9\), users and items of the catalog, got \(3, 9\)"),
    (np.zeros((2, 9, 1)), ValueError, r"prior: expected .*\(2, 9\), .* got \(2, 9, 1\)"),
    (np.zeros(8), ValueError, r"prior: expected .*\(2, 9\), .* got \(8,\)"),
    ([[0.0] * 9] * 2, TypeError, r"prior(\[0\])?: expected .*an array or a tensor.*, got list"),
    (np.where(np.arange(18).reshape(2, 9) < 16, -math.inf, 0.0), ValueError,
     "k: expected at most 0, the items of user 0 that prior does not leave out, got 3"),
]  # fmt: skip


@pytest.mark.parametrize(("prior", "error", "message"), ERRORS)
def test_wrong_priors_are_refused_by_name(
    prior: Any, error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Arrays before anything runs; what a callable returns, when it does."""
    model = make_model(make_titles(9))
    model.hf_model.float()
    arguments: dict[str, Any] = {"histories": [[5], [5]], "policy": POLICIES["text"], "k": 3, "num_beams": 3}
    with pytest.raises(error, match=message):
        model.recommend(**arguments, prior=lambda _: prior, prior_weight=2)

    def run(*_: Any, **__: Any) -> None:
        raise AssertionError("a prompt was computed")

    monkeypatch.setattr("patchkern.search.recommend.Prompts", run)
    with pytest.raises(error, match=message):
        model.recommend(**arguments, prior=prior, prior_weight=2)


def test_a_callable_must_not_answer_for_all_at_once() -> None:
    model = make_model(make_titles(9))
    with pytest.raises(ValueError, match=r"prior: expected the callable to return shape \(2, 9\), .*got \(9,\)"):
        model.recommend([[5], [0]], POLICIES["text"], 3, 3, prior=lambda _: np.zeros(9))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"prior_weight": -1}, ValueError, "prior_weight: expected at least 0, got -1"),
        ({"prior_weight": math.nan}, ValueError, "prior_weight: expected a finite number, got nan"),
        ({"prior_weight": math.inf}, ValueError, "prior_weight: expected a finite number, got inf"),
        ({"prior_weight": "1"}, TypeError, "prior_weight: expected a number, got str"),
        ({"prior_weight": True}, TypeError, "prior_weight: expected a number, got bool"),
        ({"prior": None, "prior_weight": 0.5}, ValueError, r"prior: expected one for a prior_weight of 0\.5, got None"),
        ({"search": "diverse"}, ValueError, 'prior: expected None with search="diverse"'),
    ],
)
def test_errors_name_the_argument(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    model = make_model(make_titles(9))
    given = {"policy": POLICIES["text"], "k": 3, "num_beams": 3, "prior": np.zeros(9), **arguments}
    with pytest.raises(error, match=message):
        model.recommend([[5], [0, 1]], **given)


# ------------------------------------------------------------------ memory, files


@pytest.mark.parametrize(
    ("search", "form"), [("beam", "array"), ("beam", "tensor"), ("beam", "callable"), ("exact", "callable")]
)
def test_memory_of_a_prior_is_planned(search: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a catalogue that outweighs the model."""
    plans = []
    original = memory.SearchCost.plan

    def plan(self: memory.SearchCost, *arguments: Any) -> memory.SearchPlan:
        plans.append(original(self, *arguments))
        return plans[-1]

    monkeypatch.setattr(memory.SearchCost, "plan", plan)
    titles = {number: [number % 30, number // 30 % 30, number // 900] for number in range(9000)}
    model = pk.PatchedCausalLM(copy.deepcopy(HF_MODELS["llama"]).float(), make_catalog(titles), PROMPT)
    histories = make_histories(titles, [4, 3, 2, 1] * 5)
    table: Any = torch.zeros(20, 9000, dtype=torch.float64)
    prior = {"array": table.numpy(), "tensor": table, "callable": lambda some: torch.zeros(len(some), 9000).double()}
    with peak_memory("cpu") as peak, warnings.catch_warnings():
        warnings.simplefilter("ignore", UnprovenSearchWarning)
        rows = model.recommend(
            histories, POLICIES["text"], 3, 3, search, True, "1GiB", prior=prior[form], prior_weight=2.0
        )
    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert len(rows) == 20 and peak.bytes > 20 * 9000 * 4
    assert weights + peak.bytes <= plans[0].peak <= 2 * (weights + peak.bytes)


def test_a_budget_cuts_users_and_changes_nothing() -> None:
    titles = {number: [number % 30, number // 30 % 30, number // 900] for number in range(3000)}
    model = make_model(titles)
    histories = make_histories(titles, [4, 3, 2, 1] * 5)
    prior = Lookup(histories, random_prior(20, 3000))
    whole = model.recommend(histories, POLICIES["text"], 3, 3, prior=prior)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    prior.asked.clear()
    rows = model.recommend(histories, POLICIES["text"], 3, 3, memory_budget=weights + (4 << 20), prior=prior)
    assert len(prior.asked) > 1
    assert [[i for i, _ in row] for row in rows] == [[i for i, _ in row] for row in whole]


def test_to_disk(tmp_path: Path) -> None:
    titles = make_titles(12)
    model = make_model(titles)
    histories = make_histories(titles, [4, 0, 7, 2, 5])
    table = random_prior(5, 12)
    priors: list[Any] = [table, torch.from_numpy(table), table[0], Lookup(histories, table)]
    for number, prior in enumerate(priors):
        options: dict[str, Any] = {"k": 3, "num_beams": 5, "prior": prior, "prior_weight": 0.5}
        folder = recommend_to_disk(
            model, histories, tmp_path / str(number), POLICIES["text"], users_per_part=2, **options
        )
        expected = model.recommend(histories, POLICIES["text"], **options)
        for row, other in zip(read_recommendations(folder)[1], expected, strict=True):
            assert [item for item, _ in row] == [item for item, _ in other]
            assert [score for _, score in row] == pytest.approx([score for _, score in other])
    with pytest.raises(ValueError, match=r"prior: expected one row per user \(5\), got 2"):
        recommend_to_disk(model, histories, tmp_path / "x", POLICIES["text"], users_per_part=2, k=3, prior=table[:2])


def test_a_run_on_disk_knows_its_prior(tmp_path: Path) -> None:
    data, catalog = toy([[0, 1, 2, 3, 4], [3, 2, 1, 0, 5]])
    model = pk.PatchedCausalLM(copy.deepcopy(HF_MODELS["llama"]), catalog, PROMPT)
    options: dict[str, Any] = {"policy": POLICIES["text"], "k": 3, "num_beams": 5}
    for again in range(2):  # another object of the same content goes on
        prior = pk.TransitionPrior(data, catalog)
        recommend_to_disk(
            model, [[0], [1]], tmp_path, prior=pickle.loads(pickle.dumps(prior)) if again else prior, **options
        )
    for other in (pk.TransitionPrior(data, catalog, recent=2), pk.PopularityPrior(data, catalog), np.zeros(8), len):
        with pytest.raises(ValueError, match="got another arguments"):
            recommend_to_disk(model, [[0], [1]], tmp_path, prior=other, **options)
