# SPDX-License-Identifier: Apache-2.0
"""Rec2PM: a user's past in a few vectors, which a model reads, and writes anew when a segment of items is full.

A `RecurrentMemory` is a model of this library, `patchkern.PatchedCausalLM` or `patchkern.ItemModel`, whose policy is a
`patchkern.PreferenceMemory`, with the two passes that train it (`patchkern.batch.memory_layout`) and what makes a
memory of a history. A user's state is small and plain, so that anything may keep it::

    memories = memory.compress(histories)             # a Memories: vectors (M, D), and items absorbed, of each user
    memories = memory.compress(longer, memories)      # absorbs what is new alone; nothing where no segment became full
    vectors, absorbed = memories[0]                   # (C, D), or (n C, D) with mode="append", and an int
    memories = pk.Memories.of([(vectors, absorbed)])
    memory.recommend(longer)                          # computes the memories of its users on the way
"""

from __future__ import annotations

import os
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from patchkern.batch.arguments import check_count
from patchkern.batch.catalog import Catalog
from patchkern.batch.histories import Histories, HistoriesLike
from patchkern.batch.layout import PatchLayout
from patchkern.batch.memory_layout import MemoryBatch, MemoryPlanner, memory_row_counts
from patchkern.batch.policy_kinds import AnyPolicy
from patchkern.batch.preference_memory import PreferenceMemory
from patchkern.budget.batch_rows import ABSORBED_ROWS
from patchkern.budget.search import SearchSize, parse_bytes
from patchkern.models import files, wrapped
from patchkern.models.item_model import ItemModel
from patchkern.models.memories import Memories, Writer, check_memories
from patchkern.models.memory_loss import MemoryMap, MemoryOptions, MemoryOutput, distance, share
from patchkern.models.memory_wrapper import MemoryWrapper
from patchkern.models.patched_lm import PatchedCausalLM
from patchkern.models.saved_lm import open_saved
from patchkern.search.search_cost import search_cost


class RecurrentMemory(MemoryWrapper):
    """A model that reads ``prompt | memory | recent items``, and makes the memory.

    It trains with `patchkern.training.PatchTrainer`, is validated, recommends and is saved as the model that it wraps;
    where it recommends, memories are computed on the way, as `compress` does.

    Args:
        model: its policy a `PreferenceMemory`, its prompt with a token for every slot (`Prompt.with_special`).
        consistency: weight of the squared difference between a segment's updated memory and its reference.
        reduction: of that, over a memory's numbers: "mean", or "sum", which is slots * width times as much.
        detach_memory: keep the next items' loss from the references that memories are made of.
        detach_reference: the reference is a constant in the consistency loss; else it may come to meet the update.
        reference_loss: weight of the next items' loss in the reference pass, where whole histories are read.
        rollout: how often, as a share of the passes, memories are the model's own updates instead of references, as
            they are when it recommends; below 1.
        one_time: make memories in one pass over all items, as references are, and not segment by segment; an attribute,
            which may be set anew.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came; among them options with which
            nothing would train what a memory says.

    Examples:
        >>> import patchkern as pk
        >>> catalog = pk.Catalog.from_token_ids(range(4), range(5))
        >>> prompt = pk.Prompt(prefix=[4]).with_special(experts=[5, 6])
        >>> policy = pk.PreferenceMemory(pk.ItemPatches(keep_text=0, max_items=None), slots=2, block=3)
        >>> memory = pk.RecurrentMemory(pk.ItemModel(catalog, policy, prompt=prompt, width=16))
        >>> histories = pk.Histories.from_sequences([[0, 1, 2, 3, 0, 1, 2, 3], [3, 1]])
        >>> batch = memory.planner.training(histories, [[1, 7], [1, 1]], head="items")
        >>> memory(batch).loss.backward()
        >>> memory.compress(histories).absorbed.tolist()
        [6, 0]
        >>> [len(items) for items in memory.recommend(histories, k=2)]
        [2, 2]
    """

    def __init__(
        self,
        model: PatchedCausalLM | ItemModel,
        *,
        consistency: float = 1.0,
        reduction: str = "mean",
        detach_memory: bool = False,
        detach_reference: bool = True,
        reference_loss: float = 0.0,
        rollout: float = 0.0,
        one_time: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(model, (PatchedCausalLM, ItemModel)):
            raise TypeError(f"model: expected a PatchedCausalLM or an ItemModel, got {type(model).__name__}")
        if not isinstance(model.policy, PreferenceMemory):
            raise ValueError(
                f"model: expected one whose policy is a PreferenceMemory, got {type(model.policy).__name__}"
            )
        options = MemoryOptions(
            consistency, reduction, detach_memory, detach_reference, reference_loss, rollout, one_time
        )
        options.check_model(model.policy, model.item_head)
        self.model = model
        self.consistency, self.reduction = options.consistency, reduction
        self.detach_memory, self.detach_reference = detach_memory, detach_reference
        self.reference_loss, self.rollout, self.one_time = options.reference_loss, options.rollout, one_time
        self.map: MemoryMap | None = None
        if self.placed:
            embedding: Any = model.hf_model.get_input_embeddings()
            self.map = MemoryMap(embedding.weight)
        self.planner.policy.check_prompt(self.prompt)

    @property
    def options(self) -> dict[str, Any]:
        """The arguments that it was made with, by name."""
        return {field.name: getattr(self, field.name) for field in fields(MemoryOptions)}

    # ------------------------------------------------------------------ training

    @wrapped.undisturbed
    def forward(
        self,
        layout: MemoryBatch | PatchLayout,
        num_items_in_batch: Tensor | int | None = None,
        labels: Tensor | None = None,
        smoothing: float = 0.0,
        title_weight: float = 1.0,
        item_weight: float = 1.0,
        vectors: Tensor | None = None,
    ) -> Any:
        """The loss of a pass over both stages; or what the model makes of prompts with the memories that are given.

        Args:
            layout: of `planner.training <patchkern.batch.memory_layout.MemoryPlanner.training>`, or prompts, of
                `build_layout`.
            num_items_in_batch: as of the model; where a step has several passes, the consistency of each counts as its
                targets do.
            labels, smoothing, title_weight, item_weight: as of the model.
            vectors: ``(M, D)`` the memories of the prompts, see `compress`.

        Returns:
            A `MemoryOutput` for a `MemoryBatch`, else what the model returns.
        """
        options: dict[str, Any] = {"smoothing": smoothing, "title_weight": title_weight, "item_weight": item_weight}
        if isinstance(layout, PatchLayout):
            return self.model(self._unplaced(layout), num_items_in_batch, vectors=vectors, **options)
        if not isinstance(layout, MemoryBatch):
            raise TypeError(f"layout: expected a MemoryBatch or a PatchLayout, got {type(layout).__name__}")
        batch = layout.to(self.device, non_blocking=True)
        counts = wrapped.counts(batch.stage2, num_items_in_batch)
        references, of_reference = self._references(batch, counts.items, options)
        memories = references.detach() if self.detach_memory else references
        if self.rollout and self.training and float(torch.rand((), device="cpu")) < self.rollout:
            memories = self._rolled_out(batch, references.detach())
        with wrapped.hidden_states(self.hf_model) as states:
            next_item = self.model(
                batch.stage2, num_items_in_batch, vectors=self._memory_rows(batch, memories), **options
            ).loss
        if not states:  # no target, no pass
            return MemoryOutput(loss=next_item, next_item=next_item)
        target = references.detach() if self.detach_reference else references
        consistency = distance(states[0][batch.updates], target[batch.updated], self.reduction)
        total = next_item + self.consistency * share(batch.stage2, counts) * consistency
        if of_reference is not None:
            total = total + self.reference_loss * of_reference
        return MemoryOutput(loss=total, next_item=next_item, consistency=consistency, reference=of_reference)

    def _references(
        self, batch: MemoryBatch, num_items: Tensor | int | None, options: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """``(G, C, D)`` the states of stage 1's query rows, and the loss of its items."""
        if batch.stage1.item_labels is None:
            return self.model.row_states(batch.stage1)[batch.queries], None
        with wrapped.hidden_states(self.hf_model) as states:
            loss = self.model(batch.stage1, num_items, **options).loss
        if not states:
            return self.model.row_states(batch.stage1)[batch.queries], loss
        return states[0][batch.queries], loss

    def _memory_rows(self, batch: MemoryBatch, memories: Tensor) -> Tensor:
        """``(M, D)`` stage 2's memory rows, of ``(G, C, D)``."""
        return self._read(memories.flatten(0, 1)[batch.memories])

    def _rolled_out(self, batch: MemoryBatch, references: Tensor) -> Tensor:
        """The model's own updates in the places of references; where there is no update, the reference."""
        with torch.no_grad():
            states = self.model.row_states(batch.stage2, self._memory_rows(batch, references))
            return references.index_copy(0, batch.updated, states[batch.updates].to(references.dtype))

    def _read(self, states: Tensor) -> Tensor:
        """g."""
        return states if self.map is None else self.map(states)

    # ------------------------------------------------------------------ memories

    @property
    def planner(self) -> MemoryPlanner:
        """Plans the passes of this model."""
        return self.planner_of(self.policy)

    def planner_of(self, policy: AnyPolicy | None) -> MemoryPlanner:
        """Plans the passes of another `PreferenceMemory`."""
        return MemoryPlanner(self.catalog, policy, self.prompt, self.placed)  # type: ignore[arg-type]

    def compress(
        self,
        histories: HistoriesLike,
        memories: Memories | None = None,
        policy: PreferenceMemory | None = None,
        *,
        one_time: bool | None = None,
        rows_per_pass: int = ABSORBED_ROWS,
        memory_budget: int | str | None = None,
    ) -> Memories:
        """The memories of users, as far as whole segments were followed by another item.

        Args:
            histories: B users' items, oldest first and from the first on.
            memories: of the same users earlier, from which it goes on; None: from nothing.
            policy: the model's own where not given.
            one_time: in one pass over all items; the model's own choice where not given. ``memories`` are not used.
            rows_per_pass: of users computed together; a user alone may have more.
            memory_budget: bytes, or a text such as "40GiB", for everything that torch allocates, weights and memories
                included: fewer users are computed together where need be.

        Raises:
            ValueError: ``memories`` of another number of users, or that hold more items than a history has; a user who
                needs more than the budget, with what would be needed.
        """
        planner = self.planner_of(self.policy if policy is None else policy)
        histories = Histories.coerce(histories)
        check_count("rows_per_pass", rows_per_pass, minimum=1)
        wanted = planner.policy.absorbed(histories.lengths)
        nothing = torch.zeros(0, self.width, dtype=self.dtype, device=self.device)
        kept, absorbed = [nothing] * len(histories), np.zeros_like(wanted)
        once = self.one_time if one_time is None else one_time
        if not isinstance(once, bool):
            raise TypeError(f"one_time: expected a bool or None, got {type(once).__name__}")
        if memories is not None and not once:
            check_memories(memories, planner.policy, wanted, self.width)
            kept = list(memories.vectors.to(self.device, self.dtype).split(memories.rows.tolist()))
            absorbed = memories.absorbed.copy()
        if memory_budget is not None:
            rows = memory_row_counts(self.catalog, histories, planner.policy, self.prompt, one_time=once)
            rows = rows._replace(absorbed=np.where(absorbed < wanted, rows.absorbed, 0))
            cost = search_cost(self, SearchSize(1, 1, user_logits=0))
            rows_per_pass = cost.rows_absorbed(rows, parse_bytes("memory_budget", memory_budget), rows_per_pass)
        searching = self.searching()
        try:
            with searching:
                writer = Writer(self.model, planner, self._read, rows_per_pass)
                if once:
                    writer.once(histories, wanted, kept)
                while not once and (behind := np.flatnonzero(absorbed < wanted)).size:
                    writer.absorb(histories, behind, absorbed, kept)
        finally:
            searching.close()
        vectors = torch.cat(kept) if kept else nothing
        return Memories(vectors, np.array([own.shape[0] for own in kept], np.int64), wanted)

    def prompt_vectors(self, histories: Histories, policy: AnyPolicy, rows_per_pass: int | None = None) -> Tensor:
        """``(M, D)`` the memories that the prompts of these users read, user by user; see `compress`.

        Of users whose memories are of the same items, as of one user's prompts at several times, one is computed.
        """
        absorbed = self.planner_of(policy).policy.absorbed(histories.lengths)
        pasts = [items[:count].tobytes() for items, count in zip(histories, absorbed, strict=True)]
        first = {past: user for user, past in reversed(list(enumerate(pasts)))}
        chosen = sorted(first.values())
        most = ABSORBED_ROWS if rows_per_pass is None else rows_per_pass
        found = self.compress(histories.take(chosen), policy=policy, rows_per_pass=most)  # type: ignore[arg-type]
        own = dict(zip(chosen, found.vectors.split(found.rows.tolist()), strict=True))
        return torch.cat([own[first[past]] for past in pasts]) if pasts else found.vectors

    @property
    def width(self) -> int:
        """D, of a memory's vectors."""
        return int(self._text_config.hidden_size)

    # ------------------------------------------------------------------ files

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        state_dict: dict[str, Tensor] | None = None,
        is_main_process: bool = True,
        tokenizer: Any = None,
        **hf_kwargs: Any,
    ) -> None:
        """Write the model as it writes itself, with the memory's options and its map beside it.

        Args:
            state_dict: of this module, gathered.
            folder, is_main_process, tokenizer, hf_kwargs: as of the model.
        """
        own = self.state_dict() if state_dict is None else state_dict
        kept = {name.removeprefix("map."): value for name, value in own.items() if name.startswith("map.")}
        inner = None
        if state_dict is not None:
            inner = {name.removeprefix("model."): x for name, x in state_dict.items() if name.startswith("model.")}
        self.model._save(folder, inner, is_main_process, tokenizer, hf_kwargs, files.Memory(self.options, kept))

    @classmethod
    def from_pretrained(
        cls, folder: str | os.PathLike[str], catalog: Catalog | None = None, **options: Any
    ) -> RecurrentMemory:
        """Read what `save_pretrained` wrote.

        Args:
            folder, catalog: as of the `from_pretrained` of the model that it wraps.
            options: their other arguments.

        Raises:
            FileNotFoundError, ValueError: as those, and for a folder without a memory.
        """
        folder, description = open_saved(folder, options)
        if description.memory is None:
            raise ValueError(f"folder: expected a RecurrentMemory in {os.fspath(folder)!r}, got a model without memory")
        kind: Any = PatchedCausalLM if "titles" in description.learns else ItemModel
        model = kind.from_pretrained(folder, catalog, **options)
        try:
            memory = cls(model, **description.memory)
        except TypeError as error:
            raise ValueError(
                f"{os.fspath(folder)}: not a memory that this version of patchkern reads: {error}"
            ) from error
        memory.load_map(folder)
        return memory

    def load_map(self, folder: str | os.PathLike[str]) -> None:
        """Take the map that `save_pretrained` wrote, where the model has one.

        Raises:
            FileNotFoundError, ValueError: there is none, or one of another width.
        """
        if self.map is not None:
            shapes = {name: tuple(value.shape) for name, value in self.map.named_parameters()}
            self.map.load_state_dict(files.read_memory(files.current(folder), shapes))
