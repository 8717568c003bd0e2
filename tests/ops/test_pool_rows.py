# SPDX-License-Identifier: Apache-2.0
"""`pool_rows`, forward and backward, on every backend, against the float64 loops of oracle.py."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import cases
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import patchkern as pk
from patchkern.ops import backends

WIDTHS = [1, 41, 64, 1000, 4096]
HARD_LENGTHS = [0, 1, 23, 2, 0, 40]

by_dtype = pytest.mark.parametrize("dtype", cases.DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
in_double = pytest.mark.parametrize("dtype", [torch.float64], ids=["float64"])
by_policy = pytest.mark.parametrize("name", cases.POLICIES)


def gradient(weight: torch.Tensor, layout: pk.PatchLayout, grad_rows: torch.Tensor, **options: Any) -> torch.Tensor:
    """What autograd gives `weight`."""
    leaf = weight.detach().requires_grad_()
    pk.pool_rows(leaf, layout, **options).backward(grad_rows)
    assert leaf.grad is not None
    return leaf.grad


def takers(names: list[str], dtype: torch.dtype) -> list[str]:
    """Those of the backends that take CPU tensors of this dtype."""
    found = []
    for name in names:
        with contextlib.suppress(ValueError):
            found.append(backends.choose(name, torch.device("cpu"), dtype))
    return found


def assert_pooled(
    backend: str, got: torch.Tensor, weight: torch.Tensor, rows: list[oracle.Row], **options: Any
) -> None:
    oracle.assert_pooled(got, weight, rows, truncates=cases.truncates(backend, weight.dtype), **options)


def assert_gradient(
    backend: str, got: torch.Tensor, grad_rows: torch.Tensor, rows: list[oracle.Row], vocabulary: int, **options: Any
) -> None:
    truncates = cases.truncates(backend, grad_rows.dtype)
    oracle.assert_gradient(got, grad_rows, rows, vocabulary, truncates=truncates, **options)


# ------------------------------------------------------------------ by hand


def test_by_hand(backend: str, device: torch.device) -> None:
    """Powers of two, so that every mean is exact in every dtype."""
    titles: dict[Any, oracle.Title] = {0: [1, 2], 1: [3], 2: [0, 0, 1, 3]}
    # A session of all three items, then each as an item patch: groups of three with L = 3 + 3 + 3.
    batch = cases.Batch(titles, [[0, 1, 2] * 3], pk.SessionPatches(3), oracle.Parts([], [4], [], []))
    layout = batch.layout(device, transpose=True)
    weight = torch.tensor([[8.0, 0.0], [16.0, -4.0], [32.0, 4.0], [64.0, 1.0], [0.5, 0.25]], device=device)
    separator, means = [0.5, 0.25], [[24.0, 0.0], [64.0, 1.0], [24.0, -0.75]]
    session = [(24.0 + 64.0 + 24.0) / 3, (0.0 + 1.0 - 0.75) / 3]
    text = [
        [16.0, -4.0],
        [32.0, 4.0],
        separator,
        [64.0, 1.0],
        separator,
        [8.0, 0.0],
        [8.0, 0.0],
        [16.0, -4.0],
        [64.0, 1.0],
    ]
    expected = [session, separator, means[0], separator, means[1], separator, means[2], separator, *text]
    got = pk.pool_rows(weight, layout, backend=backend)
    assert got[1:].tolist() == expected[1:]
    assert torch.allclose(got[0].cpu(), torch.tensor(expected[0]), rtol=2**-23)

    # One gradient of 12 on the session row: each item gets 4, shared by its tokens.
    grad_rows = torch.zeros(layout.num_rows, 2, device=device)
    grad_rows[0] = torch.tensor([12.0, 24.0], device=device)
    grad = pk.pool_rows_grad(grad_rows, layout, 5, backend=backend)
    assert grad.tolist() == [[2.0, 4.0], [3.0, 6.0], [2.0, 4.0], [5.0, 10.0], [0.0, 0.0]]


@by_dtype
def test_literals_are_copies(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    """Text is the embedding itself, bit for bit, in every dtype; so is a patch of one token."""
    batch = cases.make_batch(pk.TextOnly(), [5, 0, 9])
    weight = cases.make_weight(cases.VOCABULARY, 41, dtype, device=device)
    tokens = [row[0][0] for row in batch.rows()]
    assert torch.equal(pk.pool_rows(weight, batch.layout(device), backend=backend), weight[tokens])
    titles: dict[Any, oracle.Title] = {0: [3], 1: [4]}
    patches = cases.Batch(titles, [[0, 1, 0]], pk.ItemPatches(keep_text=0), cases.NO_PROMPT)
    assert torch.equal(pk.pool_rows(weight, patches.layout(device), backend=backend), weight[[3, 4, 3]])


def test_a_session_is_a_mean_of_means(backend: str, device: torch.device) -> None:
    """Not a mean over all tokens: a long title weighs no more than a short one."""
    titles: dict[Any, oracle.Title] = {0: [0] * 7, 1: [1]}
    layout = cases.Batch(titles, [[0, 1, 0, 0, 0, 0]], pk.SessionPatches(2), cases.NO_PROMPT).layout(device)
    weight = torch.tensor([[0.0], [1.0]], device=device)
    assert pk.pool_rows(weight, layout, backend=backend)[0].item() == 0.5


# ------------------------------------------------------------------ forward against the oracle


@by_dtype
@by_policy
def test_forward_of_every_policy(backend: str, device: torch.device, name: str, dtype: torch.dtype) -> None:
    batch = cases.make_batch(cases.POLICIES[name], HARD_LENGTHS)
    weight = cases.make_weight(cases.VOCABULARY, 41, dtype, device=device)
    assert_pooled(backend, pk.pool_rows(weight, batch.layout(device), backend=backend), weight, batch.rows())


@by_dtype
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "column-slice"])
def test_forward_of_every_width(
    backend: str, device: torch.device, width: int, dtype: torch.dtype, strided: bool
) -> None:
    batch = cases.make_batch(pk.SessionPatches(3), [0, 17, 1])
    weight = cases.make_weight(cases.VOCABULARY, width, dtype, strided, device=device)
    assert weight.is_contiguous() != strided or width == 1
    assert_pooled(backend, pk.pool_rows(weight, batch.layout(device), backend=backend), weight, batch.rows())


def check_forward(names: list[str], batch: cases.Batch, data: st.DataObject) -> None:
    width = data.draw(st.sampled_from([1, 2, 3, 7, 8, 15, 16, 17, 33, 41, 64, 129]))
    dtype = data.draw(st.sampled_from(cases.DTYPES))
    scale = data.draw(st.just(1.0) | st.floats(-50, 50, width=32))
    weight = cases.make_weight(cases.VOCABULARY, width, dtype, strided=data.draw(st.booleans()))
    layout, rows = batch.layout(), batch.rows()
    for name in takers(names, dtype):
        assert_pooled(name, pk.pool_rows(weight, layout, backend=name, scale=scale), weight, rows, scale=scale)


@settings(max_examples=200)
@given(batch=cases.batches(longest_history=40), data=st.data())
def test_forward_of_random_ragged_batches(batch: cases.Batch, data: st.DataObject) -> None:
    check_forward(["reference", "native"], batch, data)


@settings(max_examples=25)
@given(batch=cases.batches(longest_history=12), data=st.data())
def test_forward_of_random_ragged_batches_in_triton(batch: cases.Batch, data: st.DataObject) -> None:
    check_forward(["triton"], batch, data)


@by_dtype
def test_round_once(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    """Values a second rounding would shift: thirds of large, nearly cancelling embeddings in long titles."""
    titles: dict[Any, oracle.Title] = {item: list(range(item, item + 3 + item % 5)) for item in range(12)}
    batch = cases.Batch(titles, [list(range(12)) * 5], pk.SessionPatches(7), cases.NO_PROMPT)
    weight = cases.make_weight(20, 64, torch.float64, device=device).mul(100).to(dtype)
    weight[1::2] = -weight[::2] + weight[1::2] / 64
    assert_pooled(backend, pk.pool_rows(weight, batch.layout(device), backend=backend), weight, batch.rows())


@by_dtype
def test_long_titles_and_sessions(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    longest = 60 if cases.interpreted(backend) else 500
    titles: dict[Any, oracle.Title] = {0: [i % 90 for i in range(longest)], 1: [7]}
    history = [0, 1] * 20 + [1] * 20  # a session, item patches, text
    batch = cases.Batch(titles, [history], pk.SessionPatches(20, max_items=None), cases.NO_PROMPT)
    weight = cases.make_weight(cases.VOCABULARY, 3, dtype, device=device)
    assert_pooled(backend, pk.pool_rows(weight, batch.layout(device), backend=backend), weight, batch.rows())


def test_special_values_stay_in_their_rows(backend: str, device: torch.device) -> None:
    """NaN and infinity reach the rows of their tokens and no others."""
    titles: dict[Any, oracle.Title] = {0: [0, 1], 1: [2], 2: [3, 4]}
    layout = cases.Batch(titles, [[0, 1, 2]], pk.ItemPatches(keep_text=0), cases.NO_PROMPT).layout(device)
    weight = torch.ones(5, 17, device=device)
    weight[0], weight[2] = float("nan"), float("inf")
    got = pk.pool_rows(weight, layout, backend=backend)
    assert got[0].isnan().all() and got[1].isinf().all() and (got[2] == 1).all()


@by_policy
def test_backends_agree_on_shapes_of_nothing(backend: str, device: torch.device, name: str) -> None:
    for lengths in ([], [0], [0, 0, 0]):
        for prompt in (cases.PROMPT, cases.NO_PROMPT):
            batch = cases.make_batch(cases.POLICIES[name], lengths, with_targets=False, prompt=prompt)
            weight = cases.make_weight(cases.VOCABULARY, 8, device=device)
            layout = batch.layout(device, transpose=True)
            rows = pk.pool_rows(weight, layout, backend=backend)
            assert rows.shape == (layout.num_rows, 8)
            assert_pooled(backend, rows, weight, batch.rows())
            assert_gradient(
                backend,
                gradient(weight, layout, torch.ones_like(rows), backend=backend),
                torch.ones_like(rows),
                batch.rows(),
                cases.VOCABULARY,
            )


def test_users_do_not_depend_on_their_batch(backend: str, device: torch.device) -> None:
    """Bit for bit: nothing about a row changes with the rows around it."""
    batch = cases.make_batch(pk.SessionPatches(4), [31, 0, 12, 3])
    weight = cases.make_weight(cases.VOCABULARY, 41, device=device)
    layout = batch.layout(device)
    together = pk.pool_rows(weight, layout, backend=backend)
    assert batch.targets is not None
    for user, (start, end) in enumerate(zip(layout.cu_seqlens[:-1], layout.cu_seqlens[1:], strict=True)):
        alone = cases.Batch(batch.titles, [batch.histories[user]], batch.policy, targets=[batch.targets[user]])
        assert torch.equal(pk.pool_rows(weight, alone.layout(device), backend=backend), together[start:end])


def test_what_is_not_written_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests' own guard: a backend that writes nothing leaves NaN, which no comparison accepts."""
    silent = SimpleNamespace(pool_rows=lambda *arguments: None, unusable_reason=lambda: None)
    layout = cases.make_batch(pk.SessionPatches(3), [17, 2]).layout()
    monkeypatch.setattr(backends, "module", lambda name: silent)
    assert pk.pool_rows(cases.make_weight(cases.VOCABULARY, 8), layout).isnan().all()


# ------------------------------------------------------------------ out


@by_dtype
@pytest.mark.parametrize("width", [1, 41, 64])
@pytest.mark.parametrize("slack", [0, 5], ids=["contiguous", "row-stride"])
def test_out(backend: str, device: torch.device, dtype: torch.dtype, width: int, slack: int) -> None:
    batch = cases.make_batch(pk.SessionPatches(3), [0, 17, 1])
    weight = cases.make_weight(cases.VOCABULARY, width, dtype, device=device)
    layout = batch.layout(device)
    canvas = torch.full((layout.num_rows + 2, width + slack), 777.0, dtype=dtype, device=device)
    out = canvas[1:-1, slack // 2 : slack // 2 + width]
    got = pk.pool_rows(weight, layout, backend=backend, out=out)
    assert got is out
    assert torch.equal(out, pk.pool_rows(weight, layout, backend=backend))
    out.fill_(777.0)
    assert (canvas == 777.0).all(), "something outside out was written"


# ------------------------------------------------------------------ scale


SCALES = [2.0, -0.37, 45.25483399593904, 0.0]


@by_dtype
@pytest.mark.parametrize("scale", SCALES)
def test_scale(backend: str, device: torch.device, dtype: torch.dtype, scale: float) -> None:
    """Rounded once, after the product: text is what PyTorch's own product is."""
    batch = cases.make_batch(pk.SessionPatches(3), [0, 17, 1])
    weight = cases.make_weight(cases.VOCABULARY, 41, dtype, device=device)
    layout = batch.layout(device)
    got = pk.pool_rows(weight, layout, backend=backend, scale=scale)
    assert_pooled(backend, got, weight, batch.rows(), scale=scale)
    literal = layout.lo < 0
    product = weight[(-1 - layout.lo[literal]).long()] * scale
    assert torch.equal(got[literal], product) or cases.truncates(backend, dtype)
    into = torch.full_like(got, 777.0)
    assert torch.equal(pk.pool_rows(weight, layout, backend=backend, scale=scale, out=into), got)
    grad_rows = cases.make_weight(layout.num_rows, 41, dtype, seed=1, device=device)
    grad = gradient(weight, layout, grad_rows, backend=backend, scale=scale)
    assert_gradient(backend, grad, grad_rows, batch.rows(), cases.VOCABULARY, scale=scale)
    by_hand = pk.pool_rows_grad(grad_rows, layout, cases.VOCABULARY, backend=backend, scale=scale)
    compact = pk.pool_rows_grad(grad_rows, layout, cases.VOCABULARY, dense=False, backend=backend, scale=scale)
    assert torch.equal(by_hand, grad) and torch.equal(compact.to_dense(), grad)


def test_scale_of_one_copies_every_bit(backend: str, device: torch.device) -> None:
    weight = torch.tensor([[-0.0, 0.0, float("nan"), float("-inf"), 1e-42]], device=device)
    weight.view(torch.int32)[0, 2] = 0x7FC12345  # a NaN that says something
    layout = cases.Batch({0: [0]}, [[0]], pk.TextOnly(), cases.NO_PROMPT).layout(device)
    for scale in (1, 1.0):
        got = pk.pool_rows(weight, layout, backend=backend, scale=scale)
        assert torch.equal(got.view(torch.int32), weight.view(torch.int32))


WRONG_SCALES = {
    "nan": (float("nan"), ValueError, "scale: expected a finite number, .*, got nan"),
    "inf": (float("-inf"), ValueError, "scale: expected a finite number, .*, got -inf"),
    "beyond float32": (
        1e39,
        ValueError,
        r"scale: expected a finite number, at most 3.403e\+38 for torch.float32, got 1e\+39",
    ),
    "bool": (True, TypeError, "scale: expected a number, got bool"),
    "string": ("2", TypeError, "scale: expected a number, got str"),
    "none": (None, TypeError, "scale: expected a number, got NoneType"),
    "tensor": (torch.tensor(2.0), TypeError, "scale: expected a number, got Tensor"),
}


@pytest.mark.parametrize("name", WRONG_SCALES)
def test_wrong_scale(name: str) -> None:
    scale, error, message = WRONG_SCALES[name]
    layout = cases.make_batch(pk.SessionPatches(3), [9]).layout()
    weight = cases.make_weight(cases.VOCABULARY, 8)
    with pytest.raises(error, match=message):
        pk.pool_rows(weight, layout, scale=scale)
    with pytest.raises(error, match=message):
        pk.pool_rows_grad(weight[: layout.num_rows], layout, cases.VOCABULARY, scale=scale)
    assert pk.pool_rows(weight.double(), layout, scale=1e39).isfinite().all()


# ------------------------------------------------------------------ gradients


@by_dtype
@by_policy
def test_backward_of_every_policy(backend: str, device: torch.device, name: str, dtype: torch.dtype) -> None:
    batch = cases.make_batch(cases.POLICIES[name], HARD_LENGTHS)
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
    batch = cases.make_batch(pk.SessionPatches(3), [0, 17, 1])
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
    batch = cases.make_batch(pk.SessionPatches(4), HARD_LENGTHS)
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
    batch = cases.make_batch(pk.SessionPatches(4), HARD_LENGTHS)
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
    layout = cases.make_batch(pk.SessionPatches(4), HARD_LENGTHS).layout(device)
    grad_rows = cases.make_weight(layout.num_rows, 41, seed=1, device=device)
    expected = pk.pool_rows_grad(grad_rows, layout, cases.VOCABULARY, backend=backend)
    zeros = torch.zeros(cases.VOCABULARY, 41, device=device)
    assert torch.equal(pk.pool_rows_grad(grad_rows, layout, cases.VOCABULARY, backend=backend, out=zeros), expected)


def test_wrong_gradient_to_add_to() -> None:
    layout = cases.make_batch(pk.SessionPatches(3), [9]).layout()
    grad_rows = cases.make_weight(layout.num_rows, 8)
    count = cases.VOCABULARY
    cut = torch.ones(layout.num_rows + count, 8)
    wrong: list[tuple[Any, type[Exception], str]] = [
        ([[0.0]], TypeError, "out: expected a tensor, got list"),
        (torch.zeros(count, 7), ValueError, r"out: expected shape \(97, 8\), got \(97, 7\)"),
        (torch.zeros(count - 1, 8), ValueError, r"out: expected shape \(97, 8\), got \(96, 8\)"),
        (
            torch.zeros(count, 8).double(),
            TypeError,
            "out: expected grad_rows's dtype, torch.float32, got torch.float64",
        ),
        (torch.zeros(count, 8, device="meta"), ValueError, "out: expected grad_rows's device, cpu, got meta"),
        (torch.zeros(8, count).t(), ValueError, r"out: expected contiguous rows .* got stride \(1, 97\)"),
        (torch.zeros(1, 8).expand(count, 8), ValueError, "out: expected rows that do not overlap"),
        (torch.zeros(count, 8, requires_grad=True), ValueError, "out: expected a tensor that requires no gradient"),
        (cut[layout.num_rows :], ValueError, "out: expected memory of its own, got grad_rows's"),
    ]
    for out, error, message in wrong:
        given = cut[: layout.num_rows] if out is wrong[-1][0] else grad_rows
        with pytest.raises(error, match=message):
            pk.pool_rows_grad(given, layout, count, out=out)
    assert cut.eq(1).all()
    with pytest.raises(ValueError, match=r"out: expected None for a compact gradient \(dense=False\), got a tensor"):
        pk.pool_rows_grad(grad_rows, layout, count, dense=False, out=torch.zeros(count, 8))


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
    lengths = [40, 0, 33, 1] if cases.interpreted(backend) else [400, 0, 333, 90, 500, 1]
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


# ------------------------------------------------------------------ autograd's corners


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


# ------------------------------------------------------------------ large


@pytest.mark.slow
def test_more_elements_than_int32(backend: str) -> None:
    """V x D past 2^31: an address computed in int32 would wrap."""
    width, rows = 1024, 2**21 + 1000
    weight = torch.zeros(rows, width, dtype=torch.bfloat16)
    weight[-3:] = cases.make_weight(3, width, torch.bfloat16)
    titles: dict[Any, oracle.Title] = {0: [rows - 1, rows - 2], 1: [rows - 3], 2: [5]}
    batch = cases.Batch(titles, [[0, 1, 2, 0]], pk.ItemPatches(1), oracle.Parts([0], [1], [], []))
    layout = batch.layout(transpose=True)
    pooled = pk.pool_rows(weight, layout, backend=backend)
    oracle_rows = [[[token - rows + 10 if token > 100 else 0 for token in t] for t in row] for row in batch.rows()]
    small = torch.zeros(10, width, dtype=torch.bfloat16)
    small[7:] = weight[-3:]
    assert_pooled(backend, pooled, small, oracle_rows)
    grad = pk.pool_rows_grad(torch.ones_like(pooled), layout, rows, backend=backend)
    assert grad[rows - 3].eq(1).all() and grad[rows - 1].eq(1.5).all() and not grad[100 : rows - 3].any()
