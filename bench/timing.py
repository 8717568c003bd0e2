# SPDX-License-Identifier: Apache-2.0
"""Timing for shared and noisy machines: every provider once per round, ratios taken within a round.

PATCHKERN_COMMIT stands in for the commit where there is no git.
"""

from __future__ import annotations

import csv
import functools
import gc
import importlib.metadata
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

import patchkern as pk
from bench import output
from patchkern._build import origin

COLUMNS = (
    *("provider", "mode", "metric", "unit", "p20", "p50", "p80", "config"),
    *("machine", "cpu", "threads", "torch", "patchkern", "commit", "date"),
    *("gpu", "driver", "cuda", "triton", "transformers"),
)
_EVICT_BYTES = 256 << 20

Calls = Mapping[str, Callable[[], object]]


@dataclass(frozen=True)
class Timing:
    """Seconds per call: one array per provider, entry ``i`` of each from the same round."""

    seconds: dict[str, np.ndarray]

    def quantiles(self, provider: str) -> tuple[float, float, float]:
        """20th, 50th and 80th percentile, in seconds."""
        p20, p50, p80 = np.quantile(self.seconds[provider], (0.2, 0.5, 0.8))
        return float(p20), float(p50), float(p80)

    def ratio(self, numerator: str, denominator: str) -> tuple[float, float, float]:
        """Quantiles of ``numerator / denominator``, each ratio from one round: what both met alike cancels."""
        p20, p50, p80 = np.quantile(self.seconds[numerator] / self.seconds[denominator], (0.2, 0.5, 0.8))
        return float(p20), float(p50), float(p80)


def measure(
    calls: Calls,
    seconds: float = 3.0,
    min_rounds: int = 7,
    max_rounds: int = 400,
    cold: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> Timing:
    """Time each call once per round until ``seconds`` are spent; the first round warms up and is not counted.

    Args:
        calls: provider -> a call without arguments.
        cold: sweep the caches before every call, outside the timed part.
        clock: `time.thread_time` counts what the calling thread itself ran for, so that single-threaded work can be
            timed on a machine whose cores are taken by others; wall time is the default.
    """
    evict = torch.zeros(_EVICT_BYTES // 8, dtype=torch.int64) if cold else None
    taken: dict[str, list[float]] = {name: [] for name in calls}
    names, shuffle = list(calls), np.random.default_rng(0)
    collecting = gc.isenabled()
    gc.disable()
    try:
        start = time.perf_counter()
        for round_number in range(max_rounds + 1):
            # in a new order each time: what the call before left in the caches is no provider's privilege
            for name in shuffle.permutation(names).tolist():
                if evict is not None:
                    evict.add_(1)
                before = clock()
                result = calls[name]()
                after = clock()
                del result  # freeing is not part of the call: who allocates less should not pay for another's result
                if round_number > 0:
                    taken[name].append(after - before)
            if round_number >= min_rounds and time.perf_counter() - start > seconds:
                break
    finally:
        if collecting:
            gc.enable()
    return Timing({name: np.asarray(values) for name, values in taken.items()})


def measure_cuda(
    calls: Calls, device: torch.device, seconds: float = 1.0, min_rounds: int = 10, max_rounds: int = 1000
) -> Timing:
    """Time each call once per round by CUDA events on ``device``; two rounds warm up and are not counted.

    Before every call, outside its events, a buffer several times the size of the L2 cache is written. The call then
    finds none of its data there, and what it writes has to push other dirty lines out, as in any long program. The
    sweep also takes longer than it takes to enqueue most calls, and the host never waits between rounds: a launch's own
    latency shows only where a call is slower to enqueue than to run, or waits for the device itself.
    """
    evict = torch.empty(max(_EVICT_BYTES, 4 * _cache_bytes(device)) // 4, dtype=torch.int32, device=device)
    names, shuffle = list(calls), np.random.default_rng(0)
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in names}

    def play_round(counted: bool) -> None:
        for name in shuffle.permutation(names).tolist():
            evict.zero_()
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            result = calls[name]()
            end.record()
            del result  # its memory goes to the next call that asks for as much
            if counted:
                events[name].append((begin, end))

    collecting = gc.isenabled()
    gc.disable()
    try:
        play_round(counted=False)
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        play_round(counted=False)
        torch.cuda.synchronize(device)
        rounds = int(seconds / (time.perf_counter() - start))
        for _ in range(min(max(rounds, min_rounds), max_rounds)):
            play_round(counted=True)
        torch.cuda.synchronize(device)
    finally:
        if collecting:
            gc.enable()
    return Timing(
        {name: np.array([1e-3 * begin.elapsed_time(end) for begin, end in pairs]) for name, pairs in events.items()}
    )


def synchronize(device: torch.device) -> None:
    """Wait for ``device``, so that a host clock counts its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _cache_bytes(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).L2_cache_size)


@dataclass
class Table:
    """Rows of a tidy CSV, printed as they come."""

    path: Path
    rows: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        usable = ", ".join(name for name, status in pk.backends().items() if status.usable)
        print(f"patchkern {pk.__version__} {origin()}, usable backends: {usable}", flush=True)

    def add(
        self,
        provider: str,
        mode: str,
        metric: str,
        unit: str,
        quantiles: tuple[float, float, float],
        config: Mapping[str, Any],
    ) -> None:
        p20, p50, p80 = (f"{value:.6g}" for value in quantiles)
        row = {"provider": provider, "mode": mode, "metric": metric, "unit": unit, "p20": p20, "p50": p50, "p80": p80}
        self.rows.append(row | {"config": json.dumps(dict(config)), "threads": torch.get_num_threads()} | environment())
        print(f"{provider:24} {mode:18} {metric:24} {p50:>10} {unit:10} [{p20} .. {p80}]", flush=True)

    def write(self) -> None:
        """Write all rows so far; after every configuration, so that an interrupted run leaves what it has measured."""
        temporary = self.path.with_name(f"{self.path.name}.tmp")
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)
        temporary.replace(self.path)
        print(f"wrote {output.shown(self.path)}", flush=True)


def environment() -> dict[str, str]:
    """Machine, versions and commit, for every row."""
    return {"machine": f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads"} | _software()


@functools.cache
def _software() -> dict[str, str]:
    on_gpu = torch.cuda.is_available()
    return {
        "cpu": f"{_cpu()}, {pk.ops.native.isa()}",
        "torch": torch.__version__,
        "patchkern": pk.__version__,
        "commit": os.environ.get("PATCHKERN_COMMIT")
        or _output("git", "describe", "--always", "--dirty", "--exclude=*"),
        "date": time.strftime("%Y-%m-%d"),
        "gpu": torch.cuda.get_device_name() if on_gpu else "",
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if on_gpu else "",
        "cuda": torch.version.cuda or "",
        "triton": _version("triton"),
        "transformers": _version("transformers"),
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip().partition("\n")[0]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
