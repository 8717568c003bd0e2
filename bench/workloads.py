# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks run on: ml-1m with the Llama-3 tokenizer if at hand, else a stand-in of that shape.

The folder with ``ml-1m`` and ``llama3-tokenizer`` is the one that PATCHKERN_BENCH_DATA names, else ``shared/data``
beside the repository.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import patchkern as pk
from patchkern.models.scratch import fit_tokenizer, scratch_prompt

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
VOCABULARY = 128_256
POLICIES: dict[str, pk.Policy] = {
    "text": pk.TextOnly(max_items=100),
    "items": pk.ItemPatches(keep_text=5, max_items=100),
    "sessions": pk.SessionPatches(group_size=5, max_items=100),
    "random": pk.RandomItemPatches(probability=0.3, max_items=100),
    # a few rows with a hundred members, some 400 tokens, among thousands of literals
    "long": pk.SessionPatches(group_size=100, max_items=None),
}


class Workload(NamedTuple):
    """Everything `build_layout` takes but the policy, for training samples drawn at random."""

    name: str
    catalog: pk.Catalog
    prompt: pk.Prompt
    histories: pk.Histories

    def samples(self, count: int, seed: int = 0) -> tuple[pk.Histories, np.ndarray]:
        """Histories before ``count`` random interactions that have at least 3 before them, and those targets."""
        rng = np.random.default_rng(seed)
        lengths = self.histories.lengths
        targets = np.maximum(lengths - 3, 0)
        ends = np.cumsum(targets)
        drawn = rng.integers(0, ends[-1], count)
        users = np.searchsorted(ends, drawn, side="right")
        positions = 3 + drawn - (ends - targets)[users]
        return self.histories.before(users, positions), self.histories.at(users, positions)


def ml1m(vocab_size: int | None = None) -> Workload:
    """The workload of the published numbers, or its stand-in; `Workload.name` says which.

    With ``vocab_size`` a tokenizer of that size is fitted to the titles, as for a model from scratch.
    """
    given = os.environ.get("PATCHKERN_BENCH_DATA")
    folder = Path(given) if given else SHARED
    if (folder / "ml-1m").is_dir() and (folder / "llama3-tokenizer").is_dir():
        try:
            return _real(folder, vocab_size)
        except ImportError as error:
            print(f"ml-1m is at hand but cannot be read ({error}); running on a stand-in")
    elif given:
        raise FileNotFoundError(f"PATCHKERN_BENCH_DATA: expected ml-1m and llama3-tokenizer in {given}")
    return stand_in(vocab_size or VOCABULARY)


def _real(data: Path, vocab_size: int | None) -> Workload:
    import pyarrow.parquet as pq
    from transformers import AutoTokenizer

    folder = data / "ml-1m"
    table = pq.read_table(folder / "items.parquet")
    titles = dict(zip(table["item"].to_pylist(), table["title"].to_pylist(), strict=True))
    if vocab_size is not None:
        tokenizer: Any = fit_tokenizer(titles.values(), vocab_size)
        prompt = scratch_prompt(tokenizer)
    else:
        tokenizer = AutoTokenizer.from_pretrained(data / "llama3-tokenizer", trust_remote_code=False)
        system, instruction = (folder / "prompt.txt").read_text().splitlines()[:2]
        prompt = pk.Prompt.from_chat_template(tokenizer, system, instruction)
    column = pq.read_table(folder / "histories.parquet", columns=["items"])["items"].combine_chunks()
    histories = pk.Histories(column.flatten().to_numpy(), column.offsets.to_numpy())
    return Workload("ml-1m", pk.Catalog.from_titles(titles, tokenizer), prompt, histories)


def stand_in(vocab_size: int = VOCABULARY) -> Workload:
    """6,038 users, 3,883 items, about 575,000 interactions, 3.9 tokens a title; popularity and words by Zipf."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(4.1, 0.95, 6038).astype(np.int64), 4, 1435)
    lengths = np.maximum(lengths * 575_281 // lengths.sum(), 4)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    popularity = 1 / np.arange(10, 10 + 3883)
    items = rng.choice(3883, offsets[-1], p=popularity / popularity.sum())
    title_lengths = np.clip(rng.poisson(2.94, 3883) + 1, 1, 20)
    title_offsets = np.concatenate([[0], np.cumsum(title_lengths)])
    words = rng.permutation(vocab_size - 256)[
        np.minimum(rng.zipf(1.3, title_offsets[-1]), min(20_000, vocab_size - 257))
    ]
    prompt = pk.Prompt(
        prefix=(*range(100, 132), vocab_size - 254),
        separator=(vocab_size - 253,),
        suffix=(vocab_size - 252, *range(201, 232)),
        response_end=(vocab_size - 247,),
    )
    catalog = pk.Catalog.from_token_ids(words.astype(np.int32), title_offsets.astype(np.int32))
    return Workload("stand-in for ml-1m", catalog, prompt, pk.Histories(items, offsets))
