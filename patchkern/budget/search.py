# SPDX-License-Identifier: Apache-2.0
"""How much memory a search needs, and how many users at once fit into a budget.

The peak of a batch of B users with T prompt rows, the longest with L, in which no step has more than N hypotheses::

    peak = weights + store + max(prefill, decode + logits)

- ``weights``: parameters and buffers.
- ``store``: keys and values, ``2 * layers * kv_heads * head_dim`` numbers a row, of T prompt rows; the items that each
  user may get; the tree of titles; on CUDA the workspace of cuBLAS.
- ``prefill``: computing the prompts, c = `chunk_rows` at a time: ``c * forward``, where ``forward`` is what one row
  holds at the worst moment of a layer. In a Llama that is in the MLP: four vectors of the hidden size (the embedding,
  the residual stream, its normalised copy and the sum), three of the intermediate size, and sine and cosine. It is not
  written down per architecture but counted, in a pass of the very model on the meta device, which takes no memory and
  next to no time; attention, which runs no operators there, adds its own workspace.
- ``decode``: keys and values of the tokens that the hypotheses stand on, and the same as before for one more token of
  N hypotheses; or their logits, and the log-probabilities of those that are looked at together, in float32.
- ``logits``: ``B * vocabulary`` numbers in float32, those of the prompts; as many more for diversity's counts and for
  scores of whole trees; none where items are scored.

How many tokens the hypotheses hold depends on the search; the tree of titles bounds it, and the bound is predicted.
Where titles are long, prompts short and the vocabulary small, that can be a third more than is taken; else a few
hundredths.

All of it is what `torch` allocates (``torch.cuda.max_memory_allocated``). What a CUDA context takes, about half a
gibibyte, and what the allocator loses to fragmentation come on top.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PretrainedConfig

from patchkern.batch.policy_kinds import AnyPolicy
from patchkern.budget.counted_pass import count_pass, on_meta, without_memory
from patchkern.ops import native
from patchkern.ops.span_attention_native import forward_scratch

CHUNKS = (16384, 8192, 4096, 2048, 1024, 512, 256)
"""Rows of a prefill chunk that are considered. Beyond the first, larger chunks are no faster."""
_USUAL_CHUNK = 2048  # smaller ones are slow: only to make room for a user who would not fit otherwise

ASIDE_ROWS = 4096
"""Rows of old items whose keys and values stand beside a batch's prompts while experts are made of them; more where a
single user has more."""

LOG_PROBS_AT_ONCE = 1 << 24
"""Log-probabilities over the vocabulary that a search has at once, of all tokens that it fed: those of the choices are
kept of them."""

_CUBLAS_WORKSPACE = 32 << 20  # what PyTorch gives to cuBLAS on Hopper, from the memory that it counts; less before
_ROW_INTEGERS = 32  # bytes of a row of the layout and of where it belongs
_TILE_ROWS, _TILE_SCORES = 128, 1 << 18  # of `patchkern.ops.span_attention_tiles`

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
            raise ValueError(f'{name}: expected bytes, such as 40000000000, "40GiB", "512MiB" or "40GB", got {value!r}')
        value = int(float(match[1]) * _UNITS[match[2]])
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name}: expected an integer or a text, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")
    return int(value)


def in_units(count: int) -> str:
    """Bytes for people."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


class UserTooLarge(ValueError):
    """One user alone needs more than the budget.

    Attributes:
        user: its number.
        needed: bytes for this user.
        max_rows: what a prompt may have to fit.
    """

    def __init__(self, message: str, user: int, needed: int, max_rows: int) -> None:
        super().__init__(message)
        self.user, self.needed, self.max_rows = user, needed, max_rows


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


@dataclass(frozen=True)
class SearchBytes:
    """Predicted bytes of one batch, see this module."""

    weights: int
    store: int
    prefill: int
    decode: int
    logits: int

    @property
    def peak(self) -> int:
        """The most that is allocated at once."""
        return self.weights + self.store + max(self.prefill, self.decode + self.logits)


@dataclass(frozen=True)
class MicroBatch:
    """Users to compute together.

    Attributes:
        users: ``(n,)`` their numbers.
        chunk_rows: rows of their prompts to compute at once; None for all.
        needed: predicted bytes.
    """

    users: NDArray[np.int64]
    chunk_rows: int | None
    needed: SearchBytes

    def __repr__(self) -> str:
        chunks = "" if self.chunk_rows is None else f" in chunks of {self.chunk_rows:,} rows"
        return f"MicroBatch({self.users.size:,} users{chunks}, peak {in_units(self.needed.peak)})"


@dataclass(frozen=True)
class SearchPlan:
    """How to stay within a budget.

    Attributes:
        batches: every user in one of them, users of about equal length together, the longest first.
        budget: bytes; None: no limit.
        policy: the one chosen, where several were given.
    """

    batches: tuple[MicroBatch, ...]
    budget: int | None
    policy: AnyPolicy | None = None

    def __repr__(self) -> str:
        facts = [f"{len(self.batches):,} batches of up to {self.users_per_batch:,} users"]
        facts.append(f"peak {in_units(self.peak)}")
        facts.append("no budget" if self.budget is None else f"budget {in_units(self.budget)}")
        return f"SearchPlan({', '.join(facts if self.policy is None else [*facts, repr(self.policy)])})"

    @property
    def users_per_batch(self) -> int:
        """Users of the largest batch."""
        return max((batch.users.size for batch in self.batches), default=0)

    @property
    def chunk_rows(self) -> int | None:
        """The smallest chunk of any batch; None where none is cut."""
        return min((batch.chunk_rows for batch in self.batches if batch.chunk_rows is not None), default=None)

    @property
    def needed(self) -> SearchBytes:
        """Predicted bytes of the batch with the highest peak."""
        nothing = SearchBytes(0, 0, 0, 0, 0)
        return max((batch.needed for batch in self.batches), key=lambda needed: needed.peak, default=nothing)

    @property
    def peak(self) -> int:
        """The most that is allocated at once, in bytes."""
        return self.needed.peak


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
        place = device or ("cpu" if isinstance(hf_model, PretrainedConfig) else hf_model.device)
        self._on_cuda = torch.device(place).type == "cuda"
        copied = without_memory(hf_model, dtype, on_meta).requires_grad_(False).eval()
        config = copied.config.get_text_config()
        tensors = {id(t): t.nbytes for t in (*copied.parameters(), *copied.buffers())}
        item_embedding = getattr(model, "item_embedding", None)
        self.weights = sum(tensors.values()) + (0 if item_embedding is None else item_embedding.nbytes)
        self._heads = config.num_attention_heads
        self._kv_heads = getattr(config, "num_key_value_heads", None) or self._heads
        self._head_dim = getattr(config, "head_dim", None) or config.hidden_size // self._heads
        self._layers = config.num_hidden_layers
        self._vocabulary = config.vocab_size
        self._item = torch.finfo(copied.dtype).bits // 8
        self._wide = max(self._item, 4)
        self._prompt = count_pass(copied, packed=True)
        self._step = count_pass(copied, packed=False)
        self.row_bytes = 2 * self._layers * self._kv_heads * self._head_dim * self._item
        """keys and values of one row"""

    def needed(self, n_users: int, n_rows: int, longest: int, chunk_rows: int | None = None) -> SearchBytes:
        """Of a batch of ``n_users`` with ``n_rows`` rows in all, ``longest`` of one user."""
        width, kept_rows, user_bytes, fixed_bytes, user_logits = self._size
        hypotheses, suffix_rows = n_users * width, n_users * kept_rows
        one_layer = self.row_bytes // self._layers
        store = self.row_bytes * n_rows + n_users * user_bytes + fixed_bytes
        if self._on_cuda:
            store += _CUBLAS_WORKSPACE
        rows = n_rows if chunk_rows is None else min(chunk_rows, n_rows)
        has_prefix = rows < n_rows
        logits = self._vocabulary * self._wide
        last = self._vocabulary * self._item + (logits if self._item < self._wide else 0)
        prefill = max(
            rows * self._prompt.peak,
            rows * self._prompt.at_attention + self._prefill_attention(rows, longest, has_prefix),
            rows * self._prompt.at_attention + (n_users * last if user_logits else 0),
        )
        prefill += rows * _ROW_INTEGERS
        if not user_logits:
            return SearchBytes(self.weights, store, prefill, 0, 0)
        if has_prefix:  # the logits of the users whose prompts ended in earlier chunks
            prefill += n_users * logits
        at_once = min(hypotheses, max(LOG_PROBS_AT_ONCE // self._vocabulary, width))
        in_step = max(
            hypotheses * self._step.peak,
            hypotheses * (self._step.at_attention + self._step_attention()),
            hypotheses * self._vocabulary * self._item + at_once * (last - self._vocabulary * self._item + logits),
        )
        # the pool of suffixes grows layer by layer, and only in one layer stand its old and new rows side by side
        decode = in_step + (self.row_bytes + one_layer) * suffix_rows
        return SearchBytes(self.weights, store, prefill, decode, user_logits * n_users * logits)

    def plan(
        self,
        row_counts: NDArray[np.int64],
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
        order = np.argsort(-row_counts, kind="stable")
        batches = []
        start = 0
        while start < order.size:
            most = order.size if batch_size is None else min(start + batch_size, order.size)
            users = order[start:most]
            ends = _stored_rows(row_counts[users], None if aside is None else aside[users])
            count, chunk = most - start, None
            if budget is not None:
                count, chunk = self._most_users(ends, budget)
                if count == 0:
                    raise self._too_large(int(order[start]), int(ends[1]), budget)
            batches.append(MicroBatch(order[start : start + count], chunk, self._of(ends, count, chunk)))
            start += count
        return SearchPlan(tuple(batches), budget)

    def _of(self, ends: NDArray[np.int64], count: int, chunk_rows: int | None) -> SearchBytes:
        """`needed` of the first users of those whose rows end there."""
        return self.needed(count, int(ends[count] - ends[0]), int(ends[1] - ends[0]), chunk_rows)

    def _most_users(self, ends: NDArray[np.int64], budget: int) -> tuple[int, int | None]:
        """How many of the first users fit together, and in which chunks."""
        best: tuple[int, int | None] = (0, None)
        for chunk in CHUNKS:
            if best[0] == ends.size - 1 or (best[0] and chunk < _USUAL_CHUNK):
                break
            peak = partial(self._peak, ends, chunk)
            count = bisect_right(range(1, ends.size), budget, key=peak)
            if count > best[0]:
                best = count, chunk if chunk < ends[count] - ends[0] else None
        return best

    def _peak(self, ends: NDArray[np.int64], chunk_rows: int, count: int) -> int:
        return self._of(ends, count, chunk_rows).peak

    def max_rows(self, budget: int) -> int:
        """Rows of the longest prompt that fits, alone; 0: none."""
        return bisect_right(range(1, 2**31), budget, key=lambda rows: self.needed(1, rows, rows, CHUNKS[-1]).peak)

    def _too_large(self, user: int, rows: int, budget: int) -> UserTooLarge:
        needed, max_rows = self.needed(1, rows, rows, CHUNKS[-1]).peak, self.max_rows(budget)
        return UserTooLarge(
            f"memory_budget: expected at least {needed} bytes for {self._size.width} beams of user {user}, whose "
            f"prompt has {rows} rows, got {budget}, enough for {max_rows} rows",
            user,
            needed,
            max_rows,
        )

    def _prefill_attention(self, rows: int, longest: int, has_prefix: bool) -> int:
        """Output and sums of all rows, and on the CPU what the native kernels hold, or else the tiles."""
        query = self._heads * self._head_dim
        needed = rows * (2 * query * self._item + self._heads * self._wide)
        if self._on_cuda:
            return needed
        if native.unusable_reason() is None:
            group = self._heads // self._kv_heads
            return needed + torch.get_num_threads() * forward_scratch(group, self._head_dim, self._wide)
        if has_prefix:
            needed += 4 * (min(_TILE_ROWS, rows) * query + _TILE_SCORES) * self._wide
            if self._item < self._wide:
                needed += 2 * longest * self._kv_heads * self._head_dim * self._wide
        return needed

    def _step_attention(self) -> int:
        """Per hypothesis: its query and output in several forms, and the keys and values of its own tokens."""
        query = self._heads * self._head_dim
        own_rows = self._size.kept_rows // self._size.width
        gathered = own_rows * (2 * self._kv_heads * self._head_dim * self._item + self._heads * self._wide)
        return query * (3 * self._item + 4 * self._wide) + gathered


def _stored_rows(row_counts: NDArray[np.int64], aside: NDArray[np.int64] | None) -> NDArray[np.int64]:
    """``(n + 1,)`` rows whose keys and values the first 0..n users have in memory at once."""
    rows = np.append(0, np.cumsum(row_counts))
    if aside is None:
        return rows
    largest = np.append(0, np.maximum.accumulate(aside))
    return rows + np.where(largest > 0, np.maximum(largest, np.minimum(rows, ASIDE_ROWS)), 0)
