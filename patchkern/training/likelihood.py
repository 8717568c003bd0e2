# SPDX-License-Identifier: Apache-2.0
"""How likely a model finds what users took next: the negative log-likelihood of each target."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from patchkern.batch.histories import Histories, HistoriesLike, check_count
from patchkern.batch.layout import PatchLayout
from patchkern.batch.policies import AnyPolicy, RandomItemPatches, TrunkPolicy
from patchkern.batch.row_counts import row_counts
from patchkern.batch.sample_layout import build_layout
from patchkern.batch.training_layout import build_training_layout, training_rows
from patchkern.models.patched_lm import PatchedCausalLM
from patchkern.search.protocol import policy_of
from patchkern.training.passes import cut_to_passes

Samples = tuple[NDArray[np.int64], NDArray[np.int64]]
Int64 = NDArray[np.int64]

_LABELS_AT_ONCE = 1024


def target_nll(
    model: PatchedCausalLM,
    histories: HistoriesLike,
    samples: Samples,
    policy: AnyPolicy | None = None,
    *,
    rows_per_pass: int = 4096,
) -> NDArray[np.float64]:
    """Minus the log-probability of each target's title: of its tokens and ``response_end``, over the full vocabulary.

    It is what `PatchedCausalLM.score_items` says of the target, without scoring the other titles. Where the policy
    allows it, a user's history is computed once for all targets, as in training: with the same results, from a fraction
    of the rows.

    Args:
        model: it runs in evaluation mode and is left as it was.
        histories: whole histories of the users, targets included.
        samples: ``(users, positions)``, ``(S,)`` int64 each, as in `Histories.before`.
        policy: how histories are compressed; the model's own where None.
        rows_per_pass: of one forward pass, at most, unless a single sample has more.

    Returns:
        ``(S,)`` float64, in nats.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    check_count("rows_per_pass", rows_per_pass, minimum=1)
    policy = policy_of(model, policy)
    given, (users, positions) = Histories.coerce(histories), samples
    model.catalog.index_of(given.at(users, positions), "samples")
    nll = np.zeros(users.size)
    training = model.training
    model.eval()
    try:
        for chosen, layout in _passes(model, given, users, positions, policy, rows_per_pass):
            targets = model.catalog.index_of(given.at(users[chosen], positions[chosen]))
            sizes = model.catalog.lengths[targets].astype(np.int64) + len(model.prompt.response_end)
            with torch.no_grad():
                nll[chosen] = _per_sample(model(layout).logits, layout, sizes)
    finally:
        model.train(training)
    return nll


def _passes(
    model: PatchedCausalLM, histories: Histories, users: Int64, positions: Int64, policy: AnyPolicy, rows_per_pass: int
) -> Iterator[tuple[Int64, PatchLayout]]:
    """Layouts of some samples each, and which those are, in the order of their labels."""
    catalog, prompt = model.catalog, model.prompt
    if users.size and _share_trunks(model, policy, positions):

        def count_rows(users: Int64, ranges: Int64) -> Int64:
            counts = training_rows(catalog, histories.take(users), policy, prompt, ranges)
            # a sample alone is a pass, however long
            return np.where(ranges[:, 0] == ranges[:, 1], np.minimum(counts, rows_per_pass), counts)

        order = np.lexsort((positions, users))
        of, ranges, rows = cut_to_passes(users, positions, count_rows, rows_per_pass)
        ends = np.cumsum(ranges[:, 1] - ranges[:, 0] + 1)
        done = 0
        for runs in _filled(rows, rows_per_pass):
            users, targets = of[runs], ranges[runs]
            layout = build_training_layout(catalog, histories.take(users), policy, prompt, targets, transpose=False)
            yield order[done : ends[runs[-1]]], layout
            done = int(ends[runs[-1]])
        return
    every = histories.before(users, positions)
    rows = row_counts(catalog, every, policy, prompt)
    order = np.argsort(-rows, kind="stable")
    for places in _filled(rows[order], rows_per_pass):
        chosen = order[places]
        targets = histories.at(users[chosen], positions[chosen])
        yield chosen, build_layout(catalog, every.take(chosen), policy, prompt, targets, transpose=False)


def _share_trunks(model: PatchedCausalLM, policy: AnyPolicy, positions: Int64) -> bool:
    """Are passes of many targets exactly their samples?"""
    whole = policy.max_items is None or int(positions.max()) <= policy.max_items
    drawn = isinstance(policy, RandomItemPatches)  # for every prompt anew
    exact = isinstance(policy, TrunkPolicy) and whole and not drawn and bool(model.prompt.suffix)
    return exact and model.takes_branches


def _filled(rows: Int64, most: int) -> Iterator[Int64]:
    """Consecutive places whose rows together are at most ``most``, at least one."""
    begin, filled = 0, 0
    for place, count in enumerate(rows.tolist()):
        if place > begin and filled + count > most:
            yield np.arange(begin, place)
            begin, filled = place, 0
        filled += count
    if rows.size:
        yield np.arange(begin, rows.size)


def _per_sample(logits: Tensor, layout: PatchLayout, sizes: Int64) -> NDArray[np.float64]:
    """``(n,)`` for the layout's samples, whose labels follow each other, so many of each."""
    if layout.logit_labels is None or layout.logit_labels.shape[0] != sizes.sum():
        raise RuntimeError(f"expected a layout with {sizes.sum()} labels, got {layout}")
    labels = layout.logit_labels.to(logits.device)
    double = logits.dtype == torch.float64
    pieces = [
        nn.functional.cross_entropy(part if double else part.float(), own, reduction="none")
        for part, own in zip(logits.split(_LABELS_AT_ONCE), labels.split(_LABELS_AT_ONCE), strict=True)
    ]
    nll = torch.cat(pieces).double().cpu().numpy()
    return np.bincount(np.repeat(np.arange(sizes.size), sizes), nll).astype(np.float64, copy=False)
