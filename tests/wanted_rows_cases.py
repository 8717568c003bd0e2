# SPDX-License-Identifier: Apache-2.0
"""A switch for what a model chooses by size: that its last layer computes the rows that are read alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from patchkern.models import item_network, wanted_rows


class Chooses:
    """Whether the last layer computes wanted rows alone."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch

    def __call__(self, chooses: bool) -> None:
        for module, name in ((wanted_rows, "are_few"), (wanted_rows, "worthwhile"), (item_network, "worthwhile")):
            self._monkeypatch.setattr(module, name, lambda rows, count: chooses)

    def both(self, function: Callable[[], Any]) -> tuple[Any, Any]:
        """What it gives with wanted rows alone, and with all."""
        self(True)
        few = function()
        self(False)
        return few, function()
