# SPDX-License-Identifier: Apache-2.0
"""The catalogue: every item's title as token ids, tokenised once, in CSR form; perhaps a text to read in its place."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from patchkern.batch.arguments import check_offsets
from patchkern.batch.columns import flat_array, id_array, is_sequence, title_mapping
from patchkern.batch.control_tokens import control_tokens, encode_titles, first_control_token, is_tokenizer
from patchkern.batch.frozen import adopted, freeze, frozen

_INT32_MAX = int(np.iinfo(np.int32).max)
# An id table of this many entries per item is still smaller than the sorted search it replaces is slow.
_TABLE_SLACK = 64
_STATE = ("token_ids", "offsets", "item_ids", "titles", "texts")


class Catalog:
    """Titles of all items as token ids. Its arrays are read-only; those that could still be written into are copied.

    An item may have a text beside its title, such as "title (brand, category)". Titles are what a model generates and a
    search looks for; texts are what it reads, in histories, patches, item tables and the item head. Without texts it
    reads the titles.

    Attributes:
        token_ids: ``(nnz,)`` int32, the titles' token ids one after the other.
        offsets: ``(n_items + 1,)`` int32, item ``i`` owns ``token_ids[offsets[i]:offsets[i + 1]]``.
        item_ids: ``(n_items,)`` the caller's ids, integers or strings.
        titles: the titles as text, or None when built from token ids alone.
        texts: the input texts: a catalogue of the same ids whose titles they are, or None.
        max_token_id: the largest token id of titles and texts.
    """

    token_ids: NDArray[np.int32]
    offsets: NDArray[np.int32]
    item_ids: NDArray[Any]
    titles: tuple[str, ...] | None
    texts: Catalog | None
    max_token_id: int

    def __init__(
        self,
        token_ids: ArrayLike,
        offsets: ArrayLike,
        item_ids: ArrayLike | None = None,
        titles: Sequence[str] | None = None,
        texts: Catalog | None = None,
    ) -> None:
        self.token_ids = _int32("token_ids", token_ids)
        self.offsets = _int32("offsets", offsets)
        check_offsets("offsets", self.offsets, self.token_ids.size)
        if self.token_ids.size and int(self.token_ids.min()) < 0:
            at = int(np.flatnonzero(self.token_ids < 0)[0])
            raise ValueError(f"token_ids[{at}]: expected a token id >= 0, got {self.token_ids[at]}")
        if self.token_ids.size and int(self.token_ids.max()) == _INT32_MAX:
            raise ValueError(f"token_ids: expected ids below {_INT32_MAX}, got {_INT32_MAX}")
        self.item_ids = _item_ids(item_ids, len(self))
        empty = np.flatnonzero(self.lengths == 0)
        if empty.size:
            raise ValueError(
                f"titles: expected at least one token per item, got none for item {self.item_ids.item(empty[0])!r}"
            )
        if titles is not None and not (is_sequence(titles) and all(isinstance(title, str) for title in titles)):
            raise TypeError("titles: expected a sequence of strings or None")
        if titles is not None and len(titles) != len(self):
            raise ValueError(f"titles: expected one per item ({len(self)}), got {len(titles)}")
        self.titles = None if titles is None else tuple(titles)
        self.texts = _texts(texts, self.item_ids)
        self.max_token_id = int(self.token_ids.max()) if self.token_ids.size else -1
        if texts is not None:
            self.max_token_id = max(self.max_token_id, texts.max_token_id)
        self._build_lookup()

    @classmethod
    def from_titles(cls, titles: Mapping[Any, str], tokenizer: Any, texts: Mapping[Any, str] | None = None) -> Catalog:
        """Tokenise ``{item_id: title}`` on its own, without special tokens.

        Titles are text: one that spells a control token, such as ``<|eot_id|>``, gets the ordinary tokens of its
        letters, with a warning, and is refused where the tokenizer makes a control token of it all the same.

        Args:
            titles: one title per item id, as a mapping or a pandas Series indexed by item id; the catalogue keeps this
                order.
            tokenizer: of transformers or tokenizers, or any callable from a title to its token ids. Of a callable only
                a method of a tokenizer is known to have control tokens; titles of others are held against the prompt's
                when the two meet.
            texts: what a model reads of each item in place of its title, in the form of ``titles`` and of the same ids;
                None: the titles.

        Raises:
            TypeError: ``titles`` or ``texts`` is not a mapping to strings, or ``tokenizer`` is not callable.
            ValueError: a title or a text without tokens or of white space alone, or one that holds a control token;
                texts of other items than the titles.

        Examples:
            >>> import patchkern as pk
            >>> words = ["alien", "aliens", "the", "third", "man"]
            >>> tokenizer = lambda title: [words.index(word) for word in title.lower().split()]
            >>> catalog = pk.Catalog.from_titles({7: "Aliens", 9: "The Third Man"}, tokenizer)
            >>> catalog
            Catalog(2 items, 4 tokens, with titles)
            >>> catalog.tokens(1).tolist()
            [2, 3, 4]
        """
        catalog = cls._tokenised("titles", titles, tokenizer)
        if texts is None:
            return catalog
        read = cls._tokenised("texts", texts, tokenizer)
        place = read.find(catalog.item_ids, "texts")
        if len(read) != len(catalog) or (place < 0).any():
            raise ValueError(
                f"texts: expected one for each of the {len(catalog):,} titles and no others, got {len(read):,}, and "
                f"none for {int((place < 0).sum()):,} of the titles"
            )
        return cls(catalog.token_ids, catalog.offsets, catalog.item_ids, catalog.titles, read._in_order(place))

    @classmethod
    def _tokenised(cls, argument: str, titles: Mapping[Any, str], tokenizer: Any) -> Catalog:
        titles = title_mapping(titles, argument)
        if not (callable(tokenizer) or is_tokenizer(tokenizer)):
            raise TypeError(f"tokenizer: expected a tokenizer or a callable, got {type(tokenizer).__name__}")
        written = list(titles.values())
        for item_id, title in titles.items():
            if not isinstance(title, str):
                raise TypeError(f"{argument}[{item_id!r}]: expected a string, got {type(title).__name__}")
            if _is_blank(title):
                raise ValueError(
                    f"{argument}: expected at least one token per item, got none for item {item_id!r}, whose title "
                    f"{title!r} is blank"
                )
        control = control_tokens(tokenizer)
        tokens = encode_titles(written, tokenizer, control)
        for item_id, ids in zip(titles, tokens, strict=True):
            if not is_sequence(ids):
                raise TypeError(f"tokenizer: expected token ids for item {item_id!r}, got {type(ids).__name__}")
        offsets = np.zeros(len(written) + 1, np.int64)
        np.cumsum([len(ids) for ids in tokens], out=offsets[1:])
        filled = [flat_array("tokenizer", ids) for ids in tokens if len(ids)]
        flat = np.concatenate(filled) if filled else np.zeros(0, np.int64)
        at = first_control_token(flat, control)
        if at is not None:
            item = int(np.searchsorted(offsets, at, side="right")) - 1
            raise ValueError(
                f"{argument}[{list(titles)[item]!r}]: expected text that makes ordinary tokens, got the control token "
                f"{control[int(flat[at])]!r} ({flat[at]}) from {written[item]!r}"
            )
        return cls(flat, offsets, id_array(list(titles), "item_ids"), written)

    @classmethod
    def from_token_ids(
        cls,
        token_ids: ArrayLike,
        offsets: ArrayLike,
        item_ids: ArrayLike | None = None,
        titles: Sequence[str] | None = None,
        texts: Catalog | None = None,
    ) -> Catalog:
        """Build from CSR arrays, ``token_ids`` (nnz,) and ``offsets`` (n_items + 1,); ids default to 0, 1, ...

        ``texts``, if any, are a catalogue of the same ids in the same order, whose titles are read in place of these.

        Examples:
            >>> import patchkern as pk
            >>> catalog = pk.Catalog.from_token_ids([5, 6, 7, 8, 9], [0, 2, 5], item_ids=["tt1", "tt2"])
            >>> catalog.tokens(0).tolist(), catalog.tokens(1).tolist()
            ([5, 6], [7, 8, 9])
            >>> catalog.index_of(["tt2", "tt1"]).tolist()
            [1, 0]
        """
        return cls(token_ids, offsets, item_ids, titles, texts)

    def __len__(self) -> int:
        return self.offsets.size - 1

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _STATE}

    def __setstate__(self, state: Any) -> None:
        """A pickle may hold anything: it is checked, and what is looked up in is built again."""
        if not (isinstance(state, dict) and state.keys() >= set(_STATE) - {"texts"}):  # earlier pickles have no texts
            raise TypeError(f"catalog: expected {', '.join(_STATE)} in the pickle, got {type(state).__name__}")
        Catalog.__init__(self, *(adopted(state.get(name)) for name in _STATE))

    def __repr__(self) -> str:
        also = "" if self.titles is None else ", with titles"
        if self.texts is not None:
            also += f", texts of {self.texts.token_ids.size:,} tokens"
        return f"Catalog({len(self):,} items, {self.token_ids.size:,} tokens{also})"

    @cached_property
    def lengths(self) -> NDArray[np.int32]:
        """``(n_items,)`` int32, tokens per title."""
        return freeze(np.diff(self.offsets))

    @cached_property
    def distinct_tokens(self) -> frozenset[int]:
        """The token ids that occur in any title or text."""
        own = frozenset(np.unique(self.token_ids).tolist())
        return own if self.texts is None else own | self.texts.distinct_tokens

    @property
    def inputs(self) -> Catalog:
        """What a model reads of each item: the texts, and the catalogue itself where it has none."""
        return self if self.texts is None else self.texts

    @cached_property
    def planned(self) -> Catalog:
        """What a planner takes rows from: item ``i`` is read as entry ``i``, and generated as `generated` of it.

        The texts and then the titles as one catalogue; without texts the catalogue itself, whose entries are both.
        """
        if self.texts is None:
            return self
        return Catalog(
            np.concatenate([self.texts.token_ids, self.token_ids]),
            np.append(self.texts.offsets, self.offsets[1:].astype(np.int64) + self.texts.token_ids.size),
        )

    def generated(self, index: NDArray[np.int32]) -> NDArray[np.int32]:
        """Entries of `planned` that are the titles at these catalogue positions; -1, for none, stays."""
        return index if self.texts is None else np.where(index < 0, index, index + len(self)).astype(np.int32)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all items in order, each its id and the token ids of its title and text.

        The same on every machine, 32 hexadecimal digits. The ids 7 and "7" are not the same.
        """
        digest = hashlib.blake2b(self.token_fingerprint.encode(), digest_size=16)
        digest.update(self.item_ids.dtype.kind.encode())
        if self.item_ids.dtype.kind == "U":  # however wide the array has them
            texts = self.item_ids.tolist()
            digest.update(np.fromiter(map(len, texts), "<i4", len(texts)).tobytes())
            digest.update("".join(texts).encode("utf-8", "surrogatepass"))
        else:
            digest.update(self.item_ids.astype("<i8").tobytes())
        return digest.hexdigest()

    @cached_property
    def token_fingerprint(self) -> str:
        """As `fingerprint`, of the token ids alone: the same for items that are called something else."""
        digest = hashlib.blake2b(digest_size=16)
        for array in (np.array([len(self)]), self.offsets, self.token_ids):
            digest.update(array.astype("<i4").tobytes())
        if self.texts is not None:
            digest.update(self.texts.token_fingerprint.encode())
        return digest.hexdigest()

    def by_item(self) -> Catalog:
        """The same items under one token each, their catalogue position: what a model of item ids reads.

        Examples:
            >>> import patchkern as pk
            >>> catalog = pk.Catalog.from_token_ids([5, 6, 7, 8, 9], [0, 2, 5], item_ids=["tt1", "tt2"])
            >>> catalog.by_item().tokens(1).tolist()
            [1]
        """
        return Catalog(np.arange(len(self)), np.arange(len(self) + 1), self.item_ids, self.titles)

    def tokens(self, index: int) -> NDArray[np.int32]:
        """Token ids of the item at catalogue position ``index`` (a view)."""
        return self.token_ids[self.offsets[index] : self.offsets[index + 1]]

    def index_of(self, item_ids: ArrayLike, argument: str = "item_ids") -> NDArray[np.int32]:
        """Catalogue positions of ``item_ids``: int32, same shape.

        Raises:
            ValueError: an id that the catalogue does not hold; the message names ``argument``.
        """
        index = self.find(item_ids, argument)
        if index.size and index.min() < 0:
            at = int(np.flatnonzero(index.ravel() < 0)[0])
            got = id_array(item_ids, argument).item(at)
            raise ValueError(f"{argument}: expected item ids of the catalog, got {got!r} at position {at}")
        return index

    def find(self, item_ids: ArrayLike, argument: str = "item_ids") -> NDArray[np.int32]:
        """As `index_of`, with -1 for ids that the catalogue does not hold."""
        ids = id_array(item_ids, argument)
        if ids.size == 0:
            return np.zeros(ids.shape, np.int32)
        if ids.dtype.kind != self.item_ids.dtype.kind:
            kind = {"i": "integer", "U": "string"}
            expected, got = kind[self.item_ids.dtype.kind], kind[ids.dtype.kind]
            raise TypeError(f"{argument}: expected {expected} item ids as in the catalog, got {got} ids")
        if self._positions is not None:
            index = np.fromiter((self._positions.get(i, -1) for i in ids.ravel().tolist()), np.int32, ids.size)
            return index.reshape(ids.shape)
        shifted = ids - self._first_id
        # One unsigned comparison catches ids on both sides of the table.
        inside = shifted.view(np.uint64) < self._table.size
        return self._table[shifted] if inside.all() else self._table[np.where(inside, shifted, self._hole)]

    def _in_order(self, places: NDArray[np.int32]) -> Catalog:
        """The items at these catalogue positions, in this order."""
        titles = None if self.titles is None else [self.titles[place] for place in places.tolist()]
        tokens = [self.tokens(place) for place in places.tolist()]
        offsets = np.append(0, np.cumsum(self.lengths[places], dtype=np.int64))
        flat = np.concatenate(tokens) if tokens else np.zeros(0, np.int32)
        return Catalog(flat, offsets, self.item_ids[places], titles)

    def _build_lookup(self) -> None:
        """Integer ids of a bounded range get a table, all others a dict."""
        ids = self.item_ids
        self._positions: dict[Any, int] | None = None
        self._first_id, span = 0, 0
        if ids.dtype.kind in "iu" and ids.size:
            self._first_id = int(ids.min())
            span = int(ids.max()) - self._first_id + 1
        if ids.dtype.kind in "iu" and span <= max(_TABLE_SLACK * ids.size, 1 << 16):
            # The last entry is a hole on purpose: ids outside the range are sent there.
            self._table = np.full(span + 1, -1, np.int32)
            self._hole = span
            self._table[ids - self._first_id] = np.arange(ids.size, dtype=np.int32)
            distinct = int((self._table >= 0).sum())
        else:
            self._positions = {item: position for position, item in enumerate(ids.tolist())}
            distinct = len(self._positions)
        if distinct != ids.size:
            _, first = np.unique(ids, return_index=True)
            repeated = np.setdiff1d(np.arange(ids.size), first)
            raise ValueError(f"item_ids: expected distinct ids, got {ids.item(repeated[0])!r} more than once")


def _texts(texts: Any, item_ids: NDArray[Any]) -> Catalog | None:
    if texts is None:
        return None
    if not isinstance(texts, Catalog):
        raise TypeError(f"texts: expected a Catalog or None, got {type(texts).__name__}")
    if texts.texts is not None:
        raise ValueError("texts: expected a catalogue without texts of its own, got one with some")
    if texts.item_ids.dtype.kind != item_ids.dtype.kind or not np.array_equal(texts.item_ids, item_ids):
        raise ValueError(f"texts: expected the catalogue's {item_ids.size:,} item ids in its order, got others")
    return texts


def _is_blank(title: str) -> bool:
    """Whether there is nothing to see: white space, control and format characters alone."""
    if title.isprintable():
        return not title.strip()
    return not any(letter.isprintable() and not letter.isspace() for letter in title)


def _int32(name: str, values: ArrayLike) -> NDArray[np.int32]:
    array = flat_array(name, values)
    if array.size and array.dtype.kind not in "iu":
        raise TypeError(f"{name}: expected integers, got dtype {array.dtype}")
    if array.size and (int(array.max()) > _INT32_MAX or int(array.min()) < -_INT32_MAX):
        raise ValueError(f"{name}: expected values that fit in int32, got up to {int(array.max())}")
    return frozen(array.astype(np.int32, copy=False), values)


def _item_ids(item_ids: ArrayLike | None, n_items: int) -> NDArray[Any]:
    if item_ids is None:
        return freeze(np.arange(n_items, dtype=np.int64))
    ids = id_array(item_ids, "item_ids")
    if ids.shape != (n_items,):
        raise ValueError(f"item_ids: expected one per title ({n_items}), got shape {ids.shape}")
    return frozen(ids, item_ids)
