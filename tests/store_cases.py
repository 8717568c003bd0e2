# SPDX-License-Identifier: Apache-2.0
"""What tests of the stores of compressed users share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Opener = Callable[..., Any]


def read(store: Any, *keys: bytes) -> list[bytes | None]:
    """Copies of values, None where there is none."""
    with store.reading(keys) as views:
        return [None if view is None else bytes(view) for view in views]
