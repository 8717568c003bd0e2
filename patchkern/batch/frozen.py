# SPDX-License-Identifier: Apache-2.0
"""Arrays that cannot be written into any more: what has been checked once stays true.

Native code reads them by address. It relies on what Python has seen of them, so a caller who keeps an array must not be
able to change it afterwards, and neither must an unpickler or a view.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def frozen(array: NDArray[Any], source: Any) -> NDArray[Any]:
    """``array``, read-only, aligned and contiguous; a copy where somebody could still write into it.

    Args:
        array: made from ``source``, which it may share memory with, or may be.
        source: what the caller gave: a list, an array, anything that NumPy reads.
    """
    converted = isinstance(source, np.ndarray) and array is not source and array.base is None
    own = converted or isinstance(source, (list, tuple, range))
    return freeze(array if own or is_immutable(array) else array.copy())


def freeze(array: NDArray[Any]) -> NDArray[Any]:
    """``array``, which nobody else holds, read-only, aligned and contiguous."""
    array = np.require(array, requirements=("C", "A"))
    array.flags.writeable = False
    return array


def adopted(array: Any) -> Any:
    """What came with a pickle: an array that only the unpickler holds need not be copied to be frozen."""
    base = array
    while isinstance(base, np.ndarray):
        base.flags.writeable = False
        base = base.base
    return array


def is_immutable(array: NDArray[Any]) -> bool:
    """Whether an array is read-only down to the memory that it views.

    An arrow buffer is, by its specification, even where Python cannot tell.
    """
    base: Any = array
    while isinstance(base, (np.ndarray, memoryview)):
        if isinstance(base, np.ndarray) and base.flags.writeable:
            return False
        base = base.base if isinstance(base, np.ndarray) else base.obj
    if base is None or type(base).__module__.partition(".")[0] == "pyarrow":
        return True
    try:
        return memoryview(base).readonly
    except TypeError:
        return False
