# SPDX-License-Identifier: Apache-2.0
"""The layout: the integers that describe a packed batch, planned on the CPU without touching an embedding."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from patchkern.batch import planner
from patchkern.batch.layout_checks import aligned, check_layout, check_readable

Record = TypeVar("Record")


def _moved(record: Record, move: Callable[[Tensor], Tensor]) -> Record:
    """A dataclass with ``move`` applied to every tensor, nested dataclasses included."""
    moved = object.__new__(type(record))
    for name, value in vars(record).items():
        if isinstance(value, Tensor):
            value = move(value)
        elif isinstance(value, (Transpose, Identities, PatchLayout)):
            value = _moved(value, move)
        moved.__dict__[name] = value
    return moved


@dataclass(frozen=True, eq=False)
class Transpose:
    """The rows read backwards, for the gradient: which rows contribute to which token, and how much.

    Attributes:
        tokens: ``(U,)`` int32, the batch's distinct token ids, ascending.
        offsets: ``(U + 1,)`` int32, token ``u`` collects contributions ``offsets[u]..offsets[u + 1] - 1``.
        rows: ``(C,)`` int32, the contributing row.
        divisors: ``(C,)`` int32, the contribution's weight is ``1 / divisor``.
    """

    tokens: Tensor
    offsets: Tensor
    rows: Tensor
    divisors: Tensor

    def __repr__(self) -> str:
        return f"Transpose({self.tokens.shape[0]:,} tokens, {self.rows.shape[0]:,} contributions)"


@dataclass(frozen=True, eq=False)
class Identities:
    """A layout's patches with items in the place of tokens: which item embeddings each patch is the mean of.

    Attributes:
        rows: ``(P,)`` int64, the layout's rows that are patches, ascending.
        layout: those P rows, every title one token, the item's catalogue position: pooling it from ``(n_items, D)``
            item embeddings gives what is added to ``rows``.
    """

    rows: Tensor
    layout: PatchLayout

    def __repr__(self) -> str:
        return f"Identities({self.rows.shape[0]:,} patches)"


@dataclass(frozen=True, eq=False)
class PatchLayout:
    """A packed batch as integers. Self-contained: it carries the titles of its own pooled items and no others.

    Row ``t`` is the literal token ``-1 - lo[t]`` if ``lo[t] < 0``, else the mean over history entries
    ``items[lo[t]:hi[t]]`` of the mean embedding of each one's title. User ``b`` owns rows
    ``cu_seqlens[b]..cu_seqlens[b + 1] - 1``.

    Attributes:
        lo, hi: ``(T,)`` int32.
        items: ``(N,)`` int32, pooled history entries as indices into the batch's titles.
        token_ids: ``(nnz,)`` int32, and offsets: ``(n_titles + 1,)`` int32, the batch's titles in CSR form.
        title_index: ``(n_titles,)`` int32, catalogue position of each title.
        cu_seqlens: ``(B + 1,)`` int32.
        max_seqlen: rows of the longest user.
        position_ids: ``(T,)`` int64, 0, 1, 2, ... per user.
        labels: ``(T,)`` int64, the token id where it is supervised, -100 elsewhere; None without targets.
        logit_rows: ``(K,)`` int64, the rows whose next token is supervised, and logit_labels: ``(K,)`` int64, that
            token; None without targets.
        prefix: ``(S, 2)`` int32, for each span the rows ``start..end - 1`` it sees besides itself, none where they are
            equal, or ``(S, R, 2)``, R such ranges, which overlap neither each other nor the span; None when no span has
            a prefix, which makes every user one span. Where it is given, spans take the place of users in
            ``cu_seqlens``, ``max_seqlen`` and `num_users`.
        history_tokens: title tokens of the kept items.
        history_rows: rows that stand for them.
        max_token_id: the largest token id of any row, -1 if there is none.
        transpose: the gradient's side of the layout, or None.
        max_prefix: rows of the longest prefix, all of its ranges together.
        max_position: the largest of ``position_ids``, -1 without rows. Positions go on where rows were left out, so it
            may be more than the rows that any span sees.
        catalog_fingerprint: `Catalog.fingerprint` of the catalogue that ``title_index`` points into; None for a layout
            made by hand, which then cannot be pooled with an `ItemTable` or with item embeddings.
        identities: what a model with item embeddings adds to the patches, or None.
        item_rows: ``(M,)`` int64, the rows that an item head predicts the next item from, each the last of a history;
            None where the layout is for titles alone.
        item_labels: ``(M,)`` int64, catalogue positions of those items; None where they are not known.
        cu_users: ``(B + 1,)`` int32, where each user's rows begin, in a layout of B users with several spans each; None
            where spans are not users cut in pieces.
        vector_rows: ``(V,)`` int64, ascending, the rows that are no embeddings but vectors, which a model is given
            beside the layout, such as the memory of `patchkern.PreferenceMemory`; None without any.

    Raises:
        TypeError, ValueError: a field of a wrong type, dtype, shape or range; the message names it.
    """

    lo: Tensor
    hi: Tensor
    items: Tensor
    token_ids: Tensor
    offsets: Tensor
    title_index: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    position_ids: Tensor
    labels: Tensor | None
    logit_rows: Tensor | None
    logit_labels: Tensor | None
    history_tokens: int
    history_rows: int
    max_token_id: int
    prefix: Tensor | None = None
    transpose: Transpose | None = None
    max_prefix: int = 0
    max_position: int = -1
    catalog_fingerprint: str | None = None
    identities: Identities | None = None
    item_rows: Tensor | None = None
    item_labels: Tensor | None = None
    cu_users: Tensor | None = None
    vector_rows: Tensor | None = None

    def __post_init__(self) -> None:
        self.__dict__.update(vars(_moved(self, aligned)))
        self._check(exact=True)

    def __setstate__(self, state: Any) -> None:
        """A pickle may hold anything."""
        if not isinstance(state, dict):
            raise TypeError(f"layout: expected its fields in the pickle, got {type(state).__name__}")
        known = {field.name for field in fields(self)}
        unknown = list(state.keys() - known)
        if unknown:
            raise ValueError(f"layout: expected fields of a PatchLayout in the pickle, got {unknown}")
        self.__dict__.update(state)
        for name in known - state.keys():
            if not hasattr(self, name):
                raise ValueError(f"{name}: expected it in the pickle, got none")
        self._check(exact=False)

    def _check(self, exact: bool) -> None:
        nested: list[tuple[str, object, type]] = [
            ("transpose", self.transpose, Transpose),
            ("identities", self.identities, Identities),
        ]
        if isinstance(self.identities, Identities):
            nested.append(("identities.layout", self.identities.layout, PatchLayout))
        for name, value, kind in nested:
            if not (value is None or isinstance(value, kind)):
                article = "an" if kind is Identities else "a"
                raise TypeError(f"{name}: expected {article} {kind.__name__}, got {type(value).__name__}")
        check_layout(self, exact)

    @classmethod
    def _trusted(cls, values: dict[str, Any]) -> PatchLayout:
        """A layout of fields that are right by construction: the checks would cost as much as the planning."""
        layout = object.__new__(cls)
        layout.__dict__.update(values)
        return layout

    def __repr__(self) -> str:
        """Shapes and what is known without reading a tensor, which may be on a device."""
        facts = [f"{self.num_users:,} {'users' if self.prefix is None else 'spans'}", f"{self.num_rows:,} rows"]
        if self.cu_users is not None:
            facts.insert(0, f"{self.prompts.shape[0] - 1:,} users")
        facts.append(f"longest {self.max_seqlen:,}")
        if self.prefix is not None:
            facts.append(f"longest prefix {self.max_prefix:,}")
        facts.append(f"{self.items.shape[0]:,} items in patches")
        facts.append(f"compression {self.compression_ratio:.2f}")
        if self.logit_rows is not None:
            facts.append(f"{self.logit_rows.shape[0]:,} labels")
        if self.item_rows is not None:
            facts.append(f"{self.item_rows.shape[0]:,} item rows")
        if self.vector_rows is not None:
            facts.append(f"{self.vector_rows.shape[0]:,} vectors")
        return f"PatchLayout({', '.join(facts)}, on {self.device})"

    @property
    def num_rows(self) -> int:
        """T, the rows of the packed batch."""
        return self.lo.shape[0]

    @property
    def num_users(self) -> int:
        """B, the users of the batch; with prefixes S, its spans."""
        return self.cu_seqlens.shape[0] - 1

    @property
    def prompts(self) -> Tensor:
        """``(B + 1,)`` int32, where each user's rows begin, also where they are several spans."""
        return self.cu_seqlens if self.cu_users is None else self.cu_users

    @property
    def ranges(self) -> Tensor | None:
        """``(S, R, 2)``, the prefix in the form that has any number of ranges."""
        return self.prefix[:, None] if self.prefix is not None and self.prefix.dim() == 2 else self.prefix

    @property
    def device(self) -> torch.device:
        return self.lo.device

    @property
    def compression_ratio(self) -> float:
        """Title tokens of the kept items divided by the rows that stand for them (section 4.3 of the paper).

        Separators and prompt count on neither side; 1.0 for a batch without items.
        """
        return self.history_tokens / self.history_rows if self.history_rows else 1.0

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PatchLayout:
        """The layout on ``device`` (itself if it is there already)."""
        if self.device == torch.device(device):
            return self
        return _moved(self, lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PatchLayout:
        """The layout in page-locked memory, so that `to` can copy without waiting."""
        return _moved(self, Tensor.pin_memory)

    def with_transpose(self) -> PatchLayout:
        """The layout with its `transpose`, which the gradient needs (itself if it is there already).

        Raises:
            ValueError: the layout is not on the CPU.
        """
        if self.transpose is not None:
            return self
        if self.device.type != "cpu":
            raise ValueError(
                f"layout: expected one on the CPU to build its transpose, got {self.device}; "
                "call with_transpose() before it is moved, or build_layout(..., transpose=True)"
            )
        check_readable(self)
        plan = planner.active.transpose_rows(
            *(tensor.numpy() for tensor in (self.lo, self.hi, self.items, self.token_ids, self.offsets))
        )
        transpose = Transpose(*(torch.from_numpy(column) for column in plan))
        layout = self._trusted({**self.__dict__, "transpose": transpose, "identities": None})
        return layout if self.identities is None else layout.with_identities()

    def with_identities(self) -> PatchLayout:
        """The layout with its `identities`, which item embeddings need (itself if they are there already).

        They have a transpose if the layout has one.

        Raises:
            ValueError: the layout is not on the CPU.
        """
        if self.identities is not None:
            return self
        if self.device.type != "cpu":
            raise ValueError(
                f"layout: expected one on the CPU to find its patches, got {self.device}; "
                "call layout.with_identities() before moving it"
            )
        check_readable(self)
        rows = torch.nonzero(self.lo >= 0)[:, 0]
        count, titles = rows.shape[0], self.title_index.shape[0]
        patches = self._trusted(
            {
                "lo": self.lo[rows],
                "hi": self.hi[rows],
                "items": self.items,
                "token_ids": self.title_index,
                "offsets": torch.arange(titles + 1, dtype=torch.int32, device="cpu"),
                "title_index": self.title_index,
                "cu_seqlens": torch.tensor([0, count], dtype=torch.int32, device="cpu"),
                "max_seqlen": count,
                "position_ids": torch.arange(count, device="cpu"),
                "labels": None,
                "logit_rows": None,
                "logit_labels": None,
                "history_tokens": 0,
                "history_rows": 0,
                "max_token_id": int(self.title_index.max()) if titles else -1,
                "max_position": count - 1,
            }
        )
        if self.transpose is not None:
            patches = patches.with_transpose()
        return self._trusted({**self.__dict__, "identities": Identities(rows, patches)})

    def supervise_literals(self) -> PatchLayout:
        """The layout with a label on every literal row, the history's text included, not on the response alone.

        Not the paper's objective: each history teaches many next items at once, which a model without pre-training
        needs. Prefix and suffix are supervised too; a span's first row cannot be, its predecessor is not beside it.
        """
        supervised = self.lo < 0
        supervised[self.cu_seqlens[:-1][self.cu_seqlens.diff() > 0].long()] = False
        if self.vector_rows is not None:
            supervised[self.vector_rows] = False
        return self._labelled(supervised)

    def _labelled(self, rows: Tensor) -> PatchLayout:
        """The layout with labels on ``rows``, ``(T,)`` bool, literals that the row before each predicts."""
        tokens = -1 - self.lo.long()
        values = {
            "labels": torch.where(rows, tokens, -100),
            "logit_rows": torch.nonzero(rows)[:, 0] - 1,
            "logit_labels": tokens[rows],
        }
        return self._trusted({**self.__dict__, **values})

    def compact(self) -> tuple[Tensor, PatchLayout]:
        """The layout over a vocabulary of just its own tokens.

        Returns:
            ``(U,)`` int64 distinct token ids, ascending, and the same layout with token ``tokens[u]`` renamed ``u``:
            pooling it from the ``(U, D)`` embeddings of those tokens gives the same rows. Labels keep their ids.
        """
        check_readable(self)
        layout = self.with_transpose()
        transpose = layout.transpose
        if transpose is None:
            raise RuntimeError("with_transpose returned a layout without one")
        tokens = transpose.tokens
        literal = layout.lo < 0
        renamed = torch.searchsorted(tokens, torch.where(literal, -1 - layout.lo, 0), out_int32=True)
        # titles that no row pools, as in a part of a layout, have tokens that are not among these
        pooled = torch.searchsorted(tokens, layout.token_ids, out_int32=True).clamp_(max=max(len(tokens) - 1, 0))
        values = {
            **layout.__dict__,
            "lo": torch.where(literal, -1 - renamed, layout.lo),
            "token_ids": pooled,
            "max_token_id": tokens.shape[0] - 1,
            "transpose": replace(
                transpose, tokens=torch.arange(tokens.shape[0], dtype=torch.int32, device=tokens.device)
            ),
        }
        return tokens.long(), self._trusted(values)


# where layouts that were pickled before `patchkern.batch` existed look for these classes
sys.modules.setdefault("patchkern.layout", sys.modules[__name__])
