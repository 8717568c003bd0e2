# SPDX-License-Identifier: Apache-2.0
"""The mean of all that is old: a past in one row that nobody had to learn."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from patchkern.batch.arguments import check_count
from patchkern.batch.histories import Histories
from patchkern.batch.policy_kinds import Level, Levels
from patchkern.batch.segments import cuts


@dataclass(frozen=True)
class MeanOfOld:
    """All old items as one session patch, recent ones as item patches: what learned compression must beat.

    Items are old as with `patchkern.Experts`, or with ``keep=1`` as with `patchkern.PreferenceMemory`, of the same
    ``block``.

    Args:
        keep: items that are always recent.
        block: items between borders.

    Examples:
        A P starts a patch, the items J after it join it.

        >>> import patchkern as pk
        >>> histories = pk.Histories.from_sequences([range(9)])
        >>> "".join(pk.Level(level).name[0] for level in pk.MeanOfOld(keep=2, block=3).levels(histories))
        'PJJJJJPPP'
    """

    keep: int = 20
    block: int = 50

    def __post_init__(self) -> None:
        check_count("keep", self.keep, minimum=0)
        check_count("block", self.block, minimum=1)

    @property
    def max_items(self) -> None:
        """None: the whole history is read."""
        return None

    def levels(self, histories: Histories) -> Levels:
        """See `patchkern.batch.policy_kinds.Policy`."""
        place = np.arange(histories.items.size) - np.repeat(histories.offsets[:-1], histories.lengths)
        old = np.repeat(cuts(histories.lengths, self.keep, self.block), histories.lengths)
        return np.where((place > 0) & (place < old), np.uint8(Level.JOIN), np.uint8(Level.PATCH))

    def trunks(self, lengths: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """See `patchkern.batch.policy_kinds.TrunkPolicy`."""
        return cuts(lengths, self.keep, self.block), lengths
