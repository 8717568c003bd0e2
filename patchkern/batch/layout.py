# SPDX-License-Identifier: Apache-2.0
"""The layout: the integers that describe a packed batch, planned on the CPU without touching an embedding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from types import ModuleType
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from patchkern.batch import planning
from patchkern.batch.catalog import Catalog
from patchkern.batch.histories import Histories, HistoriesLike, is_sequence
from patchkern.batch.planning import Int32, RowPlan, Spans
from patchkern.batch.policies import AnyPolicy, FittingPolicy, Level, Levels, check_policy
from patchkern.batch.prompt import Prompt

Record = TypeVar("Record")

planner: ModuleType = planning
try:
    from patchkern.batch import planning_native

    planner = planning_native
except ImportError:
    pass


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
        prefix: ``(S, 2)`` int32, for each span the earlier rows ``start..end - 1`` it sees besides itself, none where
            they are equal; None when no span has a prefix, which makes every user one span. Where it is given, spans
            take the place of users in ``cu_seqlens``, ``max_seqlen`` and `num_users`.
        history_tokens: title tokens of the kept items.
        history_rows: rows that stand for them.
        max_token_id: the largest token id of any row, -1 if there is none.
        transpose: the gradient's side of the layout, or None.
        max_prefix: rows of the longest prefix.
        catalog_fingerprint: `Catalog.fingerprint` of the catalogue that ``title_index`` points into; None for a layout
            made by hand, which then cannot be pooled with an `ItemTable` or with item embeddings.
        identities: what a model with item embeddings adds to the patches, or None.

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
    catalog_fingerprint: str | None = None
    identities: Identities | None = None

    def __post_init__(self) -> None:
        _check_layout(self)

    @classmethod
    def _trusted(cls, values: dict[str, Any]) -> PatchLayout:
        """A layout of fields that are right by construction: the checks would cost as much as the planning."""
        layout = object.__new__(cls)
        layout.__dict__.update(values)
        return layout

    @property
    def num_rows(self) -> int:
        """T, the rows of the packed batch."""
        return self.lo.shape[0]

    @property
    def num_users(self) -> int:
        """B, the users of the batch; with prefixes S, its spans."""
        return self.cu_seqlens.shape[0] - 1

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
                "call build_layout(..., transpose=True)"
            )
        plan = planner.transpose_rows(
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
        rows = torch.nonzero(self.lo >= 0)[:, 0]
        count, titles = rows.shape[0], self.title_index.shape[0]
        patches = self._trusted(
            {
                "lo": self.lo[rows],
                "hi": self.hi[rows],
                "items": self.items,
                "token_ids": self.title_index,
                "offsets": torch.arange(titles + 1, dtype=torch.int32),
                "title_index": self.title_index,
                "cu_seqlens": torch.tensor([0, count], dtype=torch.int32),
                "max_seqlen": count,
                "position_ids": torch.arange(count),
                "labels": None,
                "logit_rows": None,
                "logit_labels": None,
                "history_tokens": 0,
                "history_rows": 0,
                "max_token_id": int(self.title_index.max()) if titles else -1,
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
        tokens = -1 - self.lo.long()
        values = {
            "labels": torch.where(supervised, tokens, -100),
            "logit_rows": torch.nonzero(supervised)[:, 0] - 1,
            "logit_labels": tokens[supervised],
        }
        return self._trusted({**self.__dict__, **values})

    def compact(self) -> tuple[Tensor, PatchLayout]:
        """The layout over a vocabulary of just its own tokens.

        Returns:
            ``(U,)`` int64 distinct token ids, ascending, and the same layout with token ``tokens[u]`` renamed ``u``:
            pooling it from the ``(U, D)`` embeddings of those tokens gives the same rows. Labels keep their ids.
        """
        layout = self.with_transpose()
        transpose = layout.transpose
        if transpose is None:
            raise RuntimeError("with_transpose returned a layout without one")
        tokens = transpose.tokens
        literal = layout.lo < 0
        renamed = torch.searchsorted(tokens, torch.where(literal, -1 - layout.lo, 0), out_int32=True)
        values = {
            **layout.__dict__,
            "lo": torch.where(literal, -1 - renamed, layout.lo),
            "token_ids": torch.searchsorted(tokens, layout.token_ids, out_int32=True),
            "max_token_id": tokens.shape[0] - 1,
            "transpose": replace(
                transpose, tokens=torch.arange(tokens.shape[0], dtype=torch.int32, device=tokens.device)
            ),
        }
        return tokens.long(), self._trusted(values)


def build_layout(
    catalog: Catalog,
    histories: HistoriesLike,
    policy: AnyPolicy,
    prompt: Prompt,
    targets: Sequence[Any] | NDArray[Any] | None = None,
    *,
    transpose: bool | None = None,
) -> PatchLayout:
    """Plan a packed batch: integers only, on the CPU, safe in data-loader workers.

    Each user becomes ``prefix | history rows | suffix``, with targets ``| target title | response_end``; one separator
    stands between two history entries.

    Args:
        catalog: the titles.
        histories: `Histories` or one sequence of item ids per user, oldest first; B users.
        policy: decides which items become what.
        prompt: the fixed tokens.
        targets: B item ids, the next item of each user; adds the response and its labels.
        transpose: also plan the gradient (None: when there are targets).

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    check_inputs(catalog, policy, prompt)
    if not (transpose is None or isinstance(transpose, bool)):
        raise TypeError(f"transpose: expected a bool or None, got {type(transpose).__name__}")
    kept = Histories.coerce(histories).latest(policy.max_items)
    index = catalog.index_of(kept.items, "histories")
    target_index = None if targets is None else _target_index(catalog, targets, len(kept))
    if isinstance(policy, FittingPolicy):
        levels = policy.fit(kept, catalog.lengths[index], prompt)
    else:
        levels = policy.levels(kept)
    layout = plan_layout(catalog, kept, index, levels, prompt, target_index)
    wanted = targets is not None if transpose is None else transpose
    return layout.with_transpose() if wanted else layout


def check_inputs(catalog: Any, policy: Any, prompt: Any) -> None:
    """Raise a TypeError or ValueError unless these are what a layout is planned from."""
    if not isinstance(catalog, Catalog):
        raise TypeError(f"catalog: expected a Catalog, got {type(catalog).__name__}")
    check_policy(policy)
    if not isinstance(prompt, Prompt):
        raise TypeError(f"prompt: expected a Prompt, got {type(prompt).__name__}")


def plan_layout(
    catalog: Catalog,
    histories: Histories,
    index: Int32,
    levels: Levels,
    prompt: Prompt,
    targets: Int32 | None,
    spans: Spans | None = None,
) -> PatchLayout:
    """What the planner makes of histories, the ``(N,)`` catalogue positions of their items and a policy's levels.

    Prefixes, which need the rows that are planned here, and the transpose are left to the caller.
    """
    _check_levels(levels, histories)
    plan: RowPlan = planner.plan_rows(catalog, index, histories.offsets, levels, prompt, targets, spans)
    values: dict[str, Any] = {
        name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value
        for name, value in plan._asdict().items()
    }
    values |= {"prefix": None, "transpose": None, "catalog_fingerprint": catalog.fingerprint}
    return PatchLayout._trusted(values)


def _target_index(catalog: Catalog, targets: Sequence[Any] | NDArray[Any], n_users: int) -> NDArray[np.int32]:
    if not is_sequence(targets):
        raise TypeError(f"targets: expected one item id per user, got {type(targets).__name__}")
    if len(targets) != n_users:
        raise ValueError(f"targets: expected one item id per user ({n_users}), got {len(targets)}")
    index = catalog.index_of(targets, "targets")
    if index.ndim != 1:
        raise ValueError(f"targets: expected one item id per user ({n_users}), got shape {index.shape}")
    return index


def _check_levels(levels: Levels, histories: Histories) -> None:
    """A policy may be the user's own: see that it kept to the contract before the planner relies on it."""
    if not isinstance(levels, np.ndarray) or levels.dtype != np.uint8 or levels.shape != histories.items.shape:
        got = f"{levels.dtype} {levels.shape}" if isinstance(levels, np.ndarray) else type(levels).__name__
        raise ValueError(f"policy: expected levels of dtype uint8 and shape {histories.items.shape}, got {got}")
    if levels.size == 0 or levels.max() < Level.JOIN:
        return
    if levels.max() > Level.JOIN:
        raise ValueError(f"policy: expected levels 0, 1 and 2, got {levels.max()}")
    starts = histories.offsets[:-1][histories.lengths > 0]
    alone = (levels[1:] == Level.JOIN) & (levels[:-1] == Level.TEXT)
    if (levels[starts] == Level.JOIN).any() or alone.any():
        raise ValueError("policy: expected every JOIN to follow a patch item of the same user, got one that does not")


_VECTORS = {
    "lo": torch.int32,
    "hi": torch.int32,
    "items": torch.int32,
    "token_ids": torch.int32,
    "offsets": torch.int32,
    "title_index": torch.int32,
    "cu_seqlens": torch.int32,
    "position_ids": torch.int64,
    "labels": torch.int64,
    "logit_rows": torch.int64,
    "logit_labels": torch.int64,
}
_OPTIONAL = {"labels", "logit_rows", "logit_labels"}
_COUNTS = ("max_seqlen", "history_tokens", "history_rows", "max_token_id", "max_prefix")


def _check_vector(name: str, value: Any, dtype: torch.dtype, device: torch.device | None) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.dtype != dtype:
        raise TypeError(f"{name}: expected dtype {dtype}, got {value.dtype}")
    if value.layout != torch.strided or value.device.type == "meta":
        raise ValueError(f"{name}: expected a dense tensor with values, got {value.layout} on {value.device}")
    if value.dim() != 1:
        raise ValueError(f"{name}: expected a 1-D tensor, got shape {tuple(value.shape)}")
    if not value.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, got stride {value.stride()}")
    if device is not None and value.device != device:
        raise ValueError(f"{name}: expected device {device}, got {value.device}")


def _check_shape(name: str, tensor: Tensor, expected: int, like: str) -> None:
    if tensor.shape[0] != expected:
        raise ValueError(f"{name}: expected {expected} entries ({like}), got {tensor.shape[0]}")


def _check_range(name: str, tensor: Tensor, low: int, high: int) -> None:
    """Every entry in ``low..high``."""
    if tensor.numel() == 0:
        return
    wrong = torch.nonzero((tensor < low) | (tensor > high))
    if wrong.numel():
        at = int(wrong[0])
        raise ValueError(f"{name}[{at}]: expected a value in {low}..{high}, got {int(tensor[at])}")


def _check_cuts(name: str, offsets: Tensor, total: int) -> None:
    if offsets.numel() == 0 or int(offsets[0]) != 0 or int(offsets[-1]) != total:
        raise ValueError(
            f"{name}: expected offsets from 0 to {total}, got {offsets.tolist()[:1] + offsets.tolist()[-1:]}"
        )
    falls = torch.nonzero(offsets[1:] < offsets[:-1])
    if falls.numel():
        raise ValueError(f"{name}[{int(falls[0]) + 1}]: expected non-decreasing offsets, got a smaller one")


def _check_layout(layout: PatchLayout) -> None:
    """All that the kernels rely on, checked once, on the CPU, when a layout is made by hand."""
    for name, dtype in _VECTORS.items():
        value = getattr(layout, name)
        if not (value is None and name in _OPTIONAL):
            _check_vector(name, value, dtype, None if name == "lo" else layout.lo.device)
    for name in _COUNTS:
        value = getattr(layout, name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
    rows, entries, titles = layout.lo.shape[0], layout.items.shape[0], layout.title_index.shape[0]
    for name in ("hi", "position_ids"):
        _check_shape(name, getattr(layout, name), rows, "one per row, as lo")
    _check_cuts("cu_seqlens", layout.cu_seqlens, rows)
    _check_shape("offsets", layout.offsets, titles + 1, "one more than title_index")
    _check_cuts("offsets", layout.offsets, layout.token_ids.shape[0])
    lengths = torch.diff(layout.offsets)
    if titles and int(lengths.min()) == 0:
        raise ValueError(f"offsets: expected at least one token per title, got none for title {int(lengths.argmin())}")
    _check_range("title_index", layout.title_index, 0, torch.iinfo(torch.int32).max)
    fingerprint: Any = layout.catalog_fingerprint
    if not (fingerprint is None or isinstance(fingerprint, str)):
        raise TypeError(f"catalog_fingerprint: expected a string or None, got {type(fingerprint).__name__}")
    _check_range("items", layout.items, 0, titles - 1)
    largest = torch.iinfo(torch.int32).max - 1
    _check_range("token_ids", layout.token_ids, 0, largest)
    literal = layout.lo < 0
    _check_range("lo", layout.lo, -1 - largest, max(entries - 1, -1))
    _check_range("hi", layout.hi, 0, entries)
    empty = torch.nonzero(~literal & (layout.hi <= layout.lo))
    if empty.numel():
        raise ValueError(f"hi[{int(empty[0])}]: expected more than lo for a patch, got {int(layout.hi[empty[0]])}")
    beyond = torch.nonzero(literal & (layout.hi != 0))
    if beyond.numel():
        raise ValueError(f"hi[{int(beyond[0])}]: expected 0 for a literal, got {int(layout.hi[beyond[0]])}")
    seen = [-1 - layout.lo[literal], layout.token_ids]
    largest_token = max((int(tokens.max()) for tokens in seen if tokens.numel()), default=-1)
    if layout.max_token_id != largest_token:
        raise ValueError(f"max_token_id: expected the largest token id, {largest_token}, got {layout.max_token_id}")
    longest = int(torch.diff(layout.cu_seqlens).max()) if layout.num_users else 0
    if layout.max_seqlen != longest:
        raise ValueError(f"max_seqlen: expected the longest user's rows, {longest}, got {layout.max_seqlen}")
    _check_supervision(layout, rows)
    _check_prefix(layout)
    if layout.transpose is not None:
        _check_transpose(layout.transpose, rows, layout.max_token_id, layout.lo.device)
    if layout.identities is not None:
        _check_identities(layout.identities, rows, layout.lo.device)


def _check_prefix(layout: PatchLayout) -> None:
    prefix, longest = layout.prefix, 0
    if prefix is not None:
        if not isinstance(prefix, Tensor):
            raise TypeError(f"prefix: expected a tensor, got {type(prefix).__name__}")
        if prefix.shape != (layout.num_users, 2):
            raise ValueError(
                f"prefix: expected shape {(layout.num_users, 2)}, one range per span of cu_seqlens, got "
                f"{tuple(prefix.shape)}"
            )
        if not prefix.is_contiguous():
            raise ValueError(f"prefix: expected a contiguous tensor, got stride {prefix.stride()}")
        _check_vector("prefix", prefix.flatten(), torch.int32, layout.lo.device)
        start, end = prefix.unbind(1)
        wrong = torch.nonzero((start < 0) | (end < start) | (end > layout.cu_seqlens[:-1]))
        if wrong.numel():
            at = int(wrong[0])
            raise ValueError(
                f"prefix[{at}]: expected a range of rows before its span, in 0..{int(layout.cu_seqlens[at])}, got "
                f"{prefix[at].tolist()}"
            )
        longest = int((end - start).max()) if layout.num_users else 0
    if layout.max_prefix != longest:
        raise ValueError(f"max_prefix: expected the longest prefix's rows, {longest}, got {layout.max_prefix}")


def _check_supervision(layout: PatchLayout, rows: int) -> None:
    given = [getattr(layout, name) is not None for name in sorted(_OPTIONAL)]
    if any(given) != all(given):
        raise ValueError("labels: expected labels, logit_rows and logit_labels together or none of them")
    if layout.labels is None or layout.logit_rows is None or layout.logit_labels is None:
        return
    _check_shape("labels", layout.labels, rows, "one per row, as lo")
    _check_shape("logit_labels", layout.logit_labels, layout.logit_rows.shape[0], "one per logit row")
    _check_range("logit_rows", layout.logit_rows, 0, rows - 1)


def _check_transpose(transpose: Any, rows: int, max_token_id: int, device: torch.device) -> None:
    if not isinstance(transpose, Transpose):
        raise TypeError(f"transpose: expected a Transpose, got {type(transpose).__name__}")
    for field in fields(transpose):
        _check_vector(f"transpose.{field.name}", getattr(transpose, field.name), torch.int32, device)
    _check_shape("transpose.offsets", transpose.offsets, transpose.tokens.shape[0] + 1, "one more than tokens")
    _check_shape("transpose.divisors", transpose.divisors, transpose.rows.shape[0], "one per contribution")
    _check_cuts("transpose.offsets", transpose.offsets, transpose.rows.shape[0])
    if bool((transpose.offsets.diff() == 0).any()):
        raise ValueError("transpose.offsets: expected at least one contribution per token, got none for one")
    _check_range("transpose.rows", transpose.rows, 0, rows - 1)
    _check_range("transpose.divisors", transpose.divisors, 1, torch.iinfo(torch.int32).max)
    if bool((torch.diff(transpose.tokens) <= 0).any()):
        raise ValueError("transpose.tokens: expected ascending token ids without repeats")
    _check_range("transpose.tokens", transpose.tokens, 0, max_token_id)


def _check_identities(identities: Any, rows: int, device: torch.device) -> None:
    if not isinstance(identities, Identities):
        raise TypeError(f"identities: expected an Identities, got {type(identities).__name__}")
    if not isinstance(identities.layout, PatchLayout):
        raise TypeError(f"identities.layout: expected a PatchLayout, got {type(identities.layout).__name__}")
    if identities.layout.device != device:
        raise ValueError(f"identities.layout: expected device {device}, got {identities.layout.device}")
    _check_vector("identities.rows", identities.rows, torch.int64, device)
    _check_shape("identities.rows", identities.rows, identities.layout.num_rows, "one per row of identities.layout")
    _check_range("identities.rows", identities.rows, 0, rows - 1)
    if bool((torch.diff(identities.rows) <= 0).any()):
        raise ValueError("identities.rows: expected ascending rows without repeats")
