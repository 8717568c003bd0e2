# SPDX-License-Identifier: Apache-2.0
"""What is compiled for the tests: once for all test processes, and kept in build/ by the content it came from."""

from __future__ import annotations

import fcntl
import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]


def kept_build(name: str, sources: Iterable[Path], versions: Iterable[str], make: Callable[[Path], object]) -> Path:
    """The folder that ``make`` fills, unless these sources, compiled by these versions, have filled it before."""
    content = hashlib.sha256(repr(list(versions)).encode())
    for source in sorted(sources):
        content.update(repr((source.name, source.read_bytes())).encode())
    folder = REPOSITORY / "build" / "tests" / f"{name}-{content.hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "made").exists():
            make(folder)
            (folder / "made").touch()
    return folder
