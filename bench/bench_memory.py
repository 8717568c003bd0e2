# SPDX-License-Identifier: Apache-2.0
"""Predicted memory against measured: of training steps, and of searches within a budget.

    python bench/bench_memory.py --device cuda             # Llama-3.2-1B's shape, random weights: a minute on 16 cores
    python bench/bench_memory.py --shape small --rows 512 --users 8 --budgets 2GiB

"training": steps of the given rows per pass, and of a quarter of them, under bfloat16 autocast of float32 weights, with
the optimiser's state there: what `plan_training` says from the configuration alone, beside what torch allocated at
most, and on CUDA what its allocator had reserved. Predictions take seconds each, made by other processes meanwhile.
"search": whole histories of random users with a `memory_budget`, beside what `plan_memory` says and the budget itself.

A case that runs out of memory says so in the table. Predictions below what was measured fail the script in the end.
"""

from __future__ import annotations

import argparse
import functools
import gc
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PretrainedConfig

sys.path.append(str(Path(__file__).resolve().parents[1]))  # an installed patchkern comes first

import patchkern as pk
from bench import output
from bench.bench_end_to_end import SHAPES, make_model
from bench.timing import Table, synchronize
from bench.workloads import Workload, ml1m
from patchkern.budget.live_bytes import peak_memory
from patchkern.budget.search import SearchCost, parse_bytes
from patchkern.search.batching import size_of_beams
from patchkern.search.item_search import size_of_items
from patchkern.search.trie import Trie

PARTS = ("training", "search")
RANK = 16
WIDTH = 20  # beams, and items recommended


class Case(NamedTuple):
    """How to train: ``share`` of the rows per pass, all targets of a user in it or a sample for each."""

    share: float = 1.0
    checkpointing: bool = False
    lora: bool = False
    head: str = "titles"
    branches: bool = True

    def __str__(self) -> str:
        words = [f"LoRA of rank {RANK}" if self.lora else "all parameters", self.head]
        return ", ".join(words + ["checkpointing"] * self.checkpointing + ["samples"] * (not self.branches))


# those of one model together: the model is made once for them
CASES = (
    Case(0.25),
    Case(),
    Case(checkpointing=True),
    Case(branches=False),
    Case(head="items"),
    Case(head="items", checkpointing=True),
    Case(0.25, lora=True),
    Case(lora=True),
    Case(lora=True, checkpointing=True),
)


# ------------------------------------------------------------------ training


def layout_of(case: Case, workload: Workload, rows: int) -> pk.PatchLayout:
    """Random users, as many as fit into the rows."""
    policy = pk.TextOnly(None) if case.head == "titles" else pk.ItemPatches(0, None)
    catalog, prompt = workload.catalog, workload.prompt
    if not case.branches:
        histories, targets = workload.samples(rows)
        answers = catalog.lengths[catalog.index_of(targets)] + len(prompt.response_end)
        chosen = fitting(pk.row_counts(catalog, histories, policy, prompt) + answers, rows)
        return pk.build_layout(catalog, histories.take(chosen), policy, prompt, targets[chosen])
    lengths = workload.histories.lengths
    users = np.random.default_rng(0).choice(np.flatnonzero(lengths > 3), min(500, int((lengths > 3).sum())), False)
    histories = workload.histories.take(users)
    ranges = np.stack([np.full(users.size, 3), histories.lengths - 1], axis=1)
    chosen = fitting(pk.training_rows(catalog, histories, policy, prompt, ranges, head=case.head), rows)
    return pk.build_training_layout(catalog, histories.take(chosen), policy, prompt, ranges[chosen], head=case.head)


def fitting(counts: np.ndarray, rows: int) -> np.ndarray:
    """Numbers of those that fit, one after the other."""
    chosen, left = [], rows
    for number, count in enumerate(counts.tolist()):
        if count <= left:
            chosen.append(number)
            left -= count
    if not chosen:
        sys.exit(f"--rows: expected room for some user, of whom the shortest has {counts.min()} rows, got {rows}")
    return np.array(chosen)


def predict(case: Case, config: PretrainedConfig, device: str, n_items: int, shape: dict[str, Any]) -> int:
    """Bytes; of a layout's ``shape`` as `planned_shape` has it."""
    plan = pk.plan_training(
        config,
        autocast=torch.bfloat16,
        lora=RANK if case.lora else None,
        checkpointing=case.checkpointing,
        head=case.head,
        n_items=n_items if case.head != "titles" else None,
        device=device,
        **shape,
    )
    return plan.peak


def planned_shape(layout: pk.PatchLayout) -> dict[str, Any]:
    """What `plan_training` asks of a pass."""
    return {
        "rows_per_pass": layout.num_rows,
        "logit_rows": None if layout.logit_labels is None else len(layout.logit_labels) or None,
        "item_rows": None if layout.item_labels is None else len(layout.item_labels),
        "prefixes": layout.prefix is not None,
        "longest": layout.max_seqlen + layout.max_prefix,
    }


def model_for(case: Case, args: argparse.Namespace, workload: Workload) -> pk.PatchedCausalLM:
    torch.manual_seed(0)
    with torch.device(args.device):
        inner = make_model(args.shape, torch.float32)
        if case.lora:
            inner = get_peft_model(inner, LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM"))
    return pk.PatchedCausalLM(inner, workload.catalog, workload.prompt, item_head=case.head != "titles").train()


def measured_step(model: pk.PatchedCausalLM, layout: pk.PatchLayout) -> tuple[int, int, float]:
    """Bytes allocated at most, bytes reserved, 0 on the CPU, and seconds: of the last of three steps."""
    device = model.device
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    for last in (False, False, True):
        before = resident(model, optimizer)
        watched: Any = peak_memory(device) if last else nullcontext()
        started = time.perf_counter()
        with watched as peak:
            with torch.autocast(device.type, torch.bfloat16):
                loss = model(layout).loss
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            del loss
        synchronize(device)
    seconds = time.perf_counter() - started
    return before + peak.bytes, reserved(device), seconds


def resident(model: pk.PatchedCausalLM, optimizer: torch.optim.Optimizer | None = None) -> int:
    """Bytes that are there before anything is computed; on CUDA with whatever else is allocated."""
    if model.device.type == "cuda":
        return torch.cuda.memory_allocated(model.device)
    state = () if optimizer is None else optimizer.state.values()
    tensors = [*model.parameters(), *model.buffers(), *(x for of_one in state for x in of_one.values())]
    return sum(tensor.nbytes for tensor in tensors)


def reserved(device: torch.device) -> int:
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else 0


def clear(device: str) -> None:
    gc.collect()  # a model is a cycle
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()


def training(table: Table, args: argparse.Namespace, workload: Workload) -> list[str]:
    layouts = [layout_of(case, workload, int(case.share * args.rows)) for case in CASES]
    with torch.device("meta"):
        config = make_model(args.shape, torch.float32).config
    foretell = functools.partial(predict, config=config, device=args.device, n_items=len(workload.catalog))
    arguments = [(case, planned_shape(layout)) for case, layout in zip(CASES, layouts, strict=True)]
    if args.workers == 1:
        return train_all(table, args, workload, layouts, [foretell(case, shape=shape) for case, shape in arguments])
    with ProcessPoolExecutor(args.workers, multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(foretell, case, shape=shape) for case, shape in arguments]
        return train_all(table, args, workload, layouts, futures)


def train_all(
    table: Table,
    args: argparse.Namespace,
    workload: Workload,
    layouts: list[pk.PatchLayout],
    predictions: Sequence[int | Future[int]],
) -> list[str]:
    """Those predictions that were too low."""
    found: list[tuple[str, dict[str, Any], int | None]] = []
    model: Any = None
    for number, (case, layout) in enumerate(zip(CASES, layouts, strict=True)):
        if number == 0 or (case.lora, case.head) != (CASES[number - 1].lora, CASES[number - 1].head):
            model = None
            clear(args.device)
            model = model_for(case, args, workload)
        model.activation_checkpointing_enable() if case.checkpointing else model.activation_checkpointing_disable()
        name = f"{case}, {layout.num_rows} rows"
        config = {"shape": args.shape, "head": case.head, "device": args.device} | planned_shape(layout)
        try:
            measured = measured_step(model, layout.to(model.device))
        except torch.OutOfMemoryError:
            table.add(name, "training", "out of memory", "", (1, 1, 1), config)
            found.append((name, config, None))
        else:
            report(table, name, "training", measured, config)
            found.append((name, config, measured[0]))
        model.zero_grad()
        clear(args.device)
    table.write()
    low = []
    for (name, config, allocated), prediction in zip(found, predictions, strict=True):
        predicted = prediction.result() if isinstance(prediction, Future) else prediction
        low += compare(table, name, "training", predicted, allocated, config)
    return low


def report(table: Table, provider: str, mode: str, measured: tuple[int, int, float], config: dict[str, Any]) -> None:
    allocated, kept, seconds = measured
    table.add(provider, mode, "measured", "GiB", (allocated / 2**30,) * 3, config)
    if kept:
        table.add(provider, mode, "reserved / measured", "ratio", (kept / allocated,) * 3, config)
    table.add(provider, mode, "time", "s", (seconds,) * 3, config)


def compare(
    table: Table, provider: str, mode: str, predicted: int, allocated: int | None, config: dict[str, Any]
) -> list[str]:
    table.add(provider, mode, "predicted", "GiB", (predicted / 2**30,) * 3, config)
    if allocated is None:
        return []
    ratio = predicted / allocated
    table.add(provider, mode, "predicted / measured", "ratio", (ratio,) * 3, config)
    return [] if ratio >= 1 else [f"{provider}, {mode}: {ratio:.4f} of what was measured"]


# ------------------------------------------------------------------ search


def search(table: Table, args: argparse.Namespace, workload: Workload) -> list[str]:
    torch.manual_seed(0)
    with torch.device(args.device):
        inner = make_model(args.shape, torch.bfloat16)
    model = pk.PatchedCausalLM(inner.eval(), workload.catalog, workload.prompt, item_head=True)
    users = np.random.default_rng(0).choice(len(workload.histories), args.users, replace=False)
    histories, policy = workload.histories.take(users), pk.TextOnly(None)
    counts = pk.row_counts(model.catalog, histories, policy, model.prompt)
    trie = Trie.from_catalog(model.catalog, model.prompt.response_end)
    sizes = {"beam": size_of_beams(trie, WIDTH), "items": size_of_items(model, None, None)}
    low = []
    for kind, size in sizes.items():
        recommend = functools.partial(model.recommend, policy=policy, k=WIDTH, num_beams=WIDTH, search=kind)
        recommend(histories.take([0]))  # compiles, and starts libraries
        cost = SearchCost(model, size)
        for budget in args.budgets:
            allowed = parse_bytes("--budgets", budget)
            plan = cost.plan(counts, allowed, args.users)
            clear(args.device)
            before = resident(model) if model.device.type == "cuda" else cost.weights
            started = time.perf_counter()
            with peak_memory(model.device) as peak:
                recommend(histories, memory_budget=allowed, batch_size=args.users)
            measured = before + peak.bytes, reserved(model.device), time.perf_counter() - started
            config = {"shape": args.shape, "budget": budget, "device": args.device, "batches": len(plan.batches)}
            config |= {"users": args.users, "rows": int(counts.sum()), "policy": str(policy)}
            name = f"{kind}, {budget}"
            report(table, name, "search", measured, config)
            low += compare(table, name, "search", plan.peak, measured[0], config)
            table.add(name, "search", "measured / budget", "ratio", (measured[0] / allowed,) * 3, config)
    return low


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.2-1b")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rows", type=int, default=8192, help="of a training pass (default: %(default)s)")
    parser.add_argument("--users", type=int, default=128, help="of a search (default: %(default)s)")
    parser.add_argument("--budgets", nargs="+", default=["6GiB", "12GiB"], help="of a search")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that predict; 1: this one")
    output.add_option(parser, "memory.csv")
    args = parser.parse_args(argv)
    table = Table(output.prepare(args.output, "memory.csv"))
    workload, low = ml1m(), []
    for part in args.parts:
        low += {"training": training, "search": search}[part](table, args, workload)
        table.write()
        clear(args.device)
    if low:
        sys.exit("\n".join(["predicted too low:", *low]))


if __name__ == "__main__":
    main()
