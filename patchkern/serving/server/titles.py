# SPDX-License-Identifier: Apache-2.0
"""Finding items by what a person types of their titles."""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterator, Sequence

import numpy as np

_LOOKED_AT = 10_000  # occurrences of a word, at most, so that one of a single letter costs no more than others
_COMPARED = 50  # titles, letter by letter
_LONGEST = 100  # letters of a title that is compared so


class TitleIndex:
    """All titles of a catalogue as one text, searched without regard to case, accents and spaces.

    Args:
        titles: in catalogue order.

    Examples:
        >>> from patchkern.serving.server.titles import TitleIndex
        >>> index = TitleIndex(["Aliens (1986)", "Amélie", "Matrix, The (1999)", "Alien"])
        >>> index.search("alien", 10), index.search("AMELIE", 10), index.search("the matrix", 10)
        ([3, 0], [1], [2])
        >>> index.exact(" alien"), index.exact("Ali")
        (3, None)
    """

    def __init__(self, titles: Sequence[str]) -> None:
        folded = [fold(title) for title in titles]
        self._text = "\n" + "\n".join(folded) + "\n"
        self._starts = np.cumsum([1, *(len(title) + 1 for title in folded)])
        self._first: dict[str, int] = {}
        for place, title in enumerate(folded):
            self._first.setdefault(title, place)

    def exact(self, title: str) -> int | None:
        """The catalogue position of the first item of that title, or None."""
        return self._first.get(fold(title))

    def search(self, query: str, limit: int) -> list[int]:
        """Catalogue positions of up to ``limit`` titles with all words of ``query``: those that are it, begin with it,
        have it at the beginning of a word, have it anywhere; then those with its words in another order."""
        query = fold(query)
        found: dict[int, None] = {}
        if not query:
            return list(range(min(limit, self._starts.size - 1)))
        words = query.split()
        patterns = [(f"\n{query}\n", words), (f"\n{query}", words), (f" {query}", words), (query, words)]
        if len(words) > 1:
            patterns.append((max(words, key=len), words))
        for pattern, needed in patterns:
            for place in self._places(pattern):
                if place not in found and all(word in self._title(place) for word in needed):
                    found[place] = None
                    if len(found) == limit:
                        return list(found)
        return list(found)

    def near(self, title: str) -> list[int]:
        """Catalogue positions of up to two titles that are spelled nearly like ``title``."""
        if len(title) > _LONGEST:
            return []
        word = max(fold(title).split(), key=len, default="")
        places = self.search(word, _COMPARED) or self.search(word[:3], _COMPARED) if word else []
        of_title = {self._title(place): place for place in reversed(places)}
        return [of_title[close] for close in difflib.get_close_matches(fold(title), of_title, 2)]

    def _places(self, pattern: str) -> Iterator[int]:
        """Of the titles in which a pattern occurs, in catalogue order."""
        at = -1
        for _ in range(_LOOKED_AT):
            at = self._text.find(pattern, at + 1)
            if at < 0:
                return
            place = int(np.searchsorted(self._starts, at + pattern.startswith("\n"), side="right")) - 1
            yield place
            at = int(self._starts[place + 1]) - 2  # before the end of the title: the next may begin there

    def _title(self, place: int) -> str:
        return self._text[self._starts[place] : self._starts[place + 1] - 1]


def fold(text: str) -> str:
    """Without case, accents, and more than one space between words."""
    plain = unicodedata.normalize("NFKD", text)
    if not plain.isascii():
        plain = "".join(letter for letter in plain if not unicodedata.combining(letter))
    return " ".join(plain.casefold().split())
