# SPDX-License-Identifier: Apache-2.0
"""Keys and values of a search: every user's prompt once, and the few own tokens of every hypothesis."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from patchkern.attention import span_attention
from patchkern.layout import PatchLayout
from patchkern.suffixes import Suffixes, partial_softmax


class StepShape(NamedTuple):
    """Sizes of a pass that the host must know; who has them already saves a synchronisation."""

    users: int
    """distinct users"""
    width: int
    """rows of the user with the most"""
    depth: int
    """rows from the first after the prompt to the deepest new one, both included; more costs time, nothing else"""


class PrefixCache:
    """What `patchkern.attention.attention` calls as ``span_cache``.

    The first forward pass is the packed prompts: attention inside each user, while keys and values are kept. After
    `advance`, every pass is one new token per hypothesis, which sees its user's prompt and its own earlier tokens.

    Args:
        layout: the packed prompts, on the model's device.
        max_rows: tokens fed after the prompts, in all passes together.
    """

    def __init__(self, layout: PatchLayout, max_rows: int) -> None:
        self._cu_seqlens, self._max_seqlen = layout.cu_seqlens, layout.max_seqlen
        self.lengths = layout.cu_seqlens.diff().long()  # (B,)
        users = torch.arange(layout.num_users, device=layout.device)
        self._user_of_row = torch.repeat_interleave(users, self.lengths, output_size=layout.num_rows)
        self._place_of_row = layout.position_ids
        places = torch.arange(layout.max_seqlen, device=layout.device)
        self._padding = (places >= self.lengths[:, None])[:, None, None]  # (B, 1, 1, L)
        self._stored_at = users  # where each user's prompt is stored; -1 once it is dropped
        self._prompts: dict[int, tuple[Tensor, Tensor]] = {}  # per layer (B, Hkv, L, d)
        self.suffixes = Suffixes(max_rows, layout.device)
        self._slot: Tensor | None = None  # (N,) of the padded (B, width) hypotheses
        self._width = 0

    @property
    def num_layers(self) -> int:
        """Layers whose keys and values are kept."""
        return len(self._prompts)

    def advance(self, parent: Tensor, user: Tensor, shape: StepShape | None = None) -> Tensor:
        """Choose the hypotheses of the next pass.

        Args:
            parent: ``(N,)`` int64, the row that each one continues, see `Suffixes.advance`.
            user: ``(N,)`` int64, ascending. A user that is left out may be dropped, and must not come back.
            shape: of this pass; computed, with host synchronisations, where not given.

        Returns:
            ``(N,)`` int64, position of each new row.
        """
        depth = self.suffixes.advance(parent, None if shape is None else shape.depth)
        if shape is None:
            counts = torch.bincount(user)
            shape = StepShape(int((counts > 0).sum()), int(counts.max()), int(depth.max()))
        if 2 * shape.users <= len(self._padding):
            is_active = torch.zeros_like(self._stored_at, dtype=torch.bool)
            is_active[user] = True
            active = is_active.to(torch.int8).argsort(descending=True, stable=True)[: shape.users]
            kept = self._stored_at[active]
            self._prompts = {layer: (k[kept], v[kept]) for layer, (k, v) in self._prompts.items()}
            self._padding = self._padding[kept]
            self._stored_at = torch.full_like(self._stored_at, -1)
            self._stored_at[active] = torch.arange(len(active), device=user.device)
        place = torch.arange(len(user), device=user.device) - torch.searchsorted(user, user)
        self._width = shape.width
        self._slot = self._stored_at[user] * self._width + place
        return self.lengths[user] + depth - 1

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """Attention of the new rows; see `patchkern.attention.SpanCache`."""
        layer: int = module.layer_idx  # type: ignore[assignment]
        if self._slot is None:
            self._prompts[layer] = (self._pad(key[0]), self._pad(value[0]))
            return span_attention(query, key, value, self._cu_seqlens, self._max_seqlen, scaling)
        return self._step(layer, query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling)

    def _pad(self, rows: Tensor) -> Tensor:
        """Packed rows (Hkv, T, d) as (B, Hkv, L, d), zeros behind each user's."""
        n_heads, _, width = rows.shape
        padded = rows.new_zeros(len(self.lengths), n_heads, self._max_seqlen, width)
        padded[self._user_of_row, :, self._place_of_row] = rows.transpose(0, 1)
        return padded

    def _step(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """One token (N, H, 1, d) over prompt and suffix: two partial softmaxes, merged. Returns (N, 1, H, d)."""
        keys, values = self._prompts[layer]
        n_users, n_kv_heads, _, width = keys.shape
        query = (query * scaling).view(len(query), n_kv_heads, -1, width)  # (N, Hkv, G, d)
        groups = query.shape[2]
        # all hypotheses of a user side by side, so that its prompt is read once: (B, Hkv, width * G, d)
        beams = query.new_zeros(n_users * self._width, n_kv_heads, groups, width)
        beams[self._slot] = query
        beams = beams.view(n_users, self._width, n_kv_heads, groups, width).transpose(1, 2)
        beams = beams.reshape(n_users, n_kv_heads, self._width * groups, width)
        prompt = partial_softmax(beams, keys, values, self._padding)
        out, peak, total = (
            x.view(n_users, n_kv_heads, self._width, groups, -1).transpose(1, 2).flatten(0, 1)[self._slot]
            for x in prompt
        )
        own_out, own_peak, own_total = self.suffixes.partial(layer, query, key, value)
        highest = torch.maximum(peak, own_peak)
        weight, own_weight = (peak - highest).exp_(), (own_peak - highest).exp_()
        merged = (out * weight + own_out * own_weight) / (total * weight + own_total * own_weight)
        return merged.to(values.dtype).view(len(query), 1, n_kv_heads * groups, -1)
