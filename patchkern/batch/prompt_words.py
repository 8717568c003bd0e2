# SPDX-License-Identifier: Apache-2.0
"""What a prompt says in words, before a tokenizer makes tokens of it; and its file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from patchkern.batch.prompt import Prompt, check_history, check_marks


@dataclass(frozen=True)
class PromptWords:
    """The arguments of `Prompt.from_chat_template` but for the tokenizer.

    Its file is a JSON object of these names, of which ``instruction`` alone is needed:

        {"system": "You know films.", "instruction": "List films that one user chose, a line each.", "history": "last"}

    Raises:
        TypeError, ValueError: a field of another type, or a history's mark where none belongs.

    Examples:
        >>> import patchkern as pk
        >>> pk.PromptWords("After [HISTORY_SEQUENCE], what?").history
        'inside'
    """

    instruction: str
    system: str | None = None
    history: Literal["inside", "last"] = "inside"
    markers: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("instruction", "system"):
            value = getattr(self, name)
            if not (isinstance(value, str) or (name == "system" and value is None)):
                raise TypeError(f"{name}: expected a string, got {type(value).__name__}")
        if self.markers is not None:
            if not isinstance(self.markers, (list, tuple)) or not all(isinstance(name, str) for name in self.markers):
                raise TypeError(f"markers: expected a list of tokens by name, got {self.markers!r}")
            object.__setattr__(self, "markers", tuple(self.markers))
        check_history(self.history)
        check_marks(self.system, self.instruction, self.history)

    def prompt(self, tokenizer: Any) -> Prompt:
        """The prompt in a tokenizer's chat template, see `Prompt.from_chat_template`."""
        return Prompt.from_chat_template(tokenizer, self.system, self.instruction, self.history, self.markers)

    def to_dict(self) -> dict[str, Any]:
        """The fields that are not None, ready for JSON."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def from_dict(cls, words: Mapping[str, Any]) -> PromptWords:
        """The inverse of `to_dict`."""
        if not isinstance(words, Mapping):
            raise TypeError(f"words: expected a mapping, got {type(words).__name__}")
        known = [field.name for field in fields(cls)]
        unknown = [name for name in words if name not in known]
        if unknown:
            raise ValueError(f"words: expected {', '.join(known)}, got {unknown[0]!r}")
        if "instruction" not in words:
            raise ValueError("words: expected an instruction, got none")
        return cls(**words)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> PromptWords:
        """Read a file.

        Raises:
            FileNotFoundError, ValueError: none is there, or it is not such a file; the message names it.
        """
        name = os.fspath(path)
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8-sig")))
        except FileNotFoundError as error:
            raise FileNotFoundError(f"prompt: expected a file, found none at {name!r}") from error
        except (ValueError, TypeError) as error:  # of JSON, of UTF-8, of its fields
            raise ValueError(f"{name}: expected a prompt's words as a JSON object: {error}") from error
