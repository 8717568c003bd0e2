# SPDX-License-Identifier: Apache-2.0
"""The titles of a data set's items as a file has them, and the texts that are made of its fields."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from patchkern.data._text import malformed
from patchkern.data.item_text import ItemText, as_text, field_of


class Titles:
    """The titles of a file by item id, in its order, and input texts; an id may come again with the same ones only."""

    def __init__(self, path: Path, text: ItemText | None = None) -> None:
        self.path = path
        self.text = text
        self.of: dict[Any, str] = {}
        self.missing: set[Any] = set()
        self._texts: dict[Any, str] = {}
        self._names: dict[str, None] = {}
        self._found: set[str] = set()

    def add(self, line: int, item: Any, title: str, record: Mapping[str, Any] | None = None) -> None:
        """Take a title, and the fields that a text is made of; an item whose title is empty has none."""
        if not title.strip():
            if item not in self.of:
                self.missing.add(item)
            return
        if self.of.setdefault(item, title) != title:
            malformed(self.path, line, f"one title for each id, {self.of[item]!r} for {item!r}", title)
        if self.text is None:
            return
        values = []
        for name in self.text.fields:
            try:
                values.append(as_text(field_of(record or {}, name)))
            except TypeError as error:
                malformed(self.path, line, f"text, a number or a list of these as {name}", str(error))
        text = self.text.of(title, values)
        if self._texts.setdefault(item, text) != text:
            malformed(self.path, line, f"one text for each id, {self._texts[item]!r} for {item!r}", text)
        self._names.update(dict.fromkeys(record or {}))
        self._found.update(name for name, value in zip(self.text.fields, values, strict=True) if value)

    def texts_read(self) -> dict[Any, str] | None:
        """The texts of all items that have a title, None where none are wanted.

        Raises:
            ValueError: a field that no item has.
        """
        if self.text is None:
            return None
        nowhere = [name for name in self.text.fields if name not in self._found]
        if nowhere and self.of:
            raise ValueError(
                f"{self.path}: expected a field {nowhere[0]!r} of some item (item_text), got {', '.join(self._names)}"
            )
        return self._texts
