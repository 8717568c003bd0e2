# SPDX-License-Identifier: Apache-2.0
"""`pool_rows` on every backend, against the float64 loops of oracle.py."""

from __future__ import annotations

from types import SimpleNamespace
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
    assert_pooled,
    by_dtype,
    by_policy,
    by_policy_and_dtype,
    few_lengths,
    gradient,
    hard_lengths,
    takers,
)

import patchkern as pk
from patchkern.ops import backends

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


@by_policy_and_dtype
def test_forward_of_every_policy(backend: str, device: torch.device, name: str, dtype: torch.dtype) -> None:
    batch = cases.make_batch(cases.POLICIES[name], hard_lengths(backend, dtype))
    weight = cases.make_weight(cases.VOCABULARY, 41, dtype, device=device)
    assert_pooled(backend, pk.pool_rows(weight, batch.layout(device), backend=backend), weight, batch.rows())


@by_dtype
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "column-slice"])
def test_forward_of_every_width(
    backend: str, device: torch.device, width: int, dtype: torch.dtype, strided: bool
) -> None:
    batch = cases.make_batch(pk.SessionPatches(3), few_lengths(backend))
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
    batch = cases.make_batch(pk.SessionPatches(3), few_lengths(backend))
    weight = cases.make_weight(cases.VOCABULARY, width, dtype, device=device)
    layout = batch.layout(device)
    canvas = torch.full((layout.num_rows + 2, width + slack), 777.0, dtype=dtype, device=device)
    out = canvas[1:-1, slack // 2 : slack // 2 + width]
    got = pk.pool_rows(weight, layout, backend=backend, out=out)
    assert got is out
    expected = pk.pool_rows(weight, layout, backend=backend)
    if backend == "triton" and device.type == "cuda":  # rows of another alignment may be added up in another order
        torch.testing.assert_close(out, expected)
    else:
        assert torch.equal(out, expected)
    out.fill_(777.0)
    assert (canvas == 777.0).all(), "something outside out was written"


# ------------------------------------------------------------------ scale


SCALES = [2.0, -0.37, 45.25483399593904, 0.0]


@pytest.mark.parametrize(
    ("scale", "dtype"),  # a narrow dtype is rounded to once, whatever the product is
    [
        pytest.param(scale, dtype, id=f"{scale}-{str(dtype).removeprefix('torch.')}")
        for dtype in cases.DTYPES
        for scale in (SCALES if dtype.itemsize > 2 else SCALES[1:3])
    ],
)
def test_scale(backend: str, device: torch.device, dtype: torch.dtype, scale: float) -> None:
    """Rounded once, after the product: text is what PyTorch's own product is."""
    batch = cases.make_batch(pk.SessionPatches(3), few_lengths(backend))
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
