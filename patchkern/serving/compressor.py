# SPDX-License-Identifier: Apache-2.0
"""What `UserStates` asks of a policy that compresses pasts, with its model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from patchkern.batch.histories import Histories

Tensors = tuple[Tensor, ...]


class Known(NamedTuple):
    """What a user's past had been compressed to, up to an earlier cut."""

    cut: int
    tensors: Tensors


class Compressor(Protocol):
    """A model and a policy under which it compresses what is old of a history."""

    @property
    def policy(self) -> dict[str, Any]:
        """What of the policy decides what comes out, ready for JSON."""
        ...

    @property
    def block(self) -> int:
        """Items after which a border moves."""
        ...

    @property
    def extends(self) -> bool:
        """Can a compressed past be gone on from, so that only new items are read?"""
        ...

    def cuts(self, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
        """How many items of histories of these lengths are old."""
        ...

    def like(self, old: int) -> Tensors:
        """What so many old items are compressed to, as tensors without memory (on the device "meta")."""
        ...

    def compress(self, histories: Histories, known: Sequence[Known | None]) -> list[Tensors]:
        """Compress what is old.

        Args:
            histories: B users, all with old items.
            known: what earlier items of each were compressed to, to go on from; None: from the beginning.
        """
        ...
