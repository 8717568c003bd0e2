# SPDX-License-Identifier: Apache-2.0
"""`pool_rows` within autograd, torch.library and torch.compile."""

from __future__ import annotations

import copy

import cases
import oracle
import pytest
import torch
from pool_cases import HARD_LENGTHS, gradient, in_double

import patchkern as pk
from patchkern.budget.live_bytes import peak_memory

# ------------------------------------------------------------------ autograd's corners


def test_the_gradients_of_a_weight_are_added_up_in_the_first() -> None:
    """Two of them are there at once, as many as any two parts of a gradient need, and no third one for their sum."""
    layout = cases.make_batch(pk.SessionPatches(3), [17, 2]).layout()
    weight = cases.make_weight(5000, 8).requires_grad_()
    with peak_memory("cpu") as peak:
        sum(pk.pool_rows(weight, layout).sum() for _ in range(3)).backward()
    assert 2 * weight.nbytes < peak.bytes < 2.5 * weight.nbytes


def test_expanded_and_transposed_gradients(backend: str, device: torch.device) -> None:
    """`sum().backward()` hands over a gradient of stride zero; a transposed loss one of stride (1, T)."""
    for width in (1, 8):
        batch = cases.make_batch(pk.SessionPatches(3), [17, 2])
        layout = batch.layout(device)
        weight = cases.make_weight(cases.VOCABULARY, width, device=device)
        ones = torch.ones(layout.num_rows, width, device=device)
        expected = pk.pool_rows_grad(ones, layout, cases.VOCABULARY, backend=backend)
        for grad_rows in (
            torch.ones((), device=device).expand(ones.shape),
            ones.t().contiguous().t(),
            ones.repeat(1, 2)[:, ::2],
        ):
            assert torch.equal(gradient(weight, layout, grad_rows, backend=backend), expected)


def test_gradients_accumulate(backend: str, device: torch.device) -> None:
    batch = cases.make_batch(pk.SessionPatches(3), [17, 2])
    layout = batch.layout(device)
    leaf = cases.make_weight(cases.VOCABULARY, 8, device=device).requires_grad_()
    rows = pk.pool_rows(leaf, layout, backend=backend)
    grad_rows = cases.make_weight(layout.num_rows, 8, seed=1, device=device)
    rows.backward(grad_rows, retain_graph=True)
    assert leaf.grad is not None
    once = leaf.grad.clone()
    rows.backward(grad_rows)
    assert torch.equal(leaf.grad, 2 * once)
    pk.pool_rows(leaf, layout, backend=backend).backward(grad_rows)
    assert torch.equal(leaf.grad, 3 * once)


@in_double
def test_weight_used_twice(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    """Tied embeddings: the same weight pools the rows and reads them out."""
    batch = cases.make_batch(pk.SessionPatches(3), [17, 2])
    layout = batch.layout(device)
    leaf = cases.make_weight(cases.VOCABULARY, 8, dtype, device=device).requires_grad_()
    (pk.pool_rows(leaf, layout, backend=backend) @ leaf.t()).square().sum().backward()
    plain = leaf.detach().clone().requires_grad_()
    (oracle.torch_path(plain, batch.rows()) @ plain.t()).square().sum().backward()
    torch.testing.assert_close(leaf.grad, plain.grad)


def test_gradient_through_a_slice_of_the_weight(backend: str, device: torch.device) -> None:
    batch = cases.make_batch(pk.SessionPatches(3), [17, 2])
    layout = batch.layout(device)
    wide = cases.make_weight(cases.VOCABULARY, 20, device=device).requires_grad_()
    pk.pool_rows(wide[:, 4:12], layout, backend=backend).sum().backward()
    assert wide.grad is not None
    inner = pk.pool_rows_grad(torch.ones(layout.num_rows, 8, device=device), layout, cases.VOCABULARY, backend=backend)
    assert torch.equal(wide.grad[:, 4:12], inner)
    assert not wide.grad[:, :4].any() and not wide.grad[:, 12:].any()


def test_no_grad_and_frozen_weights(backend: str) -> None:
    batch = cases.make_batch(pk.SessionPatches(3), [17, 2], with_targets=False)
    layout = batch.layout()
    assert layout.transpose is None
    weight = cases.make_weight(cases.VOCABULARY, 8)
    expected = pk.pool_rows(weight, layout, backend=backend)
    assert not expected.requires_grad
    leaf = weight.clone().requires_grad_()
    with torch.no_grad():
        rows = pk.pool_rows(leaf, layout, backend=backend)
        into = pk.pool_rows(leaf, layout, backend=backend, out=torch.zeros_like(expected))
    assert not rows.requires_grad and torch.equal(rows, expected) and torch.equal(into, expected)
    with torch.inference_mode():
        assert torch.equal(pk.pool_rows(leaf, layout, backend=backend), expected)
    # A layout without a transpose still trains: it is added on the way.
    assert pk.pool_rows(leaf, layout, backend=backend).requires_grad
    grad = gradient(weight, layout, torch.ones_like(expected), backend=backend)
    assert torch.equal(grad, gradient(weight, batch.layout(transpose=True), torch.ones_like(expected), backend=backend))


def test_sparse_gradient_drives_an_optimizer(backend: str, device: torch.device) -> None:
    batch = cases.make_batch(pk.SessionPatches(3), [17, 2])
    layout = batch.layout(device)
    dense, sparse = (torch.nn.Parameter(cases.make_weight(200, 8, device=device)) for _ in range(2))
    for parameter, sparse_grad in ((dense, False), (sparse, True)):
        optimizer = torch.optim.SGD([parameter], lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            pk.pool_rows(parameter, layout, backend=backend, sparse_grad=sparse_grad).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(sparse, dense)


def test_compact_layout_pools_the_same_rows(backend: str, device: torch.device) -> None:
    batch = cases.make_batch(pk.SessionPatches(3), HARD_LENGTHS)
    layout = batch.layout(device)
    tokens, compact = layout.compact()
    weight = cases.make_weight(1000, 41, device=device)
    rows = pk.pool_rows(weight, layout, backend=backend)
    assert torch.equal(pk.pool_rows(weight[tokens], compact, backend=backend), rows)
    full = gradient(weight, layout, torch.ones_like(rows), backend=backend)
    part = gradient(weight[tokens], compact, torch.ones_like(rows), backend=backend)
    assert torch.equal(full[tokens], part)


def test_inputs_are_left_alone(backend: str, device: torch.device) -> None:
    batch = cases.make_batch(pk.SessionPatches(3), HARD_LENGTHS)
    layout = batch.layout(device)
    weight = cases.make_weight(cases.VOCABULARY, 16, device=device)
    before, before_weight = copy.deepcopy(layout), weight.clone()
    gradient(weight, layout, torch.ones(layout.num_rows, 16, device=device), backend=backend)
    assert torch.equal(weight, before_weight)
    for name in ("lo", "hi", "items", "token_ids", "offsets"):
        assert torch.equal(getattr(layout, name), getattr(before, name))


# ------------------------------------------------------------------ torch.library, torch.compile


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_opcheck(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    layout = cases.make_batch(pk.SessionPatches(3), [9, 0, 2]).layout(device)
    transpose = layout.transpose
    assert transpose is not None
    weight = cases.make_weight(cases.VOCABULARY, 8, dtype, device=device)
    table = cases.make_weight(23, 8, dtype, seed=1, device=device)
    rows = (layout.lo, layout.hi, layout.items, layout.token_ids, layout.offsets)
    out = torch.zeros(layout.num_rows, 8, dtype=dtype, device=device)
    for extra in ((None, None, 1.0), (table, layout.title_index, 0.5)):
        torch.library.opcheck(torch.ops.patchkern.pool_rows.default, (weight, *rows, *extra, out, backend))
    columns = (transpose.tokens, transpose.offsets, transpose.rows, transpose.divisors)
    compact = torch.zeros(transpose.tokens.shape[0], 8, dtype=dtype, device=device)
    for extra in (
        (1.0, torch.zeros_like(weight), True, False),
        (3.0, weight, True, True),
        (1.0, compact, False, False),
    ):
        torch.library.opcheck(torch.ops.patchkern.pool_rows_grad.default, (out, *columns, *extra, backend))


def _compiled_equals_eager(backend: str, device: torch.device, compiler: str) -> None:
    def step(weight: torch.Tensor, readout: torch.Tensor, layout: pk.PatchLayout, scale: float) -> torch.Tensor:
        return (pk.pool_rows(weight * 2, layout, backend=backend, scale=scale) * readout).square().sum()

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    readout = cases.make_weight(1, 8, seed=2, device=device)
    for lengths, scale in (([9, 0, 2], 1.0), ([30, 1], 0.5)):
        layout = cases.make_batch(pk.SessionPatches(3), lengths).layout(device)
        losses, grads = [], []
        for function in (step, compiled):
            weight = cases.make_weight(cases.VOCABULARY, 8, device=device).requires_grad_()
            loss = function(weight, readout, layout, scale)
            loss.backward()
            losses.append(loss.detach())
            grads.append(weight.grad)
        torch.testing.assert_close(losses[1], losses[0])
        torch.testing.assert_close(grads[1], grads[0])


@pytest.mark.unpoisoned("tracing would record the filling")
def test_compile_fullgraph(backend: str, device: torch.device) -> None:
    _compiled_equals_eager(backend, device, "aot_eager")


@pytest.mark.slow
@pytest.mark.unpoisoned("tracing would record the filling")
def test_compile_fullgraph_with_inductor(backend: str, device: torch.device) -> None:
    _compiled_equals_eager(backend, device, "inductor")


@pytest.mark.unpoisoned("tracing would record the filling")
def test_compile_without_gradient(backend: str, device: torch.device) -> None:
    torch.compiler.reset()
    layout = cases.make_batch(pk.SessionPatches(3), [9, 0, 2]).layout(device)
    weight = cases.make_weight(cases.VOCABULARY, 8, device=device)
    compiled = torch.compile(
        lambda w: pk.pool_rows(w, layout, backend=backend) + 1, fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(weight), pk.pool_rows(weight, layout, backend=backend) + 1)


def test_fake_tensors_and_meta() -> None:
    """Shapes can be worked out without memory."""
    layout = cases.make_batch(pk.SessionPatches(3), [9, 0, 2]).layout()
    rows = pk.pool_rows(torch.empty(cases.VOCABULARY, 8, device="meta", dtype=torch.bfloat16), layout.to("meta"))
    assert rows.device.type == "meta" and rows.shape == (layout.num_rows, 8) and rows.dtype is torch.bfloat16
