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
--warm-memory glibc keeps what was freed, no provider meets a page fault, and the kernels alone are compared. Timings
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

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))  # an installed patchkern comes first

import patchkern as pk
from bench import timing, workloads
from patchkern.ops import backends, reference

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
REPEATS = 10
_WARM_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40), "MALLOC_TOP_PAD_": str(64 << 20)}
_UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float64: 2.0**-53}
# Errors in units of 4 roundings of the dtype, where a provider rounds more than once.
_LOOSE_FORWARD = {"embedding_bag": 2.0, "loop": 2.0, "segment_reduce": 8.0, "+table": 2.0}
_LOOSE_BACKWARD = 32.0  # a separator adds thousands of rows that largely cancel
_LOOSE_EMBEDDING_BAG_BACKWARD = 200.0  # which adds them one after the other

Calls = dict[str, Callable[[], Tensor]]


# ------------------------------------------------------------------ the same rows by other means


class Bags:
    """The layout as `F.embedding_bag` takes it: one weighted bag of tokens per row."""

    def __init__(self, layout: pk.PatchLayout, dtype: torch.dtype, device: torch.device) -> None:
        transpose = transpose_of(layout)
        rows = transpose.rows.numpy()
        tokens = np.repeat(transpose.tokens.numpy(), np.diff(transpose.offsets.numpy()))
        order = np.argsort(rows, kind="stable")
        self.tokens = torch.from_numpy(tokens[order].astype(np.int64)).to(device)
        self.weights = (1.0 / torch.from_numpy(transpose.divisors.numpy()[order]).double()).to(device, dtype)
        counts = np.bincount(rows, minlength=layout.num_rows)
        self.offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(counts)[:-1]])).to(device)

    def pool(self, weight: Tensor, sparse: bool = False) -> Tensor:
        return F.embedding_bag(
            self.tokens, weight, self.offsets, mode="sum", per_sample_weights=self.weights, sparse=sparse
        )


class Segments:
    """Gather, mean per title, gather, mean per session: PyTorch calls over indices that were worked out beforehand."""

    def __init__(self, layout: pk.PatchLayout, device: torch.device) -> None:
        lo, hi = layout.lo.long(), layout.hi.long()
        literal = lo < 0
        spans = [torch.arange(int(a), int(b)) for a, b in zip(lo[~literal], hi[~literal], strict=True)]
        sizes, lengths = (hi - lo)[~literal], layout.offsets.diff().long()
        titles, patches = torch.arange(lengths.shape[0]), torch.arange(sizes.shape[0])
        self.literal_rows = torch.nonzero(literal)[:, 0].to(device)
        self.literal_tokens = (-1 - lo[literal]).to(device)
        self.patch_rows = torch.nonzero(~literal)[:, 0].to(device)
        self.token_ids = layout.token_ids.long().to(device)
        self.title_offsets = layout.offsets.long().to(device)
        self.title_of_token = titles.repeat_interleave(lengths).to(device)
        self.lengths = lengths.to(device)
        self.title_of_member = layout.items[torch.cat(spans)].long().to(device) if spans else self.token_ids
        self.patch_offsets = F.pad(sizes.cumsum(0), (1, 0)).to(device)
        self.patch_of_member = patches.repeat_interleave(sizes).to(device)
        self.sizes = sizes.to(device)

    def index_add(self, weight: Tensor) -> Tensor:
        """Sums in float32, as index_add_ has no other accumulator."""
        width = weight.shape[1]
        titles = weight.new_zeros(self.lengths.shape[0], width, dtype=torch.float32)
        titles.index_add_(0, self.title_of_token, weight[self.token_ids].float())
        titles /= self.lengths[:, None]
        patches = weight.new_zeros(self.sizes.shape[0], width, dtype=torch.float32)
        patches.index_add_(0, self.patch_of_member, titles[self.title_of_member])
        return self._place(weight, patches / self.sizes[:, None])

    def segment_reduce(self, weight: Tensor) -> Tensor:
        if not self.patch_rows.shape[0]:
            return self._place(weight, weight[:0])
        titles = torch.segment_reduce(weight[self.token_ids], "mean", offsets=self.title_offsets, unsafe=True)
        members = titles[self.title_of_member]
        return self._place(weight, torch.segment_reduce(members, "mean", offsets=self.patch_offsets, unsafe=True))

    def _place(self, weight: Tensor, patches: Tensor) -> Tensor:
        rows = self.literal_rows.shape[0] + self.patch_rows.shape[0]
        out = weight.new_empty(rows, weight.shape[1])
        out[self.literal_rows] = weight[self.literal_tokens]
        out[self.patch_rows] = patches.to(weight.dtype)
        return out


class Loop:
    """One PyTorch call per title and per session: what one writes first."""

    def __init__(self, layout: pk.PatchLayout, device: torch.device) -> None:
        self.spans = list(zip(layout.lo.tolist(), layout.hi.tolist(), strict=True))
        self.items, self.offsets = layout.items.tolist(), layout.offsets.tolist()
        self.token_ids = layout.token_ids.long().to(device)
        literal = layout.lo < 0
        self.literal_rows = torch.nonzero(literal)[:, 0].to(device)
        self.literal_tokens = (-1 - layout.lo[literal]).long().to(device)

    def pool(self, weight: Tensor) -> Tensor:
        out = weight.new_empty(len(self.spans), weight.shape[1])
        out[self.literal_rows] = weight[self.literal_tokens]
        for row, (lo, hi) in enumerate(self.spans):
            if lo >= 0:
                cuts = ((self.offsets[item], self.offsets[item + 1]) for item in self.items[lo:hi])
                titles = [weight[self.token_ids[begin:end]].mean(0) for begin, end in cuts]
                out[row] = torch.stack(titles).mean(0) if len(titles) > 1 else titles[0]
        return out


def pool_by_reference(layout: pk.PatchLayout, weight: Tensor) -> Tensor:
    """The reference backend without the op around it, so that torch.compile sees inside."""
    out = weight.new_empty(layout.num_rows, weight.shape[1])
    rows = (layout.lo, layout.hi, layout.items, layout.token_ids, layout.offsets)
    reference.pool_rows(weight, *rows, None, None, 1.0, out)
    return out


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


def kernels(device: torch.device, dtype: torch.dtype) -> list[str]:
    """The backends with kernels for tensors of this kind, fastest first."""

    def fits(name: str) -> bool:
        try:
            return backends.choose(name, device, dtype) != "reference"
        except ValueError:
            return False

    return [name for name in pk.backends() if fits(name)]


def transpose_of(layout: pk.PatchLayout) -> Any:
    transpose = layout.with_transpose().transpose
    if transpose is None:
        raise RuntimeError("with_transpose returned a layout without one")
    return transpose


def wrong(got: Tensor, exact: Tensor, dtype: torch.dtype, loose: float) -> str | None:
    """Why a result must not be timed: its error has to look like roundings of the dtype, and nothing else."""
    error = (got.double() - exact).abs().max().item()
    allowed = loose * 4 * _UNIT_ROUNDOFF[dtype] * max(exact.abs().max().item(), 1e-30)
    return None if error <= allowed else f"wrong result, error {error:.3g}, allowed {allowed:.3g}"


def forward_error(weight: Tensor, layout: pk.PatchLayout) -> Callable[[str, Tensor], str | None]:
    """Compares a provider's rows with those of the reference in float64."""
    tokens, compact = layout.compact()
    device = weight.device
    exact = pk.pool_rows(weight[tokens.to(device)].double(), compact.to(device), backend="reference")

    def error(name: str, got: Tensor) -> str | None:
        loose = next((factor for end, factor in _LOOSE_FORWARD.items() if name.endswith(end)), 1.0)
        return wrong(got, exact, weight.dtype, loose)

    return error


def backward_error(grad: Tensor, layout: pk.PatchLayout, count: int) -> Callable[[str, Tensor], str | None]:
    """Compares a provider's gradient, dense or compact, with that of the reference in float64."""
    exact = pk.pool_rows_grad(grad.double(), layout, count, dense=False, backend="reference").values()
    tokens = transpose_of(layout).tokens.long()

    def error(name: str, got: Tensor) -> str | None:
        if got.is_sparse:
            wide = got._values().double()
            got = torch.sparse_coo_tensor(got._indices(), wide, got.shape, check_invariants=False).coalesce().values()
        else:
            got = got[tokens]
        loose = _LOOSE_EMBEDDING_BAG_BACKWARD if name.startswith("embedding_bag") else _LOOSE_BACKWARD
        return wrong(got, exact, grad.dtype, loose)

    return error


def least_bytes(layout: pk.PatchLayout, row_bytes: int) -> dict[str, int]:
    """What a forward pass cannot avoid to move: rows, distinct embeddings and the layout; and the same with a table."""
    written = layout.num_rows * row_bytes
    plan = index_bytes(layout.lo, layout.hi, layout.items)
    literals = torch.unique(layout.lo[layout.lo < 0]).shape[0]
    titles = layout.title_index.shape[0]
    tokens = transpose_of(layout).tokens.shape[0]
    return {
        "least_bytes": written + tokens * row_bytes + plan + index_bytes(layout.token_ids, layout.offsets),
        "least_bytes_table": written + (literals + titles) * row_bytes + plan + index_bytes(layout.title_index),
    }


def index_bytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def forward(
    bench: Bench, weight: Tensor, layout: pk.PatchLayout, item_patches: pk.ItemTable, config: dict[str, Any]
) -> None:
    width, element, device = weight.shape[1], weight.element_size(), bench.device
    names = kernels(device, weight.dtype)
    there = layout.to(device)
    bags, segments = Bags(layout, weight.dtype, device), Segments(layout, device)
    out = weight.new_zeros(layout.num_rows, width)
    source, copied = torch.ones_like(out), torch.zeros_like(out)

    calls: Calls = {}
    for name in names:
        calls[name] = functools.partial(pk.pool_rows, weight, there, backend=name, out=out)
        calls[f"{name}+alloc"] = functools.partial(pk.pool_rows, weight, there, backend=name)
        calls[f"{name}+table"] = functools.partial(
            pk.pool_rows, weight, there, backend=name, out=out, table=item_patches
        )
    ours = list(calls)
    calls["embedding_bag"] = lambda: bags.pool(weight)
    # timed apart: what they leave in a CPU's caches would be the others' loss
    composed: Calls = {
        "index_add": lambda: segments.index_add(weight),
        "segment_reduce": lambda: segments.segment_reduce(weight),
        "reference": lambda: pk.pool_rows(weight, there, backend="reference"),
    }
    for name, compiled in bench.compiled.items():
        argument = segments if name.startswith("index_add") else there
        composed[name] = functools.partial(compiled, argument, weight)
    slow: Calls = {}
    if bench.loop and layout.items.shape[0]:
        loop = Loop(layout, device)
        slow["loop"] = lambda: loop.pool(weight)

    error = forward_error(weight, layout)
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
    bags = Bags(layout, weight.dtype, device)
    leaf = weight.detach().requires_grad_()
    pooled, pooled_sparse = bags.pool(leaf), bags.pool(leaf, sparse=True)
    calls: Calls = {}
    for name in kernels(device, weight.dtype):
        gradient = functools.partial(pk.pool_rows_grad, grad, there, count, backend=name)
        calls[f"{name} compact"] = functools.partial(gradient, dense=False)
        calls[f"{name} dense"] = gradient
    ours = list(calls)
    calls["embedding_bag dense"] = lambda: torch.autograd.grad(pooled, leaf, grad, retain_graph=True)[0]
    calls["embedding_bag sparse"] = lambda: torch.autograd.grad(pooled_sparse, leaf, grad, retain_graph=True)[0]
    error = backward_error(grad, there, count)
    grown = torch.zeros_like(weight)
    into: Calls = {
        f"{name} dense into grad": functools.partial(pk.pool_rows_grad, grad, there, count, backend=name, out=grown)
        for name in kernels(device, weight.dtype)
    }
    calls, into = (bench.checked("backward", group, error, before=grown.zero_) for group in (calls, into))
    del error  # and with it the exact result
    ours = [name for name in ours if name in calls]
    for name in ours:
        same = repeats(calls[name])
        bench.table.add(name, "backward", f"bitwise equal in {REPEATS} runs", "", (same,) * 3, config)
        if not same:
            bench.failures.append(f"{name} backward: not the same bit for bit in {REPEATS} runs")
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


def repeats(call: Callable[[], Tensor]) -> bool:
    """Whether `REPEATS` runs give the same bits."""

    def bits(result: Tensor) -> Tensor:
        values = result._values() if result.is_sparse else result
        return values.contiguous().view(torch.int16 if values.element_size() == 2 else torch.int32)

    first = bits(call()).clone()
    return all(torch.equal(bits(call()), first) for _ in range(REPEATS - 1))


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
        name = "pool_rows_cuda"
    else:
        clock = time.perf_counter if arguments.clock == "wall" else time.thread_time
        measure = functools.partial(timing.measure, clock=clock, cold=arguments.cold)
        conditions = {"clock": arguments.clock, "memory": "warm" if arguments.warm_memory else "fresh"}
        name = "pool_rows_warm_memory" if arguments.warm_memory else "pool_rows"
    table = timing.Table(name)
    compiled: dict[str, Callable[..., Tensor]] = {}
    if arguments.compile != "off":
        compile_ = functools.partial(torch.compile, backend=arguments.compile, dynamic=True)
        compiled = {
            "index_add compiled": compile_(Segments.index_add),
            "reference compiled": compile_(pool_by_reference),
        }
    bench = Bench(device, table, measure, arguments.seconds, arguments.loop, compiled)
    print(f"backends: {', '.join(f'{name}: {status.reason}' for name, status in pk.backends().items())}")
    measure_peak(bench, arguments.peak_mib)
    workload = workloads.ml1m()
    for width in arguments.widths:
        for dtype in (getattr(torch, name) for name in arguments.dtypes):
            weight = torch.randn(workloads.VOCABULARY, width, generator=torch.Generator().manual_seed(0))
            weight = weight.to(device, dtype)
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
                        **least_bytes(layout, width * weight.element_size()),
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
    parser.add_argument("--warm-memory", action="store_true", help="let the allocator keep what is freed")
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
