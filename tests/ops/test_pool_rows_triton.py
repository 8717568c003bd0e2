# SPDX-License-Identifier: Apache-2.0
"""What is particular to the Triton kernels: their machine code, how they cut the work, and when they are compiled.

That they compute what every backend computes is tested in test_pool_rows.py and test_pool_rows_grad.py.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import cases
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kept_builds import kept_build

import patchkern as pk

triton = pytest.importorskip("triton")
tk = pytest.importorskip("patchkern.ops.pool_rows_triton", reason="needs triton")

interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="runs on CPU tensors, in Triton's interpreter"
)
by_dtype = pytest.mark.parametrize("dtype", tk.DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def python(*arguments: str, **variables: str) -> str:
    """The output of a Python process that does not interpret Triton's kernels."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | variables
    process = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return process.stdout


# ------------------------------------------------------------------ machine code

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def compiled(architectures: str, dtypes: str, names: str) -> dict[str, Any]:
    script = Path(__file__).parents[1] / "compile_triton.py"
    sources = [script, *Path(tk.__file__).parent.glob("*.py")]
    arguments = [architectures, dtypes, names]

    def compile_all(folder: Path) -> None:
        report = python(str(script), *arguments, TRITON_CACHE_DIR=str(folder / "cache"))
        (folder / "report.json").write_text(report)
        shutil.rmtree(folder / "cache")

    folder = kept_build("triton", sources, [*arguments, triton.__version__, torch.__version__], compile_all)
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return report


def check(kernel: dict[str, Any]) -> None:
    label = f"{kernel['kernel']} {kernel['for']}: {kernel}"
    _, dtype, case = kernel["for"]
    memory = kernel["memory"]
    assert kernel["stack"] == kernel["local"] == 0, f"registers spill: {label}"
    assert not [name for name in memory if name.startswith(("LDL", "STL"))], f"local memory: {label}"
    assert not [name for name in memory if name.startswith(("RED", "ATOM"))], f"atomics: {label}"
    assert not kernel["int32_strides"], f"an address in 32 bits: {label}"
    assert all(kind.endswith("x16xf32>") for kind in kernel["zeros"]), f"not -0.0, but for weights of slots: {label}"
    loads = {name: count for name, count in memory.items() if name.startswith("LDG")}
    stores = {name: count for name, count in memory.items() if name.startswith("STG")}
    if not case.startswith("vector"):
        return
    if kernel["kernel"] == "cut_sums_kernel":
        # Its loads count, one per tile; it stores a row per token that occurs hundreds of times.
        assert loads["LDG.E.128"] > 0, label
        return
    # Index tensors are read by 32-bit loads; any other width but 128 bits would be data on a narrow path.
    assert set(loads) == {"LDG.E", "LDG.E.128"}, label
    if kernel["kernel"] == "pool_rows_kernel":
        assert all(name.endswith(".128") for name in stores), label
        if case in ("vector", "vector-table"):
            blocks = tk._forward_blocks(2048, BYTES[dtype])
            per_row = blocks.columns * BYTES[dtype] // (16 * 32 * blocks.warps)
            assert loads["LDG.E.128"] == (tk._FORWARD_ROWS + blocks.slots) * per_row, label
            assert sum(stores.values()) == (tk._FORWARD_ROWS + 1) * per_row, label
    if kernel["kernel"] == "tile_sums_kernel":
        # The one narrow store is the tile's cut token.
        assert set(stores) == {"STG.E", "STG.E.128"} and stores["STG.E"] == 1, label
        if case in ("vector", "vector-table"):
            registers = tk._gradient_blocks(2048, BYTES[dtype]).registers
            assert kernel["registers"] <= registers, label


def test_compiled_for_every_architecture() -> None:
    """No spills, no local memory, no atomics, 64-bit addresses; 128-bit loads and stores where rows are aligned.

    And one kernel serves batches of every size and alignment.
    """
    report = compiled("80,90,100", "bfloat16", "vector,vector-table,fallback")
    assert len(report["kernels"]) == 3 * 3 * 3
    for kernel in report["kernels"]:
        check(kernel)
    assert report["before"] == report["after"] and max(report["before"].values()) > 0, "a batch was compiled for"


@pytest.mark.slow
def test_compiled_for_every_case() -> None:
    names = "vector,vector-table,vector-1000,narrow-64,fallback,fallback-41,fallback-1"
    report = compiled("80,90,100", "float32,float16,bfloat16", names)
    assert len(report["kernels"]) == 3 * 3 * 7 * 3
    for kernel in report["kernels"]:
        check(kernel)


# ------------------------------------------------------------------ when it is usable


def test_imported_when_asked_for() -> None:
    code = "import sys, patchkern; assert 'triton' not in sys.modules"
    assert python("-c", code) == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_unusable_reasons() -> None:
    show = "from patchkern.ops import pool_rows_triton; print(pool_rows_triton.unusable_reason())"
    assert python("-c", show) == "torch sees no CUDA device\n"
    late = "import os, triton; os.environ['TRITON_INTERPRET'] = '1'; " + show
    assert python("-c", late) == "TRITON_INTERPRET was set after triton was imported\n"


def test_float64_is_refused() -> None:
    weight, index = torch.zeros(3, 4, dtype=torch.float64), torch.zeros(1, dtype=torch.int32)
    out = torch.ones(1, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match="weight: expected float32, bfloat16 or float16 for the triton backend"):
        tk.pool_rows(weight, index, index, index, index, index, None, None, 1.0, out)
    with pytest.raises(ValueError, match="grad_rows: expected float32, bfloat16 or float16 for the triton backend"):
        tk.pool_rows_grad(weight, index, index, index, index, 1.0, out, True, False)
    assert (out == 1).all()


# ------------------------------------------------------------------ copies


def check_copies(dtype: torch.dtype, device: str, signed_zeros: bool) -> None:
    """Literals keep every bit, also of -0.0 and of a NaN with a payload; so do a patch of one token and a row of the
    table, but for the NaN."""
    bits = {4: torch.int32, 2: torch.int16}[dtype.itemsize]
    weight = torch.randn(4, 9).to(device, dtype)
    weight[1] = -0.0
    weight[2] = float("nan")
    weight.view(bits)[2] += 5
    titles: dict[Any, oracle.Title] = {0: [1], 1: [0]}
    prompt = oracle.Parts([0, 1, 2, 3], [], [], [])
    layout = cases.Batch(titles, [[0, 1, 0]], pk.ItemPatches(keep_text=0), prompt).layout().to(device)
    index = (layout.lo, layout.hi, layout.items, layout.token_ids, layout.offsets)
    expected = weight[[0, 1, 2, 3, 1, 0, 1]]
    table = torch.stack([weight[0], weight[3], weight[1]])
    entries = torch.tensor([0, 2], dtype=torch.int32, device=device)[(layout.token_ids != 0).long()]
    for arguments in ((None, None), (table, entries)):
        out = torch.full((7, 9), float("inf"), dtype=dtype, device=device)
        tk.pool_rows(weight, *index, *arguments, 1.0, out)
        copied = 7 if signed_zeros else 4
        assert torch.equal(out[:copied].view(bits), expected[:copied].view(bits))
        assert torch.equal(out[4:], expected[4:])


@interpreted
@by_dtype
def test_copies_keep_every_bit(dtype: torch.dtype) -> None:
    # The interpreter sums with NumPy, which starts from 0.0: a patch loses its zeros' signs there.
    check_copies(dtype, "cpu", signed_zeros=False)


# ------------------------------------------------------------------ long rows and long runs


@interpreted
def test_session_of_hundreds_of_items() -> None:
    """One row of 500 items, 3,000 tokens, beside a literal and an item patch."""
    titles = [[(item + i) % 90 for i in range(1 + (7 * item) % 11)] for item in range(500)]
    rows = [[[3]], titles, [titles[10]]]
    lo, hi = torch.tensor([-4, 0, 10], dtype=torch.int32), torch.tensor([0, 500, 11], dtype=torch.int32)
    token_ids = torch.tensor([token for title in titles for token in title], dtype=torch.int32)
    offsets = torch.tensor([0, *map(len, titles)]).cumsum(0).to(torch.int32)
    weight, out = cases.make_weight(cases.VOCABULARY, 6), torch.full((3, 6), float("nan"))
    tk.pool_rows(weight, lo, hi, torch.arange(500, dtype=torch.int32), token_ids, offsets, None, None, 1.0, out)
    oracle.assert_pooled(out, weight, rows)


@interpreted
def test_rows_of_a_program_are_no_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few programs take half the rows each, and every row has the same bits."""
    most = 4 * tk._MANY_PROGRAMS
    assert [tk._rows_per_program(n, 1) for n in (1, most, most + 1)] == [2, 2, 4]
    assert [tk._rows_per_program(n, 2) for n in (1, most // 2, most // 2 + 1)] == [2, 2, 4]
    layout = cases.make_batch(pk.SessionPatches(group_size=5, max_items=None), [5, 23, 61]).layout()
    weight = cases.make_weight(cases.VOCABULARY, 12)
    few = pk.pool_rows(weight, layout, backend="triton")
    monkeypatch.setattr(tk, "_MANY_PROGRAMS", 0)
    assert torch.equal(pk.pool_rows(weight, layout, backend="triton"), few)


def check_runs(lengths: list[int], width: int, scale: float = 1.0, compact_only: bool = False) -> None:
    """Gradients of tokens with so many contributions each, scattered, compact and added, against float64 sums."""
    generator = torch.Generator().manual_seed(sum(lengths))
    n_rows, n_contributions = 37, sum(lengths)
    grad_rows = torch.randn(n_rows, width, generator=generator)
    rows = torch.randint(n_rows, (n_contributions,), generator=generator, dtype=torch.int32)
    divisors = torch.randint(1, 9, (n_contributions,), generator=generator, dtype=torch.int32)
    tokens = 2 * torch.arange(len(lengths), dtype=torch.int32) + 1
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    shares = grad_rows.double()[rows.long()] / divisors[:, None]
    exact = scale * torch.stack([part.sum(0) for part in shares.split(lengths)])
    magnitude = scale * torch.stack([part.abs().sum(0) for part in shares.split(lengths)])
    counts = torch.tensor(lengths, dtype=torch.float64)[:, None]

    def run(out: torch.Tensor, scatter: bool, accumulate: bool) -> torch.Tensor:
        tk.pool_rows_grad(grad_rows, tokens, offsets, rows, divisors, scale, out, scatter, accumulate)
        return out

    compact = run(torch.full((len(lengths), width), float("nan")), False, False)
    floor = oracle.rounding_floor(exact, magnitude, counts + 4, torch.float32)
    assert ((compact.double() - exact).abs() <= floor).all()
    if compact_only:
        return
    dense = run(torch.full((2 * len(lengths) + 1, width), 7.0), True, False)
    assert torch.equal(dense[tokens.long()], compact) and (dense[::2] == 7).all()
    added = run(torch.full((2 * len(lengths) + 1, width), 7.0), True, True)
    floor = oracle.rounding_floor(exact + 7, magnitude + 7, counts + 5, torch.float32)
    assert ((added[tokens.long()].double() - exact - 7).abs() <= floor).all() and (added[::2] == 7).all()


@interpreted
def test_token_with_ten_thousand_contributions() -> None:
    check_runs([3, 10_000, 1, 70], width=3, compact_only=True)


@interpreted
@settings(max_examples=20)
@given(data=st.data())
def test_runs_across_tiles(data: st.DataObject) -> None:
    """Runs that begin, end and pass wherever they like, in small tiles, of any number of column blocks."""
    tile = data.draw(st.sampled_from([2, 4, 8]))
    length = st.integers(1, 3) | st.integers(1, 4 * tile) | st.sampled_from([tile - 1, tile, 2 * tile, 2 * tile + 1])
    lengths = [max(1, n) for n in data.draw(st.lists(length, min_size=1, max_size=6))]
    blocks = tk._Blocks(data.draw(st.sampled_from([1, 2, 4])), 4, 1, 128)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tk, "_TILE", tile)
        patch.setattr(tk, "_gradient_blocks", lambda width, itemsize: blocks)
        check_runs(lengths, data.draw(st.sampled_from([1, 5])), data.draw(st.sampled_from([1.0, 0.5])))


@interpreted
def test_search_among_many_tokens() -> None:
    """More tokens than one round of the search tells apart."""
    check_runs([1 + (number % 7 == 0) for number in range(300)], width=2, compact_only=True)


# ------------------------------------------------------------------ on a GPU


def on_gpu(policy: Any, lengths: list[int], width: int = 2048) -> tuple[torch.Tensor, pk.PatchLayout, torch.Tensor]:
    layout = cases.make_batch(policy, lengths).layout(transpose=True).to("cuda")
    weight = cases.make_weight(cases.VOCABULARY, width, torch.bfloat16, device="cuda")
    return weight, layout, cases.make_weight(layout.num_rows, width, torch.bfloat16, seed=1, device="cuda")


@pytest.mark.gpu
@by_dtype
def test_copies_keep_every_bit_on_a_gpu(dtype: torch.dtype) -> None:
    check_copies(dtype, "cuda", signed_zeros=True)


@pytest.mark.gpu
def test_batches_share_a_compiled_kernel() -> None:
    def compiled_kernels() -> int:
        kernels = (tk.pool_rows_kernel, tk.tile_sums_kernel, tk.cut_sums_kernel)
        return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())

    def run(policy: Any, lengths: list[int]) -> None:
        weight, layout, grad_rows = on_gpu(policy, lengths)
        pk.pool_rows(weight, layout, backend="triton")
        pk.pool_rows_grad(grad_rows, layout, cases.VOCABULARY, backend="triton")

    run(pk.SessionPatches(3), [60, 23])
    before = compiled_kernels()
    for policy in (pk.TextOnly(), pk.ItemPatches(2), pk.SessionPatches(5)):
        for lengths in ([1], [16] * 16, [90, 0, 7], [33] * 64):
            run(policy, lengths)
    assert compiled_kernels() == before > 0


@pytest.mark.gpu
def test_nothing_waits_and_graphs_capture_it() -> None:
    """Forward and backward in a CUDA graph, on a side stream, with new contents in the same tensors at the replay."""
    weight, layout, grad_rows = on_gpu(pk.SessionPatches(3), [60, 0, 23])
    out, grad = torch.empty_like(grad_rows), torch.zeros_like(weight)

    def step() -> None:
        pk.pool_rows(weight, layout, backend="triton", out=out)
        pk.pool_rows_grad(grad_rows, layout, cases.VOCABULARY, backend="triton", out=grad)

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    weight.copy_(weight.flip(0))
    grad.zero_()
    out.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    expected = pk.pool_rows(weight, layout, backend="triton")
    assert torch.equal(out, expected)
    oracle.assert_pooled(out.cpu(), weight.cpu(), cases.make_batch(pk.SessionPatches(3), [60, 0, 23]).rows())
    assert torch.equal(grad, pk.pool_rows_grad(grad_rows, layout, cases.VOCABULARY, backend="triton"))
