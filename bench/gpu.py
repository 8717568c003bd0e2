# SPDX-License-Identifier: Apache-2.0
"""Everything that only a GPU can show, in one go: build, tests, compute-sanitizer, benchmarks.

    make gpu                                              # in .venv
    python3 bench/gpu.py                                  # with the packages this Python has: nothing is installed
    python3 bench/gpu.py --minutes 9.5 --only build tests-pool-rows bench-pool-rows
    python3 bench/gpu.py --list

Steps run in order of value, each under a limit of its own, and none prevents the next. Tables, plots and `gpu.log` go
to the folder --output (default: $OUT, else runs/bench/gpu, numbered where there is one already). The last lines say how
each step ended and which targets were met.

On a machine without a CUDA device, and with --dry_run, the same steps run on the CPU with tiny sizes, so that no typing
error waits for a GPU; what that measures means nothing and goes to build/gpu-dry-run.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.append(str(Path(__file__).resolve().parents[1]))  # an installed patchkern comes first

from bench import output

REPOSITORY = Path(__file__).resolve().parents[1]

# Small tests of both backends that reach every kernel: by hand, long titles and sessions, split runs, row strides.
SANITIZED = (
    "test_by_hand or test_long_titles_and_sessions or test_long_runs_of_one_token or test_gradients_accumulate or "
    "test_a_session_is_a_mean_of_means"
)
PYTEST = "{python} -m pytest -q -p no:cacheprovider"
POOL_ROWS = [f"tests/ops/test_pool_rows{part}.py" for part in ("", "_grad", "_autograd")]
SANITIZER = "{sanitizer} --target-processes all --error-exitcode 86 --tool"
ON_GPU = PYTEST + f" -n 0 -m gpu -k '({SANITIZED}) and (cuda-gpu or triton-gpu)' {' '.join(POOL_ROWS)}"
ON_CPU = PYTEST + " -n 0 -m 'not gpu' -k '(test_by_hand or test_a_session) and triton' " + POOL_ROWS[0]


class Step(NamedTuple):
    """A command for the GPU, and the one that tries it out on a CPU; the names in braces are filled in."""

    name: str
    minutes: float
    command: str
    dry: str


STEPS = (
    Step("environment", 1, "{python} -m patchkern", "{python} -m patchkern"),
    Step("build", 6, "{python} setup.py -q build_ext --inplace", "{python} setup.py -q build_ext --inplace"),
    Step(
        "tests-pool-rows",
        5,
        PYTEST + " -n 4 -m gpu " + " ".join(POOL_ROWS),
        PYTEST + " -n 0 -m gpu " + " ".join(POOL_ROWS),
    ),
    Step(
        "bench-pool-rows",
        1.5,
        "{python} bench/bench_pool_rows.py --device cuda --policies text items sessions long --seconds 0.2 "
        "--compile off --no-loop --output {out}/pool_rows_cuda.csv",
        "{python} bench/bench_pool_rows.py --device cpu --batches 1 --widths 64 --dtypes bfloat16 --seconds 0 "
        "--policies items --compile off --no-loop --peak_mib 1 --output {out}/pool_rows_cuda.csv",
    ),
    Step(
        "bench-attention",
        1.5,
        "{python} bench/bench_attention.py --device cuda --dtype bfloat16 --heads 32 8 --seconds 0.5 "
        "--cases '20 hypotheses of 3 rows' '50 branches of 40 rows' --output {out}/attention_cuda.csv",
        "{python} bench/bench_attention.py --scale 20 --seconds 0 --heads 32 8 --providers patchkern 'sdpa per span' "
        "--cases '20 hypotheses of 3 rows' '50 branches of 40 rows' --output {out}/attention_cuda.csv",
    ),
    Step(
        "bench-end-to-end",
        1.5,
        "{python} bench/bench_end_to_end.py --parts share inference training --training_batches 16 --rounds 3 "
        "--seconds 0.7 --output {out}/end_to_end.csv",
        "{python} bench/bench_end_to_end.py --parts share inference training --device cpu --shape small "
        "--policies items --batches 2 --training_batches 2 --seconds 0 --rounds 1 --output {out}/end_to_end.csv",
    ),
    Step(
        "bench-search",
        2,
        "{python} bench/bench_search.py --device cuda --shape 1b --budget 40GiB --parts policies --long_batch 58 "
        "--output {out}/search_cuda.csv",
        "{python} bench/bench_search.py --shape tiny --parts policies --long_users 1 --long_rounds 1 "
        "--output {out}/search_cuda.csv",
    ),
    Step(
        "training-memory",
        1.5,
        "{python} bench/bench_memory.py --device cuda --parts training --output {out}/training_memory_cuda.csv",
        "{python} bench/bench_memory.py --shape small --parts training --rows 1024 --workers 1 "
        "--output {out}/training_memory_cuda.csv",
    ),
    Step(
        "bench-pool-rows-peers",
        1.5,
        "{python} bench/bench_pool_rows.py --device cuda --batches 64 --policies items sessions --seconds 0.2 "
        "--output {out}/pool_rows_peers_cuda.csv",
        "{python} bench/bench_pool_rows.py --device cpu --batches 1 --widths 64 --dtypes bfloat16 --seconds 0 "
        "--policies items --compile eager --loop --peak_mib 1 --output {out}/pool_rows_peers_cuda.csv",
    ),
    Step(
        "search-memory",
        1,
        "{python} bench/bench_memory.py --device cuda --parts search --output {out}/search_memory_cuda.csv",
        "{python} bench/bench_memory.py --shape small --parts search --users 4 --budgets 1GiB "
        "--output {out}/search_memory_cuda.csv",
    ),
    Step(
        "long-history",
        1,
        "{python} recipes/long_history.py {ml1m} --budget 40GiB --output {out}",
        "{python} recipes/long_history.py {ml1m} --budget 1GiB --users 1 --shape tiny --device cpu --output {out}",
    ),
    Step(
        "bench-dispatch",
        1,
        "{python} bench/bench_dispatch.py --batches 1 8 64 --widths 2048 --dtypes bfloat16 --seconds 0.05 "
        "--output {out}/dispatch.csv",
        "{python} bench/bench_dispatch.py --device cpu --batches 1 --widths 64 --dtypes bfloat16 --seconds 0 "
        "--output {out}/dispatch.csv",
    ),
    Step(
        "bench-passes",
        1.5,
        "{python} bench/bench_end_to_end.py --parts passes --policies text items --rounds 2 "
        "--output {out}/end_to_end_passes.csv",
        "{python} bench/bench_end_to_end.py --parts passes --rounds 1 --device cpu --shape small "
        "--policies items --users 1 --output {out}/end_to_end_passes.csv",
    ),
    Step(
        "bench-scaling",
        2,
        "{python} bench/bench_search.py --device cuda --shape 1b --parts scaling --output {out}/scaling_cuda.csv",
        "{python} bench/bench_search.py --shape tiny --parts scaling --scaling_items 200 400 "
        "--output {out}/scaling_cuda.csv",
    ),
    Step("memcheck", 4, f"{SANITIZER} memcheck {ON_GPU}", ON_CPU),
    Step(
        "tests",
        6,
        PYTEST + " -n 4 -m gpu" + "".join(f" --ignore {file}" for file in POOL_ROWS),
        PYTEST + " -n 0 -m gpu",
    ),
    Step("racecheck", 4, f"{SANITIZER} racecheck {ON_GPU}", ON_CPU),
    Step(
        "plot",
        1,
        "{python} bench/plot.py {out}/pool_rows_cuda.csv --dtype bfloat16 --output {out}/pool_rows_cuda.png",
        "{python} bench/plot.py {out}/pool_rows_cuda.csv --dtype bfloat16 --output {out}/pool_rows_cuda.png",
    ),
    Step(
        "plot-scaling",
        1,
        "{python} bench/plot_scaling.py {out}/scaling_cuda.csv --output {out}/scaling_cuda.png",
        "{python} bench/plot_scaling.py {out}/scaling_cuda.csv --output {out}/scaling_cuda.png",
    ),
)


class Target(NamedTuple):
    """What a metric of a table should reach, at the median; for providers whose name ends so."""

    table: str
    mode: str
    metric: str
    provider: str
    at_least: bool
    value: float


TARGETS = (
    Target("pool_rows_cuda", "forward", "fraction of peak", "", True, 0.9),
    Target("pool_rows_cuda", "forward", "fraction of copy", "", True, 0.9),
    Target("pool_rows_cuda", "forward", "speed-up over embedding_bag", "", True, 3),
    Target("pool_rows_cuda", "forward", "speed-up over index_add", "", True, 3),
    Target("pool_rows_cuda", "forward", "speed-up over segment_reduce", "", True, 3),
    Target("pool_rows_peers_cuda", "forward", "speed-up over index_add compiled", "", True, 3),
    Target("pool_rows_peers_cuda", "forward", "speed-up over reference compiled", "", True, 3),
    Target("pool_rows_peers_cuda", "forward", "speed-up over loop", "", True, 200),
    Target("pool_rows_cuda", "backward", "speed-up over embedding_bag dense", " dense", True, 2),
    Target("pool_rows_cuda", "backward", "speed-up over embedding_bag sparse", " compact", True, 2),
    Target("pool_rows_cuda", "backward", "bitwise equal in 10 runs", "", True, 1),
    Target("attention_cuda", "forward", "speed-up over sdpa per span", "", True, 1),
    Target("attention_cuda", "forward", "speed-up over flex", "", True, 1),
    Target("attention_cuda", "forward+backward", "speed-up over sdpa per span", "", True, 1),
    Target("attention_cuda", "forward+backward", "speed-up over flex", "", True, 1),
    Target("training_memory_cuda", "training", "predicted / measured", "", True, 1),
    Target("training_memory_cuda", "training", "predicted / measured", "", False, 1.1),
    Target("search_memory_cuda", "search", "measured / budget", "", False, 1),
    Target("search_cuda", "whole histories", "speed-up over text", "sessions", True, 13.09),
    Target("search_cuda", "whole histories", "speed-up over text", "items", True, 2.5),
    Target("end_to_end", "share", "fraction of forward", "compress_batch", False, 0.03),
    Target("end_to_end_passes", "passes", "projected stage", "all per pass", False, 12),
)


# ------------------------------------------------------------------ running


def run(command: str, log: Path, environment: dict[str, str], seconds: float) -> int | None:
    """The command's exit status, None if it ran past its time; its output goes to the end of ``log``."""
    with log.open("ab") as file:
        file.write(f"\n$ {command}\n".encode())
        file.flush()
        process = subprocess.Popen(
            shlex.split(command),
            cwd=REPOSITORY,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return process.wait(max(seconds, 1))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its own group, compilers and test workers included
            process.wait()
            return None


def ml1m() -> str:
    """The arguments of a recipe that name ml-1m and Llama's tokenizer, where both are at hand."""
    data = Path(os.environ.get("PATCHKERN_BENCH_DATA") or REPOSITORY.parent / "shared/data")
    folders = {"--data": data / "ml-1m", "--tokenizer": data / "llama3-tokenizer"}
    if not all(folder.is_dir() for folder in folders.values()):
        return ""
    return " ".join(f"{flag} {shlex.quote(str(folder))}" for flag, folder in folders.items())


def find_sanitizer() -> str:
    found = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    return found if Path(found).exists() else ""


def perform(step: Step, dry: bool, out: Path, seconds: float) -> tuple[str, float]:
    """How a step ended, in a word or two, and how long it took."""
    log = out / "gpu.log"
    command, sanitizer = step.dry if dry else step.command, find_sanitizer()
    if "{sanitizer}" in command and not sanitizer:
        return "not run: there is no compute-sanitizer here", 0.0
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    # what was built here, whatever is installed
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
    if dry:
        environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    if "{sanitizer}" in command:
        # every tensor its own allocation, so that reading past its end is an error and not a neighbour's value
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    filled = command.format(
        python=shlex.quote(sys.executable), sanitizer=sanitizer, out=shlex.quote(str(out)), ml1m=ml1m()
    )
    limit = min(60 * step.minutes, seconds)
    print(f"\n=== {step.name} (at most {limit:.0f} s)\n$ {filled}", flush=True)
    written, start = log.stat().st_size if log.exists() else 0, time.monotonic()
    status = run(filled, log, environment, limit)
    taken = time.monotonic() - start
    with log.open("rb") as file:
        file.seek(written)
        _, *lines = file.read().decode(errors="replace").strip().splitlines()
    print("\n".join(line[:200] for line in lines[-12:]), flush=True)
    ended = "ok" if status == 0 else "ran past its limit" if status is None else f"exit status {status}"
    counts = f": {lines[-1][:100]}" if "pytest" in command and lines else ""
    return ended + counts, taken


# ------------------------------------------------------------------ the summary


NAMING = ("policy", "case", "budget", "batch", "dtype")  # what tells a table's configurations apart


def targets(out: Path) -> list[str]:
    """One line per measured target: met or missed, and on which configurations."""
    lines = []
    for target in TARGETS:
        path = out / f"{target.table}.csv"
        if not path.exists():
            continue
        with path.open(newline="") as file:
            rows = [
                row
                for row in csv.DictReader(file)
                if (row["mode"], row["metric"]) == (target.mode, target.metric)
                and row["provider"].endswith(target.provider)
            ]
        for provider in dict.fromkeys(row["provider"] for row in rows):
            results = []
            for row in rows:
                if row["provider"] == provider:
                    config, value = (
                        json.loads(row["config"]),
                        float({"True": 1, "False": 0}.get(row["p50"], row["p50"])),
                    )
                    met = value >= target.value if target.at_least else value <= target.value
                    named = [str(config[key]) for key in NAMING if key in config]
                    name = "/".join(named).replace("float", "")
                    results.append(f"{name} {value:.3g}{'' if met else ' MISSED'}".strip())
            sign = ">=" if target.at_least else "<="
            lines.append(f"{provider}, {target.mode}, {target.metric} {sign} {target.value:g}: {', '.join(results)}")
    return lines


def default_folder(dry: bool) -> Path:
    """Where nothing is replaced that is worth keeping."""
    if dry:
        return REPOSITORY / "build/gpu-dry-run"
    named = os.environ.get("OUT")
    return Path(named) if named else output.unused(output.RUNS / "gpu", lambda path: path.mkdir(parents=True))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=[step.name for step in STEPS], default=None)
    parser.add_argument("--skip", nargs="+", choices=[step.name for step in STEPS], default=[])
    parser.add_argument("--minutes", type=float, default=25, help="for everything (default: %(default)s)")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="of tables, plots and the log, which are replaced (default: $OUT, else runs/bench/gpu, numbered where "
        "there is one already)",
    )
    parser.add_argument("--dry_run", action="store_true", help="on the CPU, with tiny sizes")
    parser.add_argument("--list", action="store_true", help="print the steps and stop")
    args = parser.parse_args(argv)
    if args.list:
        for step in STEPS:
            print(f"{step.name:18} {step.minutes:4g} min  {step.command}")
        return 0
    import torch

    dry = args.dry_run
    if not dry and not torch.cuda.is_available():
        print("gpu: torch sees no CUDA device on this machine; this is a dry run on the CPU")
        dry = True
    out = (args.output or default_folder(dry)).resolve()
    out.mkdir(parents=True, exist_ok=True)
    print(f"results go to {out}", flush=True)
    (out / "gpu.log").unlink(missing_ok=True)
    deadline = time.monotonic() + 60 * args.minutes
    summary, failed = [], False
    for step in STEPS:
        if step.name in args.skip or (args.only and step.name not in args.only):
            continue
        left = deadline - time.monotonic()
        ended, taken = perform(step, dry, out, left) if left > 5 else ("not run: no time left", 0.0)
        failed |= not ended.startswith("ok")
        summary.append(f"{step.name:18} {taken:6.1f} s  {ended}")
    verdicts = [] if dry else targets(out)
    report = "\n".join([f"\n=== summary, {'dry run on the CPU' if dry else 'GPU'}: {out}", *summary, *verdicts])
    print(report)
    with (out / "gpu.log").open("a") as file:
        file.write(report + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
