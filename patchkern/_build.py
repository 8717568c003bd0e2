# SPDX-License-Identifier: Apache-2.0
"""Which copy of the package this is, and how its extension modules were built, or why they were not."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.metadata import distributions
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

_FOLDER = Path(__file__).parent


def build_info() -> dict[str, Any]:
    """What setup.py recorded.

    ``native`` and ``cuda`` say whether the module was built, ``reason`` and ``cuda_reason`` why not. Of the native one
    ``compiler``, ``flags`` and ``isa`` are known, of the CUDA one ``nvcc`` and ``archs``, the last of which is there as
    PTX too. Empty where setup.py has not run.
    """
    record = _FOLDER / "_build_info.json"
    return json.loads(record.read_text()) if record.exists() else {}


def load(module: str) -> ModuleType:
    """This copy's extension module, ``"_native"`` or ``"_cuda"``.

    Raises:
        ImportError: there is none, in words for ``backends()``.
    """
    # Not left to the import: where there is no file, an editable install of another copy would supply its own.
    if reason := missing_reason(module):
        raise ImportError(reason)
    try:
        return import_module(f"patchkern.{module}")
    except ImportError as error:
        raise ImportError(f"patchkern.{module} does not load: {error}") from error


def missing_reason(module: str) -> str:
    """Why there is no such extension module, in words for ``backends()``; empty if there is one for this Python."""
    found = [file.name for file in sorted(_FOLDER.glob(f"{module}.*.so"))]
    if any(module + suffix in found for suffix in EXTENSION_SUFFIXES):
        return ""
    info = build_info()
    if left_out := info.get({"_native": "reason", "_cuda": "cuda_reason"}[module]):
        return str(left_out)
    if found:
        fact = f"was built for another Python than this {sys.implementation.cache_tag} ({', '.join(found)})"
    elif info:
        fact = "was built, but its file is gone"
    else:
        fact = "has not been built"
    return f"patchkern.{module} {fact}: {_remedy()}"


def origin() -> str:
    """Which copy of the package runs, for the line that a program prints when it starts."""
    return f"from the source folder {_FOLDER.parent}" if _is_source() else f"from {_FOLDER.parent}"


def shadowed_copy() -> Path | None:
    """An installed copy of the package that this one hides by being found first."""
    for distribution in distributions(name="patchkern"):
        url = json.loads(distribution.read_text("direct_url.json") or "{}")
        if url.get("dir_info", {}).get("editable"):
            copy = Path(url2pathname(urlsplit(url["url"]).path), "patchkern")
        else:
            copy = Path(str(distribution.locate_file("patchkern")))
        if (copy / "__init__.py").exists() and not copy.samefile(_FOLDER):
            return copy
    return None


def _remedy() -> str:
    if not _is_source():
        return f"{_FOLDER} is no complete installation, let pip install the package again"
    build = f"run `pip install -e .` in the source folder {_FOLDER.parent}"
    copy = shadowed_copy()
    return build if copy is None else f"{build}, or run elsewhere, where the copy in {copy.parent} is found"


def _is_source() -> bool:
    return (_FOLDER.parent / "setup.py").exists()
