# SPDX-License-Identifier: Apache-2.0
"""The model card: what a saved model was made of, reads and reaches, as the README.md of its folder."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from patchkern.batch.catalog import Catalog
from patchkern.batch.policy_kinds import AnyPolicy
from patchkern.batch.prompt import Prompt
from patchkern.batch.prompt_words import PromptWords
from patchkern.models.folders import current

NAME = "README.md"


class Described(Protocol):
    """What a card asks of a model."""

    catalog: Catalog
    prompt: Prompt
    policy: AnyPolicy | None
    tokenizer: Any
    learns: tuple[str, ...]

    @property
    def config(self) -> Any: ...


@dataclass(frozen=True)
class ModelCard:
    """What is known of a model beside itself.

    Attributes:
        name: the card's title.
        data: what it learned from, in words.
        base_model: hub id or name of the pretrained model, None for one from random weights.
        license: of the model, by its SPDX name in lower case; None: not said.
        words: of the prompt, if it was made from words.
        metrics: ``{row: {column: number}}``, such as ``{"this model": {"HR@20": 0.21}}``.
        commands: that made it, as for a shell.

    Examples:
        >>> import patchkern as pk
        >>> from patchkern.models.scratch import from_scratch
        >>> titles = {7: "Alien", 8: "Aliens"}
        >>> model = pk.PatchedCausalLM(*from_scratch(titles, hidden_size=16, intermediate_size=32), pk.TextOnly())
        >>> card = pk.ModelCard("A little model", data="two films", metrics={"this model": {"HR@20": 0.5}})
        >>> print(card.text(model).split("## ")[1].strip())
        Data
        <BLANKLINE>
        two films; a catalogue of 2 items.
    """

    name: str
    data: str
    base_model: str | None = None
    license: str | None = None
    words: PromptWords | None = None
    metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    commands: Sequence[str] = ()

    def __post_init__(self) -> None:
        if isinstance(self.commands, str):
            raise TypeError(f"commands: expected a sequence of commands, got one text, {self.commands!r}")

    def text(self, model: Described) -> str:
        """The card of a model, in the hub's form: YAML between dashes, then Markdown."""
        tags = {"library_name": "patchkern", "pipeline_tag": "text-generation", "license": self.license}
        tags |= {"base_model": self.base_model, "tags": "[recommendation, sequential-recommendation]"}
        head = [f"{name}: {value}" for name, value in tags.items() if value is not None]
        kind = "language model" if "titles" in model.learns else "model of item ids"
        made = "random weights" if self.base_model is None else self.base_model
        parts = [
            "\n".join(["---", *head, "---"]),
            f"# {self.name}",
            f"A {model.config.model_type} {kind} that reads users' histories and recommends what comes next, "
            f"made with [patchkern](https://github.com/patchkern/patchkern) from {made}.",
            f"## Data\n\n{self.data}; a catalogue of {len(model.catalog):,} items.",
            f"## How it reads a history\n\n- policy: `{model.policy}`\n" + "\n".join(self._prompt(model)),
        ]
        if self.metrics:
            parts.append("## Metrics\n\n" + "\n".join(_table(self.metrics)))
        if self.commands:
            parts.append("## How it was made\n\n```sh\n" + "\n".join(self.commands) + "\n```")
        parts.append(
            "## How to use it\n\n```python\nimport patchkern as pk\n\n"
            f'model = pk.{type(model).__name__}.from_pretrained("path or hub id")\n'
            "model.recommend([[...]], k=20)  # item ids of a user's history, oldest first\n```"
        )
        return "\n\n".join(parts) + "\n"

    def write(self, model: Described, folder: str | os.PathLike[str]) -> Path:
        """Put the card into a saved model's folder, in the place of an earlier one."""
        path = current(folder) / NAME
        unfinished = path.with_name(f"{NAME}.part")
        unfinished.write_text(self.text(model), encoding="utf-8")
        unfinished.replace(path)
        return path

    def _prompt(self, model: Described) -> list[str]:
        lines = []
        if self.words is not None:
            lines += [f"- {name}: {value}" for name, value in self.words.to_dict().items()]
        decode = getattr(model.tokenizer, "decode", None)
        for name, ids in model.prompt.to_dict().items():
            if name != "control":
                lines.append(f"- {name}: `{decode(ids)!r}`" if decode else f"- {name}: tokens {ids}")
        return lines


def _table(rows: Mapping[str, Mapping[str, float]]) -> list[str]:
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = [f"| | {' | '.join(columns)} |", f"| --- |{' --: |' * len(columns)}"]
    for name, row in rows.items():
        lines.append(f"| {name} | {' | '.join(f'{row[c]:.4g}' if c in row else '' for c in columns)} |")
    return lines
