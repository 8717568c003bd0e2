# SPDX-License-Identifier: Apache-2.0
"""A content hash of every row of a layout: equal rows, in whatever batch, process or machine, have equal hashes."""

from __future__ import annotations

from hashlib import blake2b
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from patchkern.batch.catalog import Catalog
from patchkern.batch.layout import PatchLayout
from patchkern.batch.layout_checks import check_readable
from patchkern.batch.policy_kinds import Level, Levels

UInt64 = NDArray[np.uint64]

_TOKEN, _TITLE, _SESSION, _LEARNED = (
    np.uint64(tag) for tag in (0x8EBC6AF09C88C6E3, 0x589965CC75374CC3, 0x1D8E4E27C47D124F, 0x7B1FD2A3E96C5D41)
)
_STEP = np.uint64(0x9E3779B97F4A7C15)

_titles: WeakKeyDictionary[Catalog, UInt64] = WeakKeyDictionary()  # of each catalogue that was asked for, every item's


def row_hashes(layout: PatchLayout, by_item: bool = False, vectors: Tensor | None = None) -> UInt64:
    """What every row stands for, as one number.

    A literal's hash comes from its token; a patch's from the title tokens of its items, in order, whatever the items'
    ids and places in batch and catalogue are. Rows with equal hashes are computed from the same tokens in the same way,
    so any cache of what a model makes of them can be keyed by these numbers. Different rows differ but for a chance of
    2^-64 a pair; it is no cryptographic hash, which would withstand titles made to collide.

    Args:
        layout: any; it is read on the CPU.
        by_item: tell patches of different items apart also where their titles are equal, by the items' places in the
            catalogue: for a model with item embeddings.
        vectors: ``(V, D)`` what the layout's ``vector_rows`` are, which are told apart by their bits.

    Returns:
        ``(T,)`` uint64.

    Raises:
        ValueError: a layout with vector rows and no vectors, or other than it has rows for.

    Examples:
        The rows of a history that has grown begin as before.

        >>> import patchkern as pk
        >>> catalog = pk.Catalog.from_token_ids(range(4), range(5))
        >>> policy, prompt = pk.ItemPatches(keep_text=0), pk.Prompt(prefix=[4], separator=[5])
        >>> before, after = (
        ...     pk.row_hashes(pk.build_layout(catalog, [items], policy, prompt)) for items in ([0, 1], [0, 1, 3])
        ... )
        >>> (before == after[: before.size]).tolist()
        [True, True, True, True]
    """
    expected = 0 if layout.vector_rows is None else layout.vector_rows.shape[0]
    if expected != (0 if vectors is None else vectors.shape[0]):
        got = "None" if vectors is None else str(vectors.shape[0])
        raise ValueError(f"vectors: expected {expected}, one per vector row of the layout, got {got}")
    check_readable(layout)
    layout = layout.to("cpu")
    lo, hi, items, token_ids, offsets = (
        x.numpy().astype(np.int64) for x in (layout.lo, layout.hi, layout.items, layout.token_ids, layout.offsets)
    )
    title_ends = offsets[1:]
    titles = _sequences(_mixed(token_ids + 1, _TOKEN), offsets[:-1], title_ends - offsets[:-1], _TITLE)
    if by_item:
        titles = _mixed(layout.title_index.numpy(), titles)
    hashes = _mixed(-lo, _TOKEN)  # of -1 - lo, the token, plus one
    patch = np.flatnonzero(lo >= 0)
    hashes[patch] = _sequences(titles[items], lo[patch], (hi - lo)[patch], _SESSION)
    if layout.vector_rows is not None and vectors is not None:
        numbers = vectors.detach().cpu().contiguous().view(torch.uint8).numpy()
        digests = b"".join(blake2b(row, digest_size=8).digest() for row in numbers)
        hashes[layout.vector_rows.numpy()] = np.frombuffer(digests, "<u8")
    return hashes


def item_hashes(catalog: Catalog, by_item: bool = False, index: NDArray[np.integer[Any]] | None = None) -> UInt64:
    """What items of a catalogue are to a model, each as one number: its input tokens, as in `row_hashes`.

    Args:
        catalog: any; its titles are read once in its life.
        by_item: tell items with equal titles apart, by their places in the catalogue.
        index: ``(n,)`` places of the items in the catalogue; None: all, in order.

    Returns:
        ``(n,)`` uint64.
    """
    titles = _titles.get(catalog)
    if titles is None:
        read = catalog.inputs
        tokens = _mixed(read.token_ids.astype(np.int64) + 1, _TOKEN)
        titles = _sequences(tokens, read.offsets[:-1].astype(np.int64), read.lengths.astype(np.int64), _TITLE)
        _titles[catalog] = titles
    places = np.arange(titles.size) if index is None else index
    hashes = titles[places]
    return _mixed(places, hashes) if by_item else hashes


def learned_hashes(
    read: UInt64,
    forms: Levels,
    offsets: NDArray[np.int64],
    user: NDArray[np.int64],
    lengths: NDArray[np.int64],
    count: int,
    manner: NDArray[np.integer[Any]],
) -> UInt64:
    """What learned rows stand for that have read items, which need not be there any more.

    Args:
        read: ``(N,)`` hashes of the items of B users.
        forms: ``(N,)`` as what each of them was read, a `Level`.
        offsets: ``(B + 1,)`` which of them are whose.
        user: ``(G,)`` whose each group of learned rows is, and lengths: ``(G,)`` how many of that user's first items it
            has read, in order.
        count: learned rows of a group.
        manner: integers that say how all of them were read.

    Returns:
        ``(G * count,)`` uint64: each row's comes from what it has read, how, and its place in its group.
    """
    how = np.frombuffer(blake2b(manner.astype("<i8").tobytes(), digest_size=8).digest(), "<u8")
    place = np.arange(read.size) - np.repeat(offsets[:-1], np.diff(offsets))
    sums = _running(_mixed(place * (1 + Level.DROP) + forms, read ^ how))
    first = offsets[user]
    pasts = _mixed(lengths, sums[first + lengths] - sums[first] + _LEARNED)
    return _mixed(np.tile(np.arange(count), pasts.size), np.repeat(pasts, count))


def _sequences(hashes: UInt64, starts: NDArray[np.int64], lengths: NDArray[np.int64], tag: np.uint64) -> UInt64:
    """One hash for each run of ``hashes``: that of the sum of its members, each mixed with its place in the run."""
    ends = np.cumsum(lengths)
    place = np.arange(lengths.sum()) - np.repeat(ends - lengths, lengths)
    sums = _running(_mixed(place, hashes[place + np.repeat(starts, lengths)]))
    return _mixed(lengths, sums[ends] - sums[ends - lengths] + tag)


def _running(numbers: UInt64) -> UInt64:
    """``(n + 1,)`` sums of the first 0..n numbers, modulo 2^64, and so are their differences."""
    sums = np.zeros(numbers.size + 1, np.uint64)
    np.cumsum(numbers, out=sums[1:])
    return sums


def _mixed(numbers: NDArray[np.integer[Any]], key: UInt64 | np.uint64) -> UInt64:
    """Numbers and key as well-spread 64-bit values: the finalizer of the generator splitmix64, twice."""
    mixed = numbers.astype(np.uint64)
    for addend in (_STEP, key):
        mixed = mixed * _STEP + addend
        mixed ^= mixed >> np.uint64(30)
        mixed *= np.uint64(0xBF58476D1CE4E5B9)
        mixed ^= mixed >> np.uint64(27)
        mixed *= np.uint64(0x94D049BB133111EB)
        mixed ^= mixed >> np.uint64(31)
    return mixed
