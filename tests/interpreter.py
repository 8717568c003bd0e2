# SPDX-License-Identifier: Apache-2.0
"""Triton's interpreter, without what it does again and again.

Every call of one of a kernel's functions patches `triton.language`, which the launch has patched already. That was a
third of the time of the gradients' tests for every policy and width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


@cache
def _languages(function: Callable[..., Any]) -> frozenset[str]:
    """The modules that the interpreter patches for a function: those that it sees."""
    return frozenset(value.__name__ for value in function.__globals__.values() if value is tl or value is tl.core)


class _PatchOnce:
    """As the interpreter's own function, but once for each module in a launch."""

    def __init__(self, patch: Callable[..., Any]) -> None:
        self._patch = patch
        self._patched: frozenset[str] | None = None  # in the launch that runs
        self._launch: Any = None

    def __call__(self, function: Callable[..., Any]) -> Any:
        languages = _languages(function)
        if self._patched is None:
            self._patched, self._launch = languages, self._patch(function)
            return self
        if not languages <= self._patched:
            self._patched |= languages
            self._patch(function)
        return None

    def restore(self) -> None:
        """At the end of the launch."""
        self._launch.restore()
        self._patched = self._launch = None


def patch_once() -> None:
    """An interpreter without such a function stays as it is."""
    patch = getattr(interpreter, "_patch_lang", None)
    if patch is not None and not isinstance(patch, _PatchOnce):
        interpreter._patch_lang = _PatchOnce(patch)
