# SPDX-License-Identifier: Apache-2.0
"""`build_layout` against the loops of oracle.py: every row, position, label and count of the packed batch."""

from __future__ import annotations

import pickle
from typing import Any

import cases
import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import patchkern as pk
from patchkern.batch import planning

# Every length at which some policy's borders move, and long ones.
LENGTHS = [0, 1, 2, 3, 4, 5, 6, 9, 10, 11, 14, 15, 16, 23, 24, 25, 26, 99, 100, 101, 499, 500]


def assert_layout(layout: pk.PatchLayout, users: list[oracle.User], with_targets: bool) -> None:
    """Every public field of `layout` equals what the oracle's users say."""
    rows = [row for user in users for row in user.rows]
    lengths = [len(user.rows) for user in users]
    assert oracle.decode(layout) == [user.rows for user in users]

    assert layout.num_users == len(users)
    assert layout.num_rows == len(rows) == layout.lo.numel() == layout.hi.numel()
    assert layout.cu_seqlens.tolist() == [sum(lengths[:user]) for user in range(len(users) + 1)]
    assert layout.max_seqlen == max(lengths, default=0) and isinstance(layout.max_seqlen, int)
    assert layout.position_ids.tolist() == [position for length in lengths for position in range(length)]
    assert layout.prefix is None
    for name in ("lo", "hi", "items", "token_ids", "offsets", "title_index", "cu_seqlens"):
        assert getattr(layout, name).dtype == torch.int32, name
    assert layout.position_ids.dtype == torch.int64

    if with_targets:
        labels = [label for user in users for label in user.labels]
        assert layout.labels is not None and layout.labels.dtype == torch.int64
        assert layout.labels.tolist() == labels
        supervised = [row for row, label in enumerate(labels) if label != oracle.IGNORE]
        assert layout.logit_rows is not None and layout.logit_rows.dtype == torch.int64
        assert layout.logit_labels is not None and layout.logit_labels.dtype == torch.int64
        assert layout.logit_rows.tolist() == [row - 1 for row in supervised]
        assert layout.logit_labels.tolist() == [labels[row] for row in supervised]
    else:
        assert layout.labels is None and layout.logit_rows is None and layout.logit_labels is None

    assert layout.history_tokens == sum(user.title_tokens for user in users)
    assert layout.history_rows == sum(user.history_rows for user in users)
    if layout.history_rows:
        assert layout.compression_ratio == pytest.approx(oracle.compression_ratio(users), rel=1e-12)
    assert layout.max_token_id >= max((token for row in rows for title in row for token in title), default=-1)


def assert_transpose(transpose: pk.Transpose, rows: list[oracle.Row]) -> None:
    expected = oracle.contributions(rows)
    tokens, offsets = transpose.tokens.tolist(), transpose.offsets.tolist()
    for name in ("tokens", "offsets", "rows", "divisors"):
        assert getattr(transpose, name).dtype == torch.int32, name
    assert tokens == sorted({token for token, _, _ in expected})
    assert offsets[0] == 0 and offsets[-1] == len(expected)
    assert len(offsets) == len(tokens) + 1
    got = [
        (token, row, divisor)
        for token, start, end in zip(tokens, offsets[:-1], offsets[1:], strict=True)
        for row, divisor in zip(transpose.rows[start:end].tolist(), transpose.divisors[start:end].tolist(), strict=True)
    ]
    # Equal (token, row) pairs may come in any order of divisors; everything else is fixed.
    assert [(token, row) for token, row, _ in got] == [(token, row) for token, row, _ in expected]
    assert sorted(got) == expected


# ------------------------------------------------------------------ three batches written out by hand

HAND_TITLES: dict[Any, oracle.Title] = {10: [1, 2], 20: [3], 30: [4, 5, 6], 40: [1, 3]}
HAND_PROMPT = oracle.Parts(prefix=[50], separator=[60], suffix=[70, 71], response_end=[80])


def _hand(policy: Any, histories: list[list[int]], targets: list[int] | None) -> pk.PatchLayout:
    return cases.Batch(HAND_TITLES, histories, policy, HAND_PROMPT, targets).layout()


def test_by_hand_text(planner: str) -> None:
    layout = _hand(pk.TextOnly(), [[10, 20]], [30])
    assert oracle.decode(layout) == [
        [[[50]], [[1]], [[2]], [[60]], [[3]], [[70]], [[71]], [[4]], [[5]], [[6]], [[80]]],
    ]
    assert layout.lo.tolist() == [-51, -2, -3, -61, -4, -71, -72, -5, -6, -7, -81]
    assert layout.hi.tolist() == [0] * 11
    assert layout.labels is not None and layout.logit_rows is not None and layout.logit_labels is not None
    assert layout.labels.tolist() == [-100] * 7 + [4, 5, 6, 80]
    assert layout.logit_rows.tolist() == [6, 7, 8, 9]
    assert layout.logit_labels.tolist() == [4, 5, 6, 80]
    assert layout.compression_ratio == 1.0


def test_by_hand_item_patches(planner: str) -> None:
    layout = _hand(pk.ItemPatches(keep_text=1), [[10, 30, 20], [], [40]], None)
    assert oracle.decode(layout) == [
        [[[50]], [[1, 2]], [[60]], [[4, 5, 6]], [[60]], [[3]], [[70]], [[71]]],
        [[[50]], [[70]], [[71]]],
        [[[50]], [[1]], [[3]], [[70]], [[71]]],
    ]
    assert layout.cu_seqlens.tolist() == [0, 8, 11, 16]
    assert layout.max_seqlen == 8
    assert layout.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 0, 1, 2, 3, 4]
    assert layout.labels is None
    # 2 + 3 + 1 tokens on 3 rows, and 2 tokens on 2 rows.
    assert (layout.history_tokens, layout.history_rows) == (8, 5)
    assert layout.compression_ratio == 8 / 5


def test_by_hand_session_patches(planner: str) -> None:
    # Five items in groups of two: text 3 and 4, patches 1 and 2, and the short oldest session [0, 1).
    history = [10, 20, 30, 40, 20]
    by_two = _hand(pk.SessionPatches(group_size=2), [history], [10])
    assert oracle.decode(by_two) == [
        [
            *([[50]], [[1, 2]], [[60]], [[3]], [[60]], [[4, 5, 6]], [[60]], [[1]], [[3]], [[60]], [[3]]),
            *([[70]], [[71]], [[1]], [[2]], [[80]]),
        ]
    ]
    # Seven items in groups of two: sessions [0, 1) and [1, 3), one separator after each.
    by_two = _hand(pk.SessionPatches(group_size=2), [[10, 40, 30, *history[1:]]], None)
    assert oracle.decode(by_two) == [
        [
            *([[50]], [[1, 2]], [[60]], [[1, 3], [4, 5, 6]], [[60]], [[3]], [[60]], [[4, 5, 6]], [[60]]),
            *([[1]], [[3]], [[60]], [[3]], [[70]], [[71]]),
        ]
    ]
    assert (by_two.history_tokens, by_two.history_rows) == (14, 7)


def test_by_hand_transpose(planner: str) -> None:
    # Rows 0..3: the patches of [1, 2], [3] and [2, 2], then the literal 1.
    titles: dict[Any, oracle.Title] = {0: [1], 1: [1, 2], 2: [3], 3: [2, 2]}
    batch = cases.Batch(titles, [[1, 2, 3, 0]], pk.ItemPatches(keep_text=1), cases.NO_PROMPT)
    transpose = batch.layout(transpose=True).transpose
    assert transpose is not None
    assert transpose.tokens.tolist() == [1, 2, 3]
    assert transpose.offsets.tolist() == [0, 2, 5, 6]
    assert transpose.rows.tolist() == [0, 3, 0, 2, 2, 1]
    assert transpose.divisors.tolist() == [2, 1, 2, 2, 2, 1]


# ------------------------------------------------------------------ against the oracle


@pytest.mark.parametrize("name", cases.POLICIES)
@pytest.mark.parametrize("with_targets", [False, True], ids=["no-targets", "targets"])
def test_every_policy_on_hard_lengths(planner: str, name: str, with_targets: bool) -> None:
    batch = cases.make_batch(cases.POLICIES[name], LENGTHS, with_targets)
    assert_layout(batch.layout(), batch.users(), with_targets)


@pytest.mark.parametrize("align", ["end", "start"])
@pytest.mark.parametrize("group_size", [1, 2, 5, 20])
def test_sessions_of_every_length_to_500(planner: str, align: str, group_size: int) -> None:
    titles: dict[Any, oracle.Title] = {item: [item] for item in range(500)}
    policy = pk.SessionPatches(group_size=group_size, max_items=None, align=align)
    histories = [list(range(length)) for length in range(501)]
    batch = cases.Batch(titles, histories, policy, cases.NO_PROMPT)
    # One-token titles without a prompt: a row is the list of its items.
    for length, rows in enumerate(oracle.decode(batch.layout())):
        entries = cases.oracle_entries(policy, length)
        assert rows == [[[i] for i in positions] for _, positions in entries], length


@settings(max_examples=200)
@given(batch=cases.batches())
def test_random_ragged_batches(planner: str, batch: cases.Batch) -> None:
    assert_layout(batch.layout(), batch.users(), batch.targets is not None)


@settings(max_examples=100)
@given(batch=cases.batches(longest_history=30))
def test_transpose_of_random_ragged_batches(planner: str, batch: cases.Batch) -> None:
    transpose = batch.layout(transpose=True).transpose
    assert transpose is not None
    assert_transpose(transpose, batch.rows())


def test_transpose_comes_with_targets_and_on_request() -> None:
    without = cases.make_batch(cases.POLICIES["sessions-end"], [3, 20], with_targets=False)
    assert without.layout().transpose is None
    later = without.layout().with_transpose().transpose
    at_once = without.layout(transpose=True).transpose
    assert later is not None and at_once is not None
    for name in ("tokens", "offsets", "rows", "divisors"):
        assert torch.equal(getattr(later, name), getattr(at_once, name))
    with_targets = cases.make_batch(cases.POLICIES["sessions-end"], [3, 20])
    assert with_targets.layout().transpose is not None
    assert with_targets.layout(transpose=False).transpose is None


# ------------------------------------------------------------------ the worked examples of the definition


def _kinds(policy: pk.SessionPatches, length: int) -> list[tuple[str, int, int]]:
    """(kind, first item, one past the last) per entry, read from a layout of two-token titles."""
    titles: dict[Any, oracle.Title] = {item: [2 * item, 2 * item + 1] for item in range(length)}
    rows = oracle.decode(cases.Batch(titles, [list(range(length))], policy, cases.NO_PROMPT).layout())[0]
    kinds: list[tuple[str, int, int]] = []
    for row in rows:
        items = [title[0] // 2 for title in row]
        if len(row[0]) == 1:
            if row[0][0] % 2 == 0:
                kinds.append(("text", items[0], items[0] + 1))
        else:
            kinds.append(("item" if len(row) == 1 else "session", items[0], items[-1] + 1))
    return kinds


def test_worked_example_end(planner: str) -> None:
    assert _kinds(pk.SessionPatches(group_size=5), 23) == [
        *(("session", 0, 3), ("session", 3, 8), ("session", 8, 13)),
        *(("item", i, i + 1) for i in range(13, 18)),
        *(("text", i, i + 1) for i in range(18, 23)),
    ]


def test_worked_example_start(planner: str) -> None:
    assert _kinds(pk.SessionPatches(group_size=5, align="start"), 23) == [
        *(("session", 0, 5), ("session", 5, 10)),
        *(("item", i, i + 1) for i in range(10, 18)),
        *(("text", i, i + 1) for i in range(18, 23)),
    ]


@pytest.mark.parametrize("align", ["end", "start"])
def test_at_most_a_group_is_all_text(align: str) -> None:
    for length in range(6):
        assert [kind for kind, _, _ in _kinds(pk.SessionPatches(5, align=align), length)] == ["text"] * length


@given(group_size=st.integers(1, 9), length=st.integers(1, 80))
def test_start_borders_never_move(group_size: int, length: int) -> None:
    policy = pk.SessionPatches(group_size=group_size, max_items=None, align="start")
    sessions: list[tuple[int, int]] = []
    for seen in range(length + 1):
        now = [(first, end) for kind, first, end in _kinds(policy, seen) if kind == "session"]
        if group_size > 1:
            assert now[: len(sessions)] == sessions
            assert all(first % group_size == 0 and end - first == group_size for first, end in now)
        sessions = now


def test_start_prompts_share_a_growing_prefix() -> None:
    titles = cases.make_titles(20)
    history = cases.make_histories(titles, [60])[0]
    policy = pk.SessionPatches(group_size=4, max_items=None, align="start")
    grown = [oracle.decode(cases.Batch(titles, [history[:length]], policy).layout())[0] for length in range(12, 61)]
    for earlier, later in zip(grown[:-1], grown[1:], strict=True):
        sessions = sum(len(row) > 1 for row in earlier)
        shared = len(cases.PROMPT.prefix) + 2 * sessions
        assert earlier[:shared] == later[:shared]


def test_only_the_oldest_session_is_short() -> None:
    for length in range(11, 120):
        sizes = [end - first for kind, first, end in _kinds(pk.SessionPatches(5, None), length) if kind != "text"]
        assert set(sizes[1:]) <= {1, 5} and sizes[0] in ({5} if length % 5 == 0 else {length % 5})


# ------------------------------------------------------------------ what must not matter


@pytest.mark.parametrize("name", [name for name in cases.POLICIES if not name.startswith("random")])
def test_users_do_not_depend_on_their_batch(name: str) -> None:
    lengths = [0, 31, 2, 0, 12, 500]
    batch = cases.make_batch(cases.POLICIES[name], lengths)
    assert batch.targets is not None
    together = oracle.decode(batch.layout())
    for user in range(len(lengths)):
        alone = cases.Batch(batch.titles, [batch.histories[user]], batch.policy, batch.prompt, [batch.targets[user]])
        assert oracle.decode(alone.layout()) == [together[user]]
    order = [4, 0, 5, 1, 3, 2]
    shuffled = cases.Batch(
        batch.titles,
        [batch.histories[user] for user in order],
        batch.policy,
        batch.prompt,
        [batch.targets[user] for user in order],
    )
    assert oracle.decode(shuffled.layout()) == [together[user] for user in order]


@pytest.mark.parametrize("ids", ["int", "gaps", "str"])
def test_histories_as_lists_arrays_or_histories(ids: str) -> None:
    titles = cases.make_titles(30, ids=ids)
    batch = cases.Batch(
        titles, cases.make_histories(titles, [3, 0, 17]), pk.SessionPatches(3), targets=list(titles)[:3]
    )
    catalog, histories, policy, prompt, targets = batch.arguments()
    expected = [user.rows for user in batch.users()]
    flat = np.asarray([item for history in histories for item in history])
    for form in (
        histories,
        tuple(tuple(history) for history in histories),
        [np.asarray(history, dtype=flat.dtype) for history in histories],
        pk.Histories.from_sequences(histories),
        pk.Histories(flat, [0, 3, 3, 20]),
        pk.Histories(flat.astype(object), np.asarray([0, 3, 3, 20], np.int32)),
        pk.Histories(flat, [0, 3, 3, 20], timestamps=np.arange(20)),
    ):
        assert oracle.decode(pk.build_layout(catalog, form, policy, prompt, targets)) == expected
    as_array = pk.build_layout(catalog, histories, policy, prompt, np.asarray(targets))
    assert oracle.decode(as_array) == expected


def test_duplicate_titles_are_distinct_items() -> None:
    titles: dict[Any, oracle.Title] = {7: [1, 2], 9: [1, 2], 8: [1]}
    batch = cases.Batch(titles, [[7, 9, 8, 7]], pk.ItemPatches(keep_text=0), cases.NO_PROMPT)
    layout = batch.layout()
    assert oracle.decode(layout) == [[[[1, 2]], [[1, 2]], [[1]], [[1, 2]]]]
    assert layout.title_index[layout.items.long()].tolist() == [0, 1, 2, 0]


def test_the_caller_keeps_its_arrays() -> None:
    batch = cases.make_batch(pk.SessionPatches(2, max_items=9), [12, 0, 5])
    histories = pk.Histories.from_sequences(batch.histories)
    catalog = batch.catalog
    before = [histories.items.copy(), histories.offsets.copy(), catalog.token_ids.copy(), catalog.offsets.copy()]
    layout = pk.build_layout(catalog, histories, batch.policy, cases.make_prompt(batch.prompt), batch.targets)
    for field in (layout.items, layout.token_ids, layout.lo, layout.offsets):
        field.zero_()
    after = [histories.items, histories.offsets, catalog.token_ids, catalog.offsets]
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


# ------------------------------------------------------------------ empty things


@pytest.mark.parametrize("name", cases.POLICIES)
@pytest.mark.parametrize("with_targets", [False, True], ids=["no-targets", "targets"])
def test_empty_batch(planner: str, name: str, with_targets: bool) -> None:
    batch = cases.make_batch(cases.POLICIES[name], [], with_targets)
    layout = batch.layout()
    assert_layout(layout, [], with_targets)
    assert layout.cu_seqlens.tolist() == [0]
    assert isinstance(layout.compression_ratio, float)


@pytest.mark.parametrize("name", cases.POLICIES)
def test_empty_histories(planner: str, name: str) -> None:
    batch = cases.make_batch(cases.POLICIES[name], [0, 0, 0])
    assert_layout(batch.layout(), batch.users(), True)


def test_empty_catalog_serves_empty_histories(planner: str) -> None:
    catalog = pk.Catalog.from_token_ids([], [0])
    layout = pk.build_layout(catalog, [[], []], pk.TextOnly(), pk.Prompt(prefix=[1, 2]))
    assert oracle.decode(layout) == [[[[1]], [[2]]], [[[1]], [[2]]]]


@pytest.mark.parametrize("empty", ["prefix", "separator", "suffix", "response_end", "all"])
def test_empty_prompt_parts(planner: str, empty: str) -> None:
    parts = {name: [] if empty in (name, "all") else getattr(cases.PROMPT, name) for name in vars(cases.PROMPT)}
    batch = cases.make_batch(pk.SessionPatches(2), [1, 2, 7], prompt=oracle.Parts(**parts))
    assert_layout(batch.layout(), batch.users(), True)


def test_a_target_never_reads_another_user(planner: str) -> None:
    """Without prompt and history no row of the user's own stands before the first target token."""
    titles: dict[Any, oracle.Title] = {0: [1, 2], 1: [3, 4, 5], 2: [6]}
    layout = cases.Batch(titles, [[0], [], []], pk.TextOnly(), cases.NO_PROMPT, [2, 1, 2]).layout()
    assert layout.labels is not None and layout.logit_rows is not None and layout.logit_labels is not None
    assert oracle.decode(layout) == [[[[1]], [[2]], [[6]]], [[[3]], [[4]], [[5]]], [[[6]]]]
    assert layout.labels.tolist() == [-100, -100, 6, -100, 4, 5, -100]
    assert layout.logit_rows.tolist() == [1, 3, 4]
    assert layout.logit_labels.tolist() == [6, 4, 5]


# ------------------------------------------------------------------ native planner and its NumPy twin


def _same_layout(one: pk.PatchLayout, other: pk.PatchLayout) -> None:
    for name in (
        *("lo", "hi", "items", "token_ids", "offsets", "title_index", "cu_seqlens", "position_ids"),
        *("labels", "logit_rows", "logit_labels", "prefix"),
    ):
        left, right = getattr(one, name), getattr(other, name)
        assert (left is None) == (right is None), name
        assert left is None or (left.dtype == right.dtype and torch.equal(left, right)), name
    for name in ("max_seqlen", "history_tokens", "history_rows", "max_token_id", "num_rows", "num_users"):
        assert getattr(one, name) == getattr(other, name), name
    assert (one.transpose is None) == (other.transpose is None)
    if one.transpose is not None and other.transpose is not None:
        for name in ("tokens", "offsets", "rows", "divisors"):
            assert torch.equal(getattr(one.transpose, name), getattr(other.transpose, name)), name


@settings(max_examples=200)
@given(batch=cases.batches(longest_history=100))
def test_native_planner_equals_numpy(batch: cases.Batch) -> None:
    native = pytest.importorskip("patchkern.batch.planning_native", reason="the native module is not built")
    layouts = []
    for module in (planning, native):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("patchkern.batch.planner.active", module)
            layouts.append(batch.layout(transpose=True))
    _same_layout(*layouts)


# ------------------------------------------------------------------ a layout travels


def test_pickle_round_trip() -> None:
    layout = cases.make_batch(pk.SessionPatches(3), [0, 20, 5]).layout()
    _same_layout(pickle.loads(pickle.dumps(layout)), layout)


def test_pickle_holds_the_batch_not_the_catalog() -> None:
    titles: dict[Any, oracle.Title] = {item: [item % 90] * 20 for item in range(20_000)}
    layout = cases.Batch(titles, [[1, 2, 3]], pk.ItemPatches(keep_text=0)).layout()
    assert len(pickle.dumps(layout)) < 20_000


class _Samples(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __init__(self, batch: cases.Batch) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return len(self.batch.histories)

    def __getitem__(self, index: int) -> tuple[list[Any], Any]:
        assert self.batch.targets is not None
        return self.batch.histories[index], self.batch.targets[index]


class _Collate:
    def __init__(self, batch: cases.Batch) -> None:
        self.catalog, self.policy, self.prompt = batch.catalog, batch.policy, cases.make_prompt(batch.prompt)

    def __call__(self, samples: list[tuple[list[Any], Any]]) -> pk.PatchLayout:
        histories, targets = zip(*samples, strict=True)
        return pk.build_layout(self.catalog, histories, self.policy, self.prompt, list(targets))


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_data_loader_workers(context: str) -> None:
    batch = cases.make_batch(pk.SessionPatches(3), [0, 20, 5, 40, 7, 1])
    loader = torch.utils.data.DataLoader(
        _Samples(batch), batch_size=2, num_workers=2, collate_fn=_Collate(batch), multiprocessing_context=context
    )
    rows = [user for layout in loader for user in oracle.decode(layout)]
    assert rows == [user.rows for user in batch.users()]


def test_to_the_cpu_is_the_same_layout() -> None:
    layout = cases.make_batch(pk.SessionPatches(3), [0, 20, 5]).layout()
    assert layout.device == torch.device("cpu")
    _same_layout(layout.to("cpu"), layout)
    _same_layout(layout.to(torch.device("cpu"), non_blocking=True), layout)


def test_to_a_device_moves_every_tensor() -> None:
    layout = cases.make_batch(pk.SessionPatches(3), [0, 20, 5]).layout().to("meta")
    assert layout.device.type == "meta"
    for name in ("lo", "hi", "items", "token_ids", "offsets", "cu_seqlens", "position_ids", "labels", "logit_rows"):
        assert getattr(layout, name).device.type == "meta", name
    assert layout.transpose is not None and layout.transpose.rows.device.type == "meta"


def test_a_line_says_what_it_is_and_reads_no_tensor() -> None:
    """On the meta device a tensor has no values: whoever asks for one, which on a GPU is to wait for it, fails."""
    batch = cases.make_batch(pk.ItemPatches(2), [0, 20, 5])
    layout = batch.layout().with_identities()
    labels = layout.logit_labels
    assert labels is not None
    facts = f"3 users, {layout.num_rows} rows, longest {layout.max_seqlen}, 21 items in patches, compression "
    facts += f"{layout.history_tokens / layout.history_rows:.2f}, {len(labels)} labels, on "
    assert repr(layout) == f"PatchLayout({facts}cpu)"
    moved = layout.to("meta")
    assert repr(moved) == f"PatchLayout({facts}meta)"
    assert moved.transpose is not None
    tokens, contributions = moved.transpose.tokens.numel(), moved.transpose.rows.numel()
    assert repr(moved.transpose) == f"Transpose({tokens} tokens, {contributions} contributions)"
    assert repr(moved.identities) == "Identities(21 patches)"
    untaught = pk.build_layout(batch.catalog, [[]], pk.TextOnly(), pk.Prompt(prefix=[1]))
    assert repr(untaught) == "PatchLayout(1 users, 1 rows, longest 1, 0 items in patches, compression 1.00, on cpu)"


def test_pin_memory() -> None:
    if not torch.cuda.is_available():
        pytest.skip("page-locked memory needs CUDA, none here")
    layout = cases.make_batch(pk.SessionPatches(3), [0, 20, 5]).layout()
    pinned = layout.pin_memory()
    assert pinned.lo.is_pinned() and pinned.position_ids.is_pinned()
    _same_layout(pinned, layout)


def test_layouts_are_immutable() -> None:
    layout = cases.make_batch(pk.TextOnly(), [2]).layout()
    with pytest.raises(AttributeError):
        layout.lo = layout.hi  # type: ignore[misc]


# ------------------------------------------------------------------ compact: a vocabulary of the batch's own tokens


@settings(max_examples=50)
@given(batch=cases.batches(longest_history=20))
def test_compact_renames_tokens(batch: cases.Batch) -> None:
    layout = batch.layout()
    tokens, compact = layout.compact()
    rows = oracle.decode(layout)
    assert tokens.dtype == torch.int64
    used = {token for user in rows for row in user for title in row for token in title}
    assert set(tokens.tolist()) >= used and len(set(tokens.tolist())) == tokens.numel()
    renamed = [[[[int(tokens[t]) for t in title] for title in row] for row in user] for user in oracle.decode(compact)]
    assert renamed == rows
    assert compact.max_token_id < max(tokens.numel(), 1)
    assert compact.num_rows == layout.num_rows and torch.equal(compact.cu_seqlens, layout.cu_seqlens)


# ------------------------------------------------------------------ labels on the history's text


@settings(max_examples=50)
@given(batch=cases.batches(longest_history=20))
def test_supervise_literals_labels_every_token_but_the_first_row(batch: cases.Batch) -> None:
    layout = batch.layout().supervise_literals()
    expected, row = [], 0
    for user in batch.users():
        for position, titles in enumerate(user.rows):
            drawn = int(layout.lo[row]) < 0  # a patch of one token looks like that token
            expected.append(titles[0][0] if position and drawn else oracle.IGNORE)
            row += 1
    assert layout.labels is not None and layout.logit_rows is not None and layout.logit_labels is not None
    assert layout.labels.tolist() == expected
    labelled = [row for row, label in enumerate(expected) if label != oracle.IGNORE]
    assert layout.logit_rows.tolist() == [row - 1 for row in labelled]
    assert layout.logit_labels.tolist() == [expected[row] for row in labelled]
    oracle.decode(layout)  # still a layout in every other respect


# ------------------------------------------------------------------ the paper's compression ratios


@pytest.mark.parametrize(
    ("mean_length", "group_size", "items", "sessions"),
    [(3.94, 5, 3.44, 9.23), (3.86, 20, 3.38, 3.85), (9.82, 5, 6.81, 13.62)],
    ids=["ml-1m", "ml-100k", "goodreads"],
)
def test_the_papers_compression_ratios(mean_length: float, group_size: int, items: float, sessions: float) -> None:
    """Tables 1 and 2: histories of 100 items whose titles have the catalogue's mean length, to the last digit."""
    longer = round(100 * (mean_length % 1))
    titles: dict[Any, oracle.Title] = {i: [1] * (int(mean_length) + (i < longer)) for i in range(100)}
    # Every item stands once at every place, so that the few text items have the mean length too.
    histories = [[(user + place) % 100 for place in range(100)] for user in range(100)]
    for policy, expected in ((pk.ItemPatches(5), items), (pk.SessionPatches(group_size), sessions)):
        layout = cases.Batch(titles, histories, policy).layout()
        assert abs(layout.compression_ratio - expected) <= 0.005


@pytest.mark.parametrize(
    ("dataset", "group_size", "items", "sessions"), [("ml-1m", 5, 3.44, 9.23), ("ml-100k", 20, 3.38, 3.85)]
)
def test_the_papers_compression_ratios_on_its_titles(
    shared_data: Any, dataset: str, group_size: int, items: float, sessions: float
) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="reads parquet")
    transformers = pytest.importorskip("transformers", reason="reads the Llama-3 tokenizer")
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(shared_data / "llama3-tokenizer"))
    table = parquet.read_table(shared_data / dataset / "items.parquet").to_pydict()
    catalog = pk.Catalog.from_titles(dict(zip(table["item"], table["title"], strict=True)), tokenizer)
    users = [np.roll(catalog.item_ids, -user)[:100] for user in range(len(catalog))]
    for policy, expected in ((pk.ItemPatches(5), items), (pk.SessionPatches(group_size), sessions)):
        layout = pk.build_layout(catalog, users, policy, pk.Prompt(separator=[1]))  # type: ignore[arg-type]
        # The paper divides a mean length that was rounded to two digits: 0.01 for that.
        assert abs(layout.compression_ratio - expected) <= 0.01


def test_layouts_pickled_before_the_wings_load() -> None:
    """Their classes were in patchkern.layout."""
    layout = cases.make_batch(pk.SessionPatches(5), [9, 0, 23]).layout(transpose=True).with_identities()
    written = pickle.dumps(layout, protocol=2)
    before = written.replace(b"cpatchkern.batch.layout\n", b"cpatchkern.layout\n")
    assert before.count(b"cpatchkern.layout\n") == 3  # the layout, its transpose and its identities
    assert b"patchkern.batch.layout" not in before
    loaded = pickle.loads(before)
    assert type(loaded) is pk.PatchLayout and type(loaded.identities.layout) is pk.PatchLayout
    for name, value in vars(layout).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(getattr(loaded, name), value), name
