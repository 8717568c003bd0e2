# SPDX-License-Identifier: Apache-2.0
"""Layouts that were planned apart, as one batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from patchkern.batch.layout import PatchLayout


def join_layouts(layouts: Sequence[PatchLayout]) -> PatchLayout:
    """The spans of several layouts on the CPU, one after the other, as one layout without a transpose.

    Where the layouts are of several catalogues, ``title_index`` no longer says of which, and the fingerprint is None.

    Raises:
        TypeError, ValueError: no layout, or one that is not on the CPU.

    Examples:
        >>> import patchkern as pk
        >>> catalog = pk.Catalog.from_token_ids(range(4), range(5))
        >>> prompt = pk.Prompt(separator=[4])
        >>> old = pk.build_layout(catalog, [[0, 1]], pk.ItemPatches(keep_text=0), prompt)
        >>> new = pk.build_layout(catalog, [[2], [3, 0]], pk.TextOnly(), prompt)
        >>> pk.join_layouts([old, new]).cu_seqlens.tolist()
        [0, 3, 4, 7]
    """
    if not layouts:
        raise ValueError("layouts: expected at least one, got none")
    for number, layout in enumerate(layouts):
        if not isinstance(layout, PatchLayout):
            raise TypeError(f"layouts[{number}]: expected a PatchLayout, got {type(layout).__name__}")
        if layout.device.type != "cpu":
            raise ValueError(f"layouts[{number}]: expected one on the CPU, got {layout.device}")
    rows, items, titles, tokens = (
        np.cumsum([0, *(getattr(layout, name).shape[0] for layout in layouts)]).tolist()
        for name in ("lo", "items", "title_index", "token_ids")
    )
    fingerprints = {layout.catalog_fingerprint for layout in layouts}
    lo = torch.cat([torch.where(x.lo < 0, x.lo, x.lo + at) for x, at in zip(layouts, items, strict=False)])
    hi = torch.cat([torch.where(x.lo < 0, 0, x.hi + at) for x, at in zip(layouts, items, strict=False)])
    offsets = [x.offsets[:-1] + at for x, at in zip(layouts, tokens, strict=False)]
    cu_seqlens = [x.cu_seqlens[:-1] + at for x, at in zip(layouts, rows, strict=False)]
    values: dict[str, Any] = {
        "lo": lo,
        "hi": hi,
        "items": torch.cat([x.items + at for x, at in zip(layouts, titles, strict=False)]),
        "token_ids": torch.cat([x.token_ids for x in layouts]),
        "offsets": torch.cat([*offsets, torch.tensor(tokens[-1:], dtype=torch.int32, device="cpu")]).int(),
        "title_index": torch.cat([x.title_index for x in layouts]),
        "cu_seqlens": torch.cat([*cu_seqlens, torch.tensor(rows[-1:], dtype=torch.int32, device="cpu")]).int(),
        "max_seqlen": max(x.max_seqlen for x in layouts),
        "position_ids": torch.cat([x.position_ids for x in layouts]),
        "labels": None,
        "logit_rows": None,
        "logit_labels": None,
        "history_tokens": sum(x.history_tokens for x in layouts),
        "history_rows": sum(x.history_rows for x in layouts),
        "max_token_id": max(x.max_token_id for x in layouts),
        "max_position": max(x.max_position for x in layouts),
        "prefix": None,
        "max_prefix": 0,
        "transpose": None,
        "cu_users": None,
        "catalog_fingerprint": fingerprints.pop() if len(fingerprints) == 1 else None,
    }
    if any(x.labels is not None for x in layouts):
        labels = [x.labels if x.labels is not None else torch.full_like(x.position_ids, -100) for x in layouts]
        values["labels"] = torch.cat(labels)
        logits = [x.logit_rows + at for x, at in zip(layouts, rows, strict=False) if x.logit_rows is not None]
        values["logit_rows"] = torch.cat(logits)
        values["logit_labels"] = torch.cat([x.logit_labels for x in layouts if x.logit_labels is not None])
    if any(x.item_rows is not None for x in layouts):
        items_of = [(x.item_rows, x.item_labels, at) for x, at in zip(layouts, rows, strict=False)]
        values["item_rows"] = torch.cat([own + at for own, _, at in items_of if own is not None])
        if all(labels is not None for own, labels, _ in items_of if own is not None):
            values["item_labels"] = torch.cat([labels for _, labels, _ in items_of if labels is not None])
    if any(x.vector_rows is not None for x in layouts):
        vectors = [x.vector_rows + at for x, at in zip(layouts, rows, strict=False) if x.vector_rows is not None]
        values["vector_rows"] = torch.cat(vectors)
    if any(x.cu_users is not None for x in layouts):
        users = [x.prompts[:-1] + at for x, at in zip(layouts, rows, strict=False)]
        values["cu_users"] = torch.cat([*users, torch.tensor(rows[-1:], dtype=torch.int32)]).int()
    if any(x.prefix is not None for x in layouts):
        values["prefix"] = _joined_ranges(layouts, rows)
        values["max_prefix"] = max(x.max_prefix for x in layouts)
    return PatchLayout._trusted(values)


def _joined_ranges(layouts: Sequence[PatchLayout], rows: Sequence[int]) -> Tensor:
    """The prefixes of layouts that begin at these rows: as many ranges for every span as any has."""
    ranges = [
        torch.zeros(x.num_users, 1, 2, dtype=torch.int32, device="cpu") if x.ranges is None else x.ranges
        for x in layouts
    ]
    most = max(x.shape[1] for x in ranges)
    padded = [F.pad(x, (0, 0, 0, most - x.shape[1])) + at for x, at in zip(ranges, rows, strict=False)]
    joined = torch.cat(padded).int()
    return joined if most > 1 else joined[:, 0]
