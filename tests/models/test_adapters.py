# SPDX-License-Identifier: Apache-2.0
"""Adapters over a base whose embedding was resized before they were made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from model_cases import CATALOG, VOCABULARY, batch_of, lora, tiny
from safetensors.torch import load_file, save_file

import patchkern as pk
from patchkern.models.adapters import add_lora, untrained_markers
from patchkern.models.scratch import fit_tokenizer

ALPHABET = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
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


# ------------------------------------------------------------------ an adapter for training


TEMPLATE = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}assistant"


def words_of(form: str, tokenizer: Any) -> pk.Prompt:
    """Markers that are added, that are named, or none."""
    tokenizer.chat_template = TEMPLATE
    if form == "named":
        names = ["<|m1|>", "<|m2|>", "<|m3|>"]
        tokenizer.add_special_tokens({"additional_special_tokens": names}, replace_extra_special_tokens=False)
        return pk.PromptWords("Seen [HISTORY_SEQUENCE].", markers=names).prompt(tokenizer)
    if form == "list":
        return pk.PromptWords("List them.", history="last").prompt(tokenizer)
    return pk.PromptWords("Seen [HISTORY_SEQUENCE].").prompt(tokenizer)


def plain_tokenizer() -> Any:
    core = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(["<e>", *ALPHABET])}, []))
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<e>")


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("form", ["added", "named", "list"])
def test_lora_trains_its_markers_is_read_again_and_merged(form: str, tied: bool, tmp_path: Path) -> None:
    tokenizer = plain_tokenizer()
    base = tiny("llama tied" if tied else "llama", vocab_size=257 + (3 if form == "named" else 0))
    base.save_pretrained(tmp_path / "base")
    prompt = words_of(form, tokenizer)
    markers = [] if form == "list" else [257, 258, 259]
    assert untrained_markers(prompt, tokenizer) == markers
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    if len(tokenizer) > base.get_input_embeddings().num_embeddings:
        base.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64, mean_resizing=False)
    before = base.get_input_embeddings().weight.detach().clone()

    catalog = pk.Catalog.from_titles({1: "Alien", 2: "Aliens", 3: "Brazil"}, tokenizer)
    adapted = add_lora(base, 4, prompt, tokenizer)
    model = pk.PatchedCausalLM(adapted, catalog, prompt, pk.ItemPatches(1)).train()
    layout = pk.build_layout(catalog, [[1, 2], [3, 1, 2]], model.policy, prompt, [3, 1])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(3):
        optimizer.zero_grad()
        model(layout).loss.backward()
        optimizer.step()
    table = model.eval().get_input_embeddings()(torch.arange(before.shape[0])).detach()
    moved = (table != before).any(1).nonzero()[:, 0].tolist()
    assert moved == markers, "of the embeddings, the markers' rows are trained, and no other"

    model.save_pretrained(tmp_path / "adapter", tokenizer=tokenizer)
    expected = model(layout).logits
    loaded = pk.PatchedCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(loaded(layout).logits, expected)
    merged = pk.PatchedCausalLM(loaded.hf_model.merge_and_unload(), catalog, prompt, loaded.policy).eval()
    torch.testing.assert_close(merged(layout).logits, expected)
    merged.save_pretrained(tmp_path / "merged", tokenizer=tokenizer)
    again = pk.PatchedCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert isinstance(again.hf_model, transformers.LlamaForCausalLM)
    assert torch.equal(again(layout).logits, merged(layout).logits)


def test_lora_refuses() -> None:
    with pytest.raises(ValueError, match="rank: expected"):
        add_lora(tiny("llama"), 0, pk.Prompt([3], [6], [8], [2]), plain_tokenizer())
