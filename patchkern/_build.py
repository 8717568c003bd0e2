# SPDX-License-Identifier: Apache-2.0
"""How this installation's native module was built, as setup.py wrote it down, or why it was not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_FILE = Path(__file__).with_name("_build_info.json")


def build_info() -> dict[str, Any]:
    """What setup.py recorded: ``native``, ``reason``, and if it was built ``compiler``, ``flags``, ``isa``.

    Empty in a source tree where setup.py has not run.
    """
    return json.loads(_FILE.read_text()) if _FILE.exists() else {}


def native_build_reason() -> str:
    """Why there is no native module, in words for ``backends()``; empty if it was built."""
    if not _FILE.exists():
        return "patchkern._native has not been built: install the package with `pip install .`"
    reason: str = build_info()["reason"]
    return reason
