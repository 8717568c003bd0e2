# SPDX-License-Identifier: Apache-2.0
"""The checkpoints of a run's folder."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from patchkern.models.files import is_model


def keep(found: list[Path], best: str | None, limit: int) -> None:
    """Delete the oldest checkpoints beyond a limit, never the last and the best; no limit is 0."""
    spare = [path for path in found[:-1] if best is None or path != Path(best)]
    excess = min(len(found) - limit, len(spare)) if limit > 0 else 0
    for old in spare[:excess]:
        shutil.rmtree(old)


def checkpoints(folder: str | os.PathLike[str]) -> list[Path]:
    """The complete checkpoints of a run's folder, oldest first; an unfinished one has no such name."""
    found = [path for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.rpartition("-")[2].isdigit()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def find_model(folder: str | os.PathLike[str], argument: str = "folder") -> Path:
    """``folder`` itself if it is a saved `PatchedCausalLM`, else the last checkpoint in it.

    Raises:
        FileNotFoundError: neither; the message names ``argument``.
    """
    if is_model(folder):
        return Path(folder)
    found = checkpoints(folder)
    if not found:
        raise FileNotFoundError(
            f"{argument}: expected a model saved by patchkern, or a run with checkpoints, got {os.fspath(folder)!r}"
        )
    return found[-1]
