# SPDX-License-Identifier: Apache-2.0
"""What steps cost: rows counted from the data, and rates that were measured here or follow from a GPU's peak."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import AutoConfig

import patchkern as pk
from patchkern.batch.policy_kinds import AnyPolicy
from patchkern.data import Interactions, samples_of
from patchkern.models.scratch import SIZES, fit_tokenizer, scratch_prompt
from patchkern.models.sources import read_tokenizer
from patchkern.training.collators import PassCollator
from recipes import models
from recipes.reproduction.steps import CPU, Step, Work

# Dense TFLOP/s in bfloat16, as their makers say.
GPUS = {"A800": 312.0, "A100": 312.0, "H100": 989.0, "H200": 989.0, "L4": 121.0, "RTX4090": 165.0}
_BEAMS = {"paper": (10, 20)}
_PROBED_ROWS, _PROBED_USERS = 2048, 16


class Shape(NamedTuple):
    """Of a decoder with a gated MLP."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int

    @classmethod
    def of(cls, config: Any) -> Shape:
        heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        return cls(
            config.hidden_size, config.intermediate_size, config.num_hidden_layers, heads, kv_heads, config.vocab_size
        )

    @property
    def parameters(self) -> int:
        """With one table for input and output."""
        return self.layers * self._layer + self.vocabulary * self.hidden

    @property
    def _layer(self) -> int:
        attention = 2 * self.hidden**2 + 2 * self.hidden**2 * self.kv_heads // self.heads
        return attention + 3 * self.hidden * self.intermediate

    def flops(self, work: Work) -> float:
        """Forward, and of training backward too."""
        forward = (
            2.0 * work.rows * self.layers * self._layer
            + 4.0 * work.pairs * self.layers * self.hidden
            + 2.0 * work.logits * self.hidden * self.vocabulary
        )
        return forward * (3 if work.kind == "train" else 1)


# Known without a file, for a plan of what runs where the weights are.
SHAPES = {
    "Llama-3.2-1B-Instruct": Shape(2048, 8192, 16, 32, 8, 128_256),
    "SmolLM2-135M-Instruct": Shape(576, 1536, 30, 9, 3, 49_152),
}


@dataclass(frozen=True)
class Reader:
    """What the model reads, without the model: titles as tokens, a prompt, a shape.

    Attributes:
        has_weights: whether the model is here, or only what it is like.
    """

    data: Interactions
    catalog: pk.Catalog
    prompt: pk.Prompt
    shape: Shape
    has_weights: bool
    head: str = "titles"
    max_items: int = 100
    one_by_one: bool = False
    limit: int | None = None

    @classmethod
    def of(
        cls,
        model: str,
        data: Interactions,
        *,
        tokenizer: str | None = None,
        vocab_size: int = 4096,
        separator: bool = True,
        **fields: Any,
    ) -> Reader:
        """Of a size from scratch, a folder, or a name of `SHAPES` with the folder of its tokenizer.

        Args:
            vocab_size, separator: from scratch only.
            fields: of the class.

        Raises:
            FileNotFoundError: none of these.
        """
        if model in SIZES:
            own = fit_tokenizer(data.titles.values(), vocab_size)
            size = SIZES[model]
            heads = size["num_attention_heads"]
            dims = (size["hidden_size"], size["intermediate_size"], size["num_hidden_layers"])
            shape, prompt = Shape(*dims, heads, heads, len(own)), scratch_prompt(own, separator)
            return cls(data, pk.Catalog.from_titles(data.titles, own), prompt, shape, True, **fields)
        here = (Path(model) / "config.json").is_file()
        if not here and model not in SHAPES:
            raise FileNotFoundError(
                f"--model: expected {', '.join(SIZES)}, a folder with a config.json, or for a plan one of "
                f"{', '.join(SHAPES)}, got {model!r}"
            )
        shape = Shape.of(AutoConfig.from_pretrained(model, trust_remote_code=False)) if here else SHAPES[model]
        source = tokenizer or (model if here and list(Path(model).glob("tokenizer*")) else None)
        own = fit_tokenizer(data.titles.values(), vocab_size) if source is None else read_tokenizer(source)
        prompt = models.make_prompt(own, models.words_of(data))
        weights = here and bool([*Path(model).glob("*.safetensors"), *Path(model).glob("*.bin")])
        return cls(data, pk.Catalog.from_titles(data.titles, own), prompt, shape, weights, **fields)

    # -------------------------------------------------------------- rows

    def training(self, policy: Any, stage: str, epochs: float) -> Work:
        """All targets of the training split, ``epochs`` times."""
        samples = samples_of(self.data, "train")
        targets = self.catalog.lengths[self.catalog.index_of(self.data.targets(samples))] + len(
            self.prompt.response_end
        )
        times = epochs * (2 if stage == "pretrain" else 1)
        if self.one_by_one:
            read: Any = pk.TextOnly(self.max_items) if stage == "pretrain" else policy
            rows = self.prompts(self.data.before(samples), read) + targets
            pairs = rows * rows / 2
        else:
            users, first, count = np.unique(samples.users, return_index=True, return_counts=True)
            ranges = np.stack([samples.positions[first], samples.positions[first + count - 1]], 1)
            collator = PassCollator(
                self.catalog, self.data.histories, policy, self.prompt, 1 if stage == "pretrain" else None,
                head=self.head,
            )  # fmt: skip
            rows = collator.rows(users, ranges)
            times = epochs  # that counts both trunks
            pairs = rows * self.prompts(self.data.histories.take(users), pk.TextOnly(self.max_items)) / 2
        logits = 0 if self.head == "items" else targets.sum() * times
        return Work("train", float(rows.sum() * times), float(pairs.sum() * times), float(logits))

    def search(self, policy: Any, form: str) -> Work:
        """The test samples, or ``limit`` of them, as one form is counted."""
        samples = samples_of(self.data, "test").spread(self.limit)
        rows = self.prompts(self.data.before(samples), policy)
        ranks = self.head != "titles" and form != "paper"
        beams = () if ranks else _BEAMS.get(form, (20,))
        times = max(len(beams), 1)
        hypotheses = sum(beams) * (float(self.catalog.lengths.mean()) + len(self.prompt.response_end)) * rows.size
        return Work(
            "rank" if ranks else "search",
            float(rows.sum()) * times + hypotheses,
            float((rows * rows / 2).sum()) * times + hypotheses * float(rows.mean()),
            hypotheses,
            rows.size,
        )

    def prompts(self, histories: pk.Histories, policy: AnyPolicy) -> Any:
        return pk.row_counts(self.catalog, histories, policy, self.prompt).astype(np.float64)

    def nominal_compression(self, policy: AnyPolicy, items: int = 100) -> float:
        """Of one history of so many items of mean length, as the paper counts it."""
        mean = float(self.catalog.lengths.mean())
        levels: Any = policy.levels(pk.Histories.from_sequences([range(items)]))  # type: ignore[union-attr]
        text = int((levels == pk.Level.TEXT).sum())
        return items * mean / (text * mean + int((levels == pk.Level.PATCH).sum()))


# ------------------------------------------------------------------ rates


def taken(record: Mapping[str, Any]) -> float:
    """Seconds of a step on an idle machine: on a CPU those of its threads, whoever else wanted them."""
    on_cpu: bool = record["device"] == CPU
    return float(record["cpu_seconds"] / record["threads"] if on_cpu else record["seconds"])


def recorded(records: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """``{kind: rows a second}`` of steps that were done in one go."""
    sums: dict[str, list[float]] = {}
    for record in records.values():
        if record["rows"] and record["attempts"] == 1:
            both = sums.setdefault(record["kind"], [0.0, 0.0])
            both[0] += record["rows"]
            both[1] += taken(record)
    return {kind: rows / seconds for kind, (rows, seconds) in sums.items()}


def measured(name: str, reader: Reader, options: Mapping[str, Any]) -> dict[str, float]:
    """``{kind: rows a second}``: a few passes and prompts of the model itself, on this machine."""
    model, _ = models.load_model(name, reader.data.titles, words=models.words_of(reader.data), **options)
    policy = pk.ItemPatches(5 if reader.head == "titles" else 0, reader.max_items)
    samples = samples_of(reader.data, "train")
    users, first, count = np.unique(samples.users, return_index=True, return_counts=True)
    ranges = np.stack([samples.positions[first], samples.positions[first + count - 1]], 1)
    histories = reader.data.histories.take(users)
    rows = pk.training_rows(model.catalog, histories, policy, model.prompt, ranges, head=reader.head)
    some = np.arange(min(int(np.searchsorted(np.cumsum(rows), _PROBED_ROWS)) + 1, users.size))
    layout = pk.build_training_layout(
        model.catalog, histories.take(some), policy, model.prompt, ranges[some], head=reader.head
    )
    if model.item_embedding is not None:
        layout = layout.with_identities()
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=0.0)
    passes = []
    for _ in range(3):  # the first makes AdamW's state
        begun = _clock()
        model(layout).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        passes.append(_clock() - begun)
    found = {"train": layout.num_rows / min(passes[1:])}
    model.eval()
    past = reader.data.before(samples_of(reader.data, "test").spread(_PROBED_USERS))
    for kind, search in {"search": "beam", "rank": "items"}.items():
        if kind == "rank" and reader.head == "titles":
            continue
        options_of: dict[str, Any] = {"search": search, "k": 20} | ({"num_beams": 20} if kind == "search" else {})
        model.recommend(past, policy, **options_of)
        begun = _clock()
        model.recommend(past, policy, **options_of)
        extra = 20 * (float(reader.catalog.lengths.mean()) + 1) * len(past) if kind == "search" else 0.0
        total = float(reader.prompts(past, policy).sum()) + extra
        found[kind] = total / (_clock() - begun)
    return found


def _clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time() / torch.get_num_threads()


def on_gpu(steps: Sequence[Step], shape: Shape, tflops: float, utilization: float) -> dict[str, float]:
    """``{key: seconds}`` at a share of a GPU's peak."""
    return {step.key: shape.flops(step.work) / (tflops * 1e12 * utilization) for step in steps}


def at_rates(steps: Sequence[Step], rates: Mapping[str, float]) -> dict[str, float | None]:
    """``{key: seconds}``, None for steps of which no rate is known."""
    return {step.key: step.work.rows / rates[step.work.kind] if step.work.kind in rates else None for step in steps}


def like_others(
    steps: Sequence[Step], records: Mapping[str, Mapping[str, Any]], known: Mapping[str, float | None]
) -> dict[str, float | None]:
    """``{key: seconds}`` of steps without a rate, where the same was done with another seed."""
    found: dict[str, float | None] = {}
    for step in steps:
        same = [taken(record) for key, record in records.items() if _seedless(key) == _seedless(step.key)]
        if known[step.key] is None and same:
            found[step.key] = float(np.mean(same))
    return found


def _seedless(key: str) -> str:
    return re.sub(r"-s\d+", "", key)
