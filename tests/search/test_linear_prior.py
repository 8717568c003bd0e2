# SPDX-License-Identifier: Apache-2.0
"""`LinearPrior`: its definition, its file, and other catalogues."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from cases import POLICIES, make_catalog
from hypothesis import given
from hypothesis import strategies as st
from prior_cases import toy
from search_oracle import HF_MODELS, PROMPT

import patchkern as pk
from patchkern.evaluation.linear import ItemRegression
from patchkern.search.prior import trained_items

ASKED = pk.Histories.from_sequences([[0, 1], [], [3, 2, 1, 0], [5]])


def example(**settings: Any) -> tuple[pk.LinearPrior, Any]:
    data, catalog = toy([[0, 1, 2, 3, 4, 5], [3, 2, 1, 0, 5, 6], [0, 1, 3, 2]], [5, 4, 3, 2, 1, 0, 6, 7])
    return pk.LinearPrior(data, catalog, **{"penalty": 0.5, **settings}), data


@given(
    st.lists(st.lists(st.integers(0, 7), max_size=12), min_size=1, max_size=6),
    st.permutations(range(10)),
    st.sampled_from(["ridge", "ease"]),
    st.sampled_from([0.05, 1.0]),
)
def test_it_is_its_definition(histories: list[list[int]], order: list[int], form: str, popularity: float) -> None:
    """Positive scores that sum to 1, mixed with popularity, in catalogue order; none of them 0."""
    data, catalog = toy(histories, order)
    prior = pk.LinearPrior(data, catalog, form, 0.5, 2.0, 3, popularity)
    users, items, _ = trained_items(data, catalog)
    model = ItemRegression.fit(users, items, form, 0.5, 2.0, 3)
    share = np.exp(pk.PopularityPrior(data, catalog)(ASKED)[0])
    index = catalog.index_of(ASKED.items).astype(np.int64)
    scores = np.maximum(model.score(index, ASKED.offsets, 10).astype(np.float64), 0)
    table = prior(ASKED)
    for row, score in zip(table, scores, strict=True):
        linear = score / score.sum() if score.any() else share
        np.testing.assert_allclose(np.exp(row), (1 - popularity) * linear + popularity * share, rtol=1e-12)
    assert table.shape == (4, 10) and np.isfinite(table).all()
    np.testing.assert_allclose(np.exp(table).sum(axis=1), 1, rtol=1e-12)


def test_only_training_interactions_count() -> None:
    prior, data = example()
    held_out = ~data.in_split("train")
    items = data.histories.items.copy()
    items[held_out] = 7 - items[held_out]
    other = copy.deepcopy(data)
    object.__setattr__(other, "histories", pk.Histories(items, data.histories.offsets))
    assert pk.LinearPrior(other, prior.catalog, penalty=0.5).fingerprint == prior.fingerprint


@pytest.mark.parametrize("form", ["ridge", "ease"])
def test_it_travels_and_is_used(tmp_path: Path, form: str) -> None:
    prior, _ = example(form=form)
    prior.save(tmp_path / "new" / "linear.safetensors")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["linear.safetensors"]
    for same in (
        pickle.loads(pickle.dumps(prior)),
        pk.LinearPrior.load(tmp_path / "new" / "linear.safetensors", prior.catalog),
    ):
        assert np.array_equal(prior(ASKED), same(ASKED)) and prior.fingerprint == same.fingerprint
        assert same.settings == prior.settings
    model = pk.PatchedCausalLM(copy.deepcopy(HF_MODELS["llama"]), prior.catalog, PROMPT)
    for row, table in zip(
        model.recommend(ASKED, POLICIES["text"], 1, 8, "exact", prior=same, prior_weight=1e4), prior(ASKED), strict=True
    ):
        assert table[prior.catalog.index_of([row[0][0]])[0]] == table.max()
    changes: list[dict[str, Any]] = [{}, {"recent": 2}, {"popularity": 0.3}, {"penalty": 0.7}]
    assert len({example(form=form, **other)[0].fingerprint for other in changes}) == 4


def test_settings_of_numpy_and_plain_histories(tmp_path: Path) -> None:
    settings = {"penalty": np.float32(0.5), "half_life": np.int64(4), "recent": np.int64(30)}
    prior, plain = example(**settings)[0], example()[0]
    assert prior.fingerprint == plain.fingerprint
    prior.save(tmp_path / "linear.safetensors")
    np.testing.assert_array_equal(prior([[0, 1], [], [3, 2, 1, 0], [5]]), plain(ASKED))


def test_a_later_catalogue(tmp_path: Path) -> None:
    """Another order, item 4 gone, 8 and 9 new: those have one count each, and all others keep their weights."""
    prior, _ = example()
    prior.save(tmp_path / "linear.safetensors")
    later = make_catalog({item: [item + 1] for item in (9, 0, 1, 2, 3, 8, 5, 6, 7)})
    found = pk.LinearPrior.load(tmp_path / "linear.safetensors", later)
    places, before = later.index_of(range(4)), prior.catalog.index_of(range(4))
    np.testing.assert_array_equal(
        found._model.score(later.index_of([0, 3]).astype(np.int64), np.array([0, 2]), 9)[0, places],
        prior._model.score(prior.catalog.index_of([0, 3]).astype(np.int64), np.array([0, 2]), 8)[0, before],
    )
    asked = pk.Histories.from_sequences([[0, 3], [8]])
    table = np.exp(found(asked))
    np.testing.assert_allclose(table[0, later.index_of([8, 9])], found.settings.popularity * found.share[[0, 5]])
    np.testing.assert_allclose(table[1], found.share)
    assert found.share[0] == found.share[5] == found.share.min()
    assert found.fingerprint != prior.fingerprint
    again = pk.LinearPrior.load(tmp_path / "linear.safetensors", prior.catalog)
    assert again.fingerprint == prior.fingerprint
    with pytest.raises(ValueError, match="histories: expected item ids of the catalog, got 4"):
        found(pk.Histories([4], [0, 1]))


def test_wrong_catalogues_and_files_are_refused(tmp_path: Path) -> None:
    prior, _ = example()
    path = tmp_path / "linear.safetensors"
    prior.save(path)
    catalog = prior.catalog
    exchanged = pk.Catalog(catalog.token_ids, catalog.offsets, np.roll(catalog.item_ids, 1), catalog.titles)
    for catalog, message in (
        (
            make_catalog({item: [3] for item in range(20, 25)}),
            "catalog: expected items that .* knows, such as .* got none",
        ),
        (make_catalog({"a": [3]}), "catalog: expected items that .* knows"),
        (make_catalog({item: [9 - item] for item in range(8)}), "catalog: .* got other titles for 4 of 4 item ids"),
        (exchanged, "catalog: .* got other titles for 4 of 4 item ids"),
    ):
        with pytest.raises(ValueError, match=message):
            pk.LinearPrior.load(path, catalog)
    with pytest.raises(TypeError, match="catalog: expected a Catalog, got list"):
        pk.LinearPrior.load(path, [])  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match=r"path: expected a file, got .*nothing"):
        pk.LinearPrior.load(tmp_path / "nothing", prior.catalog)
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(ValueError, match="not a linear prior that this version reads"):
        pk.LinearPrior.load(tmp_path / "text", prior.catalog)

    tensors = safetensors.numpy.load_file(path)
    with safetensors.safe_open(path, "numpy") as file:
        said = json.loads(file.metadata()["linear_prior"])
    for change, message in (
        ({"weights": tensors["weights"][:2]}, "weights: expected float32"),
        ({"format_version": 2}, "format_version: expected 1, got 2"),
        ({"settings": {"unheard": 1}}, "unheard"),
    ):
        parts = {key: value for key, value in change.items() if key in tensors}
        text = json.dumps(said | {key: value for key, value in change.items() if key not in tensors})
        safetensors.numpy.save_file(tensors | parts, tmp_path / "bad", {"linear_prior": text})
        with pytest.raises(ValueError, match=message):
            pk.LinearPrior.load(tmp_path / "bad", prior.catalog)


def test_it_refuses_by_name() -> None:
    with pytest.raises(ValueError, match="popularity: expected above 0 and at most 1, got 0"):
        example(popularity=0)
    with pytest.raises(ValueError, match="memory_budget: expected at least 512 bytes"):
        example(memory_budget=100)
    _, data = example()
    with pytest.raises(TypeError, match="interactions: expected Interactions, got list"):
        pk.LinearPrior([[0]], make_catalog({0: [1]}))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="interactions: expected item ids of the catalog"):
        pk.LinearPrior(data, make_catalog({0: [1]}))
