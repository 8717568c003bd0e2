# SPDX-License-Identifier: Apache-2.0
"""Exact search, item filters, length penalty and normalised scores against brute force over the catalogue."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import POLICIES, make_histories, make_titles
from hypothesis import given, settings
from hypothesis import strategies as st
from search_oracle import (
    PROMPT,
    Ranked,
    Titles,
    assert_ranked,
    forced_scores,
    make_model,
    normalized,
    prompt_rows,
    ranked,
    sequence_scores,
    with_length_penalty,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

import patchkern as pk
from patchkern.models import scratch
from patchkern.search.prefix_cache import StepShape
from patchkern.search.recommend import UnprovenSearchWarning, recommend
from patchkern.search.scoring import score_items
from patchkern.search.suffixes import Suffixes
from patchkern.search.title_search import diverse_search, search_titles
from patchkern.search.trie import Trie

pytestmark = pytest.mark.filterwarnings("error::patchkern.search.recommend.UnprovenSearchWarning")

# few tokens, so that titles begin each other, share their beginnings and are equal
catalogues = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=1, max_size=24)
ends = st.lists(st.integers(95, 98), max_size=2)  # which no title may hold
families = st.sampled_from(["llama", "qwen3", "gpt2"])
PENALTIES = [0.0, 0.0, 0.5, 1.0, 2.0, -0.7]


def make_try(sequences: list[list[int]], end: list[int], family: str) -> tuple[dict[int, list[int]], Any]:
    titles = dict(enumerate(sequences))
    prompt = pk.Prompt(prefix=[90], separator=[92], suffix=[93], response_end=end)
    return titles, make_model(titles, family, prompt)


def draw_histories(data: st.DataObject, titles: Titles) -> list[list[int]]:
    return data.draw(st.lists(st.lists(st.sampled_from(sorted(titles)), max_size=5), min_size=1, max_size=4))


# ------------------------------------------------------------------ the k best of all


@settings(max_examples=120)
@given(catalogues, ends, families, st.sampled_from(PENALTIES), st.booleans(), st.booleans(), st.data())
def test_exact_is_brute_force(
    sequences: list[list[int]],
    end: list[int],
    family: str,
    penalty: float,
    exclude_seen: bool,
    filtered: bool,
    data: st.DataObject,
) -> None:
    """With beams far narrower than the catalogue, for users who may get different items."""
    titles, model = make_try(sequences, end, family)
    histories = draw_histories(data, titles)
    names = list(titles)
    allowed = [data.draw(st.sets(st.sampled_from(names))) if filtered else set(names) for _ in histories]
    left = [items - set(h) if exclude_seen else items for items, h in zip(allowed, histories, strict=True)]
    k = data.draw(st.integers(1, min(4, len(titles))))
    options: dict[str, Any] = {"search": "exact", "exclude_seen": exclude_seen, "length_penalty": penalty}
    options |= {"num_beams": data.draw(st.integers(k, k + 2)), "max_expansions": 1000}
    if filtered:
        options["allowed_items"] = [sorted(items) for items in allowed]
    short = [user for user, items in enumerate(left) if len(items) < k]
    if short:
        with pytest.raises(
            ValueError, match=rf"k: expected at most {len(left[short[0]])}, .*user {short[0]}.*, got {k}"
        ):
            model.recommend(histories, POLICIES["items"], k, **options)
        return
    got = model.recommend(histories, POLICIES["items"], k, **options)
    tables = forced_scores(model, family, histories, POLICIES["items"], titles)
    for row, table, items in zip(got, tables, left, strict=True):
        table = with_length_penalty(table, titles, end, penalty)
        assert_ranked(row, table, titles, k, set(titles) - items)


def test_exact_finds_what_the_beam_misses() -> None:
    """Among enough users there are some whose beam of one loses the best title."""
    titles = {number: [number % 3, number // 3 % 3, number // 9] for number in range(27)}
    model = make_model(titles)
    histories = make_histories(titles, range(12))
    beam = model.recommend(histories, POLICIES["text"], k=1, num_beams=1)
    exact = model.recommend(histories, POLICIES["text"], k=1, num_beams=1, search="exact")
    assert any(a[0][0] != b[0][0] for a, b in zip(beam, exact, strict=True))
    for row, table in zip(exact, forced_scores(model, "llama", histories, POLICIES["text"], titles), strict=True):
        assert_ranked(row, table, titles, 1)


@pytest.mark.parametrize("max_expansions", [1, 5, 9, 14])
def test_too_few_expansions(max_expansions: int) -> None:
    """Every list is as good as the beam's in every place; those that are not the best are among those counted."""
    titles = {number: [number % 4, number // 4 % 4, number // 16 % 4, number // 64] for number in range(256)}
    model = make_model(titles)
    histories = make_histories(titles, range(9))
    arguments = (histories, POLICIES["text"], 3, 3)
    beam = model.recommend(*arguments)
    with pytest.warns(UnprovenSearchWarning, match=rf"{max_expansions} prefixes .* of \d+ of 9 users") as caught:
        got = model.recommend(*arguments, search="exact", max_expansions=max_expansions)
    n_unproven = int(str(caught[0].message).split(" of 9 users")[0].rsplit(" ", 1)[1])
    exact = model.recommend(*arguments, search="exact")
    assert 0 < sum(a != b for a, b in zip(got, exact, strict=True)) <= n_unproven
    for row, narrow in zip(got, beam, strict=True):
        assert all(mine >= other for (_, mine), (_, other) in zip(row, narrow, strict=True))


def test_expansions_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    from patchkern.search.prompts import Prompts

    titles = {number: [number % 4, number // 4 % 4, number // 16 % 4, number // 64] for number in range(256)}
    model = make_model(titles)
    fed: list[int] = []
    original = Prompts.step

    def spy(self: Any, parent: Tensor, user: Tensor, token: Tensor, shape: Any = None) -> Tensor:
        fed.append(len(token))
        assert int(torch.bincount(user).max()) <= 3
        return original(self, parent, user, token, shape)

    monkeypatch.setattr(Prompts, "step", spy)
    model.recommend([[1, 2]], POLICIES["text"], 3, 3)
    of_beam = sum(fed)
    for max_expansions in (1, 20, 30):
        fed.clear()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.recommend([[1, 2]], POLICIES["text"], 3, 3, "exact", max_expansions=max_expansions)
        assert sum(fed) <= max(max_expansions, of_beam)


def test_equal_scores_are_in_catalogue_order() -> None:
    titles = {"c": [7], "a": [5], "b": [6, 6], "a again": [5], "d": [8], "e": [6, 9]}
    model = make_model(titles)
    with torch.no_grad():
        for weight in (model.hf_model.lm_head.weight, model.get_input_embeddings().weight):
            weight[[5, 6, 7, 8, 9]] = 0.0  # the same logits, to the bit, by any matrix product
    for k, expected in ((1, ["c"]), (2, ["c", "a"]), (4, ["c", "a", "a again", "d"]), (6, [*"ca", "a again", *"dbe"])):
        row = model.recommend([[]], POLICIES["text"], k, k, search="exact")[0]
        assert [item for item, _ in row] == expected
        scored = model.recommend([[]], POLICIES["text"], k, k, search="exact", normalize="titles")[0]
        assert [item for item, _ in scored] == expected


def test_users_do_not_depend_on_their_batch() -> None:
    titles = make_titles(23)
    model = make_model(titles)
    histories = make_histories(titles, [3, 40, 0, 17, 3, 8, 25])
    for options in ({}, {"normalize": "items"}, {"length_penalty": 1.5}):
        together = model.recommend(histories, POLICIES["items"], 6, 6, "exact", **options)
        for batch_size in (1, 3):
            parts = recommend(model, histories, POLICIES["items"], 6, 6, "exact", batch_size=batch_size, **options)
            for row, other in zip(together, parts, strict=True):
                assert [item for item, _ in row] == [item for item, _ in other]
                np.testing.assert_allclose([s for _, s in row], [s for _, s in other], rtol=0, atol=1e-9)


def test_one_item_and_no_users() -> None:
    model = make_model({"only": [3, 4]})
    for options in ({}, {"normalize": "titles"}):
        rows = model.recommend([["only"], []], POLICIES["text"], 1, 1, "exact", **options)
        assert [[item for item, _ in row] for row in rows] == [["only"], ["only"]]
        assert model.recommend([], POLICIES["text"], 1, 1, "exact", **options) == []


@pytest.mark.parametrize("search", ["beam", "exact", "diverse"])
def test_users_cache_changes_nothing(search: str) -> None:
    titles = make_titles(23)
    model = make_model(titles)
    histories = make_histories(titles, [3, 20, 0, 17, 8])
    policy = pk.SessionPatches(group_size=2, max_items=None, align="start")
    cache = pk.UserCache(model, 1 << 20)
    for user_ids in (None, list("abcde"), np.arange(5, 10)):
        for length in (-4, None):
            seen = [history[:length] for history in histories]
            plain = model.recommend(seen, policy, 4, 4, search, batch_size=2)
            rows = model.recommend(seen, policy, 4, 4, search, batch_size=2, user_cache=cache, user_ids=user_ids)
            for row, other in zip(rows, plain, strict=True):
                assert [item for item, _ in row] == [item for item, _ in other]
                np.testing.assert_allclose([s for _, s in row], [s for _, s in other], rtol=0, atol=1e-9)
    assert len(cache) == 15 and "c" in cache and 4 in cache and 9 in cache


# ------------------------------------------------------------------ scores


@settings(max_examples=40)
@given(catalogues, ends, families, st.integers(1, 40), st.data())
def test_scores_of_all_items(
    sequences: list[list[int]], end: list[int], family: str, nodes_per_pass: int, data: st.DataObject
) -> None:
    titles, model = make_try(sequences, end, family)
    histories = draw_histories(data, titles)
    wanted = data.draw(st.none() | st.lists(st.sampled_from(sorted(titles)), max_size=9))
    scores = score_items(model, histories, POLICIES["text"], wanted, nodes_per_pass=nodes_per_pass)
    columns = list(titles) if wanted is None else wanted
    assert scores.shape == (len(histories), len(columns)) and scores.dtype == np.float64
    for row, table in zip(scores, forced_scores(model, family, histories, POLICIES["text"], titles), strict=True):
        np.testing.assert_allclose(row, [table[item] for item in columns], rtol=0, atol=1e-9)


def test_score_items_of_a_model() -> None:
    titles = make_titles(9)
    model = make_model(titles)
    histories = make_histories(titles, [4, 0, 7])
    scores = model.score_items(histories, POLICIES["items"], batch_size=2)
    found = model.recommend(histories, POLICIES["items"], 9, 9)
    for row, line in zip(found, scores, strict=True):
        np.testing.assert_allclose([score for _, score in row], [line[item] for item, _ in row], rtol=0, atol=1e-9)
    assert model.score_items([], POLICIES["items"]).shape == (0, 9)
    assert model.hf_model.float() and model.score_items(histories, POLICIES["items"]).dtype == np.float32
    with pytest.raises(ValueError, match="items: expected item ids of the catalog, got 77 at position 1"):
        model.score_items(histories, POLICIES["items"], items=[0, 77])
    with pytest.raises(ValueError, match="nodes_per_pass: expected at least 1, got 0"):
        model.score_items(histories, POLICIES["items"], nodes_per_pass=0)
    with torch.no_grad():
        model.hf_model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="model: expected finite logits, got NaN or infinity"):
        model.score_items(histories, POLICIES["items"])


@settings(max_examples=40)
@given(catalogues, ends, families, st.booleans(), st.booleans(), st.data())
def test_normalized_scores_are_brute_force(
    sequences: list[list[int]], end: list[int], family: str, by_item: bool, exclude_seen: bool, data: st.DataObject
) -> None:
    titles, model = make_try(sequences, end, family)
    histories = draw_histories(data, titles)
    allowed = [set(titles) - set(history) if exclude_seen else set(titles) for history in histories]
    k = min(len(items) for items in allowed)
    if k == 0:
        return
    normalize = "items" if by_item else "titles"
    rows = model.recommend(histories, POLICIES["text"], k, k, "exact", exclude_seen=exclude_seen, normalize=normalize)
    tables = forced_scores(model, family, histories, POLICIES["text"], titles)
    for row, table, items in zip(rows, tables, allowed, strict=True):
        expected = normalized(table, titles, items, by_item)
        first = {tuple(titles[item]): item for item in reversed(titles)}  # ties are decided by a title's first item
        order = {**{first[tuple(titles[item])]: score for item, score in expected.items()}, **expected}
        assert_ranked(row, order, titles, k, set(titles) - items)
        shown = {tuple(titles[item]): score for item, score in row}
        if k == len(items):  # all of them: the probabilities sum to one
            values = [score for _, score in row] if by_item else list(shown.values())
            assert math.isclose(math.fsum(map(math.exp, values)), 1.0, abs_tol=1e-9)


def test_length_penalty_of_beam_search() -> None:
    titles = make_titles(17)
    model = make_model(titles)
    histories = make_histories(titles, [5, 0])
    tables = forced_scores(model, "llama", histories, POLICIES["text"], titles)
    for penalty in (0.5, 1, -1.0):
        rows = model.recommend(histories, POLICIES["text"], 17, 17, length_penalty=penalty)
        for row, table in zip(rows, tables, strict=True):
            assert_ranked(row, with_length_penalty(table, titles, PROMPT.response_end, penalty), titles, 17)


# ------------------------------------------------------------------ allowed items


def test_forms_of_allowed_items() -> None:
    titles = make_titles(12, ids="str")
    model = make_model(titles)
    names = list(titles)
    histories = make_histories(titles, [4, 0, 7])
    mine = [names[2:9], names[:6], names[5:]]
    mask = np.array([[name in items for name in names] for items in mine])
    tables = forced_scores(model, "llama", histories, POLICIES["text"], titles)
    for search in ("beam", "exact"):
        for form in (mine, [tuple(items) for items in mine], [np.array(items) for items in mine], mask):
            rows = model.recommend(histories, POLICIES["text"], 5, 12, search, allowed_items=form)
            for row, table, items in zip(rows, tables, mine, strict=True):
                assert_ranked(row, table, titles, 5, set(names) - set(items))
        tensor = model.recommend(histories, POLICIES["text"], 5, 12, search, allowed_items=torch.from_numpy(mask))
        assert tensor == rows
        for shared in (names[2:9], np.array(names[2:9]), mask[0], torch.from_numpy(mask[0])):
            rows = model.recommend(histories, POLICIES["text"], 5, 12, search, allowed_items=shared)
            for row, table in zip(rows, tables, strict=True):
                assert_ranked(row, table, titles, 5, set(names) - set(mine[0]))


def test_allowed_items_of_the_diverse_search() -> None:
    titles = make_titles(12)
    model = make_model(titles)
    rows = model.recommend([[1], []], POLICIES["text"], 2, 6, "diverse", True, allowed_items=[[1, 4, 5], [7, 8]])
    assert {item for item, _ in rows[0]} <= {4, 5} and {item for item, _ in rows[1]} <= {7, 8}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"allowed_items": [[0, 1, 2], [3, 4]]},
            ValueError,
            "k: expected at most 2, the allowed_items of user 1, got 3",
        ),
        ({"allowed_items": [[0, 1, 2], []]}, ValueError, "k: expected at most 0, the allowed_items of user 1, got 3"),
        ({"allowed_items": []}, ValueError, "k: expected at most 0, the allowed_items of user 0, got 3"),
        (
            {"allowed_items": [0, 1, 2, 3], "exclude_seen": True},
            ValueError,
            r"k: expected at most 2, the allowed_items of user 1 \(4\) that it has not seen, got 3",
        ),
        ({"allowed_items": [[0, 1, 2]]}, ValueError, r"allowed_items: expected one sequence per user \(2\), got 1"),
        (
            {"allowed_items": [[0, 1, 2], [3, 4, 77]]},
            ValueError,
            r"allowed_items\[1\]: expected item ids of the catalog, got 77 at position 2",
        ),
        (
            {"allowed_items": [0, 77]},
            ValueError,
            "allowed_items: expected item ids of the catalog, got 77 at position 1",
        ),
        ({"allowed_items": ["0", "1"]}, TypeError, "allowed_items: expected integer item ids"),
        ({"allowed_items": 3}, TypeError, "allowed_items: expected item ids, one sequence per user or None, got 3"),
        ({"allowed_items": "abc"}, TypeError, "allowed_items: expected item ids, one sequence per user or None"),
        (
            {"allowed_items": np.ones((3, 9), bool)},
            ValueError,
            r"allowed_items: expected booleans of shape \(2, 9\), .* got shape \(3, 9\)",
        ),
        ({"allowed_items": np.zeros(9, bool)}, ValueError, "k: expected at most 0, the allowed_items of user 0, got 3"),
        ({"length_penalty": "1"}, TypeError, "length_penalty: expected a number, got str"),
        ({"length_penalty": True}, TypeError, "length_penalty: expected a number, got bool"),
        ({"length_penalty": math.nan}, ValueError, "length_penalty: expected a finite number, got nan"),
        ({"length_penalty": 1, "search": "diverse"}, ValueError, 'length_penalty: expected 0 with search="diverse"'),
        ({"normalize": "item"}, ValueError, "normalize: expected one of titles, items or None, got 'item'"),
        ({"normalize": "items", "search": "beam"}, ValueError, 'normalize: expected None or search="exact"'),
        ({"normalize": "items", "length_penalty": 1.0}, ValueError, "normalize: expected None with a length_penalty"),
        ({"user_ids": [1]}, ValueError, r"user_ids: expected one per user \(2\), got 1"),
        ({"user_ids": "ab"}, TypeError, "user_ids: expected a sequence of names, got str"),
        ({"user_ids": [1, []]}, TypeError, r"user_ids\[1\]: expected something hashable, got list"),
        ({"user_cache": 5}, TypeError, "user_cache: expected a UserCache or None, got int"),
        ({"max_expansions": 0}, ValueError, "max_expansions: expected at least 1, got 0"),
        ({"max_expansions": 5, "search": "beam"}, ValueError, 'max_expansions: expected None or search="exact"'),
        ({"max_expansions": 5, "normalize": "items"}, ValueError, "max_expansions: expected None with normalize"),
    ],
)
def test_errors_name_the_argument(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    model = make_model(make_titles(9))
    given = {"policy": POLICIES["text"], "k": 3, "num_beams": 3, "search": "exact", **arguments}
    with pytest.raises(error, match=message):
        model.recommend([[5], [0, 1]], **given)


# ------------------------------------------------------------------ real titles


def small_model(catalog: pk.Catalog, vocabulary: int, train: bool) -> Any:
    """Random weights, or some that have seen the titles: peaked where few tokens can follow."""
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        initializer_range=0.3 if not train else 0.05,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    if train:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for step in range(40):
            titles = [[2, *catalog.tokens(i).tolist(), 0] for i in range(step % 20, len(catalog), 20)]
            tokens = torch.nn.utils.rnn.pad_sequence(
                [torch.tensor(title) for title in titles], batch_first=True, padding_value=-100
            )
            model(input_ids=tokens.clamp(min=0), labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return model.double().eval()


@pytest.mark.parametrize("trained", [False, True], ids=["random", "trained"])
def test_all_titles_of_ml_100k(shared_data: Path, trained: bool) -> None:
    """Real titles, of which dozens begin another and two dozen are shared; every one of them scored."""
    parquet = pytest.importorskip("pyarrow.parquet")
    items = parquet.read_table(shared_data / "ml-100k" / "items.parquet").to_pydict()
    names = dict(zip(items["item"], items["title"], strict=True))
    tokenizer = scratch.fit_tokenizer(names.values(), 600)
    catalog = pk.Catalog.from_titles(names, tokenizer)
    plain = small_model(catalog, len(tokenizer), trained)
    prompt = pk.Prompt(prefix=[1], separator=[2], suffix=[3], response_end=[0])
    model = pk.PatchedCausalLM(copy.deepcopy(plain), catalog, prompt)
    plain.set_attn_implementation("sdpa")
    policy, histories = pk.ItemPatches(keep_text=2), [list(names)[:6], list(names)[100:103]]
    titles = {item: catalog.tokens(number).tolist() for number, item in enumerate(names)}
    sequences = [[*title, 0] for title in titles.values()]
    tables = []
    for history in histories:
        rows = prompt_rows(model, plain, history, policy)
        scores = [sequence_scores(plain, rows, sequences[at : at + 256]) for at in range(0, len(names), 256)]
        tables.append(dict(zip(names, [score for part in scores for score in part], strict=True)))

    def check(rows: Sequence[Ranked], k: int, seen: bool = False) -> None:
        for row, table, history in zip(rows, tables, histories, strict=True):
            assert_ranked(row, table, titles, k, history if seen else ())

    everything = model.recommend(histories, policy, len(names), len(names))
    check(everything, len(names))
    check(model.recommend(histories, policy, 50, len(names), exclude_seen=True), 50, seen=True)
    check(model.recommend(histories, policy, 20, 20, "exact", max_expansions=5000), 20)
    check(model.recommend(histories, policy, 20, 64, "exact", exclude_seen=True, max_expansions=5000), 20, seen=True)
    for row, table in zip(model.score_items(histories, policy), tables, strict=True):
        np.testing.assert_allclose(row, list(table.values()), rtol=0, atol=1e-9)
    for row, table in zip(model.recommend(histories, policy, 20, 20, "exact", normalize="items"), tables, strict=True):
        expected = normalized(table, titles, names, by_item=True)
        assert [item for item, _ in row] == ranked(expected, titles, 20)


# ------------------------------------------------------------------ what a step waits for


class StubPrompts:
    """Random logits in place of a model."""

    def __init__(self, n_users: int, max_rows: int) -> None:
        self.num_users, self.max_rows, self.steps = n_users, max_rows, 0
        self.logits = torch.randn(n_users, 101, dtype=torch.float64)
        self._suffixes = Suffixes(max_rows, torch.device("cpu"))
        self.live, self.keep = self._suffixes.live, self._suffixes.keep

    @property
    def num_rows(self) -> int:
        return self._suffixes.num_rows

    def step(self, parent: Tensor, user: Tensor, token: Tensor, shape: StepShape) -> Tensor:
        self.steps += 1
        self._suffixes.advance(parent, shape.depth)
        return torch.randn(len(token), 101, dtype=torch.float64)


class NoWaiting(TorchDispatchMode):
    """Fails on operators whose result has a size that only the device knows, or that read from the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        waits = ("nonzero", "_local_scalar_dense", "unique", "masked_select", "equal", "bincount", "histc")
        assert not any(name.startswith(f"aten::{word}") for word in waits), name
        if name.startswith("aten::repeat_interleave"):
            assert (kwargs or {}).get("output_size") is not None
        if name.startswith(("aten::index.", "aten::index_put", "aten::_index_put")):
            assert not any(i is not None and i.dtype is torch.bool for i in args[1]), "boolean mask"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("search", "has_prior"), [("beam", False), ("exact", False), ("diverse", False), ("beam", True), ("exact", True)]
)
def test_a_step_waits_for_the_device_once(search: str, has_prior: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    titles = make_titles(60)
    trie = Trie.from_catalog(make_model(titles).catalog, [96])
    assert trie.num_first_tokens > 1 and trie.subtrees.most_children[1] > 1  # read once per trie
    allowed = torch.rand(5, 60) < 0.8
    running = trie.running_count(allowed)
    prior = trie.best_of(torch.where(allowed, torch.randn(5, 60).double(), -math.inf)) if has_prior else None
    prompts: Any = StubPrompts(5, 5000)
    reads = []
    original = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda self: reads.append(self.shape) or original(self))
    with NoWaiting():
        if search == "diverse":
            diverse_search(prompts, trie, running, 6)
        else:
            search_titles(prompts, trie, running, 3, 3, 0.0, 200 if search == "exact" else None, prior)
    # the last one says that nothing is left; the levels before it may have been fed at once
    assert 3 < len(reads) == prompts.steps + 1 or (search != "exact" and prompts.steps < len(reads) <= trie.depth)
    assert all(math.prod(shape) < 20 for shape in reads)
