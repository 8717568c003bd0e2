# SPDX-License-Identifier: Apache-2.0
"""The gradient of `pool_rows`, dense, compact and added to another, on every backend, against float64 loops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cases
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pool_cases import (
    WIDTHS,
    assert_gradient,
    by_dtype,
    by_policy_and_dtype,
    few_lengths,
    gradient,
    hard_lengths,
    in_double,
    takers,
)

import patchkern as pk


@by_policy_and_dtype
def test_backward_of_every_policy(backend: str, device: torch.device, name: str, dtype: torch.dtype) -> None:
    batch = cases.make_batch(cases.POLICIES[name], hard_lengths(backend, dtype))
    layout, rows = batch.layout(device), batch.rows()
    weight = cases.make_weight(cases.VOCABULARY, 41, dtype, device=device)
    grad_rows = cases.make_weight(len(rows), 41, dtype, seed=1, device=device)
    assert_gradient(backend, gradient(weight, layout, grad_rows, backend=backend), grad_rows, rows, cases.VOCABULARY)


@by_dtype
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "column-slice"])
def test_backward_of_every_width(
    backend: str, device: torch.device, width: int, dtype: torch.dtype, strided: bool
) -> None:
    batch = cases.make_batch(pk.SessionPatches(3), few_lengths(backend))
    layout, rows = batch.layout(device), batch.rows()
    grad_rows = cases.make_weight(len(rows), width, dtype, strided, seed=1, device=device)
    grad = pk.pool_rows_grad(grad_rows, layout, cases.VOCABULARY, backend=backend)
    assert_gradient(backend, grad, grad_rows, rows, cases.VOCABULARY)


def check_backward(names: list[str], batch: cases.Batch, data: st.DataObject) -> None:
    width = data.draw(st.sampled_from([1, 2, 3, 7, 8, 15, 16, 17, 33, 41]))
    dtype = data.draw(st.sampled_from(cases.DTYPES))
    scale = data.draw(st.just(1.0) | st.floats(-50, 50, width=32))
    layout, rows = batch.layout(transpose=True), batch.rows()
    grad_rows = cases.make_weight(len(rows), width, dtype, seed=1)
    before = cases.make_weight(cases.VOCABULARY, width, dtype, seed=2)
    options: dict[str, Any] = {"scale": scale}
    for name in takers(names, dtype):
        options["backend"] = name
        dense = pk.pool_rows_grad(grad_rows, layout, cases.VOCABULARY, **options)
        assert_gradient(name, dense, grad_rows, rows, cases.VOCABULARY, scale=scale)
        compact = pk.pool_rows_grad(grad_rows, layout, cases.VOCABULARY, dense=False, **options)
        assert torch.equal(compact.to_dense(), dense)
        added = pk.pool_rows_grad(grad_rows, layout, cases.VOCABULARY, out=before.clone(), **options)
        assert_gradient(name, added, grad_rows, rows, cases.VOCABULARY, scale=scale, before=before)


@settings(max_examples=100)
@given(batch=cases.batches(longest_history=30), data=st.data())
def test_backward_of_random_ragged_batches(batch: cases.Batch, data: st.DataObject) -> None:
    check_backward(["reference", "native"], batch, data)


@settings(max_examples=25)
@given(batch=cases.batches(longest_history=12), data=st.data())
def test_backward_of_random_ragged_batches_in_triton(batch: cases.Batch, data: st.DataObject) -> None:
    check_backward(["triton"], batch, data)


@in_double
@pytest.mark.parametrize("scale", [1.0, -2.5])
@pytest.mark.parametrize("name", ["text", "items", "sessions-end", "sessions-start", "random"])
def test_gradcheck(backend: str, device: torch.device, name: str, dtype: torch.dtype, scale: float) -> None:
    batch = cases.make_batch(cases.POLICIES[name], [0, 14, 3])
    layout = batch.layout(device)
    weight = cases.make_weight(cases.VOCABULARY, 3, dtype, device=device).requires_grad_()
    assert torch.autograd.gradcheck(lambda w: pk.pool_rows(w, layout, backend=backend, scale=scale), (weight,))


def test_dense_compact_and_autograd_agree(backend: str, device: torch.device) -> None:
    batch = cases.make_batch(pk.SessionPatches(4), hard_lengths(backend, torch.float32))
    layout = batch.layout(device)
    weight = cases.make_weight(cases.VOCABULARY, 41, device=device)
    grad_rows = cases.make_weight(layout.num_rows, 41, seed=1, device=device)
    through_autograd = gradient(weight, layout, grad_rows, backend=backend)
    leaf = weight.clone().requires_grad_()
    sparse_rows = pk.pool_rows(leaf, layout, backend=backend, sparse_grad=True)
    (through_sparse,) = torch.autograd.grad(sparse_rows, leaf, grad_rows, retain_graph=True)
    dense = pk.pool_rows_grad(grad_rows, layout, cases.VOCABULARY, backend=backend)
    compact = pk.pool_rows_grad(grad_rows, layout, cases.VOCABULARY, dense=False, backend=backend)
    for sparse in (through_sparse, compact):
        assert sparse.layout is torch.sparse_coo and sparse.is_coalesced() and sparse.shape == weight.shape
        tokens = sparse.indices()[0]
        assert tokens.tolist() == sorted({token for row in batch.rows() for title in row for token in title})
        assert torch.equal(sparse.coalesce().to_dense(), dense)
    assert torch.equal(through_autograd, dense)
    # Storing it in `.grad`, torch forgets that it is coalesced.
    sparse_rows.backward(grad_rows)
    assert leaf.grad is not None and torch.equal(leaf.grad._indices(), through_sparse.indices())
    assert torch.equal(leaf.grad.to_dense(), dense)
    # Autograd through PyTorch's own mean of means.
    leaf = weight.double().requires_grad_()
    oracle.torch_path(leaf, batch.rows()).backward(grad_rows.double())
    assert leaf.grad is not None
    torch.testing.assert_close(dense.double(), leaf.grad, rtol=1e-6, atol=1e-6)


@by_dtype
@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "column-slice"])
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_adding_to_a_gradient(
    backend: str, device: torch.device, dtype: torch.dtype, strided: bool, scale: float
) -> None:
    """The sum is rounded once, and nothing but the batch's rows is touched."""
    batch = cases.make_batch(pk.SessionPatches(4), hard_lengths(backend, dtype))
    layout, rows = batch.layout(device), batch.rows()
    grad_rows = cases.make_weight(len(rows), 41, dtype, seed=1, device=device)
    before = cases.make_weight(cases.VOCABULARY, 41, dtype, strided, seed=2, device=device)
    canvas = before._base if before._base is not None else before
    margin = canvas.clone()
    out = before
    before = before.clone()
    got = pk.pool_rows_grad(grad_rows, layout, cases.VOCABULARY, backend=backend, scale=scale, out=out)
    assert got is out
    assert_gradient(backend, got, grad_rows, rows, cases.VOCABULARY, scale=scale, before=before)
    if strided:
        assert torch.equal(canvas[:, :3], margin[:, :3]) and torch.equal(canvas[:, 44:], margin[:, 44:])


def test_adding_to_no_gradient_is_the_gradient(backend: str, device: torch.device) -> None:
    layout = cases.make_batch(pk.SessionPatches(4), hard_lengths(backend, torch.float32)).layout(device)
    grad_rows = cases.make_weight(layout.num_rows, 41, seed=1, device=device)
    expected = pk.pool_rows_grad(grad_rows, layout, cases.VOCABULARY, backend=backend)
    zeros = torch.zeros(cases.VOCABULARY, 41, device=device)
    assert torch.equal(pk.pool_rows_grad(grad_rows, layout, cases.VOCABULARY, backend=backend, out=zeros), expected)


def test_rows_that_must_be_zero_are_zero_and_others_are_not(backend: str, device: torch.device) -> None:
    batch = cases.make_batch(pk.ItemPatches(2), [9, 4])
    layout = batch.layout(device)
    used = sorted({token for row in batch.rows() for title in row for token in title})
    grad = gradient(
        cases.make_weight(500, 16, device=device),
        layout,
        torch.ones(layout.num_rows, 16, device=device),
        backend=backend,
    )
    assert grad.ne(0).all(dim=1).nonzero()[:, 0].tolist() == used
    assert grad.ne(0).any(dim=1).nonzero()[:, 0].tolist() == used


def test_long_runs_of_one_token(backend: str, device: torch.device) -> None:
    """The separator occurs thousands of times; its gradient is split, and must neither lose nor repeat a part."""
    titles: dict[Any, oracle.Title] = {0: [1, 2, 1], 1: [3]}
    times = 150 if cases.interpreted(backend) else 1500
    batch = cases.Batch(titles, [[0, 1] * times, [1] * (times // 2)], pk.ItemPatches(3, max_items=None), targets=[0, 1])
    layout, rows = batch.layout(device), batch.rows()
    for dtype in (torch.float32, torch.bfloat16):
        grad_rows = cases.make_weight(len(rows), 5, dtype, seed=1, device=device)
        grad = pk.pool_rows_grad(grad_rows, layout, cases.VOCABULARY, backend=backend)
        assert_gradient(backend, grad, grad_rows, rows, cases.VOCABULARY)
    counted = pk.pool_rows_grad(torch.ones(len(rows), 5, device=device), layout, cases.VOCABULARY, backend=backend)
    # One separator between two entries, whatever they are.
    assert counted[cases.PROMPT.separator[0]].tolist() == [2 * times - 1 + times / 2 - 1] * 5


@by_dtype
def test_bitwise_repeatable(
    backend: str, device: torch.device, dtype: torch.dtype, threads: Callable[[int], None]
) -> None:
    """The same bits from run to run and for any number of threads, forward and backward."""
    lengths = [17, 0, 9, 1] if cases.interpreted(backend) else [400, 0, 333, 90, 500, 1]
    batch = cases.make_batch(pk.SessionPatches(4, max_items=None), lengths)
    layout = batch.layout(device)
    weight = cases.make_weight(cases.VOCABULARY, 65, dtype, device=device)
    grad_rows = cases.make_weight(layout.num_rows, 65, dtype, seed=1, device=device)
    results = []
    for count in (1, 2) if backend == "triton" else (1, 2, 3, 8, 1):
        threads(count)
        rows = pk.pool_rows(weight, layout, backend=backend)
        dense = pk.pool_rows_grad(grad_rows, layout, cases.VOCABULARY, backend=backend)
        compact = pk.pool_rows_grad(grad_rows, layout, cases.VOCABULARY, dense=False, backend=backend)
        results.append((rows, dense, compact.values()))
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))
