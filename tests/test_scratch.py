# SPDX-License-Identifier: Apache-2.0
"""Small models from scratch are ordinary transformers folders, the same every time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from patchkern import Catalog
from patchkern.prompt import MARKERS
from patchkern.scratch import SPECIAL_TOKENS, fit_tokenizer, scratch_model, scratch_prompt

TITLES = [f"The {colour} {thing} {part}" for colour in ("Red", "Grey") for thing in ("Ship", "Ark") for part in "12345"]
TITLES += ["Amélie", "七人の侍", "8 1/2"]


def test_tokenizer_round_trips_every_string() -> None:
    tokenizer = fit_tokenizer(TITLES, 300)
    for title in [*TITLES, "never seen: Žižek ☕", " spaces  kept "]:
        assert tokenizer.decode(tokenizer(title, add_special_tokens=False)["input_ids"]) == title
    assert len(tokenizer) <= 300
    assert [tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS] == list(range(len(SPECIAL_TOKENS)))


def test_tokenizer_is_the_same_in_every_process() -> None:
    program = (
        "from patchkern.scratch import fit_tokenizer\n"
        f"print(fit_tokenizer({TITLES!r}, 320)._tokenizer.to_str(), end='')"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", program], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2")
    ]
    assert runs[0] == runs[1] != ""


def test_vocabulary_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match=r"vocab_size: expected at least 262 .*, got 100"):
        fit_tokenizer(TITLES, 100)


def test_prompt_is_made_of_special_tokens() -> None:
    tokenizer = fit_tokenizer(TITLES, 300)
    prompt = scratch_prompt(tokenizer)
    start, separator, end = tokenizer.convert_tokens_to_ids(list(MARKERS))
    assert prompt.prefix == (tokenizer.bos_token_id, start)
    assert (prompt.separator, prompt.suffix) == ((separator,), (end,))
    assert prompt.response_end == (tokenizer.eos_token_id,)


def test_prompt_names_what_the_tokenizer_lacks() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    with pytest.raises(ValueError, match=r"history_start.*history_separator.*history_end.*end-of-sequence"):
        scratch_prompt(bare)


def test_model_is_seeded_and_leaves_the_generator_alone() -> None:
    tokenizer = fit_tokenizer(TITLES, 300)
    before = torch.random.get_rng_state()
    first, second, other = (scratch_model(tokenizer, hidden_size=32, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    assert first.lm_head.weight is first.get_input_embeddings().weight


def test_unknown_size_is_refused() -> None:
    with pytest.raises(ValueError, match="size: expected one of tiny, small, got 'huge'"):
        scratch_model(fit_tokenizer(TITLES, 300), "huge")


def test_saved_folder_is_an_ordinary_one(tmp_path: Path) -> None:
    tokenizer = fit_tokenizer(TITLES, 300)
    model = scratch_model(tokenizer, "tiny", num_hidden_layers=1, attention_dropout=0.1)
    tokenizer.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    again, words = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert again.config.attention_dropout == 0.1
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert scratch_prompt(words) == scratch_prompt(tokenizer)
    titles = dict(enumerate(TITLES))
    assert (
        Catalog.from_titles(titles, words).token_ids.tolist()
        == Catalog.from_titles(titles, tokenizer).token_ids.tolist()
    )
