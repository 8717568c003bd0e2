# SPDX-License-Identifier: Apache-2.0
"""The item head: every item of a catalogue scored from one hidden state."""

from __future__ import annotations

import os
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from patchkern.batch.catalog import Catalog
from patchkern.batch.histories import Histories
from patchkern.batch.layout import PatchLayout
from patchkern.batch.policies import ItemPatches
from patchkern.batch.prompt import Prompt
from patchkern.batch.sample_layout import build_layout
from patchkern.models.files import read_item_head
from patchkern.models.folders import current
from patchkern.ops.item_softmax import item_softmax, sample_items
from patchkern.ops.pool_rows import pool_rows
from patchkern.search.model_state import tensor_state

SCORES = ("dot", "cosine")
"""What an `IdHead` makes of a state and an item's vector."""

_COSINE_SCALE = 20.0  # of scores, whose softmax would be flat without


class CatalogHead(nn.Module):
    """``score(user, i) = <q(h), v_i> + b_i``, of every item i; h is the hidden state of a history's last row.

    Which query q and which vectors v_i is what a subclass says.

    Args:
        catalog: the items.
        dtype, device: of the parameters.

    Attributes:
        bias: ``(n_items,)`` in catalogue order, 0 at first; see `start_from_counts`.
        sampled_above: with more items than this, training samples them.
        num_sampled: how many it draws in a batch then.
    """

    sampled_above = 50_000
    num_sampled = 8192

    _kept: ClassVar[tuple[str, ...]] = ("_known",)
    """attributes that are made when they are needed"""

    def __init__(self, catalog: Catalog, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.catalog = catalog
        self.bias = nn.Parameter(torch.zeros(len(catalog), dtype=dtype, device=device))
        self._known: tuple[Any, Tensor] | None = None

    def extra_repr(self) -> str:
        return f"{len(self.catalog):,} items"

    def start_from_counts(self, counts: ArrayLike) -> None:
        """Begin with what is popular: each bias the log of one more than how often its item was taken, less their mean.

        So 0, which an item has that is new to the catalogue later, is what is usual; one that was there and that nobody
        took has less.

        Args:
            counts: ``(n_items,)`` numbers of at least 0, in catalogue order.
        """
        values = np.asarray(counts, np.float64)
        if values.shape != (len(self.catalog),) or not bool((values >= 0).all()):
            raise ValueError(
                f"counts: expected {len(self.catalog)} numbers of at least 0, one per item, got shape {values.shape}"
            )
        with torch.no_grad():
            logs = np.log1p(values)
            self.bias.copy_(torch.from_numpy(logs - logs.mean() if logs.size else logs))

    # ------------------------------------------------------------------ scores

    def queries(self, states: Tensor) -> Tensor:
        """``(M, D)`` what items' vectors are multiplied with."""
        raise NotImplementedError

    def vectors(self, weight: Tensor, own: Tensor | None, items: Tensor | None = None) -> Tensor:
        """``(n, D)`` the vectors of all items, or of some; differentiable.

        Args:
            weight: ``(V, D)`` the output embedding.
            own: ``(n_items, D)`` the items' own vectors, or None.
            items: ``(n,)`` int64 catalogue positions; all where not given.
        """
        raise NotImplementedError

    def loss(
        self,
        states: Tensor,
        labels: Tensor,
        weight: Tensor,
        own: Tensor | None,
        smoothing: float = 0.0,
    ) -> Tensor:
        """Cross-entropy of the next items, summed over M states.

        Over the whole catalogue; in training, and with more than ``sampled_above`` items, over `sample_items` of it.

        Args:
            states: ``(M, D)`` hidden states.
            labels: ``(M,)`` int64 catalogue positions.
            weight, own: as of `vectors`.
            smoothing: as of `item_softmax`; 0 where items are sampled.
        """
        if self.training:
            self._known = None  # what follows changes parameters, and torch does not count what fused optimisers write
        queries = self.queries(states)
        if not self.training or len(self.catalog) <= self.sampled_above:
            return item_softmax(queries, self.vectors(weight, own), self.bias, labels, smoothing=smoothing)
        sampled = sample_items(self.bias, labels, self.num_sampled)
        vectors = self.vectors(weight, own, sampled.items)
        return item_softmax(
            queries,
            vectors,
            self.bias[sampled.items],
            sampled.labels,
            log_weights=sampled.log_weights,
            smoothing=smoothing,
        )

    def scores(self, states: Tensor, weight: Tensor, own: Tensor | None) -> Tensor:
        """``(M, n_items)`` log-probabilities over the catalogue, float32 (float64 for float64), without gradients."""
        return torch.log_softmax(self.logits(states, weight, own), dim=1)

    def logits(self, states: Tensor, weight: Tensor, own: Tensor | None) -> Tensor:
        """``(M, n_items)`` scores, of which `scores` is the log-softmax.

        The items' vectors are kept until a parameter that they are made of changes, as far as `tensor_state` sees it.
        """
        with torch.no_grad():
            parts = (weight,) if own is None else (weight, own)
            state = tensor_state(parts)
            known = self._known
            if known is None or known[0] != state or any(part.is_inference() for part in parts):
                # what is kept may be used outside of inference mode, which allows gradients again where it ends
                with torch.inference_mode(False), torch.no_grad():
                    # (D, n_items): for one state a third of the time of the other way around
                    known = self._known = (state, self.vectors(weight, own).T.contiguous())
            logits = (self.queries(states) @ known[1]).to(torch.promote_types(states.dtype, torch.float32))
            return logits.add_(self.bias)

    def train(self, mode: bool = True) -> CatalogHead:
        """As of a module."""
        self._known = None
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> CatalogHead:
        """As of a module, which is moved and converted by it: what is kept would hold memory where it was."""
        self.__dict__.update(dict.fromkeys(self._kept))
        applied: CatalogHead = super()._apply(*args, **kwargs)
        return applied

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles make what they keep anew."""
        return {**self.__dict__, **dict.fromkeys(self._kept)}

    def load(self, folder: str | os.PathLike[str]) -> None:
        """Take what ``save_pretrained`` wrote, each bias by its item's id; new items have none.

        Raises:
            FileNotFoundError, ValueError: there is none, or not one of this width.
        """
        shapes = {name: tuple(value.shape) for name, value in self.named_parameters() if name != "bias"}
        self.load_state_dict(read_item_head(current(folder), self.catalog, shapes))


class ItemHead(CatalogHead):
    """``score(user, i) = temperature * <g(h), e_i> + b_i``, of every item i.

    h is the hidden state of a history's last row; e_i the mean of the rows that the title's tokens have in the output
    embedding (those of the input text, where the catalogue has texts), plus the item's own vector where the model has
    `item_embedding`; g a linear map, the identity at first; b_i a bias. Items that are new to the model have no bias
    and no vector of their own: their text ranks them from the first moment.

    Args:
        catalog: the items.
        width: D of hidden states and output embeddings.
        dtype, device: of the parameters.

    Attributes:
        transform: g.
        log_temperature: ``(1,)``, 0 at first: scores in the units of the model's own logits.
    """

    _kept: ClassVar[tuple[str, ...]] = ("_known", "_layout")

    def __init__(self, catalog: Catalog, width: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(catalog, dtype, device)
        self.transform = nn.Linear(width, width, bias=False, dtype=dtype, device=device)
        with torch.no_grad():
            nn.init.eye_(self.transform.weight)
        # not a scalar, which fully_shard does not take
        self.log_temperature = nn.Parameter(torch.zeros(1, dtype=dtype, device=device))
        self._layout: PatchLayout | None = None

    def queries(self, states: Tensor) -> Tensor:
        """``temperature * g(states)``, (M, D)."""
        return self.transform(states) * self.log_temperature.exp()

    def vectors(self, weight: Tensor, own: Tensor | None, items: Tensor | None = None) -> Tensor:
        """``(n, D)`` the means of the titles' rows, with the items' own vectors; see `CatalogHead.vectors`."""
        if items is None:
            if self._layout is None or self._layout.device != weight.device:
                with torch.inference_mode(False):  # training uses it too
                    self._layout = _titles(self.catalog).to(weight.device)
            layout = self._layout
        else:
            layout = _titles(self.catalog, items).to(weight.device, non_blocking=True)
        pooled = pool_rows(weight, layout)
        if own is None:
            return pooled
        return pooled + (own if items is None else own[items.to(own.device)]).to(pooled.dtype)


class IdHead(CatalogHead):
    """``score(user, i) = <h, v_i> + b_i``, or 20 times their cosine plus b_i; v_i is the item's row of the table.

    Args:
        catalog: the items, the first rows of the table.
        scores: "dot" or "cosine".
        dtype, device: of the biases.
    """

    def __init__(self, catalog: Catalog, scores: str, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(catalog, dtype, device)
        self.scores_by = scores

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.scores_by}"

    def queries(self, states: Tensor) -> Tensor:
        """``(M, D)``, see `CatalogHead.queries`."""
        return states if self.scores_by == "dot" else _COSINE_SCALE * F.normalize(states, dim=1)

    def vectors(self, weight: Tensor, own: Tensor | None, items: Tensor | None = None) -> Tensor:
        """``(n, D)``, see `CatalogHead.vectors`; ``own`` is None."""
        vectors = weight[: len(self.catalog)] if items is None else weight[items]
        return vectors if self.scores_by == "dot" else F.normalize(vectors, dim=1)


def output_weight(hf_model: Any) -> Tensor:
    """``(V, D)`` the weight of a model's output embedding, which its logits are made with.

    Raises:
        ValueError: the model has none, or one that is more than its weight.
    """
    output = hf_model.get_output_embeddings()
    weight = getattr(output, "weight", None)  # of a copy that peft trains that copy's, while its adapter is active
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        raise ValueError(
            f"item_head: expected a model with an output embedding of one weight, got {type(output).__name__}"
        )
    if hasattr(output, "lora_A"):
        raise ValueError(
            "item_head: expected an output embedding without LoRA, whose items' vectors would lack what it adds; leave "
            "it out of target_modules, or name it in modules_to_save"
        )
    if isinstance(weight, DTensor):
        raise ValueError(
            "item_head: expected an output embedding that is gathered here: call fully_shard on the PatchedCausalLM, "
            "not on the model inside it"
        )
    return weight


def _titles(catalog: Catalog, items: Tensor | None = None) -> PatchLayout:
    """A layout of one patch per item."""
    item_ids = catalog.item_ids if items is None else catalog.item_ids[items.cpu().numpy()]
    histories = Histories(item_ids, np.arange(len(item_ids) + 1))
    return build_layout(catalog, histories, ItemPatches(keep_text=0, max_items=None), Prompt(), transpose=True)
