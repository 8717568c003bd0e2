# SPDX-License-Identifier: Apache-2.0
"""Small catalogues, random ragged batches and what the oracle says about them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import oracle
import torch
from hypothesis import strategies as st

import patchkern as pk

VOCABULARY = 97
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
NO_PROMPT = oracle.Parts([], [], [], [])
PROMPT = oracle.Parts(prefix=[90, 91], separator=[92], suffix=[93, 94, 95], response_end=[96])


@dataclass
class Batch:
    """One call of `build_layout`: plain Python on one side, patchkern's arguments on the other."""

    titles: dict[Any, oracle.Title]  # item id -> token ids, in catalogue order
    histories: list[list[Any]]
    policy: Any
    prompt: oracle.Parts = field(default_factory=lambda: PROMPT)
    targets: list[Any] | None = None

    @property
    def catalog(self) -> pk.Catalog:
        return make_catalog(self.titles)

    def arguments(self) -> tuple[Any, ...]:
        return self.catalog, self.histories, self.policy, make_prompt(self.prompt), self.targets

    def layout(self, device: torch.device | str = "cpu", **options: Any) -> pk.PatchLayout:
        return pk.build_layout(*self.arguments(), **options).to(device)

    def users(self) -> list[oracle.User]:
        """The oracle's packed batch, one entry per user."""
        kept = [oracle.cut(history, self.policy.max_items) for history in self.histories]
        drawn = iter(self._random_choices(kept))
        users = []
        for number, history in enumerate(kept):
            entries = oracle_entries(self.policy, len(history), drawn)
            target = None if self.targets is None else self.titles[self.targets[number]]
            users.append(oracle.user_rows([self.titles[item] for item in history], entries, self.prompt, target))
        return users

    def rows(self) -> list[oracle.Row]:
        return [row for user in self.users() for row in user.rows]

    def _random_choices(self, kept: list[list[Any]]) -> list[bool]:
        """What a random policy drew; a draw cannot be predicted, only that it is what the layout shows."""
        if not isinstance(self.policy, pk.RandomItemPatches):
            return []
        return [bool(level) for level in self.policy.levels(pk.Histories.from_sequences(kept))]


def oracle_entries(policy: Any, length: int, drawn: Iterator[bool] | None = None) -> list[oracle.Entry]:
    """What the oracle makes of `length` items; `drawn` says of a random policy which are patches."""
    if isinstance(policy, pk.TextOnly):
        return oracle.text_only(length)
    if isinstance(policy, pk.ItemPatches):
        return oracle.item_patches(length, policy.keep_text)
    if isinstance(policy, pk.SessionPatches):
        rule = {"end": oracle.session_patches_end, "start": oracle.session_patches_start}[policy.align]
        kept = (policy.group_size if kept is None else kept for kept in (policy.keep_text, policy.keep_items))
        return rule(length, policy.group_size, *kept)
    assert drawn is not None
    return oracle.chosen_patches([next(drawn) for _ in range(length)])


def make_catalog(titles: dict[Any, oracle.Title]) -> pk.Catalog:
    lengths = [len(title) for title in titles.values()]
    tokens = [token for title in titles.values() for token in title]
    return pk.Catalog.from_token_ids(
        np.asarray(tokens, np.int32), np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32), list(titles)
    )


def make_prompt(parts: oracle.Parts) -> pk.Prompt:
    return pk.Prompt(
        prefix=parts.prefix, separator=parts.separator, suffix=parts.suffix, response_end=parts.response_end
    )


def make_titles(n_items: int, seed: int = 0, longest: int = 9, ids: str = "int") -> dict[Any, oracle.Title]:
    """Titles of 1..longest tokens; some share tokens, some are one token, two are equal."""
    rng = np.random.default_rng(seed)
    gaps = np.cumsum(rng.integers(1, 50, n_items)) * 3 - 20
    titles = {}
    for number in range(n_items):
        name: Any = {"int": number, "gaps": int(gaps[number]), "str": f"item/{gaps[number]}"}[ids]
        titles[name] = rng.integers(0, VOCABULARY - 10, rng.integers(1, longest + 1)).tolist()
    names = list(titles)
    if n_items >= 4:
        titles[names[1]] = [5]
        titles[names[2]] = [7, 7, 8]
        titles[names[3]] = list(titles[names[0]])
    return titles


def make_histories(titles: dict[Any, Any], lengths: Sequence[int], seed: int = 0) -> list[list[Any]]:
    rng = np.random.default_rng(seed)
    names = list(titles)
    return [[names[i] for i in rng.integers(0, len(names), length)] for length in lengths]


def make_batch(policy: Any, lengths: Sequence[int], with_targets: bool = True, seed: int = 0, **parts: Any) -> Batch:
    titles = make_titles(23, seed)
    histories = make_histories(titles, lengths, seed)
    targets = [list(titles)[(7 * user) % 23] for user in range(len(lengths))] if with_targets else None
    return Batch(titles, histories, policy, targets=targets, **parts)


def rows_before(layout: pk.PatchLayout, span: int) -> list[int]:
    """The rows that a span sees besides its own, in the order of their positions."""
    if layout.ranges is None:
        return []
    return [row for begin, end in layout.ranges[span].tolist() for row in range(begin, end)]


def make_weight(
    rows: int,
    width: int,
    dtype: torch.dtype = torch.float32,
    strided: bool = False,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """(rows, width) normal values; `strided` makes it a column slice of a wider matrix."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randn(rows, width + (7 if strided else 0), generator=generator, dtype=torch.float64)
    wide = wide.to(device, dtype)
    return wide[:, 3 : 3 + width] if strided else wide


def interpreted(backend: str) -> bool:
    """Whether Triton's kernels run in its interpreter, at about a millisecond per row: tests give them less to do."""
    return backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"


def truncates(backend: str, dtype: torch.dtype) -> bool:
    """Triton's interpreter makes a bfloat16 by cutting off half of a float32, where everything else rounds."""
    return interpreted(backend) and dtype == torch.bfloat16


# ------------------------------------------------------------------ random batches

POLICIES = {
    "text": pk.TextOnly(max_items=None),
    "text-cut": pk.TextOnly(max_items=7),
    "items": pk.ItemPatches(keep_text=5, max_items=None),
    "items-all": pk.ItemPatches(keep_text=0, max_items=None),
    "items-cut": pk.ItemPatches(keep_text=3, max_items=10),
    "sessions-end": pk.SessionPatches(group_size=5, max_items=None),
    "sessions-end-cut": pk.SessionPatches(group_size=3, max_items=20),
    "sessions-start": pk.SessionPatches(group_size=5, max_items=None, align="start"),
    "sessions-start-cut": pk.SessionPatches(group_size=4, max_items=30, align="start"),
    "sessions-of-one": pk.SessionPatches(group_size=1, max_items=None),
    "sessions-no-text": pk.SessionPatches(group_size=4, max_items=None, align="start", keep_text=0),
    "random": pk.RandomItemPatches(probability=0.3, max_items=None),
    "random-none": pk.RandomItemPatches(probability=0.0),
    "random-all": pk.RandomItemPatches(probability=1.0),
}


def policies() -> st.SearchStrategy[Any]:
    max_items = st.none() | st.integers(1, 60)
    return st.one_of(
        st.builds(pk.TextOnly, max_items=max_items),
        st.builds(pk.ItemPatches, keep_text=st.integers(0, 12), max_items=max_items),
        st.builds(
            pk.SessionPatches,
            group_size=st.integers(1, 12),
            max_items=max_items,
            align=st.sampled_from(["end", "start"]),
            keep_text=st.none() | st.integers(0, 12),
            keep_items=st.none() | st.integers(0, 12),
        ),
        st.builds(
            pk.RandomItemPatches,
            probability=st.floats(0, 1),
            max_items=max_items,
            seed=st.integers(0, 2**32),
        ),
    )


def token_lists(smallest: int, largest: int) -> st.SearchStrategy[list[int]]:
    """Of a prompt: tokens that `make_titles` leaves to it."""
    return st.lists(st.integers(VOCABULARY - 10, VOCABULARY - 1), min_size=smallest, max_size=largest)


@st.composite
def batches(draw: st.DrawFn, longest_history: int = 60) -> Batch:
    """Any batch: 0 to 6 users of 0 to `longest_history` items, integer or string ids, any policy and prompt."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1), label="content seed"))
    ids = draw(st.sampled_from(["int", "gaps", "str"]))
    titles = make_titles(draw(st.integers(1, 30)), int(rng.integers(2**31)), draw(st.integers(1, 12)), ids)
    lengths = draw(st.lists(st.integers(0, 8) | st.integers(0, longest_history), max_size=6))
    with_targets = draw(st.booleans())
    prompt = oracle.Parts(
        draw(token_lists(0, 3)), draw(token_lists(0, 2)), draw(token_lists(0, 3)), draw(token_lists(0, 2))
    )
    names = list(titles)
    histories = [[names[i] for i in rng.integers(0, len(names), length)] for length in lengths]
    targets = [names[i] for i in rng.integers(0, len(names), len(lengths))] if with_targets else None
    return Batch(titles, histories, draw(policies()), prompt, targets)
