# SPDX-License-Identifier: Apache-2.0
"""How this installation's extension modules were built, as setup.py wrote it down, or why they were not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_FILE = Path(__file__).with_name("_build_info.json")


def build_info() -> dict[str, Any]:
    """What setup.py recorded.

    ``native`` and ``cuda`` say whether the module was built, ``reason`` and ``cuda_reason`` why not. Of the native one
    ``compiler``, ``flags`` and ``isa`` are known, of the CUDA one ``nvcc`` and ``archs``, the last of which is there as
    PTX too. Empty in a source tree where setup.py has not run.
    """
    return json.loads(_FILE.read_text()) if _FILE.exists() else {}


def native_build_reason() -> str:
    """Why there is no native module, in words for ``backends()``; empty if it was built."""
    return _reason("reason", "patchkern._native")


def cuda_build_reason() -> str:
    """Why there is no CUDA module, in words for ``backends()``; empty if it was built."""
    return _reason("cuda_reason", "patchkern._cuda")


def _reason(key: str, module: str) -> str:
    unknown = f"{module} has not been built: install the package with `pip install .`"
    return str(build_info().get(key, unknown))
