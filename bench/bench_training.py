# SPDX-License-Identifier: Apache-2.0
r"""One optimisation step, written the obvious way and with patchkern: samples per second and peak memory.

    python bench/bench_training.py                      # ml-1m and the Llama-3 tokenizer if at hand, else a stand-in
    python bench/bench_training.py --policies items --rounds 3
    python bench/bench_training.py --hidden_size 512 --layers 16 --batch_size 4 --output runs/bench/deep.csv
    python bench/bench_training.py --targets all --most_items 300 --rounds 5 --output runs/bench/passes-128k.csv
    python bench/bench_training.py --targets all --vocab_size 4096 --hidden_size 128 --layers 2 --batch_size 32 \
        --rows_per_pass 4096 --rounds 3 --policies text items sessions sessions-start sessions-no-text \
        --output runs/bench/passes.csv

"reference" is what a training script does without patchkern: a Python loop embeds item by item and pools the old ones,
the sequences are padded on the right, and the model computes all logits under an attention mask and a cross-entropy.
"patchkern" plans the batch (inside the timed step), pools it in one pass and computes logits where there is a label.
Same weights, same samples, same AdamW.

With --targets all, two ways to learn every target of a whole user are compared, both patchkern's: "one per pass" packs
a sample for each target, with a history of its own; "all per pass" computes the history once (`build_training_layout`).
Both take passes of about --rows_per_pass rows, whose gradients add up to one step; a user who needs more is several
runs of targets, each with a trunk of its own, as in training. Histories are not cut, so that the two losses are the
same. Counted from the start, sessions are the same for several targets, which then share the items behind them too. The
fourth command is for one user at a time, where the logits are most of what is left, and
leaves out the longest, for whom the difference is largest; the fifth is a model as one trains it from scratch.

Each provider is a process of its own, so that its peak memory is its own: the largest resident set, less what the
process held once everything was imported and read. The two take turns, so that a busy machine slows both; ratios are
taken within a turn. Before any time is printed, losses and gradients must agree.

The model is a Llama of a few layers with Llama-3's vocabulary of 128,256. The logits that patchkern leaves out weigh
more in it than in a model of 1B parameters, whose 16 layers of width 2048 are about 80 % of a step's arithmetic: here
they are about 10 %, and with the third command about half. Of the peak memory, weights, gradients and AdamW's state
(0.6 GiB) are the same for both: with small batches they hide what is saved.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # an installed patchkern comes first

import patchkern as pk
from bench import output
from bench.timing import Table, Timing
from bench.training_providers import PASSES, PROVIDERS, TOLERANCE, make_model, rows_per_target, take_step, whole_users
from bench.workloads import POLICIES as USUAL
from bench.workloads import VOCABULARY, ml1m

# The largest powers of two with which the reference step stays below 8 GiB.
BATCH_SIZES = {"text": 8, "items": 16, "sessions": 32}
POLICIES: dict[str, pk.Policy] = {
    **{name: USUAL[name] for name in BATCH_SIZES},
    "sessions-start": pk.SessionPatches(5, 100, align="start"),
    "sessions-no-text": pk.SessionPatches(5, 100, align="start", keep_text=0),
}


class Turn(NamedTuple):
    """One optimisation step of one provider."""

    wall: float  # seconds per target
    processor: float  # seconds per target
    loss: float
    norm: float  # of the gradient
    targets: float  # per pass


# ------------------------------------------------------------------ a provider in its own process


def work(pipe: Connection, provider: str, args: argparse.Namespace, policy: pk.Policy) -> None:
    """Answer each batch number with a `Turn`."""
    torch.set_num_threads(args.threads)
    workload = ml1m(args.vocab_size)
    before = resident()
    hf_model = make_model(args.hidden_size, args.layers, args.vocab_size or VOCABULARY)
    model: Any = hf_model
    if provider != "reference":
        model = pk.PatchedCausalLM(hf_model, workload.catalog, workload.prompt)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    draw = (
        workload.samples
        if args.targets == "one"
        else functools.partial(whole_users, workload, most_items=args.most_items)
    )
    pipe.send("ready")
    for number in iter(pipe.recv, None):
        batch = draw(args.batch_size, seed=number)
        wall, processor = time.perf_counter(), time.process_time()
        losses, norm = take_step(
            model, optimizer, PASSES[provider](model, workload, *batch, policy, rows_per_pass=args.rows_per_pass)
        )
        wall, processor = time.perf_counter() - wall, time.process_time() - processor
        n = len(batch[0]) if args.targets == "one" else int((batch[0].lengths - 3).sum())
        pipe.send(Turn(wall / n, processor / n, sum(losses), norm, n / len(losses)))
    pipe.send(resident("VmHWM") - before)


def resident(field: str = "VmRSS") -> int:
    """Bytes this process holds; ``"VmHWM"``: at most held."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def compare(args: argparse.Namespace, policy: pk.Policy) -> tuple[dict[str, list[Turn]], dict[str, int]]:
    """All turns, and the peak memory, of both providers.

    Raises:
        RuntimeError: losses or gradient norms of the two differ.
    """
    context = multiprocessing.get_context("spawn")
    providers = PROVIDERS[args.targets]
    pipes, processes = {}, []
    for provider in providers:
        pipes[provider], end = context.Pipe()
        processes.append(context.Process(target=work, args=(end, provider, args, policy), daemon=True))
        processes[-1].start()
        end.close()
    for pipe in pipes.values():
        pipe.recv()
    turns: dict[str, list[Turn]] = {provider: [] for provider in providers}
    for number in range(args.rounds + 1):
        for provider in providers if number % 2 else providers[::-1]:
            pipes[provider].send(number)
            turns[provider].append(pipes[provider].recv())
        expected, got = ((turn.loss, turn.norm) for turn in (turns[provider][-1] for provider in providers))
        if not np.allclose(got, expected, rtol=TOLERANCE, atol=0):
            raise RuntimeError(
                f"step {number}: expected loss and gradient norm {expected}, got {got} from {providers[1]}"
            )
    memory = {}
    for provider, process in zip(providers, processes, strict=True):
        pipes[provider].send(None)
        memory[provider] = pipes[provider].recv()
        process.join()
    # The first step warms up and allocates the optimiser's state.
    return {provider: turns[provider][1:] for provider in providers}, memory


# ------------------------------------------------------------------ the table


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policies", nargs="+", choices=POLICIES, help=f"(default: {', '.join(BATCH_SIZES)})")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--targets", choices=PROVIDERS, default="one", help="of a user in one pass")
    parser.add_argument("--batch_size", type=int, help=f"default: {BATCH_SIZES}; with --targets all 1 user")
    parser.add_argument("--most_items", type=int, help="with --targets all: leave out users who have more")
    parser.add_argument("--rows_per_pass", type=int, default=16_384, help="with --targets all (default: %(default)s)")
    parser.add_argument("--vocab_size", type=int, help="of a tokenizer fitted to the titles (default: Llama-3's own)")
    parser.add_argument("--hidden_size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    output.add_option(parser, "training.csv")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)

    table = Table(output.prepare(args.output, "training.csv"))
    workload = ml1m(args.vocab_size)
    data = workload.name
    slow, fast = PROVIDERS[args.targets]
    given = args.batch_size
    for mode in args.policies or BATCH_SIZES:
        args.batch_size = given or (BATCH_SIZES.get(mode, BATCH_SIZES["sessions"]) if args.targets == "one" else 1)
        chosen: Any = POLICIES[mode]
        policy: pk.Policy = chosen if args.targets == "one" else replace(chosen, max_items=None)
        config = {"data": data, "policy": str(policy), "vocabulary": args.vocab_size or VOCABULARY, "dtype": "float32"}
        config |= {name: getattr(args, name) for name in ("batch_size", "hidden_size", "layers", "rounds")}
        if args.targets == "all":
            config |= {name: getattr(args, name) for name in ("most_items", "rows_per_pass")}
        turns, memory = compare(args, policy)
        wall, processor, targets = (
            Timing({provider: np.array([getattr(turn, field) for turn in turns[provider]]) for provider in turns})
            for field in ("wall", "processor", "targets")
        )
        for provider in (slow, fast):
            p20, p50, p80 = (1 / seconds for seconds in wall.quantiles(provider))
            table.add(provider, mode, "speed", "targets/s", (p80, p50, p20), config)
            table.add(provider, mode, "processor time", "s/target", processor.quantiles(provider), config)
            table.add(provider, mode, "targets per pass", "targets", targets.quantiles(provider), config)
            gibibytes = memory[provider] / 2**30
            table.add(provider, mode, "peak memory", "GiB", (gibibytes,) * 3, config)
        table.add(fast, mode, "speed-up", "x", wall.ratio(slow, fast), config)
        table.add(fast, mode, "processor speed-up", "x", processor.ratio(slow, fast), config)
        saved = memory[slow] / memory[fast]
        table.add(fast, mode, "memory saved", "x", (saved,) * 3, config)
        if args.targets == "all":
            p20, p50, p80 = targets.ratio(fast, slow)
            per_target = (saved * p20, saved * p50, saved * p80)
            table.add(fast, mode, "memory saved per target of a pass", "x", per_target, config)
            for provider, rows in rows_per_target(workload, policy).items():
                table.add(provider, mode, "rows per target, all users", "rows", (rows,) * 3, config)
    table.write()


if __name__ == "__main__":
    main()
