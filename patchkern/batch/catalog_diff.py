# SPDX-License-Identifier: Apache-2.0
"""What differs between the catalogue that a model was saved with and another one, by item id."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from patchkern.batch.catalog import Catalog

SHARE_OF_RENAMED = 0.1
"""of the shared items; more are taken for exchanged ids, or for another tokenizer's tokens"""

_SAMPLE = 200


class CatalogWarning(UserWarning):
    """A model gets another catalogue than it was saved with, in which ids have other titles."""


@dataclass(frozen=True)
class CatalogDiff:
    """How a catalogue differs from an earlier one; items are matched by their ids, and their order plays no part.

    Attributes:
        num_shared: items in both.
        new: ``(n,)`` ids that only the later catalogue has.
        gone: ``(n,)`` ids that only the earlier one had.
        renamed: ``(n,)`` ids in both with other token ids, of the title or of the input text.
        retokenized: ``(n,)`` those of ``renamed`` whose title and input text, as text, are the same.
        num_same_titles: items in both whose titles and input texts are known to be the same, as text.
        examples: of renamed items, as text.

    Examples:
        A model that was saved with one catalogue is read with a later one.

        >>> import patchkern as pk
        >>> before, later = (pk.Catalog.from_token_ids(range(3), range(4), ids) for ids in ([7, 8, 9], [8, 9, 10]))
        >>> pk.ItemModel(before, width=8).save_pretrained("model")
        >>> print(pk.ItemModel.from_pretrained("model", later).catalog_diff)
        1 new items, 1 gone, 0 of 2 with another title
    """

    num_shared: int
    new: NDArray[Any]
    gone: NDArray[Any]
    renamed: NDArray[Any]
    retokenized: NDArray[Any]
    num_same_titles: int
    examples: tuple[str, ...]

    def __str__(self) -> str:
        counts = f"{self.new.size:,} new items, {self.gone.size:,} gone"
        return f"{counts}, {self.renamed.size:,} of {self.num_shared:,} with another title"

    def check(self, renamed: Literal["error", "allow"] = "error") -> None:
        """Say what differs: nothing where items are merely new or gone, else a `CatalogWarning`, or an error.

        Args:
            renamed: "allow" warns, however many items have other titles.

        Raises:
            ValueError: the tokens are those of another tokenizer, or more than a tenth of the items have other titles.
        """
        if renamed not in ("error", "allow"):
            raise ValueError(f"renamed: expected 'error' or 'allow', got {renamed!r}")
        if self.retokenized.size > SHARE_OF_RENAMED * self.num_same_titles:
            raise ValueError(
                f"catalog: expected titles tokenised by the model's tokenizer, got other token ids for "
                f"{self.retokenized.size:,} of {self.num_same_titles:,} titles that are the same, such as "
                f"{'; '.join(self.examples)}"
            )
        if self.num_shared == 0 and self.gone.size and self.new.size:
            text = f"no item id is one of the {self.gone.size:,} that the model was saved with, such as "
            text += f"{self.gone.item(0)!r}; now there is {self.new.item(0)!r}"
        elif self.renamed.size:
            text = f"{self}, such as {'; '.join(self.examples)}"
        else:
            return
        if renamed == "error" and self.renamed.size > SHARE_OF_RENAMED * self.num_shared:
            raise ValueError(
                f"catalog: expected items with the titles that the model was saved with, got {text}; were ids "
                f"exchanged, or the titles tokenised by another tokenizer? renamed='allow' takes it all the same"
            )
        warnings.warn(f"catalog: not the one that the model was saved with: {text}", CatalogWarning, stacklevel=4)


def check_tokens(catalog: Catalog, items: NDArray[Any], tokenizer: Any) -> None:
    """Raise a ``ValueError`` where titles have other token ids than ``tokenizer`` gives them; a sample is enough.

    Args:
        items: ``(n,)`` ids of the items to look at, such as those that nothing else is known of.
    """
    if catalog.texts is not None:
        check_tokens(catalog.texts, items, tokenizer)
    if catalog.titles is None or not items.size:
        return
    places = catalog.index_of(items)[:: -(-items.size // _SAMPLE)].tolist()
    again = Catalog.from_titles({place: catalog.titles[place] for place in places}, tokenizer)
    other = [at for n, at in enumerate(places) if again.tokens(n).tolist() != catalog.tokens(at).tolist()]
    if len(other) > SHARE_OF_RENAMED * len(places):
        raise ValueError(
            f"catalog: expected titles tokenised by the tokenizer that the model was saved with, got other token ids "
            f"for {len(other)} of {len(places)} new items that were looked at, such as item "
            f"{catalog.item_ids.item(other[0])!r}: {_shortened(catalog.titles[other[0]], catalog.tokens(other[0]))}"
        )


def compare(saved: Catalog, given: Catalog) -> CatalogDiff:
    """What ``given`` has that ``saved`` had not, and the other way around.

    Raises:
        ValueError: only one of the two has input texts.
    """
    if (saved.texts is None) != (given.texts is None):
        has = ("input texts", "none") if given.texts is None else ("no input texts", "some")
        raise ValueError(
            f"catalog: expected {has[0]}, as the model was saved with, got {has[1]}; a model reads the texts that it "
            "learned from: Catalog.from_titles(titles, tokenizer, texts)"
        )
    if saved.item_ids.dtype.kind == given.item_ids.dtype.kind:
        _, before, after = np.intersect1d(saved.item_ids, given.item_ids, assume_unique=True, return_indices=True)
    else:
        before = after = np.zeros(0, np.int64)
    other = _other_tokens(saved, before, given, after)
    same = _same_titles(saved, before, given, after)
    if saved.texts is not None and given.texts is not None:
        other |= _other_tokens(saved.texts, before, given.texts, after)
        same &= _same_titles(saved.texts, before, given.texts, after)
    renamed = np.flatnonzero(other)
    retokenized = renamed[same[renamed]]
    shown = (retokenized if retokenized.size else renamed)[:3]
    return CatalogDiff(
        num_shared=int(before.size),
        new=np.delete(given.item_ids, after),
        gone=np.delete(saved.item_ids, before),
        renamed=given.item_ids[after[renamed]],
        retokenized=given.item_ids[after[retokenized]],
        num_same_titles=int(same.sum()),
        examples=tuple(_example(saved, before[place], given, after[place]) for place in shown),
    )


def _other_tokens(
    saved: Catalog, before: NDArray[np.intp], given: Catalog, after: NDArray[np.intp]
) -> NDArray[np.bool_]:
    """Booleans, one per pair of positions."""
    lengths = saved.lengths[before]
    other: NDArray[np.bool_] = lengths != given.lengths[after]
    alike = np.flatnonzero(~other)
    lengths = lengths[alike].astype(np.int64)
    ends = np.cumsum(lengths)
    within = np.arange(lengths.sum()) - np.repeat(ends - lengths, lengths)
    ours = saved.token_ids[np.repeat(saved.offsets[before[alike]], lengths) + within]
    theirs = given.token_ids[np.repeat(given.offsets[after[alike]], lengths) + within]
    other[alike[np.repeat(np.arange(alike.size), lengths)[ours != theirs]]] = True
    return other


def _same_titles(
    saved: Catalog, before: NDArray[np.intp], given: Catalog, after: NDArray[np.intp]
) -> NDArray[np.bool_]:
    """Booleans, one per pair of positions: are the titles known to be the same, as text?"""
    if saved.titles is None or given.titles is None:
        return np.zeros(before.size, bool)
    pairs = zip(before.tolist(), after.tolist(), strict=True)
    return np.fromiter((saved.titles[i] == given.titles[j] for i, j in pairs), bool, before.size)


def _example(saved: Catalog, before: int, given: Catalog, after: int) -> str:
    """An item that has been renamed, or whose input text has been."""
    if np.array_equal(saved.tokens(before), given.tokens(after)):
        saved, given = saved.inputs, given.inputs
    titles: Sequence[str] = [
        _shortened(catalog.titles[at] if catalog.titles is not None else None, catalog.tokens(at))
        for catalog, at in ((saved, before), (given, after))
    ]
    if titles[0] == titles[1]:
        titles = [
            f"{titles[0]} {_shortened(None, catalog.tokens(at))}" for catalog, at in ((saved, before), (given, after))
        ]
    return f"item {given.item_ids.item(after)!r}: {titles[0]} before, {titles[1]} now"


def _shortened(title: str | None, tokens: NDArray[np.int32]) -> str:
    if title is not None:
        return repr(title if len(title) <= 40 else title[:39] + "…")
    shown = ", ".join(str(token) for token in tokens[:8])
    return f"[{shown}{', …' if tokens.size > 8 else ''}]"
