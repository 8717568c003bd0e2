# SPDX-License-Identifier: Apache-2.0
"""What one client, and all of them together, may ask of a server."""

from __future__ import annotations

from dataclasses import dataclass, fields

from patchkern.batch.arguments import check_count
from patchkern.budget.search import parse_bytes


@dataclass(frozen=True)
class Limits:
    """Bounds on requests and on what waits; beyond them a request is refused before anything is computed.

    Attributes:
        max_body: bytes of a request's body, or a text such as "1MiB".
        max_history: items of a history, as it is sent.
        max_k: items asked for.
        max_beams: hypotheses of a beam search.
        max_users: of one request.
        max_waiting: users who wait; more are told to come back later.
        max_batch: users computed together.
        memory_budget: bytes, or a text such as "40GiB", for everything that torch allocates; None: no limit.
        timeout: seconds from a request's arrival to its answer, and for its body to come in.

    Raises:
        TypeError, ValueError: naming the limit.
    """

    max_body: int | str = 1 << 20
    max_history: int = 10_000
    max_k: int = 200
    max_beams: int = 100
    max_users: int = 256
    max_waiting: int = 1024
    max_batch: int = 64
    memory_budget: int | str | None = None
    timeout: float = 30.0

    def __post_init__(self) -> None:
        for name in ("max_body", "memory_budget"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else parse_bytes(name, value))
        for field in fields(self):
            if field.type == "int":
                check_count(field.name, getattr(self, field.name), minimum=1)
        if isinstance(self.timeout, bool) or not isinstance(self.timeout, (int, float)) or not 0 < self.timeout < 1e6:
            raise ValueError(f"timeout: expected seconds above 0 and below 1,000,000, got {self.timeout!r}")
        if self.max_users > self.max_waiting:
            raise ValueError(f"max_users: expected at most max_waiting ({self.max_waiting}), got {self.max_users}")

    @property
    def body_bytes(self) -> int:
        """`max_body` as a number."""
        return int(self.max_body)

    @property
    def budget(self) -> int | None:
        """`memory_budget` as a number."""
        return None if self.memory_budget is None else int(self.memory_budget)
