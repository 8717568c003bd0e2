# SPDX-License-Identifier: Apache-2.0
"""A small batch whose arguments tests make wrong one at a time, and what every refusal must be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cases
import oracle
import pytest
import torch

import patchkern as pk

TITLES: dict[Any, oracle.Title] = {10: [1, 2], 20: [3], 30: [4, 5, 6]}
CATALOG = cases.make_catalog(TITLES)
PROMPT = cases.make_prompt(oracle.Parts([7], [8], [9], [10]))
HISTORIES = [[10, 20, 30], [], [30]]
TARGETS = [20, 10, 30]
VOCABULARY = 11
LAYOUT_ARGUMENTS: dict[str, Any] = {
    "catalog": CATALOG,
    "histories": HISTORIES,
    "policy": pk.TextOnly(),
    "prompt": PROMPT,
    "targets": TARGETS,
}


def weight_of(**options: Any) -> torch.Tensor:
    return torch.ones(VOCABULARY, 8, **options)


def refused(call: Callable[..., Any], error: type[Exception], message: str, *arguments: Any, **options: Any) -> None:
    with pytest.raises(error, match=message) as caught:
        call(*arguments, **options)
    assert type(caught.value) in (TypeError, ValueError)


class OwnPolicy:
    max_items = None

    def __init__(self, levels: Any) -> None:
        self.made = levels

    def levels(self, histories: pk.Histories) -> Any:
        return self.made


def made_by_hand() -> pk.PatchLayout:
    """Rows: literal 7, the patch of [1, 2], the session {[1, 2], [3]}, literal 9."""
    layout = pk.PatchLayout(
        lo=torch.tensor([-8, 0, 1, -10], dtype=torch.int32),
        hi=torch.tensor([0, 1, 3, 0], dtype=torch.int32),
        items=torch.tensor([0, 0, 1], dtype=torch.int32),
        token_ids=torch.tensor([1, 2, 3], dtype=torch.int32),
        offsets=torch.tensor([0, 2, 3], dtype=torch.int32),
        title_index=torch.tensor([0, 1], dtype=torch.int32),
        cu_seqlens=torch.tensor([0, 3, 4], dtype=torch.int32),
        max_seqlen=3,
        position_ids=torch.tensor([0, 1, 2, 0]),
        labels=torch.tensor([-100, -100, -100, -100]),
        logit_rows=torch.tensor([1]),
        logit_labels=torch.tensor([5]),
        history_tokens=5,
        history_rows=2,
        max_token_id=9,
        max_position=2,
    )
    return layout.with_transpose()
