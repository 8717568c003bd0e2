# SPDX-License-Identifier: Apache-2.0
"""Row planning in C++: `planning`'s two functions, equal to them integer for integer. See csrc/layout.h."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from patchkern._build import load
from patchkern.batch import planning
from patchkern.batch.catalog import Catalog
from patchkern.batch.planning import Int32, Int64, RowPlan, Spans, TransposePlan
from patchkern.batch.policy_kinds import Levels
from patchkern.batch.prompt import Prompt

_native = load("_native")

# Status in csrc/pool_rows.h, where it is the caller's fault
_OK, _HISTORY_OFFSETS, _TOO_MANY_ROWS, _LARGE_DIVISOR, _CATALOG_OFFSETS = 0, 13, 16, 17, 20

Number = TypeVar("Number", bound=np.generic)

# The native transpose counts in a table of max_token_id + 1 integers. No vocabulary comes near this; ids that do are
# left to NumPy, which sorts.
_LARGEST_TABLE = 1 << 24


def plan_rows(
    catalog: Catalog,
    items: Int32,
    user_offsets: Int64,
    levels: Levels,
    prompt: Prompt,
    targets: Int32 | None,
    spans: Spans | None = None,
) -> RowPlan:
    """`planning.plan_rows` in C++."""
    catalog_tokens = _int32("catalog.token_ids", catalog.token_ids)
    catalog_offsets = _int32("catalog.offsets", catalog.offsets)
    items, user_offsets = _int32("items", items), _vector("histories.offsets", user_offsets, np.int64)
    levels = _vector("levels", levels, np.uint8)
    targets = None if targets is None else _int32("targets", targets)
    heads = None if spans is None else _vector("heads", spans.heads, np.uint8)
    hidden = None if spans is None else _vector("hidden", spans.hidden, np.int64)
    n_users, n_items = user_offsets.size - 1, catalog_offsets.size - 1
    if n_users < 0 or n_items < 0:
        raise ValueError(f"{'histories' if n_users < 0 else 'catalog'}.offsets: expected at least one entry, got none")
    _check_size("levels", levels, items.size)
    for name, array in (("targets", targets), ("heads", heads), ("hidden", hidden)):
        _check_size(name, array, n_users)
    parts = (prompt.prefix, prompt.separator, prompt.suffix, prompt.response_end)
    prompt_ids = np.array([token for part in parts for token in part], np.int32)
    batch = (
        _address(catalog_tokens),
        _address(catalog_offsets),
        catalog_tokens.size,
        n_items,
        _address(items),
        items.size,
        _address(user_offsets),
        n_users,
        _address(levels),
        _address(targets),
        _address(heads),
        _address(hidden),
        _address(prompt_ids),
        *map(len, parts),
    )
    numbers, title_index = np.empty(items.size, np.int32), np.empty(items.size, np.int32)
    counted = _native.count_rows(*batch, _address(numbers), _address(title_index))
    status, position, rows, pooled, titles, title_tokens, supervised, max_seqlen, history_tokens, history_rows = counted
    _check(status, position)
    # Cut to size by copying: a layout that is sent to another process must not drag its scratch space along.
    numbers, title_index = numbers[:pooled].copy(), title_index[:titles].copy()
    lo, hi = np.empty(rows, np.int32), np.empty(rows, np.int32)
    token_ids, offsets = np.empty(title_tokens, np.int32), np.empty(titles + 1, np.int32)
    cu_seqlens, position_ids = np.empty(n_users + 1, np.int32), np.empty(rows, np.int64)
    labels = logit_rows = logit_labels = None
    if targets is not None:
        labels, logit_rows, logit_labels = (np.empty(size, np.int64) for size in (rows, supervised, supervised))
    outputs = (title_index, lo, hi, token_ids, offsets, cu_seqlens, position_ids, labels, logit_rows, logit_labels)
    max_token_id = _native.fill_rows(*batch, rows, titles, title_tokens, *map(_address, outputs))
    return RowPlan(
        lo=lo,
        hi=hi,
        items=numbers,
        token_ids=token_ids,
        offsets=offsets,
        title_index=title_index,
        cu_seqlens=cu_seqlens,
        max_seqlen=max_seqlen,
        position_ids=position_ids,
        labels=labels,
        logit_rows=logit_rows,
        logit_labels=logit_labels,
        history_tokens=history_tokens,
        history_rows=history_rows,
        max_token_id=max_token_id,
    )


def transpose_rows(lo: Int32, hi: Int32, items: Int32, token_ids: Int32, offsets: Int32) -> TransposePlan:
    """`planning.transpose_rows` in C++."""
    names = ("lo", "hi", "items", "token_ids", "offsets")
    arrays = lo, hi, items, token_ids, offsets = tuple(map(_int32, names, (lo, hi, items, token_ids, offsets)))
    _check_size("hi", hi, lo.size)
    if offsets.size == 0:
        raise ValueError("offsets: expected at least one entry, got none")
    rows = (
        _address(lo),
        _address(hi),
        lo.size,
        _address(items),
        items.size,
        _address(token_ids),
        token_ids.size,
        _address(offsets),
        offsets.size - 1,
    )
    status, position, contributions, max_token_id = _native.count_contributions(*rows)
    _check(status, position)
    if max_token_id >= _LARGEST_TABLE:
        return planning.transpose_rows(*arrays)
    most = min(contributions, max_token_id + 1)
    tokens, token_offsets = np.empty(most, np.int32), np.empty(most + 1, np.int32)
    contribution_rows, divisors = np.empty(contributions, np.int32), np.empty(contributions, np.int32)
    outputs = (tokens, token_offsets, contribution_rows, divisors)
    distinct = _native.fill_transpose(*rows, contributions, max_token_id, *map(_address, outputs))
    return TransposePlan(tokens[:distinct].copy(), token_offsets[: distinct + 1].copy(), contribution_rows, divisors)


def _vector(name: str, array: NDArray[Any], dtype: type[Number]) -> NDArray[Number]:
    """``array`` as the native code reads it: a copy only where it is of another dtype, strided or misaligned."""
    if not isinstance(array, np.ndarray) or array.ndim != 1:
        raise ValueError(f"{name}: expected a 1-D array, got {array!r}")
    flags = array.flags
    if array.dtype == dtype and flags.c_contiguous and flags.aligned:
        return array
    return np.require(array, dtype, ("C", "A"))


def _int32(name: str, array: NDArray[Any]) -> Int32:
    return _vector(name, array, np.int32)


def _check_size(name: str, array: NDArray[Any] | None, expected: int) -> None:
    if array is not None and array.size != expected:
        raise ValueError(f"{name}: expected {expected} entries, got {array.size}")


def _address(array: NDArray[np.generic] | None) -> int:
    return 0 if array is None else array.ctypes.data


def _check(status: int, position: int) -> None:
    if status == _TOO_MANY_ROWS:
        raise ValueError(f"histories: expected a batch of at most 2^31 - 1 rows, got {position}")
    if status == _LARGE_DIVISOR:
        raise ValueError("histories: expected title length times session size below 2^31")
    if status == _HISTORY_OFFSETS:
        raise ValueError(f"histories.offsets[{position}]: expected offsets from 0 to the number of items, none falling")
    if status == _CATALOG_OFFSETS:
        raise ValueError(f"catalog.offsets[{position}]: expected a title within the catalog's token ids")
    if status != _OK:
        raise ValueError(f"layout: planning failed with status {status} at position {position}")
