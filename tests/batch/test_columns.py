# SPDX-License-Identifier: Apache-2.0
"""Columns of any owner: right values, or a refusal that names the column."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import numpy as np
import pytest
import torch

import patchkern as pk
from patchkern.batch.columns import MAX_ID_LENGTH, as_array, id_array, is_sequence, number_array


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([3, 1], [3, 1]),
        ((np.int8(3), 1), [3, 1]),
        (range(3), [0, 1, 2]),
        (np.array([3, 1], np.uint64), [3, 1]),
        (np.array([3, 1], object), [3, 1]),
        (np.array([[3], [1]]), [[3], [1]]),
        (torch.tensor([3, 1], dtype=torch.int32), [3, 1]),
        (["007", "7"], ["007", "7"]),
        (np.array(["a", "b"], object), ["a", "b"]),
        (np.array(["a", "b"], np.dtypes.StringDType()), ["a", "b"]),
        ([np.str_("a")], ["a"]),
        ([], []),
        (np.zeros(0), []),
    ],
)
def test_ids(values: Any, expected: list[Any]) -> None:
    ids = id_array(values, "users")
    assert ids.tolist() == expected and (ids.dtype == np.int64 or ids.dtype.kind == "U")


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ([1.0, 2], TypeError, "users: expected all integers or all strings, got float, int"),
        ([1, "1"], TypeError, "users: expected all integers or all strings, got int, str"),
        ([True], TypeError, "users: expected all integers or all strings, got bool"),
        ([1, None], TypeError, "users: expected all integers or all strings, got NoneType, int"),
        ([float("nan"), "a"], TypeError, "users: expected all integers or all strings, got float, str"),
        ([b"a"], TypeError, "users: expected all integers or all strings, got bytes"),
        ([Decimal(1)], TypeError, "got Decimal"),
        (np.array([1.0]), TypeError, "users: expected integer or string item ids, got dtype float64"),
        (np.array([True]), TypeError, "got dtype bool"),
        (np.array([1], "m8[s]"), TypeError, "got dtype timedelta64"),
        (
            np.array([2**63], np.uint64),
            ValueError,
            "users: expected integers that fit in int64, got 9223372036854775808",
        ),
        ([2**63], ValueError, "users: expected integers that fit in int64"),
        (
            ["a", "x" * (MAX_ID_LENGTH + 1)],
            ValueError,
            "users: expected ids of at most 1024 characters, got one of 1025",
        ),
        (["a\0"], ValueError, r"users: expected ids that do not end in a NUL character, got 'a\\x00'"),
        (np.ma.masked_array([1, 2], [True, False]), ValueError, "users: expected no missing value, got 1 masked"),
        (5, TypeError, "users: expected a sequence of item ids, got int"),
        ("ab", TypeError, "users: expected a sequence of item ids, got str"),
        ({1, 2}, TypeError, "users: expected a sequence of item ids, got set"),
        ({1: 2}, TypeError, "users: expected a sequence of item ids, got dict"),
        (torch.tensor([1.0]), TypeError, "got dtype float32"),
        (torch.tensor([1.0], dtype=torch.bfloat16), TypeError, "users: expected an array, got Tensor that makes none"),
    ],
)
def test_what_is_no_id(values: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        id_array(values, "users")


@pytest.mark.parametrize("values", [[1, 2.5], np.array([1, 2.5], object), torch.tensor([1, 2.5]), (np.float32(1), 2.5)])
def test_numbers(values: Any) -> None:
    numbers = number_array("ratings", values)
    assert numbers.dtype == np.float64 and numbers.tolist() == [1, 2.5]


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ([1, float("nan")], ValueError, r"ratings\[1\]: expected a finite number, got nan"),
        ([float("-inf")], ValueError, r"ratings\[0\]: expected a finite number, got -inf"),
        (["1"], TypeError, "ratings: expected numbers, got dtype <U1"),
        ([True, False], TypeError, "ratings: expected numbers, got dtype bool"),
        (np.array([1, True], object), TypeError, "ratings: expected numbers, got bool, int"),
        ([1, None], TypeError, "ratings: expected numbers, got NoneType, int"),
        ([2.5, True], TypeError, "ratings: expected values of one kind, got bool and float"),
        ([1, "2"], TypeError, "ratings: expected values of one kind, got int and str"),
        ([[1]], ValueError, r"ratings: expected a 1-D array, got 2 dimensions of shape \(1, 1\)"),
    ],
)
def test_what_is_no_number(values: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        number_array("ratings", values)


def test_sequences() -> None:
    for values in ([], (), range(2), np.zeros(2), np.zeros((2, 2)), torch.zeros(2)):
        assert is_sequence(values)
    for value in ("ab", b"ab", {}, {1}, frozenset(), 5, None, np.int64(5), np.array(5), torch.tensor(5), iter([1])):
        assert not is_sequence(value)


def test_arrays_are_shared_not_copied() -> None:
    array = np.arange(3)
    assert as_array("x", array) is array
    tensor = torch.arange(3.0, requires_grad=True)
    assert np.shares_memory(as_array("x", tensor), tensor.detach().numpy())


def test_arrow() -> None:
    pa = pytest.importorskip("pyarrow", reason="needs pyarrow")
    for values in (pa.array([3, 1]), pa.chunked_array([[3], [1]]), pa.array([3, 1]).dictionary_encode()):
        assert id_array(values, "users").tolist() == [3, 1]
    for values in (
        pa.array(["a", "007"]),
        pa.chunked_array([["a"], ["007"]]),
        pa.array(["a", "007"]).dictionary_encode(),
    ):
        assert id_array(values, "users").tolist() == ["a", "007"]
    two = pa.chunked_array([pa.array(["a"]).dictionary_encode(), pa.array(["b"]).dictionary_encode()])
    assert id_array(two, "users").tolist() == ["a", "b"]
    for values in (pa.array([1, None]), pa.chunked_array([[1], [None]]), pa.array(["a", None])):
        with pytest.raises(ValueError, match=r"users\[1\]: expected no missing value, got 1"):
            id_array(values, "users")
    for values in (pa.array([Decimal(1)]), pa.array([1.5]), pa.array([True]), pa.array([b"a"])):
        with pytest.raises(TypeError, match="users: expected"):
            id_array(values, "users")


def test_pandas() -> None:
    pd = pytest.importorskip("pandas", reason="needs pandas")
    for values in (pd.Series([3, 1], index=[9, 9]), pd.Index([3, 1]), pd.Series([3, 1], dtype="Int64")):
        assert id_array(values, "users").tolist() == [3, 1]
    for values in (
        pd.Series(["a", "007"]),
        pd.Series(["a", "007"], dtype=object),
        pd.Series(["a", "007"], dtype="category"),
    ):
        assert id_array(values, "users").tolist() == ["a", "007"]
    for values in (pd.Series([1, None]), pd.Series([1, None], dtype="Int64"), pd.Series(["a", None])):
        with pytest.raises(ValueError, match="users: expected no missing value, got 1"):
            id_array(values, "users")
    with pytest.raises(TypeError, match="users: expected integer or string item ids, got dtype float64"):
        id_array(pd.Series([1.0]), "users")
    titles = pd.Series({7: "Seven", 3: "Three"})
    assert pk.Catalog.from_titles(titles, lambda title: [1]).item_ids.tolist() == [7, 3]
    for wrong, error, message in (
        (pd.Series(["a", "b"], index=[1, 1]), ValueError, "titles: expected distinct item ids, got 1 more than once"),
        (pd.Series(["a", None], index=[1, 2]), TypeError, r"titles\[2\]: expected a string, got"),
        (pd.DataFrame({"title": ["a"]}), TypeError, "titles: expected a mapping of item id to title, got DataFrame"),
    ):
        with pytest.raises(error, match=message):
            pk.Catalog.from_titles(wrong, lambda title: [1])


def test_polars() -> None:
    pl = pytest.importorskip("polars", reason="needs polars")
    assert id_array(pl.Series([3, 1]), "users").tolist() == [3, 1]
    for values in (pl.Series(["a", "007"]), pl.Series(["a", "007"], dtype=pl.Categorical)):
        assert id_array(values, "users").tolist() == ["a", "007"]
    for values in (pl.Series([1, None]), pl.Series(["a", None])):
        with pytest.raises(ValueError, match="users: expected no missing value, got 1"):
            id_array(values, "users")
    assert number_array("ratings", pl.Series([1.0, 2.5])).tolist() == [1, 2.5]
