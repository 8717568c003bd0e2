# SPDX-License-Identifier: Apache-2.0
"""Prompts as token ids and as rows, against the rows of the model itself; what is no plain prompt is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import PROMPT, make_catalog, make_histories, make_prompt, make_titles
from hypothesis import given
from hypothesis import strategies as st
from vllm_cases import HISTORIES, save_run

import patchkern as pk
from patchkern.serving.vllm.export import export_model
from patchkern.serving.vllm.item_tokens import item_token_ids
from patchkern.serving.vllm.prompt_rows import PromptRows, as_prompt_embeds

CASES = make_titles(23, ids="gaps")
CATALOG, FIXED = make_catalog(dict(CASES)), make_prompt(PROMPT)


@given(
    st.lists(st.integers(0, 30), max_size=5),
    st.sampled_from([pk.TextOnly(7), pk.ItemPatches(3, None), pk.RandomItemPatches(0.5, 12), pk.ItemDropout(0.5, 1)]),
    st.integers(0, 5),
    st.sampled_from(["titles", "items"]),
)
def test_rows_looked_up_by_id_are_the_pooled_ones(lengths: list[int], policy: Any, seed: int, head: str) -> None:
    weight = torch.randn(97, 5, dtype=torch.float64)
    layout = pk.build_layout(CATALOG, make_histories(CASES, lengths, seed), policy, FIXED, head=head)
    ids = item_token_ids(layout, CATALOG, 97)
    assert [user.size for user in ids] == layout.cu_seqlens.diff().tolist() or not lengths
    table = torch.cat([weight, pk.item_table(CATALOG, weight).rows])
    flat = np.concatenate([np.zeros(0, np.int32), *ids])
    assert torch.equal(table[torch.from_numpy(flat).long()], pk.pool_rows(weight, layout))


def test_by_hand() -> None:
    catalog = pk.Catalog.from_token_ids([5, 6, 7, 8, 9], [0, 2, 3, 5], item_ids=["a", "b", "c"])
    prompt = pk.Prompt(prefix=[1], separator=[2], suffix=[3], response_end=[4])
    layout = pk.build_layout(catalog, [["c", "a", "c", "b"], [], ["b"]], pk.ItemPatches(keep_text=1), prompt)
    assert layout.title_index.tolist() == [2, 0]  # the layout's own titles are in another order
    ids = item_token_ids(layout, catalog, 100)
    assert [user.tolist() for user in ids] == [[1, 102, 2, 100, 2, 102, 2, 7, 3], [1, 3], [1, 7, 3]]
    assert all(user.dtype == np.int32 for user in ids)


SESSIONS = pk.SessionPatches(2, align="start")


def _layout(policy: Any = None, **options: Any) -> pk.PatchLayout:
    return pk.build_layout(CATALOG, make_histories(CASES, [12, 3]), policy or pk.ItemPatches(1), FIXED, **options)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: item_token_ids([1], CATALOG, 97), TypeError, r"layout: expected a PatchLayout, got list"),
        (lambda: item_token_ids(_layout(), None, 97), TypeError, r"catalog: expected a Catalog"),
        (lambda: item_token_ids(_layout(), CATALOG, 0), ValueError, r"vocab_size: .*got 0"),
        (lambda: item_token_ids(_layout(), CATALOG, 50), ValueError, r"token ids below 50, the vocabulary, got 9"),
        (lambda: item_token_ids(_layout(), CATALOG, 2**31 - 10), ValueError, r"vocab_size: expected room for 23 items"),
        (
            lambda: item_token_ids(_layout(SESSIONS), CATALOG, 97),
            ValueError,
            r"one item each, got one of 2.*PromptRows",
        ),
        (
            lambda: item_token_ids(_layout(targets=list(CASES)[:2]), CATALOG, 97),
            ValueError,
            r"prompts alone, got one with targets",
        ),
        (
            lambda: item_token_ids(_layout(), make_catalog(dict(make_titles(23, seed=4))), 97),
            ValueError,
            r"catalog that is served",
        ),
        (lambda: item_token_ids(replace(_layout(), catalog_fingerprint=None), CATALOG, 97), ValueError, r"another's"),
        (
            lambda: item_token_ids(replace(_layout(), vector_rows=torch.tensor([0])), CATALOG, 97),
            ValueError,
            r"rows of a memory",
        ),
        (
            lambda: item_token_ids(
                pk.build_training_layout(CATALOG, [list(CASES)] * 2, pk.ItemPatches(1), FIXED, [[3, 5], [2, 2]]),
                CATALOG,
                97,
            ),
            ValueError,
            r"one span per user, got spans with a prefix",
        ),
    ],
)
def test_refused(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


# ------------------------------------------------------------------ sessions, as rows


@pytest.mark.parametrize("item_embeddings", [False, True])
@pytest.mark.parametrize("policy", [SESSIONS, pk.ItemPatches(2), pk.SessionPatches(3, max_items=9)])
def test_prompt_rows_are_those_of_the_model(tmp_path: Path, policy: Any, item_embeddings: bool) -> None:
    model = save_run(tmp_path / "run", tied=False, item_embeddings=item_embeddings)
    export_model(tmp_path / "run", tmp_path / "served")
    make = PromptRows(tmp_path / "served")
    layout = pk.build_layout(model.catalog, [*HISTORIES, []], policy, model.prompt)
    rows = make(layout)
    assert torch.equal(torch.cat(rows), model.embed(layout).detach())
    assert [len(user) for user in rows] == layout.cu_seqlens.diff().tolist()
    alone = make(pk.build_layout(model.catalog, HISTORIES[1:2], policy, model.prompt))
    assert torch.equal(alone[0], rows[1])  # the same bytes, whoever is beside them
    # what is sent is a user's rows and nothing else of the batch
    assert len(as_prompt_embeds(rows[2])) < 4 * (rows[2].nbytes + 2000) / 3


def test_prompt_rows_in_another_dtype(tmp_path: Path) -> None:
    model = save_run(tmp_path / "run", item_embeddings=True)
    export_model(tmp_path / "run", tmp_path / "served")
    layout = pk.build_layout(model.catalog, HISTORIES, SESSIONS, model.prompt)
    rows = PromptRows(tmp_path / "served", torch.bfloat16)(layout)
    assert torch.equal(torch.cat(rows), model.bfloat16().embed(layout).detach())


def test_prompt_rows_refuse(tmp_path: Path) -> None:
    model = save_run(tmp_path / "run")
    export_model(tmp_path / "run", tmp_path / "served")
    with pytest.raises(ValueError, match=r"folder: expected an exported model"):
        PromptRows(tmp_path / "run")
    make = PromptRows(tmp_path / "served")
    with pytest.raises(TypeError, match=r"layout: expected a PatchLayout"):
        make([[1, 2]])  # type: ignore[arg-type]
    other = pk.Catalog.from_token_ids([55, 56], [0, 1, 2])
    with pytest.raises(ValueError, match=r"catalog that is served"):
        make(pk.build_layout(other, [[0, 1]], SESSIONS, model.prompt))
    (tmp_path / "served" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"folder: expected model.embed_tokens.weight in"):
        PromptRows(tmp_path / "served")
