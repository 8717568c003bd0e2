# SPDX-License-Identifier: Apache-2.0
"""A run's folder: arguments, the best weights so far, and what a killed run goes on from."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import patchkern as pk
from recipes.baselines.networks import Recommender
from recipes.baselines.settings import Settings

ARGUMENTS, WEIGHTS, STATE = "arguments.json", "model.safetensors", "state.safetensors"
_RECORD = "record"


class Run:
    """The folder of a run; every file is written under another name first."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def start(self, arguments: Mapping[str, Any], resume: bool) -> None:
        """Begin in an empty folder, or go on in that of the same run.

        Raises:
            ValueError: another run is there, or this one and ``resume`` is not given.
        """
        before = self.arguments()
        if before is not None and not resume:
            raise ValueError(
                f"--output_dir: expected a folder without a run, or --resume, got {os.fspath(self.folder)!r}"
            )
        if before is not None:
            now = json.loads(json.dumps(arguments))
            changed = [f"{key} {before.get(key)!r} -> {now[key]!r}" for key in now if now[key] != before.get(key)]
            if changed:
                raise ValueError(f"--resume: expected the arguments of the run so far, got other {'; '.join(changed)}")
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        unfinished = self.folder / f"{ARGUMENTS}.part"
        unfinished.write_text(json.dumps(arguments, indent=2) + "\n", encoding="utf-8")
        unfinished.replace(self.folder / ARGUMENTS)

    def arguments(self) -> dict[str, Any] | None:
        """Of the run in the folder, None where there is none."""
        path = self.folder / ARGUMENTS
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def keep_best(self, model: nn.Module) -> None:
        self._write(WEIGHTS, model.state_dict(), {})

    def load_best(self, model: nn.Module, argument: str = "--output_dir") -> None:
        """Raise a ValueError where the run has no weights yet."""
        if not (self.folder / WEIGHTS).is_file():
            raise ValueError(f"{argument}: expected a run that was trained, got {os.fspath(self.folder)!r}")
        model.load_state_dict(self._read(WEIGHTS)[0])

    def keep_state(self, model: nn.Module, optimizer: torch.optim.Optimizer, record: Mapping[str, Any]) -> None:
        tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
        for number, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{name}": tensor for name, tensor in state.items()}
        self._write(STATE, tensors, {_RECORD: json.dumps(record)})

    def load_state(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
        """The record that was kept with it; None where nothing was."""
        if not (self.folder / STATE).is_file():
            return None
        tensors, about = self._read(STATE)
        model.load_state_dict({name[6:]: tensor for name, tensor in tensors.items() if name.startswith("model.")})
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, number, kind = name.split(".")
                moments.setdefault(int(number), {})[kind] = tensor
        optimizer.load_state_dict(optimizer.state_dict() | {"state": moments})
        record: dict[str, Any] = json.loads(about[_RECORD])
        return record

    def _write(self, name: str, tensors: Mapping[str, Tensor], about: dict[str, str]) -> None:
        unfinished = self.folder / f"{name}.part"
        save_file({key: tensor.detach().contiguous().cpu() for key, tensor in tensors.items()}, unfinished, about)
        unfinished.replace(self.folder / name)

    def _read(self, name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
        with safe_open(self.folder / name, framework="pt") as file:
            names = file.keys()
            return {key: file.get_tensor(key) for key in names}, file.metadata() or {}


def is_run(folder: str | Path) -> bool:
    """Whether it is the folder of a run of this recipe."""
    arguments = Run(folder).arguments()
    return arguments is not None and "items" in arguments and "setting" in arguments


def load_run(run: Run, catalog: pk.Catalog, argument: str = "--output_dir") -> tuple[Recommender, Settings]:
    """The best weights of a run; ``argument`` is what errors name.

    Raises:
        ValueError: there is none, or it is of another catalogue.
    """
    arguments = run.arguments()
    if arguments is None or not is_run(run.folder):
        raise ValueError(f"{argument}: expected a run of recipes/baselines, got {str(run.folder)!r}")
    if arguments["items"] != fingerprint(catalog):
        raise ValueError(
            f"{argument}: expected a run over the {len(catalog):,} items of the data, in their order, got "
            f"{str(run.folder)!r}, over others"
        )
    settings, width = Settings(**arguments["settings"]), arguments["title_width"]
    titles = None if width is None else torch.zeros(len(catalog), width)
    model = Recommender(arguments["model"], len(catalog), settings, titles)
    run.load_best(model, argument)
    return model, settings


def fingerprint(catalog: pk.Catalog) -> str:
    """Of the items and their order."""
    return hashlib.sha256(json.dumps(catalog.item_ids.tolist()).encode()).hexdigest()[:16]
