# SPDX-License-Identifier: Apache-2.0
"""Where a history is cut: what is old is compressed into learned rows, what is recent is not."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Int64 = NDArray[np.int64]


def cuts(lengths: Int64, keep: int, block: int) -> Int64:
    """How many items of histories are old: whole blocks, so that at least ``keep`` stay recent where there are as many.

    A border never moves while a history grows, but for the one that a new block adds: between ``keep`` and
    ``keep + block - 1`` items of a history that long are recent.

    Args:
        lengths: items of the histories, of any shape.
        keep: items that are always recent.
        block: items of a block, at least one.

    Returns:
        int64 of the same shape.

    Examples:
        >>> import numpy as np
        >>> from patchkern.batch.segments import cuts
        >>> cuts(np.array([3, 69, 70, 119, 120]), keep=20, block=50).tolist()
        [0, 0, 50, 50, 100]
    """
    return np.maximum(lengths - keep, 0) // block * block
