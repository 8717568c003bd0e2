# SPDX-License-Identifier: Apache-2.0
"""Layouts as plain token ids: items are tokens behind the vocabulary, and an engine need not know what they are."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from patchkern.batch.arguments import check_count
from patchkern.batch.catalog import Catalog
from patchkern.batch.layout import PatchLayout
from patchkern.batch.layout_checks import check_readable


def item_token_ids(layout: PatchLayout, catalog: Catalog, vocab_size: int) -> list[NDArray[np.int32]]:
    """The prompts of a layout as token ids, where the item at catalogue position i is token ``vocab_size + i``.

    Args:
        layout: of `patchkern.build_layout` without targets, with patches of one item each: of `TextOnly`,
            `ItemPatches`, `RandomItemPatches`, or a policy of one's own. It is read on the CPU.
        catalog: the layout's.
        vocab_size: token ids of the model, below which no item is; `Served.vocab_size`.

    Returns:
        Per user ``(rows,)`` int32.

    Raises:
        TypeError: not a layout or a catalogue.
        ValueError: a layout with sessions, whose patches are no item's (`PromptRows` makes prompts of those), with
            prefixes, which are no plain sequence, of another catalogue, or with a token that the vocabulary lacks.

    Examples:
        >>> import patchkern as pk
        >>> from patchkern.serving.vllm import item_token_ids
        >>> catalog = pk.Catalog.from_token_ids([5, 6, 7, 8, 9], [0, 2, 5])
        >>> prompt = pk.Prompt(prefix=[1], separator=[2], suffix=[3], response_end=[4])
        >>> layout = pk.build_layout(catalog, [[1, 1, 0], [0]], pk.ItemPatches(keep_text=1), prompt)
        >>> [user.tolist() for user in item_token_ids(layout, catalog, vocab_size=10)]
        [[1, 11, 2, 11, 2, 5, 6, 3], [1, 5, 6, 3]]
    """
    if not isinstance(layout, PatchLayout):
        raise TypeError(f"layout: expected a PatchLayout, got {type(layout).__name__}")
    if not isinstance(catalog, Catalog):
        raise TypeError(f"catalog: expected a Catalog, got {type(catalog).__name__}")
    check_count("vocab_size", vocab_size, minimum=1)
    check_plain(layout, catalog)
    layout = layout.to("cpu")
    if layout.max_token_id >= vocab_size:
        raise ValueError(f"layout: expected token ids below {vocab_size}, the vocabulary, got {layout.max_token_id}")
    if vocab_size + len(catalog) > np.iinfo(np.int32).max:
        raise ValueError(f"vocab_size: expected room for {len(catalog)} items below 2^31 - 1, got {vocab_size}")
    lo, hi, items, title_index = (
        x.numpy().astype(np.int64) for x in (layout.lo, layout.hi, layout.items, layout.title_index)
    )
    patch = np.flatnonzero(lo >= 0)
    sizes = hi[patch] - lo[patch]
    if (sizes != 1).any():
        raise ValueError(
            f"layout: expected patches of one item each, got one of {sizes.max()}: sessions are no tokens; serve "
            "them as prompt embeddings (PromptRows)"
        )
    ids = -1 - lo
    # a layout's items are places among its own titles, and those have places in the catalogue
    ids[patch] = vocab_size + title_index[items[lo[patch]]]
    return np.split(ids.astype(np.int32), layout.cu_seqlens.numpy()[1:-1])


def check_plain(layout: PatchLayout, catalog: Catalog) -> None:
    """Raise a ValueError unless the layout is prompts, one run of rows each, of this catalogue."""
    check_readable(layout)
    if layout.prefix is not None:
        raise ValueError("layout: expected one span per user, got spans with a prefix, which are no plain sequence")
    if layout.vector_rows is not None:
        raise ValueError("layout: expected tokens and patches alone, got rows of a memory, which are no user's items")
    if layout.labels is not None or layout.item_labels is not None:
        raise ValueError("layout: expected prompts alone, got one with targets")
    if layout.catalog_fingerprint != catalog.fingerprint:
        raise ValueError("layout: expected one of the catalog that is served, got another's")
    if layout.max_position + 1 != layout.max_seqlen:
        raise ValueError("layout: expected positions 0, 1, 2, ... for every user, got some that leave rows out")
