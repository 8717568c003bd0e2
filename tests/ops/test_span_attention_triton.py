# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of `span_attention`: interpreted on the CPU (run, on a GPU), and compiled for three of them."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kept_builds import kept_build
from span_cases import SPANS, Spans, expected, gradients, leaves, sdpa, visibility
from torch import Tensor

from patchkern.ops import span_attention as entry
from patchkern.ops import span_attention_prefixed as op
from patchkern.ops.span_attention import span_attention

triton = pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
INTERPRETED = triton.knobs.runtime.interpret
HARD = {name: spans for name, spans in SPANS.items() if name not in ("forty share one", "a long span")} | {
    "twelve share one": Spans([1] * 6 + [3] * 6, [(10, 90)] * 12, stored=100),
    "blocks of a long span": Spans([130], [(3, 73)], stored=74),
    "far apart": Spans([2, 2, 2, 2], [(0, 3), (190, 200), (1, 3), (0, 200)], stored=200),
}


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cpu" and not INTERPRETED:
        pytest.skip("triton was imported without TRITON_INTERPRET=1, and there is no CUDA device")
    from patchkern.ops import span_attention_triton

    if DEVICE == "cpu":
        monkeypatch.setattr(op, "kernels", lambda *arguments: span_attention_triton)
        monkeypatch.setattr(op, "serves", lambda *arguments: True)


def attend(spans: Spans, tensors: Any, scaling: float) -> Tensor:
    query, key, value, prefix_key, prefix_value = (None if x is None else x.to(DEVICE) for x in tensors)
    cu_seqlens, prefix = (x.to(DEVICE) for x in spans.integers)
    stored = {"prefix_key": prefix_key, "prefix_value": prefix_value}
    return span_attention(query, key, value, cu_seqlens, prefix=prefix, **stored, scaling=scaling).cpu()


def check(
    spans: Spans,
    heads: tuple[int, int],
    width: int,
    dtype: torch.dtype,
    scaling: float = 0.2,
    function: Callable[[Spans, Any, float], Tensor] = attend,
) -> None:
    """Error against float64 at most twice that of masked SDPA in the same dtype."""
    exact = [None if x is None else x.to(dtype).double() for x in spans.tensors(heads, width)]
    weight = torch.randn(1, sum(spans.lengths), heads[0], width).to(dtype).double()
    results = []
    for attention, kind in ((expected, torch.float64), (sdpa, dtype), (function, dtype)):
        tensors = leaves(exact, kind)
        out = attention(spans, tensors, scaling)
        assert out.dtype == kind
        results.append([out, *gradients(out, tensors, weight)])
    # the interpreter cuts digits off where a GPU rounds: one more unit in the last place
    roundings = 2 if INTERPRETED and dtype == torch.bfloat16 else 1
    for true, theirs, ours in zip(*results, strict=True):
        if true.numel():
            floor = roundings * torch.finfo(dtype).eps * true.abs().max()
            assert (ours - true).abs().max() <= 2 * (theirs - true).abs().max() + floor


@pytest.mark.parametrize("name", HARD)
def test_hard_spans(name: str) -> None:
    check(HARD[name], (4, 2), 8, torch.float32)


@pytest.mark.parametrize("heads", [(2, 2), (4, 1), (8, 1), (6, 2), (5, 1)], ids=lambda h: f"heads={h[0]}/{h[1]}")
def test_head_groups(heads: tuple[int, int]) -> None:
    check(SPANS["trunk and branches"], heads, 16, torch.float32)
    check(SPANS["prefixes that cross"], heads, 16, torch.float16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [1, 64, 80, 128, 256])
def test_head_widths(width: int, dtype: torch.dtype) -> None:
    spans = Spans([9, 4, 0, 6, 1], [(0, 0), (0, 9), (0, 9), (2, 5), (0, 1)])
    check(spans, (4, 2), width, dtype, scaling=width**-0.5)


@pytest.mark.parametrize("name", ["trunk and branches", "twelve share one"])
def test_bfloat16(name: str) -> None:
    check(HARD[name], (4, 2), 64, torch.bfloat16, scaling=0.125)


def test_float32_spans_without_prefixes_are_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which no kernel of others takes: attended one by one, each would be launched, after waiting for where it is."""
    monkeypatch.setattr(entry, "_span_sdpa", None)
    spans = Spans([70, 1, 0, 33, 2], [(0, 0)] * 5)

    def alone(spans: Spans, tensors: Any, scaling: float) -> Tensor:
        query, key, value = (x.to(DEVICE) for x in tensors[:3])
        return span_attention(query, key, value, spans.integers[0].to(DEVICE), scaling=scaling).cpu()

    check(spans, (4, 2), 16, torch.float32, function=alone)
    tensors = [None if x is None else x.float() for x in spans.tensors((4, 2), 16)]
    query, key, value = (x.to(DEVICE) for x in tensors[:3])
    unlimited = span_attention(query, key, value, spans.integers[0].to(DEVICE), 70, 0.3, sliding_window=70).cpu()
    assert torch.equal(unlimited, attend(spans, tensors, 0.3))


def test_rows_outside_the_visible_set_change_nothing() -> None:
    """Bit for bit, though they share blocks of the kernel with rows that do see them."""
    spans = SPANS["several ranges"]
    rows = sum(spans.lengths)
    tensors = [None if x is None else x.float() for x in spans.tensors((4, 2), 8)]
    before = attend(spans, tensors, 0.3)[0]
    seen = visibility(spans, rows)
    for row in (0, 5, 7, 16, 17, 21, 30):
        changed = [None if x is None else x.clone() for x in tensors]
        for at in (1, 2):
            changed[at][:, :, row] = torch.randn_like(changed[at][:, :, row])
        moved = (attend(spans, changed, 0.3)[0] != before).flatten(1).any(dim=1)
        assert torch.equal(moved, seen[:, row] | seen[:, rows + row])


def test_one_range_and_empty_ones_are_the_same_bit_for_bit() -> None:
    spans = Spans([9, 4, 0, 6, 1], [(0, 0), (0, 9), (0, 9), (2, 5), (0, 1)])
    tensors = leaves(spans.tensors((4, 2), 8), torch.float32)
    weight = torch.randn(1, sum(spans.lengths), 4, 8)
    alone = gradients(attend(spans, tensors, 0.3), tensors, weight)
    for ranges in ([[span] for span in spans.prefix], [[(3, 3), span] for span in spans.prefix]):
        several = gradients(attend(spans._replace(prefix=ranges), tensors, 0.3), tensors, weight)
        assert all(torch.equal(a, b) for a, b in zip(several, alone, strict=True))


def test_bitwise_repeatable_gradients() -> None:
    spans = SPANS["several ranges"]
    tensors = leaves(spans.tensors((4, 2), 16), torch.float32)
    weight = torch.randn(1, sum(spans.lengths), 4, 16)
    first, second = (gradients(attend(spans, tensors, 0.3), tensors, weight) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_rows_in_any_memory_order() -> None:
    spans = HARD["far apart"]
    tensors = [None if x is None else x.float() for x in spans.tensors((4, 2), 8)]
    by_row = [None if x is None else x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
    sparse = [None if x is None else torch.stack([x, x], dim=4)[..., 0] for x in tensors]
    wanted = attend(spans, tensors, 0.3)
    assert torch.equal(attend(spans, by_row, 0.3), wanted)
    assert torch.equal(attend(spans, sparse, 0.3), wanted)


def test_integers_in_any_memory_order() -> None:
    spans = SPANS["several ranges"]
    tensors = leaves(spans.tensors((4, 2), 8)[:3], torch.float32)
    weight = torch.randn(1, sum(spans.lengths), 4, 8, device=DEVICE)
    results = []
    for sparse in (False, True):
        integers = [torch.stack([x, x + 1], -1)[..., 0] if sparse else x for x in spans.integers]
        cu_seqlens, prefix = (x.to(DEVICE) for x in integers)
        out = span_attention(*(x.to(DEVICE) for x in tensors), cu_seqlens, prefix=prefix)
        results.append([out, *torch.autograd.grad((out * weight).sum(), tensors)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_same_log_sum_exp_as_the_tiles() -> None:
    """The backward pass of either can follow the forward pass of the other."""
    from patchkern.ops import span_attention_tiles as tiles
    from patchkern.ops import span_attention_triton as kernels

    spans = SPANS["trunk and branches"]
    rows = [None if x is None else x[0].transpose(0, 1).float() for x in spans.tensors((4, 2), 8)]
    arguments = [None if x is None else x.to(DEVICE) for x in (*rows[:3], *spans.raw, *rows[3:])]
    _, ours = kernels.forward(*arguments, 0.3)
    _, theirs = tiles.forward(*arguments, 0.3, 0.0, 0)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.gpu
def test_never_waits_for_the_device() -> None:
    spans = SPANS["trunk and branches"]
    rows = [x.cuda() for x in spans.tensors((4, 2), 64)[:3]]
    cu_seqlens, prefix = (x.cuda() for x in spans.integers)
    for mode in ("default", "error"):  # the first round compiles
        torch.cuda.set_sync_debug_mode(mode)
        try:
            for dtype, seen in ((torch.bfloat16, prefix), (torch.float32, prefix), (torch.float32, None)):
                query, key, value = (x.to(dtype).requires_grad_() for x in rows)
                span_attention(query, key, value, cu_seqlens, prefix=seen).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


# ------------------------------------------------------------------ compiled

COMPILE = """
import itertools, json, sys
import torch
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from patchkern.ops import span_attention_triton as kernels

folder, machines = sys.argv[1], [machine.split("-") for machine in sys.argv[2:]]
integers, floats = {"p_rows", "p_cu_seqlens", "p_prefix"}, {"p_lse", "p_balance"}
for (arch, width, ranges, activation), (kernel, table, flags) in itertools.product(machines, (
    (kernels.forward_kernel, kernels._forward_blocks, {}),
    (kernels.query_gradient_kernel, kernels._query_gradient_blocks, {}),
    (kernels.key_gradient_kernel, kernels._key_gradient_blocks, {"OWN": True, "PREFIX": True}),
)):
    arch, width, ranges = int(arch), int(width), int(ranges)
    constants = kernels._constants(table, 32, 8, width, torch.bfloat16, ranges, activation == "silu") | flags
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages", "maxnreg") if name in constants}
    signature, attributes = {}, {}
    for at, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.startswith("p_"):
            signature[name] = "*i32" if name in integers else "*fp32" if name in floats else "*bf16"
        else:
            signature[name] = "fp32" if name in ("factor", "scale", "normalizer") else "i32"
        if name.startswith(("p_", "s_")) and name not in ("p_cu_seqlens", "p_prefix"):
            attributes[(at,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    built = compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    name = f"{arch}-{width}-{ranges}-{activation}-{kernel.__name__}"
    with open(f"{folder}/{name}.cubin", "wb") as file:
        file.write(built.asm["cubin"])
    print(json.dumps([arch, width, ranges, activation, kernel.__name__, built.metadata.shared]))
"""


PRODUCTS = {80: r"HMMA", 90: r"HGMMA", 100: r"UTC\w*MMA"}
Machine = tuple[int, int, int, str]  # architecture, head width, ranges of a span, activation
USUAL: list[Machine] = [(80, 64, 1, "softmax"), (90, 128, 2, "softmax"), (100, 64, 1, "softmax"), (90, 64, 2, "silu")]
EVERY = itertools.product((80, 90, 100), (64, 128), (1, 2), ("softmax", "silu"))
SLOW: list[Machine] = [machine for machine in EVERY if machine not in USUAL]


def compiled(machines: list[Machine]) -> Path:
    """The folder of every kernel for these machines: one process compiles them all."""

    def compile_all(folder: Path) -> None:
        environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder / "cache")}
        arguments = ["-".join(map(str, machine)) for machine in machines]
        command = [sys.executable, "-c", COMPILE, str(folder), *arguments]
        built = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert built.returncode == 0, built.stderr
        (folder / "report").write_text(built.stdout)
        shutil.rmtree(folder / "cache")

    sources = [Path(__file__), *Path(op.__file__).parent.glob("*.py")]
    return kept_build("span-attention", sources, [str(machines), triton.__version__, torch.__version__], compile_all)


@pytest.mark.parametrize(
    ("arch", "width", "ranges", "activation"),
    [*USUAL, *(pytest.param(*machine, marks=pytest.mark.slow) for machine in SLOW)],
)
def test_compiles_for(arch: int, width: int, ranges: int, activation: str) -> None:
    """bfloat16: nothing spilled, matrix products on the tensor cores, loads of 16 bytes, shared memory that any has."""
    machine = (arch, width, ranges, activation)
    folder = compiled(USUAL if machine in USUAL else SLOW)
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    reports = map(json.loads, (folder / "report").read_text().splitlines())
    found = [(name, shared) for *built, name, shared in reports if tuple(built) == machine]
    assert len(found) == 3
    for name, shared in found:
        cubin = folder / f"{arch}-{width}-{ranges}-{activation}-{name}.cubin"
        dump = [str(cuobjdump), "--dump-resource-usage", "--dump-sass", str(cubin)]
        text = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
        assert re.search(r"STACK:0 .*LOCAL:0 ", text), name
        assert not re.search(r"\b(STL|LDL)\b", text), name
        assert shared <= 99 * 1024, name
        assert re.search(r"\bHMMA|\bHGMMA|\bUTC\w*MMA", text), name
        assert re.search(r"LDGSTS\.E\.\S*128|LDG\.E\.\S*128|UTMALDG", text), name
        if name == "forward_kernel":
            assert re.search(rf"\b{PRODUCTS[arch]}\b", text), name
