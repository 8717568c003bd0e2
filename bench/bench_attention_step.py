# SPDX-License-Identifier: Apache-2.0
"""Attention's share of a training step of a language model on the CPU, here and in another checkout of patchkern.

    python bench/bench_attention_step.py
    python bench/bench_attention_step.py --against ../patchkern-before

Some layers of a Llama of the shape of SmolLM2-135M (hidden 576, 9 heads, 3 key heads of width 64), forward and backward
of one packed batch, in bfloat16 autocast: a user's trunk with 17 branches, and 20 users without branches. The same step
with a sum of queries, keys and values in attention's place is what all else costs, and the difference is attention.
Both are timed in the same round, and every checkout is a process of its own which runs a round in turn with the other;
outputs and gradients are compared before the clock starts. Times are the processor's, of all threads: a busy machine
does not count. ``--against`` names a checkout that has been built; without it this one is measured alone.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig, LlamaModel

sys.path.append(str(Path(__file__).resolve().parents[1]))  # an installed patchkern comes first

from bench import output, timing
from patchkern.models.attention import NAME, attention_mask, register

HERE = Path(__file__).resolve().parents[1]
TOLERANCE = 3e-2  # of the largest value: bfloat16


class Case(NamedTuple):
    """Spans as lengths, prefix ranges of the batch's own rows, and positions."""

    lengths: list[int]
    prefix: list[tuple[int, int]] | None
    positions: list[int]


def branches() -> Case:
    """A trunk of 104 rows with 17 targets of 34 to 63: item patches, the last five items as text."""
    trunk, targets = 104, np.random.default_rng(0).integers(34, 64, 17).tolist()
    ends = [trunk - 2 * (16 - n) for n in range(17)]
    positions = [place for end, rows in zip(ends, targets, strict=True) for place in range(end, end + rows)]
    return Case([trunk, *targets], [(0, 0), *((0, end) for end in ends)], [*range(trunk), *positions])


def trunks(users: int) -> Case:
    lengths = np.random.default_rng(0).integers(20, 201, users).tolist()
    return Case(lengths, None, [place for rows in lengths for place in range(rows)])


CASES = {
    "1 trunk, 17 branches": branches(),
    "20 trunks of 20 to 200 rows": trunks(20),
}


def arguments(case: Case) -> dict[str, Any]:
    cu_seqlens = torch.tensor([0, *itertools.accumulate(case.lengths)], dtype=torch.int32)
    longest = max(case.lengths)
    made: dict[str, Any] = {
        "position_ids": torch.tensor([case.positions]),
        "cu_seq_lens_q": cu_seqlens,
        "cu_seq_lens_k": cu_seqlens,
    }
    made |= {"max_length_q": longest, "max_length_k": longest, "use_cache": False}
    if case.prefix is not None:
        made["span_prefix"] = torch.tensor(case.prefix, dtype=torch.int32)
        made["max_span_prefix"] = max(end - begin for begin, end in case.prefix)
    return made


def no_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Any:
    """All three are used and get a gradient, and that is all."""
    mixed = query.unflatten(1, (key.shape[1], -1)) + (key + value).unsqueeze(2)
    return mixed.flatten(1, 2).transpose(1, 2), None


class Worker:
    """One checkout's model and its steps."""

    def __init__(self, layers: int) -> None:
        register()
        AttentionInterface.register("none", no_attention)
        AttentionMaskInterface.register("none", attention_mask)
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=8,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=layers,
            num_attention_heads=9,
            num_key_value_heads=3,
            head_dim=64,
        )
        self.model = LlamaModel(config).train()

    def step(self, case: str, attention: str) -> tuple[float, Tensor, Tensor]:
        """Seconds of the processor, hidden states and the gradient of the embeddings."""
        given, rows = arguments(CASES[case]), sum(CASES[case].lengths)
        draw = torch.Generator().manual_seed(0)
        embeds = torch.randn(1, rows, 576, generator=draw).requires_grad_()
        weight = torch.randn(1, rows, 576, generator=draw)
        self.model.set_attn_implementation(attention)
        start = time.process_time()
        with torch.autocast("cpu", torch.bfloat16):
            states = self.model(inputs_embeds=embeds, **given).last_hidden_state
        (states.float() * weight).mean().backward()
        seconds = time.process_time() - start
        self.model.zero_grad()
        assert embeds.grad is not None
        return seconds, states.detach().float(), embeds.grad


def serve(address: str, layers: int, threads: int) -> None:
    torch.set_num_threads(threads)
    worker = Worker(layers)
    with Client(address, "AF_UNIX") as pipe:
        for case, compare in iter(pipe.recv, None):
            seconds, states, grad = worker.step(case, NAME)
            without, *_ = worker.step(case, "none")
            pipe.send((states.numpy(), grad.numpy()) if compare else (seconds, without))


def started(checkout: Path, listener: Listener, args: argparse.Namespace) -> tuple[Connection, subprocess.Popen[bytes]]:
    """A process that imports that checkout's patchkern, and the line to it."""
    command = [sys.executable, __file__, "--serve", str(listener.address), "--layers", str(args.layers)]
    environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": str(args.threads)}
    process = subprocess.Popen([*command, "--threads", str(args.threads)], env=environment, cwd=checkout)
    return listener.accept(), process


def play(lines: dict[str, Connection], case: str, rounds: int) -> dict[str, np.ndarray]:
    """(rounds, 2) seconds of each provider: the step, and the step without attention. The first round warms up."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in lines}
    draw = np.random.default_rng(0)
    for number in range(rounds + 1):
        for name in draw.permutation(list(lines)).tolist():
            lines[name].send((case, False))
            seconds = lines[name].recv()
            if number > 0:
                taken[name].append(seconds)
    return {name: np.array(seconds) for name, seconds in taken.items()}


def check(lines: dict[str, Connection], case: str) -> None:
    """Raise unless the providers agree."""
    results = []
    for line in lines.values():
        line.send((case, True))
        results.append(line.recv())
    for other in results[1:]:
        for mine, theirs in zip(results[0], other, strict=True):
            error = float(abs(mine - theirs).max() / abs(theirs).max())
            if not error <= TOLERANCE:
                raise SystemExit(f"{case}: the checkouts differ by {error:.1e} of the largest value; nothing was timed")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="another checkout of patchkern, built")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    output.add_option(parser, "attention_step.csv")
    args = parser.parse_args(argv)
    if args.serve:
        return serve(args.serve, args.layers, args.threads)
    torch.set_num_threads(args.threads)
    checkouts = {"patchkern": HERE} | ({} if args.against is None else {"before": args.against.resolve()})
    table = timing.Table(output.prepare(args.output, "attention_step.csv"))
    with Listener(family="AF_UNIX") as listener:
        processes, lines = [], {}
        for name, checkout in checkouts.items():
            lines[name], process = started(checkout, listener, args)
            processes.append(process)
        for case in CASES:
            check(lines, case)
            measured = play(lines, case, args.rounds)
            config = {"case": case, "rows": sum(CASES[case].lengths), "layers": args.layers, "dtype": "bfloat16"}
            report(table, measured, config)
            table.write()
        for line in lines.values():
            line.send(None)
        for process in processes:
            process.wait()


def report(table: timing.Table, measured: dict[str, np.ndarray], config: dict[str, Any]) -> None:
    def quantiles(values: np.ndarray) -> tuple[float, float, float]:
        p20, p50, p80 = np.quantile(values, (0.2, 0.5, 0.8)).tolist()
        return p20, p50, p80

    measures: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {
        "step": ("ms", lambda seconds: 1e3 * seconds[:, 0]),
        "attention": ("ms", lambda seconds: 1e3 * (seconds[:, 0] - seconds[:, 1])),
        "attention's share": ("%", lambda seconds: 100 * (1 - seconds[:, 1] / seconds[:, 0])),
    }
    for name, seconds in measured.items():
        for metric, (unit, of) in measures.items():
            table.add(name, "forward+backward", metric, unit, quantiles(of(seconds)), config)
    if "before" in measured:
        before, now = measured["before"], measured["patchkern"]
        table.add("patchkern", "forward+backward", "speed-up", "x", quantiles(before[:, 0] / now[:, 0]), config)


if __name__ == "__main__":
    main()
