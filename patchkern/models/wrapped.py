# SPDX-License-Identifier: Apache-2.0
"""The wrapped transformers model: what it must be, and what is asked of it, by the name that its version has."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from patchkern.batch.catalog import Catalog
from patchkern.batch.control_tokens import configured_tokens
from patchkern.batch.histories import HistoriesLike
from patchkern.batch.layout import PatchLayout
from patchkern.batch.planned_layout import title_with
from patchkern.batch.policy_kinds import AnyPolicy
from patchkern.models.probe import base_of
from patchkern.models.saved_lm import SavedLM
from patchkern.models.searching import Searching, recompute_without_searches, without_searches
from patchkern.ops.last_layer import decoder_of
from patchkern.search.recommend import recommend
from patchkern.search.scoring import score_items

Wrapped = TypeVar("Wrapped", bound="WrappedLM")
P = ParamSpec("P")
R = TypeVar("R")


def undisturbed(method: Callable[Concatenate[Wrapped, P], R]) -> Callable[Concatenate[Wrapped, P], R]:
    """A method from whose first line to its last no other thread searches with the model, nor listens to its passes.

    A search puts the model into evaluation mode, and its passes would come to whoever waits for `hidden_states`.
    """

    @functools.wraps(method)
    def alone(self: Wrapped, *args: P.args, **kwargs: P.kwargs) -> R:
        with without_searches(self.config):
            return method(self, *args, **kwargs)

    return alone


class WrappedLM(SavedLM):
    """A module around a transformers causal language model: what trainers, tools and a search ask of it."""

    accepts_loss_kwargs = True
    """`transformers.Trainer` passes ``num_items_in_batch`` where this is true."""

    @undisturbed
    def train(self: Wrapped, mode: bool = True) -> Wrapped:
        """As of a module; where another thread searches with the model, after that."""
        return super().train(mode)

    def searching(self) -> Searching:
        """See `patchkern.search.protocol.SearchModel`."""
        return Searching(self)

    @property
    def config(self) -> PretrainedConfig:
        """The wrapped model's configuration."""
        return self.hf_model.config

    @property
    def _text_config(self) -> PretrainedConfig:
        return self.config.get_text_config()

    @property
    def device(self) -> torch.device:
        """Where layouts go."""
        return self.hf_model.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the wrapped model's parameters and activations."""
        return self.hf_model.dtype

    def get_input_embeddings(self) -> nn.Module:
        """The wrapped model's input embedding."""
        return self.hf_model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module | None:
        """The wrapped model's output embedding; fully sharded training gathers the two together where they are tied."""
        return self.hf_model.get_output_embeddings()

    @property
    def _no_split_modules(self) -> list[str]:
        """Names of the layers' classes, as transformers' models have them: each layer is sharded as a unit."""
        named = base_of(self.hf_model)._no_split_modules or ()
        return sorted({type(module).__name__ for module in self.hf_model.modules()}.intersection(named))

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Recompute activations in the backward pass instead of keeping them."""
        checkpointing(self.hf_model, "enable")(activation_checkpointing_kwargs, **kwargs)
        recompute_without_searches(self.hf_model)

    def activation_checkpointing_disable(self) -> None:
        """Keep activations again."""
        checkpointing(self.hf_model, "disable")()

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """`activation_checkpointing_enable`, by the name it has had for longer."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)

    def gradient_checkpointing_disable(self) -> None:
        """`activation_checkpointing_disable`, by the name it has had for longer."""
        self.activation_checkpointing_disable()

    def recommend(
        self, histories: HistoriesLike, policy: AnyPolicy | None = None, k: int = 20, **options: Any
    ) -> list[list[tuple[Any, float]]]:
        """Per user ``(item_id, log-probability)``, the ``k`` best first: `patchkern.search.recommend.recommend`.

        Args:
            options: its other arguments; of a model without titles ``search`` can be nothing but "items".
        """
        model: Any = self  # what a search asks beyond this class is its subclasses'
        return recommend(model, histories, policy, k, **options)

    def score_items(
        self, histories: HistoriesLike, policy: AnyPolicy | None = None, items: Any = None, **options: Any
    ) -> NDArray[np.floating[Any]]:
        """``(B, n)`` log-probability of every item for every user: `patchkern.search.scoring.score_items`.

        Args:
            options: its other arguments; of a model without titles ``head`` can be nothing but "items".
        """
        model: Any = self
        return score_items(model, histories, policy, items, **options)


def check_model(hf_model: Any) -> None:
    base = hf_model
    if hasattr(hf_model, "peft_config"):
        if hasattr(hf_model, "get_base_model"):
            base = hf_model.get_base_model()
        if any(adapter.is_prompt_learning for adapter in hf_model.peft_config.values()):
            raise ValueError(
                "hf_model: expected no prompt-learning adapter, whose tokens have no place in a packed batch"
            )
    if not isinstance(base, PreTrainedModel):
        raise TypeError(f"hf_model: expected a transformers causal LM, got {type(hf_model).__name__}")
    if "logits_to_keep" not in inspect.signature(base.forward).parameters:
        raise ValueError(
            f"hf_model: expected a causal LM whose forward takes logits_to_keep, got {type(base).__name__}"
        )


def warn_of_special_tokens(hf_model: Any, catalog: Catalog) -> None:
    """Not an error: configurations of models from scratch name ids by default, which mean nothing there."""
    named = configured_tokens(hf_model)
    found = title_with(catalog, named)
    if found is not None:
        token, title = found
        warnings.warn(
            f"catalog: expected no title with a special token of the model, got {token}, its {named[token]}, in "
            f"{title}; if it is an ordinary token, say so: hf_model.config.{named[token]} = None",
            stacklevel=3,
        )


class Counts(NamedTuple):
    """By how many the summed losses of a batch are divided; None: by how many it has."""

    titles: Tensor | int | None
    items: Tensor | int | None


def counts(layout: PatchLayout, num_items_in_batch: Tensor | int | None) -> Counts:
    """What a trainer counted, told apart; two numbers where the layout labels titles and items."""
    if num_items_in_batch is None or layout.logit_labels is None or layout.item_labels is None:
        return Counts(num_items_in_batch, num_items_in_batch)
    if not isinstance(num_items_in_batch, Tensor) or num_items_in_batch.shape != (2,):
        raise ValueError(
            "num_items_in_batch: expected two numbers, of tokens and of items, for a layout that labels both, got "
            f"{num_items_in_batch}"
        )
    titles, items = num_items_in_batch.to(layout.device).unbind()
    return Counts(titles, items)


@contextmanager
def hidden_states(hf_model: PreTrainedModel, wanted: bool = True) -> Generator[list[Tensor], None, None]:
    """Where it is open, the last hidden states ``(T, D)`` of the model's next pass come into the list.

    Raises:
        ValueError: a model whose decoder does not say which they are.
    """
    found: list[Tensor] = []
    if not wanted:
        yield found
        return

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        states = getattr(output, "last_hidden_state", None)
        if states is None:
            raise ValueError(
                f"item_head: expected a model with a decoder that returns hidden states, got {type(module).__name__}"
            )
        found.append(states[0])

    handle = decoder_of(hf_model).register_forward_hook(keep)
    try:
        yield found
    finally:
        handle.remove()


def smoothed_loss(logits: Tensor, labels: Tensor, smoothing: float, num_items_in_batch: Tensor | int | None) -> Tensor:
    """In float32 and divided as transformers does it."""
    if num_items_in_batch is None:
        return F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)
    total = F.cross_entropy(logits.float(), labels, reduction="sum", label_smoothing=smoothing)
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch


def checkpointing(hf_model: PreTrainedModel, switch: str) -> Callable[..., None]:
    """The model's method, by the name that this version of transformers has for it."""
    name = "activation" if hasattr(hf_model, "activation_checkpointing_enable") else "gradient"
    method: Callable[..., None] = getattr(hf_model, f"{name}_checkpointing_{switch}")
    return method
