# SPDX-License-Identifier: Apache-2.0
"""Adapters over a base whose embedding was resized before they were made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from model_cases import CATALOG, VOCABULARY, batch_of, lora, tiny
from safetensors.torch import load_file, save_file

import patchkern as pk
from patchkern.models.scratch import fit_tokenizer

ADDED = 3  # markers; the rows beyond them only fill up the last multiple
PROMPT = pk.Prompt(prefix=[3, VOCABULARY], separator=[VOCABULARY + 1], suffix=[VOCABULARY + 2, 8], response_end=[2])
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": ["q_proj"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "modules_to_save": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [VOCABULARY + n for n in range(ADDED)]},
}


def base_of(folder: Path, multiple: int | None) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(VOCABULARY + ADDED, pad_to_multiple_of=multiple, mean_resizing=False)
    return model


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("multiple", [None, 64], ids=["exact", "padded"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_base_is_resized_before_the_adapter_is_read(
    kind: str, multiple: int | None, tied: bool, tmp_path: Path
) -> None:
    if kind == "modules_to_save" and tied:
        pytest.skip("two copies of one tensor")
    tiny("llama tied" if tied else "llama").save_pretrained(tmp_path / "base")
    base = base_of(tmp_path / "base", multiple)
    model = pk.PatchedCausalLM(lora(base, **KINDS[kind]), CATALOG, PROMPT, pk.ItemPatches(2)).eval()
    # a tokenizer beside it, shorter than the padded embedding, from which peft would take the size
    model.save_pretrained(tmp_path / "adapter", tokenizer=fit_tokenizer(["one", "two"], 300))
    assert json.loads((tmp_path / "adapter" / "patchkern.json").read_text())["vocabulary_size"] == (
        128 if multiple else 86
    )
    histories = batch_of([6, 2])[0]
    expected = model.recommend(histories, k=5)
    if kind == "embedding" and not tied:  # peft does not save the other end then
        with pytest.raises(ValueError, match=r"base_model: .* the adapter has no lm_head to take them from"):
            pk.PatchedCausalLM.from_pretrained(tmp_path / "adapter")
        assert (
            pk.PatchedCausalLM.from_pretrained(tmp_path / "adapter", base_model=base).eval().recommend(histories, k=5)
        )
        return
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    for base_model in (None, plain, base_of(tmp_path / "base", multiple)):
        loaded = pk.PatchedCausalLM.from_pretrained(tmp_path / "adapter", base_model=base_model).eval()
        assert loaded.recommend(histories, k=5) == expected


def test_rows_that_nobody_has_are_an_error(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "base")
    model = pk.PatchedCausalLM(lora(base_of(tmp_path / "base", 64), **KINDS["lora"]), CATALOG, PROMPT)
    model.save_pretrained(tmp_path / "adapter")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    kept = {name: value for name, value in load_file(weights).items() if "embed_tokens" not in name}
    assert len(kept) == len(load_file(weights)) - 1
    save_file(kept, weights, {"format": "pt"})
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    for base_model in (None, plain):
        with pytest.raises(
            ValueError, match=r"base_model: .* with 128 rows .* 83; the adapter has no model.embed_tokens"
        ):
            pk.PatchedCausalLM.from_pretrained(tmp_path / "adapter", base_model=base_model)
    assert plain.get_input_embeddings().num_embeddings == VOCABULARY


def test_an_adapter_that_names_no_base_needs_one(tmp_path: Path) -> None:
    base = tiny("llama")
    base.config._name_or_path = base.name_or_path = ""
    pk.PatchedCausalLM(lora(base, **KINDS["lora"]), CATALOG, pk.Prompt([3], [6], [8], [2])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"base_model: expected a model, because .* names none"):
        pk.PatchedCausalLM.from_pretrained(tmp_path)
    loaded = pk.PatchedCausalLM.from_pretrained(tmp_path, base_model=tiny("llama"), is_trainable=True)
    assert any(parameter.requires_grad for parameter in loaded.parameters())
