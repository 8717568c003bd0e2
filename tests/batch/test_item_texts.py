# SPDX-License-Identifier: Apache-2.0
"""Input texts apart from titles: histories are those of a catalogue of texts, responses those of one of titles."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import cases
import numpy as np
import pytest
import torch

import patchkern as pk
from patchkern.batch import planner, planning
from patchkern.batch.catalog_diff import compare
from patchkern.batch.planned_layout import check_titles
from patchkern.models.catalog_file import read_catalog, write_catalog

PROMPT = pk.Prompt(prefix=[1, 2], separator=[3], suffix=[4, 5], response_end=[6])
LIST = pk.Prompt(prefix=[1, 2], separator=[3], suffix=[3], response_end=[3])
POLICIES = [
    pk.TextOnly(max_items=None),
    pk.TextOnly(max_items=4),
    pk.ItemPatches(keep_text=2, max_items=None),
    pk.ItemPatches(keep_text=0, max_items=None),
    pk.SessionPatches(group_size=2, max_items=None, align="start"),
]


def catalogs(n_items: int = 9) -> tuple[pk.Catalog, pk.Catalog, pk.Catalog]:
    """One with texts, its titles alone, its texts alone; ids are not positions."""
    rng = np.random.default_rng(3)
    ids = [f"item {number}" for number in rng.permutation(n_items)]
    titles, texts = (
        pk.Catalog.from_token_ids(rng.integers(10, 60, sizes.sum()), np.append(0, sizes.cumsum()), ids)
        for sizes in (rng.integers(1, 4, n_items), rng.integers(1, 9, n_items))
    )
    both = pk.Catalog.from_token_ids(titles.token_ids, titles.offsets, ids, texts=texts)
    return both, titles, texts


def histories(catalog: pk.Catalog) -> list[list[str]]:
    rng = np.random.default_rng(4)
    return [rng.choice(catalog.item_ids, size).tolist() for size in (0, 1, 12, 5)]


def planes(layout: Any) -> dict[str, Any]:
    """All that a layout says, but for the catalogue's fingerprint."""
    return {
        name: value.tolist() if isinstance(value, torch.Tensor) else value
        for name, value in vars(layout).items()
        if name not in ("catalog_fingerprint", "transpose", "identities")
    }


def with_responses(layout: Any, titles: pk.Catalog, targets: list[str], prompt: pk.Prompt) -> dict[str, list[int]]:
    """Rows, labels and positions of a layout without targets, each user's response appended."""
    rows: dict[str, list[int]] = {"lo": [], "hi": [], "labels": [], "position_ids": []}
    cu_seqlens = layout.cu_seqlens.tolist()
    for user, item in enumerate(titles.index_of(targets).tolist()):
        first, end = cu_seqlens[user : user + 2]
        response = [*titles.tokens(item).tolist(), *prompt.response_end]
        rows["lo"] += layout.lo[first:end].tolist() + [-1 - token for token in response]
        rows["hi"] += layout.hi[first:end].tolist() + [0] * len(response)
        rows["labels"] += [-100] * (end - first) + response
        rows["position_ids"] += list(range(end - first + len(response)))
    return rows


@pytest.mark.parametrize("numpy", [False, True])
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_samples(monkeypatch: pytest.MonkeyPatch, policy: Any, numpy: bool) -> None:
    if numpy:
        monkeypatch.setattr(planner, "active", planning)
    both, titles, texts = catalogs()
    users = histories(both)
    read = pk.build_layout(texts, users, policy, PROMPT)
    assert planes(pk.build_layout(both, users, policy, PROMPT)) == planes(read)
    assert pk.row_counts(both, users, policy, PROMPT).tolist() == np.diff(read.cu_seqlens).tolist()
    targets = both.item_ids[[0, 3, 8, 5]].tolist()
    layout = pk.build_layout(both, users, policy, PROMPT, targets)
    expected = with_responses(read, titles, targets, PROMPT)
    assert {name: getattr(layout, name).tolist() for name in expected} == expected
    for name in ("items", "token_ids", "offsets", "title_index", "history_tokens", "history_rows"):
        assert planes(layout)[name] == planes(read)[name]
    assert layout.max_token_id == max(max(-1 - layout.lo.min().item(), 0), max(layout.token_ids.tolist(), default=-1))
    layout._check(exact=True)


@pytest.mark.parametrize("head", ["items", "both"])
def test_samples_of_items(head: str) -> None:
    both, _, texts = catalogs()
    users, targets = histories(both), both.item_ids[[0, 3, 8, 5]].tolist()
    policy = pk.ItemPatches(keep_text=2, max_items=None)
    layout = pk.build_layout(both, users, policy, PROMPT, targets, head=head)
    assert layout.item_labels is not None and layout.item_rows is not None
    assert layout.item_labels.tolist() == both.index_of(targets).tolist()
    read = pk.build_layout(texts, users, policy, PROMPT, targets, head="items")
    within = layout.item_rows - layout.cu_seqlens[:-1]
    assert within.tolist() == (read.item_rows - read.cu_seqlens[:-1]).tolist()
    if head == "items":
        assert planes(layout) == planes(read)


@pytest.mark.parametrize("prompt", [PROMPT, LIST], ids=["prompt", "list"])
@pytest.mark.parametrize("head", ["titles", "items", "both"])
@pytest.mark.parametrize("policy", POLICIES[1:], ids=str)
def test_training(policy: Any, head: str, prompt: pk.Prompt) -> None:
    """A trunk and its branches hold, span by span, the rows of one sample per target."""
    both, _, _ = catalogs()
    users = [history for history in histories(both) if len(history) > 2]
    ranges = [[2, len(history) - 1] for history in users]
    layout = pk.build_training_layout(both, users, policy, prompt, ranges, block_size=1, head=head)
    assert pk.training_rows(both, users, policy, prompt, ranges, block_size=1, head=head).sum() == layout.num_rows
    positions = [(history, at) for history, (first, last) in zip(users, ranges, strict=True)
                 for at in range(first, last + 1)]  # fmt: skip
    # with blocks of one item, a sample's history is what build_layout cuts it to
    alone = [
        pk.build_layout(both, [history[:at]], policy, prompt, [history[at]], head=head) for history, at in positions
    ]
    seen = []
    for span in range(layout.num_users):
        first, end = layout.cu_seqlens[span : span + 2].tolist()
        seen.append([meaning(layout, row) for row in [*cases.rows_before(layout, span), *range(first, end)]])
    if head == "items":
        assert layout.item_labels is not None
        assert layout.item_labels.tolist() == [both.index_of([history[at]])[0] for history, at in positions]
        return
    assert layout.logit_labels.tolist() == [token for one in alone for token in one.logit_labels.tolist()]
    trunks = layout.num_users - len(positions)
    assert [seen[trunks + sample] for sample in range(len(positions))] == [
        [meaning(one, row) for row in range(one.num_rows)] for one in alone
    ]


def meaning(layout: Any, row: int) -> Any:
    if layout.lo[row] < 0:
        return int(layout.lo[row])
    pooled = layout.items[layout.lo[row] : layout.hi[row]].tolist()
    return [layout.token_ids[layout.offsets[title] : layout.offsets[title + 1]].tolist() for title in pooled]


def test_what_is_pooled_and_hashed() -> None:
    both, _, texts = catalogs()
    weight = torch.randn(60, 8, dtype=torch.float64)
    assert torch.equal(pk.item_table(both, weight).rows, pk.item_table(texts, weight).rows)
    policy = pk.ItemPatches(keep_text=0)
    own, of_texts = (pk.build_layout(catalog, histories(both), policy, PROMPT) for catalog in (both, texts))
    assert np.array_equal(pk.row_hashes(own), pk.row_hashes(of_texts))
    table = pk.item_table(both, weight)
    assert torch.equal(pk.pool_rows(weight, own, table=table), pk.pool_rows(weight, own))
    with pytest.raises(ValueError, match="table: expected one of the layout's catalogue"):
        pk.pool_rows(weight, own, table=pk.item_table(texts, weight))


def test_the_catalogue_itself(tmp_path: Path) -> None:
    words = ["alien", "aliens", "heat", "film", "by", "scott", "cameron"]

    def tokenizer(text: str) -> list[int]:
        return [words.index(word) for word in text.split()]

    titles = {7: "alien", 9: "aliens", 4: "heat"}
    texts = {4: "heat film", 9: "aliens film by cameron", 7: "alien film by scott"}
    catalog = pk.Catalog.from_titles(titles, tokenizer, texts)
    plain = pk.Catalog.from_titles(titles, tokenizer)
    assert repr(catalog) == "Catalog(3 items, 3 tokens, with titles, texts of 10 tokens)"
    assert catalog.titles == ("alien", "aliens", "heat") and catalog.max_token_id == 6
    assert catalog.texts is not None and catalog.texts.titles == tuple(texts[item] for item in titles)
    assert catalog.inputs is catalog.texts and plain.inputs is plain
    assert catalog.distinct_tokens == frozenset(range(7)) and catalog.fingerprint != plain.fingerprint
    write_catalog(tmp_path / "catalog", catalog)
    for again in (pickle.loads(pickle.dumps(catalog)), read_catalog(tmp_path / "catalog")):
        assert again.fingerprint == catalog.fingerprint and again.texts.titles == catalog.texts.titles
    # who has no texts, and who has others, is told
    with pytest.raises(ValueError, match="catalog: expected input texts, as the model was saved with, got none"):
        compare(catalog, plain)
    other = pk.Catalog.from_titles(titles, tokenizer, {**texts, 9: "aliens film by scott"})
    assert compare(catalog, other).renamed.tolist() == [9]
    assert "'aliens film by cameron' before" in str(compare(catalog, other).examples)
    # a text's control tokens are refused as a title's are
    with pytest.raises(ValueError, match="token 5, the prompt's separator, got it in item 7, 'alien film by scott'"):
        check_titles(catalog, pk.Prompt(separator=[5]))


def test_what_is_refused() -> None:
    both, titles, texts = catalogs()
    with pytest.raises(ValueError, match="texts: expected one for each of the 2 titles and no others"):
        pk.Catalog.from_titles({1: "a", 2: "b"}, lambda text: [len(text)], {1: "a"})
    with pytest.raises(ValueError, match="texts: expected one for each of the 1 titles and no others"):
        pk.Catalog.from_titles({1: "a"}, lambda text: [len(text)], {1: "a", 2: "b"})
    with pytest.raises(ValueError, match="texts: expected at least one token per item, got none for item 1"):
        pk.Catalog.from_titles({1: "a"}, lambda text: [len(text)], {1: " "})
    with pytest.raises(TypeError, match="texts: expected a Catalog or None"):
        pk.Catalog.from_token_ids([1], [0, 1], texts={0: "a"})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="texts: expected a catalogue without texts of its own"):
        pk.Catalog.from_token_ids(titles.token_ids, titles.offsets, titles.item_ids, texts=both)
    with pytest.raises(ValueError, match="texts: expected the catalogue's 9 item ids in its order"):
        pk.Catalog.from_token_ids(titles.token_ids, titles.offsets, texts=texts)
