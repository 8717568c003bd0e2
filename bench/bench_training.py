# SPDX-License-Identifier: Apache-2.0
"""One optimisation step, written the obvious way and with patchkern: samples per second and peak memory.

    python bench/bench_training.py                      # ml-1m and the Llama-3 tokenizer if at hand, else a stand-in
    python bench/bench_training.py --policies items --rounds 3
    python bench/bench_training.py --hidden_size 512 --layers 16 --batch_size 4 --name training-deep

"reference" is what a training script does without patchkern: a Python loop embeds item by item and pools the old ones,
the sequences are padded on the right, and the model computes all logits under an attention mask and a cross-entropy.
"patchkern" plans the batch (inside the timed step), pools it in one pass and computes logits where there is a label.
Same weights, same samples, same AdamW.

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
import multiprocessing
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import patchkern as pk
from bench.timing import Table, Timing
from bench.workloads import POLICIES, VOCABULARY, Workload, ml1m
from patchkern.policies import Level

PROVIDERS = ("reference", "patchkern")
# The largest powers of two with which the reference step stays below 8 GiB.
BATCH_SIZES = {"text": 8, "items": 16, "sessions": 32}
TOLERANCE = 1e-4


# ------------------------------------------------------------------ the two ways to a loss


def reference_batch(
    model: LlamaForCausalLM,
    workload: Workload,
    histories: pk.Histories,
    targets: np.ndarray | None,
    policy: pk.Policy,
) -> tuple[Tensor, Tensor, Tensor]:
    """Item by item, padded on the right: embeddings (B, L, D), attention mask (B, L) and labels (B, L)."""
    catalog, prompt = workload.catalog, workload.prompt
    device = model.device
    kept = histories.latest(policy.max_items)
    levels = policy.levels(kept)
    titles = [[catalog.tokens(item).tolist() for item in catalog.index_of(history).tolist()] for history in kept]
    responses: list[list[int]] = [[] for _ in range(len(kept))]
    if targets is not None:
        answers_of = catalog.index_of(targets).tolist()
        responses = [[*catalog.tokens(item).tolist(), *prompt.response_end] for item in answers_of]

    # One look-up per batch: one per title would make the backward pass a dense (V, D) gradient for each of them.
    runs: list[Sequence[int]] = [prompt.prefix, prompt.separator, prompt.suffix]
    runs += [title for history in titles for title in history] + responses
    ids = torch.tensor([token for run in runs for token in run], device=device)
    embedded = iter(model.get_input_embeddings()(ids).split([len(run) for run in runs]))
    prefix, separator, suffix = next(embedded), next(embedded), next(embedded)
    rows = [[next(embedded) for _ in history] for history in titles]
    answers = [next(embedded) for _ in responses]

    sequences, labels = [], []
    for user, history in enumerate(rows):
        level = levels[kept.offsets[user] : kept.offsets[user + 1]]
        parts = [prefix]
        session: list[Tensor] = []
        for i, title in enumerate(history):
            last = i + 1 == len(history)
            if level[i] == Level.TEXT:
                parts.append(title)
            else:
                session.append(title.mean(dim=0))
                if not last and level[i + 1] == Level.JOIN:
                    continue
                parts.append(torch.stack(session).mean(dim=0, keepdim=True))
                session = []
            if not last:
                parts.append(separator)
        sequences.append(torch.cat([*parts, suffix, answers[user]]))
        unlabelled = len(sequences[-1]) - len(responses[user])
        labels.append(torch.tensor([-100] * unlabelled + responses[user]))
    inputs = nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    wanted = nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    mask = (torch.arange(inputs.shape[1]) < lengths[:, None]).long()
    return inputs, mask.to(device), wanted.to(device)


def reference_loss(
    model: LlamaForCausalLM,
    workload: Workload,
    histories: pk.Histories,
    targets: np.ndarray,
    policy: pk.Policy,
) -> Tensor:
    """Padded, and all logits."""
    inputs, mask, wanted = reference_batch(model, workload, histories, targets, policy)
    logits = model(inputs_embeds=inputs, attention_mask=mask, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), wanted[:, 1:].flatten(), ignore_index=-100)


def patchkern_loss(
    model: pk.PatchedCausalLM,
    workload: Workload,
    histories: pk.Histories,
    targets: np.ndarray,
    policy: pk.Policy,
) -> Tensor:
    return model(pk.build_layout(workload.catalog, histories, policy, workload.prompt, targets)).loss


# ------------------------------------------------------------------ a provider in its own process


def make_model(hidden_size: int, layers: int, vocabulary: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden_size // 64),
        num_key_value_heads=max(1, hidden_size // 256),
        max_position_embeddings=131_072,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def work(pipe: Connection, provider: str, args: argparse.Namespace, policy: pk.Policy) -> None:
    """Answer each batch number with what its step took: wall seconds, processor seconds, loss, gradient norm."""
    torch.set_num_threads(args.threads)
    workload = ml1m()
    before = resident()
    hf_model = make_model(args.hidden_size, args.layers, VOCABULARY)
    model: Any = hf_model
    if provider == "patchkern":
        model = pk.PatchedCausalLM(hf_model, workload.catalog, workload.prompt)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    loss_of = patchkern_loss if provider == "patchkern" else reference_loss
    pipe.send("ready")
    for number in iter(pipe.recv, None):
        batch = workload.samples(args.batch_size, seed=number)
        wall, processor = time.perf_counter(), time.process_time()
        loss = loss_of(model, workload, *batch, policy)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        optimizer.step()
        optimizer.zero_grad()
        pipe.send((time.perf_counter() - wall, time.process_time() - processor, loss.item(), norm.item()))
    pipe.send(resident("VmHWM") - before)


def resident(field: str = "VmRSS") -> int:
    """Bytes this process holds; ``"VmHWM"``: at most held."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def compare(args: argparse.Namespace, policy: pk.Policy) -> tuple[Timing, Timing, dict[str, int]]:
    """Wall seconds, processor seconds and peak memory of both providers.

    Raises:
        RuntimeError: losses or gradient norms of the two differ.
    """
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for provider in PROVIDERS:
        pipes[provider], end = context.Pipe()
        processes.append(context.Process(target=work, args=(end, provider, args, policy), daemon=True))
        processes[-1].start()
        end.close()
    for pipe in pipes.values():
        pipe.recv()
    turns: dict[str, list[tuple[float, ...]]] = {provider: [] for provider in PROVIDERS}
    for number in range(args.rounds + 1):
        for provider in PROVIDERS if number % 2 else PROVIDERS[::-1]:
            pipes[provider].send(number)
            turns[provider].append(pipes[provider].recv())
        expected, got = turns["reference"][-1][2:], turns["patchkern"][-1][2:]
        if not np.allclose(got, expected, rtol=TOLERANCE, atol=0):
            raise RuntimeError(f"step {number}: expected loss and gradient norm {expected}, got {got} with patchkern")
    memory = {}
    for provider, process in zip(PROVIDERS, processes, strict=True):
        pipes[provider].send(None)
        memory[provider] = pipes[provider].recv()
        process.join()
    wall, processor = (
        # The first step warms up and allocates the optimiser's state.
        Timing({provider: np.array([turn[column] for turn in turns[provider][1:]]) for provider in PROVIDERS})
        for column in (0, 1)
    )
    return wall, processor, memory


# ------------------------------------------------------------------ the table


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policies", nargs="+", choices=BATCH_SIZES, default=list(BATCH_SIZES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch_size", type=int, help=f"default: {BATCH_SIZES}")
    parser.add_argument("--hidden_size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--name", default="training", help="of the CSV under bench/results (default: %(default)s)")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)

    table = Table(args.name)
    data = ml1m().name
    sizes = BATCH_SIZES if args.batch_size is None else dict.fromkeys(BATCH_SIZES, args.batch_size)
    for mode in args.policies:
        args.batch_size = sizes[mode]
        config = {"data": data, "policy": str(POLICIES[mode]), "vocabulary": VOCABULARY, "dtype": "float32"}
        config |= {name: getattr(args, name) for name in ("batch_size", "hidden_size", "layers", "rounds")}
        wall, processor, memory = compare(args, POLICIES[mode])
        for provider in PROVIDERS:
            p20, p50, p80 = (args.batch_size / seconds for seconds in wall.quantiles(provider))
            table.add(provider, mode, "speed", "samples/s", (p80, p50, p20), config)
            table.add(provider, mode, "processor time", "s/step", processor.quantiles(provider), config)
            gibibytes = memory[provider] / 2**30
            table.add(provider, mode, "peak memory", "GiB", (gibibytes,) * 3, config)
        saved = memory["reference"] / memory["patchkern"]
        table.add("patchkern", mode, "speed-up", "x", wall.ratio("reference", "patchkern"), config)
        table.add("patchkern", mode, "processor speed-up", "x", processor.ratio("reference", "patchkern"), config)
        table.add("patchkern", mode, "memory saved", "x", (saved,) * 3, config)
    table.write()


if __name__ == "__main__":
    main()
