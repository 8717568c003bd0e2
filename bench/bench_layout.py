# SPDX-License-Identifier: Apache-2.0
"""How many rows a second `build_layout` and `build_training_layout` plan on one core.

    python bench/bench_layout.py

The whole of either is timed: cut, look-up of item ids, policy, rows and the gradient's transpose, with targets. `plan`
and `transpose` are the two native parts of the former, `numpy` the same layout by the NumPy planner; both planners'
arrays are compared first. `build_training_layout` plans all targets of as many users as a pass holds. CPU time of the
one thread, so that busy neighbours only cost cache.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # an installed patchkern comes first

import patchkern as pk
from bench import output, timing, workloads
from patchkern.batch import planner as chosen
from patchkern.batch import planning, planning_native
from patchkern.batch.policy_kinds import TrunkPolicy


def with_planner(planner: object, call: Callable[[], pk.PatchLayout]) -> Callable[[], pk.PatchLayout]:
    def run() -> pk.PatchLayout:
        before = chosen.active
        chosen.active = planner  # type: ignore[assignment]
        try:
            return call()
        finally:
            chosen.active = before

    return run


def by_planner(build: Callable[[], pk.PatchLayout]) -> dict[str, Callable[[], pk.PatchLayout]]:
    return {"native": with_planner(planning_native, build), "numpy": with_planner(planning, build)}


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
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 512], help="samples of `build_layout`")
    parser.add_argument("--passes", type=int, nargs="+", default=[8192, 32768], help="rows of a training pass")
    parser.add_argument("--seconds", type=float, default=2.0, help="spent on each batch and policy")
    output.add_option(parser, "layout.csv")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    table = timing.Table(output.prepare(arguments.output, "layout.csv"))
    workload = workloads.ml1m()
    for name, policy in workloads.POLICIES.items():
        for size in arguments.batches:
            time_samples(table, workload, name, policy, size, arguments.seconds)
        for rows in arguments.passes if isinstance(policy, TrunkPolicy) else ():
            time_pass(table, workload, name, policy, rows, arguments.seconds)
    table.write()


def time_samples(
    table: timing.Table, workload: workloads.Workload, name: str, policy: pk.Policy, size: int, seconds: float
) -> None:
    catalog, prompt = workload.catalog, workload.prompt
    histories, targets = workload.samples(size)
    build = functools.partial(pk.build_layout, catalog, histories, policy, prompt, targets)
    layout = agreed(build, name)
    kept = histories.latest(policy.max_items)
    index, levels, target_index = catalog.index_of(kept.items), policy.levels(kept), catalog.index_of(targets)
    rows = planning_native.plan_rows(catalog, index, kept.offsets, levels, prompt, target_index)[:5]
    calls: dict[str, Callable[[], object]] = {
        **by_planner(build),
        "plan": lambda: planning_native.plan_rows(catalog, index, kept.offsets, levels, prompt, target_index),
        "transpose": lambda: planning_native.transpose_rows(*rows),
    }
    config = {"data": workload.name, "batch": len(kept), "policy": name}
    amounts = {"history items": kept.items.size, "rows": layout.num_rows}
    time_alone(table, "build_layout", calls, config, amounts, seconds)


def time_pass(
    table: timing.Table, workload: workloads.Workload, name: str, policy: pk.Policy, rows: int, seconds: float
) -> None:
    histories, ranges = whole_users(workload, policy, rows)
    build = functools.partial(pk.build_training_layout, workload.catalog, histories, policy, workload.prompt, ranges)
    layout = agreed(build, name)
    calls = by_planner(build)
    config = {"data": workload.name, "pass": rows, "policy": name}
    amounts = {"targets": int((ranges[:, 1] - ranges[:, 0] + 1).clip(0).sum()), "rows": layout.num_rows}
    time_alone(table, "build_training_layout", calls, config, amounts, seconds)


def whole_users(workload: workloads.Workload, policy: pk.Policy, rows: int) -> tuple[pk.Histories, np.ndarray]:
    """As many users as a pass of ``rows`` holds, drawn at random, and the ranges of their targets."""
    users = np.random.default_rng(0).permutation(len(workload.histories))[:1000]
    histories = workload.histories.take(users)
    ranges = np.stack([np.full(len(histories), 3), histories.lengths - 1], axis=1)
    needed = pk.training_rows(workload.catalog, histories, policy, workload.prompt, ranges)
    chosen = np.flatnonzero(needed <= rows)
    chosen = chosen[np.cumsum(needed[chosen]) <= rows]
    return histories.take(chosen), ranges[chosen]


def agreed(build: Callable[[], pk.PatchLayout], name: str) -> pk.PatchLayout:
    layout, other = (plan() for plan in by_planner(build).values())
    if not equal(layout, other):
        sys.exit(f"{name}: the native and the NumPy planner disagree; nothing was timed")
    return layout


def time_alone(
    table: timing.Table,
    mode: str,
    calls: Mapping[str, Callable[[], object]],
    config: dict[str, Any],
    amounts: dict[str, int],
    seconds: float,
) -> None:
    """One after the other, as in a data loader's worker: in turns, each would find what the others left in caches."""
    times = timing.Timing({})
    for provider, call in calls.items():
        alone = timing.measure({provider: call}, seconds=seconds / len(calls), max_rounds=2000, clock=time.thread_time)
        times.seconds.update(alone.seconds)
    config = config | amounts
    print(f"\n{mode} {config}")
    for provider in calls:
        p20, p50, p80 = times.quantiles(provider)
        table.add(provider, mode, "time", "us", (1e6 * p20, 1e6 * p50, 1e6 * p80), config)
        for what, amount in amounts.items():
            rate = (amount / p80 / 1e6, amount / p50 / 1e6, amount / p20 / 1e6)
            table.add(provider, mode, what, "million/s", rate, config)


if __name__ == "__main__":
    main()
