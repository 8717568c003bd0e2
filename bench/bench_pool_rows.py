# SPDX-License-Identifier: Apache-2.0
"""How fast `pool_rows` is, against one copy of its output and against PyTorch's own ways to the same rows.

    python bench/bench_pool_rows.py                       # ml-1m, batch 64, all widths and dtypes: about 15 minutes
    python bench/bench_pool_rows.py --widths 256 --seconds 0.5
    python bench/bench_pool_rows.py --threads 2 --clock wall

Providers: `copy` (torch copy_ of a (T, D) tensor: the least that writing T rows can cost), `native` (into a given
output), `native+alloc` (as autograd calls it), `embedding_bag` (per_sample_weights, allocates), `segment` (gather and
two index_adds: the reference backend) and `loop` (a Python loop over patches). Backward: `native dense`,
`native compact`, `embedding_bag dense`, `zeros` (the (V, D) zeros that any dense gradient starts from).

The allocator is as every process has it: large results come in fresh memory, whose page faults cost more than the work
on most virtual machines, and `native` is the only provider that can write into memory it is given. With --warm-memory
glibc keeps what was freed, no provider meets a page fault, and the kernels alone are compared. Timings are CPU
time of one thread unless told otherwise, so that busy neighbours only cost cache and bandwidth. A provider whose result
is wrong gets no timing, and the script fails.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import patchkern as pk
from bench import timing, workloads

_WARM_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40), "MALLOC_TOP_PAD_": str(64 << 20)}
_UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float64: 2.0**-53}


class Bags:
    """The layout as `F.embedding_bag` takes it: one weighted bag of tokens per row."""

    def __init__(self, layout: pk.PatchLayout, dtype: torch.dtype) -> None:
        transpose = layout.with_transpose().transpose
        assert transpose is not None
        rows = transpose.rows.numpy()
        tokens = np.repeat(transpose.tokens.numpy(), np.diff(transpose.offsets.numpy()))
        order = np.argsort(rows, kind="stable")
        self.tokens = torch.from_numpy(tokens[order].astype(np.int64))
        self.weights = (1.0 / torch.from_numpy(transpose.divisors.numpy()[order]).double()).to(dtype)
        counts = np.bincount(rows, minlength=layout.num_rows)
        self.offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(counts)[:-1]]))

    def pool(self, weight: torch.Tensor) -> torch.Tensor:
        return F.embedding_bag(self.tokens, weight, self.offsets, mode="sum", per_sample_weights=self.weights)


def pool_by_loop(weight: torch.Tensor, layout: pk.PatchLayout) -> torch.Tensor:
    """One PyTorch call per title and per session: what one writes first."""
    out = weight.new_empty(layout.num_rows, weight.shape[1])
    literal = layout.lo < 0
    out[literal] = weight[(-1 - layout.lo[literal]).long()]
    items, offsets = layout.items.tolist(), layout.offsets.tolist()
    for row in torch.nonzero(~literal)[:, 0].tolist():
        span = items[int(layout.lo[row]) : int(layout.hi[row])]
        titles = [weight[layout.token_ids[offsets[item] : offsets[item + 1]].long()].mean(0) for item in span]
        out[row] = torch.stack(titles).mean(0) if len(titles) > 1 else titles[0]
    return out


def check(name: str, got: torch.Tensor, exact: torch.Tensor, loose: float = 1.0) -> None:
    """Refuse to time a wrong result: the error must look like roundings of this dtype, and nothing else."""
    error = (got.double() - exact).abs().max().item()
    allowed = loose * 4 * _UNIT_ROUNDOFF[got.dtype] * max(exact.abs().max().item(), 1e-30)
    if not error <= allowed:
        sys.exit(f"{name}: wrong result, error {error:.3g}, allowed {allowed:.3g}; nothing was timed")


def run(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(arguments.threads)
    clock: Callable[[], float] = time.perf_counter if arguments.clock == "wall" else time.thread_time
    workload = workloads.ml1m()
    histories, targets = workload.samples(arguments.batch)
    table = timing.Table("pool_rows" + ("_warm_memory" if arguments.warm_memory else ""))
    for width in arguments.widths:
        for dtype in (getattr(torch, name) for name in arguments.dtypes):
            weight = torch.randn(workloads.VOCABULARY, width, generator=torch.Generator().manual_seed(0)).to(dtype)
            for policy in arguments.policies:
                layout = pk.build_layout(
                    workload.catalog, histories, workloads.POLICIES[policy], workload.prompt, targets
                )
                rows = layout.num_rows
                transpose = layout.transpose
                assert transpose is not None
                config = {
                    "data": workload.name,
                    "batch": arguments.batch,
                    "policy": policy,
                    "width": width,
                    "dtype": str(dtype).removeprefix("torch."),
                    "vocabulary": workloads.VOCABULARY,
                    "rows": rows,
                    "token_reads": transpose.rows.shape[0],
                    "distinct_tokens": transpose.tokens.shape[0],
                    "clock": arguments.clock,
                    "memory": "warm" if arguments.warm_memory else "fresh",
                }
                print(f"\n{config}")
                measure = {"seconds": arguments.seconds, "clock": clock, "cold": arguments.cold}
                forward(table, weight, layout, config, measure, arguments.loop)
                backward(table, weight, layout, config, measure)
            del weight
    table.write()


def forward(
    table: timing.Table,
    weight: torch.Tensor,
    layout: pk.PatchLayout,
    config: dict[str, Any],
    measure: dict[str, Any],
    loop: bool,
) -> None:
    width, element = weight.shape[1], weight.element_size()
    with torch.no_grad():
        bags = Bags(layout, weight.dtype)
        out = weight.new_zeros(layout.num_rows, width)
        source, copied = torch.ones_like(out), torch.zeros_like(out)
        calls: dict[str, Callable[[], torch.Tensor]] = {
            "copy": lambda: copied.copy_(source),
            "native": lambda: pk.pool_rows(weight, layout, backend="native", out=out),
            "native+alloc": lambda: pk.pool_rows(weight, layout, backend="native"),
            "embedding_bag": lambda: bags.pool(weight),
        }
        # timed apart: what they leave in the caches would be the others' loss
        slow: dict[str, Callable[[], torch.Tensor]] = {
            "segment": lambda: pk.pool_rows(weight, layout, backend="reference")
        }
        if loop:
            slow["loop"] = lambda: pool_by_loop(weight, layout)
        tokens, compact = layout.compact()
        exact = pk.pool_rows(weight[tokens].double(), compact, backend="reference")
        for name, call in (calls | slow).items():
            if name != "copy":
                # embedding_bag multiplies by weights that are rounded to the dtype, the loop rounds every title
                check(f"{name} forward", call(), exact, loose=2.0 if name in ("embedding_bag", "loop") else 1.0)
        del exact
        times = timing.measure(calls, **measure)
        times.seconds.update(timing.measure(slow, **measure | {"seconds": 0.0, "min_rounds": 5}).seconds)
    report(table, times, "forward", config, "copy", "embedding_bag", "native", ("native+alloc",))
    least = layout.num_rows * width * element + (config["token_reads"] + layout.num_rows) * width * element
    p20, p50, p80 = times.quantiles("native")
    table.add(
        "native",
        "forward",
        "gathered + written",
        "GB/s",
        (least / p80 / 1e9, least / p50 / 1e9, least / p20 / 1e9),
        config,
    )


def backward(
    table: timing.Table, weight: torch.Tensor, layout: pk.PatchLayout, config: dict[str, Any], measure: dict[str, Any]
) -> None:
    shape = (layout.num_rows, weight.shape[1])
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(weight.dtype)
    copied = torch.zeros_like(grad)
    count, width = weight.shape
    bags = Bags(layout, weight.dtype)
    leaf = weight.detach().requires_grad_()
    pooled = bags.pool(leaf)
    calls: dict[str, Callable[[], torch.Tensor]] = {
        "copy": lambda: copied.copy_(grad),
        "native compact": lambda: pk.pool_rows_grad(grad, layout, count, dense=False, backend="native"),
        "native dense": lambda: pk.pool_rows_grad(grad, layout, count, backend="native"),
        "embedding_bag dense": lambda: torch.autograd.grad(pooled, leaf, grad, retain_graph=True)[0],
        "zeros": lambda: torch.zeros(count, width, dtype=weight.dtype),
    }
    exact = pk.pool_rows_grad(grad.double(), layout, count, dense=False, backend="reference").values()
    transpose = layout.transpose
    assert transpose is not None
    tokens = transpose.tokens.long()
    # a separator adds thousands of rows that largely cancel; embedding_bag adds them one after the other
    check("native compact backward", calls["native compact"]().values(), exact, loose=32.0)
    check("native dense backward", calls["native dense"]()[tokens], exact, loose=32.0)
    check("embedding_bag backward", calls["embedding_bag dense"]()[tokens], exact, loose=200.0)
    times = timing.measure(calls, **measure)
    report(table, times, "backward", config, "copy", "embedding_bag dense", "native compact", ("native dense",))


def report(
    table: timing.Table,
    times: timing.Timing,
    mode: str,
    config: dict[str, Any],
    floor: str,
    peer: str,
    ours: str,
    others: Sequence[str],
) -> None:
    for provider in times.seconds:
        p20, p50, p80 = (1e3 * seconds for seconds in times.quantiles(provider))
        table.add(provider, mode, "time", "ms", (p20, p50, p80), config)
    table.add(ours, mode, f"time / {floor}", "ratio", times.ratio(ours, floor), config)
    for provider in (ours, *others):
        table.add(provider, mode, f"speed-up over {peer}", "ratio", times.ratio(peer, provider), config)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 2048, 4096])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--policies", nargs="+", default=["text", "items", "sessions"], choices=workloads.POLICIES)
    parser.add_argument("--seconds", type=float, default=4.0, help="spent on each group of providers")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=["cpu", "wall"], default="cpu", help="cpu: one thread's own time")
    parser.add_argument("--cold", action="store_true", help="sweep the caches before every call")
    parser.add_argument("--loop", action="store_true", help="also time a Python loop over patches")
    parser.add_argument("--warm-memory", action="store_true", help="let the allocator keep what is freed")
    arguments = parser.parse_args(argv)
    if arguments.threads > 1 and arguments.clock == "cpu":
        parser.error("--clock cpu times one thread: give --clock wall with --threads")
    if arguments.warm_memory and any(os.environ.get(name) != value for name, value in _WARM_MEMORY.items()):
        # the allocator reads its settings when the process starts
        command = [sys.executable, os.path.abspath(__file__), *(sys.argv[1:] if argv is None else argv)]
        os.execve(sys.executable, command, os.environ | _WARM_MEMORY)
    run(arguments)


if __name__ == "__main__":
    main()
