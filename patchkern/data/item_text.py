# SPDX-License-Identifier: Apache-2.0
"""What a model reads of an item: a text of several of its fields, such as "title (brand, categories)"."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

TITLE = "title"

_FORM = re.compile(r"\s*([^(),]+?)\s*(?:\(([^()]+)\))?\s*")


@dataclass(frozen=True)
class ItemText:
    """A field, and further ones that follow it in brackets. What an item lacks is left out, the brackets too.

    Attributes:
        first: a field; where it is missing, the title stands for it.
        others: fields.
    """

    first: str
    others: tuple[str, ...] = ()

    @classmethod
    def parse(cls, form: str | None) -> ItemText | None:
        """Of ``"title (brand, categories)"``: names of fields; ``title`` is the item's title. None of None.

        Raises:
            TypeError, ValueError: another form.

        Examples:
            >>> from patchkern.data.item_text import ItemText
            >>> text = ItemText.parse("title (brand, year)")
            >>> text.of("Alien", ["Fox", "1979"]), text.of("Alien", ["", "1979"]), text.of("Alien", ["", ""])
            ('Alien (Fox, 1979)', 'Alien (1979)', 'Alien')
        """
        if form is None:
            return None
        if not isinstance(form, str):
            raise TypeError(f"item_text: expected text, got {type(form).__name__}")
        match = _FORM.fullmatch(form)
        names = [] if match is None else [match[1], *(match[2] or "").split(",")[: None if match[2] else 0]]
        names = [name.strip() for name in names]
        if not names or "" in names or len(set(names)) < len(names):
            raise ValueError(
                f"item_text: expected a field and perhaps others in brackets, such as 'title (brand, categories)', got "
                f"{form!r}"
            )
        return cls(names[0], tuple(names[1:]))

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields that are looked up: all but the title."""
        return tuple(name for name in (self.first, *self.others) if name != TITLE)

    def of(self, title: str, values: Sequence[str]) -> str:
        """The text of an item, given its title and, as text, the values of its `fields`, "" for one that it lacks."""
        known = dict(zip(self.fields, values, strict=True)) | {TITLE: title}
        others = ", ".join(known[name] for name in self.others if known[name])
        first = known[self.first] or title
        return f"{first} ({others})" if others else first


def as_text(value: Any) -> str:
    """A field's value on one line: text, a number, or a list of these, separated by commas; "" where there is none.

    Raises:
        TypeError: something else.
    """
    if isinstance(value, str):
        return " ".join(value.split())
    if isinstance(value, np.number):
        value = value.item()
    if isinstance(value, (list, tuple, np.ndarray)):  # pandas has arrays where a file has lists
        return ", ".join(text for text in map(as_text, value) if text)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"expected text, a number or a list of these, got {type(value).__name__}")
    if isinstance(value, int):
        return str(value)
    return f"{value:.0f}" if 1e5 <= abs(value) < 1e15 else f"{value:g}"


def field_of(record: Mapping[str, Any], name: str) -> Any:
    """A field of a JSON object, None where it is missing; ``details.Brand`` is one of the object ``details``."""
    if name in record:
        return record[name]
    outer, _, inner = name.partition(".")
    value = record.get(outer)
    return field_of(value, inner) if inner and isinstance(value, Mapping) else None
