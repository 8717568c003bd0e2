# SPDX-License-Identifier: Apache-2.0
"""Attention of some rows alone: what attention of all gives for them, values and gradients."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from span_cases import SPANS, leaves
from torch import Tensor

from patchkern.ops import span_attention_native as native
from patchkern.ops.hstu_attention import hstu_attention
from patchkern.ops.span_attention import span_attention
from patchkern.ops.span_rows import attend_rows, worthwhile


def hstu(*rows: Any, **spans: Any) -> Tensor:
    """With the arguments of `span_attention`."""
    query, key, value, cu_seqlens, _, scaling = rows
    stored = {name: spans[name][0].transpose(0, 1) for name in ("prefix_key", "prefix_value") if name in spans}
    packed = (x[0].transpose(0, 1) for x in (query, key, value))
    given = {"normalizer": 7.0, "scale": scaling, "prefix": spans.get("prefix")}
    return hstu_attention(*packed, cu_seqlens, **given, **stored)[None]


KINDS = {"softmax": span_attention, "silu": hstu}


@pytest.mark.parametrize("chosen", ["some", "in any order, twice", "none"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SPANS)
def test_some_rows_are_those_of_all(name: str, kind: str, chosen: str) -> None:
    torch.manual_seed(0)
    spans, attention = SPANS[name], KINDS[kind]
    cu_seqlens, prefix = spans.integers
    count = sum(spans.lengths)
    rows = {
        "some": torch.arange(0, count, 3),
        "in any order, twice": torch.cat([torch.randperm(count), torch.arange(count)]),
        "none": torch.arange(0),
    }[chosen]
    given = leaves(spans.tensors((4, 2), 8))
    query, key, value, *stored = given
    where: dict[str, Any] = {"prefix": prefix}
    if spans.stored is not None:
        where |= {"prefix_key": stored[0], "prefix_value": stored[1]}
    expected = attention(query, key, value, cu_seqlens, None, 0.3, **where)[:, rows]
    if spans.stored is None:
        got = attend_rows(attention, query[:, :, rows], key, value, rows, cu_seqlens, prefix, 0.3)
    else:  # as in a search's cache: the rows' own keys lie behind the others, the spans in another order
        places = torch.cat(
            [torch.arange(end - begin) + spans.stored + count - end for begin, end in bounds_of(cu_seqlens)]
        )
        keys, values = (
            torch.cat([old, torch.zeros_like(new).index_copy(2, places - spans.stored, new)], dim=2)
            for old, new in zip(stored, (key, value), strict=True)
        )
        got = attend_rows(
            *(attention, query[:, :, rows], key, value, rows, cu_seqlens, prefix, 0.3),
            prefix_key=keys,
            prefix_value=values,
            places=places,
        )
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    weights = torch.randn(expected.shape, dtype=torch.float64)
    inputs = [x for x in given if x is not None]
    grad = functools.partial(torch.autograd.grad, inputs=inputs, grad_outputs=weights)
    for ours, theirs in zip(grad(got), grad(expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def bounds_of(cu_seqlens: Tensor) -> list[list[int]]:
    return torch.stack([cu_seqlens[:-1], cu_seqlens[1:]], dim=1).tolist()


def test_without_prefixes_and_in_half_precision() -> None:
    torch.manual_seed(0)
    rows, cu_seqlens = torch.tensor([6, 2, 29]), torch.tensor([0, 7, 30], dtype=torch.int32)
    query, key, value = torch.randn(3, 1, 2, 30, 8, dtype=torch.float64)
    exact = span_attention(query, key, value, cu_seqlens)[:, rows]
    got = attend_rows(span_attention, query[:, :, rows], key, value, rows, cu_seqlens)
    torch.testing.assert_close(got, exact, rtol=0, atol=1e-12)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = attend_rows(span_attention, query[:, :, rows], key, value, rows, cu_seqlens)
        all_narrow = span_attention(query, key, value, cu_seqlens)[:, rows]
    assert narrow.dtype == torch.bfloat16
    assert (narrow - exact).abs().max() <= 2 * (all_narrow - exact).abs().max()


def test_when_it_is_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.zeros(1, 3232, 64)
    monkeypatch.setattr(native, "serves", lambda query, dropout: query.device.type == "cpu")
    assert worthwhile(rows, 32) and worthwhile(rows, 0) and worthwhile(rows, 1077)
    assert not worthwhile(rows, 1078), "more than a third"
    assert not worthwhile(rows[:, :300], 1), "a pass that is over at once"
    assert worthwhile(torch.zeros(1, 300, 128), 1)
    assert not worthwhile(rows.to("meta"), 32), "kernels of another device"
    monkeypatch.setattr(native, "serves", lambda query, dropout: False)
    assert not worthwhile(rows, 32)
