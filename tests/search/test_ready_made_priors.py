# SPDX-License-Identifier: Apache-2.0
"""The priors that come with the library, against their definitions written as loops."""

from __future__ import annotations

import copy
import math
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import POLICIES, make_catalog
from hypothesis import given
from hypothesis import strategies as st
from prior_cases import toy
from search_oracle import HF_MODELS, PROMPT

import patchkern as pk
from patchkern.data import Interactions

pytestmark = pytest.mark.filterwarnings("error::patchkern.search.recommend.UnprovenSearchWarning")


def by_loop(data: Interactions, items: list[int], past: list[int], recent: int, popularity: float) -> list[float]:
    trained = [data.histories[u][: data.ranges["train"][u, 1]].tolist() for u in range(data.num_users)]
    count = Counter(item for history in trained for item in history)
    share = {item: (count[item] + 1) / (count.total() + len(items)) for item in items}
    follows: Counter[tuple[int, int]] = Counter()
    for history in trained:
        for later in range(len(history)):
            follows.update((history[earlier], history[later]) for earlier in range(max(later - recent, 0), later))
    scores = dict.fromkeys(items, 0.0)
    for age, before in enumerate(reversed(past[-recent:]), 1):
        for item in items:
            if follows[before, item]:
                scores[item] += follows[before, item] / math.sqrt(count[before] * count[item]) / age
    total = sum(scores.values())
    mixed = {i: (1 - popularity) * scores[i] / total + popularity * share[i] if total else share[i] for i in items}
    return [math.log(mixed[item]) for item in items]


@given(
    st.lists(st.lists(st.integers(0, 7), max_size=12), min_size=1, max_size=6),
    st.permutations(range(10)),
    st.integers(1, 4),
    st.sampled_from([0.05, 0.5, 1.0]),
)
def test_ready_made_priors_are_their_definitions(
    histories: list[list[int]], order: list[int], recent: int, popularity: float
) -> None:
    """In the order of the catalogue, which has two items that are not in the data; probabilities, none of them 0."""
    data, catalog = toy(histories, order)
    asked = [[], [7], [0, 1, 2, 0, 3], [9], *histories]
    prior = pk.TransitionPrior(data, catalog, recent, popularity)
    table = prior(pk.Histories.from_sequences(asked))
    for row, past in zip(table, asked, strict=True):
        np.testing.assert_allclose(row, by_loop(data, order, past, recent, popularity), rtol=1e-10)
    popular = pk.PopularityPrior(data, catalog)(pk.Histories.from_sequences(asked))
    np.testing.assert_allclose(popular[-1], by_loop(data, order, [], recent, 1.0), rtol=1e-12)
    for found in (table, popular):
        assert found.shape == (len(asked), 10) and np.isfinite(found).all()
        np.testing.assert_allclose(np.exp(found).sum(axis=1), 1.0, rtol=1e-12)


def test_ready_made_priors_travel_and_are_used() -> None:
    data, catalog = toy([[0, 1, 2, 3, 4], [3, 2, 1, 0, 5]], order=[5, 4, 3, 2, 1, 0, 6, 7])
    model = pk.PatchedCausalLM(copy.deepcopy(HF_MODELS["llama"]), catalog, PROMPT)
    for kind in (pk.PopularityPrior, pk.TransitionPrior):
        prior = kind(data, catalog)
        same = pickle.loads(pickle.dumps(prior))
        histories = pk.Histories.from_sequences([[0, 1], []])
        assert np.array_equal(prior(histories), same(histories)) and prior.fingerprint == same.fingerprint
        rows = model.recommend(histories, POLICIES["text"], 8, 8, "exact", prior=same, prior_weight=1e4)
        order = np.argsort(-prior(histories), axis=1, kind="stable")
        levels = np.sort(-prior(histories), axis=1)
        for row, expected, level in zip(rows, order, levels, strict=True):
            found = catalog.index_of([item for item, _ in row])
            for value in np.unique(level):  # equal values are left to the model
                assert set(found[level == value]) == set(expected[level == value])


def test_priors_of_another_catalogue_are_refused() -> None:
    """Their numbers would be of other items, as many as there are."""
    data, catalog = toy([[0, 1, 2, 3, 4], [3, 2, 1, 0, 5]])
    _, other = toy([[0, 1, 2, 3, 4], [3, 2, 1, 0, 5]], order=[5, 4, 3, 2, 1, 0, 6, 7])
    model = pk.PatchedCausalLM(copy.deepcopy(HF_MODELS["llama"]), catalog, PROMPT, POLICIES["text"], item_head=True)
    elsewhere = pk.PatchedCausalLM(copy.deepcopy(HF_MODELS["llama"]), other, PROMPT, POLICIES["text"], item_head=True)
    good = pk.PopularityPrior(data, catalog)
    wrong = [
        *(kind(data, other) for kind in (pk.PopularityPrior, pk.TransitionPrior, pk.LinearPrior)),
        pk.ItemHeadPrior(elsewhere),
        pk.CombinedPrior([lambda histories: np.zeros((len(histories), 8)), pk.PopularityPrior(data, other)], [1, 1]),
    ]
    for prior in wrong:
        for asked, name in ((prior, "prior"), ([good, prior], r"prior\[1\]")):
            for search in ("beam", "exact", "items"):
                with pytest.raises(ValueError, match=f"{name}: expected answers for these 8 items in their order"):
                    model.recommend([[0]], k=2, search=search, prior=asked)
        with pytest.raises(ValueError, match="prior: expected answers for these 8 items"):
            pk.fit_prior_weight(model, [[0]], [1], None, prior, k=2)
        with pytest.raises(ValueError, match=r"priors\[1\]: expected answers for these 8 items"):
            pk.CombinedPrior([good, prior], [1, 1])
    with pytest.raises(ValueError, match=r"priors\[0\]: expected answers for these 8 items"):
        pk.CombinedPrior.fit([good, good], other, [[0]], [1], k=2)
    same = pk.CombinedPrior([good, pk.TransitionPrior(data, make_catalog({item: [9] for item in range(8)}))], [1, 1])
    assert same.catalog is catalog and len(model.recommend([[0]], k=2, prior=same)[0]) == 2


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy], ids=["array", "tensor"])
def test_what_one_prior_leaves_out_is_left_out(kind: Any) -> None:
    table = np.log([[0.5, 0.25, 0.25, 0.0]])
    priors = [lambda histories: kind(np.repeat(table, len(histories), 0)), lambda histories: np.full((2, 4), -1.0)]
    two, one = pk.Histories.from_sequences([[0], []]), math.log(1 / 3)
    for weights, expected in (([0, 1], [one, one, one]), ([2, 0.0], np.log([4 / 6, 1 / 6, 1 / 6]))):
        found = pk.CombinedPrior(priors, weights)(two)
        np.testing.assert_allclose(found, [[*expected, -math.inf]] * 2)
    nothing = pk.CombinedPrior([lambda histories: np.full((2, 4), -math.inf)], [0.0])(two)
    assert (nothing == -math.inf).all()
    with pytest.raises(ValueError, match=r"priors\[1\]: expected answers of shape \(2, 4\), got \(2, 3\)"):
        pk.CombinedPrior([priors[0], lambda histories: np.zeros((2, 3))], [1, 1])(two)
    with pytest.raises(TypeError, match=r"weights\[1\]: expected a number, got str"):
        pk.CombinedPrior(priors, [1, "a lot"])  # type: ignore[list-item]


def test_ready_made_priors_refuse_by_name() -> None:
    data, catalog = toy([[0, 1, 2, 3, 4]])
    with pytest.raises(ValueError, match="interactions: expected item ids of the catalog, got 0"):
        pk.PopularityPrior(data, make_catalog({item: [3] for item in range(1, 5)}))
    with pytest.raises(TypeError, match="interactions: expected Interactions, got list"):
        pk.TransitionPrior([[0]], catalog)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="catalog: expected a Catalog, got dict"):
        pk.PopularityPrior(data, {})  # type: ignore[arg-type]
    for share, message in ((0, "above 0 and at most 1"), (1.5, "above 0 and at most 1"), (math.nan, "a finite number")):
        with pytest.raises(ValueError, match=f"popularity: expected {message}, got {share}"):
            pk.TransitionPrior(data, catalog, popularity=share)
    with pytest.raises(TypeError, match="popularity: expected a number, got str"):
        pk.TransitionPrior(data, catalog, popularity="some")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="recent: expected an integer in 1"):
        pk.TransitionPrior(data, catalog, recent=0)
    with pytest.raises(ValueError, match="histories: expected item ids of the catalog, got 77"):
        pk.TransitionPrior(data, catalog)(pk.Histories([77], [0, 1]))
    unsplit = Interactions(data.user_ids, data.histories, data.titles)
    with pytest.raises(TypeError, match="histories: expected Histories or a list of item-id sequences, got int"):
        pk.TransitionPrior(data, catalog)(5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="split: expected one of the data set's splits"):
        pk.PopularityPrior(unsplit, catalog)


def test_settings_of_numpy_and_plain_histories(tmp_path: Path) -> None:
    data, catalog = toy([[0, 1, 2, 3, 4, 5], [3, 2, 1, 0, 5, 6]])
    prior = pk.TransitionPrior(data, catalog, np.int64(3), np.float32(0.5))  # type: ignore[arg-type]
    prior.save(tmp_path / "transitions.safetensors")
    assert pk.TransitionPrior.load(tmp_path / "transitions.safetensors", catalog).fingerprint == prior.fingerprint
    asked = [[0, 1], [3]]
    for one in (prior, pk.PopularityPrior(data, catalog), pk.CombinedPrior([prior, prior], [1, 0.5])):
        np.testing.assert_array_equal(one(asked), one(pk.Histories.coerce(asked)))
