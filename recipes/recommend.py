# SPDX-License-Identifier: Apache-2.0
"""Recommend to the users of a parquet file, by one process or several; go on after a stop, of one or of all.

    python recipes/recommend.py runs/items --users users.parquet --output runs/lists --exclude_seen
    torchrun --standalone --nproc_per_node 8 --max-restarts 3 recipes/recommend.py runs/items --users users.parquet \\
        --output runs/lists --exclude_seen --dtype bfloat16
    srun bash -c 'python recipes/recommend.py runs/items --users users.parquet --output runs/lists \\
        --shard $SLURM_PROCID/$SLURM_NTASKS'

A row of the file is a user: an id in the column user, item ids, oldest first, as a list in the column items. Each
process writes every so many of the parts (--shard, or what torchrun says), each when it is complete. The same command
again, with as many processes or others, computes what is missing. A folder of another model, file or flags is refused.

    import patchkern as pk
    user_ids, lists = pk.read_recommendations("runs/lists")
    table = pk.read_recommendations("runs/lists", format="arrow")

The parts are parquet, part-00000.parquet and so on; other tools read them as they are. recipes/batch_ray.py is the
same on Ray.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # an installed patchkern comes first

from recipes import bulk
from recipes.commands import Parser


def main(argv: Sequence[str] | None = None) -> int:
    """Returns how many parts were computed."""
    parser = Parser(description=__doc__)
    bulk.add_flags(parser)
    parser.add_argument(
        "--shard", metavar="RANK/WORLD", help="of the parts (default: RANK and WORLD_SIZE, which torchrun sets)"
    )
    args = parser.parse_args(argv)
    try:
        shard = shard_of(args)
    except ValueError:
        parser.error(f"--shard: expected two numbers such as 0/8, got {args.shard!r}")
    run, users = bulk.open_run(args, device())
    with run.writing(shard):
        missing = run.missing(shard)
        started = time.perf_counter()
        for done, part in enumerate(missing):
            histories, user_ids = users.read(run.range(part))
            run.write(part, histories, user_ids, shard)
            seconds = time.perf_counter() - started
            rest = (len(missing) - done - 1) * seconds / (done + 1)
            print(f"{shard[0]}/{shard[1]}: part {part}, {seconds:.0f} s, {rest:.0f} s to go", flush=True)
    run.nobody.warn(run.summary(shard))
    return len(missing)


def shard_of(args: argparse.Namespace) -> tuple[int, int]:
    """--shard, else what a launcher says, else everything."""
    rank, world = (args.shard or f"{os.environ.get('RANK', 0)}/{os.environ.get('WORLD_SIZE', 1)}").split("/")
    return int(rank), int(world)


def device() -> str:
    """A GPU for each process of a machine, where it has some."""
    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"


if __name__ == "__main__":
    main()
