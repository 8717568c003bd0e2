# SPDX-License-Identifier: Apache-2.0
"""By what a store knows a model, a user and a past."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import patchkern as pk
from patchkern.batch.hashes import item_hashes, row_hashes
from patchkern.serving.identity import Pasts, model_identity, user_key

pytest.importorskip("transformers", reason="transformers is not installed")
from item_model_cases import make_model
from model_cases import CATALOG, PROMPT, tiny

POLICY = {"name": "Experts", "block": 50}


def patched(kind: str = "llama", prompt: pk.Prompt = PROMPT, **overrides: Any) -> pk.PatchedCausalLM:
    return pk.PatchedCausalLM(tiny(kind, **overrides), CATALOG, prompt, pk.ItemPatches(0, None))


def test_a_model_that_was_saved_and_read_is_the_same(tmp_path: Path) -> None:
    model = patched()
    identity = model_identity(model, POLICY)
    assert len(identity) == 16 and identity == model_identity(patched(), dict(reversed(POLICY.items())))
    model.save_pretrained(tmp_path)
    assert model_identity(pk.PatchedCausalLM.from_pretrained(tmp_path), POLICY) == identity
    items = make_model()
    items.save_pretrained(tmp_path / "items")
    assert model_identity(pk.ItemModel.from_pretrained(tmp_path / "items"), POLICY) == model_identity(items, POLICY)


def test_what_computes_something_else_is_another() -> None:
    model = patched()
    seen = [model_identity(model, POLICY)]
    with torch.no_grad():
        next(model.parameters())[3, 1] += 1e-3
    seen.append(model_identity(model, POLICY))
    seen += [model_identity(patched(rms_norm_eps=1e-3), POLICY), model_identity(patched("qwen2"), POLICY)]
    seen.append(
        model_identity(patched(prompt=pk.Prompt(prefix=[3], separator=[6], suffix=[7], response_end=[2])), POLICY)
    )
    seen.append(model_identity(patched(prompt=PROMPT.with_special(experts=[0])), POLICY))
    seen.append(model_identity(patched().bfloat16(), POLICY))
    seen.append(model_identity(patched(), POLICY | {"block": 51}))
    assert len(set(seen)) == len(seen)
    suffix = pk.Prompt(prefix=PROMPT.prefix, separator=PROMPT.separator, suffix=[8], response_end=[2])
    assert model_identity(patched(prompt=suffix), POLICY) == seen[0]  # which stands behind what is compressed


def test_users_have_keys_of_their_own() -> None:
    names = [1, -1, "1", b"1", "", b"", "ä", "\ud800", 2**80, np.int64(7), np.str_("7")]
    keys = [user_key(name, "user_ids") for name in names]
    assert len(set(keys)) == len(names) and all(1 <= len(key) <= 480 for key in keys)
    assert user_key(7, "user_ids") == user_key(np.int32(7), "user_ids")
    for wrong in (1.5, True, None, ("a", 1), np.float64(1)):
        with pytest.raises(TypeError, match=r"user_ids\[3\]: expected an integer, a string or bytes for a store, got"):
            user_key(wrong, "user_ids[3]")
    with pytest.raises(ValueError, match="user_id: expected at most 479 bytes for a store, got 480"):
        user_key("ä" * 240, "user_id")


def test_pasts_are_what_was_read_in_order() -> None:
    token_ids, offsets = [5, 6, 7, 5, 6, 6, 5], [0, 2, 3, 5, 7]
    catalog = pk.Catalog.from_token_ids(token_ids, offsets)
    pasts = Pasts(catalog, by_item=False)
    assert pasts.hash_of(np.array([0, 1])) == pasts.hash_of(np.array([2, 1]))  # the same titles
    others = ([], [0], [0, 0], [0, 1], [1, 0], [3, 1], [0, 1, 0])
    assert len({pasts.hash_of(np.array(other, np.int64)) for other in others}) == len(others)
    by_item = Pasts(catalog, by_item=True)
    assert by_item.hash_of(np.array([0, 1])) != by_item.hash_of(np.array([2, 1]))
    longer = pk.Catalog.from_token_ids([9, *token_ids], [0, *(1 + end for end in offsets)])
    assert Pasts(longer, by_item=False).hash_of(np.array([1, 2])) == pasts.hash_of(np.array([0, 1]))


@pytest.mark.parametrize("by_item", [False, True])
def test_an_items_hash_tells_what_its_patch_does(by_item: bool) -> None:
    hashes = item_hashes(CATALOG, by_item)
    layout = pk.build_layout(CATALOG, [list(range(40))], pk.ItemPatches(0, None), pk.Prompt())
    patches = row_hashes(layout, by_item)
    same = hashes[:, None] == hashes
    assert np.array_equal(same, patches[:, None] == patches) and hashes.shape == (40,)


def test_texts_are_what_is_read() -> None:
    titles = {1: "Alien", 2: "Brazil"}
    plain, told = (
        pk.Catalog.from_titles(titles, lambda text: list(text.encode()), **more)
        for more in ({}, {"texts": {1: "Alien (1979)", 2: "Brazil"}})
    )
    same = item_hashes(plain) == item_hashes(told)
    assert same.tolist() == [False, True]
