# SPDX-License-Identifier: Apache-2.0
"""What searches behind experts take: old items aside and a few users at a time, what is left for all of a batch."""

from __future__ import annotations

import expert_cases as cases
import memory_cases
import numpy as np
import pytest
from expert_cases import CATALOG, N_ITEMS, POLICIES, prompt_of

import patchkern as pk
from patchkern.batch.expert_layout import compress_layout, read_layout
from patchkern.budget.live_bytes import peak_memory

HISTORIES = [np.random.default_rng(n).integers(0, N_ITEMS, n).tolist() for n in (13, 0, 3, 8, 1, 7)]
TEXT = pk.Experts(pk.TextOnly(None), count=3, keep=10, block=20)
BLOCKS = pk.Experts(pk.TextOnly(None), count=3, block=20, parts="blocks")


@pytest.mark.parametrize("head", ["titles", "items"])
@pytest.mark.parametrize("kind", POLICIES)
def test_rows_are_those_of_the_layouts(kind: str, head: str) -> None:
    policy = POLICIES[kind]
    prompt = prompt_of(policy)
    counts = pk.expert_row_counts(CATALOG, HISTORIES, policy, prompt, head)
    whole = pk.build_layout(CATALOG, HISTORIES, policy, prompt, head=head)
    assert counts.whole.tolist() == np.diff(whole.prompts.numpy()).tolist()
    if head == "titles":
        assert pk.row_counts(CATALOG, HISTORIES, policy, prompt).tolist() == counts.whole.tolist()
    every = pk.Histories.coerce(HISTORIES)
    read = read_layout(CATALOG, every, policy, prompt, head)
    assert counts.read.tolist() == read.cu_seqlens.diff().tolist()
    users = np.flatnonzero(policy.compressed_parts(policy.cuts(every.lengths)))
    assert np.flatnonzero(counts.compressed).tolist() == users.tolist()
    if users.size:
        old = every.between(users, 0 * users, policy.cuts(every.lengths)[users])
        aside = compress_layout(CATALOG, old, policy, prompt)
        assert counts.compressed[users].tolist() == aside.prompts.diff().tolist()


def model_for(policy: pk.Experts) -> pk.PatchedCausalLM:
    model = memory_cases.make_model()
    model.prompt = model.prompt.with_special(experts=range(4000, 4000 + policy.count))
    return model


@pytest.mark.parametrize("policy", [TEXT, BLOCKS], ids=["one", "blocks"])
@pytest.mark.parametrize("lengths", [(400,), (300, 250, 60, 5), (120,) * 6], ids=["alone", "mixed", "alike"])
def test_no_search_needs_more_than_predicted(lengths: tuple[int, ...], policy: pk.Experts) -> None:
    model = model_for(policy)
    histories = memory_cases.users(*lengths)
    counts = pk.expert_row_counts(model.catalog, histories, policy, model.prompt)
    plan = pk.plan_memory(model, counts.read, "1GiB", num_beams=4, compressed=counts.compressed)
    assert len(plan.batches) == 1
    found = memory_cases.measured(model, histories, policy, 4)
    assert found <= plan.peak <= 1.6 * found
    # as if all rows were kept, it would be more
    whole = pk.plan_memory(model, counts.whole, "1GiB", num_beams=4)
    assert len(lengths) == 1 or plan.needed.store < 0.7 * whole.needed.store


def test_a_budget_is_kept() -> None:
    model = model_for(TEXT)
    histories = memory_cases.users(*[260] * 8)
    counts = pk.expert_row_counts(model.catalog, histories, TEXT, model.prompt)
    alone = pk.plan_memory(model, counts.read[:1], None, num_beams=4, compressed=counts.compressed[:1]).peak
    weights = sum(parameter.nbytes for parameter in model.parameters())
    expected = model.recommend(histories, TEXT, 4, 4)
    for budget in (alone, 2 * alone - weights):
        with peak_memory("cpu") as peak:
            lists = model.recommend(histories, TEXT, 4, 4, memory_budget=budget)
        assert weights + peak.bytes <= budget
        assert [[item for item, _ in user] for user in lists] == [[item for item, _ in user] for user in expected]
    with pytest.raises(ValueError, match=r"memory_budget: expected at least \d+ bytes"):
        model.recommend(histories, TEXT, 4, 4, memory_budget=weights + 1000)


@pytest.mark.parametrize("policy", [TEXT, BLOCKS], ids=["one", "blocks"])
def test_who_is_kept_needs_nothing_aside(policy: pk.Experts) -> None:
    model = model_for(policy)
    histories = memory_cases.users(300, 250, 60, 5)
    counts = pk.expert_row_counts(model.catalog, histories, policy, model.prompt)
    states = pk.UserStates(model, policy)
    states.update(None, histories)
    plan = pk.plan_memory(model, counts.read, None, num_beams=4)
    assert memory_cases.measured(model, histories, policy, 4, user_states=states) <= plan.peak
    # scores keep within a budget, with them and without
    weights = sum(parameter.nbytes for parameter in model.parameters())
    expected = model.score_items(histories, policy)
    for given in (None, states):
        budget = weights + (6 << 20)
        with peak_memory("cpu") as peak:
            scores = model.score_items(histories, policy, memory_budget=budget, nodes_per_pass=8, user_states=given)
        assert weights + peak.bytes <= budget
        np.testing.assert_allclose(scores, expected, atol=2e-5)


def test_refused() -> None:
    model = model_for(TEXT)
    with pytest.raises(ValueError, match=r"compressed: expected one per user \(2\), got 1"):
        pk.plan_memory(model, [10, 20], None, compressed=[3])
    with pytest.raises(ValueError, match="compressed: expected a 1-D array of integers"):
        pk.plan_memory(model, [10], None, compressed=[1.5])
    with pytest.raises(ValueError, match="compressed: expected None with policies"):
        pk.plan_memory(model, [[10]], None, policies=[cases.TEXT], compressed=[3])
    with pytest.raises(TypeError, match="policy: expected Experts, got TextOnly"):
        pk.expert_row_counts(CATALOG, HISTORIES, cases.TEXT, model.prompt)  # type: ignore[arg-type]
