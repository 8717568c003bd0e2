# SPDX-License-Identifier: Apache-2.0
"""What every layout is planned by: the arguments checked, the planner called, labels of items added."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from patchkern.batch import planner
from patchkern.batch.catalog import Catalog
from patchkern.batch.control_tokens import first_control_token
from patchkern.batch.histories import Histories
from patchkern.batch.layout import PatchLayout
from patchkern.batch.planning import Int32, Int64, RowPlan, Spans
from patchkern.batch.policy_kinds import Level, Levels, check_policy
from patchkern.batch.prompt import Prompt

HEADS = ("titles", "items", "both")
"""What a layout is for: titles, token by token; items, scored from a history's last row; or both."""


def check_head(head: Any) -> None:
    """Raise a ValueError unless ``head`` is one of `HEADS`."""
    if head not in HEADS:
        raise ValueError(f"head: expected one of {', '.join(HEADS)}, got {head!r}")


def unlabelled(layout: PatchLayout) -> PatchLayout:
    """The layout without labels of tokens."""
    return PatchLayout._trusted({**layout.__dict__, "labels": None, "logit_rows": None, "logit_labels": None})


def with_items(layout: PatchLayout, rows: Int64, begins: Int64, labels: Int32 | None) -> PatchLayout:
    """The layout with item rows, and their labels if they are known.

    Args:
        layout: any.
        rows: ``(M,)`` the last row of each history.
        begins: ``(M,)`` the first row that each history could have.
        labels: ``(M,)`` catalogue positions.
    """
    lacking = np.flatnonzero(rows < begins)
    if lacking.size:
        raise ValueError(
            "prompt: expected a prefix, from which the item head scores an empty history, got none and "
            f"{lacking.size} histories without items"
        )
    item_labels = None if labels is None else torch.from_numpy(labels.astype(np.int64))
    return PatchLayout._trusted({**layout.__dict__, "item_rows": torch.from_numpy(rows), "item_labels": item_labels})


def check_inputs(catalog: Any, policy: Any, prompt: Any) -> None:
    """Raise a TypeError or ValueError unless these are what a layout is planned from."""
    if not isinstance(catalog, Catalog):
        raise TypeError(f"catalog: expected a Catalog, got {type(catalog).__name__}")
    check_policy(policy)
    if not isinstance(prompt, Prompt):
        raise TypeError(f"prompt: expected a Prompt, got {type(prompt).__name__}")
    check_titles(catalog, prompt)


def check_titles(catalog: Catalog, prompt: Prompt) -> None:
    """Raise a ValueError if a title holds one of the prompt's `control_ids`: its end could be anywhere.

    The time is that of a few look-ups; a catalogue collects its tokens once.
    """
    found = title_with(catalog, prompt.control_ids)
    if found is not None:
        token, title = found
        raise ValueError(
            f"catalog: expected titles without token {token}, {prompt.control_ids[token]}, got it in {title}; no title "
            "may write a control token, and a prompt's separator, response_end and markers must be tokens that no "
            "title needs"
        )


def title_with(catalog: Catalog, control: Mapping[int, str]) -> tuple[int, str] | None:
    """The first token of any title or text that is in ``control``, and a name for it; None without one."""
    if control.keys().isdisjoint(catalog.distinct_tokens):
        return None
    at = first_control_token(catalog.token_ids, control)
    if at is None:
        return None if catalog.texts is None else title_with(catalog.texts, control)
    item = int(np.searchsorted(catalog.offsets, at, side="right")) - 1
    title = f"item {catalog.item_ids.item(item)!r}"
    return int(catalog.token_ids[at]), title if catalog.titles is None else f"{title}, {catalog.titles[item]!r}"


def plan_layout(
    catalog: Catalog,
    histories: Histories,
    index: Int32,
    levels: Levels,
    prompt: Prompt,
    targets: Int32 | None,
    spans: Spans | None = None,
) -> PatchLayout:
    """What the planner makes of histories, the ``(N,)`` catalogue positions of their items and a policy's levels.

    Prefixes, which need the rows that are planned here, and the transpose are left to the caller.
    """
    _check_levels(levels, histories)
    if levels.max(initial=0) == Level.DROP:
        kept = levels != Level.DROP
        histories, index, levels = histories.keep(kept), index[kept], levels[kept]
    _check_joins(levels, histories)
    titles = None if targets is None else catalog.generated(targets)
    plan: RowPlan = planner.active.plan_rows(catalog.planned, index, histories.offsets, levels, prompt, titles, spans)
    values: dict[str, Any] = {
        name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value
        for name, value in plan._asdict().items()
    }
    values |= {"prefix": None, "transpose": None, "catalog_fingerprint": catalog.fingerprint}
    values["max_position"] = int(plan.position_ids.max(initial=-1))
    return PatchLayout._trusted(values)


def target_samples(histories: Histories, target_ranges: ArrayLike) -> tuple[Int64, Int64]:
    """``(S,)`` user and position of every target, user by user.

    Args:
        histories: of B users.
        target_ranges: ``(B, 2)`` integers, the first and the last position that is a target.

    Raises:
        ValueError: naming what was expected and what came.
    """
    ranges = np.asarray(target_ranges)
    if not len(histories) and not ranges.size:  # a list without users says nothing of their two columns
        ranges = np.zeros((0, 2), np.int64)
    if ranges.shape != (len(histories), 2) or ranges.dtype.kind not in "iu":
        raise ValueError(
            f"target_ranges: expected integers of shape {(len(histories), 2)}, got {ranges.dtype} {ranges.shape}"
        )
    first, last = ranges.astype(np.int64).T
    count = np.maximum(last - first + 1, 0)
    wrong = np.flatnonzero((count > 0) & ((first < 0) | (last >= histories.lengths)))
    if wrong.size:
        at = int(wrong[0])
        raise ValueError(
            f"target_ranges[{at}]: expected positions in 0..{histories.lengths[at] - 1}, got {ranges[at].tolist()}"
        )
    user = np.repeat(np.arange(len(histories)), count)
    position = np.arange(user.size) - np.repeat(np.cumsum(count) - count - first, count)
    return user, position


def _check_levels(levels: Levels, histories: Histories) -> None:
    """A policy may be the user's own: see that it kept to the contract before the planner relies on it."""
    if not isinstance(levels, np.ndarray) or levels.dtype != np.uint8 or levels.shape != histories.items.shape:
        got = f"{levels.dtype} {levels.shape}" if isinstance(levels, np.ndarray) else type(levels).__name__
        raise ValueError(f"policy: expected levels of dtype uint8 and shape {histories.items.shape}, got {got}")
    if levels.max(initial=0) > Level.DROP:
        raise ValueError(f"policy: expected levels 0 to 3, got {levels.max()}")


def _check_joins(levels: Levels, histories: Histories) -> None:
    if levels.max(initial=0) < Level.JOIN:
        return
    starts = histories.offsets[:-1][histories.lengths > 0]
    alone = (levels[1:] == Level.JOIN) & (levels[:-1] == Level.TEXT)
    if (levels[starts] == Level.JOIN).any() or alone.any():
        raise ValueError("policy: expected every JOIN to follow a patch item of the same user, got one that does not")
