# SPDX-License-Identifier: Apache-2.0
"""What a search asks of a model: it knows this protocol, and no model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from patchkern.batch.catalog import Catalog
from patchkern.batch.layout import PatchLayout
from patchkern.batch.policy_kinds import AnyPolicy, check_policy
from patchkern.batch.prompt import Prompt


class SpanCache(Protocol):
    """Key-value storage of a search; a model's attention hands every layer's new rows to it."""

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float | None,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """Attention of the new rows over what is stored and themselves.

        ``query`` (B, H, L, d), ``key`` and ``value`` (B, Hkv, L, d), heads not expanded; ``module.layer_idx`` is the
        layer. A module that does not attend by softmax has a ``span_attention`` of its own, with the arguments of
        `patchkern.ops.span_attention.span_attention`. Returns (B, L, H, d).

        With ``wanted``, (M,) int64, in a pass over prompts, ``query`` (1, H, M, d) has those of its rows alone.
        """


class Searching(Protocol):
    """A context manager for one use."""

    def __enter__(self) -> None:
        """Make the model ready."""

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """`close`; after a search without an error also raise if the model did not stay ready."""

    def close(self) -> None:
        """Restore the model, if that was not done: an interrupt can come between ``with`` and what it calls."""


class SearchModel(Protocol):
    """A model whose titles can be searched, such as `patchkern.PatchedCausalLM`."""

    @property
    def catalog(self) -> Catalog:
        """The titles."""

    @property
    def prompt(self) -> Prompt:
        """The fixed tokens."""

    @property
    def policy(self) -> AnyPolicy | None:
        """How histories are compressed where a call does not say."""

    @property
    def learns(self) -> tuple[str, ...]:
        """What it predicts: "titles" token by token, "items" at once, the usual first."""

    @property
    def learned(self) -> tuple[str, ...]:
        """Which of "titles" and "items" its last training was for; empty where none is known of."""

    @property
    def config(self) -> Any:
        """Its transformers configuration."""

    @property
    def device(self) -> torch.device:
        """Where layouts go."""

    @property
    def dtype(self) -> torch.dtype:
        """Of activations, keys and values."""

    @property
    def hf_model(self) -> Any:
        """The network itself, whose memory `patchkern.budget` counts."""

    @property
    def item_embedding(self) -> Tensor | None:
        """``(n_items, D)`` a vector per item that its patches have besides their titles, or None."""

    @property
    def item_head(self) -> Any:
        """What scores all items from one hidden state, or None."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """As of a module."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """As of a module."""

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """As of a module."""

    def embed(self, layout: PatchLayout, vectors: Tensor | None = None) -> Tensor:
        """``(T, D)`` the rows of a layout, of which ``vectors`` are those that are no embeddings."""

    def searching(self) -> Searching:
        """Evaluation mode, no gradients, and attention that hands rows to a `SpanCache`; all restored afterwards.

        Threads take turns; one that is inside may enter again.
        """

    def check_search(self, layout: PatchLayout, depth: int) -> None:
        """Raise where a search over these prompts, with titles of up to ``depth`` tokens, would be silently wrong."""

    def prompt_logits(
        self, layout: PatchLayout, rows: Tensor, cache: SpanCache, vectors: Tensor | None = None
    ) -> Tensor:
        """``(k, V)`` logits after some of the rows of a pass over prompts.

        Args:
            layout: the rows that the cache was told of.
            rows: ``(k,)`` int64, which of them.
            cache: what the rows' attention goes through.
            vectors: ``(V, D)`` what the pass's ``vector_rows`` are.
        """

    def prompt_states(
        self, layout: PatchLayout, rows: Tensor, cache: SpanCache, vectors: Tensor | None = None
    ) -> Tensor:
        """``(k, D)`` hidden states of some of the rows of a pass over prompts; as `prompt_logits`."""

    def item_scores(self, states: Tensor) -> Tensor:
        """``(k, n_items)`` log-probabilities over the catalogue after hidden states, float32 or float64.

        Raises:
            ValueError: the model has no item head.
        """

    def token_logits(self, tokens: Tensor, positions: Tensor, cache: SpanCache) -> Tensor:
        """``(N, V)`` logits after one more token of each of N hypotheses.

        Args:
            tokens, positions: ``(N,)`` int64.
            cache: what the tokens' attention goes through.
        """


_NEEDED = ("catalog", "prompt", "embed", "searching", "check_search", "prompt_logits", "token_logits")


def check_model(model: Any) -> None:
    """Raise a TypeError unless ``model`` has what a search asks of one."""
    lacking = [name for name in _NEEDED if not hasattr(model, name)]
    if lacking:
        raise TypeError(
            f"model: expected a PatchedCausalLM, got {type(model).__name__}, which lacks {', '.join(lacking)} of "
            "patchkern.search.protocol.SearchModel"
        )


def check_titles(model: SearchModel, argument: str, given: Any) -> None:
    """Raise a ValueError unless the model predicts titles token by token, which ``given`` asks for."""
    if "titles" not in getattr(model, "learns", ("titles",)):
        raise ValueError(
            f'{argument}: expected "items" for {type(model).__name__}, which reads no titles, got {given!r}'
        )


def usual_head(model: Any) -> str:
    """What scores go by where nobody says: "titles", or "items" where titles were not learned.

    Args:
        model: one, or what a folder says of one: with what it ``learns`` and has ``learned``.
    """
    learned = getattr(model, "learned", ()) or getattr(model, "learns", ("titles",))
    return "titles" if "titles" in learned else "items"


def usual_search(model: Any) -> str:
    """How to recommend where nobody says: "beam", or "items" where titles were not learned, see `usual_head`."""
    return "beam" if usual_head(model) == "titles" else "items"


def policy_of(model: SearchModel, policy: AnyPolicy | None) -> AnyPolicy:
    """The policy given, else the model's."""
    chosen = model.policy if policy is None else policy
    if chosen is None:
        raise ValueError(f"policy: expected one, here or when the {type(model).__name__} was made, got None")
    check_policy(chosen)
    return chosen
