# SPDX-License-Identifier: Apache-2.0
"""Models by name: folders, GGUF files and, through a hub that is made up here, hub ids; and uploads to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, NoReturn

import huggingface_hub.errors
import pytest
import torch
from gguf_cases import write_gguf
from model_cases import CATALOG, PROMPT, batch_of, tiny

import patchkern as pk
from patchkern.models import hub, sources
from patchkern.models.scratch import fit_tokenizer
from patchkern.models.sources import locate, read_model, read_tokenizer


def nothing_there(*args: Any, **options: Any) -> NoReturn:
    raise huggingface_hub.errors.LocalEntryNotFoundError("no network")


def test_paths_are_where_they_are(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    tiny("llama").save_pretrained(tmp_path / "folder")
    assert locate(tmp_path / "folder") == tmp_path / "folder" and locate(str(tmp_path / "tiny.gguf")).is_file()
    assert read_model(tmp_path / "tiny.gguf", dtype=torch.bfloat16).dtype == torch.bfloat16
    assert read_model(tmp_path / "folder").config.model_type == "llama"
    assert read_tokenizer(tmp_path / "tiny.gguf").chat_template


@pytest.mark.parametrize("name", ["nowhere", "a/b/c", "some/model.gguf", "../up", "/gone"])
def test_names_that_are_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sources, "snapshot_download", None)  # not asked
    with pytest.raises(FileNotFoundError, match=r"--model: expected the folder of a model, a GGUF file or a hub id"):
        locate(name, "--model")


def test_hub_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pk.PatchedCausalLM(tiny("llama"), CATALOG, PROMPT, pk.TextOnly()).save_pretrained(tmp_path)
    asked = []

    def download(name: str, **options: Any) -> str:
        asked.append((name, options.get("revision")))
        return str(tmp_path)

    monkeypatch.setattr(sources, "snapshot_download", download)
    loaded = pk.PatchedCausalLM.from_pretrained("org/model", revision="v1")
    assert asked == [("org/model", "v1")]
    assert loaded.recommend(batch_of([4])[0], k=2) == pk.PatchedCausalLM.from_pretrained(tmp_path).recommend(
        batch_of([4])[0], k=2
    )
    monkeypatch.setattr(sources, "snapshot_download", nothing_there)
    with pytest.raises(FileNotFoundError, match=r"folder: 'org/model' is no folder here, and the hub did not give"):
        pk.PatchedCausalLM.from_pretrained("org/model")


# ------------------------------------------------------------------ uploads


class Api:
    """What is asked of `huggingface_hub.HfApi`."""

    uploaded: ClassVar[dict[str, list[str]]] = {}

    def __init__(self, token: str | None = None) -> None:
        assert token == "secret"

    def create_repo(self, repo_id: str, **options: Any) -> None:
        assert options == {"private": True, "exist_ok": True}

    def upload_folder(self, repo_id: str, folder_path: Path, **options: Any) -> Any:
        self.uploaded[repo_id] = sorted(path.name for path in Path(folder_path).iterdir())
        card = (Path(folder_path) / "README.md").read_text()
        assert card.startswith("---\nlibrary_name: patchkern\n") and "made up" in card
        return type("Commit", (), {"commit_url": f"hub/{repo_id}/1"})


def test_push_to_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "HfApi", Api)
    model = pk.PatchedCausalLM(tiny("llama"), CATALOG, PROMPT, pk.TextOnly())
    card = pk.ModelCard("A model", data="made up")
    tokenizer = fit_tokenizer(["one"], 300)
    url = model.push_to_hub("org/model", card=card, tokenizer=tokenizer, private=True, token="secret")
    assert url == "hub/org/model/1"
    wanted = {
        "README.md",
        "catalog.safetensors",
        "config.json",
        "model.safetensors",
        "patchkern.json",
        "tokenizer.json",
    }
    assert wanted <= set(Api.uploaded["org/model"])


def test_push_to_hub_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match="folder: expected a model saved by patchkern"):
        hub.upload(tmp_path, "org/model")
    model = pk.PatchedCausalLM(tiny("llama"), CATALOG, PROMPT)
    monkeypatch.setattr(hub.HfApi, "create_repo", nothing_there)
    with pytest.raises(ConnectionError, match=r"repo_id: 'org/model' could not be written .*no network.*is a hub"):
        model.push_to_hub("org/model")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="repo_id: expected a name such as 'org/model', got 'a/b/c'"):
        model.push_to_hub("a/b/c")


# ------------------------------------------------------------------ the card


def test_the_card_says_what_is_known(tmp_path: Path) -> None:
    tokenizer = fit_tokenizer(["one"], 300)
    model = pk.PatchedCausalLM(tiny("llama"), CATALOG, PROMPT, pk.ItemPatches(2))
    model.save_pretrained(tmp_path)
    words = pk.PromptWords("List them.", history="last")
    metrics = {"this model": {"HR@20": 0.21, "NDCG@20": 0.1}, "most popular": {"HR@20": 0.11}}
    card = pk.ModelCard("A model", "made up", "org/base", "apache-2.0", words, metrics, ["train.py --data x"])
    path = card.write(model, tmp_path)
    assert path == tmp_path / "README.md"
    text = path.read_text()
    assert "license: apache-2.0\nbase_model: org/base\n" in text
    assert "made up; a catalogue of 40 items." in text
    assert "ItemPatches(keep_text=2" in text and "- instruction: List them.\n- history: last\n" in text
    assert "- prefix: tokens [3, 4, 5]" in text
    assert "| | HR@20 | NDCG@20 |\n| --- | --: | --: |\n| this model | 0.21 | 0.1 |\n| most popular | 0.11 |  |" in text
    assert "```sh\ntrain.py --data x\n```" in text
    model.tokenizer = tokenizer
    with pytest.raises(TypeError, match=r"commands: expected a sequence of commands, got one text, 'train.py'"):
        pk.ModelCard("A model", "made up", commands="train.py")
    assert f"- prefix: `{tokenizer.decode([3, 4, 5])!r}`" in pk.ModelCard("A model", "made up").text(model)
