# SPDX-License-Identifier: Apache-2.0
"""GGUF files, written here: what is read can be trained and saved as if it had never been quantised."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from gguf_cases import CHAT, write_gguf

from patchkern.models import gguf_file
from patchkern.models.gguf_file import is_gguf, read_gguf, read_gguf_tokenizer


def test_a_quantised_model_is_read_and_saved(tmp_path: Path) -> None:
    weights = write_gguf(tmp_path / "tiny.gguf", quantised=True)
    state = torch.get_rng_state()
    model = read_gguf(tmp_path / "tiny.gguf")
    assert torch.equal(torch.get_rng_state(), state)
    assert isinstance(model, transformers.LlamaForCausalLM) and model.dtype == torch.float32
    assert torch.equal(model.model.layers[0].mlp.down_proj.weight, torch.from_numpy(weights["blk.0.ffn_down.weight"]))
    assert model.lm_head.weight is model.model.embed_tokens.weight, "tied where the file has no output matrix"
    assert model.name_or_path == str(tmp_path / "tiny.gguf")
    model.save_pretrained(tmp_path / "folder")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "folder")
    assert all(torch.equal(again.state_dict()[name], value) for name, value in model.state_dict().items())
    assert not hasattr(again.config, "quantization_config")
    loss = model(torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert read_gguf(tmp_path / "tiny.gguf", torch.bfloat16).dtype == torch.bfloat16


def test_its_tokenizer_has_its_chat_template(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    tokenizer = read_gguf_tokenizer(tmp_path / "tiny.gguf")
    assert tokenizer.chat_template == CHAT and tokenizer.eos_token == "<|end|>"
    assert tokenizer.decode(tokenizer("Alien\n", add_special_tokens=False)["input_ids"]) == "Alien\n"


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf", reason="the package gguf writes and reads GGUF files")
    assert is_gguf("x/y.GGUF") and not is_gguf("x/gguf")
    with pytest.raises(FileNotFoundError, match="path: expected a GGUF file, found none"):
        read_gguf(tmp_path / "none.gguf")
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(64))
    for read in (read_gguf, read_gguf_tokenizer):
        with pytest.raises(ValueError, match=r"broken.gguf: not a GGUF file that transformers reads"):
            read(broken)
    monkeypatch.setattr(gguf_file, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"broken.gguf is a GGUF file; install gguf to read it"):
        read_gguf(broken)
