# SPDX-License-Identifier: Apache-2.0
"""What policies need for whole histories, and what they reach in a given memory."""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import patchkern as pk
from patchkern.batch.row_counts import longest_history, row_counts
from patchkern.budget.live_bytes import peak_memory
from patchkern.budget.search import SearchCost, UserTooLarge
from patchkern.data import Interactions
from patchkern.evaluation.metrics import Evaluation, evaluate
from patchkern.search.batching import size_of_beams
from patchkern.search.trie import Trie

POLICIES: dict[str, pk.Policy] = {
    "text": pk.TextOnly(max_items=None),
    "items": pk.ItemPatches(20, max_items=None),
    "sessions": pk.SessionPatches(20, max_items=None),
}


@dataclass(frozen=True)
class Accuracy:
    """Recommendations for the test targets of the same users, and how many items fitted for each."""

    evaluation: Evaluation
    items: NDArray[np.int64]


@dataclass(frozen=True)
class Result:
    """One row of the table.

    Attributes:
        items, rows: ``(B,)`` of every user.
        seconds: for all of them.
        predicted, measured: peak, bytes.
        users_at_once, chunk_rows: of the plan.
        longest: items of the longest history that fits.
        limit: what ends it, "memory" or the model's "positions".
    """

    name: str
    items: NDArray[np.int64]
    rows: NDArray[np.int64]
    seconds: float
    predicted: int
    measured: int
    users_at_once: int
    chunk_rows: int | None
    longest: int
    limit: str
    accuracy: Accuracy | None = None

    @property
    def seconds_per_user(self) -> float:
        return self.seconds / self.rows.size


def measure(model: pk.PatchedCausalLM, histories: pk.Histories, name: str, args: argparse.Namespace) -> Result:
    """Recommend to all users under one policy; a history that does not fit is an error but for a trained model."""
    policy = POLICIES[name]
    trie = Trie.from_catalog(model.catalog, model.prompt.response_end)
    cost = SearchCost(model, size_of_beams(trie, args.num_beams))
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    by_memory, by_positions = cost.max_rows(args.budget), (positions or 2**31) - trie.depth + 1
    max_rows = min(by_memory, by_positions)
    if args.checkpoint is not None:
        histories = cut(model, histories, policy, max_rows)

    def recommend(users: pk.Histories) -> None:
        model.recommend(
            users, policy, k=args.k, num_beams=args.num_beams, memory_budget=args.budget, batch_size=len(histories)
        )

    recommend(histories.take([0]).latest(50))  # what only the first run does: compiling, starting libraries
    on_gpu = model.device.type == "cuda"
    resident = torch.cuda.memory_allocated(model.device) if on_gpu else cost.weights
    times, peaks = [], []
    for _ in range(args.repeats):
        started = time.perf_counter()
        if on_gpu:
            with peak_memory(model.device) as peak:
                recommend(histories)
            peaks.append(peak.bytes)
        else:
            recommend(histories)
        times.append(time.perf_counter() - started)
    rows = row_counts(model.catalog, histories, policy, model.prompt)
    plan = cost.plan(rows, args.budget, len(histories))
    if not on_gpu:
        most = max(plan.batches, key=lambda batch: batch.needed.peak)
        with peak_memory(model.device) as peak:
            recommend(histories.take(most.users))
        peaks.append(peak.bytes)
    return Result(
        name,
        histories.lengths,
        rows,
        statistics.median(times),
        plan.peak,
        resident + max(peaks),
        plan.users_per_batch,
        plan.chunk_rows,
        longest(model, histories, policy, max_rows),
        "memory" if by_memory < by_positions else "positions",
    )


def cut(model: pk.PatchedCausalLM, histories: pk.Histories, policy: pk.Policy, max_rows: int) -> pk.Histories:
    """The most of every user's latest items whose prompt has at most ``max_rows`` rows."""
    lengths = histories.lengths
    fitting = [longest_history(model.catalog, history, policy, model.prompt, max_rows) for history in histories]
    return histories.between(np.arange(lengths.size), lengths - np.array(fitting, np.int64), lengths)


def longest(model: pk.PatchedCausalLM, histories: pk.Histories, policy: pk.Policy, max_rows: int) -> int:
    """Items of the longest history that fits, made of all users' histories, one after the other and over again."""
    items = histories.items
    while items.size == (count := longest_history(model.catalog, items, policy, model.prompt, max_rows)) > 0:
        items = np.tile(items, 2)
    return count


def accuracy(
    model: pk.PatchedCausalLM,
    data: Interactions,
    users: NDArray[np.int64],
    policy: pk.Policy,
    args: argparse.Namespace,
) -> Accuracy:
    """Of the users' test targets, with as many items as fit; items already seen are left out even where cut off."""
    samples = data.samples("test")
    samples = samples.take(np.isin(samples.users, users))
    histories = data.before(samples)
    unseen = np.ones((len(histories), len(model.catalog)), np.bool_)
    owner = np.repeat(np.arange(len(histories)), histories.lengths)
    unseen[owner, model.catalog.index_of(histories.items, "histories")] = False

    def recommend(kept: pk.Histories) -> list[list[tuple[Any, float]]]:
        return model.recommend(
            kept,
            policy,
            k=args.k,
            num_beams=args.num_beams,
            memory_budget=args.budget,
            batch_size=len(users),
            allowed_items=unseen,
        )

    try:
        lists = recommend(histories)
    except UserTooLarge as error:
        histories = cut(model, histories, policy, error.max_rows)
        lists = recommend(histories)
    evaluation = evaluate(lists, data.targets(samples), [args.k], catalog=model.catalog, users=samples.users)
    return Accuracy(evaluation, histories.lengths)
