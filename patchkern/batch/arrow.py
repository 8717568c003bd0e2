# SPDX-License-Identifier: Apache-2.0
"""Arrow columns, from pyarrow or through its C interface; pyarrow itself is optional and imported late."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def import_pyarrow() -> tuple[Any, Any]:
    """pyarrow and its parquet module.

    Raises:
        ImportError: it is missing, and how to install it.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError("parquet needs pyarrow, which is not installed: pip install 'patchkern[data]'") from error
    return pyarrow, pyarrow.parquet


def arrow_array(name: str, values: Any) -> Any:
    """One ``pyarrow.Array`` of an arrow column; only one in several chunks is copied.

    Raises:
        ImportError: pyarrow is missing.
        TypeError: no arrow column.
    """
    try:
        import pyarrow as pa
    except ImportError as error:
        raise ImportError(
            f"{name}: an arrow column needs pyarrow, which is not installed: pip install 'patchkern[data]'"
        ) from error
    try:
        if isinstance(values, (pa.Array, pa.ChunkedArray)):
            column = values
        elif hasattr(values, "__arrow_c_array__"):
            column = pa.array(values)
        else:
            column = pa.chunked_array(values)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise TypeError(f"{name}: expected an arrow column, got {type(values).__name__}: {error}") from error
    if isinstance(column, pa.ChunkedArray):
        chunks = column.unify_dictionaries().chunks
        column = chunks[0] if len(chunks) == 1 else pa.concat_arrays(chunks) if chunks else pa.array([], column.type)
    return column


def arrow_text(name: str, column: Any) -> list[str | None]:
    """The texts and nulls of an arrow column; equal texts share their memory."""
    column = encoded(arrow_array(name, column))
    import pyarrow as pa

    if not pa.types.is_dictionary(column.type):
        raise TypeError(f"{name}: expected text, got a column of {column.type}")
    texts = [*column.dictionary.to_pylist(), None]
    return [texts[index] for index in column.indices.fill_null(-1).to_pylist()]


def encoded(column: Any) -> Any:
    """Text as a dictionary of the distinct ones; dictionaries of anything else decoded."""
    import pyarrow as pa

    text = {pa.string(), pa.large_string(), pa.string_view()}
    if pa.types.is_dictionary(column.type):
        return column if column.type.value_type in text else column.dictionary_decode()
    return column.cast(pa.large_string()).dictionary_encode() if column.type in text else column


def arrow_lists(name: str, values: Any) -> tuple[Any, NDArray[np.int64]]:
    """The arrow array of all values of a column of lists, one after the other, and the ``(B + 1,)`` offsets of lists.

    Raises:
        TypeError: no column of lists.
        ValueError: a list, or something in one, that is missing.
    """
    column = arrow_array(name, values)
    import pyarrow as pa

    kind = column.type
    if column.null_count:
        at = int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
        raise ValueError(f"{name}[{at}]: expected a list, got none")
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        bounds = column.offsets.to_numpy(zero_copy_only=False).astype(np.int64, copy=False)
        if bounds.size == 0:
            bounds = np.zeros(1, np.int64)
        flat = column.values.slice(bounds[0], bounds[-1] - bounds[0])
        offsets = bounds - bounds[0] if bounds[0] else bounds
    elif pa.types.is_fixed_size_list(kind):
        flat, offsets = column.flatten(), np.arange(len(column) + 1, dtype=np.int64) * kind.list_size
    elif pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind):
        flat, offsets = column.flatten(), np.zeros(len(column) + 1, np.int64)
        np.cumsum(column.value_lengths().to_numpy(zero_copy_only=False), out=offsets[1:])
    else:
        raise TypeError(f"{name}: expected a column of lists, got one of {kind}")
    if flat.null_count:
        at = int(np.flatnonzero(flat.is_null().to_numpy(zero_copy_only=False))[0])
        user = int(np.searchsorted(offsets, at, side="right")) - 1
        raise ValueError(f"{name}[{user}]: expected no missing value, got one at position {at - offsets[user]}")
    return flat, offsets
