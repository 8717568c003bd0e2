# SPDX-License-Identifier: Apache-2.0
"""What the README shows as code is true."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import patchkern as pk

README = Path(__file__).resolve().parents[1] / "README.md"


@pytest.fixture(scope="module")
def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_the_equivalent_computes_the_same_rows(blocks: list[str]) -> None:
    names: dict[str, Any] = {"torch": torch}
    exec(blocks[0], names)
    catalog = pk.Catalog.from_token_ids([5, 6, 7, 8, 9, 5], [0, 2, 3, 6], item_ids=[10, 20, 30])
    prompt = pk.Prompt(prefix=[1], separator=[2], suffix=[3])
    layout = pk.build_layout(catalog, [[10, 20, 30] * 5, [], [30]], pk.SessionPatches(3, None), prompt)
    weight = torch.randn(16, 41)
    torch.testing.assert_close(pk.pool_rows(weight, layout), names["pool_rows"](weight, layout), rtol=1e-6, atol=1e-6)


def test_the_example_runs(blocks: list[str], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from patchkern.models.scratch import fit_tokenizer, scratch_model, scratch_prompt

    titles = {1: "Toy Story", 2: "GoldenEye", 3: "Heat"}
    tokenizer = fit_tokenizer(titles.values(), 300)
    hf_model = scratch_model(tokenizer, hidden_size=32, intermediate_size=64)
    assert isinstance(hf_model, transformers.PreTrainedModel)
    names: dict[str, Any] = {"tokenizer": tokenizer, "hf_model": hf_model}
    names["weight"] = hf_model.get_input_embeddings().weight
    example = blocks[1]
    # The tokenizer has no chat template and the catalogue three items: the same calls, fitted to them.
    example = example.replace('{1: "Toy Story", 2: "GoldenEye", ...}', repr(titles))
    example = re.sub(r"pk\.Prompt\.from_chat_template\(.*?\n\)", "scratch_prompt(tokenizer)", example, flags=re.DOTALL)
    example = example.replace("k=20, num_beams=20", "k=3, num_beams=3").replace("k=20)", "k=2, num_beams=2)")
    example = example.replace('search="exact", exclude_seen', 'k=1, search="exact", exclude_seen')
    example = example.replace('"runs/all-users"', "folder")
    example = example.replace("prior=scores", "k=3, num_beams=3, prior=scores")
    names |= {"scratch_prompt": scratch_prompt, "in_stock": [2, 3], "folder": tmp_path, "scores": torch.zeros(3)}
    exec(example, names)
    assert len(pk.read_recommendations(tmp_path)[1]) == 2
    assert torch.isfinite(names["loss"]) and names["rows"].shape == (names["layout"].num_rows, 32)
