# SPDX-License-Identifier: Apache-2.0
"""A model behind a queue: requests in, answers out, and another model in its place when asked for."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

from patchkern.serving.server.batcher import Batcher
from patchkern.serving.server.compression import compressed
from patchkern.serving.server.computing import Computer, together
from patchkern.serving.server.jobs import Job, Loc, Ranked, admitted, tell
from patchkern.serving.server.limits import Limits
from patchkern.serving.server.metrics import Metrics
from patchkern.serving.server.problems import Busy, Closing, NotReloaded, TooSlow
from patchkern.serving.server.schema import Answer, Asked
from patchkern.serving.server.served import Served

log = logging.getLogger(__name__)


class Service:
    """What the routes call.

    Args:
        read: gives the model as it is now; called at once, and at every reload.
        limits: of requests.

    Attributes:
        served: the model that new requests are answered by.

    Raises:
        Exception: whatever ``read`` raises the first time, or the model's first search.
    """

    def __init__(self, read: Callable[[], Served], limits: Limits) -> None:
        self._read = read
        self.limits = limits
        self.metrics = Metrics()
        self.served = self._ready()
        self._batcher = Batcher(limits, self.metrics)
        self._reloading = False
        self.metrics.watch("waiting_users", "Users who wait", lambda: self._batcher.waiting)
        self.metrics.watch("model_number", "Grows with every reload", lambda: self.served.number)
        self.metrics.watch("catalog_items", "Items of the catalogue", lambda: len(self.served.titles))
        self.metrics.watch("cached_users", "Users whose prompts are kept", lambda: len(self.served.cache or ()))

    def start(self) -> None:
        """Begin to answer."""
        self._batcher.start()

    def close(self) -> None:
        """Answer those who wait, and end."""
        self._batcher.close()

    @property
    def sick(self) -> str | None:
        """Why it had better be started again, or None."""
        return self._batcher.sick

    @property
    def full(self) -> str | None:
        """Why it would refuse a request now, or None."""
        waiting = self._batcher.waiting
        return f"{waiting} users wait" if waiting >= self.limits.max_waiting else None

    async def answers(self, asked: Sequence[Asked], locs: Sequence[Loc]) -> list[Answer]:
        """For several users; the fields of all their requests are checked before the first waits.

        Raises:
            Problem: why there are none.
        """
        served = self.served
        jobs = [admitted(one, served, self.limits, loc) for one, loc in zip(asked, locs, strict=True)]
        self._batcher.submit(jobs)
        replies = [job.reply for job in jobs if job.reply is not None]
        late = TooSlow(f"no answer within {self.limits.timeout:g} seconds")
        timer = asyncio.get_running_loop().call_later(self.limits.timeout, tell, [(reply, late) for reply in replies])
        try:
            lists = [await reply for reply in replies]
        finally:
            timer.cancel()
            for reply in replies:  # of a request that failed
                reply.cancel()
        return [_answer(job, found, one.explain) for job, found, one in zip(jobs, lists, asked, strict=True)]

    async def reload(self) -> Served:
        """Read model and catalogue again, and answer what comes from now on by them.

        They are read on the thread that computes, between two batches, because transformers changes the whole process
        (torch's default dtype) while it reads a model. Who waits, waits that much longer, and is answered by the model
        that was there when the request came.

        Raises:
            Busy, Closing: another reload is under way; the server is shutting down.
            NotReloaded: why not; the old model goes on.
        """
        if self._reloading:
            raise Busy("a reload is under way")
        self._reloading = True
        try:
            self.served = await asyncio.wrap_future(self._batcher.call(self._ready))
        except Closing:
            raise
        except Exception as error:
            self.metrics.reloads.labels("failed").inc()
            log.error("not reloaded: %s", error)
            raise NotReloaded(f"not reloaded: {type(error).__name__}: {error}") from error
        finally:
            self._reloading = False
        self.metrics.reloads.labels("done").inc()
        return self.served

    def _ready(self) -> Served:
        start = time.perf_counter()
        served = self._read()
        Computer(served, self.limits.budget, self.limits.max_batch).warm_up()
        log.info("%s, ready after %.1f seconds", served, time.perf_counter() - start)
        return served


def _answer(job: Job, found: Ranked, explain: bool) -> Answer:
    answer: Answer = {"items": found, "dropped": job.dropped, "model": job.served.number}
    if explain:
        answer["history"] = compressed(job.served, together([job]))
    return answer
