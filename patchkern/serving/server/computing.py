# SPDX-License-Identifier: Apache-2.0
"""Lists for jobs that can be computed together, in as few calls as the memory allows."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

from patchkern.batch.histories import Histories
from patchkern.budget.search import SearchCost
from patchkern.search.batching import plan_users
from patchkern.search.recommend import Prepared, prepare, run
from patchkern.search.request import Request
from patchkern.serving.server.jobs import Job, Options, Ranked
from patchkern.serving.server.problems import Invalid
from patchkern.serving.server.served import Served
from patchkern.serving.stores.protocol import StoreError

log = logging.getLogger(__name__)


class Batch(NamedTuple):
    """Jobs for one call.

    Attributes:
        jobs: of one group.
        chunked: whether their prompts must be computed in parts to stay within the budget.
    """

    jobs: list[Job]
    chunked: bool = False


class Computer:
    """Computes for one model, on one thread.

    What a search costs is counted once and kept; `recommend` with a ``memory_budget`` would count it in each call.

    Args:
        served: the model.
        budget: bytes for everything that torch allocates; None: no limit.
        max_batch: users in one call, at most.

    Attributes:
        served: as given.
    """

    def __init__(self, served: Served, budget: int | None, max_batch: int) -> None:
        self.served, self._budget, self._max_batch = served, budget, max_batch
        self._costs: dict[Options, SearchCost] = {}
        self._taken: dict[Options, tuple[int, int, int]] = {}  # fewest and most rows that were tried, most compressed

    def warm_up(self) -> None:
        """Do once what is slow the first time, such as the tree of titles; here fails what cannot be searched."""
        catalog = self.served.model.catalog
        one = catalog.item_ids[:1]
        for search in self.served.searches:
            job = Job(
                self.served, Options(search, 1, 1, False, False, False, True), one, np.zeros(one.size), None, None, 0
            )
            for _, problem in self.refused([job]):
                raise problem
            self.lists(Batch([job]))

    def refused(self, jobs: Sequence[Job]) -> list[tuple[Job, Invalid]]:
        """Those of the jobs of one group whose prompt the model does not take, or the budget has no room for.

        Of the others it is known how many rows they have.
        """
        refused = self._count(jobs)
        lacking = {id(job) for job, _ in refused}
        for job in jobs:
            if id(job) not in lacking and (problem := self._tried(job)):
                refused.append((job, problem))
        return refused

    def _count(self, jobs: Sequence[Job]) -> list[tuple[Job, Invalid]]:
        """Note the rows of the jobs' prompts; those that have none, for policies that go by time or by rows."""
        try:
            rows = self.served.rows(together(jobs), jobs[0].options.search)
        except (TypeError, ValueError) as error:
            if len(jobs) > 1:
                return [refused for job in jobs for refused in self._count([job])]
            field = "timestamps" if "timestamps" in str(error) else "history"
            return [(jobs[0], Invalid(str(error).removeprefix("histories: "), (*jobs[0].loc, field)))]
        for job, count, compressed in zip(jobs, *(counts.tolist() for counts in rows), strict=True):
            job.rows, job.compressed = count, compressed
        return []

    def _tried(self, job: Job) -> Invalid | None:
        """Why a search over the job's prompt would fail, if it would.

        What is between a prompt that was taken and a longer one is taken too, so that few are tried.
        """
        kind = _kind(job.options)
        shortest, longest, most = self._taken.get(kind, (job.rows, job.rows - 1, 0))
        if shortest <= job.rows <= longest and job.compressed <= most:
            return None
        request = self._request([job], None)
        prepared = prepare(request)
        cost = self._cost(job.options, prepared)
        names, policy, room = request.names, request.policy, self._room(job.options)
        try:
            plan_users(request.model, request.histories, policy, prepared.depth, names, cost, room, 1, prepared.head)
        except ValueError as error:
            return Invalid(_without_name(error, names[0]), (*job.loc, "history"))
        self._taken[kind] = min(shortest, job.rows), max(longest, job.rows), max(most, job.compressed)
        return None

    def batches(self, jobs: Sequence[Job]) -> list[Batch]:
        """The jobs of one group, none of which was `refused`, in batches that fit into the budget."""
        room = self._room(jobs[0].options)
        if room is None:
            return [Batch(list(jobs[i : i + self._max_batch])) for i in range(0, len(jobs), self._max_batch)]
        cost = self._costs[_kind(jobs[0].options)]
        rows, compressed = np.array([(job.rows, job.compressed) for job in jobs]).T
        items = np.array([job.items.size for job in jobs])
        counts, aside = self.served.planned(rows, compressed, items)
        plan = cost.plan(counts, room, self._max_batch, aside)
        return [Batch([jobs[user] for user in x.users.tolist()], x.chunk_rows is not None) for x in plan.batches]

    def lists(self, batch: Batch) -> list[Ranked]:
        """What `recommend` gives each job, in one call, with titles."""
        request = self._request(batch.jobs, self._room(batch.jobs[0].options) if batch.chunked else None)
        if request.user_states is not None and not self._update(request):
            request.user_states = None
        found, _ = run(request, prepare(request))
        places = self.served.model.catalog.find([item for one in found for item, _ in one]).tolist()
        titles = iter([self.served.titles[place] for place in places])
        return [[{"item": item, "title": next(titles), "score": score} for item, score in one] for one in found]

    def _update(self, request: Request) -> bool:
        """Keep what is compressed of the users; whether that can be read. Without it lists are the same, and later."""
        together = self._max_batch if self._budget is None else 1  # which is what the budget has room for beside it
        try:
            request.user_states.update(request.names, request.histories, batch_size=together)
        except StoreError as error:
            log.warning("users are compressed anew: %s", error)
            return False
        return True

    def _request(self, jobs: Sequence[Job], budget: int | None) -> Request:
        options, served = jobs[0].options, self.served
        return Request(
            served.model,
            together(jobs),
            served.policy,
            options.k,
            options.num_beams,
            options.search,
            options.exclude_seen,
            budget,
            len(jobs),
            allowed_items=[job.allowed for job in jobs] if options.chooses else None,
            length_penalty=0.0,
            normalize=None,
            prior=served.priors.prior or None,
            prior_weight=served.priors.weight or 1.0,
            max_expansions=None,
            user_cache=served.cache if options.named else None,
            user_states=served.states if options.named else None,
            user_ids=[job.user_id for job in jobs],
            short="allow",
            unknown="error",
            progress=False,
        )

    def _room(self, options: Options) -> int | None:
        """The budget, less what is kept for others: a search that uses the prompts that are kept counts them itself."""
        if self._budget is None or self.served.cache is None or options.named:
            return self._budget
        return max(self._budget - self.served.cache.max_bytes, 1)

    def _cost(self, options: Options, prepared: Prepared) -> SearchCost | None:
        if self._budget is None:
            return None
        kind = _kind(options)
        if kind not in self._costs:
            self._costs[kind] = SearchCost(self.served.model, prepared.size)
        return self._costs[kind]


def _kind(options: Options) -> Options:
    """The part that memory depends on."""
    return options._replace(k=0, timed=False)


def together(jobs: Sequence[Job]) -> Histories:
    """Their histories, one after the other; all have timestamps or none has."""
    times = [job.times for job in jobs if job.times is not None]
    offsets = np.cumsum([0, *(job.items.size for job in jobs)])
    return Histories(np.concatenate([job.items for job in jobs]), offsets, np.concatenate(times) if times else None)


def _without_name(error: Exception, name: Hashable) -> str:
    text = str(error).removeprefix("histories: ")
    return text.replace(f" (user {name!r})", "").replace(f"user {name!r}", "this user")
