# SPDX-License-Identifier: Apache-2.0
"""docs/scale.md: its tables are those that bench/scale.py makes of the published rates, its laws those of the code."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import patchkern as pk
from bench import scale
from patchkern.budget.search import SearchCost, SearchSize
from patchkern.evaluation.linear import ItemRegression
from patchkern.models.item_head import CatalogHead
from patchkern.search.item_search import size_of_items

REPOSITORY = Path(__file__).resolve().parents[1]
TINY = scale.Shape("tiny", layers=3, hidden=64, heads=4, kv_heads=2, head_width=16, intermediate=96)
TITLES = {number: f"title {number}" for number in range(30)}


@pytest.fixture(scope="module")
def model() -> pk.PatchedCausalLM:
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, dtype=torch.bfloat16,
    )  # fmt: skip
    catalog = pk.Catalog.from_titles(TITLES, lambda title: list(title.encode()))
    hf_model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    return pk.PatchedCausalLM(hf_model, catalog, pk.Prompt(suffix=[1]), pk.ItemPatches(0, None), item_head=True)


@pytest.mark.parametrize("name", scale.TABLES)
def test_the_page_has_the_tables_of_the_published_rates(name: str) -> None:
    page = (REPOSITORY / "docs" / "scale.md").read_text(encoding="utf-8")
    table = "\n".join(scale.markdown(scale.TABLES[name](scale.Rates(scale.PUBLISHED), scale.Plan())))
    assert f"\n\n{table}\n" in page, f"paste what bench/scale.py prints:\n{table}"


def test_other_plans_grow_as_they_should(capsys: pytest.CaptureFixture[str]) -> None:
    rates = scale.Rates(scale.PUBLISHED)
    one, ten = scale.Plan(), scale.Plan(users=1e9)
    for name in scale.POLICIES:
        rows = scale.policy_rows(rates, one, name)
        hours = [scale.SMALL.flops(rows) * plan.users for plan in (one, ten)]
        assert hours[1] == pytest.approx(10 * hours[0])
        assert 0.1 * scale.policy_rows(rates, one, name) == pytest.approx(
            scale.policy_rows(rates, scale.Plan(events=1000), name)
        )
    scale.main(["--users", "1e6", "--items", "1e5", "--events", "100"])
    assert "1 million users of 100" in capsys.readouterr().out


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with scale.PUBLISHED.open(newline="") as file:
        rows = list(csv.DictReader(file))
    path = tmp_path / "part.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(row for row in rows if row["provider"] not in ("planning", "redis"))
    rates = scale.Rates(path)
    with pytest.raises(
        ValueError, match="expected a row 'planning', 'text, 1000000 items', 'time', found none; run all"
    ):
        scale.batch(rates, scale.Plan())
    assert rates.measured("lmdb", "redis") == ["lmdb"], "a server that was not there"


# ------------------------------------------------------------------ laws


@pytest.mark.parametrize("rows", [1, 2, 7, 64])
def test_operations_are_those_that_torch_counts(rows: int, model: pk.PatchedCausalLM) -> None:
    plain = model.hf_model.model
    kept = plain.config._attn_implementation
    plain.set_attn_implementation("eager")
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        plain(inputs_embeds=torch.zeros(1, rows, 64, dtype=torch.bfloat16), use_cache=False)
    plain.set_attn_implementation(kept)
    # torch also counts the scores that a causal mask hides
    hidden = 2 * rows**2 * TINY.heads * TINY.head_width * TINY.layers
    turned = sum(counted.get_flop_counts().get("LlamaModel.rotary_emb", {}).values())  # of some versions: angles
    assert counted.get_total_flops() - turned == TINY.flops(rows) + hidden


def test_new_rows_see_the_stored_ones() -> None:
    whole, first = TINY.flops(100), TINY.flops(60)
    assert TINY.flops(40, stored=60) == pytest.approx(whole - first)


def test_bytes_of_a_row(model: pk.PatchedCausalLM) -> None:
    assert SearchCost(model, SearchSize(1, 1)).row_bytes == TINY.row_bytes()


def test_bytes_of_a_search_of_items(model: pk.PatchedCausalLM) -> None:
    size = size_of_items(model, None, None)
    tokens = int(model.catalog.offsets[-1])
    assert size.user_scores == (8 + 48) * len(TITLES)  # of so few items all are put in order
    assert size.fixed_bytes == (2 * TINY.hidden + 24) * len(TITLES) + 12 * tokens
    assert size.fixed_scores == 24 * len(TITLES)
    assert size.made_vectors == 2 * TINY.hidden * len(TITLES) + 2 * 60 * 60


def test_recent_items_behind_experts_and_memories() -> None:
    inner, lengths = pk.ItemPatches(0, None), np.arange(10_000, 10_000 + scale.BLOCK)
    experts, memory = pk.Experts(inner), pk.PreferenceMemory(inner)
    assert (experts.count, experts.keep, experts.block) == (scale.VECTORS, scale.KEEP, scale.BLOCK)
    assert (memory.slots, memory.block, memory.mode) == (scale.VECTORS, scale.BLOCK, "overwrite")
    assert (lengths - experts.cuts(lengths)).mean() == scale.recent_items(scale.KEEP)
    assert (lengths - memory.absorbed(lengths)).mean() == scale.recent_items(1)


def test_limits_that_the_code_has() -> None:
    tokens = np.zeros(1, np.int32)
    with pytest.raises(ValueError, match="offsets: expected values that fit in int32, got up to 2147483648"):
        pk.Catalog.from_token_ids(tokens, [0, scale.INT32 + 1])
    items = np.arange(1000)
    with pytest.raises(ValueError, match=f"expected at least {32 * 1000**2} bytes"):
        ItemRegression.fit(np.zeros(1000, np.int64), items, memory_budget=32 * 1000**2 - 1)
    assert (CatalogHead.sampled_above, CatalogHead.num_sampled) == (50_000, 8192)
