# SPDX-License-Identifier: Apache-2.0
"""Layouts made by hand: a right one pools, a wrong one is refused by the name of the array and the entry."""

from __future__ import annotations

import dataclasses
from typing import Any

import cases
import oracle
import pytest
import torch
from error_cases import VOCABULARY, made_by_hand, refused

import patchkern as pk


def test_layouts_made_by_hand_work(backend: str) -> None:
    rows = [[[7]], [[1, 2]], [[1, 2], [3]], [[9]]]
    layout = made_by_hand()
    weight = cases.make_weight(VOCABULARY, 8)
    oracle.assert_pooled(pk.pool_rows(weight, layout, backend=backend), weight, rows)
    grad = pk.pool_rows_grad(weight[:4], layout, VOCABULARY, backend=backend)
    oracle.assert_gradient(grad, weight[:4], rows, VOCABULARY)


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def ranges(*spans: list[int]) -> torch.Tensor:
    return torch.tensor(spans, dtype=torch.int32).reshape(len(spans), -1, 2)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"lo": [-8, 0, 1, -10]}, TypeError, r"lo: expected a tensor, got list"),
        ({"lo": None}, TypeError, r"lo: expected a tensor, got NoneType"),
        ({"lo": torch.tensor([-8, 0, 1, -10])}, TypeError, r"lo: expected dtype torch.int32, got torch.int64"),
        ({"lo": int32(-8, 0, 1, -10).reshape(2, 2)}, ValueError, r"lo: expected a 1-D tensor, got shape \(2, 2\)"),
        ({"lo": torch.zeros(8, dtype=torch.int32)[::2]}, ValueError, r"lo: expected a contiguous tensor, got stride"),
        ({"lo": int32(-8, 0, 1)}, ValueError, r"hi: expected 3 entries .*, got 4"),
        ({"lo": int32(-8, 0, 3, -10)}, ValueError, r"lo\[2\]: expected a value in .*\.\.2, got 3"),
        ({"lo": int32(-(2**31), 0, 1, -10)}, ValueError, r"lo\[0\]: .*got -2147483648"),
        ({"hi": int32(0, 1, 4, 0)}, ValueError, r"hi\[2\]: expected a value in 0\.\.3, got 4"),
        ({"hi": int32(0, 0, 3, 0)}, ValueError, r"hi\[1\]: expected more than lo for a patch, got 0"),
        ({"hi": int32(0, 1, 3, 2)}, ValueError, r"hi\[3\]: expected 0 for a literal, got 2"),
        ({"hi": int32(0, 1, 3)}, ValueError, r"hi: expected 4 entries"),
        ({"items": int32(0, 0, 2)}, ValueError, r"items\[2\]: expected a value in 0\.\.1, got 2"),
        ({"items": int32(0, -1, 1)}, ValueError, r"items\[1\]: .*got -1"),
        ({"token_ids": int32(1, -2, 3)}, ValueError, r"token_ids\[1\]: .*got -2"),
        ({"token_ids": torch.ones(3)}, TypeError, r"token_ids: expected dtype torch.int32, got torch.float32"),
        ({"offsets": int32(0, 3, 2)}, ValueError, r"offsets: expected offsets from 0 to 3, got \[0, 2\]"),
        ({"offsets": int32(0, 4, 3)}, ValueError, r"offsets\[2\]: expected non-decreasing offsets"),
        ({"offsets": int32(0, 3, 3)}, ValueError, r"offsets: expected at least one token per title, .* title 1"),
        ({"offsets": int32(0, 3)}, ValueError, r"offsets: expected 3 entries .*, got 2"),
        ({"title_index": int32(0)}, ValueError, r"offsets: expected 2 entries .*, got 3"),
        ({"cu_seqlens": int32(0, 5, 4)}, ValueError, r"cu_seqlens\[2\]: expected non-decreasing offsets"),
        ({"cu_seqlens": int32(1, 3, 4)}, ValueError, r"cu_seqlens: expected offsets from 0 to 4, got \[1, 4\]"),
        ({"cu_seqlens": int32()}, ValueError, r"cu_seqlens: expected offsets from 0 to 4"),
        ({"max_seqlen": 4}, ValueError, r"max_seqlen: expected the longest user's rows, 3, got 4"),
        ({"max_seqlen": 3.0}, TypeError, r"max_seqlen: expected an integer, got float"),
        ({"max_token_id": 8}, ValueError, r"max_token_id: expected the largest token id, 9, got 8"),
        ({"max_token_id": True}, TypeError, r"max_token_id: expected an integer, got bool"),
        ({"position_ids": torch.tensor([0, 1])}, ValueError, r"position_ids: expected 4 entries .*, got 2"),
        ({"position_ids": int32(0, 1, 2, 0)}, TypeError, r"position_ids: expected dtype torch.int64"),
        ({"labels": None}, ValueError, r"labels: expected labels, logit_rows and logit_labels together or none"),
        ({"labels": torch.tensor([1])}, ValueError, r"labels: expected 4 entries .*, got 1"),
        ({"logit_rows": torch.tensor([4])}, ValueError, r"logit_rows\[0\]: expected a value in 0\.\.3, got 4"),
        ({"logit_rows": torch.tensor([-1])}, ValueError, r"logit_rows\[0\]: .*got -1"),
        ({"logit_labels": torch.tensor([1, 2])}, ValueError, r"logit_labels: expected 1 entries .*, got 2"),
        ({"history_rows": None}, TypeError, r"history_rows: expected an integer, got NoneType"),
        ({"prefix": [[0, 0]]}, TypeError, r"prefix: expected a tensor, got list"),
        ({"prefix": int32(0, 0)}, ValueError, r"prefix: expected shape \(2, 2\), one range per span .*, got \(2,\)"),
        ({"prefix": torch.zeros(2, 2)}, TypeError, r"prefix: expected dtype torch.int32, got torch.float32"),
        ({"prefix": int32(0, 0, 0, 0).reshape(2, 2).T}, ValueError, r"prefix: expected a contiguous tensor"),
        ({"prefix": int32(0, 0, 2, 1).reshape(2, 2)}, ValueError, r"prefix\[1\]: expected a range .*, got \[2, 1\]"),
        ({"prefix": int32(0, 0, -1, 1).reshape(2, 2)}, ValueError, r"prefix\[1\]: expected a range"),
        ({"prefix": int32(0, 0, 0, 5).reshape(2, 2)}, ValueError, r"prefix\[1\]: .* of rows in 0\.\.4, got \[0, 5\]"),
        (
            {"prefix": int32(2, 4, 0, 0).reshape(2, 2)},
            ValueError,
            r"prefix\[0\]: expected rows that neither the span",
        ),
        (
            {"prefix": ranges([0, 0, 0, 0], [0, 2, 1, 3])},
            ValueError,
            r"prefix\[1, 1\]: .* earlier range .* \[1, 3\]",
        ),
        ({"prefix": ranges([0, 0, 0, 0], [0, 1, 2, 3])}, ValueError, r"max_prefix: expected .*, 2, got 0"),
        (
            {"prefix": int32().reshape(2, 0, 2)},
            ValueError,
            r"prefix: expected .* \(2, R, 2\), got \(2, 0, 2\)",
        ),
        ({"cu_users": int32(0, 2, 4)}, ValueError, r"cu_users: expected users who are whole spans"),
        ({"cu_users": int32(0, 3)}, ValueError, r"cu_users: expected offsets from 0 to 4, got \[0, 3\]"),
        ({"cu_users": torch.tensor([0, 4])}, TypeError, r"cu_users: expected dtype torch.int32, got torch.int64"),
        ({"max_position": 3}, ValueError, r"max_position: expected the largest position, 2, got 3"),
        (
            {"position_ids": torch.tensor([0, 1, 2, 7])},
            ValueError,
            r"max_position: expected .*, 7, got 2",
        ),
        ({"prefix": int32(0, 0, 0, 1).reshape(2, 2)}, ValueError, r"max_prefix: expected .*, 1, got 0"),
        ({"max_prefix": 2}, ValueError, r"max_prefix: expected the longest prefix's rows, 0, got 2"),
        ({"lo": int32(-8, 0, 1, -10).to_sparse()}, ValueError, r"lo: expected a dense tensor .*torch.sparse_coo"),
        ({"transpose": (1, 2)}, TypeError, r"transpose: expected a Transpose, got tuple"),
        ({"title_index": int32(0, -1)}, ValueError, r"title_index\[1\]: expected a value in 0\.\..*, got -1"),
        ({"catalog_fingerprint": 7}, TypeError, r"catalog_fingerprint: expected a string or None, got int"),
        (
            {"lo": int32(-8, 0, 1, -10).to("meta")},
            ValueError,
            r"lo: expected a dense tensor with values, got .* on meta",
        ),
    ],
)
def test_layouts_made_by_hand_are_checked(change: dict[str, Any], error: type[Exception], message: str) -> None:
    refused(dataclasses.replace, error, message, made_by_hand(), **change)


def test_a_span_may_see_several_ranges_before_and_after_it() -> None:
    layout = dataclasses.replace(made_by_hand(), prefix=ranges([3, 4, 0, 0], [0, 1, 2, 3]), max_prefix=2)
    assert layout.ranges is layout.prefix
    one = dataclasses.replace(made_by_hand(), prefix=int32(0, 0, 0, 2).reshape(2, 2), max_prefix=2)
    assert one.ranges is not None and one.ranges.tolist() == [[[0, 0]], [[0, 2]]]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"tokens": [1]}, TypeError, r"transpose.tokens: expected a tensor, got list"),
        ({"tokens": int32(1, 2, 3, 7, 10)}, ValueError, r"transpose.tokens\[4\]: expected a value in 0\.\.9, got 10"),
        ({"tokens": int32(-1, 2, 3, 7, 9)}, ValueError, r"transpose.tokens\[0\]: .*got -1"),
        ({"tokens": int32(1, 3, 2, 7, 9)}, ValueError, r"transpose.tokens: expected ascending token ids"),
        ({"tokens": int32(1, 1, 2, 3, 7)}, ValueError, r"transpose.tokens: expected ascending token ids"),
        ({"tokens": int32(1, 2)}, ValueError, r"transpose.offsets: expected 3 entries"),
        ({"offsets": int32(0, 2, 1, 5, 6, 7)}, ValueError, r"transpose.offsets\[2\]: expected non-decreasing"),
        (
            {"offsets": int32(0, 2, 2, 5, 6, 7)},
            ValueError,
            r"transpose.offsets: expected at least one contribution per token",
        ),
        ({"rows": int32(1, 2, 1, 2, 2, 0, 4)}, ValueError, r"transpose.rows\[6\]: expected a value in 0\.\.3, got 4"),
        ({"divisors": int32(2, 4, 2, 4, 0, 1, 1)}, ValueError, r"transpose.divisors\[4\]: .*got 0"),
        ({"divisors": int32(2)}, ValueError, r"transpose.divisors: expected \d entries .*, got 1"),
    ],
)
def test_transposes_made_by_hand_are_checked(change: dict[str, Any], error: type[Exception], message: str) -> None:
    layout = made_by_hand()
    assert layout.transpose is not None
    transpose = dataclasses.replace(layout.transpose, **change)
    refused(dataclasses.replace, error, message, layout, transpose=transpose)
