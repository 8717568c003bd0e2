# SPDX-License-Identifier: Apache-2.0
"""How many history items a second `build_layout` plans on one core.

    python bench/bench_layout.py

The whole of `build_layout` is timed: cut, look-up of item ids, policy, rows and the gradient's transpose, with
targets. `plan` and `transpose` are its two native parts, `numpy` the same layout by the NumPy planner; both planners'
arrays are compared first. CPU time of the one thread, so that busy neighbours only cost cache.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import patchkern as pk
from bench import timing, workloads
from patchkern import layout as layout_module
from patchkern import planning, planning_native


def with_planner(planner: object, call: Callable[[], pk.PatchLayout]) -> Callable[[], pk.PatchLayout]:
    def run() -> pk.PatchLayout:
        before = layout_module.planner
        layout_module.planner = planner  # type: ignore[assignment]
        try:
            return call()
        finally:
            layout_module.planner = before

    return run


def equal(left: pk.PatchLayout, right: pk.PatchLayout) -> bool:
    for name, value in left.__dict__.items():
        other = getattr(right, name)
        if isinstance(value, torch.Tensor):
            if not torch.equal(value, other):
                return False
        elif name == "transpose":
            if not all(torch.equal(tensor, getattr(other, part)) for part, tensor in value.__dict__.items()):
                return False
        elif value != other:
            return False
    return True


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 512])
    parser.add_argument("--seconds", type=float, default=2.0, help="spent on each batch and policy")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    workload = workloads.ml1m()
    table = timing.Table("layout")
    for size in arguments.batches:
        histories, targets = workload.samples(size)
        for name, policy in workloads.POLICIES.items():
            run_one(table, workload, histories, targets, name, policy, arguments.seconds)
    table.write()


def run_one(
    table: timing.Table,
    workload: workloads.Workload,
    histories: pk.Histories,
    targets: np.ndarray,
    name: str,
    policy: pk.Policy,
    seconds: float,
) -> None:
    catalog, prompt = workload.catalog, workload.prompt

    def build() -> pk.PatchLayout:
        return pk.build_layout(catalog, histories, policy, prompt, targets)

    native, numpy = with_planner(planning_native, build), with_planner(planning, build)
    layout = native()
    if not equal(layout, numpy()):
        sys.exit(f"{name}: the native and the NumPy planner disagree; nothing was timed")
    kept = histories.latest(policy.max_items)
    items = kept.items.size
    index, levels, target_index = catalog.index_of(kept.items), policy.levels(kept), catalog.index_of(targets)
    rows = planning_native.plan_rows(catalog, index, kept.offsets, levels, prompt, target_index)[:5]
    calls: dict[str, Callable[[], object]] = {
        "native": native,
        "numpy": numpy,
        "plan": lambda: planning_native.plan_rows(catalog, index, kept.offsets, levels, prompt, target_index),
        "transpose": lambda: planning_native.transpose_rows(*rows),
    }
    # One after the other, as in a data loader's worker: in turns, each would find what the others left in the caches.
    times = timing.Timing({})
    for provider, call in calls.items():
        alone = timing.measure({provider: call}, seconds=seconds / len(calls), max_rounds=2000, clock=time.thread_time)
        times.seconds.update(alone.seconds)
    config = {"data": workload.name, "batch": len(kept), "policy": name, "items": items, "rows": layout.num_rows}
    print(f"\n{config}")
    for provider in calls:
        p20, p50, p80 = times.quantiles(provider)
        table.add(provider, "build_layout", "time", "us", (1e6 * p20, 1e6 * p50, 1e6 * p80), config)
        rate = (items / p80 / 1e6, items / p50 / 1e6, items / p20 / 1e6)
        table.add(provider, "build_layout", "history items", "million/s", rate, config)


if __name__ == "__main__":
    main()
