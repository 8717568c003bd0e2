# SPDX-License-Identifier: Apache-2.0
"""Keys and values of a search: every user's prompt once, and the tokens fed after it once."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from patchkern.ops.span_attention import span_attention
from patchkern.ops.span_rows import attend_rows
from patchkern.search.prefill import Pass
from patchkern.search.suffixes import Partial, Suffixes

Layers = dict[int, tuple[Tensor, Tensor]]


class StepShape(NamedTuple):
    """Sizes of a pass that the host must know; who has them already saves a synchronisation."""

    users: int
    """distinct users"""
    width: int
    """rows of the user with the most"""
    depth: int
    """rows from the first after the prompt to the deepest new one, both included; more costs time, nothing else"""


class _Spans(NamedTuple):
    """A `Pass`, on the device."""

    rows: Tensor | slice
    cu_seqlens: Tensor
    max_seqlen: int
    prefix: Tensor | None
    max_prefix: int
    copied_from: Tensor | None
    copied_to: Tensor | None


class PrefixCache:
    """The `patchkern.search.protocol.SpanCache` of a batch of users.

    The prompts are stored packed, in one tensor per layer for the keys and one for the values, made before the first
    row is computed and filled in place. `prefill` announces a pass over rows of the prompts, `advance` one over tokens
    after them, which see their user's prompt and the tokens on the way to them.

    Args:
        cu_seqlens: ``(B + 1,)`` int32, the prompts of B users, on the model's device.
        num_rows: of all prompts.
        max_rows: tokens fed after the prompts, in all passes together.
        positions: ``(B,)`` int64, of the first token after each prompt, where that is not its number of rows: positions
            go on where rows were left out.
    """

    def __init__(self, cu_seqlens: Tensor, num_rows: int, max_rows: int, positions: Tensor | None = None) -> None:
        self.num_rows = num_rows
        self.positions = cu_seqlens.diff().long() if positions is None else positions  # (B,)
        self.layers: Layers = {}  # per layer keys and values, (Hkv, num_rows, d)
        self.suffixes = Suffixes(max_rows, cu_seqlens.device)
        self._ranges = torch.stack([cu_seqlens[:-1], cu_seqlens[1:]], dim=1)  # (B, 2)
        self._spans: _Spans | None = None
        self._attended: set[int] = set()  # layers, in this pass
        self._user = self.positions[:0]
        self._alone: tuple[Tensor, Tensor] | None = None  # spans of one row each and their prompts, for one pass

    def prefill(self, spans: Pass) -> None:
        """Announce the next pass: rows of the prompts."""
        device = self.positions.device
        self._attended.clear()

        def moved(integers: NDArray[np.int64], dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.from_numpy(integers).to(dtype).to(device, non_blocking=True)

        first, last = int(spans.rows[0]), int(spans.rows[-1])
        self._spans = _Spans(
            slice(first, last + 1) if (np.diff(spans.rows) == 1).all() else moved(spans.rows),
            moved(spans.cu_seqlens, torch.int32),
            spans.max_seqlen,
            moved(spans.prefix, torch.int32) if spans.max_prefix else None,
            spans.max_prefix,
            moved(spans.copied_from) if spans.copied_to.size else None,
            moved(spans.copied_to) if spans.copied_to.size else None,
        )

    def advance(self, parent: Tensor, user: Tensor, shape: StepShape | None = None) -> Tensor:
        """Announce the next pass: tokens after the prompts.

        Args:
            parent: ``(N,)`` int64, the row that each one continues, see `Suffixes.advance`.
            user: ``(N,)`` int64, ascending.
            shape: of this pass; computed, with host synchronisations, where not given.

        Returns:
            ``(N,)`` int64, position of each new row.
        """
        self._spans = None
        self._attended.clear()
        self._user, self._alone = user, None
        depth = self.suffixes.advance(parent, None if shape is None else shape.depth)
        return self.positions[user] + depth - 1

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float | None,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """Attention of the new rows; see `patchkern.search.protocol.SpanCache`."""
        layer: int = module.layer_idx  # type: ignore[assignment]
        if layer in self._attended:
            raise ValueError(
                f"model: search needs one attention in every layer, whose keys and values it keeps, got a second one "
                f"in layer {layer}, {type(module).__name__}"
            )
        self._attended.add(layer)
        device = query.device.type
        if torch.is_autocast_enabled(device):
            # rotary embeddings promote to float32 under autocast; what is stored, and our operators, are of one dtype
            query, key, value = (x.to(torch.get_autocast_dtype(device)) for x in (query, key, value))
        if self._spans is None:
            return self._step(layer, query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling)
        spans = self._spans
        over_spans = getattr(module, "span_attention", span_attention)
        stored = self.layers_like({layer: (key[0], value[0])})[layer]
        for rows, new in zip(stored, (key, value), strict=True):
            rows[:, spans.rows] = new[0]
            if spans.copied_to is not None:
                rows[:, spans.copied_to] = rows[:, spans.copied_from][:, None]
        keys, values = (rows[None] for rows in stored)
        if wanted is not None:
            return attend_rows(
                over_spans,
                query,
                key,
                value,
                wanted,
                spans.cu_seqlens,
                spans.prefix,
                scaling,
                prefix_key=keys,
                prefix_value=values,
                places=torch.arange(self.num_rows, device=wanted.device)[spans.rows],
            )
        if spans.prefix is None:
            return over_spans(query, key, value, spans.cu_seqlens, spans.max_seqlen, scaling)
        return over_spans(
            query,
            key,
            value,
            spans.cu_seqlens,
            spans.max_seqlen,
            scaling,
            prefix=spans.prefix,
            prefix_key=keys,
            prefix_value=values,
            max_prefix=spans.max_prefix,
        )

    def layers_like(self, rows: Layers) -> Layers:
        """The layers' keys and values, made where they do not exist: for ``num_rows`` rows (Hkv, n, d) like these."""
        for layer, pair in rows.items():
            if layer not in self.layers:
                keys, values = (x.new_empty(x.shape[0], self.num_rows, x.shape[2]) for x in pair)
                self.layers[layer] = keys, values
        return self.layers

    def _step(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """One token (N, H, 1, d) over its prompt, the tokens before it, and itself. Returns (N, 1, H, d)."""
        n_rows, n_heads = query.shape[:2]
        grouped = query.view(n_rows, key.shape[1], -1, query.shape[-1])  # (N, Hkv, G, d)
        parts = self._over_prompts(layer, grouped, key, value, scaling)
        before = self.suffixes.partial(layer, grouped * scaling, key, value)
        merged = _merged([*parts, before] if before is not None else parts)
        return merged.to(value.dtype).reshape(n_rows, 1, n_heads, -1)

    def _over_prompts(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> list[Partial]:
        """Attention of (N, Hkv, G, d) queries over their users' prompts and themselves; prompts are read once."""
        keys, values = self.layers[layer]
        if self._has_flash(keys, values):
            own = (query * key).sum(dim=-1, keepdim=True).to(_wide(query.dtype)) * scaling
            return [self._flash(query, keys, values, scaling), (value.to(own.dtype), own, None)]
        if self._alone is None:
            each = torch.arange(len(query) + 1, dtype=torch.int32, device=query.device)
            self._alone = each, self._ranges[self._user][:, None]
        out, lse = torch.ops.patchkern.span_attention(
            query.flatten(1, 2),
            key[:, :, 0],
            value[:, :, 0],
            *self._alone,
            keys.transpose(0, 1),
            values.transpose(0, 1),
            scaling,
            0.0,
            0,
        )
        return [(out.view(*query.shape[:3], -1), lse.view(*query.shape[:3], 1), None)]

    @staticmethod
    def _has_flash(keys: Tensor, values: Tensor) -> bool:
        return keys.device.type == "cpu" and keys.shape[2] == values.shape[2]

    def _flash(self, query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Partial:
        """The CPU's kernel, a call per user: it takes no batch of users with prompts of different lengths."""
        n_rows, n_heads, groups, width = query.shape
        queries = query.transpose(0, 1).reshape(n_heads, -1, width)
        out = torch.empty_like(queries)
        lse = torch.empty(queries.shape[:2], dtype=_wide(query.dtype), device=query.device)
        users, counts = torch.unique_consecutive(self._user, return_counts=True)
        first = 0
        for (begin, end), count in zip(self._ranges[users].tolist(), (counts * groups).tolist(), strict=True):
            rows = slice(first, first + count)
            out[:, rows], lse[:, rows] = (
                x[0]
                for x in torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                    queries[None, :, rows], keys[None, :, begin:end], values[None, :, begin:end], scale=scaling
                )
            )
            first += count
        out, lse = (x.view(n_heads, n_rows, groups, -1).transpose(0, 1) for x in (out, lse))
        return out, lse, None


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _merged(parts: list[Partial]) -> Tensor:
    """Attention over the keys of all parts, from that over each; see `patchkern.search.suffixes.partial_softmax`."""
    (first, highest, of_first), *others = parts
    if not others and of_first is None:
        return first
    for _, peak, _ in others:
        highest = torch.maximum(highest, peak)
    total = (parts[0][1] - highest).exp_()
    out = first * total  # in the wider dtype
    if of_first is not None:
        total = total * of_first
    for part, peak, share in others:
        weight = (peak - highest).exp_()
        out.addcmul_(part, weight)
        total = total.add_(weight) if share is None else total.addcmul_(share, weight)
    return out.div_(total)
