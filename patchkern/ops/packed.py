# SPDX-License-Identifier: Apache-2.0
"""The packed batch: a layout and its embeddings, in the form that transformers models take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray
from torch import Tensor

from patchkern.batch.catalog import Catalog
from patchkern.batch.histories import HistoriesLike
from patchkern.batch.layout import PatchLayout
from patchkern.batch.policy_kinds import AnyPolicy
from patchkern.batch.prompt import Prompt
from patchkern.batch.sample_layout import build_layout
from patchkern.ops.checks import check_weight
from patchkern.ops.item_table import ItemTable
from patchkern.ops.pool_rows import pool_rows


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """B users packed one after the other, without padding.

    Attributes:
        inputs_embeds: ``(T, D)``, the rows.
        layout: the integers they were written from.
    """

    inputs_embeds: Tensor
    layout: PatchLayout

    def __repr__(self) -> str:
        shape, dtype = tuple(self.inputs_embeds.shape), str(self.inputs_embeds.dtype).removeprefix("torch.")
        return f"PackedBatch({shape} {dtype} of\n  {self.layout})"

    @property
    def cu_seqlens(self) -> Tensor:
        """``(B + 1,)`` int32, where each user's rows begin."""
        return self.layout.cu_seqlens

    @property
    def position_ids(self) -> Tensor:
        """``(T,)`` int64, 0, 1, 2, ... per user."""
        return self.layout.position_ids

    @property
    def max_seqlen(self) -> int:
        """Rows of the longest user."""
        return self.layout.max_seqlen

    @property
    def labels(self) -> Tensor | None:
        """``(T,)`` int64, -100 outside the response; None without targets."""
        return self.layout.labels

    def model_kwargs(self) -> dict[str, Any]:
        """Keyword arguments of a transformers causal LM for this batch.

        Positions restart per user, there is no mask and no cache, and ``cu_seq_lens_*`` travel along: all of them are
        needed for users to stay apart under every attention implementation. With targets, only the supervised rows'
        logits are computed.
        """
        return packed_kwargs(self.layout) | {"inputs_embeds": self.inputs_embeds[None]}


def packed_kwargs(layout: PatchLayout) -> dict[str, Any]:
    """`PackedBatch.model_kwargs` without the embeddings.

    A layout whose spans have prefixes adds ``span_prefix``, which ``patchkern_varlen`` attention alone understands:
    every other implementation would let each span see itself only.
    """
    kwargs: dict[str, Any] = {
        "position_ids": layout.position_ids[None],
        "cu_seq_lens_q": layout.cu_seqlens,
        "cu_seq_lens_k": layout.cu_seqlens,
        "max_length_q": layout.max_seqlen,
        "max_length_k": layout.max_seqlen,
        "use_cache": False,
    }
    if layout.prefix is not None:
        kwargs |= {"span_prefix": layout.prefix, "max_span_prefix": layout.max_prefix}
    if layout.logit_rows is not None and layout.logit_labels is not None:
        # transformers shifts `labels` once more unless it also gets `shift_labels`.
        labels = layout.logit_labels[None]
        kwargs |= {"logits_to_keep": layout.logit_rows, "labels": labels, "shift_labels": labels}
    return kwargs


def compress_batch(
    weight: Tensor,
    catalog: Catalog,
    histories: HistoriesLike,
    policy: AnyPolicy,
    prompt: Prompt,
    targets: Sequence[Any] | NDArray[Any] | None = None,
    backend: str = "auto",
    out: Tensor | None = None,
    *,
    table: ItemTable | None = None,
    scale: float = 1.0,
) -> PackedBatch:
    """Compress histories into one packed batch on ``weight``'s device: plan the rows, then write them in one pass.

    Args:
        weight: ``(V, D)`` input embeddings, float32, bfloat16, float16 or float64.
        catalog, histories, policy, prompt, targets: as in `build_layout`.
        backend, out, table: as in `pool_rows`.
        scale: by which the model's embedding multiplies its weight: Gemma's ``embed_scale``, 1 in most models. The
            weight alone does not tell, and a batch without it is another.

    Returns:
        A `PackedBatch`, differentiable in ``weight``.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came; nothing has been written then.

    Examples:
        >>> import torch
        >>> import patchkern as pk
        >>> catalog = pk.Catalog.from_token_ids([5, 6, 7, 8, 9], [0, 2, 5])
        >>> prompt = pk.Prompt(prefix=[1], separator=[2], suffix=[3], response_end=[4])
        >>> weight = torch.arange(10.0)[:, None]  # the embedding of token t is the number t
        >>> batch = pk.compress_batch(weight, catalog, [[0, 1], [0]], pk.ItemPatches(1), prompt, targets=[0, 1])
        >>> batch.inputs_embeds.flatten().tolist()
        [1.0, 5.5, 2.0, 7.0, 8.0, 9.0, 3.0, 5.0, 6.0, 4.0, 1.0, 5.0, 6.0, 3.0, 7.0, 8.0, 9.0, 4.0]
        >>> batch.labels.tolist()
        [-100, -100, -100, -100, -100, -100, -100, 5, 6, 4, -100, -100, -100, -100, 7, 8, 9, 4]
        >>> batch.cu_seqlens.tolist()
        [0, 10, 18]
    """
    check_weight(weight)
    layout = build_layout(catalog, histories, policy, prompt, targets, transpose=weight.requires_grad)
    layout = layout.to(weight.device, non_blocking=True)
    return PackedBatch(pool_rows(weight, layout, backend, out, table=table, scale=scale), layout)
