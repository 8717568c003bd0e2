# SPDX-License-Identifier: Apache-2.0
"""The logic of the CUDA kernels on the CPU.

g++ compiles the .cu files against tests/cuda_host, where every CUDA thread is a fiber, into a module that takes the
place of patchkern._cuda. So the binding and patchkern/ops/cuda.py are tested, too.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import cases
import oracle
import pytest
import torch
from cuda_cases import CSRC, REPOSITORY, bits, columns, command, kept_for_host
from hypothesis import given, settings
from hypothesis import strategies as st

import patchkern as pk
from patchkern.ops import cuda

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WIDTHS = [1, 41, 64, 1000, 2048, 4096]
LENGTHS = [0, 1, 5, 23, 60]
SANITIZERS = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g"


@pytest.fixture(scope="session")
def host_module() -> Path:
    """The CUDA module, compiled for the CPU."""
    return kept_for_host(
        "_cuda", *(CSRC / name for name in ("pool_rows_fwd.cu", "pool_rows_bwd.cu", "bindings_cuda.cpp"))
    )


@pytest.fixture(scope="session")
def host(host_module: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("on_host._cuda", host_module)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def on_host(host: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """`patchkern.ops.cuda` runs on CPU tensors."""
    monkeypatch.setattr(cuda, "_cuda", host)
    monkeypatch.setattr(cuda, "_call_on", lambda device, function, *arguments: function(*arguments, 0, 0))


@pytest.fixture
def set_order(host_module: Path) -> Iterator[Callable[[int], None]]:
    """Set the order in which blocks and warps run: 0 for their own, else a seed."""
    order = ctypes.CDLL(str(host_module)).cuda_host_order
    yield order
    order(0)


class Guarded(NamedTuple):
    """A matrix within a larger one."""

    matrix: torch.Tensor
    around: torch.Tensor

    def check(self) -> torch.Tensor:
        """The matrix, once nothing around it has been written."""
        result = self.matrix.clone()
        self.matrix.fill_(7)
        assert (self.around == 7).all(), "something outside the matrix was written"
        return result


def guarded(rows: int, width: int, dtype: torch.dtype, margin: int = 8, fill: float = float("nan")) -> Guarded:
    """Rows and columns around it hold 7; with a margin of 8 columns, rows can be accessed by 16 bytes."""
    around = torch.full((rows + 2, width + 2 * margin), 7, dtype=dtype)
    matrix = around[1 : rows + 1, margin : margin + width]
    matrix.fill_(fill)
    return Guarded(matrix, around)


def pool(
    weight: torch.Tensor, layout: pk.PatchLayout, scale: float = 1.0, margin: int = 8, **table: Any
) -> torch.Tensor:
    out = guarded(layout.num_rows, weight.shape[1], weight.dtype, margin)
    rows = (layout.lo, layout.hi, layout.items, layout.token_ids, layout.offsets)
    cuda.pool_rows(weight, *rows, table.get("table"), table.get("title_index"), scale, out.matrix)
    return out.check()


def pool_grad(
    grad_rows: torch.Tensor,
    transpose: tuple[torch.Tensor, ...],
    num_rows: int,
    scatter: bool,
    scale: float = 1.0,
    accumulate_on: torch.Tensor | None = None,
    margin: int = 8,
) -> torch.Tensor:
    out = guarded(num_rows, grad_rows.shape[1], grad_rows.dtype, margin, 0.0 if scatter else float("nan"))
    if accumulate_on is not None:
        out.matrix.copy_(accumulate_on)
    cuda.pool_rows_grad(grad_rows, *transpose, scale, out.matrix, scatter, accumulate_on is not None)
    return out.check()


def check_batch(batch: cases.Batch, width: int, dtype: torch.dtype, strided: bool = False) -> None:
    """Forward, dense and compact gradient against the float64 oracle."""
    layout, rows = batch.layout(), batch.rows()
    margin = 3 if strided else 8
    weight = cases.make_weight(cases.VOCABULARY, width, dtype, strided)
    oracle.assert_pooled(pool(weight, layout, margin=margin), weight, rows)
    grad_rows = cases.make_weight(layout.num_rows, width, dtype, strided, seed=1)
    transpose = columns(layout)
    dense = pool_grad(grad_rows, transpose, cases.VOCABULARY, True, margin=margin)
    oracle.assert_gradient(dense, grad_rows, rows, cases.VOCABULARY)
    compact = pool_grad(grad_rows, transpose, len(transpose[0]), False, margin=margin)
    assert torch.equal(bits(compact), bits(dense[transpose[0].long()]))


@pytest.mark.usefixtures("on_host")
class TestOnHost:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("policy", cases.POLICIES)
    def test_policies(self, policy: str, dtype: torch.dtype) -> None:
        check_batch(cases.make_batch(cases.POLICIES[policy], LENGTHS), 64, dtype)

    @pytest.mark.parametrize("strided", [False, True], ids=["whole", "strided"])
    @pytest.mark.parametrize("width", WIDTHS)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_widths(self, dtype: torch.dtype, width: int, strided: bool) -> None:
        lengths = LENGTHS if width < 1000 else [30]
        check_batch(cases.make_batch(pk.SessionPatches(group_size=5, max_items=None), lengths), width, dtype, strided)

    @settings(max_examples=50)
    @given(batch=cases.batches(), width=st.sampled_from([1, 3, 8, 24]), dtype=st.sampled_from(DTYPES))
    def test_random_batches(self, batch: cases.Batch, width: int, dtype: torch.dtype) -> None:
        check_batch(batch, width, dtype)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("group", [8, 9, 31, 33, 300])
    def test_long_sessions_among_literals(self, group: int, dtype: torch.dtype) -> None:
        """A patch of 8 items is one warp's, one of 9 the whole block's; hundreds take several rounds of 32."""
        policy = pk.SessionPatches(group_size=group, max_items=None)
        batch = cases.make_batch(policy, [3 * group + 1, 2, 5 * group], with_targets=False)
        check_batch(batch, 72, dtype)

    @pytest.mark.parametrize("count", [1, 31, 33, 255, 257, 400])
    def test_long_rows_are_dealt_to_the_blocks_of_a_group(self, count: int) -> None:
        """256 rows share their long patches; the last of them may be few."""
        titles = [torch.randint(0, 50, (length,)).tolist() for length in (1, 3, 8, 70)]
        sizes = torch.tensor([0, 0, 1, 2, 8, 9, 40, 270])[torch.randint(0, 8, (count,))]
        items = torch.randint(0, 4, (int(sizes.sum()) + 1,), dtype=torch.int32)
        ends = sizes.cumsum(0)
        lo = torch.where(sizes == 0, -1 - torch.randint(0, 50, (count,)), ends - sizes).to(torch.int32)
        hi = torch.where(sizes == 0, 0, ends).to(torch.int32)
        token_ids = torch.tensor([token for title in titles for token in title], dtype=torch.int32)
        offsets = torch.tensor([0, 1, 4, 12, 82], dtype=torch.int32)
        weight, out = torch.randn(50, 8).bfloat16(), guarded(count, 8, torch.bfloat16)
        cuda.pool_rows(weight, lo, hi, items, token_ids, offsets, None, None, 1.0, out.matrix)
        rows = [
            [[-1 - first]] if first < 0 else [titles[item] for item in items[first:last].tolist()]
            for first, last in zip(lo.tolist(), hi.tolist(), strict=True)
        ]
        oracle.assert_pooled(out.check(), weight, rows)

    def test_many_patches_of_many_sizes(self) -> None:
        titles = cases.make_titles(40, longest=40)
        histories = cases.make_histories(titles, [50, 1, 70])
        check_batch(cases.Batch(titles, histories, pk.RandomItemPatches(probability=0.8)), 40, torch.bfloat16)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("width", [40, 41])
    def test_literals_are_copied_bit_for_bit(self, width: int, dtype: torch.dtype) -> None:
        patterns = torch.randint(-(2**15), 2**15, (50, width * dtype.itemsize // 2), dtype=torch.int16)
        weight = patterns.view(dtype)
        tokens = torch.randint(0, 50, (77,), dtype=torch.int32)
        none = torch.zeros(0, dtype=torch.int32)
        out = torch.zeros(77, width, dtype=dtype)
        offsets = torch.zeros(1, dtype=torch.int32)
        cuda.pool_rows(weight, -1 - tokens, torch.zeros_like(tokens), none, none, offsets, None, None, 1.0, out)
        assert torch.equal(bits(out), bits(weight[tokens.long()]))

    @pytest.mark.parametrize("shift", [1, 4])
    def test_misaligned_matrices(self, shift: int) -> None:
        """Rows of 16-byte length at addresses that are not: each matrix in turn."""
        batch = cases.make_batch(pk.ItemPatches(keep_text=5, max_items=None), LENGTHS)
        layout = batch.layout()
        weight = cases.make_weight(cases.VOCABULARY, 64, torch.bfloat16)
        grad_rows = cases.make_weight(layout.num_rows, 64, torch.bfloat16, seed=1)
        expected, expected_grad = pool(weight, layout), pool_grad(grad_rows, columns(layout), cases.VOCABULARY, True)

        def shifted(matrix: torch.Tensor) -> torch.Tensor:
            room = torch.empty(matrix.numel() + shift, dtype=matrix.dtype)[shift:].view(matrix.shape)
            return room.copy_(matrix)

        assert torch.equal(pool(shifted(weight), layout), expected)
        assert torch.equal(pool(weight, layout, margin=shift), expected)
        grad = pool_grad(shifted(grad_rows), columns(layout), cases.VOCABULARY, True)
        assert torch.equal(grad, expected_grad)
        assert torch.equal(pool_grad(grad_rows, columns(layout), cases.VOCABULARY, True, margin=shift), expected_grad)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("policy", ["text", "items", "sessions-end"])
    def test_scale(self, policy: str, dtype: torch.dtype) -> None:
        """A power of two only moves the exponent; 45.25 is rounded once."""
        batch = cases.make_batch(cases.POLICIES[policy], LENGTHS)
        layout = batch.layout()
        weight = cases.make_weight(cases.VOCABULARY, 24, dtype)
        assert torch.equal(pool(weight, layout, scale=4.0), 4 * pool(weight, layout))
        exact = 45.25 * oracle.pool(weight, batch.rows())
        error = (pool(weight, layout, scale=45.25).double() - exact).abs()
        bound = (oracle.UNIT_ROUNDOFF[dtype] * 1.01 + 40 * 2.0**-24) * 45.25 * oracle.pool(weight.abs(), batch.rows())
        assert (error <= bound).all()
        grad_rows = cases.make_weight(layout.num_rows, 24, dtype, seed=1)
        plain, scaled = (pool_grad(grad_rows, columns(layout), cases.VOCABULARY, True, scale) for scale in (1.0, 0.25))
        assert torch.equal(scaled, plain / 4)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_table(self, dtype: torch.dtype) -> None:
        """Each title's mean is a row of a table; a patch of one item is a copy of it, also of -0.0."""
        batch = cases.make_batch(pk.SessionPatches(group_size=12, max_items=None), [5, 23, 60])
        layout, rows = batch.layout(), batch.rows()
        weight = cases.make_weight(cases.VOCABULARY, 48, dtype)
        table = cases.make_weight(200, 48, dtype, seed=5)
        table[:, 3] = -0.0
        titles = len(layout.offsets) - 1
        title_index = torch.randperm(200)[:titles].to(torch.int32)
        got = pool(weight, layout, table=table, title_index=title_index)
        lo, hi, items = layout.lo.tolist(), layout.hi.tolist(), layout.items.long()
        singles = 0
        for row, (first, last) in enumerate(zip(lo, hi, strict=True)):
            if first < 0:
                assert torch.equal(bits(got[row]), bits(weight[-1 - first]))
                continue
            members = table[title_index[items[first:last]].long()]
            if last == first + 1:
                singles += 1
                assert torch.equal(bits(got[row]), bits(members[0]))
            exact, size = members.double().mean(0), members.double().abs().mean(0)
            bound = (oracle.UNIT_ROUNDOFF[dtype] * 1.01 + 20 * 2.0**-24) * size + oracle.HALF_SMALLEST[dtype]
            assert ((got[row].double() - exact).abs() <= bound).all()
        assert singles > 0 and len(rows) == len(got)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("scatter", [True, False], ids=["dense", "compact"])
    def test_accumulate(self, scatter: bool, dtype: torch.dtype) -> None:
        """The existing value joins in float32, before the one rounding."""
        batch = cases.make_batch(pk.SessionPatches(group_size=5, max_items=None), [60] * 4)
        layout = batch.layout()
        transpose = columns(layout)
        grad_rows = cases.make_weight(layout.num_rows, 24, dtype, seed=1)
        tokens = transpose[0].long()
        count = cases.VOCABULARY if scatter else len(tokens)
        before = cases.make_weight(count, 24, dtype, seed=2)
        got = pool_grad(grad_rows, transpose, count, scatter, accumulate_on=before)
        where = tokens if scatter else torch.arange(count)
        exact = before.double().clone()
        exact[where] += oracle.pool_gradient(grad_rows, batch.rows(), cases.VOCABULARY)[tokens]
        size = before.double().abs()
        size[where] += oracle.pool_gradient(grad_rows.abs(), batch.rows(), cases.VOCABULARY)[tokens]
        contributions = torch.diff(transpose[1]).max().item()
        bound = oracle.UNIT_ROUNDOFF[dtype] * 1.01 * exact.abs() + (contributions + 8) * 2.0**-24 * size
        assert ((got.double() - exact).abs() <= bound + oracle.HALF_SMALLEST[dtype]).all()
        untouched = torch.ones(count, dtype=torch.bool)
        untouched[where] = False
        assert torch.equal(bits(got[untouched]), bits(before[untouched]))

    @pytest.mark.parametrize("accumulate", [False, True])
    @pytest.mark.parametrize(
        "runs",
        [
            *([64], [65], [63, 1], [64, 64], [1] * 65, [63, 2, 63], [1, 200, 1], [128, 128], [32, 32, 1]),
            *([31, 33, 64, 1], [1] * 300, [5000, 3, 1000], [129, *[1] * 70, 640, 1]),
        ],
        ids=lambda runs: "-".join(map(str, runs[:4])) + ("..." if len(runs) > 4 else ""),
    )
    def test_tokens_that_cross_tiles(self, runs: list[int], accumulate: bool) -> None:
        """Contributions are summed 64 at a time, whatever their tokens: every way a token can lie across that."""
        count = sum(runs)
        offsets = torch.tensor([0, *torch.tensor(runs).cumsum(0).tolist()], dtype=torch.int32)
        tokens = (3 * torch.arange(len(runs))).to(torch.int32)
        rows = torch.randint(0, 50, (count,), dtype=torch.int32)
        divisors = torch.randint(1, 9, (count,), dtype=torch.int32)
        grad_rows = torch.randn(50, 12)
        before = torch.ones(len(runs), 12) if accumulate else None
        got = pool_grad(grad_rows, (tokens, offsets, rows, divisors), len(runs), False, accumulate_on=before)
        shares = grad_rows[rows.long()].double() / divisors[:, None]
        owners = torch.repeat_interleave(torch.arange(len(runs)), torch.tensor(runs))
        exact = torch.zeros(len(runs), 12, dtype=torch.float64).index_add_(0, owners, shares)
        size = torch.zeros(len(runs), 12, dtype=torch.float64).index_add_(0, owners, shares.abs())
        if accumulate:
            exact, size = exact + 1, size + 1
        roundings = torch.tensor(runs)[:, None] + 4
        assert ((got.double() - exact).abs() <= 2.0**-24 * 1.01 * roundings * size).all()

    def test_first_token_is_found_among_many(self) -> None:
        """Each tile looks its first token up among the offsets, 32 at a time."""
        count = 40_000
        one = torch.ones(count, dtype=torch.int32)
        rows = torch.arange(count, dtype=torch.int32) % 997
        grad_rows = torch.randn(997, 4)
        offsets = torch.arange(count + 1, dtype=torch.int32)
        got = pool_grad(grad_rows, (rows, offsets, rows, one), count, False)
        assert torch.equal(got, grad_rows[rows.long()])

    @pytest.mark.parametrize("width", [12, 64])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_same_bits_in_any_order(self, set_order: Callable[[int], None], dtype: torch.dtype, width: int) -> None:
        """Whichever blocks and warps come first; a forgotten barrier would show here."""
        batch = cases.make_batch(pk.SessionPatches(group_size=40, max_items=None), [300, 100])
        layout = batch.layout()
        weight = cases.make_weight(cases.VOCABULARY, width, dtype)
        grad_rows = cases.make_weight(layout.num_rows, width, dtype, seed=1)

        def both() -> tuple[torch.Tensor, torch.Tensor]:
            return bits(pool(weight, layout)), bits(pool_grad(grad_rows, columns(layout), cases.VOCABULARY, True))

        first = both()
        for seed in (0, 1, 2, 3):
            set_order(seed)
            for got, expected in zip(both(), first, strict=True):
                assert torch.equal(got, expected)

    @pytest.mark.parametrize("width", [0, 1, 64])
    def test_nothing_to_do(self, width: int) -> None:
        none, offsets = torch.zeros(0, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        weight = torch.ones(5, width)
        cuda.pool_rows(weight, none, none, none, none, offsets, None, None, 1.0, torch.zeros(0, width))
        dense = torch.full((5, width), 3.0)
        cuda.pool_rows_grad(torch.zeros(0, width), none, offsets, none, none, 1.0, dense, True, False)
        assert (dense == 3).all()

    @pytest.mark.slow
    def test_more_blocks_than_one_grid_dimension_takes(self) -> None:
        """65,535 blocks of 32 rows and of one tile of contributions fill the grid's second dimension."""
        count = 65_535 * 64 + 100
        tokens = torch.arange(count, dtype=torch.int32) % 7
        weight = torch.randn(7, 1)
        none, offsets = torch.zeros(0, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        out = torch.empty(count, 1)
        cuda.pool_rows(weight, -1 - tokens, torch.zeros_like(tokens), none, none, offsets, None, None, 1.0, out)
        assert torch.equal(out, weight[tokens.long()])
        ends = torch.tensor([0, 10, count], dtype=torch.int32)
        got = pool_grad(torch.ones(7, 1), (tokens[:2], ends, tokens, torch.ones_like(tokens)), 2, False)
        assert got[:, 0].tolist() == [10, count - 10]

    def test_float64_is_refused(self) -> None:
        layout = cases.make_batch(pk.TextOnly(max_items=None), [3]).layout()
        with pytest.raises(ValueError, match="pool_rows: expected float32, bfloat16 or float16 for the cuda backend"):
            pool(torch.ones(cases.VOCABULARY, 4, dtype=torch.float64), layout)

    def test_failed_launch_says_what_and_where(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cuda, "_call_on", lambda device, function, *arguments: function(*arguments, 5, 0))
        layout = cases.make_batch(pk.TextOnly(max_items=None), [3]).layout()
        said = r"pool_rows: invalid device ordinal \(CUDA error 101\) on cpu, dtype=torch.float32, D=4"
        with pytest.raises(RuntimeError, match=said):
            pool(torch.ones(cases.VOCABULARY, 4), layout)


SANITIZED = "(widths and not 2048 and not 4096) or (long_sessions and float32) or cross_tiles or table or nothing_to_do"


@pytest.mark.slow
@pytest.mark.skipif("PATCHKERN_HOST_FLAGS" in os.environ, reason="this is the sanitized run")
@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_on_host_under_sanitizers(tmp_path: Path) -> None:
    preload = [command("g++", f"-print-file-name={name}").strip() for name in ("libasan.so", "libstdc++.so")]
    changes = {
        "PATCHKERN_HOST_FLAGS": SANITIZERS,
        "LD_PRELOAD": " ".join(preload),
        "ASAN_OPTIONS": "detect_leaks=0",
        "OMP_NUM_THREADS": "1",
    }
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    options = ["-q", "-x", "-n", "0", "-p", "no:cacheprovider", "--capture=sys", f"--basetemp={tmp_path / 'sanitized'}"]
    said = command(
        *[sys.executable, "-m", "pytest", Path(__file__), *options, "-m", "not slow", "-k", SANITIZED],
        env=inherited | changes,
        cwd=REPOSITORY,
    )
    assert re.search(r"\d+ passed", said) and "skipped" not in said, said
