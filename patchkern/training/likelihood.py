# SPDX-License-Identifier: Apache-2.0
"""How likely a model finds what users took next: of each target, and of all items where the model has an item head."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from patchkern.batch.arguments import check_count
from patchkern.batch.experts import Experts
from patchkern.batch.histories import Histories, HistoriesLike
from patchkern.batch.layout import PatchLayout
from patchkern.batch.policies import ItemDropout, RandomItemPatches
from patchkern.batch.policy_kinds import AnyPolicy, TrunkPolicy, cut_every_of
from patchkern.batch.row_counts import row_counts
from patchkern.batch.sample_layout import build_layout
from patchkern.batch.training_layout import build_training_layout, training_rows
from patchkern.data.samples import Samples
from patchkern.search.prompts import vectors_of
from patchkern.search.protocol import policy_of
from patchkern.training.modes import in_mode
from patchkern.training.passes import cut_to_passes
from patchkern.training.protocol import TrainableModel

Int64 = NDArray[np.int64]

ROWS_PER_PASS = 4096

_LABELS_AT_ONCE = 1024
_SCORES_AT_ONCE = 1 << 24


def target_nll(
    model: TrainableModel,
    histories: HistoriesLike,
    samples: tuple[Any, Any],
    policy: AnyPolicy | None = None,
    *,
    rows_per_pass: int = ROWS_PER_PASS,
    head: str = "titles",
) -> NDArray[np.float64]:
    """Minus the log-probability of each target.

    It is what `PatchedCausalLM.score_items` says of the target. Where the policy allows it, a user's history is
    computed once for all targets, as in training: with the same results, from a fraction of the rows.

    Args:
        model: it runs in evaluation mode and is left as it was.
        histories: whole histories of the users, targets included.
        samples: ``(users, positions)``, ``(S,)`` int64 each, as in `Histories.before`.
        policy: how histories are compressed; the model's own where None.
        rows_per_pass: of one forward pass, at most, unless a single sample has more.
        head: "titles": of the tokens of its title and ``response_end``, over the full vocabulary; "items": of the item,
            over the catalogue, by the model's item head.

    Returns:
        ``(S,)`` float64, in nats.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    if head not in ("titles", "items"):
        raise ValueError(f"head: expected titles or items, got {head!r}")
    given = Histories.coerce(histories)
    samples = users, positions = Samples.of(samples, given)
    index = model.catalog.index_of(given.at(users, positions), "samples").astype(np.int64)
    nll = np.zeros(users.size)
    if head == "items":
        for chosen, scores in item_log_probs(model, given, samples, policy, rows_per_pass=rows_per_pass):
            nll[chosen] = -scores[np.arange(chosen.size), index[chosen]]
        return nll
    for chosen, layout, vectors in _passes(model, given, users, positions, policy, rows_per_pass, head):
        sizes = model.catalog.lengths[index[chosen]].astype(np.int64) + len(model.prompt.response_end)
        with torch.no_grad(), in_mode(model, training=False):
            nll[chosen] = _per_sample(model(layout, vectors=vectors).logits, layout, sizes)
    return nll


def item_log_probs(
    model: TrainableModel,
    histories: HistoriesLike,
    samples: tuple[Any, Any],
    policy: AnyPolicy | None = None,
    *,
    rows_per_pass: int = ROWS_PER_PASS,
) -> Iterator[tuple[Int64, NDArray[np.floating[Any]]]]:
    """What ``score_items(head="items")`` says of every sample, part by part: full rankings of any number of them.

    Samples of one user come out of one pass over the history where the policy allows it.

    Args:
        model: one with an item head; it runs in evaluation mode and is left as it was.
        histories, samples, policy, rows_per_pass: as of `target_nll`.

    Returns:
        ``(n,)`` which of the samples, and ``(n, n_items)`` their log-probabilities, float32, or float64 for a float64
        model; every sample once.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    if model.item_head is None:
        raise ValueError("model: expected one with an item head (item_head=True), got one without")
    given = Histories.coerce(histories)
    users, positions = Samples.of(samples, given)
    most = max(_SCORES_AT_ONCE // max(len(model.catalog), 1), 1)
    for chosen, layout, vectors in _passes(model, given, users, positions, policy, rows_per_pass, "items"):
        with torch.no_grad(), in_mode(model, training=False):
            states = model.item_states(layout, vectors)
        wanted = np.flatnonzero(chosen >= 0)  # `Experts` have still more labels, of no sample
        chosen, states = chosen[wanted], states[torch.from_numpy(wanted).to(states.device)]
        for begin in range(0, chosen.size, most):
            yield chosen[begin : begin + most], model.item_scores(states[begin : begin + most]).cpu().numpy()


def _passes(
    model: TrainableModel,
    histories: Histories,
    users: Int64,
    positions: Int64,
    policy: AnyPolicy | None,
    rows_per_pass: int,
    head: str,
) -> Iterator[tuple[Int64, PatchLayout, Tensor | None]]:
    """Layouts of some samples each, which those are, in the order of their labels, and the layouts' vectors.

    Of a layout for items, -1 are labels of no sample.
    """
    check_count("rows_per_pass", rows_per_pass, minimum=1)
    policy = policy_of(model, policy)
    if isinstance(policy, Experts):
        policy = replace(policy, boundaries=None)  # every sample as it is served
    sharing = _share_trunks(model, policy, positions, head)
    together, apart = np.flatnonzero(sharing), np.flatnonzero(~sharing)
    if together.size:
        passes = _trunk_passes(model, histories, users[together], positions[together], policy, rows_per_pass, head)
        yield from ((np.where(chosen < 0, -1, together[chosen]), layout, None) for chosen, layout in passes)
    if apart.size:
        single = _single_passes(model, histories, users[apart], positions[apart], policy, rows_per_pass, head)
        yield from ((apart[chosen], layout, vectors) for chosen, layout, vectors in single)


def _trunk_passes(
    model: TrainableModel,
    histories: Histories,
    users: Int64,
    positions: Int64,
    policy: AnyPolicy,
    rows_per_pass: int,
    head: str,
) -> Iterator[tuple[Int64, PatchLayout]]:
    """Each history once for all of its samples, as in training.

    For items also for what lies between two samples, where these would else be two passes of more rows: those labels
    are of no sample, and have -1.
    """
    catalog, prompt = model.catalog, model.prompt

    def count_rows(users: Int64, ranges: Int64) -> Int64:
        counts = training_rows(catalog, histories.take(users), policy, prompt, ranges, head=head)
        # a sample alone is a pass, however long
        return np.where(ranges[:, 0] == ranges[:, 1], np.minimum(counts, rows_per_pass), counts)

    order = np.lexsort((positions, users))
    if head == "items":
        users, positions, order = _with_between(users[order], positions[order], order, count_rows)
    runs = cut_to_passes(users, positions, count_rows, rows_per_pass)
    of, first, last, run_rows = np.array(runs, np.int64).T
    ends = np.cumsum(last - first + 1)
    done = 0
    for places in _filled(run_rows, rows_per_pass):
        ranges = np.stack([first[places], last[places]], axis=1)
        layout = build_training_layout(
            catalog, histories.take(of[places]), policy, prompt, ranges, transpose=False, head=head
        )
        yield order[done : ends[places[-1]]], layout
        done = int(ends[places[-1]])


def _with_between(
    users: Int64, positions: Int64, order: Int64, count_rows: Callable[[Int64, Int64], Int64]
) -> tuple[Int64, Int64, Int64]:
    """Samples in order, with those between two of a user's where one pass over all has no more rows than two passes.

    Returns:
        ``(N,)`` users and positions, and of ``order``, with -1 for those that were not asked for.
    """
    gaps = np.diff(positions) - 1
    at = np.flatnonzero((np.diff(users) == 0) & (gaps > 0))
    first, last = positions[at], positions[at + 1]
    apart = count_rows(users[at], np.stack([first, first], axis=1)) + count_rows(
        users[at], np.stack([last, last], axis=1)
    )
    at = at[count_rows(users[at], np.stack([first, last], axis=1)) <= apart]
    sizes = np.ones(users.size, np.int64)
    sizes[at] += gaps[at]
    place = np.repeat(np.arange(users.size), sizes)
    step = np.arange(place.size) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return users[place], positions[place] + step, np.where(step == 0, order[place], -1)


def _single_passes(
    model: TrainableModel,
    histories: Histories,
    users: Int64,
    positions: Int64,
    policy: AnyPolicy,
    rows_per_pass: int,
    head: str,
) -> Iterator[tuple[Int64, PatchLayout, Tensor | None]]:
    """Every sample with a history of its own."""
    catalog, prompt = model.catalog, model.prompt
    every = histories.before(users, positions)
    rows = row_counts(catalog, every, policy, prompt)
    order = np.argsort(-rows, kind="stable")
    for places in _filled(rows[order], rows_per_pass):
        chosen = order[places]
        targets = histories.at(users[chosen], positions[chosen])
        layout = build_layout(catalog, every.take(chosen), policy, prompt, targets, transpose=False, head=head)
        yield chosen, layout, vectors_of(model, layout, every.take(chosen), policy)


def _share_trunks(
    model: TrainableModel, policy: AnyPolicy, positions: Int64, head: str = "titles"
) -> NDArray[np.bool_]:
    """``(S,)`` of which samples are passes of many targets exactly what they are alone?

    Not of those whose history is cut one item at a time: each begins elsewhere.
    """
    drawn = isinstance(policy, (RandomItemPatches, ItemDropout))  # for every prompt anew
    begun = bool(model.prompt.suffix) or head == "items"  # a branch for a title begins with a row of its own
    if drawn or not begun or not isinstance(policy, (TrunkPolicy, Experts)) or not model.takes_branches:
        return np.zeros(positions.shape, bool)
    if policy.max_items is None or cut_every_of(policy) > 1:
        return np.ones(positions.shape, bool)
    return positions <= policy.max_items


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
