# SPDX-License-Identifier: Apache-2.0
"""Recommend to the users of a parquet file on Ray Data: actors with the model, on one machine or a cluster.

    pip install 'ray[data]'
    python recipes/batch_ray.py runs/items --users users.parquet --output runs/lists --actors 2
    python recipes/batch_ray.py runs/items --users users.parquet --output runs/lists --actors 16 --num_gpus 1 \\
        --dtype bfloat16 --memory_budget 60GiB        # in a cluster: RAY_ADDRESS, and folders that all machines see

Files, folder and lists are those of recipes/recommend.py. What Ray hands out is the numbers of the parts that are not
there: an actor reads its users, recommends and writes the part when it is complete. So nothing is lost or doubled when
an actor is killed, whose part another computes, nor when the driver is, after which the same command computes what is
missing.

--memory_budget is of a machine, or of a GPU, and divided by the actors there. Actors hold at most half of a cluster's
CPUs in Ray's books, so that Ray Data's own tasks always find one; how many threads they compute with is --threads.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # an installed patchkern comes first

from patchkern.budget.search import parse_bytes
from recipes import bulk
from recipes.commands import Parser


class Recommender:
    """An actor: the model, and the users of any part."""

    def __init__(self, args: argparse.Namespace, threads: int) -> None:
        torch.set_num_threads(threads)
        self.run, self.users = bulk.open_run(args, "cuda" if ray.get_gpu_ids() else "cpu")

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        for part in batch["part"].tolist():
            histories, user_ids = self.users.read(self.run.range(part))
            self.run.write(part, histories, user_ids)
        return batch


def main(argv: Sequence[str] | None = None) -> int:
    """Returns how many parts were computed."""
    args = parse(argv)
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(Path(__file__).resolve().parents[1])]))
    ray.init(runtime_env={"env_vars": {"PYTHONPATH": path}}, ignore_reinit_error=True)
    machines = [node for node in ray.nodes() if node["Alive"]]
    of_machine = math.ceil(args.actors / len(machines))
    if args.memory_budget is not None:
        sharing = max(1, int(1 / args.num_gpus)) if args.num_gpus else of_machine
        args.memory_budget = parse_bytes("--memory_budget", args.memory_budget) // sharing
    cpus = ray.cluster_resources().get("CPU", 1.0)
    threads = args.threads or max(1, int(cpus / args.actors))
    run, _ = bulk.open_run(args)
    with run.writing():
        missing = run.missing()
        print(
            f"{run}: {len(missing):,} parts to compute by {args.actors} actors on {len(machines)} machines", flush=True
        )
        if missing:
            done = (
                ray.data.from_items([{"part": part} for part in missing])
                .repartition(len(missing))  # a task each
                .map_batches(
                    Recommender,
                    fn_constructor_args=(args, threads),
                    compute=ray.data.ActorPoolStrategy(size=min(args.actors, len(missing))),
                    batch_size=1,
                    num_cpus=min(1.0, cpus / 2 / args.actors),
                    num_gpus=args.num_gpus or None,
                )
            )
            for number, row in enumerate(done.iter_rows(), start=1):
                print(f"part {row['part']}, {number:,} of {len(missing):,}", flush=True)
    run.nobody.warn(run.summary())
    return len(missing)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    bulk.add_flags(parser)
    parser.add_argument("--actors", type=int, default=2, help="in the cluster (default: %(default)s)")
    parser.add_argument("--num_gpus", type=float, default=0.0, help="of an actor; 0.5: two share one (default: none)")
    parser.add_argument("--threads", type=int, help="of an actor (default: its share of the CPUs)")
    args = parser.parse_args(argv)
    for name in ("checkpoint", "users", "output"):  # actors may be anywhere
        setattr(args, name, os.path.abspath(getattr(args, name)))
    if args.actors < 1:
        parser.error(f"--actors: expected at least 1, got {args.actors}")
    if args.num_gpus < 0 or (args.threads is not None and args.threads < 1):
        parser.error("--num_gpus, --threads: expected at least 0 and 1")
    return args


if __name__ == "__main__":
    main()
