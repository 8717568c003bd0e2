# SPDX-License-Identifier: Apache-2.0
"""The item head in a training step that is counted: its parameters, the items' vectors and the loss over them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# of `patchkern.models.item_head.ItemHead`
_SAMPLED_ABOVE, _NUM_SAMPLED = 50_000, 8192
# of `patchkern.ops.item_softmax`
_CPU_ELEMENTS, _GPU_ELEMENTS, _LEAST_ROWS = 1 << 19, 1 << 26, 64


class Chunks(NamedTuple):
    """How a softmax over items is computed: so many rows at once, whether once or more often, and whose kernels run."""

    rows: int
    several: bool
    on_cuda: bool

    @classmethod
    def of(cls, item_rows: int, n_items: int, on_cuda: bool) -> Chunks:
        """As `patchkern.ops.item_softmax` chooses."""
        scored = n_items if n_items <= _SAMPLED_ABOVE else item_rows + _NUM_SAMPLED
        rows = max((_GPU_ELEMENTS if on_cuda else _CPU_ELEMENTS) // max(scored, 1), _LEAST_ROWS)
        return cls(min(rows, item_rows), rows < item_rows, on_cuda)


class CountedItems(nn.Module):
    """Has the parameters of an item head, for ``n_items`` of width D, and takes what its loss takes.

    Args:
        by_id: how the head of a `patchkern.ItemModel` scores, "dot" or "cosine"; None: as a language model's.
    """

    def __init__(self, n_items: int, width: int, dtype: torch.dtype, by_id: str | None = None) -> None:
        super().__init__()
        self.n_items, self.by_id = n_items, by_id
        if by_id is None:
            self.transform = nn.Linear(width, width, bias=False, dtype=dtype)
            self.log_temperature = nn.Parameter(torch.empty(1, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(n_items, dtype=dtype))

    def loss(self, states: Tensor, weight: Tensor, own: Tensor | None, chunks: Chunks) -> Tensor:
        """Of ``states`` (M, D); ``weight`` (V, D) is the output embedding, ``own`` (n_items, D) the items' vectors."""
        queries = self.transform(states) * self.log_temperature.exp() if self.by_id is None else states
        bias: Tensor = self.bias
        count = self.n_items
        if count > _SAMPLED_ABOVE:
            count = self._draw(len(states))
            bias = IndexedRows.apply(bias[:, None], count)[:, 0]
            own = None if own is None else IndexedRows.apply(own, count)
        in_place = self.by_id is not None and count == self.n_items
        vectors: Tensor = weight[:count] if in_place else IndexedRows.apply(weight, count)
        if self.by_id == "cosine":
            queries, vectors = 20 * F.normalize(queries, dim=1), F.normalize(vectors, dim=1)
        if own is not None:
            vectors = vectors + own.to(vectors.dtype)
        if torch.is_autocast_enabled("cpu"):
            queries, vectors = (x.to(torch.get_autocast_dtype("cpu")) for x in (queries, vectors))
        loss: Tensor = _Softmax.apply(queries, vectors, bias, chunks)
        return loss

    def _draw(self, labels: int) -> int:
        """How many items stand for the catalogue."""
        self.bias.detach().double().softmax(dim=0).cumsum(0)
        return labels + _NUM_SAMPLED


class IndexedRows(torch.autograd.Function):
    """Rows of a table and its dense gradient, as of indexing, an embedding and `pool_rows`, without the integers."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, rows: int) -> Tensor:
        ctx.shape = table.shape
        return table.new_empty(rows, table.shape[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.new_zeros(ctx.shape), None


class _Softmax(torch.autograd.Function):
    """`patchkern.ops.item_softmax`, of whose chunks two hold as much as all."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, items: Tensor, bias: Tensor, chunks: Chunks) -> Tensor:
        wide = torch.promote_types(states.dtype, torch.float32)
        given, wants = (states, items, bias), ctx.needs_input_grad[:3]
        grads = [torch.zeros_like(x, dtype=wide) if want else None for x, want in zip(given, wants, strict=True)]
        count = min(chunks.rows, len(states))
        for _ in range(1 + chunks.several):
            rows = states.narrow(0, 0, count)
            logits = (rows @ items.T).to(wide).add_(bias.to(wide))
            shares = torch.empty_like(logits)
            del logits
            slope = shares.to(states.dtype)
            if grads[0] is not None:
                grads[0].narrow(0, 0, count).copy_(slope @ items)
            if grads[1] is not None:
                product = slope.T @ rows
                # a CPU adds two dtypes by way of a copy, inside the operator
                grads[1] += product if chunks.on_cuda else product.to(wide)
                del product
            del shares, slope
        ctx.save_for_backward(*(grad for grad in grads if grad is not None))
        ctx.dtypes = [x.dtype for x in given]
        return states.new_empty((), dtype=wide)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        found = [
            (next(saved) * grad).to(dtype) if want else None
            for want, dtype in zip(ctx.needs_input_grad[:3], ctx.dtypes, strict=True)
        ]
        return (*found, None)
