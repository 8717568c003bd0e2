# SPDX-License-Identifier: Apache-2.0
"""What a server tells Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_USERS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Of one server, in a registry of its own; `text` is what ``/metrics`` shows."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        self._requests = Counter(
            "patchkern_requests", "Requests by path and status", ["path", "status"], registry=registry
        )
        self._latency = Histogram(
            "patchkern_request_seconds", "From arrival to answer", ["path"], buckets=_SECONDS, registry=registry
        )
        self.waited = Histogram(
            "patchkern_wait_seconds", "From arrival to a user's batch", buckets=_SECONDS, registry=registry
        )
        self._users = Counter("patchkern_users", "Users who got a list", registry=registry)
        self._rows = Counter("patchkern_rows", "Rows of their prompts", registry=registry)
        self._batch_users = Histogram(
            "patchkern_batch_users", "Users computed together", buckets=_USERS, registry=registry
        )
        self._batch_seconds = Histogram(
            "patchkern_batch_seconds", "To compute a batch", buckets=_SECONDS, registry=registry
        )
        self.reloads = Counter("patchkern_reloads", "Of model and catalogue", ["outcome"], registry=registry)

    def request(self, path: str, status: int, seconds: float) -> None:
        """An answer was sent; ``path`` is a route of the server, never what a client made up."""
        self._requests.labels(path, str(status)).inc()
        self._latency.labels(path).observe(seconds)

    def batch(self, users: int, rows: int, seconds: float) -> None:
        """A batch was computed."""
        self._users.inc(users)
        self._rows.inc(rows)
        self._batch_users.observe(users)
        self._batch_seconds.observe(seconds)

    def watch(self, name: str, says: str, value: Callable[[], float]) -> None:
        """Show ``value`` whenever somebody asks."""
        Gauge(f"patchkern_{name}", says, registry=self._registry).set_function(value)

    def text(self) -> bytes:
        """All of it, in Prometheus' format."""
        return generate_latest(self._registry)
