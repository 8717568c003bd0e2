# SPDX-License-Identifier: Apache-2.0
"""One packed sample per user: a history, and the item that came next where it is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from patchkern.batch import planner
from patchkern.batch.catalog import Catalog
from patchkern.batch.control_tokens import first_control_token
from patchkern.batch.histories import Histories, HistoriesLike, is_sequence
from patchkern.batch.layout import PatchLayout
from patchkern.batch.planning import Head, Int32, Int64, RowPlan, Spans
from patchkern.batch.policies import AnyPolicy, FittingPolicy, Level, Levels, check_policy, cut
from patchkern.batch.prompt import Prompt

HEADS = ("titles", "items", "both")
"""What a layout is for: titles, token by token; items, scored from a history's last row; or both."""


def build_layout(
    catalog: Catalog,
    histories: HistoriesLike,
    policy: AnyPolicy,
    prompt: Prompt,
    targets: Sequence[Any] | NDArray[Any] | None = None,
    *,
    transpose: bool | None = None,
    head: str = "titles",
) -> PatchLayout:
    """Plan a packed batch: integers only, on the CPU, safe in data-loader workers.

    Each user becomes ``prefix | history rows | suffix``, with targets ``| target title | response_end``; one separator
    stands between two history entries. For an item head a user is ``prefix | history rows`` and nothing after.

    Args:
        catalog: the titles, and perhaps texts, which the history's items are read as.
        histories: `Histories` or one sequence of item ids per user, oldest first; B users.
        policy: decides which items become what.
        prompt: the fixed tokens.
        targets: B item ids, the next item of each user; adds the response and its labels.
        transpose: also plan the gradient (None: when there are targets).
        head: "titles"; "items", for a model's item head: `PatchLayout.item_rows` has the last row of every history, and
            ``item_labels`` the targets; "both", the rows of titles with the labels of both.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Examples:
        >>> import patchkern as pk
        >>> catalog = pk.Catalog.from_token_ids([5, 6, 7, 8, 9], [0, 2, 5])
        >>> prompt = pk.Prompt(prefix=[1], separator=[2], suffix=[3], response_end=[4])
        >>> policy = pk.ItemPatches(keep_text=1)
        >>> layout = pk.build_layout(catalog, [[0, 1, 1], [0]], policy, prompt, targets=[0, 1])
        >>> layout
        PatchLayout(2 users, 20 rows, longest 12, 2 items in patches, compression 1.43, 7 labels, on cpu)
        >>> layout.cu_seqlens.tolist()
        [0, 12, 20]
    """
    check_inputs(catalog, policy, prompt)
    if not (transpose is None or isinstance(transpose, bool)):
        raise TypeError(f"transpose: expected a bool or None, got {type(transpose).__name__}")
    check_head(head)
    kept = cut(Histories.coerce(histories), policy)
    index = catalog.index_of(kept.items, "histories")
    target_index = None if targets is None else _target_index(catalog, targets, len(kept))
    if isinstance(policy, FittingPolicy):
        levels = policy.fit(kept, catalog.inputs.lengths[index], prompt)
    else:
        levels = policy.levels(kept)
    if head == "items":
        open_ended = np.full(len(kept), -1, np.int32)
        spans = Spans(np.full(len(kept), Head.PREFIX, np.uint8), np.zeros(len(kept), np.int64))
        layout = unlabelled(plan_layout(catalog, kept, index, levels, prompt, open_ended, spans))
    else:
        layout = plan_layout(catalog, kept, index, levels, prompt, target_index)
    if head != "titles":
        after = np.zeros(len(kept), np.int64)
        if head == "both":
            after += len(prompt.suffix)
            if target_index is not None:
                after += catalog.lengths[target_index] + len(prompt.response_end)
        cu_seqlens = layout.cu_seqlens.numpy().astype(np.int64)
        layout = with_items(layout, cu_seqlens[1:] - 1 - after, cu_seqlens[:-1], target_index)
    wanted = targets is not None if transpose is None else transpose
    return layout.with_transpose() if wanted else layout


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


def _target_index(catalog: Catalog, targets: Sequence[Any] | NDArray[Any], n_users: int) -> NDArray[np.int32]:
    if not is_sequence(targets):
        raise TypeError(f"targets: expected one item id per user, got {type(targets).__name__}")
    if len(targets) != n_users:
        raise ValueError(f"targets: expected one item id per user ({n_users}), got {len(targets)}")
    index = catalog.index_of(targets, "targets")
    if index.ndim != 1:
        raise ValueError(f"targets: expected one item id per user ({n_users}), got shape {index.shape}")
    return index


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
