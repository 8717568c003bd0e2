# SPDX-License-Identifier: Apache-2.0
"""Models that read item ids and no words, on the layouts, the trainer, the search and the metrics of language models.

To them an item is a token: the catalogue is `patchkern.Catalog.by_item`, a session patch is the mean of its items'
vectors, and what scores items is the table of these vectors itself.
"""

from __future__ import annotations

import os
from dataclasses import fields
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

from patchkern.batch.arguments import check_count, check_number
from patchkern.batch.catalog import Catalog
from patchkern.batch.catalog_diff import CatalogDiff, compare
from patchkern.batch.layout import PatchLayout
from patchkern.batch.policy_kinds import AnyPolicy, check_policy
from patchkern.batch.prompt import Prompt
from patchkern.models import files, wrapped
from patchkern.models.embedding import with_vectors
from patchkern.models.item_blocks import BLOCKS
from patchkern.models.item_head import SCORES, IdHead
from patchkern.models.item_network import ItemNetwork, ItemNetworkConfig
from patchkern.models.positions import TOO_MANY
from patchkern.models.saved_lm import open_saved
from patchkern.ops.packed import packed_kwargs
from patchkern.ops.pool_rows import pool_rows
from patchkern.search.protocol import SpanCache

_NO_TITLES = "model: expected one that predicts titles token by token, got an ItemModel, which scores items"


class ItemModel(wrapped.WrappedLM):
    """A sequential recommender on item ids, such as SASRec, with everything that `PatchedCausalLM` has around it.

    It trains with `patchkern.training.PatchTrainer` (``head="items"``, which is its default), recommends with filters,
    priors, a memory budget, a `UserCache` and `recommend_to_disk`, and takes any policy: an item is one row, be it text
    or patch, and a session patch the mean of its items' vectors.

    Args:
        catalog: the items; their titles are kept and not read.
        policy: used where a call is given none, and saved along.
        block: "sasrec": softmax attention and a feed-forward layer; "hstu": gated pointwise attention.
        width: D of vectors and states, a multiple of ``heads``.
        layers, heads: of attention.
        inner: width of feed-forward layers, of "sasrec"; ``width`` where not given, as published.
        normalizer: by which "hstu" divides its attention, in training and serving; ``max_positions`` where not given.
        dropout: of what layers add, and of "sasrec" of input rows.
        max_positions: rows of the longest history, with the row that starts it. Training in passes
            (``rows_per_pass``) reads up to twice the policy's ``max_items``.
        head: "dot" scores an item by the product of state and vector, "cosine" by their cosine, times 20; both add the
            item's bias.
        prompt: special rows, whose ids are the number of items and those after it; one that starts a history, from
            which an empty one is scored, where not given.
        seed: of the weights; torch's global generator is left as it was.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Examples:
        >>> import patchkern as pk
        >>> catalog = pk.Catalog.from_token_ids(range(4), range(5), item_ids=["tt1", "tt2", "tt3", "tt4"])
        >>> model = pk.ItemModel(catalog, pk.ItemPatches(keep_text=0, max_items=100), width=16)
        >>> histories = [["tt1", "tt2", "tt3"], ["tt4"]]
        >>> layout = pk.build_layout(
        ...     model.catalog, histories, model.policy, model.prompt, targets=["tt4", "tt2"], head="items"
        ... )
        >>> model(layout).loss.backward()
        >>> [[item for item, score in user] for user in model.recommend(histories, k=1, exclude_seen=True)]
        [['tt4'], ['tt1']]
    """

    hf_model: ItemNetwork
    """the network, a transformers model: its configuration, its files"""

    item_head: IdHead
    """what scores items from one hidden state"""

    item_embedding: None
    """None: the table of `hf_model` has the items' vectors"""

    catalog_diff: CatalogDiff | None
    """how the catalogue differs from the one that the model was saved with; None where it is that one"""

    learns: tuple[str, ...] = ("items",)

    def __init__(
        self,
        catalog: Catalog,
        policy: AnyPolicy | None = None,
        *,
        block: str = "sasrec",
        width: int = 64,
        layers: int = 2,
        heads: int = 2,
        inner: int | None = None,
        dropout: float = 0.2,
        max_positions: int = 512,
        normalizer: float | None = None,
        head: str = "dot",
        prompt: Prompt | None = None,
        seed: int = 0,
    ) -> None:
        if not isinstance(catalog, Catalog):
            raise TypeError(f"catalog: expected a Catalog, got {type(catalog).__name__}")
        if prompt is None:
            prompt = Prompt(prefix=(len(catalog),))
        _check_prompt(prompt, len(catalog))
        for name, chosen, kinds in (("block", block, tuple(BLOCKS)), ("head", head, SCORES)):
            if chosen not in kinds:
                raise ValueError(f"{name}: expected one of {', '.join(kinds)}, got {chosen!r}")
        inner = width if inner is None else inner
        counts = {"width": width, "layers": layers, "heads": heads, "inner": inner, "max_positions": max_positions}
        for name, value in counts.items():
            check_count(name, value, minimum=1)
        check_count("seed", seed, minimum=0, maximum=2**64 - 1)
        if width % heads:
            raise ValueError(f"width: expected a multiple of heads ({heads}), got {width}")
        if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
            raise ValueError(f"dropout: expected a number of at least 0 and below 1, got {dropout!r}")
        normalizer = max_positions if normalizer is None else normalizer
        check_number("normalizer", normalizer, above=0)
        config = ItemNetworkConfig(
            block=block,
            vocab_size=max(len(catalog), prompt.max_token_id + 1),
            hidden_size=int(width),  # JSON has no numbers of NumPy's
            intermediate_size=int(inner),
            num_hidden_layers=int(layers),
            num_attention_heads=int(heads),
            max_position_embeddings=int(max_positions),
            dropout=float(dropout),
            item_scores=head,
            normalizer=float(normalizer),
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = ItemNetwork(config)
        self._assemble(network, catalog, policy, prompt)

    def _assemble(self, network: ItemNetwork, catalog: Catalog, policy: AnyPolicy | None, prompt: Prompt) -> None:
        nn.Module.__init__(self)
        if policy is not None:
            check_policy(policy)
        self.hf_model = network
        self.catalog = catalog.by_item()
        self.prompt, self.policy = prompt, policy
        self.tokenizer = None
        self.catalog_diff = None
        self.item_embedding = None
        self.item_head = IdHead(self.catalog, network.config.item_scores, network.dtype, network.device)
        self.item_head.train(network.training)

    # ------------------------------------------------------------------ forward

    @wrapped.undisturbed
    def forward(
        self,
        layout: PatchLayout,
        num_items_in_batch: Tensor | int | None = None,
        labels: Tensor | None = None,
        smoothing: float = 0.0,
        title_weight: float = 1.0,
        item_weight: float = 1.0,
        vectors: Tensor | None = None,
    ) -> CausalLMOutput:
        """The loss of a layout with targets, the scores of all items for one without.

        Args:
            layout: of `build_layout` or `build_training_layout` with ``head="items"`` and this model's `catalog`; moved
                to the model's device if it is elsewhere.
            num_items_in_batch: divides the summed loss; without it the loss is the mean over the targets.
            labels, title_weight: not used, as of a model that learns items alone.
            smoothing: of the labels, see `patchkern.ops.item_softmax.item_softmax`.
            item_weight: of the loss.
            vectors: as of `embed`.

        Returns:
            With targets ``loss``; without, ``logits`` (M, n_items) of every history's last row, float32 or float64.

        Raises:
            TypeError, ValueError: a layout of another catalogue, for titles, or with a longer history than the model
                has positions for.
        """
        states = self.item_states(layout, vectors)
        if layout.item_labels is None:
            logits = self.item_head.logits(states, self.hf_model.items.weight, None)
            return CausalLMOutput(logits=logits)
        targets = layout.item_labels.to(states.device, non_blocking=True)
        total = self.item_head.loss(states, targets, self.hf_model.items.weight, None, smoothing)
        count = max(targets.shape[0], 1) if num_items_in_batch is None else num_items_in_batch
        return CausalLMOutput(loss=item_weight * total / count)

    def item_states(self, layout: PatchLayout, vectors: Tensor | None = None) -> Tensor:
        """``(M, D)`` hidden states of the rows that items are predicted from: each history's last."""
        self._check(layout)
        if layout.item_rows is not None:
            return self.row_states(layout, vectors, layout.item_rows)
        if bool((layout.prompts.diff() == 0).any()):
            raise ValueError("layout: expected at least one row per user to predict from, got a user without rows")
        return self.row_states(layout, vectors, layout.prompts[1:].long() - 1)

    @wrapped.undisturbed
    def row_states(self, layout: PatchLayout, vectors: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
        """``(T, D)`` the last hidden states of a layout's rows.

        Args:
            layout: as of `forward`.
            vectors: as of `embed`.
            rows: ``(M,)`` int64, of which rows alone, in any order; of all where not given.
        """
        self._check(layout)
        embedded = self.embed(layout, vectors)
        if layout.num_rows == 0:
            return embedded
        layout = layout.to(embedded.device, non_blocking=True)
        wanted = None if rows is None else rows.to(embedded.device, non_blocking=True)
        # who listens to the network, as a memory in training does, hears of all rows
        asked = None if self.hf_model._forward_hooks else wanted
        states: Tensor = self.hf_model(
            inputs_embeds=embedded[None], wanted_rows=asked, **packed_kwargs(layout)
        ).last_hidden_state[0]
        return states if asked is wanted else states[wanted]

    def embed(self, layout: PatchLayout, vectors: Tensor | None = None) -> Tensor:
        """``(T, D)`` the rows of a layout: items' vectors, and means of them; differentiable.

        Args:
            layout: of the model's catalogue and prompt.
            vectors: ``(V, D)`` what its ``vector_rows`` are, which `patchkern.RecurrentMemory` gives.
        """
        if layout.max_token_id >= self.config.vocab_size:
            raise ValueError(
                f"layout: expected rows below {self.config.vocab_size}, items and special rows of the model, got "
                f"{layout.max_token_id}"
            )
        weight = self.hf_model.items.weight
        rows = pool_rows(weight, layout.to(weight.device, non_blocking=True))
        return with_vectors(rows, layout, vectors)

    def get_input_embeddings(self) -> None:  # type: ignore[override]
        """None: what is named here is sharded apart, and this table is read outside of its module, `hf_model.items`."""

    def get_output_embeddings(self) -> None:
        """None, as the input embedding."""

    def _check(self, layout: PatchLayout) -> None:
        if not isinstance(layout, PatchLayout):
            raise TypeError(f"layout: expected a PatchLayout, got {type(layout).__name__}")
        if layout.catalog_fingerprint not in (None, self.catalog.fingerprint):
            raise ValueError(
                "layout: expected one of the model's catalog, in which every item is one token (model.catalog), got "
                "another's"
            )
        if layout.logit_rows is not None:
            raise ValueError('layout: expected one for items (head="items"), got one with labels of titles')
        self._check_positions(layout)

    def _check_positions(self, layout: PatchLayout) -> None:
        limit = self.config.max_position_embeddings
        if layout.max_position >= limit:
            raise ValueError(
                f"layout: expected at most {limit} rows per user, the model's max_positions, got "
                f"{layout.max_position + 1}; {TOO_MANY}"
            )

    # ------------------------------------------------------------------ what a search asks of a model

    @property
    def takes_branches(self) -> bool:
        """Can it be given layouts with spans that share a prefix?"""
        return True

    def check_search(self, layout: PatchLayout, depth: int) -> None:
        """See `patchkern.search.protocol.SearchModel`."""
        self._check_positions(layout)

    def prompt_states(
        self, layout: PatchLayout, rows: Tensor, cache: SpanCache, vectors: Tensor | None = None
    ) -> Tensor:
        """See `patchkern.search.protocol.SearchModel`."""
        embedded = self.embed(layout, vectors)
        positions, wanted = (x.to(embedded.device, non_blocking=True) for x in (layout.position_ids, rows))
        states: Tensor = self.hf_model(
            inputs_embeds=embedded[None], position_ids=positions[None], span_cache=cache, wanted_rows=wanted
        ).last_hidden_state[0]
        return states

    def item_scores(self, states: Tensor) -> Tensor:
        """See `patchkern.search.protocol.SearchModel`."""
        return self.item_head.scores(states, self.hf_model.items.weight, None)

    def prompt_logits(
        self, layout: PatchLayout, rows: Tensor, cache: SpanCache, vectors: Tensor | None = None
    ) -> Tensor:
        """Refused: there are no titles to search."""
        raise ValueError(_NO_TITLES)

    def token_logits(self, tokens: Tensor, positions: Tensor, cache: SpanCache) -> Tensor:
        """Refused: there are no titles to search."""
        raise ValueError(_NO_TITLES)

    # ------------------------------------------------------------------ files

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        catalog: Catalog | None = None,
        *,
        renamed: Literal["error", "allow"] = "error",
        **hf_kwargs: Any,
    ) -> ItemModel:
        """Read what `save_pretrained` wrote: network, head, prompt, policy and catalogue.

        Args:
            folder: a local folder, or the hub id of one that was uploaded.
            catalog: another one than the model was saved with. Items are matched by their ids: new ones have a vector
                of zeros and no bias until they are trained, those that it no longer has are dropped.
            renamed: "allow" a ``catalog`` in which more than a tenth of the saved items have other titles.
            hf_kwargs: for the network's ``from_pretrained``, such as ``dtype``.

        Raises:
            FileNotFoundError: no ``patchkern.json``, no folder, or no hub that has one.
            ValueError: a folder of a `PatchedCausalLM`, one that cannot be read, or a catalogue of other items.
        """
        if catalog is not None and not isinstance(catalog, Catalog):
            raise TypeError(f"catalog: expected a Catalog or None, got {type(catalog).__name__}")
        folder, description = open_saved(folder, hf_kwargs)
        if description.learns != cls.learns:
            raise ValueError(f"folder: expected an ItemModel in {os.fspath(folder)!r}, got a PatchedCausalLM")
        saved, _ = files.choose_catalog(folder, None)
        network = ItemNetwork.from_pretrained(folder, **hf_kwargs)
        prompt, diff = description.prompt, None
        if catalog is not None:
            diff = compare(_by_title(saved), _by_title(catalog))
            diff.check(renamed)
            prompt = _moved(prompt, len(catalog) - len(saved))
            _rearrange(network, saved, catalog)
        model = cls.__new__(cls)
        model._assemble(network, saved if catalog is None else catalog, description.policy, prompt)
        model.catalog_diff = diff
        model.learned = description.learned
        model.item_head.load(folder)
        return model


def _check_prompt(prompt: Any, n_items: int) -> None:
    if not isinstance(prompt, Prompt):
        raise TypeError(f"prompt: expected a Prompt or None, got {type(prompt).__name__}")
    for field in fields(prompt):
        part = getattr(prompt, field.name)
        if min(part, default=n_items) < n_items:
            raise ValueError(f"prompt: expected ids from {n_items}, below which are the items, got {min(part)}")


def _moved(prompt: Prompt, by: int) -> Prompt:
    """For a catalogue of so many more items."""
    return Prompt(*(tuple(token + by for token in getattr(prompt, field.name)) for field in fields(prompt)))


def _by_title(catalog: Catalog) -> Catalog:
    """With titles' letters as tokens: what tells an item from another that has got its id."""
    letters = [[*title.encode("utf-8", "surrogatepass"), 256] for title in catalog.titles or [""] * len(catalog)]
    offsets = np.cumsum([0, *map(len, letters)])
    return Catalog([letter for title in letters for letter in title], offsets, catalog.item_ids, catalog.titles)


def _rearrange(network: ItemNetwork, saved: Catalog, catalog: Catalog) -> None:
    """The table for another catalogue: each row by its item's id, special rows after."""
    place = torch.from_numpy(saved.find(catalog.item_ids, "catalog").astype(np.int64))
    before = network.items.weight.detach()
    vectors = before[place.clamp(min=0)] * (place >= 0)[:, None].to(before.dtype)
    weight = torch.cat([vectors, before[len(saved) :]])
    network.items = nn.Embedding.from_pretrained(weight, freeze=False)
    network.config.vocab_size = weight.shape[0]
