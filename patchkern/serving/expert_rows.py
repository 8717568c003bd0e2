# SPDX-License-Identifier: Apache-2.0
"""Keys and values of users' experts, computed from their old items, or only from those that are newly old."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from patchkern.batch.expert_layout import compress_layout
from patchkern.batch.experts import Experts
from patchkern.batch.histories import Histories
from patchkern.batch.layout import PatchLayout
from patchkern.batch.policy_dict import policy_to_dict
from patchkern.ops.span_attention import span_attention
from patchkern.search.protocol import SearchModel
from patchkern.serving.compressor import Known, Tensors

Int64 = NDArray[np.int64]

# of a policy, what does not change what old items are compressed to
_OF_NO_MATTER = {"recent", "boundaries", "seed"}


class ExpertRows:
    """The `patchkern.serving.compressor.Compressor` of `patchkern.Experts`.

    A user's tensors are, layer by layer, the keys and the values of its experts, ``(Hkv, rows, d)`` on the CPU, with
    ``count`` rows for each part.
    """

    def __init__(self, model: SearchModel, policy: Experts) -> None:
        policy.check_prompt(model.prompt)
        self._model, self._experts = model, policy
        self.policy = {name: value for name, value in policy_to_dict(policy).items() if name not in _OF_NO_MATTER}
        self.extends = policy.parts == "blocks"
        self.block = policy.block

    def cuts(self, lengths: Int64) -> Int64:
        cuts = self._experts.cuts(lengths)
        return np.where(self._experts.compressed_parts(cuts) > 0, cuts, 0)

    def like(self, old: int) -> Tensors:
        config = self._model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        rows = self._experts.count * int(self._experts.compressed_parts(np.array(old)))
        one = torch.empty(heads, rows, width, dtype=self._model.dtype, device="meta")
        return 2 * config.num_hidden_layers * (one,)

    def compress(self, histories: Histories, known: Sequence[Known | None]) -> list[Tensors]:
        model, count = self._model, self._experts.count
        layout = compress_layout(model.catalog, histories, self._experts, model.prompt)
        model.check_search(layout, 0)
        parts = self._experts.compressed_parts(self._experts.cuts(histories.lengths))
        already = np.array([0 if one is None else one.cut // self.block for one in known])
        rows = _in_blocks(layout, parts, already) if self.extends else _in_one(layout, count)
        cache = _Recorder(layout, rows, [one.tensors for one in known if one is not None], model.device)
        model.prompt_states(_computed(layout, rows), torch.zeros(0, dtype=torch.int64), cache)
        new = [part.split((count * (parts - already)).tolist(), dim=1) for part in cache.tensors(model)]
        found = zip(known, zip(*new, strict=True), strict=True)
        return [own if one is None else _after(one.tensors, own) for one, own in found]


def _after(known: Tensors, new: Tensors) -> Tensors:
    return tuple(torch.cat(pair, dim=1) for pair in zip(known, new, strict=True))


class _Rows(NamedTuple):
    """What happens to the spans of a layout, and to its rows.

    Attributes:
        spans: ``(S,)`` bool: computed.
        seen: ``(T,)`` bool: there at all, for others to see.
        computed: ``(T,)`` bool: those of computed spans; what is seen only are known experts.
        experts: ``(T,)`` bool.
    """

    spans: NDArray[np.bool_]
    seen: NDArray[np.bool_]
    computed: NDArray[np.bool_]
    experts: NDArray[np.bool_]


def _in_one(layout: PatchLayout, count: int) -> _Rows:
    """Of users who are a span each, ``[prompt | old | U]``."""
    everything = np.ones(layout.num_rows, np.bool_)
    experts = np.zeros(layout.num_rows, np.bool_)
    experts[(layout.cu_seqlens.numpy()[1:, None] - np.arange(1, count + 1)).ravel()] = True
    return _Rows(np.ones(layout.num_users, np.bool_), everything, everything, experts)


def _in_blocks(layout: PatchLayout, parts: Int64, already: Int64) -> _Rows:
    """Of users whose spans are ``[prompt | U_0 | U_1 | .. | s_0 | s_1 | ..]``, with the first experts known."""
    spans = 1 + 2 * parts
    nth = np.arange(int(spans.sum())) - np.repeat(np.cumsum(spans) - spans, spans)
    parts, already = np.repeat(parts, spans), np.repeat(already, spans)
    experts = (nth > 0) & (nth <= parts)
    known = experts & (nth <= already)
    seen = (nth <= parts) | (nth > parts + already)
    lengths = np.diff(layout.cu_seqlens.numpy())
    return _Rows(seen & ~known, *(np.repeat(of, lengths) for of in (seen, seen & ~known, experts)))


def _computed(layout: PatchLayout, rows: _Rows) -> PatchLayout:
    """The computed rows as a layout of their own, whose spans say nothing: `_Recorder` knows them."""
    index = torch.from_numpy(np.flatnonzero(rows.computed))
    taken = {name: getattr(layout, name)[index] for name in ("lo", "hi", "position_ids")}
    spans = {"cu_seqlens": torch.tensor([0, len(index)], dtype=torch.int32), "max_seqlen": len(index)}
    return PatchLayout._trusted(
        {**layout.__dict__, **taken, **spans, "prefix": None, "max_prefix": 0, "cu_users": None}
    )


class _Recorder:
    """The `patchkern.search.protocol.SpanCache` of one pass: keeps the keys and values of experts, and no others.

    Args:
        layout: as planned.
        rows: which of it are computed.
        known: of users in order the tensors of their known experts.
        device: of the model.
    """

    def __init__(self, layout: PatchLayout, rows: _Rows, known: Sequence[Tensors], device: torch.device) -> None:
        place: Int64 = np.cumsum(rows.seen) - rows.seen  # where a row is among those that are there
        lengths = np.diff(layout.cu_seqlens.numpy())[rows.spans]

        def moved(integers: Any, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.as_tensor(integers, dtype=dtype).to(device, non_blocking=True)

        self._cu_seqlens = moved(np.cumsum([0, *lengths]), torch.int32)
        self._max_seqlen = int(lengths.max(initial=0))
        self._prefix = None
        if layout.ranges is not None:
            ranges = layout.ranges.numpy()[rows.spans]
            ends = np.append(place, rows.seen.sum())
            # all rows of a range are there, so that those between its ends are
            self._prefix = moved(np.where(ranges[..., :1] < ranges[..., 1:], ends[ranges], 0), torch.int32)
        self._max_prefix = layout.max_prefix
        self._n_seen = int(rows.seen.sum())
        self._computed = moved(place[rows.computed])
        self._known = moved(place[rows.seen & ~rows.computed])
        self._new = moved(np.flatnonzero(rows.experts[rows.computed]))
        self._stored = [torch.cat(of_users, dim=1) for of_users in zip(*known, strict=True)] if known else []
        self._recorded: dict[
            int, list[Tensor]
        ] = {}  # of every layer keys and values of the new experts, (Hkv, rows, d)

    def tensors(self, model: SearchModel) -> list[Tensor]:
        """Of all new experts, layer by layer."""
        config = model.config
        n_layers = config.get_text_config().num_hidden_layers
        if sorted(self._recorded) != list(range(n_layers)):
            raise ValueError(
                f"model: experts need span attention in all {n_layers} layers of {config.model_type}, got it in "
                f"{len(self._recorded)}"
            )
        return [part for layer in range(n_layers) for part in self._recorded[layer]]

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """See `patchkern.search.protocol.SpanCache`."""
        device = query.device.type
        if torch.is_autocast_enabled(device):
            query, key, value = (x.to(torch.get_autocast_dtype(device)) for x in (query, key, value))
        layer: int = module.layer_idx  # type: ignore[assignment]
        self._recorded[layer] = [x[0].index_select(1, self._new).cpu() for x in (key, value)]
        pair = []
        for at, rows in enumerate((key, value)):
            if self._stored:
                both = rows.new_empty(*rows.shape[:2], self._n_seen, rows.shape[3])
                both[0].index_copy_(1, self._computed, rows[0])
                both[0].index_copy_(1, self._known, self._stored[2 * layer + at].to(rows))
                rows = both
            pair.append(rows)
        over_spans = getattr(module, "span_attention", span_attention)
        if self._prefix is None:
            return over_spans(query, key, value, self._cu_seqlens, self._max_seqlen, scaling)
        return over_spans(
            query,
            key,
            value,
            self._cu_seqlens,
            self._max_seqlen,
            scaling,
            prefix=self._prefix,
            prefix_key=pair[0],
            prefix_value=pair[1],
            max_prefix=self._max_prefix,
        )
