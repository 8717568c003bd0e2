# SPDX-License-Identifier: Apache-2.0
"""Adapters merged into their base give what they gave apart from it, also where they change one of tied embeddings."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from model_cases import CATALOG, PROMPT, batch_of, lora, tiny

import patchkern as pk
from patchkern.models.merging import merge_and_unload

pytest.importorskip("peft")

TOKENS = [3, 6, 7, 20, 30]
KINDS: dict[str, dict[str, Any]] = {
    "input": {"target_modules": ["q_proj", "embed_tokens"]},
    "output": {"target_modules": ["q_proj", "lm_head"]},
    "both": {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    "dora": {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": TOKENS},
    "tokens of the output": {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": TOKENS}},
    "neither": {"target_modules": ["q_proj"]},
}
REFUSED = ("input", "output", "both", "dora", "tokens of the output")  # merged in place they change the other end
STILL_TIED = ("tokens", "neither")
HISTORIES = batch_of([6, 2])[0]


def adapted(kind: str, family: str, folder: Path, **heads: Any) -> pk.PatchedCausalLM:
    """A model in float64 whose buffers are what those of a saved one are."""
    torch.manual_seed(0)
    window = {"sliding_window": 128} if family == "gemma3" else {}  # a search needs full attention
    tiny(family, **window).double().save_pretrained(folder)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model = pk.PatchedCausalLM(lora(base, **KINDS[kind]), CATALOG, PROMPT, pk.ItemPatches(2), **heads)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "item_" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.double().eval()


def answers(model: pk.PatchedCausalLM) -> list[Any]:
    """Lists and scores, by titles and, where there is a head, by items."""
    found: list[Any] = [model.recommend(HISTORIES, k=5), model.score_items(HISTORIES)]
    if model.item_head is not None:
        found += [model.recommend(HISTORIES, k=5, search="items"), model.score_items(HISTORIES, head="items")]
    return found


def assert_same(found: list[Any], expected: list[Any]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        if isinstance(ours, np.ndarray):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-10)
            continue
        for own, other in zip(ours, theirs, strict=True):
            assert [item for item, _ in own] == [item for item, _ in other]
            np.testing.assert_allclose([score for _, score in own], [score for _, score in other], atol=1e-10)


@pytest.mark.parametrize("family", ["llama tied", "llama", "gemma3"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_adapter_gives_what_it_gave_apart(kind: str, family: str, tmp_path: Path) -> None:
    model = adapted(kind, family, tmp_path / "base")
    expected = answers(model)
    model.hf_model = merge_and_unload(model.hf_model)
    assert not hasattr(model.hf_model, "peft_config")
    assert_same(answers(model), expected)
    ends: Any = model.get_input_embeddings(), model.get_output_embeddings()
    tied = family != "llama" and kind in STILL_TIED
    if kind != "both":  # what is added to the two is computed in another order
        assert (ends[0].weight is ends[1].weight) == tied
    tied = ends[0].weight is ends[1].weight
    assert model.config.tie_word_embeddings == tied
    model.save_pretrained(tmp_path / "merged")
    again = pk.PatchedCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert again.config.tie_word_embeddings == tied
    assert_same(answers(again), expected)


@pytest.mark.parametrize("family", ["llama tied", "gemma3"])
@pytest.mark.parametrize("kind", ["input", "saved"])
@pytest.mark.parametrize("item_embeddings", [False, True], ids=["", "own vectors"])
def test_an_item_head_reads_the_output_rows_that_it_read(
    kind: str, family: str, item_embeddings: bool, tmp_path: Path
) -> None:
    model = adapted(kind, family, tmp_path / "base", item_head=True, item_embeddings=item_embeddings)
    expected = answers(model)
    model.save_pretrained(tmp_path / "adapter")
    loaded = pk.PatchedCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert_same(answers(loaded), expected)
    loaded.hf_model = merge_and_unload(loaded.hf_model)
    assert_same(answers(loaded), expected)
    loaded.save_pretrained(tmp_path / "merged")
    assert_same(answers(pk.PatchedCausalLM.from_pretrained(tmp_path / "merged").eval()), expected)


@pytest.mark.parametrize("family", ["llama tied", "llama"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_merged_in_place_into_both_ends_is_refused(kind: str, family: str, tmp_path: Path) -> None:
    model = adapted(kind, family, tmp_path / "base")
    expected = answers(model)
    adapter: Any = model.hf_model
    adapter.merge_adapter()
    if family != "llama" and kind in REFUSED:
        for asked in (lambda: model.recommend(HISTORIES, k=5), lambda: merge_and_unload(model.hf_model)):
            with pytest.raises(
                ValueError, match=r"hf_model: expected an adapter that is apart .* call unmerge_adapter"
            ):
                asked()
        adapter.unmerge_adapter()
    assert_same(answers(model), expected)


def test_rounded_weights_are_merged_to_rounding(tmp_path: Path) -> None:
    model = adapted("input", "gemma3", tmp_path / "base").float()
    layout = pk.build_layout(CATALOG, HISTORIES, pk.ItemPatches(2), PROMPT)
    expected = model(layout).logits
    model.hf_model = merge_and_unload(model.hf_model)
    scale = float(expected.abs().max())
    assert scale > 0.1 and math.isfinite(scale)
    torch.testing.assert_close(model(layout).logits, expected, rtol=0, atol=1e-5 * scale)


def test_only_an_adapter_is_merged() -> None:
    with pytest.raises(TypeError, match="hf_model: expected a PeftModel, got LlamaForCausalLM"):
        merge_and_unload(tiny("llama"))
