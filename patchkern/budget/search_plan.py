# SPDX-License-Identifier: Apache-2.0
"""What was predicted for a search, and how it is cut into batches: see `patchkern.budget.search`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from patchkern.batch.policy_kinds import AnyPolicy


def in_units(count: int) -> str:
    """Bytes for people."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


@dataclass(frozen=True)
class SearchBytes:
    """Predicted bytes of one batch, see `patchkern.budget.search`."""

    weights: int
    store: int
    prefill: int
    decode: int
    logits: int
    absorbing: int = 0

    @property
    def peak(self) -> int:
        """The most that is allocated at once."""
        return self.weights + max(self.store + max(self.prefill, self.decode + self.logits), self.absorbing)


@dataclass(frozen=True)
class MicroBatch:
    """Users to compute together.

    Attributes:
        users: ``(n,)`` their numbers.
        chunk_rows: rows of their prompts to compute at once; None for all.
        needed: predicted bytes.
    """

    users: NDArray[np.int64]
    chunk_rows: int | None
    needed: SearchBytes

    def __repr__(self) -> str:
        chunks = "" if self.chunk_rows is None else f" in chunks of {self.chunk_rows:,} rows"
        return f"MicroBatch({self.users.size:,} users{chunks}, peak {in_units(self.needed.peak)})"


@dataclass(frozen=True)
class SearchPlan:
    """How to stay within a budget.

    Attributes:
        batches: every user in one of them, users of about equal length together, the longest first.
        budget: bytes; None: no limit.
        policy: the one chosen, where several were given.
    """

    batches: tuple[MicroBatch, ...]
    budget: int | None
    policy: AnyPolicy | None = None

    def __repr__(self) -> str:
        facts = [f"{len(self.batches):,} batches of up to {self.users_per_batch:,} users"]
        facts.append(f"peak {in_units(self.peak)}")
        facts.append("no budget" if self.budget is None else f"budget {in_units(self.budget)}")
        return f"SearchPlan({', '.join(facts if self.policy is None else [*facts, repr(self.policy)])})"

    @property
    def users_per_batch(self) -> int:
        """Users of the largest batch."""
        return max((batch.users.size for batch in self.batches), default=0)

    @property
    def chunk_rows(self) -> int | None:
        """The smallest chunk of any batch; None where none is cut."""
        return min((batch.chunk_rows for batch in self.batches if batch.chunk_rows is not None), default=None)

    @property
    def needed(self) -> SearchBytes:
        """Predicted bytes of the batch with the highest peak."""
        nothing = SearchBytes(0, 0, 0, 0, 0)
        return max((batch.needed for batch in self.batches), key=lambda needed: needed.peak, default=nothing)

    @property
    def peak(self) -> int:
        """The most that is allocated at once, in bytes."""
        return self.needed.peak
