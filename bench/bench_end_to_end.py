# SPDX-License-Identifier: Apache-2.0
"""What patchkern is worth around a model of the size of Llama-3.2-1B (random weights), on a GPU.

    python bench/bench_end_to_end.py                      # bfloat16, ml-1m if at hand: minutes
    python bench/bench_end_to_end.py --parts passes --output runs/bench/end_to_end_passes.csv
    python bench/bench_end_to_end.py --device cpu --shape small --batches 4 --training_batches 2 --users 1 --seconds 0

"share": `compress_batch` (plan the rows, send the layout, pool) as a fraction of the model's own forward pass on the
batch it makes; once as for inference and once with the gradient's plan and graph.

"inference" and "training": one forward pass to every user's next-token logits, and one optimisation step, by the
reference style (a Python loop embeds and pools item by item, right padding, an attention mask, all logits; SDPA) and by
patchkern (plan, send, pool, packed attention, logits where they are needed). The two share one set of weights and take
turns; where logits or losses do not agree nothing is timed, and the script fails in the end. Who runs out of memory
says so in the table.

"passes": every target of whole users, histories cut to the latest 100 items as published. "one per pass" packs a sample
for each target, "all per pass" trunks and branches (`build_training_layout`); both in passes of --rows_per_pass rows
with an optimisation step after each. From their speeds follow the hours of a published stage, which learns 534,185
samples once; patch pre-training learns each of them twice. "arithmetic" is what such a stage takes by rows and weights
alone, six operations for each weight and row: the least that a machine of known speed could be expected to need.

All times are wall times, from histories to results on the device.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

sys.path.append(str(Path(__file__).resolve().parents[1]))  # an installed patchkern comes first

import patchkern as pk
from bench import output
from bench.timing import Table, Timing, measure, synchronize
from bench.training_providers import (
    PASSES,
    patchkern_loss,
    reference_batch,
    reference_loss,
    rows_per_target,
    whole_users,
)
from bench.training_providers import PROVIDERS as WAYS
from bench.workloads import POLICIES, VOCABULARY, Workload, ml1m
from patchkern.models.scratch import LLAMA_1B

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": LLAMA_1B,
    "small": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}
# Of two ways through sixteen layers in the same dtype, relative to the norm of the result.
TOLERANCE = {torch.bfloat16: 5e-2, torch.float32: 1e-4}
# Samples that one published stage on ml-1m learns; it took 12 hours of an A800.
STAGE_SAMPLES = 534_185

Step = Callable[[pk.Histories, np.ndarray], Tensor]
Draw = Callable[[int], tuple[pk.Histories, np.ndarray]]


def make_model(shape: str, dtype: torch.dtype) -> Any:
    # a configuration of its own: setting a model's attention writes into it
    config = LlamaConfig(
        **{**SHAPES[shape], "vocab_size": VOCABULARY}, max_position_embeddings=131_072, tie_word_embeddings=True
    )
    return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")


class Models:
    """One set of weights, behind the reference style's attention and behind patchkern's."""

    def __init__(self, shape: str, dtype: torch.dtype, device: torch.device, workload: Workload) -> None:
        torch.manual_seed(0)
        with device:
            packed, self.padded = (make_model(shape, dtype) for _ in range(2))
        self.padded.load_state_dict(packed.state_dict(keep_vars=True), assign=True)
        self.packed = pk.PatchedCausalLM(packed, workload.catalog, workload.prompt)
        self.workload, self.dtype = workload, dtype

    # ------------------------------------------------------------------ inference

    @torch.no_grad()
    def reference_logits(self, histories: pk.Histories, policy: pk.Policy) -> Tensor:
        inputs, mask, _ = reference_batch(self.padded, self.workload, histories, None, policy)
        logits = self.padded(inputs_embeds=inputs, attention_mask=mask, use_cache=False).logits
        return logits[torch.arange(len(histories), device=mask.device), mask.sum(1) - 1]

    @torch.no_grad()
    def patchkern_logits(self, histories: pk.Histories, policy: pk.Policy) -> Tensor:
        layout = pk.build_layout(self.workload.catalog, histories, policy, self.workload.prompt, transpose=False)
        logits: Tensor = self.packed(layout).logits
        return logits

    # ------------------------------------------------------------------ training

    def step(self, loss: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
        loss.backward()
        nn.utils.clip_grad_norm_(self.packed.parameters(), 0.3)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()


# ------------------------------------------------------------------ the measurements


def share(table: Table, models: Models, policy: str, batch: int, seconds: float, config: dict[str, Any]) -> None:
    workload = models.workload
    histories, targets = workload.samples(batch)
    embedding: Any = models.packed.get_input_embeddings()
    weight: Tensor = embedding.weight
    frozen, device = weight.detach(), models.packed.device

    def compress(matrix: Tensor) -> pk.PackedBatch:
        compressed = pk.compress_batch(matrix, workload.catalog, histories, POLICIES[policy], workload.prompt, targets)
        synchronize(device)
        return compressed

    def plan() -> pk.PatchLayout:
        return pk.build_layout(workload.catalog, histories, POLICIES[policy], workload.prompt, targets, transpose=False)

    hf_model: Any = models.packed.hf_model
    kwargs = compress(frozen).model_kwargs()

    @torch.no_grad()
    def forward() -> Tensor:
        output = hf_model(**kwargs)
        synchronize(device)
        logits: Tensor = output.logits
        return logits

    calls = {
        "forward": forward,
        "build_layout": plan,
        "compress_batch": lambda: compress(frozen),
        "compress_batch for gradients": lambda: compress(weight),
    }
    times = measure(calls, seconds=seconds, min_rounds=5)
    config = config | {"policy": policy, "batch": batch, "rows": kwargs["inputs_embeds"].shape[1]}
    for name in calls:
        p20, p50, p80 = (1e3 * value for value in times.quantiles(name))
        table.add(name, "share", "time", "ms", (p20, p50, p80), config)
        if name != "forward":
            table.add(name, "share", "fraction of forward", "ratio", times.ratio(name, "forward"), config)


def compare(
    table: Table, mode: str, steps: dict[str, Step], draw: Draw, unit: str, rounds: int, config: dict[str, Any]
) -> Timing:
    """Time two ways to the same result in turns, the slow one first, each on batches the other gets too.

    Args:
        draw: of a round's number, a step's arguments.
        unit: "samples", one per history, or "targets", of which the second argument holds the ranges.

    Returns:
        Seconds per sample or target of those that did not run out of memory.
    """
    device = torch.device(config["device"])
    taken: dict[str, list[float]] = {name: [] for name in steps}
    memory = dict.fromkeys(steps, 0)
    running = dict(steps)
    for number in range(rounds + 1):
        samples = draw(number)
        count = len(samples[0]) if unit == "samples" else int((samples[1][:, 1] - samples[1][:, 0] + 1).sum())
        for name in list(running) if number % 2 else list(running)[::-1]:
            if device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(device)
            synchronize(device)
            before = time.perf_counter()
            try:
                running[name](*samples)
            except torch.OutOfMemoryError:
                del running[name]
                table.add(name, mode, "out of memory", "", (1, 1, 1), config)
                continue
            synchronize(device)
            if number > 0:  # the first turn warms up and allocates the optimiser's state
                taken[name].append((time.perf_counter() - before) / count)
                if device.type == "cuda":
                    memory[name] = max(memory[name], torch.cuda.max_memory_allocated(device))
    times = Timing({name: np.array(taken[name]) for name in running})
    for name in running:
        p20, p50, p80 = (1 / value for value in times.quantiles(name))
        table.add(name, mode, "speed", f"{unit}/s", (p80, p50, p20), config)
        if memory[name]:
            table.add(name, mode, "peak memory", "GiB", (memory[name] / 2**30,) * 3, config)
    if len(running) == 2:
        slow, fast = steps
        table.add(fast, mode, "speed-up", "x", times.ratio(slow, fast), config)
        if memory[fast]:
            table.add(fast, mode, "memory saved", "x", (memory[slow] / memory[fast],) * 3, config)
    return times


class Differ(Exception):
    """Two ways to the same result that are not."""


def check(name: str, got: Tensor, expected: Tensor, allowed: float) -> None:
    error = ((got - expected).float().norm() / expected.float().norm()).item()
    print(f"{name}: patchkern and the reference style differ by {error:.3g} of the norm, allowed {allowed}", flush=True)
    if not error <= allowed:
        raise Differ(f"{name}: differ by {error:.3g}, allowed {allowed}")


def inference(table: Table, models: Models, policy: str, batch: int, rounds: int, config: dict[str, Any]) -> None:
    config = config | {"policy": policy, "batch": batch}
    few, _ = models.workload.samples(min(batch, 4), seed=99)
    chosen = POLICIES[policy]
    logits = models.patchkern_logits(few, chosen), models.reference_logits(few, chosen)
    check(f"{policy} logits", *logits, TOLERANCE[models.dtype])
    steps: dict[str, Step] = {
        "reference": lambda histories, targets: models.reference_logits(histories, chosen),
        "patchkern": lambda histories, targets: models.patchkern_logits(histories, chosen),
    }
    compare(table, "inference", steps, lambda seed: models.workload.samples(batch, seed), "samples", rounds, config)


def training(table: Table, models: Models, policy: str, batch: int, rounds: int, config: dict[str, Any]) -> None:
    config = config | {"policy": policy, "batch": batch}
    workload, chosen = models.workload, POLICIES[policy]
    few = workload.samples(min(batch, 4), seed=99)
    with torch.no_grad():
        losses = (
            patchkern_loss(models.packed, workload, *few, chosen),
            reference_loss(models.padded, workload, *few, chosen),
        )
    check(f"{policy} loss", *losses, TOLERANCE[models.dtype])
    optimizer = torch.optim.AdamW(models.packed.parameters(), lr=1e-6, fused=True)
    steps: dict[str, Step] = {
        "reference": lambda histories, targets: models.step(
            reference_loss(models.padded, workload, histories, targets, chosen), optimizer
        ),
        "patchkern": lambda histories, targets: models.step(
            patchkern_loss(models.packed, workload, histories, targets, chosen), optimizer
        ),
    }
    compare(table, "training", steps, lambda seed: workload.samples(batch, seed), "samples", rounds, config)
    optimizer.zero_grad()  # of a step that ran out of memory


def passes(
    table: Table, models: Models, policy: str, users: int, rows_per_pass: int, rounds: int, config: dict[str, Any]
) -> None:
    config = config | {"policy": policy, "batch": users, "rows_per_pass": rows_per_pass}
    workload = models.workload
    chosen: Any = POLICIES[policy]
    # equal only where no history is cut: a trunk begins at a border of blocks
    few, uncut = whole_users(workload, 2, seed=99, most_items=20), replace(chosen, max_items=None)
    with torch.no_grad():
        one, every = (
            torch.stack(list(PASSES[way](models.packed, workload, *few, uncut, rows_per_pass=rows_per_pass))).sum()
            for way in WAYS["all"]
        )
    check(f"{policy} passes", every, one, TOLERANCE[models.dtype])
    optimizer = torch.optim.AdamW(models.packed.parameters(), lr=1e-6, fused=True)

    def learn(way: str, histories: pk.Histories, ranges: np.ndarray) -> Tensor:
        losses = PASSES[way](models.packed, workload, histories, ranges, chosen, rows_per_pass=rows_per_pass)
        return torch.stack([models.step(loss, optimizer) for loss in losses])

    steps: dict[str, Step] = {way: functools.partial(learn, way) for way in WAYS["all"]}
    times = compare(table, "passes", steps, lambda seed: whole_users(workload, users, seed), "targets", rounds, config)
    # every row goes through the layers, every label through the embedding once more
    hf_model: Any = models.packed.hf_model
    weights = sum(parameter.numel() for parameter in hf_model.model.layers.parameters())
    head = hf_model.get_input_embeddings().weight.numel()
    labels = workload.catalog.lengths[workload.catalog.index_of(workload.histories.items)].mean()
    labels += len(workload.prompt.response_end)
    for way, rows in rows_per_target(workload, chosen).items():
        table.add(way, "passes", "rows per target, all users", "rows", (rows,) * 3, config)
        operations = 6 * STAGE_SAMPLES * (rows * weights + labels * head) / 1e15
        table.add(way, "passes", "arithmetic of a stage", "PFLOP", (operations,) * 3, config)
    for way in times.seconds:
        hours = [STAGE_SAMPLES * seconds / 3600 for seconds in times.quantiles(way)]
        table.add(way, "passes", "projected stage", "hours", (hours[0], hours[1], hours[2]), config)
    optimizer.zero_grad()  # of a step that ran out of memory


# ------------------------------------------------------------------ the run

PARTS = ("share", "inference", "training", "passes")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.2-1b")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=["text", "items", "sessions"])
    parser.add_argument("--batches", type=int, nargs="+", default=[64], help="of the share and of inference")
    parser.add_argument("--training_batches", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--users", type=int, default=4, help="of a round of passes")
    parser.add_argument("--rows_per_pass", type=int, default=16_384)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=7, help="of inference, training and passes")
    parser.add_argument("--seconds", type=float, default=3.0, help="spent on each share")
    output.add_option(parser, "end_to_end.csv")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("bench_end_to_end: nothing was run, torch sees no CUDA device on this machine")
        return
    table = Table(output.prepare(args.output, "end_to_end.csv"))
    workload = ml1m()
    models = Models(args.shape, getattr(torch, args.dtype), device, workload)
    config = {"data": workload.name, "shape": args.shape, "dtype": args.dtype, "device": device.type}
    failures: list[str] = []
    for part, policy in itertools.product([part for part in PARTS if part in args.parts], args.policies):
        for batch in {"training": args.training_batches, "passes": [args.users]}.get(part, args.batches):
            try:
                if part == "share":
                    share(table, models, policy, batch, args.seconds, config)
                elif part == "passes":
                    passes(table, models, policy, batch, args.rows_per_pass, args.rounds, config)
                else:
                    measured = inference if part == "inference" else training
                    measured(table, models, policy, batch, args.rounds, config)
            except Differ as error:
                failures.append(str(error))
            table.write()
    if failures:
        sys.exit("\n".join(["not timed:", *failures]))


if __name__ == "__main__":
    main()
