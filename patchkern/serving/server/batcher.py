# SPDX-License-Identifier: Apache-2.0
"""The thread that owns the model: it takes what waits, computes it together, and looks again."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from patchkern.serving.server.computing import Batch, Computer
from patchkern.serving.server.jobs import Job, Ranked, tell
from patchkern.serving.server.limits import Limits
from patchkern.serving.server.metrics import Metrics
from patchkern.serving.server.problems import Closing, Overloaded, Problem

log = logging.getLogger(__name__)

_SICK = 5  # batches in a row that failed: more than one bad request
_LONGEST_RETRY = 60


class Batcher:
    """Computes jobs as they come: those of the group that waits longest, as many as fit, in the order of arrival.

    A batch that fails is computed again, job by job, so that one user's failure is not another's.

    Args:
        limits: how many may wait, and be computed together.
        metrics: is told of everything.
    """

    def __init__(self, limits: Limits, metrics: Metrics) -> None:
        self._limits, self._metrics = limits, metrics
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._errands: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._closing = False
        self._computer: Computer | None = None  # of the model that the latest batch was for
        self._failures = 0
        self._seconds_each = 0.0  # per user, lately
        self._thread = threading.Thread(target=self._work, name="patchkern-batcher", daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Users who wait."""
        return len(self._waiting)

    @property
    def sick(self) -> str | None:
        """Why nothing can be expected of the thread any more, or None."""
        if self._failures >= _SICK:
            return f"the latest {self._failures} batches failed"
        return None if self._closing or self._thread.is_alive() else "the thread that computes has died"

    def submit(self, jobs: Sequence[Job]) -> None:
        """Let jobs wait for their turn, all or none of them.

        Raises:
            Closing, Overloaded: they do not.
        """
        with self._changed:
            if self._closing:
                raise Closing("the server is shutting down")
            if len(self._waiting) + len(jobs) > self._limits.max_waiting:
                retry_after = math.ceil(min(max(len(self._waiting) * self._seconds_each, 1), _LONGEST_RETRY))
                raise Overloaded(f"{len(self._waiting)} users wait already; try again", retry_after)
            self._waiting.extend(jobs)
            self._changed.notify()

    def call(self, errand: Callable[[], Any]) -> Future[Any]:
        """Run something on the thread, between two batches and before those that wait."""
        done: Future[Any] = Future()
        with self._changed:
            if self._closing:
                raise Closing("the server is shutting down")
            self._errands.append((errand, done))
            self._changed.notify()
        return done

    def close(self) -> None:
        """Take no more jobs, compute those that wait, and end the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    # ------------------------------------------------------------------ on the thread

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._errands or self._closing)
                errand = self._errands.popleft() if self._errands else None
                jobs = self._next_jobs() if errand is None else []
                if errand is None and not jobs and not self._waiting and self._closing:
                    return
            if errand is not None:
                _run_errand(*errand)
            elif jobs:
                try:
                    self._compute(jobs)
                except Exception as error:
                    self._fail([job for job in jobs if not job.settled], error)
            jobs.clear()  # and with them, perhaps, a model that was replaced
            errand = None

    def _next_jobs(self) -> list[Job]:
        """Those of the group that waits longest; nobody waits for the answer of those who gave up."""
        jobs: list[Job] = []
        kept: deque[Job] = deque()
        while self._waiting and len(jobs) < self._limits.max_batch:
            job = self._waiting.popleft()
            if jobs and job.group != jobs[0].group:
                kept.append(job)
            elif job.reply is None or not job.reply.done():
                jobs.append(job)
        self._waiting.extendleft(reversed(kept))
        return jobs

    def _compute(self, jobs: list[Job]) -> None:
        served = jobs[0].served
        if self._computer is None or self._computer.served is not served:
            self._computer = Computer(served, self._limits.budget, self._limits.max_batch)
        now = time.monotonic()
        for job in jobs:
            self._metrics.waited.observe(now - job.arrived)
        _settle(self._computer.refused(jobs))
        taken = [job for job in jobs if not job.settled]
        for batch in self._computer.batches(taken) if taken else ():
            self._compute_batch(self._computer, batch)

    def _compute_batch(self, computer: Computer, batch: Batch) -> None:
        start = time.perf_counter()
        lists: list[Ranked] | None = None
        try:
            lists = computer.lists(batch)
        except Exception as error:
            if len(batch.jobs) == 1:
                self._fail(batch.jobs, error)
                return
            log.warning("a batch of %d users failed and is computed one by one: %s", len(batch.jobs), error)
        if lists is None:  # and what the failed call still held is gone with its exception
            for job in batch.jobs:
                self._compute_batch(computer, Batch([job], batch.chunked))
            return
        seconds, count = time.perf_counter() - start, len(batch.jobs)
        self._failures = 0
        self._seconds_each += 0.2 * (seconds / count - self._seconds_each)
        self._metrics.batch(count, sum(job.rows for job in batch.jobs), seconds)
        _settle(list(zip(batch.jobs, lists, strict=True)))

    def _fail(self, jobs: list[Job], error: Exception) -> None:
        self._failures += 1
        log.error("%d users were not served", len(jobs), exc_info=error)
        _settle([(job, Problem("the server failed on this request; its log says why", job.loc)) for job in jobs])


def _settle(outcomes: Sequence[tuple[Job, Ranked | Problem]]) -> None:
    """Tell the loops that wait, all at once: to wake one costs more than to compute some lists."""
    for job, _ in outcomes:
        job.settled = True
    waited_for = [(job.reply, outcome) for job, outcome in outcomes if job.reply is not None]
    for loop in {reply.get_loop() for reply, _ in waited_for}:
        of_loop = [(reply, outcome) for reply, outcome in waited_for if reply.get_loop() is loop]
        try:
            loop.call_soon_threadsafe(tell, of_loop)
        except RuntimeError:  # it was closed: nobody waits any more
            log.warning("%d answers came too late", len(of_loop))


def _run_errand(errand: Callable[[], Any], done: Future[Any]) -> None:
    if not done.set_running_or_notify_cancel():  # who asked for it gave up; from here on nobody can
        return
    try:
        done.set_result(errand())
    except Exception as error:
        done.set_exception(error)
