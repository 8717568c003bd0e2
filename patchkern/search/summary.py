# SPDX-License-Identifier: Apache-2.0
"""What a search did not give as asked: lists shorter than k, items left out. Counted, and said once."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Hashable, Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any

_EXAMPLES = 3  # users named


class UnprovenSearchWarning(UserWarning):
    """An exact search reached ``max_expansions``: some lists are the best that was found, perhaps not the best."""


class PartialListsWarning(UserWarning):
    """Some users got fewer items than asked for, or without some items that the catalogue does not hold.

    Attributes:
        summary: the `Summary`, counts and examples.
    """

    def __init__(self, message: str, summary: Summary | None = None) -> None:
        super().__init__(message)
        self.summary = summary


@dataclass(frozen=True)
class Summary:
    """Counts over the users of one call, or of a whole folder.

    Attributes:
        users: all of them.
        short_lists: users with fewer than ``k`` items, those with none included.
        empty_lists: users with none.
        unknown_items: entries of histories that were left out, because the catalogue does not hold their items.
        users_with_unknown_items: whose those were.
        unknown_allowed_items: the same of ``allowed_items``.
        unproven_lists: users for whom ``max_expansions`` were not enough to prove that theirs are the best.
        short_examples, unknown_examples: the first few users with a short list, and with items left out, as the caller
            names them.
    """

    users: int = 0
    short_lists: int = 0
    empty_lists: int = 0
    unknown_items: int = 0
    users_with_unknown_items: int = 0
    unknown_allowed_items: int = 0
    unproven_lists: int = 0
    short_examples: tuple[Hashable, ...] = ()
    unknown_examples: tuple[Hashable, ...] = ()

    def __add__(self, other: Summary) -> Summary:
        mine, its = self.as_dict(), other.as_dict()
        total: dict[str, Any] = {name: mine[name] + its[name] for name in mine}
        total |= {name: x[:_EXAMPLES] for name, x in total.items() if isinstance(x, tuple)}
        return Summary(**total)

    def as_dict(self) -> dict[str, Any]:
        """The attributes by name."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Summary:
        """Of what `as_dict` returned and JSON may have been; unknown names are left out."""
        known: dict[str, Any] = {field.name: values[field.name] for field in fields(cls) if field.name in values}
        known |= {name: tuple(x) for name, x in known.items() if isinstance(x, list)}
        return cls(**known)

    def warn(
        self,
        k: int = 0,
        narrow_beams: int | None = None,
        expects_short: bool = False,
        max_expansions: int | None = None,
        stacklevel: int = 3,
    ) -> None:
        """Warn where there is something to say.

        Args:
            k: asked for.
            narrow_beams: ``num_beams`` where there are fewer than ``k`` of them, so that lists may be short.
            expects_short: whether short lists are what the caller allowed, and not the search's own way.
            max_expansions: of an exact search.
            stacklevel: of `warnings.warn`, seen from here.
        """
        said = []
        if narrow_beams is not None:
            said.append(f"num_beams: {narrow_beams} beams may find fewer than k={k} items")
        if self.short_lists and (expects_short or narrow_beams is not None):
            named = _such_as(self.short_examples)
            none = f", {self.empty_lists} none at all" if self.empty_lists else ""
            said.append(f"k: {self.short_lists} of {self.users} users get fewer than {k} items{none}{named}")
        if self.unknown_items:
            said.append(
                f"histories: {self.unknown_items} items that the catalog does not hold were left out, of "
                f"{self.users_with_unknown_items} of {self.users} users{_such_as(self.unknown_examples)}"
            )
        if self.unknown_allowed_items:
            said.append(
                f"allowed_items: {self.unknown_allowed_items} items that the catalog does not hold were left out"
            )
        if said:
            warnings.warn(PartialListsWarning("; ".join(said), self), stacklevel=stacklevel)
        if self.unproven_lists:
            warnings.warn(
                f"max_expansions: {max_expansions} prefixes were not enough to prove the lists of "
                f"{self.unproven_lists} of {self.users} users; theirs are the best titles that were found",
                UnprovenSearchWarning,
                stacklevel=stacklevel,
            )


def first_few(names: Iterable[Hashable]) -> tuple[Hashable, ...]:
    """The examples that a summary keeps."""
    return tuple(itertools.islice(names, _EXAMPLES))


def _such_as(names: tuple[Hashable, ...]) -> str:
    return f", such as {', '.join(f'user {name!r}' for name in names)}" if names else ""
