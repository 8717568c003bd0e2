# SPDX-License-Identifier: Apache-2.0
"""Prompts as a search computes them, and how many rows that took."""

from __future__ import annotations

from typing import Any

import pytest

import patchkern as pk
from patchkern.search import prompts
from patchkern.search.prompts import Prompts

LONG = pk.Prompt(prefix=range(60, 90), separator=[92], suffix=[93, 94], response_end=[96])


def compute(
    model: pk.PatchedCausalLM, histories: Any, policy: Any, max_rows: int = 0, **options: Any
) -> tuple[Prompts, pk.PatchLayout]:
    layout = pk.build_layout(model.catalog, histories, policy, model.prompt)
    with model.searching():
        return Prompts(model, layout, max_rows, **options), layout


def computed_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of every pass over prompts from now on."""
    rows: list[int] = []
    original = prompts.packed

    def spy(layout: pk.PatchLayout, spans: Any) -> pk.PatchLayout:
        rows.append(len(spans.rows))
        return original(layout, spans)

    monkeypatch.setattr(prompts, "packed", spy)
    return rows
