# SPDX-License-Identifier: Apache-2.0
"""Searches behind experts: compressed on the way, kept, or gone on from, it is what the whole prompt gives."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import expert_cases
import expert_model_cases as cases
import numpy as np
import pytest
import torch
from cases import make_histories, make_titles
from expert_model_cases import HISTORIES, MASKED, PLACES, POLICIES, model_for
from item_model_cases import ITEM_IDS, N_ITEMS, logits_of
from prompt_cases import LONG, computed_rows
from search_oracle import HF_MODELS, make_model

import patchkern as pk
from patchkern.search.experts import ExpertPrompts, State, compress
from patchkern.search.prompts import Prompts
from patchkern.search.user_cache import UserCache

EVERY = {
    **POLICIES,
    "one, keeps one": pk.Experts(expert_cases.PATCH, count=1, keep=1, block=2),
    "blocks, sessions": pk.Experts(expert_cases.SESSIONS, count=2, block=4, parts="blocks"),
    "none": pk.Experts(expert_cases.PATCH, count=0, keep=3, block=4),
}
TITLES = make_titles(23)


class Kept:
    """States in a dict, of whatever past they are said to be."""

    def __init__(self, states: dict[Hashable, State | None]) -> None:
        self.states, self.asked = states, 0

    def check(self, model: Any, policy: Any, seen: Any) -> None:
        pass

    @contextmanager
    def reading(self, names: Sequence[Hashable], histories: pk.Histories) -> Iterator[list[State | None]]:
        assert len(names) == len(histories)
        self.asked += len(names)
        yield [self.states.get(name) for name in names]


def expected_scores(model: pk.ItemModel, policy: pk.Experts, histories: list[list[int]] = HISTORIES) -> np.ndarray:
    """``(B, n_items)`` by the dense mask of the rule."""
    with torch.no_grad():
        states = [cases.state_of(model, cases.rows_of(model, items, policy))[-1] for items in histories]
        return torch.stack([torch.log_softmax(logits_of(model, state), 0) for state in states]).numpy()


def pasts(policy: pk.Experts, histories: Sequence[Sequence[Any]]) -> tuple[list[int], list[Sequence[Any]]]:
    """Users with old items, and these."""
    cuts = policy.cuts(np.array([len(items) for items in histories]))
    users = [user for user, cut in enumerate(cuts) if cut]
    return users, [histories[user][: cuts[user]] for user in users]


# ------------------------------------------------------------------ on item ids


@pytest.mark.parametrize("block", MASKED)
@pytest.mark.parametrize("kind", EVERY)
def test_scores_are_those_of_the_dense_mask(kind: str, block: str) -> None:
    policy = EVERY[kind]
    model = model_for(policy, block)
    expected = expected_scores(model, policy)
    np.testing.assert_allclose(model.score_items(PLACES), expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(model.score_items(PLACES, batch_size=1), expected, rtol=0, atol=1e-12)
    lists = model.recommend(PLACES, k=N_ITEMS)
    for user, found in enumerate(lists):
        assert [item for item, _ in found] == [ITEM_IDS[item] for item in np.argsort(-expected[user], kind="stable")]
    budget = model.recommend(PLACES, k=N_ITEMS, memory_budget="64MiB")
    assert [[item for item, _ in user] for user in budget] == [[item for item, _ in user] for user in lists]


@pytest.mark.parametrize("chunk_rows", [None, 1, 3, 7])
@pytest.mark.parametrize("kind", sorted(set(EVERY) - {"none"}))
def test_chunks_and_stores_change_nothing(kind: str, chunk_rows: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = EVERY[kind]
    model = model_for(policy, "hstu")
    expected = expected_scores(model, policy)
    rows = computed_rows(monkeypatch)
    prompts = ExpertPrompts(model, pk.Histories.coerce(PLACES), policy, "items")
    with model.searching():
        states = Prompts(model, prompts, 0, chunk_rows=chunk_rows, head="items").states
        np.testing.assert_allclose(model.item_scores(states).numpy(), expected, rtol=0, atol=1e-12)
    assert rows and max(rows) <= (chunk_rows or 1000)
    users, old = pasts(policy, PLACES)
    whole = compress(model, old, policy)
    for options in ({"chunk_rows": chunk_rows}, {"store_rows": 1}, {"store_rows": 17, "chunk_rows": chunk_rows}):
        for ours, theirs in zip(compress(model, old, policy, **options), whole, strict=True):
            for part, other in zip(ours, theirs, strict=True):
                torch.testing.assert_close(part, other, rtol=0, atol=1e-12)
    kept = Kept(dict(zip(users, whole, strict=True)))
    lists = model.recommend(PLACES, k=5, user_states=kept)
    assert kept.asked == len(users)
    for ours, theirs in zip(lists, model.recommend(PLACES, k=5), strict=True):
        assert [item for item, _ in ours] == [item for item, _ in theirs]
        np.testing.assert_allclose([x for _, x in ours], [x for _, x in theirs], rtol=0, atol=1e-12)


def test_states_have_the_shapes_and_bytes_of_the_formula() -> None:
    for kind in ("one", "blocks"):
        policy = POLICIES[kind]
        model = model_for(policy, "sasrec", torch.float32)
        users, old = pasts(policy, PLACES)
        for user, state, items in zip(users, compress(model, old, policy), old, strict=True):
            parts = 1 if kind == "one" else len(items) // policy.block
            assert [tuple(x.shape) for x in state] == [(2, parts * policy.count, 4)] * 4, user
            # layers x keys and values x heads x width x experts x bytes
            assert sum(x.nbytes for x in state) == 2 * 2 * 2 * 4 * policy.count * parts * 4


@pytest.mark.parametrize("kind", ["blocks", "blocks, sessions"])
@pytest.mark.parametrize("block", MASKED)
def test_block_by_block_is_all_at_once(block: str, kind: str) -> None:
    policy = EVERY[kind]
    model = model_for(policy, block)
    history = [ITEM_IDS[item % N_ITEMS] for item in range(5, 25)]
    whole = compress(model, [history[:16]], policy)
    state: list[State | None] = [None]
    for end in (4, 8, 16):
        before = state
        state = [*compress(model, [history[:end]], policy, before)]
        if before[0] is not None:
            count = before[0][0].shape[1]
            assert all(torch.equal(new[:, :count], old) for new, old in zip(state[0], before[0], strict=True))
    for ours, theirs in zip(state[0], whole[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    # users who know something, nothing and everything, together
    some = compress(model, [history[:8], history[:4], history[:16]], policy)
    (one,) = compress(model, [history[:4]], policy)
    mixed = compress(model, [history[:16], history[:4], history[:16]], policy, [some[0], None, some[2]])
    for ours, theirs in zip(mixed, (whole[0], one, whole[0]), strict=True):
        for part, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(part, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", POLICIES)
@pytest.mark.parametrize("block", MASKED)
def test_recent_items_see_the_past_through_experts_alone(block: str, kind: str) -> None:
    """Another old item: with the experts as they were nothing changes, bit for bit; else everything does."""
    policy = POLICIES[kind]
    model = model_for(policy, block, torch.float32)
    users, old = pasts(policy, PLACES)
    states = dict(zip(users, compress(model, old, policy), strict=True))
    changed = [list(items) for items in PLACES]
    changed[0][2] = ITEM_IDS[(HISTORIES[0][2] + 1) % N_ITEMS]

    def found(histories: list[list[Any]], kept: dict[Any, Any] | None) -> torch.Tensor:
        given = None if kept is None else Kept(kept)
        prompts = ExpertPrompts(model, pk.Histories.coerce(histories), policy, "items", given)
        with model.searching():
            return Prompts(model, prompts, 0, head="items").states

    before = found(PLACES, states)
    assert torch.equal(found(changed, states), before)
    anew = found(changed, None)
    assert not torch.equal(anew[0], before[0])
    torch.testing.assert_close(anew[1:], before[1:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", POLICIES)
@pytest.mark.parametrize("block", MASKED)
def test_visits_of_a_growing_history(block: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recent items in one visit or in several, borders that move between them, and a past that changes."""
    policy = POLICIES[kind]
    model = model_for(policy, block)
    cache = UserCache(model, 1 << 20)
    history = [item % N_ITEMS for item in range(3, 27)]
    rows = computed_rows(monkeypatch)
    for end in (*range(1, 24), 23):
        given = [[ITEM_IDS[item] for item in history[:end]]]
        del rows[:]
        ours = model.recommend(given, k=N_ITEMS, user_cache=cache, user_ids=["eve"])
        cost = sum(rows)
        expected = expected_scores(model, policy, [history[:end]])[0]
        assert [item for item, _ in ours[0]] == [ITEM_IDS[item] for item in np.argsort(-expected, kind="stable")]
        np.testing.assert_allclose([score for _, score in ours[0]], np.sort(expected)[::-1], rtol=0, atol=1e-12)
        moved = policy.cuts(np.array([end]))[0] != policy.cuts(np.array([end - 1]))[0] if end > 1 else True
        if not moved and policy.policy == policy.recents and isinstance(policy.policy, pk.ItemPatches):
            assert cost == 1, "the new item alone; of the same history its last row"
    changed = list(history)
    changed[1] += 1
    given = [[ITEM_IDS[item % N_ITEMS] for item in changed[:23]]]
    ours = model.recommend(given, k=N_ITEMS, user_cache=cache, user_ids=["eve"])
    expected = expected_scores(model, policy, [[item % N_ITEMS for item in changed[:23]]])[0]
    np.testing.assert_allclose([score for _, score in ours[0]], np.sort(expected)[::-1], rtol=0, atol=1e-12)


# ------------------------------------------------------------------ on titles


TITLE_POLICIES = {
    "one": pk.Experts(pk.ItemPatches(0, None), pk.TextOnly(None), count=3, keep=2, block=5),
    "nothing kept": pk.Experts(pk.TextOnly(None), count=2, keep=0, block=4),
    "blocks": pk.Experts(pk.TextOnly(None), count=2, block=4, parts="blocks"),
    "sessions": pk.Experts(pk.SessionPatches(3, None, align="start"), count=1, keep=3, block=6),
}
READERS = make_histories(TITLES, [21, 3, 16, 0, 8])


@pytest.mark.parametrize("prompt", [None, LONG], ids=["short prompt", "long prompt"])
@pytest.mark.parametrize("chunk_rows", [None, 7])
@pytest.mark.parametrize("kind", TITLE_POLICIES)
def test_steps_after_experts_are_those_of_the_whole(
    kind: str, chunk_rows: int | None, prompt: pk.Prompt | None
) -> None:
    """Prompts, a token after each, and one of two hypotheses: positions go on where the whole prompt ended."""
    policy = TITLE_POLICIES[kind]
    model = make_model(TITLES) if prompt is None else make_model(TITLES, prompt=prompt)
    model.prompt = model.prompt.with_special(experts=range(97, 97 + policy.count))
    users = list(range(len(READERS)))

    def whole(following: list[list[int]], of: list[int]) -> torch.Tensor:
        """By a forward pass over spans; the tokens after a prompt stand at its end, like a longer suffix."""
        found = []
        for user, tokens in zip(of, following, strict=True):
            longer = replace(model.prompt, suffix=(*model.prompt.suffix, *tokens))
            layout = pk.build_layout(model.catalog, [READERS[user]], policy, longer)
            with torch.no_grad():
                found.append(model(layout).logits[0])
        return torch.stack(found)

    def assert_close(got: torch.Tensor, expected: torch.Tensor) -> None:
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)

    with model.searching():
        prompts = ExpertPrompts(model, pk.Histories.coerce(READERS), policy, "titles")
        computed = Prompts(model, prompts, 30, chunk_rows=chunk_rows)
    assert_close(computed.logits, whole([[]] * 5, users))
    with model.searching():
        every = torch.arange(5)
        logits = computed.step(torch.full((5,), -1), every, every + 11)
    assert_close(logits, whole([[user + 11] for user in users], users))
    with model.searching():
        parent = torch.tensor([0, 2, 2, 4])
        logits = computed.step(parent, parent, torch.tensor([21, 22, 23, 24]))
    assert_close(logits, whole([[user + 11, 21 + n] for n, user in enumerate(parent.tolist())], parent.tolist()))


@pytest.mark.parametrize("family", HF_MODELS)
@pytest.mark.parametrize("kind", ["one", "blocks"])
def test_lists_are_the_same_wherever_states_come_from(kind: str, family: str) -> None:
    policy = TITLE_POLICIES[kind]
    model = make_model(TITLES, family)
    model.prompt = model.prompt.with_special(experts=range(97, 97 + policy.count))
    scores = model.score_items(READERS, policy)
    catalog = list(model.catalog.item_ids)
    ours = model.recommend(READERS, policy, k=4, num_beams=23, search="exact")
    for user, found in enumerate(ours):
        assert found[0][1] == pytest.approx(scores[user].max())
        assert all(score == pytest.approx(scores[user, catalog.index(item)]) for item, score in found)
    users, old = pasts(policy, READERS)
    states = compress(model, old, policy)
    given: dict[str, dict[str, Any]] = {
        "kept": {"user_states": Kept(dict(zip(users, states, strict=True)))},
        "some of them": {"user_states": Kept({users[0]: states[0]})},
        "cached": {"user_cache": UserCache(model, 1 << 22)},
        "in batches": {"batch_size": 2},
        "in a budget": {"memory_budget": "256MiB"},
    }
    for options in [*given.values(), given["cached"]]:
        again = model.recommend(READERS, policy, k=4, num_beams=23, search="exact", **options)
        for mine, theirs in zip(again, ours, strict=True):
            assert [item for item, _ in mine] == [item for item, _ in theirs]
            np.testing.assert_allclose([x for _, x in mine], [x for _, x in theirs], rtol=0, atol=1e-10)


# ------------------------------------------------------------------ errors


def test_refused() -> None:
    policy = POLICIES["one"]
    model = model_for(policy, "sasrec")
    with pytest.raises(TypeError, match="user_states: expected UserStates or None, got dict"):
        model.recommend(PLACES, k=3, user_states={})
    with pytest.raises(ValueError, match="user_states: expected None under ItemPatches, which compresses no old items"):
        model.recommend(PLACES, pk.ItemPatches(0, None), k=3, user_states=Kept({}))
    with pytest.raises(TypeError, match="policy: expected Experts, got ItemPatches"):
        compress(model, PLACES, pk.ItemPatches(0, None))  # type: ignore[arg-type]
    for old in ([PLACES[0][:3]], [[]]):
        with pytest.raises(ValueError, match=r"old\[0\]: expected whole blocks of 4 items, got \d items"):
            compress(model, old, policy)
    with pytest.raises(ValueError, match='known: expected None with parts="one"'):
        compress(model, [PLACES[0][:4]], policy, [None])
    with pytest.raises(ValueError, match="policy: expected experts to compress old items to, got count=0"):
        compress(model, [PLACES[0][:4]], EVERY["none"])
    blocks = POLICIES["blocks"]
    with pytest.raises(ValueError, match=r"known: expected one per user \(1\), got 2"):
        compress(model, [PLACES[0][:4]], blocks, [None, None])
    (state,) = compress(model, [PLACES[0][:4]], blocks)
    with pytest.raises(ValueError, match=r"known\[0\]: expected a multiple of 2 experts, got 1"):
        compress(model, [PLACES[0][:8]], blocks, [tuple(x[:, :1] for x in state)])
    longer = compress(model, [PLACES[0][:8]], blocks)
    with pytest.raises(ValueError, match=r"known\[0\]: expected experts of at most 4 items, got those of 8"):
        compress(model, [PLACES[0][:4]], blocks, longer)
    for name in ("chunk_rows", "store_rows"):
        with pytest.raises(ValueError, match=f"{name}: expected an integer in 1"):
            compress(model, [PLACES[0][:4]], policy, **{name: 0})
    nothing = pk.Experts(expert_cases.PATCH, count=2, keep=0, block=4)
    with pytest.raises(ValueError, match=r"policy: expected to keep at least one item recent \(keep\)"):
        model.recommend(PLACES, nothing, k=3)


def test_a_history_longer_than_the_model_names_the_user() -> None:
    policy = POLICIES["one"]
    model = model_for(policy, "sasrec")
    with pytest.raises(ValueError, match=r"max_positions.*user 'bob'"):
        model.recommend([PLACES[0], ITEM_IDS[:20] * 3], k=3, user_ids=["eve", "bob"])
