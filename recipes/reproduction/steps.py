# SPDX-License-Identifier: Apache-2.0
"""Steps: commands of the other recipes, run one after the other, each recorded when it is done.

A killed run goes on with the step that it was at. Training goes on from its last checkpoint, all else begins anew and
writes its file under its own name only when it is whole, so that the files come out the same.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import json
import os
import platform
import re
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

import patchkern as pk

REPOSITORY = Path(__file__).resolve().parents[2]
CPU = "CPU"
FOLDER = "{folder}"
"""stands for the output folder in a step's arguments"""


@dataclass(frozen=True)
class Work:
    """What a step computes, which is what it costs.

    Attributes:
        kind: steps of a kind have one rate: "train", "search", "rank" or "other".
        rows: through the model.
        pairs: of rows that attend to each other.
        logits: rows with logits over all tokens.
        users: recommended to.
    """

    kind: str
    rows: float = 0.0
    pairs: float = 0.0
    logits: float = 0.0
    users: int = 0


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        key: its name in the folder.
        script: a recipe, relative to the repository.
        arguments: of its command line; `FOLDER` stands for the output folder.
        work: what it costs.
        outputs: files, relative to the folder, without which it is not done.
        collects: ``((from, to), ...)`` files that it leaves somewhere in the folder, and where they are wanted.
    """

    key: str
    script: str
    arguments: tuple[str, ...]
    work: Work = field(default=Work("other"), compare=False)
    outputs: tuple[str, ...] = ()
    collects: tuple[tuple[str, str], ...] = ()

    @property
    def seed(self) -> int:
        """-1 where it has none."""
        found = re.search(r"-s(\d+)", self.key)
        return int(found[1]) if found else -1

    def command(self, folder: str = FOLDER) -> str:
        return shlex.join(["python", self.script, *self.filled(folder)])

    def filled(self, folder: str) -> list[str]:
        return [argument.replace(FOLDER, folder) for argument in self.arguments]


class Folder:
    """The output folder: ``runs``, ``csv`` (a line per sample), ``steps``, ``logs``, ``results`` and ``measured``.

    What depends on the clock is in ``steps``, ``logs`` and ``measured`` alone.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Raise a RuntimeError where another process works in it."""
        self.path.mkdir(parents=True, exist_ok=True)
        with (self / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise RuntimeError(f"--output_dir: another process works in {os.fspath(self.path)!r}") from error
            yield

    def record(self, key: str) -> dict[str, Any] | None:
        """Of a step that is done."""
        path = self / f"steps/{key}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def records(self) -> dict[str, dict[str, Any]]:
        paths = sorted((self / "steps").glob("*.json"))
        return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}

    def is_done(self, step: Step) -> bool:
        """Whether the step has been run here.

        Raises:
            ValueError: another command of that name has been.
        """
        found = self.record(step.key)
        if found is None:
            return False
        if found["command"] != step.command():
            raise ValueError(
                f"--output_dir: expected a folder of the same settings, or a new one; in {os.fspath(self.path)!r} "
                f"{step.key} is\n  {found['command']}\nand not\n  {step.command()}"
            )
        return all((self / name).exists() for name in step.outputs)

    def write(self, name: str, text: str) -> Path:
        """Under a temporary name first."""
        path = self / name
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(path.name + ".part")
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)
        return path


def run(step: Step, folder: Folder) -> dict[str, Any]:
    """Run a step in this process, with what it prints in ``logs``; its record, which is written when it is done.

    Raises:
        RuntimeError: it failed; the message names its log.
    """
    attempts = folder / f"steps/{step.key}.attempts"
    attempt = 1 + (int(attempts.read_text()) if attempts.is_file() else 0)
    folder.write(f"steps/{step.key}.attempts", str(attempt))
    (folder / "csv").mkdir(exist_ok=True)
    log = folder / f"logs/{step.key}.log"
    log.parent.mkdir(exist_ok=True)
    module = importlib.import_module(step.script.removesuffix(".py").replace("/", "."))
    wall, cpu = time.perf_counter(), time.process_time()
    with log.open("w", encoding="utf-8") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        try:
            module.main(step.filled(os.fspath(folder.path)))
        except (Exception, SystemExit) as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            raise RuntimeError(f"{step.key} failed: {error}; see {os.fspath(log)}") from error
    record = {
        "key": step.key,
        "command": step.command(),
        "seed": step.seed if step.seed >= 0 else None,
        "kind": step.work.kind,
        "rows": step.work.rows,
        "users": step.work.users,
        "seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
        "attempts": attempt,
        "users_per_second": _printed(log, r"([\d.,]+) users/s"),
        "fit_seconds": _printed(log, r"fitted in ([\d.,]+) CPU s"),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else CPU,
        "versions": {
            "patchkern": pk.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }
    for source, target in step.collects:
        unfinished = folder / f"{target}.part"
        shutil.copyfile(folder / source, unfinished)
        unfinished.replace(folder / target)
    lacking = [name for name in step.outputs if not (folder / name).exists()]
    if lacking:
        raise RuntimeError(f"{step.key}: expected it to write {', '.join(lacking)}; see {os.fspath(log)}")
    folder.write(f"steps/{step.key}.json", json.dumps(record, indent=2) + "\n")
    attempts.unlink()
    return record


def _printed(log: Path, pattern: str) -> float | None:
    """The first number of that form that the recipe has printed."""
    found = re.search(pattern, log.read_text(encoding="utf-8"))
    return float(found[1].replace(",", "")) if found else None


def distinct(steps: Sequence[Step]) -> list[Step]:
    """Each step once, in their order.

    Raises:
        ValueError: two commands of one name.
    """
    found: dict[str, Step] = {}
    for step in steps:
        if found.setdefault(step.key, step) != step:
            raise ValueError(f"{step.key}: expected one command of that name, got {step} and {found[step.key]}")
    return list(found.values())
