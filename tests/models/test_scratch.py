# SPDX-License-Identifier: Apache-2.0
"""Small models from scratch are ordinary transformers folders, the same every time."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import patchkern as pk
from patchkern import Catalog
from patchkern.batch.control_tokens import MARKERS
from patchkern.models.scratch import SPECIAL_TOKENS, fit_tokenizer, from_scratch, scratch_model, scratch_prompt

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
        "from patchkern.models.scratch import fit_tokenizer\n"
        f"print(fit_tokenizer({TITLES!r}, 320)._tokenizer.to_str(), end='')"
    )
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    other = subprocess.run(
        [sys.executable, "-c", program], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
    ).stdout
    assert other == fit_tokenizer(TITLES, 320)._tokenizer.to_str() != ""


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
    assert scratch_prompt(tokenizer, separator=False) == replace(prompt, separator=())


def test_prompt_names_what_the_tokenizer_lacks() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    with pytest.raises(ValueError, match=r"history_start.*history_separator.*history_end.*end-of-sequence"):
        scratch_prompt(bare)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_model_is_seeded_and_leaves_the_generator_alone(dropout: float) -> None:
    tokenizer = fit_tokenizer(TITLES, 300)
    before = torch.random.get_rng_state()
    first, second, other = (scratch_model(tokenizer, hidden_size=32, seed=seed, dropout=dropout) for seed in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    assert first.lm_head.weight is first.get_input_embeddings().weight


def test_unknown_size_is_refused() -> None:
    with pytest.raises(ValueError, match="size: expected one of tiny, small, got 'huge'"):
        scratch_model(fit_tokenizer(TITLES, 300), "huge")


@pytest.mark.parametrize("dropout", [-0.1, 1.0, float("nan")])
def test_dropout_is_a_probability(dropout: float) -> None:
    with pytest.raises(ValueError, match="dropout: expected a probability below 1, got"):
        scratch_model(fit_tokenizer(TITLES, 300), dropout=dropout)


@pytest.mark.parametrize("separator", [True, False])
def test_from_scratch_is_all_three(separator: bool) -> None:
    titles = dict(enumerate(TITLES, start=7))
    tokenizer = fit_tokenizer(TITLES, 300)
    shape = {"hidden_size": 32, "num_hidden_layers": 3, "seed": 5, "dropout": 0.1}
    hf_model, catalog, prompt = from_scratch(titles, "small", vocab_size=300, separator=separator, **shape)
    expected = scratch_model(tokenizer, "small", **shape)
    assert hf_model.config.to_dict() == expected.config.to_dict()
    for got, want in zip(hf_model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(got, want)
    assert catalog.fingerprint == Catalog.from_titles(titles, tokenizer).fingerprint
    assert catalog.item_ids.tolist() == list(titles) and list(catalog.titles or ()) == TITLES
    assert prompt == scratch_prompt(tokenizer, separator)


def test_titles_without_ids_are_refused() -> None:
    with pytest.raises(TypeError, match="titles: expected a mapping of item id to title, got list"):
        from_scratch(TITLES)  # type: ignore[arg-type]


# ------------------------------------------------------------------ dropout


def with_dropout(dropout: float = 0.5) -> tuple[pk.PatchedCausalLM, pk.Histories]:
    tokenizer = fit_tokenizer(TITLES, 300)
    catalog = Catalog.from_titles(dict(enumerate(TITLES)), tokenizer)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_key_value_heads": 2}
    model = pk.PatchedCausalLM(scratch_model(tokenizer, dropout=dropout, **shape), catalog, scratch_prompt(tokenizer))
    with torch.no_grad():
        for parameter in model.parameters():  # away from the initial state, in which all titles are about as likely
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    draw = np.random.default_rng(0)
    histories = pk.Histories.from_sequences([draw.integers(0, len(TITLES), n).tolist() for n in (14, 3, 9, 20)])
    return model.eval(), histories


def test_dropout_drops_what_attention_and_mlp_give_in_training_only() -> None:
    model, histories = with_dropout()
    layout = pk.build_layout(model.catalog, histories, pk.ItemPatches(3), model.prompt, [0, 1, 2, 3])
    layers = model.hf_model.model.layers
    first = layers[0]
    given: list[torch.Tensor] = []
    for module in (first.self_attn.o_proj, first.mlp.down_proj):
        module.register_forward_hook(lambda module, inputs, output: given.append(output))
    first.resid_attn_dropout.register_forward_hook(lambda module, inputs, output: given.append(output))
    first.resid_mlp_dropout.register_forward_hook(lambda module, inputs, output: given.append(output))
    losses = [model(layout).loss.item() for _ in range(2)]
    assert losses[0] == losses[1]
    for before, after in zip(given[::2], given[1::2], strict=True):
        assert torch.equal(before, after)
    given.clear()
    losses = [model.train()(layout).loss.item() for _ in range(2)]
    assert losses[0] != losses[1]
    for before, after in zip(given[::2], given[1::2], strict=True):
        dropped = after == 0
        assert 0.4 < dropped.float().mean() < 0.6
        torch.testing.assert_close(after[~dropped], 2 * before[~dropped])


def test_users_never_see_each_other_with_a_model_that_has_dropout() -> None:
    model, histories = with_dropout()
    other = [histories[user].tolist() for user in range(4)]
    other[1] = [5, 5, 5]
    logits = []
    for users in (histories, other):
        layout = pk.build_layout(model.catalog, users, pk.SessionPatches(3), model.prompt)
        with torch.no_grad():
            logits.append(model(layout).logits)
    assert [torch.equal(a, b) for a, b in zip(*logits, strict=True)] == [True, False, True, True]


@pytest.mark.parametrize("policy", [pk.TextOnly(None), pk.ItemPatches(3, None), pk.SessionPatches(3, None)])
def test_trunks_and_branches_equal_samples_with_a_model_that_has_dropout(policy: pk.Policy) -> None:
    model, histories = with_dropout()
    ranges = np.array([[3, length - 1] for length in histories.lengths])
    users = np.repeat(np.arange(4), histories.lengths - 3)
    positions = np.concatenate([np.arange(3, length) for length in histories.lengths])
    passed = pk.build_training_layout(model.catalog, histories, policy, model.prompt, ranges)
    targets = histories.at(users, positions)
    samples = pk.build_layout(model.catalog, histories.before(users, positions), policy, model.prompt, targets)
    results = []
    for layout in (passed, samples):
        model.zero_grad()
        loss = model(layout).loss
        loss.backward()
        results.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
    for got, expected in zip(*results, strict=True):
        assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_search_finds_the_scores_of_a_model_that_has_dropout(tmp_path: Path) -> None:
    model, histories = with_dropout()
    found = model.recommend(histories, pk.ItemPatches(3), k=5, num_beams=len(TITLES))
    scores = model.score_items(histories, pk.ItemPatches(3))
    for row, ranked in zip(scores, found, strict=True):
        assert [item for item, _ in ranked] == np.argsort(-row, kind="stable")[:5].tolist()
        assert [score for _, score in ranked] == pytest.approx(np.sort(-row)[:5] * -1, abs=1e-4)
    # the loss of a target is its mean log-probability per token
    layout = pk.build_layout(model.catalog, histories, pk.ItemPatches(3), model.prompt, [3, 1, 4, 1])
    with torch.no_grad():
        total = -model(layout).loss.item() * layout.logit_labels.numel()
    assert total == pytest.approx(scores[np.arange(4), [3, 1, 4, 1]].sum(), abs=1e-3)
    model.save_pretrained(tmp_path)
    loaded = pk.PatchedCausalLM.from_pretrained(tmp_path, model.catalog)
    assert loaded.config.resid_pdrop == 0.5
    assert loaded.eval().recommend(histories, pk.ItemPatches(3), k=5, num_beams=len(TITLES)) == found


# ------------------------------------------------------------------ files


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_saved_folder_is_an_ordinary_one(dropout: float, tmp_path: Path) -> None:
    tokenizer = fit_tokenizer(TITLES, 300)
    model = scratch_model(tokenizer, "tiny", dropout=dropout, num_hidden_layers=1, attention_dropout=0.1)
    tokenizer.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    again, words = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert again.config.attention_dropout == 0.1
    assert getattr(again.config, "resid_pdrop", 0.0) == dropout
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert scratch_prompt(words) == scratch_prompt(tokenizer)
    titles = dict(enumerate(TITLES))
    assert (
        Catalog.from_titles(titles, words).token_ids.tolist()
        == Catalog.from_titles(titles, tokenizer).token_ids.tolist()
    )
