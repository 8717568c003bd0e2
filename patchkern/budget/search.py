# SPDX-License-Identifier: Apache-2.0
"""How much memory a search needs, and how many users at once fit into a budget.

The peak of a batch of B users with T prompt rows, the longest with L, in which no step has more than N hypotheses::

    peak = weights + max(store + max(prefill, decode + logits), absorbing)

- ``weights``: parameters and buffers.
- ``store``: keys and values, ``2 * layers * kv_heads * head_dim`` numbers a row in a Llama, of T prompt rows; the items
  that each user may get; the tree of titles; on CUDA the workspace of cuBLAS.
- ``prefill``: computing the prompts, c = `chunk_rows` at a time: ``c * forward``, where ``forward`` is what one row
  holds at the worst moment of a layer. In a Llama that is in the MLP: four vectors of the hidden size (the embedding,
  the residual stream, its normalised copy and the sum), three of the intermediate size, and sine and cosine. It is not
  written down per architecture but counted, in a pass of the very model on the meta device, which takes no memory and
  next to no time; attention, which runs no operators there, adds its own workspace.
- ``decode``: where items are scored, their vectors as they are made, and what is made of their scores. Else keys and
  values of the tokens that the hypotheses stand on, and the same as before for one more token of
  N hypotheses; or their logits, and the log-probabilities of those that are looked at together, in float32.
- ``logits``: ``B * vocabulary`` numbers in float32, those of the prompts; as many more for diversity's counts and for
  scores of whole trees; none where items are scored.
- ``absorbing``: of users behind a `PreferenceMemory`, the passes that write their memories, before anything of the
  prompts is there: ``a * forward`` for a rows at once, ``chunk_rows`` unless a segment has more, or, with ``one_time``,
  all items of a user; twice the vectors of all users; and what `store` holds beside keys and values. `store` and
  `prefill` have these vectors too.

How many tokens the hypotheses hold depends on the search; the tree of titles bounds it, and the bound is predicted.
Where titles are long, prompts short and the vocabulary small, that can be a third more than is taken; else a few
hundredths.

All of it is what `torch` allocates (``torch.cuda.max_memory_allocated``). What a CUDA context takes, about half a
gibibyte, and what the allocator loses to fragmentation come on top.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from patchkern.batch.memory_layout import MemoryRowCounts
from patchkern.budget.batch_rows import Absorbed, BatchRows, OrderedRows, taken
from patchkern.budget.counted_pass import (
    AttentionShape,
    check_weights_dtype,
    count_pass,
    on_meta,
    place_of,
    without_memory,
)
from patchkern.budget.search_plan import MicroBatch, SearchBytes, SearchPlan
from patchkern.ops import native
from patchkern.ops.span_attention_native import forward_scratch

CHUNKS = (16384, 8192, 4096, 2048, 1024, 512, 256)
"""Rows of a prefill chunk that are considered. Beyond the first, larger chunks are no faster."""
_USUAL_CHUNK = 2048  # smaller ones are slow: only to make room for a user who would not fit otherwise

LOG_PROBS_AT_ONCE = 1 << 24
"""Log-probabilities over the vocabulary that a search has at once, of all tokens that it fed: those of the choices are
kept of them."""

_CUBLAS_WORKSPACE = 32 << 20  # what PyTorch gives to cuBLAS on Hopper, from the memory that it counts; less before
_ROW_INTEGERS = 32  # bytes of a row of the layout and of where it belongs
_TILE_ROWS, _TILE_SCORES = 128, 1 << 18  # of `patchkern.ops.span_attention_tiles`

_NOTHING = Absorbed()

_DECIMAL = {f"{prefix}B": 1000**power for power, prefix in enumerate("kMGT", 1)}
_UNITS = {"B": 1, **_DECIMAL, **{f"{prefix}iB": 1024**power for power, prefix in enumerate("KMGT", 1)}}


def parse_bytes(name: str, value: int | str) -> int:
    """A number of bytes, or a text such as "40GiB", "512 MiB" or "40GB".

    Raises:
        TypeError, ValueError: naming the argument.
    """
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", value)
        if match is None or match[2] not in _UNITS:
            raise ValueError(f'{name}: expected bytes, such as "40GiB", "512MiB" or "40000000000B", got {value!r}')
        value = int(float(match[1]) * _UNITS[match[2]])
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name}: expected an integer or a text, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")
    return int(value)


class UserTooLarge(ValueError):
    """One user alone needs more than the budget.

    Attributes:
        user: its number.
        needed: bytes for this user.
        max_rows: what a prompt may have to fit; or the pass before it, where that is too large.
        absorbing: whether it is too large to be absorbed, in the pass that writes its memory.
    """

    def __init__(self, message: str, user: int, needed: int, max_rows: int, absorbing: bool = False) -> None:
        super().__init__(message)
        self.user, self.needed, self.max_rows, self.absorbing = user, needed, max_rows, absorbing


class SearchSize(NamedTuple):
    """What a search asks of the memory."""

    width: int
    """rows of its widest step"""
    kept_rows: int
    """rows after the prompt whose keys and values it keeps at once, at most"""
    user_bytes: int = 0
    """of everything else that it holds per user"""
    fixed_bytes: int = 0
    """of everything that it holds whatever the number of users, such as the tree of titles"""
    user_logits: int = 2
    """rows of logits that it holds of each user; 0: it scores items, and takes no steps"""
    user_scores: int = 0
    """bytes per user that it holds while it scores items, behind the prompts"""
    fixed_scores: int = 0
    """bytes that it holds meanwhile, whatever the number of users"""
    made_vectors: int = 0
    """bytes that it holds while it makes the items' vectors, before it scores them"""


class SearchCost:
    """The formula of this module, for one model and one kind of search.

    Args:
        model: a transformers model or its configuration, or what has one as its ``hf_model``, such as a
            `PatchedCausalLM`.
        size: of the search.
        dtype: of the weights; a configuration's own where not given.
        device: where the search runs, the model's where not given; "cpu" for a configuration.

    Raises:
        TypeError, ValueError: a model whose forward pass cannot be followed on the meta device.
    """

    def __init__(
        self,
        model: Any,
        size: SearchSize,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self._size = size
        hf_model: Any = getattr(model, "hf_model", model)
        check_weights_dtype(dtype)
        self._on_cuda = place_of(model, device).type == "cuda"
        copied = without_memory(hf_model, dtype, on_meta).requires_grad_(False).eval()
        config = copied.config.get_text_config()
        tensors = {id(t): t.nbytes for t in (*copied.parameters(), *copied.buffers())}
        self.weights = sum(tensors.values())
        if (item_embedding := getattr(model, "item_embedding", None)) is not None:
            self.weights += item_embedding.nbytes
        if (item_head := getattr(model, "item_head", None)) is not None:
            self.weights += sum(parameter.nbytes for parameter in item_head.parameters())
        self._vocabulary = config.vocab_size
        self._item = torch.finfo(copied.dtype).bits // 8
        self._wide = max(self._item, 4)
        self._prompt = count_pass(copied, packed=True)
        self._step = count_pass(copied, packed=False)
        self._attentions = set(self._prompt.attentions)
        self._layer_bytes = max(one.stored for one in self._attentions) * self._item
        self.row_bytes = sum(one.stored for one in self._prompt.attentions) * self._item
        """keys and values of one row"""
        self._vector = config.hidden_size * self._item

    def needed(
        self,
        n_users: int,
        n_rows: int,
        longest: int,
        chunk_rows: int | None = None,
        absorbed: Absorbed = _NOTHING,
    ) -> SearchBytes:
        """Of a batch of ``n_users`` with ``n_rows`` rows in all, ``longest`` of one user."""
        size = self._size
        width, kept_rows, user_logits = size.width, size.kept_rows, size.user_logits
        hypotheses, suffix_rows = n_users * width, n_users * kept_rows
        held = n_users * size.user_bytes + size.fixed_bytes + (_CUBLAS_WORKSPACE if self._on_cuda else 0)
        held += absorbed.vectors * self._vector
        store = self.row_bytes * n_rows + held
        absorbing = held + self._absorbing(absorbed) if absorbed.rows else 0
        rows = n_rows if chunk_rows is None else min(chunk_rows, n_rows)
        has_prefix = rows < n_rows
        logits = self._vocabulary * self._wide
        last = self._vocabulary * self._item + (logits if self._item < self._wide else 0)
        prefill = max(
            rows * self._prompt.peak,
            rows * self._prompt.at_attention + self._prefill_attention(rows, longest, has_prefix),
            rows * self._prompt.at_attention + (n_users * last if user_logits else 0),
        )
        prefill += rows * _ROW_INTEGERS + absorbed.vectors * self._vector
        if not user_logits:
            scores = max(n_users * size.user_scores + size.fixed_scores, size.made_vectors)
            scores += n_users * (self._vector + _ROW_INTEGERS)
            return SearchBytes(self.weights, store, prefill, scores, 0, absorbing)
        if has_prefix:  # the logits of the users whose prompts ended in earlier chunks
            prefill += n_users * logits
        at_once = min(hypotheses, max(LOG_PROBS_AT_ONCE // self._vocabulary, width))
        in_step = max(
            hypotheses * self._step.peak,
            hypotheses * (self._step.at_attention + self._step_attention()),
            hypotheses * self._vocabulary * self._item + at_once * (last - self._vocabulary * self._item + logits),
        )
        # the pool of suffixes grows layer by layer, and only in one layer stand its old and new rows side by side
        decode = in_step + (self.row_bytes + self._layer_bytes) * suffix_rows
        return SearchBytes(self.weights, store, prefill, decode, user_logits * n_users * logits, absorbing)

    def _absorbing(self, absorbed: Absorbed) -> int:
        """A pass without a search's store, beside the vectors that it reads, joined from those that are kept."""
        rows = absorbed.rows
        attention = self._prefill_attention(rows, rows, absorbed.one_time)
        pass_bytes = max(rows * self._prompt.peak, rows * self._prompt.at_attention + attention)
        return pass_bytes + rows * _ROW_INTEGERS + absorbed.vectors * self._vector

    def plan(
        self,
        row_counts: NDArray[np.int64] | MemoryRowCounts,
        budget: int | None,
        batch_size: int | None = None,
        aside: NDArray[np.int64] | None = None,
    ) -> SearchPlan:
        """Cut users into batches; see `plan_memory`, whose ``compressed`` is ``aside``.

        Each batch takes the chunk that lets most users in, of those the largest; chunks too small to be fast are only
        for users who would not fit otherwise.

        Raises:
            UserTooLarge: a user who does not fit alone.
        """
        read = row_counts.read if isinstance(row_counts, MemoryRowCounts) else row_counts
        order = np.argsort(-read, kind="stable")
        batches = []
        start = 0
        while start < order.size:
            most = order.size if batch_size is None else min(start + batch_size, order.size)
            users = order[start:most]
            rows = OrderedRows(taken(row_counts, users), None if aside is None else aside[users])
            count, chunk = most - start, None
            if budget is not None:
                count, chunk = self._most_users(rows, budget)
                if count == 0:
                    raise self._too_large(int(order[start]), rows.first(1, CHUNKS[-1]), budget)
            batches.append(MicroBatch(order[start : start + count], chunk, self._of(rows.first(count, chunk), chunk)))
            start += count
        return SearchPlan(tuple(batches), budget)

    def _of(self, rows: BatchRows, chunk_rows: int | None) -> SearchBytes:
        """`needed` of a batch."""
        return self.needed(rows.users, rows.stored, rows.longest, chunk_rows, rows.absorbed)

    def _most_users(self, rows: OrderedRows, budget: int) -> tuple[int, int | None]:
        """How many of the first users fit together, and in which chunks."""
        best: tuple[int, int | None] = (0, None)
        for chunk in CHUNKS:
            if best[0] == rows.num_users or (best[0] and chunk < _USUAL_CHUNK):
                break

            def peak(count: int, chunk: int = chunk) -> int:
                return self._of(rows.first(count, chunk), chunk).peak

            count = bisect_right(range(1, rows.num_users + 1), budget, key=peak)
            if count > best[0]:
                best = count, chunk if rows.is_cut(count, chunk) else None
        return best

    def max_rows(self, budget: int, vectors: int = 0) -> int:
        """Rows of the longest prompt that fits, alone, so many of them a memory's vectors; 0: none."""
        memory = Absorbed(0, vectors)
        return bisect_right(
            range(1, 2**31), budget, key=lambda rows: self.needed(1, rows, rows, CHUNKS[-1], memory).peak
        )

    def rows_absorbed(self, rows: MemoryRowCounts, budget: int, most: int) -> int:
        """How many rows to absorb together, at most ``most``, where all users' memories are made and nothing is read.

        Raises:
            UserTooLarge: as `plan`.
        """
        vectors, total = int(rows.vectors.sum()), int(rows.absorbed.sum())
        largest = int(rows.absorbed.max(initial=0))

        def absorbed(count: int) -> Absorbed:
            return Absorbed(max(min(count, total), largest), vectors, rows.one_time)

        def peak(count: int) -> int:
            needed = self.needed(1, 1, 1, 1, absorbed(count))
            return needed.weights + needed.absorbing

        fitting = bisect_right(range(1, most + 1), budget, key=peak)
        if fitting == 0:
            raise self._too_large_to_absorb(int(rows.absorbed.argmax()), absorbed(1), peak(1), budget)
        return fitting

    def _too_large(self, user: int, rows: BatchRows, budget: int) -> UserTooLarge:
        needed = self._of(rows, CHUNKS[-1])
        if needed.absorbing and needed.weights + needed.absorbing > budget:
            return self._too_large_to_absorb(user, rows.absorbed, needed.weights + needed.absorbing, budget)
        max_rows = self.max_rows(budget, rows.absorbed.vectors)
        return UserTooLarge(
            f"memory_budget: expected at least {needed.peak} bytes for {self._size.width} beams of user {user}, whose "
            f"prompt has {rows.longest} rows, got {budget}, enough for {max_rows} rows",
            user,
            needed.peak,
            max_rows,
        )

    def _too_large_to_absorb(self, user: int, absorbed: Absorbed, needed: int, budget: int) -> UserTooLarge:
        def peak(rows: int) -> int:
            return self.needed(1, 1, 1, 1, absorbed._replace(rows=rows)).absorbing

        max_rows = bisect_right(range(1, absorbed.rows), budget - self.weights, key=peak)
        items, instead = "a segment of items", "a memory of smaller segments (block) takes less"
        if absorbed.one_time:
            items, instead = "all old items at once (one_time)", "one_time=False takes them segment by segment"
        return UserTooLarge(
            f"memory_budget: expected at least {needed} bytes for the memory of user {user}, which reads {items} in "
            f"{absorbed.rows} rows, got {budget}, enough for {max_rows} rows; {instead}",
            user,
            needed,
            max_rows,
            absorbing=True,
        )

    def _prefill_attention(self, rows: int, longest: int, has_prefix: bool) -> int:
        """Output and sums of all rows, and on the CPU what the native kernels hold, or else the tiles."""

        def of(one: AttentionShape) -> int:
            query = one.heads * one.key_width
            needed = rows * one.heads * ((one.key_width + one.value_width) * self._item + self._wide)
            if self._on_cuda:
                return needed
            if native.unusable_reason() is None:
                return needed + torch.get_num_threads() * forward_scratch(one.group, one.width, self._wide)
            if has_prefix:
                needed += 4 * (min(_TILE_ROWS, rows) * query + _TILE_SCORES) * self._wide
                if self._item < self._wide:
                    needed += longest * one.stored * self._wide
            return needed

        return max(map(of, self._attentions))

    def _step_attention(self) -> int:
        """Per hypothesis: its query and output in several forms, and the keys and values of its own tokens."""
        own_rows = self._size.kept_rows // self._size.width

        def of(one: AttentionShape) -> int:
            gathered = own_rows * (one.stored * self._item + one.heads * self._wide)
            return one.heads * one.width * (3 * self._item + 4 * self._wide) + gathered

        return max(map(of, self._attentions))
