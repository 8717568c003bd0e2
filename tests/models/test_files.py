# SPDX-License-Identifier: Apache-2.0
"""What `save_pretrained` writes and `from_pretrained` reads: bit for bit, whole or not at all."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from model_cases import ADAPTERS, CATALOG, MODELS, PROMPT, TITLES, VOCABULARY, batch_of, lora, tiny
from torch import Tensor, nn

import patchkern as pk
from patchkern.models.attention import NAME
from patchkern.models.catalog_file import write_catalog
from patchkern.models.patched_lm import PatchedCausalLM
from patchkern.models.scratch import fit_tokenizer, scratch_model, scratch_prompt


def logits_of(model: PatchedCausalLM) -> Tensor:
    layout = pk.build_layout(CATALOG, batch_of([25, 0, 6])[0], pk.SessionPatches(3), PROMPT)
    with torch.no_grad():
        return model.eval()(layout).logits


@pytest.mark.parametrize("kind", MODELS)
def test_saved_model_loads_bit_for_bit(kind: str, tmp_path: Path) -> None:
    model = PatchedCausalLM(tiny(kind), CATALOG, PROMPT, pk.SessionPatches(3, align="start"))
    model.save_pretrained(tmp_path / "deep" / "folder")
    loaded = PatchedCausalLM.from_pretrained(tmp_path / "deep" / "folder", CATALOG)
    assert torch.equal(logits_of(loaded), logits_of(model))
    assert (loaded.prompt, loaded.policy) == (model.prompt, model.policy)
    assert loaded.config._attn_implementation == NAME
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["folder"]
    description = json.loads((tmp_path / "deep" / "folder" / "patchkern.json").read_text())
    assert description["format_version"] == 2
    assert description["vocabulary_size"] == VOCABULARY
    assert description["special_token_ids"] == {
        "history_start": [5],
        "history_separator": [6],
        "history_end": [7],
        "response_end": [2],
    }


def test_loading_takes_transformers_arguments(tmp_path: Path) -> None:
    PatchedCausalLM(tiny("llama"), CATALOG, PROMPT).save_pretrained(tmp_path / "m")
    loaded = PatchedCausalLM.from_pretrained(tmp_path / "m", CATALOG, dtype=torch.bfloat16, attn_implementation="eager")
    assert loaded.hf_model.dtype == torch.bfloat16
    assert loaded.config._attn_implementation == "eager"
    assert loaded.policy is None


@pytest.mark.parametrize("name", ADAPTERS)
def test_saved_adapter_loads_bit_for_bit(name: str, tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = PatchedCausalLM(lora(base, **ADAPTERS[name]), CATALOG, PROMPT, pk.TextOnly())
    model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    expected = logits_of(model)
    by_name = PatchedCausalLM.from_pretrained(tmp_path / "adapter", CATALOG)
    given = PatchedCausalLM.from_pretrained(tmp_path / "adapter", CATALOG, base_model=tiny("llama"))
    for loaded in (by_name, given):
        assert torch.equal(logits_of(loaded), expected)
        assert loaded.policy == pk.TextOnly()


# ------------------------------------------------------------------ the catalogue travels with the model


def titled(titles: dict[Any, str], tokenizer: Any = None) -> pk.Catalog:
    """Titles that are numbers: the token ids."""
    return pk.Catalog.from_titles(titles, tokenizer or (lambda title: [int(word) for word in title.split()]))


WORDS = {item: " ".join(map(str, tokens)) for item, tokens in enumerate(TITLES)}


@pytest.mark.parametrize("ids", ["int", "str"])
def test_a_folder_alone_recommends_as_the_saved_model_did(ids: str, tmp_path: Path) -> None:
    catalog = titled({(f"#{item}" if ids == "str" else 7 * item - 50): title for item, title in WORDS.items()})
    model = PatchedCausalLM(tiny("llama"), catalog, PROMPT, pk.ItemPatches(2)).eval()
    model.save_pretrained(tmp_path / "m")
    loaded = PatchedCausalLM.from_pretrained(tmp_path / "m").eval()
    histories = [catalog.item_ids[[1, 5, 2]].tolist(), catalog.item_ids[[9]].tolist()]
    assert loaded.recommend(histories, k=5) == model.recommend(histories, k=5)
    assert loaded.catalog.titles == catalog.titles
    assert loaded.catalog.item_ids.tolist() == catalog.item_ids.tolist()
    assert loaded.catalog.fingerprint == catalog.fingerprint
    assert loaded.catalog_diff is None and loaded.tokenizer is None


def test_the_tokenizer_travels_where_it_is_given(tmp_path: Path) -> None:
    titles = {1: "The Matrix", 2: "Heat", 3: "Der Untergang ✓"}
    tokenizer = fit_tokenizer(titles.values(), 300)
    model = scratch_model(tokenizer, "tiny", num_hidden_layers=1)
    catalog = pk.Catalog.from_titles(titles, tokenizer)
    PatchedCausalLM(model, catalog, scratch_prompt(tokenizer)).save_pretrained(tmp_path / "m", tokenizer=tokenizer)
    loaded = PatchedCausalLM.from_pretrained(tmp_path / "m")
    again = pk.Catalog.from_titles(titles, loaded.tokenizer)
    assert again.fingerprint == catalog.fingerprint
    loaded.save_pretrained(tmp_path / "second")  # with the tokenizer it has
    assert PatchedCausalLM.from_pretrained(tmp_path / "second", again).tokenizer.get_vocab() == tokenizer.get_vocab()
    new = {item + 10: f"{title} again" for item, title in titles.items()}
    with pytest.warns(pk.CatalogWarning, match="no item id is one of the 3"):
        loaded = PatchedCausalLM.from_pretrained(tmp_path / "m", pk.Catalog.from_titles(new, tokenizer))
    with pytest.warns(pk.CatalogWarning), pytest.raises(ValueError, match="got other token ids for 3 of 3 new items"):
        PatchedCausalLM.from_pretrained(tmp_path / "m", titled(new, lambda title: [len(title)]))
    with pytest.raises(TypeError, match="tokenizer: expected a transformers tokenizer, got function"):
        loaded.save_pretrained(tmp_path / "third", tokenizer=lambda title: [1])
    assert not (tmp_path / "third").exists()


def test_another_catalogue_is_compared_with_the_saved_one(tmp_path: Path) -> None:
    model = PatchedCausalLM(tiny("llama"), titled(WORDS), PROMPT)
    model.save_pretrained(tmp_path / "m")

    def load(titles: dict[Any, str], **options: Any) -> PatchedCausalLM:
        return PatchedCausalLM.from_pretrained(tmp_path / "m", titled(titles), **options)

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a catalogue that grew, shrank and changed its order is nothing unusual
        grown = load({99: "12 13"} | {item: WORDS[item] for item in reversed(range(2, 40))})
        same = load(WORDS)
    assert str(grown.catalog_diff) == "1 new items, 2 gone, 0 of 38 with another title"
    assert same.catalog_diff is not None and same.catalog_diff.num_shared == 40
    exchanged = WORDS | {7: WORDS[4], 4: WORDS[7]}
    with pytest.warns(pk.CatalogWarning, match=r"0 new items, 0 gone, 2 of 40 .*item 4: '.*' before, '.*' now") as said:
        loaded = load(exchanged)
    assert loaded.catalog_diff is not None and loaded.catalog_diff.renamed.tolist() == [4, 7]
    assert said[0].filename == __file__
    shifted = {item: WORDS[(item + 1) % 40] for item in WORDS}
    with pytest.raises(ValueError, match=r"catalog: expected items with the titles .* 40 of 40 .*were ids exchanged"):
        load(shifted)
    with pytest.warns(pk.CatalogWarning, match="40 of 40"):
        load(shifted, renamed="allow")
    with pytest.raises(ValueError, match="renamed: expected 'error' or 'allow', got 'maybe'"):
        load(WORDS, renamed="maybe")
    other = titled(WORDS, lambda title: [82 - int(word) for word in title.split()])
    for renamed in ("error", "allow"):
        with pytest.raises(ValueError, match="catalog: expected titles tokenised by the model's tokenizer, got other"):
            PatchedCausalLM.from_pretrained(tmp_path / "m", other, renamed=renamed)
    with pytest.raises(TypeError, match="catalog: expected a Catalog or None, got dict"):
        PatchedCausalLM.from_pretrained(tmp_path / "m", WORDS)


def test_folders_of_version_1_need_their_catalogue(tmp_path: Path) -> None:
    model = PatchedCausalLM(tiny("llama"), CATALOG, PROMPT, pk.TextOnly(max_items=4))
    model.hf_model.save_pretrained(tmp_path)
    description = {
        "format_version": 1,
        "prompt": {"prefix": [3, 4, 5], "separator": [6], "suffix": [7, 8], "response_end": [2]},
        "policy": {"name": "TextOnly", "max_items": 4},
        "item_embeddings": False,
        "special_token_ids": {},
    }
    (tmp_path / "patchkern.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match=r"catalog: expected one, because .* give the one that it was trained with"):
        PatchedCausalLM.from_pretrained(tmp_path)
    loaded = PatchedCausalLM.from_pretrained(tmp_path, CATALOG)
    assert torch.equal(logits_of(loaded), logits_of(model))
    assert loaded.policy == model.policy and loaded.catalog_diff is None


def test_a_catalogue_of_another_save_is_noticed(tmp_path: Path) -> None:
    PatchedCausalLM(tiny("llama"), CATALOG, PROMPT).save_pretrained(tmp_path / "m")
    exchanged = pk.Catalog(CATALOG.token_ids, CATALOG.offsets, CATALOG.item_ids[::-1].copy(), CATALOG.titles)
    for other in (titled({1: "9 10"}), exchanged):
        write_catalog(tmp_path / "m" / "catalog.safetensors", other)
        with pytest.raises(ValueError, match=r"folder: expected the catalog that patchkern\.json tells of"):
            PatchedCausalLM.from_pretrained(tmp_path / "m")
    (tmp_path / "m" / "catalog.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"folder: expected catalog\.safetensors in"):
        PatchedCausalLM.from_pretrained(tmp_path / "m", CATALOG)


def test_folders_whose_fingerprint_has_no_ids_in_it_are_read(tmp_path: Path) -> None:
    PatchedCausalLM(tiny("llama"), CATALOG, PROMPT).save_pretrained(tmp_path / "m")
    path = tmp_path / "m" / "patchkern.json"
    description = json.loads(path.read_text())
    description["catalog"]["fingerprint"] = CATALOG.token_fingerprint
    path.write_text(json.dumps(description))
    assert PatchedCausalLM.from_pretrained(tmp_path / "m").catalog.fingerprint == CATALOG.fingerprint


# ------------------------------------------------------------------ whole or not at all


def test_saving_over_an_earlier_model_leaves_none_of_its_weights(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    first, second = (PatchedCausalLM(tiny("llama"), CATALOG, PROMPT) for _ in range(2))
    with torch.no_grad():
        second.hf_model.lm_head.weight.mul_(2)
    first.save_pretrained(folder)
    second.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    assert torch.equal(logits_of(PatchedCausalLM.from_pretrained(folder, CATALOG)), logits_of(second))
    first.save_pretrained(folder)
    assert [path.name for path in folder.glob("model*")] == ["model.safetensors"]
    assert torch.equal(logits_of(PatchedCausalLM.from_pretrained(folder, CATALOG)), logits_of(first))


def test_failed_save_leaves_the_earlier_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    model = PatchedCausalLM(tiny("llama"), CATALOG, PROMPT)
    model.save_pretrained(folder)
    expected = logits_of(model)

    def half_written(aside: Path, **kwargs: Any) -> None:
        (aside / "model.safetensors").write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(model.hf_model, "save_pretrained", half_written)
    with pytest.raises(OSError, match="no space left"):
        model.save_pretrained(folder)
    assert torch.equal(logits_of(PatchedCausalLM.from_pretrained(folder, CATALOG)), expected)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    PatchedCausalLM(tiny("llama"), CATALOG, PROMPT).save_pretrained(tmp_path / "m", is_main_process=False)
    assert not (tmp_path / "m").exists()


def test_unreadable_descriptions(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected patchkern\.json in .*was it saved by patchkern"):
        PatchedCausalLM.from_pretrained(tmp_path, CATALOG)
    for number in (9, 10):
        PatchedCausalLM(tiny("llama"), CATALOG, PROMPT).save_pretrained(tmp_path / "run" / f"checkpoint-{number}")
    with pytest.raises(
        FileNotFoundError, match=r"expected patchkern\.json in '.*run'; there is one in '.*checkpoint-10'"
    ):
        PatchedCausalLM.from_pretrained(tmp_path / "run", CATALOG)
    good = {"format_version": 1, "prompt": PROMPT.to_dict(), "policy": None}
    for description, message in (
        ("{", "not a description"),
        ("[]", "not a description"),
        (
            json.dumps(good | {"format_version": 3}),
            "format_version: expected 1 or 2, got 3; newer folders need a newer",
        ),
        (json.dumps(good | {"format_version": True}), "format_version: expected 1 or 2, got True"),
        (json.dumps(good | {"format_version": 2}), "vocabulary_size"),
        (json.dumps(good | {"format_version": 2, "vocabulary_size": -1}), "vocabulary_size: expected an integer in 1"),
        (json.dumps(good | {"format_version": 2, "vocabulary_size": 9, "catalog": 1}), "not a description"),
        (json.dumps({"format_version": 1, "policy": None}), "prompt"),
        (json.dumps(good | {"policy": {"name": "Magic"}}), "Magic"),
    ):
        (tmp_path / "patchkern.json").write_text(description)
        with pytest.raises(ValueError, match=message):
            PatchedCausalLM.from_pretrained(tmp_path, CATALOG)


@pytest.mark.parametrize("kind", ["llama", "gpt2 tied"])
def test_state_dict_names_each_tensor_once_and_loads_strictly(kind: str) -> None:
    model = PatchedCausalLM(tiny(kind), CATALOG, PROMPT)
    state = model.state_dict()
    assert len({tensor.data_ptr() for tensor in state.values()}) == len(state)
    other = PatchedCausalLM(tiny(kind), CATALOG, PROMPT)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(state)
    assert torch.equal(logits_of(other), logits_of(model))
    nested = nn.ModuleDict({"inside": other})  # as DistributedDataParallel nests it
    nested.load_state_dict({f"inside.{name}": tensor for name, tensor in state.items()})
