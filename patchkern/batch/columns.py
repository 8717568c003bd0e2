# SPDX-License-Identifier: Apache-2.0
"""What users bring as NumPy arrays: one type check per column, by protocol. Types are checked, never converted.

A column is a list or tuple, a NumPy array, or anything with one of the protocols of arrays: a torch tensor, an arrow
array, a column of pandas or polars. None of these packages is imported unless the caller did.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from patchkern.batch.arrow import arrow_array, encoded

# NumPy gives every string of an array the room of its longest: one long id would cost all the others theirs.
MAX_ID_LENGTH = 1024

_PROTOCOLS = ("__array__", "__arrow_c_array__", "__arrow_c_stream__", "to_numpy")
_INT64_MAX = int(np.iinfo(np.int64).max)


def is_sequence(values: Any) -> bool:
    """Whether ``values`` has a length and an order: a list, a tuple, an array, a column, but no text."""
    if isinstance(values, (str, bytes, Mapping, Set)):
        return False
    if isinstance(values, Sequence):
        return True
    is_array = any(hasattr(values, name) for name in _PROTOCOLS) and hasattr(values, "__len__")
    return is_array and getattr(values, "ndim", 1) > 0


def as_array(name: str, values: Any) -> NDArray[Any]:
    """``values`` as a NumPy array, without a copy where its owner has one to share.

    Raises:
        ImportError: a column that only pyarrow can read, and it is missing.
        TypeError: no array can be made of it.
        ValueError: missing values.
    """
    if isinstance(values, np.ma.MaskedArray) and np.ma.is_masked(values):
        raise ValueError(f"{name}: expected no missing value, got {int(np.ma.getmaskarray(values).sum())} masked")
    if isinstance(values, np.ndarray):
        return np.asarray(values)
    is_arrow = hasattr(values, "__arrow_c_array__") or hasattr(values, "__arrow_c_stream__")
    if is_arrow and (hasattr(values, "to_pylist") or not hasattr(values, "to_numpy")):  # pyarrow, or nothing we know
        return _of_arrow(name, arrow_array(name, values))
    _check_missing(name, values)
    try:
        if hasattr(values, "detach"):  # a tensor, perhaps on another device and with a gradient
            return np.asarray(values.detach().cpu().numpy())
        return np.asarray(values.to_numpy() if hasattr(values, "to_numpy") else values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name}: expected an array, got {type(values).__name__} that makes none: {error}") from error


def flat_array(name: str, values: ArrayLike) -> NDArray[Any]:
    """``values`` as a 1-D array."""
    try:
        array = np.asarray(values) if isinstance(values, (list, tuple, range)) else as_array(name, values)
    except (TypeError, ValueError) as error:
        if not isinstance(values, (list, tuple)):
            raise
        raise ValueError(f"{name}: expected a 1-D array, got {type(values).__name__} that makes none") from error
    if array.ndim != 1:
        raise ValueError(f"{name}: expected a 1-D array, got {array.ndim} dimensions of shape {array.shape}")
    if isinstance(values, (list, tuple)):
        _check_converted(name, values, array)
    return array


def id_array(values: Any, name: str) -> NDArray[Any]:
    """Ids as an int64 or a string array of the same shape; anything else is refused, not converted."""
    if not is_sequence(values):
        raise TypeError(f"{name}: expected a sequence of item ids, got {type(values).__name__}")
    if isinstance(values, (list, tuple)):
        return _ids_of_objects(list(values), name)
    array = as_array(name, values)
    if array.dtype.kind == "O" or array.dtype.kind == "T":
        return _ids_of_objects(array.ravel().tolist(), name).reshape(array.shape)
    if array.dtype.kind not in "iuU" and array.size:
        raise TypeError(f"{name}: expected integer or string item ids, got dtype {array.dtype}")
    if array.dtype.kind == "u" and array.size and int(array.max()) > _INT64_MAX:
        raise ValueError(f"{name}: expected integers that fit in int64, got {int(array.max())}")
    return array if array.dtype.kind == "U" else array.astype(np.int64, copy=False)


def number_array(name: str, values: Any) -> NDArray[np.float64]:
    """``(N,)`` finite numbers as float64; booleans, text and missing values are refused."""
    array = flat_array(name, values)
    if array.dtype.kind == "O":
        kinds = {type(value) for value in array.tolist()}
        if not all(issubclass(kind, (int, float, np.number)) and not issubclass(kind, bool) for kind in kinds):
            raise TypeError(f"{name}: expected numbers, got {', '.join(sorted(kind.__name__ for kind in kinds))}")
    elif array.size and array.dtype.kind not in "iuf":
        raise TypeError(f"{name}: expected numbers, got dtype {array.dtype}")
    numbers = array.astype(np.float64)
    wrong = np.flatnonzero(~np.isfinite(numbers))
    if wrong.size:
        raise ValueError(f"{name}[{wrong[0]}]: expected a finite number, got {numbers[wrong[0]]}")
    return numbers


def mask_array(name: str, values: Any, size: int) -> NDArray[np.bool_]:
    """``(size,)`` booleans."""
    array = flat_array(name, values)
    if array.shape != (size,) or (size and array.dtype != np.bool_):
        raise ValueError(f"{name}: expected {size} booleans, got {array.dtype} of shape {array.shape}")
    return array.astype(np.bool_, copy=False)


def title_mapping(titles: Any, argument: str = "titles") -> Mapping[Any, str]:
    """``{item id: title}`` of a mapping or a pandas Series indexed by item id."""
    if isinstance(titles, Mapping):
        return titles
    if not (hasattr(titles, "to_dict") and hasattr(titles, "index") and getattr(titles, "ndim", 0) == 1):
        noun = argument.removesuffix("s")
        raise TypeError(f"{argument}: expected a mapping of item id to {noun}, got {type(titles).__name__}")
    mapping: Mapping[Any, str] = titles.to_dict()
    if len(mapping) != len(titles):
        raise ValueError(f"{argument}: expected distinct item ids, got {len(titles) - len(mapping)} more than once")
    return mapping


def _ids_of_objects(ids: list[Any], name: str) -> NDArray[Any]:
    kinds = set(map(type, ids))
    if all(issubclass(kind, (int, np.integer)) and not issubclass(kind, (bool, np.timedelta64)) for kind in kinds):
        try:
            return np.array(ids, np.int64)
        except OverflowError as error:
            raise ValueError(f"{name}: expected integers that fit in int64") from error
    if all(issubclass(kind, str) for kind in kinds):
        _check_texts(name, ids)
        return np.array(ids, np.str_)
    names = ", ".join(sorted(kind.__name__ for kind in kinds))
    raise TypeError(f"{name}: expected all integers or all strings, got {names}")


def _check_converted(name: str, values: Sequence[Any], array: NDArray[Any]) -> None:
    """Raise where NumPy made text of what was none, or numbers of booleans."""
    kinds = set(map(type, values))
    is_text = array.dtype.kind == "U"
    mixed = is_text or not kinds.isdisjoint((bool, np.bool_))
    if len(kinds) > 1 and mixed and not all(issubclass(kind, str) for kind in kinds):
        names = " and ".join(sorted(kind.__name__ for kind in kinds))
        raise TypeError(f"{name}: expected values of one kind, got {names}")
    if is_text:
        _check_texts(name, values)


def _check_texts(name: str, texts: Sequence[str]) -> None:
    longest = max(map(len, texts), default=0)
    if longest > MAX_ID_LENGTH:
        raise ValueError(f"{name}: expected ids of at most {MAX_ID_LENGTH} characters, got one of {longest}")
    ending = next((text for text in texts if text.endswith("\0")), None)
    if ending is not None:  # NumPy would cut it off
        raise ValueError(f"{name}: expected ids that do not end in a NUL character, got {ending!r}")


def _of_arrow(name: str, column: Any) -> NDArray[Any]:
    """``(N,)`` values; numbers share arrow's memory, and text is decoded once per distinct one."""
    if column.null_count:
        at = int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
        raise ValueError(f"{name}[{at}]: expected no missing value, got {column.null_count}")
    column = encoded(column)
    if not hasattr(column, "dictionary"):
        return np.asarray(column.to_numpy(zero_copy_only=False))
    distinct = _ids_of_objects(column.dictionary.to_pylist(), name) if len(column) else np.zeros(0, np.str_)
    return distinct[column.indices.to_numpy(zero_copy_only=False)]


def _check_missing(name: str, values: Any) -> None:
    """Arrow and polars count what is missing; pandas marks it. As floats, integers would hide it."""
    missing: Any = getattr(values, "null_count", None)
    if callable(missing):
        missing = missing()
    if missing is None and hasattr(values, "isna"):
        missing = np.asarray(values.isna()).sum()
    if isinstance(missing, (int, np.integer)) and missing:
        raise ValueError(f"{name}: expected no missing value, got {missing}")
