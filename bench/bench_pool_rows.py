# SPDX-License-Identifier: Apache-2.0
"""How fast `pool_rows` is, against one copy of its output and against PyTorch's own ways to the same rows.

    python bench/bench_pool_rows.py                       # ml-1m, batch 64, all widths and dtypes: about 15 minutes
    python bench/bench_pool_rows.py --widths 256 --seconds 0.5
    python bench/bench_pool_rows.py --threads 2 --clock wall
    python bench/bench_pool_rows.py --device cuda         # batches 64 and 512, D = 2048, every policy: minutes

Providers of the forward pass: `copy` (torch copy_ of a (T, D) tensor: the least that writing T rows can cost), each
backend that has kernels for the device (`native`, `cuda`, `triton`; into a given output), `NAME+alloc` (as autograd
calls it), `NAME+table` (with the catalogue's item patches at hand), `embedding_bag` (per_sample_weights, allocates),
`index_add` and `segment_reduce` (gather and mean per segment, with every index worked out beforehand), `reference` (the
reference backend), the last and `index_add` under torch.compile, and `loop` (a Python loop over patches). Backward:
`NAME dense`, `NAME dense into grad` (adding to a gradient that exists), `NAME compact`, `embedding_bag dense`,
`embedding_bag sparse` and `zeros` (the (V, D) zeros that any dense gradient starts from).

GB/s count the least bytes that could be moved: every row written once, every distinct embedding and the layout read
once; `fraction of copy` divides them by those of `copy` in the same round, `fraction of peak` by those of one large
copy in the same run.

On the CPU the allocator is as every process has it: large results come in fresh memory, whose page faults cost more
than the work on most virtual machines, and `native` is the only provider that can write into memory it is given. With
--warm_memory glibc keeps what was freed, no provider meets a page fault, and the kernels alone are compared. Timings
are CPU time of one thread unless told otherwise, so that busy neighbours only cost cache and bandwidth. On a GPU they
are CUDA events with a cold L2 cache. A provider whose result is wrong gets no timing, and the script fails.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))  # an installed patchkern comes first

import patchkern as pk
from bench import output, timing, workloads
from bench import pool_rows_providers as providers
from bench.pool_rows_providers import Calls, index_bytes, transpose_of

DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {
        "batches": [64],
        "widths": [256, 2048, 4096],
        "dtypes": ["bfloat16", "float32"],
        "policies": ["text", "items", "sessions"],
        "seconds": 4.0,
        "compile": "off",
        "loop": False,
        "peak_mib": 128,
    },
    "cuda": {
        "batches": [64, 512],
        "widths": [2048],
        "dtypes": ["bfloat16"],
        "policies": list(workloads.POLICIES),
        "seconds": 0.5,
        "compile": "inductor",
        "loop": True,
        "peak_mib": 2048,
    },
}
_WARM_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40), "MALLOC_TOP_PAD_": str(64 << 20)}


# ------------------------------------------------------------------ one configuration


@dataclass
class Bench:
    """What every measurement of a run shares."""

    device: torch.device
    table: timing.Table
    measure: Callable[..., timing.Timing]
    seconds: float
    loop: bool
    compiled: dict[str, Callable[..., Tensor]]  # the peers under torch.compile, for all configurations
    peak: float = 0.0  # bytes per second of one large copy
    failures: list[str] = field(default_factory=list)

    def checked(
        self, mode: str, calls: Calls, error: Callable[[str, Tensor], str | None], before: Callable[[], object]
    ) -> Calls:
        """The calls whose results are right; the others are not timed, and fail the run when all else is done."""
        passed: Calls = {}
        for name, call in calls.items():
            before()
            try:
                reason = error(name, call())
            except Exception as exception:  # one provider that cannot run must not cost the others their numbers
                reason = f"{type(exception).__name__}: {exception}".partition("\n")[0]
            if reason is None:
                passed[name] = call
            else:
                self.failures.append(f"{name} {mode}: {reason}")
                print(f"NOT TIMED: {self.failures[-1]}", flush=True)
        return passed


def forward(
    bench: Bench, weight: Tensor, layout: pk.PatchLayout, item_patches: pk.ItemTable, config: dict[str, Any]
) -> None:
    width, element, device = weight.shape[1], weight.element_size(), bench.device
    there = layout.to(device)
    out = weight.new_zeros(layout.num_rows, width)
    source, copied = torch.ones_like(out), torch.zeros_like(out)

    calls = providers.backends_forward(weight, there, item_patches, out)
    ours = list(calls)
    # timed apart: what they leave in a CPU's caches would be the others' loss
    composed = providers.peers_forward(weight, layout, bench.compiled)
    calls["embedding_bag"] = composed.pop("embedding_bag")
    slow: Calls = {}
    if bench.loop and layout.items.shape[0]:
        slow["loop"] = functools.partial(providers.Loop(layout, device).pool, weight)

    error = providers.forward_error(weight, layout)
    # what is not written must show, even where the output held the right rows already
    calls, composed, slow = (
        bench.checked("forward", group, error, before=lambda: out.fill_(float("nan")))
        for group in (calls, composed, slow)
    )
    del error  # and with it the exact result
    ours = [name for name in ours if name in calls]
    moved = dict.fromkeys((*calls, *composed, *slow), config["least_bytes"]) | {"copy": 2 * copied.numel() * element}
    moved |= {name: config["least_bytes_table"] for name in calls if name.endswith("+table")}

    alongside = {name: calls[name] for name in ours}
    times = bench.measure({"copy": lambda: copied.copy_(source)} | calls, seconds=bench.seconds)
    report(bench, "forward", config, times, times.seconds, moved)
    against_copy(bench, "forward", config, times, ours, moved)
    against_peers(bench, "forward", config, times, ours, [name for name in calls if name not in ours])
    gathered = (config["token_reads"] + layout.num_rows) * width * element
    for name in ours:
        add_rate(bench, name, "forward", "gathered + written", gathered, times, config)
    on_gpu = device.type == "cuda"
    for group, seconds, rounds in ((composed, bench.seconds if on_gpu else 0.0, 5), (slow, 0.0, 3)):
        if group:
            times = bench.measure(alongside | group, seconds=seconds, min_rounds=rounds)
            report(bench, "forward", config, times, group, moved)
            against_peers(bench, "forward", config, times, ours, group)


def backward(bench: Bench, weight: Tensor, layout: pk.PatchLayout, config: dict[str, Any]) -> None:
    count, width = weight.shape
    element, device = weight.element_size(), bench.device
    there, transpose = layout.to(device), transpose_of(layout)
    grad = torch.randn(layout.num_rows, width, generator=torch.Generator().manual_seed(1)).to(device, weight.dtype)
    copied = torch.zeros_like(grad)
    calls = providers.backends_backward(grad, there, count)
    ours = list(calls)
    calls |= providers.peers_backward(weight, layout, grad)
    error = providers.backward_error(grad, there, count)
    grown = torch.zeros_like(weight)
    into: Calls = {
        f"{name} dense into grad": functools.partial(pk.pool_rows_grad, grad, there, count, backend=name, out=grown)
        for name in providers.kernels(device, weight.dtype)
    }
    calls, into = (bench.checked("backward", group, error, before=grown.zero_) for group in (calls, into))
    del error  # and with it the exact result
    ours = [name for name in ours if name in calls]
    for name in ours:
        same = providers.repeats(calls[name])
        bench.table.add(name, "backward", f"bitwise equal in {providers.REPEATS} runs", "", (same,) * 3, config)
        if not same:
            bench.failures.append(f"{name} backward: not the same bit for bit in {providers.REPEATS} runs")
    calls |= into
    calls["zeros"] = lambda: torch.zeros_like(weight)
    calls["copy"] = lambda: copied.copy_(grad)
    reads = layout.num_rows * width * element + index_bytes(
        transpose.tokens, transpose.offsets, transpose.rows, transpose.divisors
    )
    compact_bytes = reads + transpose.tokens.shape[0] * width * element
    moved = {name: compact_bytes for name in ours if name.endswith("compact")} | {"copy": 2 * copied.numel() * element}
    times = bench.measure(calls, seconds=bench.seconds)
    report(bench, "backward", config, times, times.seconds, moved)
    against_copy(bench, "backward", config, times, [name for name in ours if name in moved], moved)
    peers = [name for name in ("embedding_bag dense", "embedding_bag sparse") if name in calls]
    against_peers(bench, "backward", config, times, ours, peers)


# ------------------------------------------------------------------ rows of the table


def add_rate(
    bench: Bench, name: str, mode: str, metric: str, moved: int, times: timing.Timing, config: Mapping[str, Any]
) -> None:
    p20, p50, p80 = times.quantiles(name)
    bench.table.add(name, mode, metric, "GB/s", (moved / p80 / 1e9, moved / p50 / 1e9, moved / p20 / 1e9), config)


def report(
    bench: Bench,
    mode: str,
    config: Mapping[str, Any],
    times: timing.Timing,
    providers: Iterable[str],
    moved: Mapping[str, int],
) -> None:
    for name in providers:
        p20, p50, p80 = (1e3 * seconds for seconds in times.quantiles(name))
        bench.table.add(name, mode, "time", "ms", (p20, p50, p80), config)
        if name in moved:
            add_rate(bench, name, mode, "least bytes", moved[name], times, config)


def against_copy(
    bench: Bench,
    mode: str,
    config: Mapping[str, Any],
    times: timing.Timing,
    ours: Sequence[str],
    moved: Mapping[str, int],
) -> None:
    for name in ours:
        bench.table.add(name, mode, "time / copy", "ratio", times.ratio(name, "copy"), config)
        more = moved[name] / moved["copy"]
        p20, p50, p80 = (more * ratio for ratio in times.ratio("copy", name))
        bench.table.add(name, mode, "fraction of copy", "ratio", (p20, p50, p80), config)
        slow, median, fast = (moved[name] / seconds / bench.peak for seconds in reversed(times.quantiles(name)))
        bench.table.add(name, mode, "fraction of peak", "ratio", (slow, median, fast), config)


def against_peers(
    bench: Bench,
    mode: str,
    config: Mapping[str, Any],
    times: timing.Timing,
    ours: Sequence[str],
    peers: Iterable[str],
) -> None:
    for peer in peers:
        for name in ours:
            bench.table.add(name, mode, f"speed-up over {peer}", "ratio", times.ratio(peer, name), config)


# ------------------------------------------------------------------ the run


def measure_peak(bench: Bench, mebibytes: int) -> None:
    source = torch.ones(mebibytes << 18, dtype=torch.int32, device=bench.device)
    copied = torch.zeros_like(source)
    times = bench.measure({"copy": lambda: copied.copy_(source)}, seconds=bench.seconds)
    moved = 2 * index_bytes(source)
    bench.peak = moved / times.quantiles("copy")[1]
    add_rate(bench, "copy", "peak", "least bytes", moved, times, {"mebibytes": mebibytes, "device": str(bench.device)})


def run(arguments: argparse.Namespace) -> list[str]:
    """Measure every configuration; returns the providers that failed."""
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    measure: Callable[..., timing.Timing]
    if device.type == "cuda":
        measure = functools.partial(timing.measure_cuda, device=device)
        conditions = {"clock": "events", "memory": "cached"}
        name = "pool_rows_cuda.csv"
    else:
        clock = time.perf_counter if arguments.clock == "wall" else time.thread_time
        measure = functools.partial(timing.measure, clock=clock, cold=arguments.cold)
        conditions = {"clock": arguments.clock, "memory": "warm" if arguments.warm_memory else "fresh"}
        name = "pool_rows_warm_memory.csv" if arguments.warm_memory else "pool_rows.csv"
    table = timing.Table(output.prepare(arguments.output, name))
    compiled: dict[str, Callable[..., Tensor]] = {}
    if arguments.compile != "off":
        compile_ = functools.partial(torch.compile, backend=arguments.compile, dynamic=True)
        compiled = {
            "index_add compiled": compile_(providers.Segments.index_add),
            "reference compiled": compile_(providers.pool_by_reference),
        }
    bench = Bench(device, table, measure, arguments.seconds, arguments.loop, compiled)
    print(f"backends: {', '.join(f'{name}: {status.reason}' for name, status in pk.backends().items())}")
    measure_peak(bench, arguments.peak_mib)
    workload = workloads.ml1m()
    for width in arguments.widths:
        for dtype in (getattr(torch, name) for name in arguments.dtypes):
            generator = torch.Generator(device).manual_seed(0)
            weight = torch.randn(workloads.VOCABULARY, width, generator=generator, device=device).to(dtype)
            item_patches = pk.item_table(workload.catalog, weight)
            for batch in arguments.batches:
                histories, targets = workload.samples(batch)
                for policy in arguments.policies:
                    chosen = workloads.POLICIES[policy]
                    layout = pk.build_layout(workload.catalog, histories, chosen, workload.prompt, targets)
                    transpose = transpose_of(layout)
                    config = {
                        "data": workload.name,
                        "batch": batch,
                        "policy": policy,
                        "width": width,
                        "dtype": str(dtype).removeprefix("torch."),
                        "vocabulary": workloads.VOCABULARY,
                        "rows": layout.num_rows,
                        "token_reads": transpose.rows.shape[0],
                        "distinct_tokens": transpose.tokens.shape[0],
                        **providers.least_bytes(layout, width * weight.element_size()),
                        **conditions,
                    }
                    print(f"\n{config}")
                    with torch.no_grad():
                        forward(bench, weight, layout, item_patches, config)
                    backward(bench, weight, layout, config)
                    table.write()
            del weight, item_patches
    return bench.failures


def main(argv: Sequence[str] | None = None) -> None:
    where = argparse.ArgumentParser(add_help=False)
    where.add_argument("--device", default="cpu", help="cpu or cuda; the other defaults depend on it")
    kind = torch.device(where.parse_known_args(argv)[0].device).type
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], parents=[where])
    parser.add_argument("--batches", type=int, nargs="+")
    parser.add_argument("--widths", type=int, nargs="+")
    parser.add_argument("--dtypes", nargs="+")
    parser.add_argument("--policies", nargs="+", choices=workloads.POLICIES)
    parser.add_argument("--seconds", type=float, help="spent on each group of providers")
    parser.add_argument("--compile", help="backend of torch.compile, or off")
    parser.add_argument("--loop", action=argparse.BooleanOptionalAction, help="time a Python loop over patches too")
    parser.add_argument("--peak_mib", type=int, help="of the copy that is taken for the peak")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=["cpu", "wall"], default="cpu", help="cpu: one thread's own time")
    parser.add_argument("--cold", action="store_true", help="sweep the CPU's caches before every call")
    parser.add_argument("--warm_memory", action="store_true", help="let the allocator keep what is freed")
    output.add_option(parser, "pool_rows_cuda.csv" if kind == "cuda" else "pool_rows.csv or pool_rows_warm_memory.csv")
    parser.set_defaults(**DEFAULTS[kind])
    arguments = parser.parse_args(argv)
    if arguments.threads > 1 and arguments.clock == "cpu" and kind == "cpu":
        parser.error("--clock cpu times one thread: give --clock wall with --threads")
    if arguments.warm_memory and any(os.environ.get(name) != value for name, value in _WARM_MEMORY.items()):
        # the allocator reads its settings when the process starts
        command = [sys.executable, os.path.abspath(__file__), *(sys.argv[1:] if argv is None else argv)]
        os.execve(sys.executable, command, os.environ | _WARM_MEMORY)
    failures = run(arguments)
    if failures:
        sys.exit("\n".join(["wrong or not run:", *failures]))


if __name__ == "__main__":
    main()
