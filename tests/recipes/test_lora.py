# SPDX-License-Identifier: Apache-2.0
"""LoRA by recipe: trained, interrupted, read again, evaluated, and trained on in the next stage."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file

import patchkern as pk
from patchkern.data import open_dataset, synthetic, write_parquet
from patchkern.models.scratch import scratch_model
from patchkern.training import find_model
from recipes import evaluate, train

pytest.importorskip("peft")
FLAGS = ["--use_cpu", "--disable_tqdm", "True", "--bf16", "False", "--max_items", "12", "--rows_per_pass", "600"]
FLAGS += ["--settings", "pretrained-small", "--learning_rate", "0.01", "--logging_steps", "1"]
FOUR_BIT = pytest.param(
    ("--head", "both", "--load_in_4bit"),
    False,
    id="4 bits",
    marks=pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("data") / "small"
    write_parquet(synthetic(40, 30, mean_length=16.0, num_genres=4), path)
    return str(path)


def make_base(path: Path, tied: bool) -> str:
    """A folder whose tokenizer has neither markers nor a chat template: rows are added for them."""
    letters = ["<e>", *sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())]
    core = tokenizers.Tokenizer(tokenizers.models.BPE({letter: n for n, letter in enumerate(letters)}, []))
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<e>")
    shape = {"hidden_size": 64, "intermediate_size": 128, "tie_word_embeddings": tied}
    scratch_model(tokenizer, **shape, vocab_size=257).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All that training may change."""
    files = ("adapter_model", "item_embeddings", "item_head")
    paths = [checkpoint / f"{name}.safetensors" for name in files]
    return {f"{path.stem}.{key}": x for path in paths if path.is_file() for key, x in load_file(path).items()}


@pytest.mark.parametrize(
    ("flags", "tied"),
    [
        pytest.param(("--head", "items", "--item_embeddings", "--vector_dropout", "0.3"), True, id="items, tied"),
        pytest.param(("--head", "titles"), False, id="titles, untied"),
        FOUR_BIT,
    ],
)
def test_lora_goes_the_whole_way(flags: tuple[str, ...], tied: bool, data: str, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", tied)

    def stage(name: str, folder: str, *more: str) -> Any:
        return train.main(["--stage", name, "--data", data, "--output_dir", str(tmp_path / folder), *FLAGS, *more])

    first = ("--model", base, "--lora", "4", "--max_steps", "4", "--save_steps", "2", *flags)
    trainer = stage("items", "run", *first)
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoint-4")
    stage("items", "again", *first, "--resume")
    whole, resumed = (tensors(tmp_path / folder / "checkpoint-4") for folder in ("run", "again"))
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)
    half = tensors(tmp_path / "run" / "checkpoint-2")
    moved = {name for name in whole if not torch.equal(whole[name], half[name])}
    assert any("lora_A" in name for name in moved) and any("trainable_tokens" in name for name in moved)
    assert ("item_head.bias" in moved) == ("titles" not in flags)

    # read again, it recommends what the trained model recommends
    histories, by_items = open_dataset(data).histories.take(np.arange(5)), "titles" not in flags
    searches: list[dict[str, Any]] = [{"search": "items"}] if by_items else [{"num_beams": 5}]
    if "--load_in_4bit" not in flags:  # the base is read whole then
        loaded = pk.PatchedCausalLM.from_pretrained(find_model(str(tmp_path / "run"), "run")).eval()
        for search in searches:
            expected = trainer.model.eval().recommend(histories, k=5, **search)
            for ours, theirs in zip(loaded.recommend(histories, k=5, **search), expected, strict=True):
                assert [item for item, _ in ours] == [item for item, _ in theirs]
                np.testing.assert_allclose([s for _, s in ours], [s for _, s in theirs], rtol=1e-4)
    search = ("--search", "items") if by_items else ()
    output = ("--output", str(tmp_path / "test.csv"))
    found = evaluate.main([str(tmp_path / "run"), "--data", data, *search, *output])
    assert found["this model"][0].ranks.size == open_dataset(data).samples("test").users.size

    # the next stage trains the adapter on, not the head alone
    more = tuple(flag for flag in flags if flag == "--load_in_4bit")
    stage("sessions", "next", "--from", str(tmp_path / "run"), "--max_steps", "2", *more)
    after = tensors(tmp_path / "next" / "checkpoint-2")
    assert after.keys() == whole.keys()
    changed = {name for name in whole if not torch.equal(whole[name], after[name])}
    assert any("lora_A" in name for name in changed) and any("trainable_tokens" in name for name in changed)


def test_a_memory_is_learned_beside_an_adapter(data: str, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", tied=True)
    flags = ["--head", "items", "--slots", "2", "--block", "4", "--save_steps", "2"]

    def stage(folder: str, *more: str) -> Any:
        command = ["--stage", "memory", "--data", data, "--output_dir", str(tmp_path / folder), *FLAGS, *flags, *more]
        command.remove("--max_items"), command.remove("12")
        return train.main(command)

    first = ("--model", base, "--lora", "4", "--max_steps", "4")
    memory = stage("run", *first).model.eval()
    trained = {name for name, parameter in memory.named_parameters() if parameter.requires_grad}
    kinds = ("lora_", "trainable_tokens_", "item_head.", "map.scale")
    assert all(any(kind in name for kind in kinds) for name in trained)
    assert all(any(kind in name for name in trained) for kind in kinds)
    half, whole = (tensors(tmp_path / "run" / f"checkpoint-{step}") for step in (2, 4))
    name = next(name for name in whole if "embed_tokens" in name and "trainable_tokens" in name)
    assert (half[name] != whole[name])[-2:].any(dim=1).all(), "the query rows are the last that were added"

    shutil.copytree(tmp_path / "run", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoint-4")
    stage("again", *first, "--resume")
    resumed = tensors(tmp_path / "again" / "checkpoint-4")
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)

    histories = open_dataset(data).histories.take(np.arange(5))
    scores = memory.score_items(histories, head="items")
    loaded = pk.RecurrentMemory.from_pretrained(find_model(str(tmp_path / "run"), "run")).eval()
    np.testing.assert_allclose(loaded.score_items(histories, head="items"), scores, rtol=1e-4)
    merged = pk.PatchedCausalLM(
        loaded.hf_model.merge_and_unload(), loaded.catalog, loaded.prompt, loaded.policy, item_head=True
    )
    merged.item_head.load_state_dict(loaded.item_head.state_dict())
    alone = pk.RecurrentMemory(merged, **loaded.options).eval()
    alone.map.load_state_dict(loaded.map.state_dict())
    np.testing.assert_allclose(alone.score_items(histories, head="items"), scores, rtol=1e-3)

    after = stage("next", "--from", str(tmp_path / "run"), "--max_steps", "2").model
    assert after.prompt == memory.prompt and not torch.equal(after.map.scale, memory.map.scale)


def test_four_bits_need_an_adapter_and_a_package(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        "--stage",
        "items",
        "--data",
        data,
        "--output_dir",
        str(tmp_path),
        "--model",
        "a-folder",
        "--load_in_4bit",
    ]
    with pytest.raises(SystemExit):
        train.main(command)
    assert "--load_in_4bit: expected only with --lora" in capsys.readouterr().err
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else found(name))
    with pytest.raises(SystemExit):
        train.main([*command, "--lora", "4"])
    assert "--load_in_4bit: expected bitsandbytes to be installed, got none" in capsys.readouterr().err
