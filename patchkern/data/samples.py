# SPDX-License-Identifier: Apache-2.0
"""Which items of which histories are to be predicted."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from patchkern.batch.arguments import check_count
from patchkern.batch.histories import Histories


class Samples(NamedTuple):
    """Prediction tasks: the target of sample ``s`` is the item of ``users[s]`` at ``positions[s]``.

    Attributes:
        users: ``(S,)`` int64, indices of users (not their ids).
        positions: ``(S,)`` int64, positions in the users' histories.
    """

    users: NDArray[np.int64]
    positions: NDArray[np.int64]

    def __repr__(self) -> str:
        return f"Samples({self.users.size:,} targets)"

    @classmethod
    def of(cls, samples: Any, histories: Histories, argument: str = "samples") -> Samples:
        """Of ``(users, positions)``, integers in whatever form, ``(S,)`` each, of items that the histories have.

        Raises:
            TypeError, ValueError: others; the message names ``argument``, or which of the two.
        """
        if not isinstance(histories, Histories):
            raise TypeError(f"histories: expected Histories, got {type(histories).__name__}")
        if not (isinstance(samples, (tuple, list)) and len(samples) == 2):
            raise TypeError(f"{argument}: expected (users, positions), got {type(samples).__name__}")
        users, positions = histories._samples(*samples)
        histories.at(users, positions)
        return cls(users, positions)

    def take(self, samples: ArrayLike) -> Samples:
        """Some of them: their numbers, or ``(S,)`` bool."""
        chosen = chosen_of(samples)
        return Samples(self.users[chosen], self.positions[chosen])

    def spread(self, limit: int | None) -> Samples:
        """At most ``limit`` of them, evenly spread over all, and so over users and time; None: all."""
        if limit is None or limit >= self.users.size:
            return self
        check_count("limit", limit, minimum=1)
        return self.take(np.linspace(0, self.users.size - 1, limit).astype(np.int64))


def chosen_of(samples: ArrayLike) -> NDArray[Any]:
    """Numbers of samples, or ``(S,)`` bool, as an index; of none, too."""
    chosen = np.asarray(samples)
    return chosen if chosen.size else chosen.astype(np.int64)
