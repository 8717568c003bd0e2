# SPDX-License-Identifier: Apache-2.0
"""Exported folders: the checkpoint byte for byte, what vLLM reads of it, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import transformers
from vllm_cases import ITEMS, TITLES, make_model, save_run

import patchkern as pk
from patchkern.serving.__main__ import main
from patchkern.serving.vllm import plugin
from patchkern.serving.vllm.export import export_model
from patchkern.serving.vllm.served import read_served


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    save_run(folder, tied=False, item_embeddings=True, item_head=True)
    return folder


def test_the_checkpoint_stays_as_it_is(run: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    folder = tmp_path / "served"
    export_model(run, folder)
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    own = {"patchkern.json", "catalog.safetensors", "item_embeddings.safetensors", "item_head.safetensors"}
    assert {path.name for path in (folder / "patchkern").iterdir()} == own
    # whatever lies beside the weights with their ending, vLLM reads as weights
    assert [path.name for path in folder.glob("*.safetensors")] == ["model.safetensors"]
    for name in before.keys() - {"config.json"}:
        place = folder / "patchkern" / name if name in own else folder / name
        assert place.read_bytes() == before[name], name


def test_the_configuration_has_a_token_for_every_item(run: Path, tmp_path: Path) -> None:
    export_model(run, tmp_path / "served", head="items")
    was, now = (json.loads((folder / "config.json").read_text()) for folder in (run, tmp_path / "served"))
    changed = {name for name in now if now[name] != was.get(name)}
    assert changed == {"architectures", "vocab_size", "patchkern"} and was.keys() <= now.keys()
    assert now["architectures"] == ["PatchkernLlamaForCausalLM"]
    assert now["vocab_size"] == was["vocab_size"] + len(TITLES)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "served")
    assert config.patchkern == now["patchkern"]
    assert now["patchkern"] | {"catalog": ""} == {"vocab_size": was["vocab_size"], "head": "items", "catalog": ""}
    served = read_served(tmp_path / "served")
    assert served.head == "items" and served.item_embeddings and served.vocab_size == was["vocab_size"]
    assert served.catalog.item_ids.tolist() == ITEMS and isinstance(served.policy, pk.ItemPatches)


def test_what_the_model_learned_is_predicted(tmp_path: Path) -> None:
    model, tokenizer = make_model(item_head=True)
    for learned, head in (((), "titles"), (("titles", "items"), "titles"), (("items",), "items")):
        model.learned = learned
        model.save_pretrained(tmp_path / "run", tokenizer=tokenizer)
        export_model(tmp_path / "run", tmp_path / "served")
        assert read_served(tmp_path / "served").head == head
        export_model(tmp_path / "run", tmp_path / "served", "titles")
        assert read_served(tmp_path / "served").head == "titles"


def test_another_export_replaces_one(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "served"
    export_model(run, folder, "items")
    save_run(tmp_path / "plain")
    export_model(tmp_path / "plain", folder)
    assert read_served(folder).head == "titles"
    assert {path.name for path in (folder / "patchkern").iterdir()} == {"patchkern.json", "catalog.safetensors"}


def test_a_run_is_exported_from_its_last_checkpoint(tmp_path: Path) -> None:
    for step in (2, 10):
        save_run(tmp_path / "run" / f"checkpoint-{step}")
    (tmp_path / "run" / "checkpoint-10" / "note.txt").write_text("the last")
    export_model(tmp_path / "run", tmp_path / "served")
    assert (tmp_path / "served" / "note.txt").read_text() == "the last"
    with pytest.raises(ValueError, match="folder: expected another one than the run's"):
        export_model(tmp_path / "run", tmp_path / "run" / "checkpoint-10")


def test_parts_that_do_not_belong_together(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "served"
    export_model(run, folder)
    config = json.loads((folder / "config.json").read_text())
    with pytest.raises(ValueError, match=r"catalogue that its config.json tells of"):
        read_served(folder, config["patchkern"] | {"catalog": "0" * 32})
    with pytest.raises(ValueError, match=r"head: expected one of titles, items, got 'both'"):
        read_served(folder, config["patchkern"] | {"head": "both"})
    with pytest.raises(ValueError, match=r"configuration that this version reads"):
        read_served(folder, {"vocab_size": 10})
    for other in (run, tmp_path):
        with pytest.raises(ValueError, match=r"folder: expected an exported model"):
            read_served(other)


def test_refused(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "served"
    with pytest.raises(ValueError, match=r"head: expected one of titles, items, got 'both'"):
        export_model(run, out, "both")
    with pytest.raises(ValueError, match=r"folder: expected another one than the run's"):
        export_model(run, run)
    with pytest.raises(FileNotFoundError, match="run: expected a model saved by patchkern, or a run with checkpoints"):
        export_model(tmp_path, out)
    model, tokenizer = make_model()
    model.save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match=r"saved with its tokenizer"):
        export_model(tmp_path / "bare", out)
    model.save_pretrained(tmp_path / "titles", tokenizer=tokenizer)
    with pytest.raises(ValueError, match=r'head: expected "titles" for a model without an item head'):
        export_model(tmp_path / "titles", out, "items")
    open_ended = pk.PatchedCausalLM(model.hf_model, model.catalog, pk.Prompt(prefix=[0], suffix=[1]), model.policy)
    open_ended.save_pretrained(tmp_path / "open", tokenizer=tokenizer)
    with pytest.raises(ValueError, match=r"response_end"):
        export_model(tmp_path / "open", out)
    pk.ItemModel(model.catalog, width=16).save_pretrained(tmp_path / "ids")
    with pytest.raises(ValueError, match=r"PatchedCausalLM in .*, got an ItemModel"):
        export_model(tmp_path / "ids", out)
    for name, value, message in (
        ("architectures", ["GPT2LMHeadModel"], r"expected a model of one of LlamaForCausalLM, .*GPT2LMHeadModel"),
        ("vocab_size", 999, r"vocabulary of the size"),
    ):
        config = json.loads((tmp_path / "titles" / "config.json").read_text())
        (tmp_path / "titles" / "config.json").write_text(json.dumps(config | {name: value}))
        with pytest.raises(ValueError, match=message):
            export_model(tmp_path / "titles", out)
        (tmp_path / "titles" / "config.json").write_text(json.dumps(config))
    described = json.loads((tmp_path / "titles" / "patchkern.json").read_text())
    (tmp_path / "titles" / "patchkern.json").write_text(json.dumps(described | {"memory": {"slots": 4}}))
    with pytest.raises(ValueError, match=r"without a memory around it"):
        export_model(tmp_path / "titles", out)
    (tmp_path / "titles" / "patchkern.json").write_text(json.dumps(described))
    (tmp_path / "titles" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"merge_and_unload"):
        export_model(tmp_path / "titles", out)
    assert not out.exists()


def test_the_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["export", str(run), str(tmp_path / "served")])
    printed = capsys.readouterr().out
    assert f"--model {tmp_path}/served --logits-processors patchkern.serving.vllm.masks:ItemMasks" in printed
    assert "--dtype float32" in printed
    with pytest.raises(SystemExit, match=r"export: folder: expected another one"):
        main(["export", str(run), str(run)])


def test_the_plugin_registers_names_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    registered: dict[str, str] = {}

    class Registry:
        @staticmethod
        def get_supported_archs() -> set[str]:
            return set(registered)

        @staticmethod
        def register_model(name: str, where: str) -> None:
            assert name not in registered
            registered[name] = where

    fake: Any = ModuleType("vllm")
    fake.ModelRegistry = Registry
    monkeypatch.setitem(sys.modules, "vllm", fake)
    plugin.register()
    plugin.register()  # vLLM calls it in each process, and may call it again
    assert registered["PatchkernQwen3ForCausalLM"] == "patchkern.serving.vllm.models:PatchkernQwen3ForCausalLM"
    assert len(registered) == len(plugin.ARCHITECTURES)
    source = (Path(plugin.__file__).parent / "models.py").read_text()
    assert all(f"class {name}(ItemTokens, {name.removeprefix('Patchkern')}):" in source for name in registered)
