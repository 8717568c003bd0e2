# SPDX-License-Identifier: Apache-2.0
"""Item patches pooled once for a whole catalogue, for embeddings that do not change: inference, or LoRA elsewhere."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from patchkern.batch.catalog import Catalog
from patchkern.batch.layout import PatchLayout
from patchkern.ops import dispatch as _ops  # noqa: F401  (torch.ops.patchkern.pool_rows)
from patchkern.ops.checks import check_backend, check_weight

# Embeddings that one chunk gathers, in bytes of float32: what a backend may need as scratch space.
_CHUNK_BYTES = 64 << 20


@dataclass(frozen=True, eq=False)
class ItemTable:
    """Every item's patch, one row per item of a catalogue; made by `item_table`.

    It belongs to one state of one weight, and keeps that weight's memory alive: nothing else can then be in its place.

    Attributes:
        rows: ``(n_items, D)``, the item patches in catalogue order, in the weight's dtype and on its device.
        catalog_fingerprint: of the catalogue, `Catalog.fingerprint`.
        source: the weight, without its gradient.
        version: how often the weight had been written to in place when the table was made.
    """

    rows: Tensor
    catalog_fingerprint: str
    source: Tensor
    version: int

    def __repr__(self) -> str:
        items, width = self.rows.shape
        dtype = str(self.rows.dtype).removeprefix("torch.")
        return f"ItemTable({items:,} items, width {width:,}, {dtype} on {self.rows.device})"

    def check(self, weight: Tensor, layout: PatchLayout) -> None:
        """See that the table says what pooling ``layout`` from ``weight`` would.

        Writes that PyTorch does not count are not noticed: those through ``weight.data``. Those of fused optimizers
        are not counted either, which is why the weight must be frozen.

        Raises:
            ValueError: another weight, one that has changed or may be trained, or a layout of another catalogue.
        """
        if weight.requires_grad:
            raise ValueError("table: expected None for a weight that requires a gradient, as a table has none")
        for name in ("shape", "dtype", "device"):
            made, got = getattr(self.source, name), getattr(weight, name)
            if made != got:
                raise ValueError(
                    f"table: expected one made from this weight, but its weight's {name} was {made}, not {got}"
                )
        if weight.data_ptr() != self.source.data_ptr() or weight.stride() != self.source.stride():
            raise ValueError("table: expected one made from this weight, but it was made from other memory")
        if {_version(weight), _version(self.source)} != {self.version}:
            raise ValueError("table: expected a fresh one, but the weight has been written to since it was made")
        if layout.catalog_fingerprint is None:
            raise ValueError("layout: expected one that knows its catalogue, as build_layout makes them, for a table")
        if layout.catalog_fingerprint != self.catalog_fingerprint:
            raise ValueError("table: expected one of the layout's catalogue, got one of a catalogue with other items")


def _version(tensor: Tensor) -> int | None:
    """How often PyTorch saw the tensor written to; None where it does not count."""
    return None if tensor.is_inference() else tensor._version


def item_table(catalog: Catalog, weight: Tensor, backend: str = "auto") -> ItemTable:
    """Pool every item's patch once: `pool_rows` then reads one row per item instead of one per token.

    Pays where the same weight pools many batches: inference, or training with frozen embeddings. Takes ``n_items * D``
    elements of memory, 16 MB for 3,883 titles at D = 2048 in bfloat16.

    Args:
        catalog: the titles, and perhaps texts, which are then what is pooled.
        weight: ``(V, D)``, as in `pool_rows`, frozen (``weight.requires_grad_(False)``). When it changes all the same,
            the table is stale and `pool_rows` refuses it.
        backend: as in `pool_rows`.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Examples:
        >>> import torch
        >>> import patchkern as pk
        >>> catalog = pk.Catalog.from_token_ids([5, 6, 7, 8, 9], [0, 2, 5])
        >>> weight = torch.arange(10.0)[:, None]  # the embedding of token t is the number t
        >>> table = pk.item_table(catalog, weight)
        >>> table
        ItemTable(2 items, width 1, float32 on cpu)
        >>> table.rows.flatten().tolist()
        [5.5, 8.0]
        >>> layout = pk.build_layout(catalog, [[0, 1]], pk.ItemPatches(keep_text=0), pk.Prompt(separator=[2]))
        >>> pk.pool_rows(weight, layout, table=table).flatten().tolist()
        [5.5, 2.0, 8.0]
    """
    if not isinstance(catalog, Catalog):
        raise TypeError(f"catalog: expected a Catalog, got {type(catalog).__name__}")
    check_weight(weight)
    check_backend(backend)
    if catalog.max_token_id >= weight.shape[0]:
        raise ValueError(
            f"weight: expected more than {catalog.max_token_id} rows for the catalog's tokens, got {weight.shape[0]}"
        )
    if weight.requires_grad:
        raise ValueError(
            "weight: expected a frozen one, as not every optimizer's steps can be noticed, got one that requires a "
            "gradient; use weight.requires_grad_(False)"
        )
    version = _version(weight)
    if version is None:
        raise ValueError(
            "weight: expected a tensor whose changes can be noticed, got one made under torch.inference_mode()"
        )
    source = weight.detach()
    read = catalog.inputs
    rows = source.new_empty(len(catalog), source.shape[1])
    tokens_per_chunk = max(_CHUNK_BYTES // (4 * source.shape[1]), 1)
    first = 0
    while first < len(catalog):
        begin = int(read.offsets[first])
        last = int(np.searchsorted(read.offsets, begin + tokens_per_chunk, side="right")) - 1
        last = max(last, first + 1)  # a title of its own, if it is that long
        item = torch.arange(last - first, dtype=torch.int32, device=source.device)
        offsets = torch.from_numpy(read.offsets[first : last + 1] - begin).to(source.device)
        token_ids = torch.from_numpy(read.token_ids[begin : int(read.offsets[last])].copy()).to(source.device)
        torch.ops.patchkern.pool_rows(
            source, item, item + 1, item, token_ids, offsets, None, None, 1.0, rows[first:last], backend
        )
        first = last
    return ItemTable(rows, catalog.fingerprint, source, version)
