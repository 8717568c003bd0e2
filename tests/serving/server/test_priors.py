# SPDX-License-Identifier: Apache-2.0
"""Lists with priors are those of `recommend` with them; their files are read again with every model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from server_cases import ITEMS, TITLES, TOKEN, assert_same, histories, item_model, language_model, lists_of, serving

import patchkern as pk
from patchkern.data import Interactions, leave_one_out
from patchkern.serving.__main__ import main
from patchkern.serving.server.priors import PriorFiles
from patchkern.serving.server.served import Source

WEIGHTS = [0.7, 1.9]


def interactions(items: list[Any], titles: Any) -> Interactions:
    draw = np.random.default_rng(3)
    taken = [items[at] for at in draw.integers(0, len(items), 400)]
    return leave_one_out(Interactions.from_columns(np.repeat(np.arange(40), 10), taken, None, titles))


def saved_priors(folder: Path, catalog: pk.Catalog, titles: Any) -> tuple[list[str], list[Any]]:
    """Files, and what is in them."""
    data = interactions(list(titles), titles)
    priors = [pk.TransitionPrior(data, catalog, recent=3), pk.LinearPrior(data, catalog, penalty=5.0)]
    paths = [str(folder / f"{type(prior).__name__}.safetensors") for prior in priors]
    for path, prior in zip(paths, priors, strict=True):
        prior.save(path)
    return paths, priors


@pytest.mark.parametrize("search", ["items", "beam"])
def test_lists_are_those_of_recommend_with_the_priors(tmp_path: Path, search: str) -> None:
    model, tokenizer = language_model()
    model.save_pretrained(tmp_path / "run", tokenizer=tokenizer)
    paths, priors = saved_priors(tmp_path, model.catalog, TITLES)
    source = Source(str(tmp_path / "run"), priors=PriorFiles(paths, WEIGHTS))
    users = histories(9, seed=4)
    with serving(source.read) as client:
        asked = [{"history": history, "k": 6, "search": search, "exclude_seen": True} for history in users]
        together = client.post("/v1/recommend:batch", json={"users": asked}).json()["users"]
        alone = client.post("/v1/recommend", json=asked[5]).json()
        said = client.get("/v1/model").json()["priors"]
    assert said == [{"kind": "TransitionPrior", "weight": 0.7}, {"kind": "LinearPrior", "weight": 1.9}]
    options = {"k": 6, "search": search, "exclude_seen": True}
    expected = [model.recommend([history], prior=priors, prior_weight=WEIGHTS, **options)[0] for history in users]
    for found, one in zip(lists_of([*together, alone]), [*expected, expected[5]], strict=True):
        assert_same(found, one)
    without = [model.recommend([history], **options)[0] for history in users]
    assert any(
        [item for item, _ in one] != [item for item, _ in other] for one, other in zip(expected, without, strict=True)
    )


def test_a_reload_reads_the_priors_for_its_catalogue(tmp_path: Path) -> None:
    titles = {f"tt{item}": title for item, title in TITLES.items()}
    model = item_model()
    model.save_pretrained(tmp_path / "run")
    paths, priors = saved_priors(tmp_path, model.catalog, titles)
    catalog = tmp_path / "titles.jsonl"

    def write(titles: dict[str, str]) -> None:
        lines = [json.dumps({"item_id": item, "title": title}) for item, title in titles.items()]
        catalog.write_text("\n".join(lines), encoding="utf-8")

    write(titles)
    source = Source(str(tmp_path / "run"), str(catalog), renamed="allow", priors=PriorFiles(paths[:1]))
    history = list(titles)[8:12]
    bearer = {"Authorization": f"Bearer {TOKEN}"}

    def answered(client: Any) -> list[tuple[Any, float]]:
        (found,) = lists_of([client.post("/v1/recommend", json={"history": history, "k": 5}).json()])
        return found

    with serving(source.read, token=TOKEN) as client:
        assert_same(answered(client), *model.recommend([history], k=5, prior=priors[0]))
        fewer = dict(list(titles.items())[5:])
        write(fewer)
        assert client.post("/admin/reload", headers=bearer).json()["items"] == 35
        served = Source(str(tmp_path / "run"), str(catalog)).read().model
        later = pk.TransitionPrior.load(paths[0], served.catalog)
        expected = served.recommend([history], k=5, prior=later)[0]
        assert_same(answered(client), expected)
        write({item: f"Another {title}" for item, title in fewer.items()})
        refused = client.post("/admin/reload", headers=bearer)
        assert refused.status_code == 500
        assert "other titles for 35 of 35 item ids" in refused.json()["detail"][0]["msg"]
        assert_same(answered(client), expected)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--prior", "{nothing}"], "serve: prior: expected a file that a prior's save wrote, got "),
        (["--prior", "{text}"], "not a prior that this version reads"),
        (["--prior", "{other}"], "serve: catalog: expected items that "),
        (
            ["--prior", "{own}", "--prior_weight", "1", "2"],
            "prior_weight: expected one for each prior (1), got 2",
        ),
        (["--prior", "{own}", "--prior_weight", "-1"], "serve: prior_weight: expected a finite number of at least 0"),
        (["--prior_weight", "1"], "serve: prior_weight: expected one for each prior (0), got 1"),
    ],
)
def test_wrong_priors_are_said_before_anybody_is_served(tmp_path: Path, arguments: list[str], said: str) -> None:
    model = item_model()
    model.save_pretrained(tmp_path / "run")
    paths, _ = saved_priors(tmp_path, model.catalog, {f"tt{item}": title for item, title in TITLES.items()})
    (tmp_path / "other").mkdir()
    (tmp_path / "text").write_text("no tensors")
    others, _ = saved_priors(tmp_path / "other", language_model()[0].catalog, TITLES)
    names = {"own": paths[0], "other": others[0], "text": tmp_path / "text", "nothing": tmp_path / "nothing"}
    with pytest.raises(SystemExit, match=re.escape(said)):
        main(["serve", str(tmp_path / "run"), *(part.format(**names) for part in arguments)])


def test_items_that_left_are_forgotten_by_transitions(tmp_path: Path) -> None:
    model = language_model()[0]
    (path, _), (prior, _) = saved_priors(tmp_path, model.catalog, TITLES)
    same = pk.TransitionPrior.load(path, model.catalog)
    asked = pk.Histories.from_sequences(histories(5, seed=6))
    assert same.fingerprint == prior.fingerprint and np.array_equal(same(asked), prior(asked))
    later = {1000: "Entirely New"} | {item: TITLES[item] for item in reversed(ITEMS[10:])}
    catalog = language_model(titles=later)[0].catalog
    found = pk.TransitionPrior.load(path, catalog)
    places, before = catalog.index_of(ITEMS[10:]), model.catalog.index_of(ITEMS[10:])
    few = np.array([0, 2])
    asked_items = np.array([ITEMS[20], ITEMS[31]])
    np.testing.assert_array_equal(
        found._follows.score(catalog.index_of(asked_items).astype(np.int64), few)[0, places],
        prior._follows.score(model.catalog.index_of(asked_items).astype(np.int64), few)[0, before],
    )
    assert found.share[0] == found.share.min()  # one count, and no transition
    np.testing.assert_allclose(found(pk.Histories([1000], [0, 1]))[0], np.log(found.share))
    tensors = safetensors.numpy.load_file(path)
    with safetensors.safe_open(path, "numpy") as file:
        said = file.metadata()
    for name, change, message in (
        ("after", tensors["after"] + 40, "expected pairs of its .* items, got others"),
        ("weights", tensors["weights"][1:], r"weights: expected float64 \(\d+,\), got float64 \(\d+,\)"),
        ("count", tensors["count"][:, None], "count: expected int64"),
    ):
        safetensors.numpy.save_file(tensors | {name: change}, tmp_path / "bad", said)
        with pytest.raises(ValueError, match=message):
            pk.TransitionPrior.load(tmp_path / "bad", catalog)
