# SPDX-License-Identifier: Apache-2.0
"""Running a search over many users, in batches that fit into memory."""

from __future__ import annotations

import gc
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm.auto import tqdm

from patchkern.batch.histories import Histories
from patchkern.batch.layout import PatchLayout
from patchkern.batch.policies import AnyPolicy, ItemPatches, SessionPatches, TextOnly
from patchkern.batch.sample_layout import build_layout
from patchkern.budget.search import MemoryModel, SearchSize, UserTooLarge, longest_history, parse_bytes, row_counts
from patchkern.search.prompts import check_spans

if TYPE_CHECKING:
    from patchkern.models.patched_lm import PatchedCausalLM

Users = NDArray[np.int64]
Waiting = deque[tuple[Users, "int | None"]]
T = TypeVar("T")


def in_batches(
    model: PatchedCausalLM,
    histories: Histories,
    policy: AnyPolicy,
    size: SearchSize,
    depth: int,
    compute: Callable[[Users, PatchLayout, int | None], T],
    memory_budget: int | str | None = None,
    batch_size: int = 64,
    progress: bool = False,
) -> Iterator[tuple[Users, T]]:
    """Run ``compute`` on users of about equal length together, the longest first.

    Args:
        model, histories, policy, memory_budget, batch_size, progress: as in `patchkern.search.recommend.recommend`.
        size: of the search.
        depth: tokens of the longest title with its ``response_end``.
        compute: called with the users of a batch, their prompts, and the rows of a prompt to compute at once. It is
            called again, with fewer users, where memory did not suffice; so it must leave nothing behind but what it
            returns.

    Returns:
        The users of each batch, as indices into ``histories``, and what ``compute`` returned for them: every user once.

    Raises:
        ValueError: a user who does not fit into the budget; it says how many items would, under which policy.
    """
    counts = row_counts(model.catalog, histories, policy, model.prompt)
    if memory_budget is None:
        memory, budget = None, 0
        order = np.argsort(-counts, kind="stable")
        waiting: Waiting = deque((order[i : i + batch_size], None) for i in range(0, order.size, batch_size))
    else:
        memory, budget = MemoryModel(model, size), parse_bytes("memory_budget", memory_budget)
        try:
            plan = memory.plan(counts, budget, batch_size)
        except UserTooLarge as error:
            raise _with_advice(error, model, histories) from None
        waiting = deque((batch.users, batch.chunk_rows) for batch in plan.batches)
    most = batch_size
    with tqdm(total=len(histories), unit="user", disable=not progress) as bar:
        while waiting:
            users, chunk_rows = waiting.popleft()
            if users.size > most:
                waiting.extendleft((part, chunk_rows) for part in (users[most:], users[:most]))
                continue
            layout = build_layout(model.catalog, histories.take(users), policy, model.prompt)
            check_spans(model, layout, depth)
            if memory is not None and users.size > 1:
                # a policy that draws at random may have drawn other rows than were planned for
                needed = memory.needed(layout.num_users, layout.num_rows, layout.max_seqlen, chunk_rows)
                if needed.peak > budget:
                    waiting.extendleft((part, chunk_rows) for part in np.array_split(users, 2)[::-1])
                    continue
            failure = None
            try:
                found = compute(users, layout, chunk_rows)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if users.size == 1:
                    raise _alone(error, users, layout, chunk_rows) from error
                failure = str(error).partition("\n")[0]
            if failure is None:
                yield users, found
                bar.update(users.size)
                continue
            # what the failed call still holds must be gone first: its frames hang on the exception, which is gone here
            _free(model.device)
            most = users.size // 2
            warnings.warn(
                f"out of memory with {users.size} users at once, going on with {most}: {failure}", stacklevel=3
            )
            waiting.appendleft((users, chunk_rows))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or on the CPU."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    texts = ("out of memory", "not enough memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in texts)


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _alone(error: Exception, users: Users, layout: PatchLayout, chunk_rows: int | None) -> Exception:
    chunk = f", computed {chunk_rows} at a time" if chunk_rows is not None else ""
    message = (
        f"out of memory with user {users[0]} alone, whose prompt has {layout.num_rows} rows{chunk}; keep fewer items "
        f"(max_items) or compress them more: {error}"
    )
    return type(error)(message) if isinstance(error, (MemoryError, torch.OutOfMemoryError)) else RuntimeError(message)


def _with_advice(error: UserTooLarge, model: PatchedCausalLM, histories: Histories) -> UserTooLarge:
    """Say what this user could have instead."""
    history = histories[error.user]
    names: dict[str, AnyPolicy] = {"as text": TextOnly(None), "under ItemPatches(20)": ItemPatches(20, None)}
    names["under SessionPatches(20)"] = SessionPatches(20, None)
    fitting = {
        name: longest_history(model.catalog, history, policy, model.prompt, error.max_rows)
        for name, policy in names.items()
    }
    counts = ", ".join(f"{count} {name}" for name, count in fitting.items())
    message = f"{error}. Of this user's {len(history)} items the latest {counts} would fit (max_items)"
    return UserTooLarge(message, error.user, error.needed, error.max_rows)
