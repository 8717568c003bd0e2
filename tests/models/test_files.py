# SPDX-License-Identifier: Apache-2.0
"""What `save_pretrained` writes and `from_pretrained` reads: bit for bit, whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from model_cases import ADAPTERS, CATALOG, MODELS, PROMPT, batch_of, lora, tiny
from torch import Tensor, nn

import patchkern as pk
from patchkern.models.attention import NAME
from patchkern.models.patched_lm import PatchedCausalLM


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
    assert description["format_version"] == 1
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
    good = {"format_version": 1, "prompt": PROMPT.to_dict(), "policy": None}
    for description, message in (
        ("{", "not a description"),
        ("[]", "not a description"),
        (json.dumps(good | {"format_version": 2}), "format_version: expected 1, got 2"),
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
