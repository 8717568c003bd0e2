# SPDX-License-Identifier: Apache-2.0
"""The likelihood of targets against titles forced token by token through the plain model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from cases import POLICIES, make_histories, make_titles
from search_oracle import HF_MODELS, forced_scores, make_model

import patchkern as pk
from patchkern.training import item_log_probs, likelihood, target_nll

TITLES = make_titles(23)
ITEMS = list(TITLES)
WHOLE = make_histories(TITLES, [40, 7, 12])
SAMPLES = (np.array([0, 2, 0, 1, 0, 2, 0]), np.array([33, 5, 12, 0, 13, 11, 39]))


def expected(model: pk.PatchedCausalLM, family: str, policy: Any) -> list[float]:
    histories = [WHOLE[user][:position] for user, position in zip(*SAMPLES, strict=True)]
    tables = forced_scores(model, family, histories, policy, TITLES)
    targets = [WHOLE[user][position] for user, position in zip(*SAMPLES, strict=True)]
    return [-table[target] for table, target in zip(tables, targets, strict=True)]


@pytest.mark.parametrize("rows_per_pass", [1, 60, 4096])
@pytest.mark.parametrize(
    "policy", ["text", "text-cut", "items", "sessions-end", "sessions-start-cut", "sessions-no-text"]
)
def test_against_forced_titles(policy: str, rows_per_pass: int) -> None:
    model = make_model(TITLES)
    got = target_nll(model, WHOLE, SAMPLES, POLICIES[policy], rows_per_pass=rows_per_pass)
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, expected(model, "llama", POLICIES[policy]), rtol=0, atol=1e-10)


@pytest.mark.parametrize("family", HF_MODELS)
def test_every_family(family: str) -> None:
    model = make_model(TITLES, family)
    got = target_nll(model, WHOLE, SAMPLES, POLICIES["items"])
    np.testing.assert_allclose(got, expected(model, family, POLICIES["items"]), rtol=0, atol=1e-10)


def test_histories_are_computed_once_where_they_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of trunks and branches, or, where the model cannot take them, of samples."""
    model = make_model(TITLES)
    rows: list[int] = []
    forward = pk.PatchedCausalLM.forward

    def counted(self: pk.PatchedCausalLM, layout: pk.PatchLayout, *rest: Any, **options: Any) -> Any:
        rows.append(layout.num_rows)
        return forward(self, layout, *rest, **options)

    monkeypatch.setattr(pk.PatchedCausalLM, "forward", counted)
    samples = (np.zeros(30, np.int64), np.arange(10, 40))
    together = target_nll(model, WHOLE, samples, POLICIES["items"])
    shared = sum(rows)
    rows.clear()
    monkeypatch.setattr(likelihood, "_share_trunks", lambda *_: np.zeros(30, bool))
    apart = target_nll(model, WHOLE, samples, POLICIES["items"])
    assert shared < sum(rows) / 2
    np.testing.assert_allclose(together, apart, rtol=0, atol=1e-10)


def test_long_histories_take_nothing_from_short_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples within ``max_items`` are computed together, whatever else is asked for; rows by hand."""
    model, policy = with_head(), pk.ItemPatches(0, 20)
    rows: list[int] = []
    of_items = pk.PatchedCausalLM.item_states

    def counted(self: pk.PatchedCausalLM, layout: pk.PatchLayout, *rest: Any) -> Any:
        rows.append(layout.num_rows)
        return of_items(self, layout, *rest)

    monkeypatch.setattr(pk.PatchedCausalLM, "item_states", counted)
    samples = (np.zeros(15, np.int64), np.arange(10, 25))
    expected = model.score_items([WHOLE[0][:position] for position in samples[1]], policy, head="items")
    rows.clear()
    got = np.full_like(expected, np.nan)
    for chosen, scores in item_log_probs(model, WHOLE, samples, policy):
        got[chosen] = scores
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-10)

    # those after 10..20 items are one history; those after 21..24 each have their own latest 20
    alone = pk.build_layout(model.catalog, [WHOLE[0][:20]], policy, model.prompt, head="items").num_rows
    assert rows == [alone, 4 * alone]


@pytest.mark.parametrize("policy", [pk.ItemPatches(0, None), pk.ItemPatches(2, None), pk.TextOnly(20, cut_every=8)])
def test_samples_apart_share_what_is_before_both(policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every third one, as a limit spreads them: nearly the rows of one history; far apart, those of each."""
    model = with_head()
    rows: list[int] = []
    of_items = pk.PatchedCausalLM.item_states

    def counted(self: pk.PatchedCausalLM, layout: pk.PatchLayout, *rest: Any) -> Any:
        rows.append(layout.num_rows)
        return of_items(self, layout, *rest)

    def scored(positions: list[int]) -> int:
        """Rows that it took."""
        samples = (np.repeat([0, 2], [len(positions), 1]), np.array([*positions, 5]))
        histories = [WHOLE[user][:position] for user, position in zip(*samples, strict=True)]
        expected = model.score_items(histories, policy, head="items")
        rows.clear()
        got = np.full_like(expected, np.nan)
        for chosen, scores in item_log_probs(model, WHOLE, samples, policy):
            got[chosen] = scores
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-10)
        return sum(rows)

    monkeypatch.setattr(pk.PatchedCausalLM, "item_states", counted)
    spread = list(range(9, 40, 3))
    each = [scored([position]) for position in spread]
    assert scored(spread[::-1]) < 0.7 * (sum(each) - (len(spread) - 1) * scored([]))
    assert scored([1, 39]) <= scored([1]) + scored([39]) - scored([])


def test_models_and_policies_without_trunks() -> None:
    model, positions = make_model(TITLES), SAMPLES[1]

    def share(model: pk.PatchedCausalLM, policy: Any) -> list[bool]:
        return likelihood._share_trunks(model, policy, positions, "titles").tolist()

    every = [True] * positions.size
    none = [False] * positions.size
    assert share(model, pk.TextOnly(None)) == share(model, pk.TextOnly(39)) == every
    assert share(model, pk.TextOnly(12)) == (positions <= 12).tolist() and share(model, pk.TextOnly(4)) != every
    assert share(model, pk.TextOnly(12, cut_every=2)) == every
    assert share(model, pk.FitRows(50)) == share(model, pk.RandomItemPatches(0.5, None)) == none
    model.hf_model.set_attn_implementation("sdpa")
    assert not model.takes_branches and share(model, pk.TextOnly(None)) == none


def test_the_model_is_left_as_it_was() -> None:
    model = make_model(TITLES)
    for training in (True, False):
        model.train(training)
        target_nll(model, WHOLE, SAMPLES, POLICIES["items"])
        assert model.training is training and all(parameter.grad is None for parameter in model.parameters())
    nothing = np.zeros(0, np.int64)
    assert target_nll(model, WHOLE, (nothing, nothing), POLICIES["items"]).shape == (0,)


def test_single_precision_is_summed_in_it() -> None:
    model, exact = make_model(TITLES), make_model(TITLES)
    model.hf_model.to(torch.bfloat16)
    got = target_nll(model, WHOLE, SAMPLES, POLICIES["items"])
    np.testing.assert_allclose(got, target_nll(exact, WHOLE, SAMPLES, POLICIES["items"]), rtol=0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rows_per_pass": 0}, "rows_per_pass: expected an integer in 1"),
        ({"policy": None}, "policy: expected one"),
        ({"samples": (np.array([0]), np.array([40]))}, "40"),
        ({"histories": [[ITEMS[0], 12345]], "samples": (np.array([0]), np.array([1]))}, "samples: .*12345"),
    ],
)
def test_errors_name_the_argument(arguments: dict[str, Any], message: str) -> None:
    given = {"histories": WHOLE, "samples": SAMPLES, "policy": POLICIES["items"], **arguments}
    with pytest.raises(ValueError, match=message):
        target_nll(make_model(TITLES), **given)


# ------------------------------------------------------------------ the item head


def with_head() -> pk.PatchedCausalLM:
    """A head that is not the identity any more."""
    plain = make_model(TITLES)
    model = pk.PatchedCausalLM(plain.hf_model, plain.catalog, plain.prompt, item_head=True)
    assert model.item_head is not None
    with torch.no_grad():
        for number, parameter in enumerate(model.item_head.parameters()):
            generator = torch.Generator().manual_seed(number)
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model


@pytest.mark.parametrize("rows_per_pass", [1, 60, 4096])
@pytest.mark.parametrize(
    "policy", ["text", "text-cut", "items", "items-all", "sessions-end", "sessions-start-cut", "sessions-no-text"]
)
def test_items_against_the_scores_of_each_history(
    policy: str, rows_per_pass: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, (users, positions) = with_head(), SAMPLES
    histories = [WHOLE[user][:position] for user, position in zip(users, positions, strict=True)]
    expected = model.score_items(histories, POLICIES[policy], head="items")
    monkeypatch.setattr(likelihood, "_SCORES_AT_ONCE", 3 * len(TITLES))
    options = {"rows_per_pass": rows_per_pass}
    got = np.full_like(expected, np.nan)
    for chosen, scores in item_log_probs(model, WHOLE, SAMPLES, POLICIES[policy], **options):
        assert scores.shape == (chosen.size, len(TITLES)) and chosen.size <= 3 and np.isnan(got[chosen]).all()
        got[chosen] = scores
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-10)
    targets = model.catalog.index_of([WHOLE[user][position] for user, position in zip(users, positions, strict=True)])
    nll = target_nll(model, WHOLE, SAMPLES, POLICIES[policy], head="items", **options)
    np.testing.assert_allclose(nll, -expected[np.arange(users.size), targets], rtol=0, atol=1e-10)


def test_items_need_a_head() -> None:
    with pytest.raises(ValueError, match="model: expected one with an item head"):
        next(item_log_probs(make_model(TITLES), WHOLE, SAMPLES, POLICIES["items"]))
    with pytest.raises(ValueError, match="head: expected titles or items, got 'both'"):
        target_nll(with_head(), WHOLE, SAMPLES, POLICIES["items"], head="both")


@pytest.mark.parametrize("rows_per_pass", [60, 4096])
@pytest.mark.parametrize("parts", ["one", "blocks"])
def test_behind_experts_every_sample_is_as_it_is_served(parts: str, rows_per_pass: int) -> None:
    policy = pk.Experts(pk.ItemPatches(1, None), count=2, block=5, keep=3 if parts == "one" else None, parts=parts)
    model = make_model(TITLES)
    model.prompt = model.prompt.with_special(experts=[97, 98])
    got = target_nll(model, WHOLE, SAMPLES, policy, rows_per_pass=rows_per_pass)
    histories = [WHOLE[user][:position] for user, position in zip(*SAMPLES, strict=True)]
    targets = [WHOLE[user][position] for user, position in zip(*SAMPLES, strict=True)]
    scores = model.score_items(histories, policy)
    places = [list(model.catalog.item_ids).index(target) for target in targets]
    np.testing.assert_allclose(got, -scores[np.arange(len(targets)), places], rtol=0, atol=1e-10)


def test_items_behind_experts() -> None:
    from expert_model_cases import PLACES, POLICIES, model_for

    for policy in POLICIES.values():
        model = model_for(policy, "sasrec")
        samples = (np.array([2, 0, 0, 0]), np.array([8, 12, 3, 9]))
        histories = [PLACES[user][:position] for user, position in zip(*samples, strict=True)]
        expected = model.score_items(histories)
        for chosen, scores in item_log_probs(model, PLACES, samples):
            np.testing.assert_allclose(scores, expected[chosen], rtol=0, atol=1e-12)
