# SPDX-License-Identifier: Apache-2.0
"""A model that reads other texts than the titles which it generates: searches, item head, files, training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import TrainingArguments

import patchkern as pk
from patchkern.data.samples import Samples
from patchkern.models.scratch import from_scratch
from patchkern.training import PatchTrainer, target_nll

TITLES = {7: "Alien", 8: "Aliens", 3: "Heat", 5: "The Third Man"}
GENRES = {7: "Horror", 8: "Action", 3: "Action", 5: "Crime"}
TEXTS = {item: f"{title} ({GENRES[item]})" for item, title in TITLES.items()}
POLICY = pk.ItemPatches(keep_text=1)
HISTORIES = [[7, 8, 3], [5, 7, 8, 3]]


@pytest.fixture(scope="module")
def model() -> pk.PatchedCausalLM:
    parts = from_scratch(TITLES, texts=TEXTS, hidden_size=16, intermediate_size=32, num_attention_heads=2)
    model = pk.PatchedCausalLM(*parts, POLICY, item_head=True)
    with torch.no_grad():
        model.item_head.bias.normal_()
    return model.double().eval()


def test_searches_find_titles(model: pk.PatchedCausalLM) -> None:
    """Every search scores an item by its title after a prompt of texts, as the loss does."""
    past = [HISTORIES[0], HISTORIES[1][:3]]
    whole = [[*history, item] for history in past for item in TITLES]
    nll = target_nll(model, whole, Samples(np.arange(8), np.full(8, 3)), POLICY)
    for first, history in enumerate(past):
        expected = dict(zip(TITLES, -nll[4 * first : 4 * first + 4], strict=True))
        for options in ({"search": "beam", "num_beams": 4}, {"search": "exact"}):
            ((*found,),) = model.recommend([history], k=4, **options)
            assert [item for item, _ in found] == sorted(expected, key=expected.get, reverse=True)
            assert [score for _, score in found] == pytest.approx([expected[item] for item, _ in found])


def test_the_item_head_reads_texts(model: pk.PatchedCausalLM) -> None:
    head, catalog = model.item_head, model.catalog
    weight = model.hf_model.get_output_embeddings().weight
    expected = torch.stack([weight[catalog.texts.tokens(item).tolist()].mean(0) for item in range(len(catalog))])
    torch.testing.assert_close(head.vectors(weight, None), expected)


def test_files(model: pk.PatchedCausalLM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "model")
    again = pk.PatchedCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float64).eval()
    assert again.catalog.texts.titles == tuple(TEXTS.values())
    assert again.recommend(HISTORIES, k=2) == model.recommend(HISTORIES, k=2)
    titles = pk.Catalog.from_token_ids(model.catalog.token_ids, model.catalog.offsets, model.catalog.item_ids)
    with pytest.raises(ValueError, match="catalog: expected input texts, as the model was saved with, got none"):
        pk.PatchedCausalLM.from_pretrained(tmp_path / "model", titles)


def test_histories_of_texts_are_not_what_is_generated(model: pk.PatchedCausalLM, tmp_path: Path) -> None:
    histories = pk.Histories.coerce(HISTORIES)
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    with pytest.raises(ValueError, match="supervise_history: expected False with input texts"):
        PatchTrainer(model, arguments, histories, Samples(np.array([0]), np.array([2])), supervise_history=True)
