# SPDX-License-Identifier: Apache-2.0
"""Models of item ids against one history at a time in float64; users apart; lists, files and errors."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import item_model_cases as cases
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from item_model_cases import CATALOG, HISTORIES, ITEM_IDS, N_ITEMS, POLICIES, make_model, scores_of
from prompt_cases import computed_rows

import patchkern as pk
from patchkern.data import synthetic
from patchkern.models.item_model import IdHead
from patchkern.models.scratch import from_scratch
from patchkern.search.recommend import generate_titles
from patchkern.training import target_nll

KINDS: dict[str, Any] = {
    "sasrec": {},
    "sasrec, cosine": {"head": "cosine", "heads": 1, "layers": 1, "inner": 24},
    "hstu": {"block": "hstu"},
    "hstu, cosine": {"block": "hstu", "head": "cosine", "heads": 4, "normalizer": 3.5},
}


def ranges_of(histories: list[list[Any]], first: int = 0) -> np.ndarray:
    return np.array([(first, len(items) - 1) for items in histories])


# ------------------------------------------------------------------ what is computed


@pytest.mark.parametrize("policy", ["text", "items", "sessions"])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_those_of_each_sample_alone(kind: str, policy: str) -> None:
    model = make_model(**KINDS[kind])
    ranges = ranges_of(HISTORIES)
    layout = pk.build_training_layout(model.catalog, HISTORIES, POLICIES[policy], model.prompt, ranges, head="items")
    assert (layout.prefix is not None) == (policy == "sessions")
    got = model(layout).loss
    got_grads = torch.autograd.grad(got, list(model.parameters()))
    losses = []
    for items in HISTORIES:
        for position, target in enumerate(items):
            logits = cases.logits_of(model, cases.state_of(model, items[:position], POLICIES[policy]))
            losses.append(F.cross_entropy(logits, torch.tensor(ITEM_IDS.index(target))))
    expected = torch.stack(losses).mean()
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    expected_grads = torch.autograd.grad(expected, list(model.parameters()))
    for (name, _), ours, theirs in zip(model.named_parameters(), got_grads, expected_grads, strict=True):
        assert ours.abs().max() > 0, name
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10, msg=name)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_each_history_alone(kind: str, policy: str) -> None:
    model = make_model(**KINDS[kind])
    expected = scores_of(model, HISTORIES, POLICIES[policy])
    np.testing.assert_allclose(model.score_items(HISTORIES, POLICIES[policy]), expected, rtol=0, atol=1e-10)
    layout = pk.build_layout(model.catalog, HISTORIES, POLICIES[policy], model.prompt)
    got = torch.log_softmax(model(layout).logits, 1).numpy()
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-10)
    chosen = model.score_items(HISTORIES, POLICIES[policy], items=[ITEM_IDS[7], ITEM_IDS[0]], batch_size=2)
    np.testing.assert_allclose(chosen, expected[:, [7, 0]], rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_users_of_a_batch_and_later_items_change_nothing(kind: str) -> None:
    """Bit for bit: of the same shape, another user's items and a user's own later items."""
    model = make_model(torch.float32, **KINDS[kind])

    def states(histories: list[list[Any]]) -> list[torch.Tensor]:
        layout = pk.build_training_layout(
            model.catalog, histories, POLICIES["items"], model.prompt, ranges_of(histories), head="items"
        )
        found = model.item_states(layout).detach()
        return list(found.split([len(items) for items in histories]))

    before = states(HISTORIES)
    changed = [list(items) for items in HISTORIES]
    changed[2][8] = ITEM_IDS[(ITEM_IDS.index(changed[2][8]) + 1) % N_ITEMS]
    after = states(changed)
    for user, (ours, theirs) in enumerate(zip(before, after, strict=True)):
        same = (ours == theirs).all(dim=1)
        assert same[:9].all(), "no row sees another user, or what comes after it"
        assert user != 2 or not same[9:].any()


def test_many_items_are_sampled_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model().train()
    layout = pk.build_training_layout(
        model.catalog, HISTORIES, POLICIES["items"], model.prompt, ranges_of(HISTORIES), head="items"
    )
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    exact = model(layout).loss.item()
    monkeypatch.setattr(IdHead, "sampled_above", 10)
    torch.manual_seed(0)
    sampled = model(layout).loss
    assert sampled.item() == pytest.approx(exact, rel=0.05) and sampled.item() != exact
    sampled.backward()
    assert model.hf_model.items.weight.grad.abs().sum() > 0
    assert model.eval()(layout).loss.item() == pytest.approx(exact, rel=1e-12)


def test_smoothing_weights_and_counts_are_of_the_loss() -> None:
    model = make_model()
    layout = pk.build_layout(
        model.catalog, HISTORIES[:3], model.policy, model.prompt, targets=ITEM_IDS[4:7], head="items"
    )
    plain = model(layout).loss.item()
    assert model(layout, item_weight=0.5, num_items_in_batch=9).loss.item() == pytest.approx(plain * 0.5 * 3 / 9)
    states = model.item_states(layout)
    logits = states @ model.hf_model.items.weight[:N_ITEMS].T + model.item_head.bias
    expected = F.cross_entropy(logits, layout.item_labels, label_smoothing=0.2)
    torch.testing.assert_close(model(layout, smoothing=0.2).loss, expected, rtol=0, atol=1e-12)


def test_an_empty_batch() -> None:
    model = make_model()
    layout = pk.build_layout(model.catalog, [], model.policy, model.prompt, targets=[], head="items")
    model(layout).loss.backward()
    assert model(layout).loss == 0 and model.recommend([]) == []
    assert model.score_items([]).shape == (0, N_ITEMS)


def test_likelihoods_come_from_shared_passes() -> None:
    model = make_model()
    users = np.repeat(np.arange(len(HISTORIES)), [len(items) for items in HISTORIES])
    positions = np.concatenate([np.arange(len(items)) for items in HISTORIES])
    got = target_nll(model, HISTORIES, (users, positions), rows_per_pass=13, head="items")
    expected = [
        -scores_of(model, [HISTORIES[user][:at]], model.policy)[0, ITEM_IDS.index(HISTORIES[user][at])]
        for user, at in zip(users, positions, strict=True)
    ]
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-10)


# ------------------------------------------------------------------ recommending


def best(scores: np.ndarray, k: int, is_allowed: Any) -> list[list[str]]:
    lists = []
    for user, row in enumerate(scores):
        places = [place for place in range(N_ITEMS) if is_allowed(user, ITEM_IDS[place])]
        places.sort(key=lambda place: (-row[place], place))
        lists.append([ITEM_IDS[place] for place in places[:k]])
    return lists


@pytest.mark.parametrize("block", ["sasrec", "hstu"])
@pytest.mark.parametrize("policy", POLICIES)
def test_lists_are_the_scores_sorted(policy: str, block: str) -> None:
    model = make_model(block=block)
    scores = scores_of(model, HISTORIES, POLICIES[policy])
    prior = np.random.default_rng(0).normal(size=scores.shape)
    allowed = ITEM_IDS[::2]
    options: list[tuple[dict[str, Any], np.ndarray, Any]] = [
        ({}, scores, lambda user, item: True),
        ({"exclude_seen": True}, scores, lambda user, item: item not in HISTORIES[user]),
        ({"allowed_items": allowed}, scores, lambda user, item: item in allowed),
        ({"prior": prior, "prior_weight": 0.7}, scores + 0.7 * prior, lambda user, item: True),
    ]
    for arguments, summed, is_allowed in options:
        got = model.recommend(HISTORIES, POLICIES[policy], k=5, batch_size=2, **arguments)
        assert [[item for item, _ in user] for user in got] == best(summed, 5, is_allowed), arguments
        for user, row in zip(got, summed, strict=True):
            np.testing.assert_allclose([row[ITEM_IDS.index(i)] for i, _ in user], [s for _, s in user], atol=1e-10)


@pytest.mark.parametrize("block", ["sasrec", "hstu"])
def test_a_budget_a_cache_and_a_disk_change_no_list(
    block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(block=block)
    expected = model.recommend(HISTORIES, k=4)
    for budget in ("100MiB", "600kB"):
        found = model.recommend(HISTORIES, k=4, memory_budget=budget)
        assert [[item for item, _ in user] for user in found] == [[item for item, _ in user] for user in expected]
    with pytest.raises(ValueError, match="memory_budget: expected at least"):
        model.recommend(HISTORIES, k=4, memory_budget=1000)
    folder = pk.recommend_to_disk(model, HISTORIES, tmp_path / "lists", k=4, search="items")
    assert pk.read_recommendations(folder)[1] == expected

    cache = pk.UserCache(model, 1 << 20)
    shorter = [items[:-1] for items in HISTORIES]
    model.recommend(shorter, k=4, user_cache=cache)
    rows = computed_rows(monkeypatch)
    cached = model.recommend(HISTORIES, k=4, user_cache=cache)
    assert sum(rows) == len(HISTORIES), "what is new of a history, and the start of the empty one"
    for ours, theirs in zip(cached, expected, strict=True):
        assert [item for item, _ in ours] == [item for item, _ in theirs]
        np.testing.assert_allclose([s for _, s in ours], [s for _, s in theirs], rtol=0, atol=1e-10)


def test_plans_of_memory(tmp_path: Path) -> None:
    model = make_model(torch.float32)
    counts = pk.row_counts(model.catalog, HISTORIES, model.policy, model.prompt)
    assert counts.tolist() == [len(items) + 1 for items in HISTORIES]
    peaks = {pk.plan_memory(model, counts, "64MiB", num_beams=beams).peak for beams in (1, 50)}
    assert len(peaks) == 1 and peaks.pop() < 64 << 20, "no beams"
    plan = pk.plan_training(model, 4096, "1GiB", head="items")
    assert plan.rows_per_pass == 4096 and plan.peak < 1 << 30


# ------------------------------------------------------------------ files


def test_sizes_may_be_numbers_of_numpy(tmp_path: Path) -> None:
    sizes = {name: np.int64(8) for name in ("width", "layers", "heads", "inner", "max_positions", "seed")}
    model = pk.ItemModel(CATALOG, POLICIES["items"], **sizes)
    pk.add_experts(model, np.int64(2), max_positions=np.int64(9))
    model.save_pretrained(tmp_path)
    again = pk.ItemModel.from_pretrained(tmp_path)
    assert again.config.normalizer == 8.0 and again.config.max_position_embeddings == 9
    assert again.prompt == model.prompt and len(again.prompt.experts) == 2


@pytest.mark.parametrize("block", ["sasrec", "hstu"])
def test_what_is_saved_is_read_again(block: str, tmp_path: Path) -> None:
    model = make_model(torch.float32, block=block, head="cosine")
    model.save_pretrained(tmp_path / "m")
    loaded = pk.ItemModel.from_pretrained(tmp_path / "m")
    for (name, ours), theirs in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    assert (loaded.policy, loaded.prompt, loaded.catalog_diff) == (model.policy, model.prompt, None)
    assert loaded.catalog.titles == CATALOG.titles
    assert loaded.recommend(HISTORIES, k=3) == model.recommend(HISTORIES, k=3)
    twin = copy.deepcopy(model)
    assert twin.recommend(HISTORIES, k=3) == model.recommend(HISTORIES, k=3)


def test_another_catalogue_keeps_what_is_known_by_id(tmp_path: Path) -> None:
    model = make_model()
    model.save_pretrained(tmp_path / "m")
    places = [7, 20, 0, 3]
    titles = {ITEM_IDS[place]: CATALOG.titles[place] for place in places} | {"new": "A new film"}
    other = pk.Catalog.from_titles(titles, lambda title: list(title.encode()))
    loaded = pk.ItemModel.from_pretrained(tmp_path / "m", other, dtype=torch.float64)
    assert loaded.catalog_diff.new.tolist() == ["new"] and loaded.catalog_diff.gone.size == N_ITEMS - 4
    history = [ITEM_IDS[place] for place in (0, 7, 3)]
    before, after = (one.score_items([history, []]) for one in (model, loaded))
    shared = before[:, places] - before[:, places[:1]]
    np.testing.assert_allclose(after[:, :4] - after[:, :1], shared, rtol=0, atol=1e-10)
    vector, bias = loaded.hf_model.items.weight[4], loaded.item_head.bias[4]
    assert not vector.any() and bias == 0, "nothing is known of a new item"

    renamed = dict.fromkeys(titles, "Another")
    with pytest.raises(ValueError, match="were ids exchanged"):
        pk.ItemModel.from_pretrained(tmp_path / "m", pk.Catalog.from_titles(renamed, lambda title: [1]))
    with pytest.raises(ValueError, match=r"catalog: expected items that .* knows"), pytest.warns(pk.CatalogWarning):
        pk.ItemModel.from_pretrained(tmp_path / "m", pk.Catalog.from_token_ids([1], [0, 1], ["elsewhere"]))
    with pytest.raises(TypeError, match="catalog: expected a Catalog or None, got dict"):
        pk.ItemModel.from_pretrained(tmp_path / "m", titles)  # type: ignore[arg-type]


def test_titles_with_half_a_character_are_titles(tmp_path: Path) -> None:
    titles = ["whole", "half \ud83d"]
    catalog = pk.Catalog.from_token_ids(range(2), range(3), titles=titles)
    pk.ItemModel(catalog, width=8).save_pretrained(tmp_path)
    assert pk.ItemModel.from_pretrained(tmp_path, catalog).catalog.titles == tuple(titles)


def test_models_of_ids_and_of_words_are_told_apart(tmp_path: Path) -> None:
    model = make_model()
    model.save_pretrained(tmp_path / "ids")
    card = pk.ModelCard("Films", data="some", metrics={}).text(model)
    assert "A patchkern_items model of item ids that" in card and "pk.ItemModel.from_pretrained" in card
    parts = from_scratch({1: "Alien", 2: "Aliens"}, hidden_size=16, intermediate_size=32)
    pk.PatchedCausalLM(*parts).save_pretrained(tmp_path / "words")
    with pytest.raises(ValueError, match=r"folder: expected a PatchedCausalLM in .*ids', got an ItemModel"):
        pk.PatchedCausalLM.from_pretrained(tmp_path / "ids")
    with pytest.raises(ValueError, match=r"folder: expected an ItemModel in .*words', got a PatchedCausalLM"):
        pk.ItemModel.from_pretrained(tmp_path / "words")


# ------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"block": "gru"}, ValueError, r"block: expected one of sasrec, hstu, got 'gru'"),
        ({"head": "softmax"}, ValueError, "head: expected one of dot, cosine, got 'softmax'"),
        ({"width": 10, "heads": 4}, ValueError, r"width: expected a multiple of heads \(4\), got 10"),
        ({"layers": 0}, ValueError, "layers"),
        ({"normalizer": 0.0}, ValueError, "normalizer: expected a finite number above 0, got 0.0"),
        ({"max_positions": 2.5}, TypeError, "max_positions"),
        ({"dropout": 1.0}, ValueError, "dropout: expected a number of at least 0 and below 1, got 1.0"),
        ({"prompt": pk.Prompt(prefix=(3,))}, ValueError, "prompt: expected ids from 23, below which are the items"),
        ({"prompt": [23]}, TypeError, "prompt: expected a Prompt or None, got list"),
        ({"policy": "items"}, TypeError, "policy: expected a policy"),
        ({"seed": 1.5}, TypeError, "seed: expected an integer, got float"),
    ],
)
def test_what_a_model_is_made_of_is_checked(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pk.ItemModel(CATALOG, **arguments)


def test_layouts_and_searches_that_it_cannot_serve_are_named() -> None:
    with pytest.raises(TypeError, match="catalog: expected a Catalog, got dict"):
        pk.ItemModel({1: "Alien"})  # type: ignore[arg-type]
    model = make_model(max_positions=9)
    words = pk.build_layout(CATALOG, [[ITEM_IDS[0]]], model.policy, pk.Prompt(prefix=(200,)), head="items")
    with pytest.raises(ValueError, match=r"layout: expected one of the model's catalog, .* \(model.catalog\)"):
        model(words)
    exchanged = pk.Catalog(CATALOG.token_ids, CATALOG.offsets, CATALOG.item_ids[::-1].copy()).by_item()
    with pytest.raises(ValueError, match=r"layout: expected one of the model's catalog, .* \(model.catalog\)"):
        model(pk.build_layout(exchanged, [[ITEM_IDS[0]]], model.policy, model.prompt, head="items"))
    titles = pk.build_layout(model.catalog, [[ITEM_IDS[0]]], model.policy, model.prompt, targets=[ITEM_IDS[1]])
    with pytest.raises(ValueError, match=r'layout: expected one for items \(head="items"\)'):
        model(titles)
    long = pk.build_layout(model.catalog, HISTORIES, model.policy, model.prompt, head="items")
    with pytest.raises(ValueError, match="layout: expected at most 9 rows per user, the model's max_positions, got 15"):
        model(long)
    with pytest.raises(ValueError, match=r"max_positions, got 15.*\(user 'carol'\)"):
        model.recommend(dict(zip(["alice", "bob", "carol", "dave", "eve"], HISTORIES, strict=True)), k=1)
    assert len(model.recommend(HISTORIES, pk.ItemPatches(0, 8), k=1)) == 5
    for search in ("beam", "exact", "diverse"):
        with pytest.raises(ValueError, match=f"search: expected \"items\" for ItemModel, .* got '{search}'"):
            model.recommend(HISTORIES[:1], k=1, search=search)
    with pytest.raises(ValueError, match='head: expected "items" for ItemModel'):
        model.score_items(HISTORIES[:1], head="titles")
    with pytest.raises(ValueError, match='search: expected "items" for ItemModel'):
        generate_titles(model, HISTORIES[:1], num_beams=1)
    without = make_model(prompt=pk.Prompt())
    with pytest.raises(ValueError, match="prompt: expected a prefix, from which the item head scores an empty history"):
        without.recommend([[]])
    assert len(without.recommend(HISTORIES[:1], k=2)[0]) == 2


def test_its_scores_are_a_prior_for_others() -> None:
    model, titles = make_model(torch.float32), dict(zip(ITEM_IDS, CATALOG.titles, strict=True))
    words = pk.PatchedCausalLM(*from_scratch(titles, hidden_size=16, intermediate_size=32), pk.TextOnly())
    prior = pk.ItemHeadPrior(model)
    lists = words.recommend(HISTORIES, k=3, num_beams=N_ITEMS, prior=prior, prior_weight=1e4)
    alone = model.recommend(HISTORIES, k=3)
    assert [[item for item, _ in user] for user in lists] == [[item for item, _ in user] for user in alone]


def test_it_takes_any_catalogue() -> None:
    data = synthetic(5, 12, mean_length=5.0)
    catalog = pk.Catalog.from_titles(data.titles, lambda title: list(title.encode()))
    model = pk.ItemModel(catalog, pk.TextOnly(None), width=8)
    assert len(model.catalog.tokens(3)) == 1 and model.catalog.titles == catalog.titles
    lists = model.recommend(data.histories, k=3)
    assert all(item in data.titles for user in lists for item, _ in user)
