# SPDX-License-Identifier: Apache-2.0
"""What a `Histories` does with its own items."""

from __future__ import annotations

import sys
import time
from datetime import datetime
from typing import Any

import numpy as np
import pytest
import torch

import patchkern as pk


def numbered(lengths: list[int]) -> pk.Histories:
    """Every item is its own position."""
    return pk.Histories(np.concatenate([np.arange(n) for n in lengths]), np.cumsum([0, *lengths]), range(sum(lengths)))


def test_jitter_moves_items_a_little_and_only_before_the_ends() -> None:
    lengths, ends = [0, 1, 40, 200, 7], [0, 1, 25, 200, 0]
    histories = numbered(lengths)
    blurred = histories.jittered(6.0, ends, np.random.default_rng(0))
    assert np.array_equal(blurred.offsets, histories.offsets)
    assert blurred.timestamps is not None and np.array_equal(blurred.timestamps, np.arange(sum(lengths)))
    for items, length, end in zip(blurred, lengths, ends, strict=True):
        assert np.array_equal(np.sort(items), np.arange(length))
        assert np.array_equal(items[end:], np.arange(end, length))
        # an item that stands before another came at most 6 places after it
        latest = np.maximum.accumulate(items) if length else items
        assert ((latest - items) < 6).all()
    assert not np.array_equal(blurred[3], histories[3])


def test_jitter_is_of_the_generator_and_none_without_width() -> None:
    histories = numbered([30, 50])
    one, two = (histories.jittered(4, [30, 50], np.random.default_rng(7)) for _ in range(2))
    assert np.array_equal(one.items, two.items)
    assert np.array_equal(histories.jittered(0, [30, 50], np.random.default_rng(0)).items, histories.items)


@pytest.mark.parametrize(("width", "ends", "message"), [(-1.0, [5], "width"), (np.inf, [5], "width"), (2, [6], "ends")])
def test_jitter_refuses(width: float, ends: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        numbered([5]).jittered(width, ends, np.random.default_rng(0))


# ------------------------------------------------------------------ what users bring

LISTS: list[list[int]] = [[5, 7], [], [5]]
NAMES = [["a", "007"], [], ["b"]]


def pyarrow() -> Any:
    return pytest.importorskip("pyarrow", reason="needs pyarrow")


def check(histories: Any, expected: list[list[Any]]) -> pk.Histories:
    got = pk.Histories.coerce(histories)
    assert [items.tolist() for items in got] == expected
    assert got.items.dtype.kind == ("U" if isinstance(expected[0][0], str) else "i")
    return got


@pytest.mark.parametrize(
    "histories",
    [
        LISTS,
        tuple(map(tuple, LISTS)),
        [np.array(items, np.int32) for items in LISTS],
        [np.array(items, object) for items in LISTS],
        [torch.tensor(items, dtype=torch.int64) for items in LISTS],
        np.array([*map(np.array, LISTS), None], object)[:3],
        np.array([*LISTS, None], object)[:3],
        {"u": [5, 7], "v": [], "w": (5,)},
        torch.nested.nested_tensor([torch.tensor(items, dtype=torch.int64) for items in LISTS], layout=torch.jagged),
    ],
)
def test_sequences_of_any_kind(histories: Any) -> None:
    check(histories, LISTS)


@pytest.mark.parametrize(
    "table", [np.array([[1, 2], [3, 4]]), np.array([[1, 2], [3, 4]], object), torch.tensor([[1, 2], [3, 4]])]
)
def test_a_table_has_a_row_per_user(table: Any) -> None:
    check(table, [[1, 2], [3, 4]])
    assert len(pk.Histories.coerce(table[:0])) == 0
    assert pk.Histories.coerce(table[:, :0]).lengths.tolist() == [0, 0]


@pytest.mark.parametrize(
    "kind", ["list_(int64)", "large_list(int32)", "list_view(int64)", "large_list_view(int64)", "list_(uint8)"]
)
def test_arrow_lists(kind: str) -> None:
    pa = pyarrow()
    outer, inner = kind.rstrip(")").split("(")
    column = pa.array(LISTS, getattr(pa, outer)(getattr(pa, inner)()))
    got = pk.Histories.coerce(column)
    assert [items.tolist() for items in got] == LISTS
    assert [items.tolist() for items in pk.Histories.coerce(column[1:])] == LISTS[1:]
    assert [items.tolist() for items in pk.Histories.coerce(pa.chunked_array([column[2:], column]))] == [[5], *LISTS]
    assert len(pk.Histories.coerce(column[:0])) == len(pk.Histories.coerce(pa.chunked_array([], column.type))) == 0


def test_arrow_text_and_lists_of_one_size() -> None:
    pa = pyarrow()
    for text in (pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())):
        column = pa.array(NAMES, pa.list_(text))
        check(column, NAMES)
        check(pa.chunked_array([column, pa.array([["c"]], pa.list_(text))]), [*NAMES, ["c"]])
    pairs = pa.array([[1, 2], [3, 4], [5, 6]], pa.list_(pa.int64(), 2))
    check(pairs[1:], [[3, 4], [5, 6]])


def test_arrow_is_not_copied() -> None:
    pa = pyarrow()
    offsets, items = np.array([0, 2, 2, 3]), np.arange(3)
    got = pk.Histories.from_arrow(pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(items)))
    assert np.shares_memory(got.items, items) and np.shares_memory(got.offsets, offsets)


def test_two_million_users_of_arrow_in_under_a_second() -> None:
    pa = pyarrow()
    lengths = np.random.default_rng(0).integers(0, 20, 2_000_000)
    offsets = np.append(0, np.cumsum(lengths)).astype(np.int32)
    column = pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.arange(offsets[-1])))
    started = time.process_time()
    got = pk.Histories.from_arrow(column)
    assert time.process_time() - started < 1
    assert len(got) == 2_000_000 and np.array_equal(got.lengths, lengths)


def test_arrow_timestamps() -> None:
    pa = pyarrow()
    times = pa.array([[1000, 2500], [], [7]], pa.list_(pa.timestamp("ms")))
    got = pk.Histories.from_arrow(pa.array(LISTS), times)
    assert got.timestamps is not None and got.timestamps.tolist() == [1, 2.5, 0.007]
    whole = pk.Histories.from_arrow(pa.array(LISTS), pa.array(LISTS))
    assert whole.timestamps is not None and whole.timestamps.dtype == np.int64
    for other, user in (([[1], [2], [3]], 0), ([[1, 2], [], [3], [4]], 3), ([[1, 2], [], []], 2)):
        with pytest.raises(ValueError, match=rf"timestamps\[{user}\]: expected as many as items"):
            pk.Histories.from_arrow(pa.array(LISTS), pa.array(other, pa.list_(pa.int64())))


def test_arrow_refuses() -> None:
    pa = pyarrow()
    for values, error, message in (
        ([[1], None], ValueError, r"histories\[1\]: expected a list, got none"),
        ([[1], [2, None]], ValueError, r"histories\[1\]: expected no missing value, got one at position 1"),
        ([[1.5]], TypeError, "items: expected integer or string item ids, got dtype float64"),
        ([[True]], TypeError, "items: expected integer or string item ids, got dtype bool"),
        ([1, 2], TypeError, "histories: expected a column of lists, got one of int64"),
        ([[[1]]], TypeError, r"items: expected all integers or all strings, got ndarray"),
    ):
        with pytest.raises(error, match=message):
            pk.Histories.coerce(pa.array(values))
    with pytest.raises(TypeError, match=r"histories: expected a column of lists, got one of struct<"):
        pk.Histories.coerce(pa.table({"items": LISTS}))


def test_pandas() -> None:
    pd = pytest.importorskip("pandas", reason="needs pandas")
    check(pd.Series(LISTS), LISTS)
    check(pd.Series([np.array(items, np.int64) for items in LISTS], index=[7, 7, 8]), LISTS)
    check(pd.Series(NAMES), NAMES)
    check(pd.DataFrame({"user": [1, 1, 2], "item": [5, 7, 5]}).groupby("user")["item"].agg(list), [[5, 7], [5]])
    check(pd.Series({"u": LISTS[0], "v": LISTS[2]}).to_dict(), [[5, 7], [5]])
    with pytest.raises(ValueError, match="histories: expected no missing value, got 1"):
        pk.Histories.coerce(pd.Series([[1], None]))
    pa = pyarrow()
    check(pd.Series(LISTS, dtype=pd.ArrowDtype(pa.list_(pa.int64()))), LISTS)


def test_polars() -> None:
    pl = pytest.importorskip("polars", reason="needs polars")
    pyarrow()
    check(pl.Series(LISTS), LISTS)
    check(pl.Series(NAMES), NAMES)
    check(pl.Series(NAMES, dtype=pl.List(pl.Categorical)), NAMES)
    table = pl.DataFrame({"user": [1, 1, 2], "item": [5, 7, 5]})
    check(table.group_by("user", maintain_order=True).agg("item")["item"], [[5, 7], [5]])
    with pytest.raises(ValueError, match=r"histories\[1\]: expected a list, got none"):
        pk.Histories.coerce(pl.Series([[1], None]))


def test_arrow_without_pyarrow(monkeypatch: pytest.MonkeyPatch) -> None:
    class Column:
        def __arrow_c_stream__(self, requested_schema: object = None) -> object:
            raise AssertionError("not reached")

    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        ImportError, match=r"histories: an arrow column needs pyarrow, .*pip install 'patchkern\[data\]'"
    ):
        pk.Histories.coerce(Column())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("items", "error", "message"),
    [
        ([1, "a"], TypeError, "items: expected values of one kind, got int and str"),
        ([1, True], TypeError, "items: expected values of one kind, got bool and int"),
        ((np.str_("a"), b"b"), TypeError, "items: expected values of one kind, got bytes and str_"),
        (["a", "a\0"], ValueError, r"items: expected ids that do not end in a NUL character, got 'a\\x00'"),
    ],
)
def test_what_numpy_would_make_of_items(items: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pk.Histories(items, [0, 2])
    with pytest.raises(error, match=message.replace("items", r"histories\[0\]")):
        pk.Histories.from_sequences([items])


@pytest.mark.parametrize(
    ("histories", "message"),
    [
        ([[True]], r"histories\[0\]: expected integer or string item ids, got dtype bool"),
        ([[1, True]], r"histories\[0\]: expected values of one kind, got bool and int"),
        ([[1], [2, None]], r"histories\[1\]: expected all integers or all strings, got NoneType, int"),
        ({"u": [1], "v": {2}}, r"histories\[1\]: expected a sequence of item ids, got set"),
        (torch.tensor([[1.0]]), r"histories\[0\]: expected integer or string item ids, got dtype float32"),
        (torch.tensor([1]), r"histories\[0\]: expected a sequence of item ids, got int"),
        (np.array([["a", "b"]], "S1"), r"histories\[0\]: expected integer or string item ids, got dtype \|S1"),
    ],
)
def test_what_is_no_histories(histories: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        pk.Histories.coerce(histories)


def test_several_are_not_asked_for_by_index() -> None:
    with pytest.raises(TypeError, match=r"user: expected an integer, as take\(\) has several, got slice"):
        pk.Histories.coerce([[1], [2]])[:1]  # type: ignore[index]


def test_masked_items_are_missing() -> None:
    with pytest.raises(ValueError, match=r"histories\[0\]: expected no missing value, got 1 masked"):
        pk.Histories.coerce([np.ma.masked_array([1, 2], [False, True])])


def test_timestamps_of_all_kinds() -> None:
    for times, seconds in (
        ([3, 4.5], [3, 4.5]),
        (np.array([3.0, 4.0], np.float32), [3, 4]),
        (np.array(["1970-01-02", "1970-01-03"], "datetime64[D]"), [86400, 172800]),
        ([datetime(1970, 1, 1, 0, 0, 3), datetime(1970, 1, 1, 0, 0, 4)], [3, 4]),
        (torch.tensor([3, 4]), [3, 4]),
        # numbers are seconds, whatever their size
        ([1_600_000_000_000, 1_600_000_000_001], [1_600_000_000_000, 1_600_000_000_001]),
    ):
        got = pk.Histories([1, 2], [0, 2], times)
        assert got.timestamps is not None and got.timestamps.tolist() == seconds
        assert got.timestamps.dtype == (np.float64 if 4.5 in seconds else np.int64)


@pytest.mark.parametrize("make", [list, np.array, torch.tensor])
def test_a_layout_takes_them_as_they_come(make: Any) -> None:
    catalog = pk.Catalog.from_token_ids([1, 2, 3], [0, 1, 3], [5, 7])
    layout = pk.build_layout(catalog, {"u": make([5, 7])}, pk.TextOnly(), pk.Prompt(), make([7]))
    expected = pk.build_layout(catalog, [[5, 7]], pk.TextOnly(), pk.Prompt(), [7])
    assert torch.equal(layout.lo, expected.lo) and torch.equal(layout.labels, expected.labels)


def test_keep() -> None:
    histories = pk.Histories([1, 2, 3, 4, 5], [0, 2, 2, 5], [10, 20, 30, 40, 50])
    kept = histories.keep(histories.items % 2 == 1)
    assert [user.tolist() for user in kept] == [[1], [], [3, 5]]
    assert kept.timestamps is not None and kept.timestamps.tolist() == [10, 30, 50]
    assert not kept.items.flags.writeable
    assert [user.tolist() for user in histories.keep([True, False, False, True, True])] == [[1], [], [4, 5]]
    with pytest.raises(ValueError, match=r"mask: expected 5 booleans, got int64 of shape \(5,\)"):
        histories.keep(histories.items % 2)
    nothing = pk.Histories([], [0, 0]).keep(np.zeros(0, bool))
    assert len(nothing) == 1 and nothing.offsets.dtype == np.int64
