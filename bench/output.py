# SPDX-License-Identifier: Apache-2.0
"""Where results go: to runs/bench, never over what is there, or to a file that was named."""

from __future__ import annotations

import argparse
import atexit
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

RUNS = Path("runs/bench")


def add_option(parser: argparse.ArgumentParser, name: str) -> None:
    """Give a script its ``--output``; ``name`` is the file in runs/bench that it writes to otherwise."""
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help=f"a file named here is replaced (default: {RUNS / name}, numbered where there is one already)",
    )


def prepare(given: Path | None, name: str) -> Path:
    """The file that a script will write to. Says which before the work begins, and exits where it could not be."""
    path = RUNS / name if given is None else given
    if path.is_dir():
        sys.exit(f"--output: expected a file, got the folder {path}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
        if given is None:
            path = unused(path, lambda path: path.touch(exist_ok=False))
            atexit.register(_remove_empty, path)
    except OSError as error:
        sys.exit(f"--output: cannot write to {path.parent}: {error.strerror}")
    replaced = given is not None and path.exists()
    print(f"results go to {shown(path)}{', which is replaced' if replaced else ''}", flush=True)
    return path


def shown(path: Path) -> Path:
    """``path`` as one would type it here: relative, where that leads nowhere up."""
    absolute, here = path.absolute(), Path.cwd()
    return absolute.relative_to(here) if absolute.is_relative_to(here) else absolute


def unused(path: Path, create: Callable[[Path], None]) -> Path:
    """``path``, or else the first of ``NAME-2``, ``NAME-3``, ..., made by ``create``: two runs at once get two."""
    candidate, number = path, 1
    while True:
        try:
            create(candidate)
            return candidate
        except FileExistsError:
            number += 1
            candidate = path.with_stem(f"{path.stem}-{number}")


def _remove_empty(path: Path) -> None:
    """Of a run that stopped before it had measured anything."""
    if path.exists() and path.stat().st_size == 0:
        path.unlink()
