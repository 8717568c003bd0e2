# SPDX-License-Identifier: Apache-2.0
"""The measurements behind two decisions: which backend "auto" picks on a GPU, and what a layout sends there.

    python bench/bench_dispatch.py                        # minutes; needs a CUDA device
    TRITON_INTERPRET=1 python bench/bench_dispatch.py --device cpu --batches 1 --widths 64 --seconds 0

"pool_rows" and "pool_rows_grad": each backend with kernels, over batch, width and dtype. `time` is the device's, with a
cold L2 cache; `call` is the host's, from the call to its return, which decides where a batch is small. "transfer": a
layout to the device tensor by tensor, from pageable and from pinned memory, against one pinned buffer of as many bytes;
position_ids and labels sent, against derived there from what is sent anyway. Those are wall times that end when the
device has it all.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))  # an installed patchkern comes first

import patchkern as pk
from bench import output, timing, workloads
from bench import pool_rows_providers as providers
from bench.pool_rows_providers import index_bytes, transpose_of

POLICIES = ("text", "items", "sessions", "long")


def compare_backends(
    table: timing.Table, workload: workloads.Workload, device: torch.device, args: argparse.Namespace
) -> None:
    measure: Callable[..., timing.Timing] = timing.measure
    if device.type == "cuda":
        measure = functools.partial(timing.measure_cuda, device=device)
    for dtype in (getattr(torch, name) for name in args.dtypes):
        for width in args.widths:
            weight = torch.empty(workloads.VOCABULARY, width, device=device, dtype=dtype).normal_()
            for batch in args.batches:
                for policy in POLICIES:
                    layout = pk.build_layout(
                        workload.catalog,
                        workload.samples(batch)[0],
                        workloads.POLICIES[policy],
                        workload.prompt,
                        transpose=True,
                    ).to(device)
                    config = {
                        "data": workload.name,
                        "batch": batch,
                        "policy": policy,
                        "width": width,
                        "dtype": str(dtype).removeprefix("torch."),
                        "rows": layout.num_rows,
                        "token_reads": transpose_of(layout).rows.shape[0],
                    }
                    print(f"\n{config}")
                    compare_on(table, measure, weight, layout, config, args.seconds)
            table.write()


def compare_on(
    table: timing.Table,
    measure: Callable[..., timing.Timing],
    weight: Tensor,
    layout: pk.PatchLayout,
    config: dict[str, Any],
    seconds: float,
) -> None:
    out = weight.new_empty(layout.num_rows, weight.shape[1])
    grad = torch.randn_like(out)
    modes: dict[str, Callable[[str], Callable[[], Tensor]]] = {
        "pool_rows": lambda name: functools.partial(pk.pool_rows, weight, layout, backend=name, out=out),
        "pool_rows_grad": lambda name: functools.partial(
            pk.pool_rows_grad, grad, layout, weight.shape[0], dense=False, backend=name
        ),
    }
    for mode, call_of in modes.items():
        calls = {name: call_of(name) for name in providers.kernels(weight.device, weight.dtype)}
        times = measure(calls, seconds=seconds)
        for name, call in calls.items():
            p20, p50, p80 = (1e6 * value for value in times.quantiles(name))
            table.add(name, mode, "time", "us", (p20, p50, p80), config)
            p20, p50, p80 = (1e6 * value for value in host_time(call, weight.device).quantiles("call"))
            table.add(name, mode, "call", "us", (p20, p50, p80), config)
        first, *others = calls
        for name in others:
            table.add(first, mode, f"speed-up over {name}", "ratio", times.ratio(name, first), config)


def host_time(call: Callable[[], object], device: torch.device) -> timing.Timing:
    """How long the host is busy with a call: the device has nothing else to do, and is not waited for."""
    taken: list[float] = []
    while len(taken) < 20 and sum(taken) < 0.5:
        timing.synchronize(device)
        before = time.perf_counter()
        call()
        taken.append(time.perf_counter() - before)
    timing.synchronize(device)
    return timing.Timing({"call": torch.tensor(taken, dtype=torch.float64).numpy()})


def transfer(
    table: timing.Table, workload: workloads.Workload, device: torch.device, batch: int, policy: str, seconds: float
) -> None:
    histories, targets = workload.samples(batch)
    layout = pk.build_layout(workload.catalog, histories, workloads.POLICIES[policy], workload.prompt, targets)
    transpose = transpose_of(layout)
    gradient = (transpose.tokens, transpose.offsets, transpose.rows, transpose.divisors)
    tensors = [value for value in (*layout.__dict__.values(), *gradient) if isinstance(value, Tensor)]
    whole = torch.zeros(index_bytes(*tensors), dtype=torch.uint8)

    def pin(what: Any) -> Any:
        """Memory can be pinned only where there is a GPU."""
        return what.pin_memory() if device.type == "cuda" else what

    pinned, whole, there = pin(layout), pin(whole), layout.to(device)
    sent = (pinned.position_ids, pinned.labels)
    if not all(torch.equal(tensor.cpu(), other.cpu()) for tensor, other in zip(derive(there), sent, strict=True)):
        sys.exit("derived position_ids or labels differ from the layout's; nothing was timed")

    def waited(call: Callable[[], object]) -> Callable[[], object]:
        def run() -> object:
            result = call()
            timing.synchronize(device)
            return result

        return run

    config = {"data": workload.name, "batch": batch, "policy": policy, "rows": layout.num_rows}
    config |= {"tensors": len(tensors), "bytes": index_bytes(*tensors)}
    print(f"\n{config}")
    calls = {
        "pageable": lambda: layout.to(device, non_blocking=True),
        "pin, then send": lambda: pin(layout).to(device, non_blocking=True),
        "pinned": lambda: pinned.to(device, non_blocking=True),
        "one pinned buffer": lambda: whole.to(device, non_blocking=True),
        "positions, labels sent": lambda: [tensor.to(device, non_blocking=True) for tensor in sent],
        "positions, labels derived": lambda: derive(there),
    }
    times = timing.measure({name: waited(call) for name, call in calls.items()}, seconds=seconds)
    for name in calls:
        p20, p50, p80 = (1e6 * value for value in times.quantiles(name))
        table.add(name, "transfer", "wall time", "us", (p20, p50, p80), config)


def derive(layout: pk.PatchLayout) -> tuple[Tensor, Tensor]:
    """A layout's position_ids and labels from its other tensors, without waiting for the device."""
    starts, rows = layout.cu_seqlens[:-1].long(), torch.arange(layout.num_rows, device=layout.device)
    lengths = layout.cu_seqlens.diff()
    position_ids = rows - starts.repeat_interleave(lengths, output_size=layout.num_rows)
    labels = torch.full_like(rows, -100)
    if layout.logit_rows is None or layout.logit_labels is None:
        raise ValueError("layout: expected one with targets")
    labels[layout.logit_rows + 1] = layout.logit_labels
    return position_ids, labels


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64, 512])
    parser.add_argument("--widths", type=int, nargs="+", default=[41, 64, 256, 1024, 2048, 4096, 8192])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--seconds", type=float, default=0.1, help="spent on each comparison")
    output.add_option(parser, "dispatch.csv")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("bench_dispatch: nothing was run, torch sees no CUDA device on this machine")
        return
    table = timing.Table(output.prepare(args.output, "dispatch.csv"))
    workload = workloads.ml1m()
    for batch in args.batches:
        for policy in ("text", "sessions"):
            transfer(table, workload, device, batch, policy, 3 * args.seconds)
    table.write()
    compare_backends(table, workload, device, args)


if __name__ == "__main__":
    main()
