# SPDX-License-Identifier: Apache-2.0
"""Keys and values of the tokens that a search feeds after the prompts: a tree per user, every row stored once."""

from __future__ import annotations

import torch
from torch import Tensor

Partial = tuple[Tensor, Tensor, Tensor]


class Suffixes:
    """A pool of rows, each with the row it continues, so that any row fed so far can be continued at any time.

    Rows are numbered in the order in which they are fed, over all passes. A row sees itself and the rows on its way to
    the prompt; which ones is found by following parents on the device, without waiting for it.

    Args:
        capacity: rows kept at most.
        device: of the model.
    """

    def __init__(self, capacity: int, device: torch.device) -> None:
        self.num_rows = 0
        self._parent = torch.full((capacity,), -1, dtype=torch.int64, device=device)
        self._chain = torch.zeros(0, 0, dtype=torch.int64, device=device)  # (N, depth) rows seen, own first; -1: none
        self._pool: dict[int, tuple[Tensor, Tensor]] = {}  # per layer (Hkv, capacity, d)

    def advance(self, parent: Tensor, depth: int | None = None) -> Tensor:
        """Choose the rows of the next pass.

        Args:
            parent: ``(N,)`` int64, the row that each new one continues, -1 the prompt. New rows are ``num_rows``,
                ``num_rows + 1``, ... and may continue each other.
            depth: rows from the first after the prompt to the deepest new one, both included; more costs time, nothing
                else. Found with host synchronisations where not given.

        Returns:
            ``(N,)`` int64, the depth of each new row: 1 where it follows the prompt.
        """
        first, self.num_rows = self.num_rows, self.num_rows + len(parent)
        if self.num_rows > len(self._parent):
            raise ValueError(
                f"max_rows: expected at least {self.num_rows} rows after the prompts, got {len(self._parent)}"
            )
        self._parent[first : self.num_rows] = parent
        chain = [torch.arange(first, self.num_rows, device=parent.device)]
        while depth is None or len(chain) < depth:
            above = self._parent[chain[-1].clamp(min=0)].masked_fill_(chain[-1] < 0, -1)
            if depth is None and bool((above < 0).all()):
                break
            chain.append(above)
        self._chain = torch.stack(chain, dim=1)
        return (self._chain >= 0).sum(dim=1)

    def forget(self) -> None:
        """Make room: no row fed so far can be continued any more."""
        self.num_rows = 0

    def partial(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Partial:
        """Store the new rows of one layer, then attend to what each sees; see `partial_softmax`.

        Args:
            layer: its number.
            query: ``(N, Hkv, G, d)``, scaled.
            key, value: ``(N, Hkv, 1, d)``.

        Returns:
            ``(N, Hkv, G, d)`` and twice ``(N, Hkv, G, 1)``.
        """
        if layer not in self._pool:
            _, n_heads, _, width = key.shape
            self._pool[layer] = tuple(key.new_empty(n_heads, len(self._parent), width) for _ in range(2))  # type: ignore[assignment]
        keys, values = self._pool[layer]
        keys[:, self.num_rows - len(key) : self.num_rows] = key[:, :, 0].transpose(0, 1)
        values[:, self.num_rows - len(key) : self.num_rows] = value[:, :, 0].transpose(0, 1)
        # heads outermost: what is gathered is then one batch of matrices, without another copy
        seen = self._chain.clamp(min=0).flatten()
        shape = (len(keys), *self._chain.shape, -1)
        keys, values = (x.index_select(1, seen).view(shape) for x in (keys, values))
        hidden = (self._chain < 0)[:, None]
        out = partial_softmax(query.transpose(0, 1), keys, values, hidden)
        return tuple(x.transpose(0, 1) for x in out)  # type: ignore[return-value]


def partial_softmax(query: Tensor, keys: Tensor, values: Tensor, hidden: Tensor | None) -> Partial:
    """Unnormalised attention (..., R, d), with the largest score and the sum of exponentials (..., R, 1) beside it.

    At least float32. No row may have all its keys hidden.
    """
    scores = query @ keys.transpose(-1, -2)
    if scores.dtype in (torch.float16, torch.bfloat16):
        scores = scores.float()
    if hidden is not None:
        scores.masked_fill_(hidden, float("-inf"))
    peak = scores.amax(dim=-1, keepdim=True)
    weights = scores.sub_(peak).exp_()
    total = weights.sum(dim=-1, keepdim=True)
    return (weights.to(values.dtype) @ values).to(weights.dtype), peak, total
