# SPDX-License-Identifier: Apache-2.0
"""A transformers causal language model that reads patch-compressed histories."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import CausalLMOutput

from patchkern.batch.catalog import Catalog
from patchkern.batch.catalog_diff import CatalogDiff, check_tokens
from patchkern.batch.histories import HistoriesLike
from patchkern.batch.layout import PatchLayout
from patchkern.batch.planned_layout import check_titles
from patchkern.batch.policy_kinds import AnyPolicy, check_policy
from patchkern.batch.prompt import Prompt
from patchkern.models import attention, files, wanted_rows, wrapped
from patchkern.models.embedding import with_vectors
from patchkern.models.isolation import Isolation
from patchkern.models.item_head import ItemHead, output_weight
from patchkern.models.layout_embedder import LayoutEmbedder
from patchkern.models.positions import TOO_MANY
from patchkern.models.saved_lm import open_saved
from patchkern.models.searching import lock_of
from patchkern.ops.packed import packed_kwargs
from patchkern.ops.vector_dropout import drop_vectors
from patchkern.search.protocol import SpanCache
from patchkern.search.recommend import recommend

attention.register()


class PatchedCausalLM(LayoutEmbedder):
    """Pools a batch's rows inside ``forward`` and runs a causal language model on them, packed.

    Args:
        hf_model: any transformers causal LM, or a ``PeftModel`` around one.
        catalog: the titles.
        prompt: the fixed tokens.
        policy: used by `recommend` where it is given none, and saved along.
        attn_implementation: set on ``hf_model``; "sdpa", "eager", "flex_attention", "flash_attention_2" work too. None
            leaves the model's own.
        item_embeddings: learn a vector of its own for every item, the parameter ``item_embedding`` (n_items, D) in
            catalogue order, zero at first. A patch is then the mean of its titles, rounded, plus the mean of its items'
            vectors; text has none of it. Titles with the same words, or none in common with anything, become items that
            a model can tell apart. The vectors are no tokens: vocabulary, logits and log-probabilities stay what they
            are, and zeros change no bit. Costs ``n_items * D`` parameters, which AdamW keeps four times over in
            training, and a second, narrow pooling of the patches; on a GPU, layouts must come with their identities
            (`PatchLayout.with_identities`) unless they come from the CPU.
        item_head: also score every item from a history's last row, see `ItemHead`: a target costs one row and a
            recommendation one pass, with ``recommend(search="items")``. Logits and titles stay what they are.
        vector_dropout: in training, the probability that an item is without its vector for a pass, in its patches and
            in the item head alike, so that its text must carry; the draw is torch's, as of any dropout. It costs a copy
            of the vectors and one of their gradient. Saved along; the attribute ``vector_dropout`` may be set anew.

    Under FSDP2, call ``fully_shard`` on this module (and on the layers inside it), so that the embeddings are gathered
    when ``forward`` pools them.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Examples:
        >>> import patchkern as pk
        >>> from patchkern.models.scratch import from_scratch
        >>> titles = {7: "Alien", 8: "Aliens", 9: "The Third Man"}
        >>> hf_model, catalog, prompt = from_scratch(titles, hidden_size=16, intermediate_size=32)
        >>> model = pk.PatchedCausalLM(hf_model, catalog, prompt, pk.ItemPatches(keep_text=1))
        >>> layout = pk.build_layout(catalog, [[7, 8], [9]], model.policy, prompt, targets=[9, 7])
        >>> output = model(layout)
        >>> output.logits.shape[0] == len(layout.logit_labels)
        True
        >>> output.loss.backward()
    """

    item_head: ItemHead | None
    """what scores items from one hidden state; None without ``item_head``"""

    tokenizer: PreTrainedTokenizerBase | None
    """the transformers tokenizer that the model was saved with, and is saved with again; None without one"""

    catalog_diff: CatalogDiff | None
    """how the catalogue differs from the one that the model was saved with; None where it is that one"""

    learns: tuple[str, ...] = ("titles", "items", "both")
    """what a layout for this model may be for, the usual first; "items" and "both" need an item head"""

    def __init__(
        self,
        hf_model: PreTrainedModel,
        catalog: Catalog,
        prompt: Prompt,
        policy: AnyPolicy | None = None,
        *,
        attn_implementation: str | None = attention.NAME,
        item_embeddings: bool = False,
        item_head: bool = False,
        vector_dropout: float = 0.0,
    ) -> None:
        super().__init__(hf_model, catalog, prompt, item_embeddings, vector_dropout)
        if not isinstance(item_head, bool):
            raise TypeError(f"item_head: expected a bool, got {type(item_head).__name__}")
        if policy is not None:
            check_policy(policy)
        self.policy = policy
        self.tokenizer = None
        self.catalog_diff = None
        check_titles(catalog, prompt)
        wrapped.warn_of_special_tokens(hf_model, catalog)
        self.item_head = None
        if item_head:
            self.item_head = ItemHead(catalog, output_weight(hf_model).shape[1], hf_model.dtype, hf_model.device)
            self.item_head.train(hf_model.training)
        with lock_of(hf_model.config):  # the network may be another model's too, which is searched
            self._isolation = Isolation(hf_model, attn_implementation)
        self.register_state_dict_post_hook(files.drop_tied)
        self.register_load_state_dict_pre_hook(files.restore_tied)

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
        """Logits where they are needed, and the loss if the layout has targets.

        Args:
            layout: from `build_layout`; moved to the model's device if it is elsewhere.
            num_items_in_batch: divides the summed loss, as `transformers.Trainer` asks for under gradient accumulation
                and data parallelism; without it the loss is the mean over the supervised tokens, or items. For a layout
                with both, two numbers: of tokens and of items.
            labels: not used, the layout has its own. A `Trainer` counts ``num_items_in_batch`` from the ``labels`` of
                its batches: give it ``{"layout": layout, "labels": layout.logit_labels}``.
            smoothing: of the labels: share of every label's weight that goes to all tokens, or items, alike, as in
                `torch.nn.functional.cross_entropy`.
            title_weight, item_weight: the loss is ``title_weight`` times that of the titles' tokens plus
                ``item_weight`` times that of the items, of those that the layout labels.
            vectors: as of `embed`.

        Returns:
            With targets ``loss`` and the ``logits`` (K, V) of the K supervised rows, in the order of
            ``layout.logit_labels``; without targets the ``logits`` (B, V) of every user's last row. A layout for items
            alone (``head="items"``) has ``logits`` (0, V).

        Raises:
            ValueError: a token id, or a user's length, beyond what the model has; items to score without an item head.
        """
        rows, own = self._rows(layout, vectors)
        layout = layout.to(rows.device, non_blocking=True)
        has_titles = layout.logit_rows is not None and layout.logit_rows.shape[0] > 0
        has_items = layout.item_rows is not None and layout.item_rows.shape[0] > 0
        last = self._last_rows(layout) if layout.logit_rows is None and layout.item_rows is None else None
        if layout.num_rows == 0 or not (has_titles or has_items or last is not None):
            loss = None if layout.labels is None and layout.item_labels is None else 0 * rows.sum()
            return CausalLMOutput(loss=loss, logits=rows.new_zeros(0, self._text_config.vocab_size))
        counts = wrapped.counts(layout, num_items_in_batch)
        kwargs = packed_kwargs(layout)
        if last is not None:
            kwargs["logits_to_keep"] = last
        elif not has_titles:
            kwargs["logits_to_keep"] = rows.new_zeros(0, dtype=torch.int64)
        elif smoothing:
            del kwargs["labels"], kwargs["shift_labels"]  # the models' own loss does not smooth
        elif counts.titles is not None:
            kwargs["num_items_in_batch"] = counts.titles
        read = [part for part in (layout.logit_rows, layout.item_rows, last) if part is not None]
        with (
            wanted_rows.only(self.hf_model, torch.cat(read), rows),
            wrapped.hidden_states(self.hf_model, has_items) as states,
        ):
            output = self.hf_model(inputs_embeds=rows[None], **kwargs)
        logits, loss = output.logits[0], output.loss if has_titles else None
        if smoothing and has_titles and layout.logit_labels is not None:
            loss = wrapped.smoothed_loss(logits, layout.logit_labels, smoothing, counts.titles)
        if layout.item_rows is not None and layout.item_labels is not None and has_items:
            of_items = self._item_loss(states[0][layout.item_rows], layout.item_labels, own, smoothing, counts.items)
            loss = item_weight * of_items + (0 if loss is None else title_weight * loss)
        elif loss is not None and title_weight != 1:
            loss = title_weight * loss
        return CausalLMOutput(loss=loss, logits=logits)

    @wrapped.undisturbed
    def row_states(self, layout: PatchLayout, vectors: Tensor | None = None) -> Tensor:
        """``(T, D)`` the last hidden states of all rows of a layout; ``vectors`` as of `embed`."""
        rows, _ = self._rows(layout, vectors)
        if layout.num_rows == 0:
            return rows
        unlabelled = {"labels": None, "logit_rows": None, "logit_labels": None}
        layout = PatchLayout._trusted({**layout.__dict__, **unlabelled}).to(rows.device, non_blocking=True)
        none = rows.new_zeros(0, dtype=torch.int64)
        with wrapped.hidden_states(self.hf_model) as states:
            self.hf_model(inputs_embeds=rows[None], logits_to_keep=none, **packed_kwargs(layout))
        return states[0]

    @wrapped.undisturbed
    def item_states(self, layout: PatchLayout, vectors: Tensor | None = None) -> Tensor:
        """``(M, D)`` hidden states of a layout's item rows; ``vectors`` as of `embed`."""
        if layout.item_rows is None:
            raise ValueError('layout: expected one for items (head="items"), got one without item rows')
        with wrapped.hidden_states(self.hf_model) as states:  # which are all that is asked of it
            self(replace(layout, item_labels=None), vectors=vectors)
        return states[0][layout.item_rows.to(states[0].device, non_blocking=True)]

    def _rows(self, layout: PatchLayout, vectors: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """A layout's rows, once it is known to be one for this model, and the items' own vectors that are in them."""
        if not isinstance(layout, PatchLayout):
            raise TypeError(f"layout: expected a PatchLayout, got {type(layout).__name__}")
        self._check_length(layout.max_position + 1)
        if layout.item_labels is not None and layout.catalog_fingerprint != self.catalog.fingerprint:
            raise ValueError("layout: expected one of the model's catalog, whose items its labels are, got another's")
        own: Tensor | None = self.item_embedding
        if own is not None and self.training and self.vector_dropout:
            own = drop_vectors(own, self.vector_dropout)
        rows = with_vectors(self._embed(layout, own), layout, vectors)
        self._isolation.check_layout(self.hf_model, layout, rows)
        return rows, own

    def _item_loss(
        self, states: Tensor, labels: Tensor, own: Tensor | None, smoothing: float, num_items: Tensor | int | None
    ) -> Tensor:
        if self.item_head is None:
            raise ValueError("layout: expected one for titles from a model without an item head, got item_labels")
        loss = self.item_head.loss(states, labels, output_weight(self.hf_model), own, smoothing)
        return loss / (labels.shape[0] if num_items is None else num_items)

    def _last_rows(self, layout: PatchLayout) -> Tensor:
        ends = layout.prompts.long()
        may_be_empty = not (self.prompt.prefix or self.prompt.suffix)
        if may_be_empty and bool((ends.diff() == 0).any()):
            raise ValueError("layout: expected at least one row per user to predict from, got a user without rows")
        return ends[1:] - 1

    def _check_length(self, longest: int) -> None:
        limit = getattr(self._text_config, "max_position_embeddings", None)
        if limit is not None and longest > limit:
            raise ValueError(
                f"layout: expected at most {limit} rows per user, the positions of {self.config.model_type}, got "
                f"{longest}; {TOO_MANY}"
            )

    # ------------------------------------------------------------------ recommending

    def recommend(
        self,
        histories: HistoriesLike,
        policy: AnyPolicy | None = None,
        k: int = 20,
        num_beams: int = 20,
        search: str | None = None,
        exclude_seen: bool = False,
        memory_budget: int | str | None = None,
        batch_size: int = 64,
        **options: Any,
    ) -> list[list[tuple[Any, float]]]:
        """Per user ``(item_id, log-probability)``, the ``k`` best first; see `patchkern.search.recommend.recommend`.

        Args:
            options: its other arguments: ``allowed_items``, ``length_penalty``, ``normalize``, ``prior``,
                ``prior_weight``, ``max_expansions``, ``user_cache``, ``user_ids``, ``short``, ``unknown`` and
                ``progress``.

        Examples:
            >>> import patchkern as pk
            >>> from patchkern.models.scratch import from_scratch
            >>> titles = {7: "Alien", 8: "Aliens", 9: "The Third Man"}
            >>> model = pk.PatchedCausalLM(*from_scratch(titles, hidden_size=16, intermediate_size=32), pk.TextOnly())
            >>> lists = model.recommend([[7, 8], [9, 7]], k=1, exclude_seen=True)
            >>> [[titles[item] for item, score in user] for user in lists]
            [['The Third Man'], ['Aliens']]
        """
        return recommend(
            self, histories, policy, k, num_beams, search, exclude_seen, memory_budget, batch_size, **options
        )

    # ------------------------------------------------------------------ what a search asks of a model

    @property
    @wrapped.undisturbed
    def takes_branches(self) -> bool:
        """Can it be given layouts of `build_training_layout`, with spans that share a prefix?"""
        return self._isolation.takes_branches(self.hf_model)

    def check_search(self, layout: PatchLayout, depth: int) -> None:
        """See `patchkern.search.protocol.SearchModel`."""
        self._isolation.check_search(self.hf_model, layout, depth)

    def prompt_logits(
        self, layout: PatchLayout, rows: Tensor, cache: SpanCache, vectors: Tensor | None = None
    ) -> Tensor:
        """See `patchkern.search.protocol.SearchModel`."""
        return self._prompt_pass(layout, rows, cache, vectors, "titles")

    def prompt_states(
        self, layout: PatchLayout, rows: Tensor, cache: SpanCache, vectors: Tensor | None = None
    ) -> Tensor:
        """See `patchkern.search.protocol.SearchModel`."""
        return self._prompt_pass(layout, rows, cache, vectors, "items")

    def _prompt_pass(
        self, layout: PatchLayout, rows: Tensor, cache: SpanCache, vectors: Tensor | None, head: str
    ) -> Tensor:
        """Logits after the rows, or their hidden states for items."""
        embedded, of_items = self.embed(layout, vectors), head == "items"
        rows = rows.to(embedded.device, non_blocking=True)
        kwargs = {
            name: value.to(embedded.device, non_blocking=True) if isinstance(value, Tensor) else value
            for name, value in packed_kwargs(layout).items()
        }
        kwargs |= {"logits_to_keep": rows[:0] if of_items else rows, "span_cache": cache}
        with (
            wanted_rows.only(self.hf_model, rows, embedded) as of_rows,
            wrapped.hidden_states(self.hf_model, of_items) as states,
        ):
            logits: Tensor = self.hf_model(inputs_embeds=embedded[None], **kwargs, **of_rows).logits[0]
        return states[0][rows.to(states[0].device, non_blocking=True)] if of_items else logits

    def item_scores(self, states: Tensor) -> Tensor:
        """See `patchkern.search.protocol.SearchModel`."""
        if self.item_head is None:
            raise ValueError("model: expected one with an item head (item_head=True), got one without")
        return self.item_head.scores(states, output_weight(self.hf_model), self.item_embedding)

    def token_logits(self, tokens: Tensor, positions: Tensor, cache: SpanCache) -> Tensor:
        """See `patchkern.search.protocol.SearchModel`."""
        # as rows, which is what titles are where they are learned: some models make more of ids than their embeddings
        rows = self.get_input_embeddings()(tokens[:, None])
        output = self.hf_model(inputs_embeds=rows, position_ids=positions[:, None], use_cache=False, span_cache=cache)
        return output.logits[:, -1]

    # ------------------------------------------------------------------ files

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        catalog: Catalog | None = None,
        *,
        attn_implementation: str | None = attention.NAME,
        base_model: PreTrainedModel | None = None,
        item_embeddings: bool = False,
        item_head: bool = False,
        vector_dropout: float | None = None,
        renamed: Literal["error", "allow"] = "error",
        **hf_kwargs: Any,
    ) -> PatchedCausalLM:
        """Read what `save_pretrained` wrote: model, prompt, policy, catalogue; tokenizer, item embeddings, head if any.

        Args:
            folder: a local folder, or the hub id of one that was uploaded.
            catalog: another one than the model was saved with, tokenised by the same tokenizer. What differs is in
                `catalog_diff`; items that are new or gone are nothing unusual, but where some have other titles, or
                none is one that the model was saved with, a `CatalogWarning` says so.
            attn_implementation: as in the constructor.
            base_model: the model under a saved adapter; where not given, the one named in the adapter's configuration.
                Its embedding is resized to that of training, if the adapter has the rows.
            item_embeddings, item_head: have them also where none were saved.
            vector_dropout: another one than was saved.
            renamed: "allow" a ``catalog`` in which more than a tenth of the saved items have other titles.
            hf_kwargs: for the wrapped model's ``from_pretrained``, such as ``dtype`` or ``device_map``;
                ``trust_remote_code`` is False unless given.

        Raises:
            FileNotFoundError: no ``patchkern.json``, no folder, or no hub that has one.
            ValueError: a ``patchkern.json`` that this version cannot read, a folder without a catalogue (as earlier
                versions wrote them) and no ``catalog``, one whose tokens are another tokenizer's or whose items have
                other titles, or a ``base_model`` that cannot be resized.
        """
        folder, description = open_saved(folder, hf_kwargs)
        if "titles" not in description.learns:
            raise ValueError(f"folder: expected a PatchedCausalLM in {os.fspath(folder)!r}, got an ItemModel")
        catalog, diff = files.choose_catalog(folder, catalog, renamed)
        tokenizer = files.read_tokenizer(folder, description, hf_kwargs.get("trust_remote_code", False))
        if diff is not None and tokenizer is not None:
            check_tokens(catalog, diff.new, tokenizer)
        hf_model = files.read_hf_model(folder, base_model, description.vocabulary_size, hf_kwargs)
        model = cls(
            hf_model,
            catalog,
            description.prompt,
            description.policy,
            attn_implementation=attn_implementation,
            item_embeddings=item_embeddings or description.item_embeddings,
            item_head=item_head or description.item_head,
            vector_dropout=description.vector_dropout if vector_dropout is None else vector_dropout,
        )
        model.catalog_diff = diff
        model.tokenizer = tokenizer
        model.learned = description.learned
        if description.item_embeddings:
            model.load_item_embeddings(folder)
        if model.item_head is not None and description.item_head:
            model.item_head.load(folder)
        return model
