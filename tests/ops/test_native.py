# SPDX-License-Identifier: Apache-2.0
"""What only the native backend has: instruction sets, threads, streaming stores, its own rounding, its own checks."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

import cases
import numpy as np
import oracle
import pytest
import torch

import patchkern as pk
from patchkern.ops import native

if not pk.backends()["native"].usable:
    pytest.skip(f"the native backend is not usable: {pk.backends()['native'].reason}", allow_module_level=True)

WIDTHS = [1, 41, 64, 1000, 4096]
LENGTHS = [0, 1, 5, 23, 60]
NARROW = [torch.bfloat16, torch.float16]

Threads = Callable[[int], None]


@pytest.fixture(params=native.isa_levels())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every instruction set that was built and that this CPU has."""
    monkeypatch.setenv(native.ENVIRONMENT, request.param)
    return str(request.param)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bit patterns, in which NaN equals itself and -0.0 is not 0.0."""
    tensor = tensor.contiguous()
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


PLAIN: dict[str, Any] = {"table": None, "title_index": None, "scale": 1.0}


def literal_layout(tokens: list[int]) -> dict[str, Any]:
    """`native.pool_rows`' arguments for a batch of literals."""
    lo = -1 - torch.tensor(tokens, dtype=torch.int32)
    none = torch.zeros(0, dtype=torch.int32)
    return {
        "lo": lo,
        "hi": torch.zeros_like(lo),
        "items": none,
        "token_ids": none,
        "offsets": torch.zeros(1, dtype=torch.int32),
        **PLAIN,
    }


def one_title(tokens: list[int]) -> dict[str, Any]:
    """`native.pool_rows`' arguments for one item patch."""
    return {
        "lo": torch.zeros(1, dtype=torch.int32),
        "hi": torch.ones(1, dtype=torch.int32),
        "items": torch.zeros(1, dtype=torch.int32),
        "token_ids": torch.tensor(tokens, dtype=torch.int32),
        "offsets": torch.tensor([0, len(tokens)], dtype=torch.int32),
        **PLAIN,
    }


# ------------------------------------------------------------------ values, on every instruction set


@pytest.mark.parametrize("strided", [False, True], ids=["whole", "strided"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_forward_and_backward(isa: str, dtype: torch.dtype, width: int, strided: bool) -> None:
    batch = cases.make_batch(pk.SessionPatches(group_size=5, max_items=None), LENGTHS)
    layout, rows = batch.layout(), batch.rows()
    weight = cases.make_weight(cases.VOCABULARY, width, dtype, strided)
    out = cases.make_weight(layout.num_rows, width, dtype, strided, seed=9)
    oracle.assert_pooled(pk.pool_rows(weight, layout, backend="native", out=out), weight, rows)
    grad_rows = cases.make_weight(layout.num_rows, width, dtype, strided, seed=1)
    grad = pk.pool_rows_grad(grad_rows, layout, cases.VOCABULARY, backend="native")
    oracle.assert_gradient(grad, grad_rows, rows, cases.VOCABULARY)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_every_16_bit_pattern_survives(isa: str, dtype: torch.dtype) -> None:
    """Literals are copied; a title of one token goes through the conversions and comes back the same."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    weight = patterns.reshape(1, -1)
    for layout in (literal_layout([0]), one_title([0])):
        out = torch.zeros_like(weight)
        native.pool_rows(weight, **layout, out=out)
        nan = torch.isnan(weight)
        assert torch.equal(bits(out)[~nan], bits(weight)[~nan])
        assert torch.isnan(out)[nan].all()
        if layout["items"].numel() == 0:
            assert torch.equal(bits(out), bits(weight))


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_rounding_is_to_nearest_even(isa: str, dtype: torch.dtype) -> None:
    """Means of two random patterns are exact in float64, so PyTorch's conversion of them is the right answer."""
    pairs = torch.randint(-(2**15), 2**15, (2, 200_000), dtype=torch.int32).to(torch.int16).view(dtype)
    # neighbours, whose mean is a tie or next to one
    pairs[1, ::2] = (bits(pairs[0, ::2]).int() + torch.randint(-3, 4, (100_000,))).to(torch.int16).view(dtype)
    out = torch.zeros_like(pairs[:1])
    native.pool_rows(pairs, **one_title([0, 1]), out=out)
    exact = ((pairs[0].float() + pairs[1].float()) / 2).to(dtype)
    nan = torch.isnan(exact)
    assert torch.equal(bits(out[0])[~nan], bits(exact)[~nan])
    assert torch.isnan(out[0])[nan].all()


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_infinities_and_overflow(isa: str, dtype: torch.dtype) -> None:
    big = torch.finfo(dtype).max
    weight = torch.tensor([[big, float("inf"), float("inf")], [big, -big, -float("inf")]], dtype=dtype)
    out = torch.zeros(1, 3, dtype=dtype)
    native.pool_rows(weight, **one_title([0, 1]), out=out)
    assert out[0, 1] == float("inf") and torch.isnan(out[0, 2])
    assert out[0, 0] == (big if dtype in NARROW and dtype == torch.float16 else float("inf"))


def test_instruction_sets_agree_with_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same operations in the same order for each column: only fused multiply-add may differ, in the gradient."""
    batch = cases.make_batch(pk.SessionPatches(group_size=4, max_items=None), LENGTHS)
    layout, weight = batch.layout(), cases.make_weight(cases.VOCABULARY, 1000, torch.bfloat16)
    results = []
    for level in native.isa_levels():
        monkeypatch.setenv(native.ENVIRONMENT, level)
        results.append(bits(pk.pool_rows(weight, layout, backend="native")))
    assert all(torch.equal(results[0], other) for other in results[1:])


# ------------------------------------------------------------------ threads, tiles, streaming stores


@pytest.fixture(scope="module")
def large() -> tuple[pk.PatchLayout, torch.Tensor, torch.Tensor]:
    """Large enough for many tiles, several threads and streaming stores: 40 MB of rows."""
    batch = cases.make_batch(pk.SessionPatches(group_size=5, max_items=None), [400] * 60)
    layout = batch.layout()
    weight = cases.make_weight(cases.VOCABULARY, 1024)
    return layout, weight, cases.make_weight(layout.num_rows, 1024, seed=5)


def test_threads_change_nothing(threads: Threads, large: Any) -> None:
    layout, weight, grad_rows = large
    assert layout.num_rows * 4096 > 32 << 20
    forward, dense, compact = [], [], []
    for count in (1, 2, 3, 8):
        threads(count)
        forward.append(bits(pk.pool_rows(weight, layout, backend="native")))
        dense.append(bits(pk.pool_rows_grad(grad_rows, layout, cases.VOCABULARY, backend="native")))
        sparse = pk.pool_rows_grad(grad_rows, layout, cases.VOCABULARY, dense=False, backend="native")
        compact.append(bits(sparse.values()))
    for results in (forward, dense, compact):
        assert all(torch.equal(results[0], other) for other in results[1:])


def test_streaming_stores_write_the_same(isa: str, large: Any) -> None:
    """A row stride that is no multiple of a cache line turns streaming off."""
    layout, weight, _ = large
    streamed = pk.pool_rows(weight, layout, backend="native")
    ordinary = torch.full((layout.num_rows, 1025), float("nan"))[:, :1024]
    pk.pool_rows(weight, layout, backend="native", out=ordinary)
    assert torch.equal(bits(streamed), bits(ordinary))
    reference = pk.pool_rows(weight, layout, backend="reference")
    assert torch.allclose(streamed, reference, rtol=1e-5, atol=1e-6)


def test_neighbours_of_a_strided_output_are_untouched(isa: str) -> None:
    layout = cases.make_batch(pk.ItemPatches(keep_text=2, max_items=None), LENGTHS).layout()
    for width in WIDTHS:
        wide = torch.full((layout.num_rows, width + 5), 7.0)
        pk.pool_rows(cases.make_weight(cases.VOCABULARY, width), layout, backend="native", out=wide[:, 2 : 2 + width])
        assert (wide[:, :2] == 7).all() and (wide[:, 2 + width :] == 7).all()


def test_long_runs_are_summed_in_parts(isa: str) -> None:
    """A separator's gradient adds 100,000 rows; added one after the other in float32 it would be off by far more."""
    count = 100_000
    grad_rows = torch.rand(count, 3)
    one = torch.zeros(1, dtype=torch.int32)
    out = torch.empty(1, 3)
    rows = torch.arange(count, dtype=torch.int32)
    ends = torch.tensor([0, count], dtype=torch.int32)
    native.pool_rows_grad(grad_rows, one, ends, rows, torch.ones_like(rows), 1.0, out, False, False)
    exact = grad_rows.double().sum(0)
    assert ((out[0].double() - exact).abs() / exact).max() < 2e-5
    straight = grad_rows.numpy().cumsum(0, dtype=np.float32)[-1]
    assert (out[0].double() - exact).abs().max() <= np.abs(straight - exact.numpy()).max() + 1e-3


def _pool_in_child(results: Any) -> None:
    layout = cases.make_batch(pk.ItemPatches(max_items=None), LENGTHS).layout()
    results.put(pk.pool_rows(cases.make_weight(cases.VOCABULARY, 64), layout, backend="native").numpy())


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_works_after_fork(threads: Threads, large: Any) -> None:
    """Data loaders fork: no thread of a call may outlive it."""
    threads(4)
    layout, weight, _ = large
    pk.pool_rows(weight, layout, backend="native")
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    child = context.Process(target=_pool_in_child, args=(results,))
    child.start()
    got = results.get(timeout=60)
    child.join()
    here = context.Queue()
    _pool_in_child(here)
    assert np.array_equal(got, here.get(timeout=60))


# ------------------------------------------------------------------ emptiness and malformed calls


def test_nothing_to_do(isa: str) -> None:
    for width in WIDTHS:
        weight = cases.make_weight(cases.VOCABULARY, width)
        native.pool_rows(weight, **literal_layout([]), out=torch.zeros(0, width))
        none = torch.zeros(0, dtype=torch.int32)
        dense = torch.zeros(cases.VOCABULARY, width)
        offsets = torch.zeros(1, dtype=torch.int32)
        native.pool_rows_grad(torch.zeros(0, width), none, offsets, none, none, 1.0, dense, True, False)
        assert not dense.any()


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


ROWS = {"lo": [0, -4], "hi": [2, 0], "items": [1, 0], "token_ids": [3, 4, 5], "offsets": [0, 1, 3]}
MALFORMED_ROWS = {
    "literal token >= V": ({"lo": [0, -11]}, r"lo\[1\]: expected a literal's token below"),
    "smallest lo": ({"lo": [0, -(2**31)]}, r"lo\[1\]: expected a literal's token below"),
    "literal with hi": ({"hi": [2, 1]}, r"hi\[1\]: expected 0 for a literal"),
    "empty patch": ({"hi": [0, 0]}, r"lo\[0\]: expected a patch's range"),
    "patch past the items": ({"hi": [3, 0]}, r"lo\[0\]: expected a patch's range"),
    "item past the titles": ({"items": [1, 2]}, r"items\[1\]: expected an index of one of the titles"),
    "negative item": ({"items": [-1, 0]}, r"items\[0\]: expected an index of one of the titles"),
    "title token >= V": ({"token_ids": [3, 10, 5]}, r"token_ids\[1\]: expected a token below"),
    "negative title token": ({"token_ids": [3, 4, -1]}, r"token_ids\[2\]: expected a token below"),
    "offsets from 1": ({"offsets": [1, 2, 3]}, r"offsets\[0\]: expected rising offsets"),
    "empty title": ({"offsets": [0, 0, 3]}, r"offsets\[1\]: expected rising offsets"),
    "offsets fall": ({"offsets": [0, 4, 3]}, r"offsets\[2\]: expected rising offsets"),
    "offsets short": ({"offsets": [0, 1, 2]}, r"offsets\[2\]: expected rising offsets"),
    "offsets long": ({"offsets": [0, 1, 2**31 - 1]}, r"offsets\[2\]: expected rising offsets"),
}


@pytest.mark.parametrize("name", MALFORMED_ROWS)
def test_malformed_rows_are_refused(name: str, isa: str) -> None:
    change, message = MALFORMED_ROWS[name]
    arguments = {key: int32(*values) for key, values in (ROWS | change).items()}
    weight, out = torch.ones(10, 5), torch.full((2, 5), 7.0)
    native.pool_rows(weight, **{key: int32(*values) for key, values in ROWS.items()}, **PLAIN, out=out)
    out.fill_(7.0)
    with pytest.raises(ValueError, match=message):
        native.pool_rows(weight, **arguments, **PLAIN, out=out)
    assert (out == 7).all(), "something was written"


TABLE_ROWS = {"lo": [0, -4, 1], "hi": [2, 0, 2], "items": [1, 0], "title_index": [4, 2]}
MALFORMED_TABLE_ROWS = {
    "title past the table": ({"title_index": [4, 5]}, r"title_index\[1\]: expected a row of the table"),
    "negative title": ({"title_index": [-1, 2]}, r"title_index\[0\]: expected a row of the table"),
    "item past the titles": ({"items": [1, 2]}, r"items\[1\]: expected an index of one of the titles"),
    "literal token >= V": ({"lo": [0, -11, 1]}, r"lo\[1\]: expected a literal's token below"),
}


@pytest.mark.parametrize("name", MALFORMED_TABLE_ROWS)
def test_malformed_rows_with_a_table_are_refused(name: str, isa: str) -> None:
    change, message = MALFORMED_TABLE_ROWS[name]
    # The titles' own tokens are not read, whatever they are.
    titles = {"token_ids": int32(99, -7), "offsets": int32(5, 1, -3)}
    weight, table = torch.ones(10, 5), torch.arange(5.0)[:, None].expand(5, 5).contiguous()
    out = torch.full((3, 5), 7.0)
    arguments = {key: int32(*values) for key, values in TABLE_ROWS.items()}
    native.pool_rows(weight, **arguments, **titles, table=table, scale=1.0, out=out)
    assert out[:, 0].tolist() == [3.0, 1.0, 4.0]
    out.fill_(7.0)
    arguments = {key: int32(*values) for key, values in (TABLE_ROWS | change).items()}
    with pytest.raises(ValueError, match=message):
        native.pool_rows(weight, **arguments, **titles, table=table, scale=1.0, out=out)
    assert (out == 7).all(), "something was written"


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_table_and_scale_on_every_instruction_set(isa: str, dtype: torch.dtype) -> None:
    batch = cases.make_batch(pk.SessionPatches(group_size=5, max_items=None), LENGTHS)
    layout, rows = batch.layout(), batch.rows()
    for width in WIDTHS:
        weight = cases.make_weight(cases.VOCABULARY, width, dtype)
        oracle.assert_pooled(pk.pool_rows(weight, layout, backend="native", scale=-3.7), weight, rows, scale=-3.7)
        table = pk.item_table(batch.catalog, weight, backend="native")
        exact = torch.stack([table.rows[torch.tensor(index)].double().mean(0) for index in _entries(layout)])
        patches = layout.lo >= 0
        got = pk.pool_rows(weight, layout, backend="native", table=table, scale=0.5)[patches].double()
        magnitude = exact.abs() + 1  # of normal values
        assert ((got - exact / 2).abs() <= 2 * oracle.UNIT_ROUNDOFF[dtype] * magnitude).all()
        grad_rows = cases.make_weight(layout.num_rows, width, dtype, seed=1)
        into = cases.make_weight(cases.VOCABULARY, width, dtype, seed=2)
        before = into.clone()
        pk.pool_rows_grad(grad_rows, layout, cases.VOCABULARY, backend="native", scale=-3.7, out=into)
        oracle.assert_gradient(into, grad_rows, rows, cases.VOCABULARY, scale=-3.7, before=before)


def _entries(layout: pk.PatchLayout) -> list[list[int]]:
    """Each patch's catalogue positions."""
    ends = zip(layout.lo.tolist(), layout.hi.tolist(), strict=True)
    return [layout.title_index[layout.items[lo:hi].long()].tolist() for lo, hi in ends if lo >= 0]


CONTRIBUTIONS = {"tokens": [2, 7], "token_offsets": [0, 2, 3], "rows": [0, 1, 2], "divisors": [1, 2, 3]}
MALFORMED_CONTRIBUTIONS = {
    "token >= V": ({"tokens": [2, 10]}, r"tokens\[1\]: expected ascending tokens below"),
    "negative token": ({"tokens": [-1, 7]}, r"tokens\[0\]: expected ascending tokens below"),
    "repeated token": ({"tokens": [7, 7]}, r"tokens\[1\]: expected ascending tokens"),
    "offsets fall": ({"token_offsets": [0, 4, 3]}, r"token_offsets\[2\]: expected rising offsets"),
    "token without contribution": ({"token_offsets": [0, 0, 3]}, r"token_offsets\[1\]: expected rising offsets"),
    "offsets long": ({"token_offsets": [0, 2, 9]}, r"token_offsets\[2\]: expected rising offsets"),
    "row past the rows": ({"rows": [0, 3, 2]}, r"rows\[1\]: expected an index of one of the rows"),
    "negative row": ({"rows": [0, 1, -5]}, r"rows\[2\]: expected an index of one of the rows"),
    "divisor 0": ({"divisors": [1, 0, 3]}, r"divisors\[1\]: expected a divisor of at least 1"),
    "negative divisor": ({"divisors": [1, 2, -3]}, r"divisors\[2\]: expected a divisor of at least 1"),
}


@pytest.mark.parametrize("name", MALFORMED_CONTRIBUTIONS)
def test_malformed_contributions_are_refused(name: str, isa: str) -> None:
    change, message = MALFORMED_CONTRIBUTIONS[name]
    arguments = {key: int32(*values) for key, values in (CONTRIBUTIONS | change).items()}
    out = torch.full((10, 5), 7.0)
    with pytest.raises(ValueError, match=message):
        native.pool_rows_grad(torch.ones(3, 5), **arguments, scale=1.0, out=out, scatter=True, accumulate=False)
    assert (out == 7).all(), "something was written"


def test_unknown_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.ENVIRONMENT, "mmx")
    assert "PATCHKERN_ISA: expected auto, baseline" in str(native.unusable_reason())
    with pytest.raises(ValueError, match="PATCHKERN_ISA: expected auto, baseline"):
        native.pool_rows(torch.ones(10, 5), **literal_layout([1]), out=torch.zeros(1, 5))
