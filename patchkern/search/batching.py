# SPDX-License-Identifier: Apache-2.0
"""Running a search over many users, in batches that fit into memory."""

from __future__ import annotations

import gc
import warnings
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import nn
from tqdm.auto import tqdm
from transformers import PretrainedConfig

from patchkern.batch.arguments import check_count
from patchkern.batch.expert_layout import expert_row_counts, without_old
from patchkern.batch.experts import Experts
from patchkern.batch.histories import Histories
from patchkern.batch.layout import PatchLayout
from patchkern.batch.memory_layout import MemoryRowCounts, memory_row_counts
from patchkern.batch.policies import ItemPatches, SessionPatches, TextOnly
from patchkern.batch.policy_kinds import AnyPolicy, check_policy
from patchkern.batch.preference_memory import PreferenceMemory
from patchkern.batch.row_counts import longest_history, row_counts
from patchkern.batch.sample_layout import build_layout
from patchkern.budget.search import SearchCost, SearchSize, UserTooLarge, parse_bytes
from patchkern.budget.search_plan import SearchPlan
from patchkern.search.experts import ExpertPrompts, UserStates
from patchkern.search.item_search import size_of_items
from patchkern.search.prompts import MemoryPrompts, SearchPrompts, layout_of
from patchkern.search.protocol import SearchModel
from patchkern.search.search_cost import search_cost
from patchkern.search.trie import Trie
from patchkern.search.trie_cache import catalog_trie

Users = NDArray[np.int64]
Batch = tuple[Users, "int | None"]
"""Users who are computed together, and how many rows of their prompts at once."""
T = TypeVar("T")


def in_batches(
    model: SearchModel,
    histories: Histories,
    policy: AnyPolicy,
    size: SearchSize,
    depth: int,
    begin: Callable[[Users], Callable[[SearchPrompts, int | None], T]],
    memory_budget: int | str | None = None,
    batch_size: int = 64,
    progress: bool = False,
    names: Sequence[Hashable] | None = None,
    head: str = "titles",
    user_states: UserStates | None = None,
) -> Iterator[tuple[Users, T]]:
    """Compute users of about equal length together, the longest first.

    Args:
        model, histories, policy, memory_budget, batch_size, progress: as in `recommend`.
        size: of the search.
        depth: tokens of the longest title with its ``response_end``.
        begin: called with the users of a batch while nobody waits for the model, so that it may ask another model; what
            it returns is called with their prompts, and the rows of a prompt to compute at once, while the model is
            ready for a search. Both are called again, with fewer users, where memory did not suffice; so they must
            leave nothing behind but what they return.
        names: what the users are called in errors; 0, 1, 2, ... where not given.
        head: what the prompts are for, as in `build_layout`.
        user_states: of users whose old items are compressed; computed where not given.

    Returns:
        The users of each batch, as indices into ``histories``, and what that returned for them: every user once.

    Raises:
        ValueError: a user whose prompt the model does not take, or who does not fit into the budget; it says how many
            items would, under which policy.
    """
    names = range(len(histories)) if names is None else names
    budget = None if memory_budget is None else parse_bytes("memory_budget", memory_budget)
    cost = None if budget is None else search_cost(model, size)
    plan = partial(plan_users, model, histories, policy, depth, names, cost, budget, batch_size, head)
    if budget is None and len(histories) <= batch_size:
        everybody = np.argsort(-histories.lengths, kind="stable")  # one batch, unless memory is too small for it
        waiting: deque[Batch] = deque([(everybody, None)][: len(histories)])
    else:
        waiting = deque(plan())
    most = batch_size
    with tqdm(total=len(histories), unit="user", disable=not progress) as bar:
        while waiting:
            users, chunk_rows = waiting.popleft()
            if users.size > most:
                waiting.extendleft((part, chunk_rows) for part in (users[most:], users[:most]))
                continue
            own, of_own = histories.take(users), [names[user] for user in users]
            failure = None
            with _naming(plan):
                prompts = _prompts_of(model, own, policy, head, user_states, of_own)
                layout = layout_of(prompts)
                has_drawn = users.size > 1 and not isinstance(policy, (Experts, PreferenceMemory))
                if cost is not None and budget is not None and has_drawn:
                    # a policy that draws at random may have drawn other rows than were planned for
                    needed = cost.needed(layout.num_users, layout.num_rows, layout.max_seqlen, chunk_rows)
                    if needed.peak > budget:
                        waiting.extendleft((part, chunk_rows) for part in np.array_split(users, 2)[::-1])
                        continue
                try:
                    found = _searched(model, layout, depth, partial(begin(users), prompts, chunk_rows))
                except Exception as error:
                    if not is_out_of_memory(error):
                        raise
                    if users.size == 1:
                        raise _alone(error, of_own[0], layout, chunk_rows) from error
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


def plan_users(
    model: SearchModel,
    histories: Histories,
    policy: AnyPolicy,
    depth: int,
    names: Sequence[Hashable],
    cost: SearchCost | None,
    memory_budget: int | str | None,
    batch_size: int,
    head: str = "titles",
) -> list[Batch]:
    """Every user in a batch, the longest first; with a ``cost`` in batches that fit into the budget.

    Raises:
        ValueError: naming the user whose prompt the model does not take, or who does not fit into the budget.
    """
    compressed = memory = None
    if isinstance(policy, Experts):
        rows = expert_row_counts(model.catalog, histories, policy, model.prompt, head)
        counts, compressed = rows.read, rows.compressed
    elif isinstance(policy, PreferenceMemory):
        memory = _memory_rows(model, histories, policy, head)
        counts = memory.read
    else:
        counts = row_counts(model.catalog, histories, policy, model.prompt)
        if head == "items":
            counts -= len(model.prompt.suffix)
    # what a model does not take is too long or empty
    for user in sorted({int(counts.argmax()), int(counts.argmin())}) if counts.size else ():
        try:
            for layout in _checked_layouts(model, histories.take([user]), policy, head):
                _searched(model, layout, depth, lambda: None)
        except ValueError as error:
            raise ValueError(f"{error} (user {names[user]!r})") from None
    if cost is None or memory_budget is None:
        order = np.argsort(-counts, kind="stable")
        return [(order[i : i + batch_size], None) for i in range(0, order.size, batch_size)]
    try:
        plan = cost.plan(
            counts if memory is None else memory, parse_bytes("memory_budget", memory_budget), batch_size, compressed
        )
    except UserTooLarge as error:
        raise _with_advice(error, model, histories, policy, names) from None
    return [(batch.users, batch.chunk_rows) for batch in plan.batches]


def _memory_rows(model: Any, histories: Histories, policy: PreferenceMemory, head: str) -> MemoryRowCounts:
    one_time = getattr(model, "one_time", False)
    return memory_row_counts(model.catalog, histories, policy, model.prompt, head, one_time=one_time)


@contextmanager
def _naming(plan: Callable[[], object]) -> Iterator[None]:
    """A batch is checked as a whole; where the model does not take it, ``plan`` finds and names the user."""
    try:
        yield
    except ValueError:
        plan()
        raise


def _prompts_of(
    model: SearchModel,
    histories: Histories,
    policy: AnyPolicy,
    head: str,
    states: UserStates | None = None,
    names: Sequence[Hashable] = (),
) -> SearchPrompts:
    """What a search of these users begins with."""
    if isinstance(policy, Experts) and without_old(histories, policy) is None:
        return ExpertPrompts(model, histories, policy, head, states, names)
    layout = build_layout(model.catalog, histories, policy, model.prompt, head=head)
    return layout if layout.vector_rows is None else MemoryPrompts(layout, histories, policy, states, names)


def _checked_layouts(model: SearchModel, history: Histories, policy: AnyPolicy, head: str) -> list[PatchLayout]:
    """What a model must take of a user."""
    prompts = _prompts_of(model, history, policy, head)
    read = [layout_of(prompts)]
    return [prompts.past(model), *read] if isinstance(prompts, ExpertPrompts) else read


def _searched(model: SearchModel, layout: PatchLayout, depth: int, compute: Callable[[], T]) -> T:
    """What a batch gives, computed while the model is ready for it: between batches others may use the model."""
    searching = model.searching()
    try:
        with searching:
            model.check_search(layout, depth)
            return compute()
    finally:
        searching.close()


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


def _alone(error: Exception, name: Hashable, layout: PatchLayout, chunk_rows: int | None) -> Exception:
    chunk = f", computed {chunk_rows} at a time" if chunk_rows is not None else ""
    message = (
        f"out of memory with user {name!r} alone, whose prompt has {layout.num_rows} rows{chunk}; keep fewer items "
        f"(max_items) or compress them more: {error}"
    )
    # not the error's own class: NumPy's cannot be made of a message
    kind = next((kind for kind in (torch.OutOfMemoryError, MemoryError) if isinstance(error, kind)), RuntimeError)
    return kind(message)


def _with_advice(
    error: UserTooLarge, model: SearchModel, histories: Histories, policy: AnyPolicy, names: Sequence[Hashable]
) -> UserTooLarge:
    """Name the user, and say what this user could have instead."""
    needs = str(error).replace(f"of user {error.user},", f"of user {names[error.user]!r},", 1)
    if isinstance(policy, PreferenceMemory):
        needs += "" if error.absorbing else "; behind a memory of smaller segments (block) prompts are shorter"
        return UserTooLarge(needs, error.user, error.needed, error.max_rows, error.absorbing)
    history = histories[error.user]
    policies: dict[str, AnyPolicy] = {"as text": TextOnly(None), "under ItemPatches(20)": ItemPatches(20, None)}
    policies["under SessionPatches(20)"] = SessionPatches(20, None)
    fitting = {
        name: longest_history(model.catalog, history, other, model.prompt, error.max_rows)
        for name, other in policies.items()
    }
    counts = ", ".join(f"{count} {name}" for name, count in fitting.items())
    message = f"{needs}. Of this user's {len(history)} items the latest {counts} would fit (max_items)"
    return UserTooLarge(message, error.user, error.needed, error.max_rows)


# ------------------------------------------------------------------ planning beforehand


def plan_memory(
    model_config: SearchModel | nn.Module | PretrainedConfig,
    row_counts: ArrayLike | MemoryRowCounts | Sequence[ArrayLike],
    budget: int | str | None,
    num_beams: int = 20,
    dtype: torch.dtype | None = None,
    *,
    policies: Sequence[AnyPolicy] | None = None,
    title_tokens: int | None = None,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    compressed: ArrayLike | None = None,
) -> SearchPlan:
    """Cut users into batches whose predicted peak stays within a budget; `patchkern.budget.search` has the formula.

    Args:
        model_config: a `PatchedCausalLM`, whose catalogue bounds what hypotheses hold; an `ItemModel`, which has no
            hypotheses; or a transformers causal LM, or its configuration.
        row_counts: ``(B,)`` rows of every user's prompt, from `patchkern.row_counts`; with ``policies`` one such array
            for each. Of users behind a memory, which is made before it is read, `patchkern.memory_row_counts`.
        budget: bytes, or a text such as "40GiB", for everything that torch allocates, weights included. None: no limit.
        num_beams: hypotheses per user.
        dtype: of weights and activations; the configuration's where not given.
        policies: to choose from, finest first: the plan is for the first with which every user fits.
        title_tokens: of the longest title with its response end, 32 where not given; not for a `PatchedCausalLM`.
        batch_size: users in one batch, at most; None: no limit but the budget.
        device: where the search runs; the model's, or the CPU for a configuration, where not given.
        compressed: ``(B,)`` rows of every user that are computed for experts and dropped, with ``row_counts`` those
            that are left, both from `patchkern.expert_row_counts`; not with ``policies``. Who is kept in a
            `patchkern.UserStates` has none of them.

    Raises:
        TypeError, ValueError: naming the argument; a `RecurrentMemory` and rows of prompts alone; a user who does not
            fit alone, with what would be needed.

    Examples:
        A model in the shape of Llama-7B, on a card of 80 GB, and 500 users whose prompts take 900 rows each.

        >>> import torch
        >>> import patchkern as pk
        >>> from transformers import LlamaConfig
        >>> plan = pk.plan_memory(LlamaConfig(), [900] * 500, "70GiB", dtype=torch.bfloat16, device="cuda")
        >>> plan  # doctest: +ELLIPSIS
        SearchPlan(7 batches of up to ... users, peak 6... GiB, budget 70.00 GiB)
    """
    budget = None if budget is None else parse_bytes("budget", budget)
    check_count("num_beams", num_beams, minimum=1)
    if batch_size is not None:
        check_count("batch_size", batch_size, minimum=1)
    if not isinstance(model_config, (nn.Module, PretrainedConfig)):
        raise TypeError(f"model_config: expected a model or its configuration, got {type(model_config).__name__}")
    cost = SearchCost(model_config, _size(model_config, num_beams, title_tokens), dtype, device)
    if policies is None:
        if isinstance(row_counts, MemoryRowCounts):
            return cost.plan(_checked_memory(row_counts, compressed), budget, batch_size)
        if hasattr(model_config, "prompt_vectors"):
            raise ValueError(
                f"row_counts: expected those of memory_row_counts for {type(model_config).__name__}, which absorbs "
                f"items before it reads a prompt, got {type(row_counts).__name__}"
            )
        every = _counts("row_counts", row_counts)
        aside = None if compressed is None else _counts("compressed", compressed)
        if aside is not None and aside.size != every.size:
            raise ValueError(f"compressed: expected one per user ({every.size}), got {aside.size}")
        return cost.plan(every, budget, batch_size, aside)
    if compressed is not None:
        raise ValueError("compressed: expected None with policies, whose rows are all kept")
    of_policies: Sequence[ArrayLike] = row_counts  # type: ignore[assignment]
    if not policies or len(policies) != len(of_policies):
        raise ValueError(f"policies: expected one for each of {len(of_policies)} row_counts, got {len(policies)}")
    for policy, counts in zip(policies, of_policies, strict=True):
        check_policy(policy)
        try:
            plan = cost.plan(_counts("row_counts", counts), budget, batch_size)
        except UserTooLarge as error:
            too_large = error
        else:
            return replace(plan, policy=policy)
    raise too_large


def _checked_memory(rows: MemoryRowCounts, compressed: Any) -> MemoryRowCounts:
    if compressed is not None:
        raise ValueError("compressed: expected None with the rows of a memory, which have what is absorbed")
    parts = [_counts(f"row_counts.{name}", getattr(rows, name)) for name in ("read", "absorbed", "vectors")]
    if len({part.size for part in parts}) > 1:
        raise ValueError(f"row_counts: expected as many of each kind, got {', '.join(str(x.size) for x in parts)}")
    return MemoryRowCounts(parts[0], parts[1], parts[2], bool(rows.one_time))


def _size(model: Any, num_beams: int, title_tokens: int | None) -> SearchSize:
    if hasattr(model, "catalog"):
        if title_tokens is not None:
            raise ValueError(f"title_tokens: expected None, because the model knows its titles, got {title_tokens!r}")
        if "titles" not in model.learns:
            return size_of_items(model, None, None)
        return size_of_beams(catalog_trie(model.catalog, model.prompt.response_end, model.device), num_beams)
    title_tokens = 32 if title_tokens is None else title_tokens
    check_count("title_tokens", title_tokens, minimum=1)
    return SearchSize(num_beams, num_beams * (title_tokens - 1), user_logits=1)


def size_of_beams(trie: Trie, num_beams: int) -> SearchSize:
    """Of a beam search in a tree of titles, over the whole catalogue."""
    return SearchSize(num_beams, trie.live_rows(num_beams), 0, trie.num_bytes, user_logits=1)


def _counts(name: str, values: Any) -> NDArray[np.int64]:
    counts = np.asarray(values)
    if counts.ndim != 1 or (counts.size and (counts.dtype.kind not in "iu" or counts.min() < 0)):
        raise ValueError(f"{name}: expected a 1-D array of integers, got {counts.dtype} of shape {counts.shape}")
    return counts.astype(np.int64)
