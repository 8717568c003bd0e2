# SPDX-License-Identifier: Apache-2.0
"""Whole histories of the users with the most interactions, in a given memory: as text, as item and session patches.

    python recipes/long_history.py --users 4 --budget 1GiB                       # synthetic users, a minute on a CPU
    python recipes/long_history.py --data ml-1m --budget 2GiB                    # all of its 58 users, minutes
    python recipes/long_history.py --data ml-1m --tokenizer Llama-3.2-1B         # a GPU: that model's shape, 40 GiB

Section 4.6 of the PatchRec paper: users with more than 500 interactions, none of which is cut off. The models of these
commands have random weights, for which time and memory are nearly those of trained ones. With a trained one, here from
recipes/train.py, HR@k is reported too, at equal memory: histories that do not fit are then cut to the most of their
latest items that do, policy by policy. Counted are these users' targets in the test split.

    python recipes/long_history.py --data ml-1m --checkpoint runs/items --budget 10MiB      # a tiny model
    python recipes/long_history.py --checkpoint runs/items --min_items 120 --budget 6MiB    # trained on synthetic data

The budget is for everything that torch allocates. On a GPU the process may not take more, on the CPU it is what the
plan is made for. The memory that was then in use is measured: on a GPU in the timed run, on the CPU, where that takes
time, in another run of the batch that needs most. The table is printed and written to long_history.csv in --output,
with a plot.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

sys.path.append(str(Path(__file__).resolve().parents[1]))  # an installed patchkern comes first

import patchkern as pk
from patchkern.budget.search import parse_bytes
from patchkern.data import Interactions
from patchkern.data.preparation import add_arguments, load
from patchkern.models.scratch import LLAMA_1B, SIZES, fit_tokenizer, scratch_model, scratch_prompt
from patchkern.models.sources import locate, read_tokenizer
from patchkern.ops.backends import describe as describe_backend
from patchkern.ops.backends import usable_device
from patchkern.search.protocol import usual_head
from patchkern.training import find_model
from recipes import models
from recipes.commands import Parser, check_writable
from recipes.long_history_report import NAMES, mebibytes, plot, table, write_csv
from recipes.long_history_results import POLICIES, Result, accuracy, measure
from recipes.training_run import read_arguments


def main(argv: Sequence[str] | None = None) -> list[Result]:
    args = parse(argv)
    device = usable_device(args.device, "--device")
    folder = Path(args.output)
    check_writable(folder / "long_history.csv", "--output")
    data = load_data(args)
    users = long_users(data, args)
    histories = data.histories.take(users)
    model = load_model(args, data, device)
    if device.type == "cuda":
        cap(args.budget, model.device)

    parameters = sum(parameter.numel() for parameter in model.parameters())
    weights = "random weights" if args.checkpoint is None else args.checkpoint
    say(f"patchkern {pk.__version__}, torch {torch.__version__}, transformers {transformers.__version__}")
    say(f"BACKEND {describe_backend(device, model.hf_model.dtype)}")
    say(f"{data}\n{parameters / 1e6:,.1f} M parameters, {args.dtype}, {weights}")
    say(f"{len(histories)} users with {histories.lengths.mean():.1f} items, budget {mebibytes(args.budget)} MiB\n")

    results = []
    for name in args.policies:
        result = measure(model, histories, name, args)
        if args.checkpoint is not None:
            result = replace(result, accuracy=accuracy(model, data, users, POLICIES[name], args))
        say(f"{NAMES[name]}: {result.seconds:.2f} s")
        results.append(result)
    say("\n" + "\n".join(table(results, args.k)))
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(folder / "long_history.csv", results, data, args)
    plot(folder / "long_history.png", results, args)
    say(f"\nlongest history: of these users' items, until {' or '.join(sorted({r.limit for r in results}))} end")
    say(f"written: {folder / 'long_history.csv'}, {folder / 'long_history.png'}")
    return results


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    parser = Parser(description=__doc__)
    add_arguments(parser, default="synthetic", item_text=True)
    parser.add_argument("--min_items", type=int, default=500, help="users with more interactions than this")
    parser.add_argument("--users", type=int, help="the first so many of them")
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=list(POLICIES))
    parser.add_argument("--budget", default="40GiB", help="for everything that torch allocates (%(default)s)")
    parser.add_argument("--k", type=int, default=20, help="items recommended")
    parser.add_argument("--num_beams", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=1, help="of the timed run; the median counts")
    model = parser.add_argument_group("model")
    model.add_argument("--checkpoint", help="a run of recipes/train.py that learned titles, or one of its checkpoints")
    model.add_argument("--shape", choices=[*SIZES, "1b"], help="with random weights (default: small, on a GPU 1b)")
    model.add_argument(
        "--tokenizer", help="of random weights: a folder, or a hub id (default: one is fitted on the titles)"
    )
    model.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16" if on_gpu else "float32")
    model.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--output", default="runs/long_history", help="a folder")
    args = parser.parse_args(argv)
    for name in ("users", "repeats", "k"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name}: expected at least 1, got {value}")
    if args.checkpoint is None:
        if args.item_text is not None:
            parser.error("--item_text: expected only with --checkpoint, as random weights read titles")
        args.shape = args.shape or ("1b" if on_gpu else "small")
    else:
        for name in ("shape", "tokenizer"):
            if getattr(args, name) is not None:
                parser.error(f"--{name}: expected none with --checkpoint, which has its own, got {getattr(args, name)}")
        if args.item_text is None:
            args.item_text = read_arguments(Path(args.checkpoint)).get("item_text")
    args.budget = parse_bytes("--budget", args.budget)
    args.policies = list(dict.fromkeys(args.policies))
    if args.num_beams < args.k:
        parser.error(
            f"--num_beams: expected at least k={args.k}, or lists are too short to count, got {args.num_beams}"
        )
    return args


def load_data(args: argparse.Namespace) -> Interactions:
    if args.checkpoint is not None:
        return load(args)  # synthetic users are then those that the other recipes train on
    return load(args, num_users=40, num_items=2000, mean_length=900.0)


def long_users(data: Interactions, args: argparse.Namespace) -> NDArray[np.int64]:
    lengths = data.histories.lengths
    users: NDArray[np.int64] = np.flatnonzero(lengths > args.min_items)[: args.users]
    if not users.size:
        raise ValueError(
            f"--min_items: expected fewer than some user's interactions, got {args.min_items} for data whose longest "
            f"history has {lengths.max(initial=0)}"
        )
    if args.checkpoint is not None and not np.isin(users, data.samples("test").users).any():
        raise ValueError(f"--users: expected some with targets in the test split, got none among {users.size}")
    return users


def load_model(args: argparse.Namespace, data: Interactions, device: torch.device) -> pk.PatchedCausalLM:
    dtype = getattr(torch, args.dtype)
    if args.checkpoint is not None:
        return load_checkpoint(args.checkpoint, data, dtype).to(device)
    tokenizer: Any
    if args.tokenizer is None:
        tokenizer = fit_tokenizer(data.titles.values(), 4096)
    else:
        tokenizer = read_tokenizer(locate(args.tokenizer, "--tokenizer"))
    if tokenizer.chat_template and data.system and data.instruction:
        prompt = pk.Prompt.from_chat_template(tokenizer, data.system, data.instruction)
    else:
        prompt = scratch_prompt(tokenizer)
    fields: dict[str, Any] = {}
    if args.shape == "1b":
        fields = LLAMA_1B | {"vocab_size": max(LLAMA_1B["vocab_size"], len(tokenizer))}
    with device:
        hf_model = scratch_model(tokenizer, "small" if fields else args.shape, **fields).to(dtype)
    return pk.PatchedCausalLM(hf_model, pk.Catalog.from_titles(data.titles, tokenizer), prompt)


def load_checkpoint(name: str, data: Interactions, dtype: torch.dtype) -> pk.PatchedCausalLM:
    """A model that learned titles; of one with a memory what is inside, as no policy here makes memories."""
    folder = find_model(name, "--checkpoint")
    model, _ = models.load_model(str(folder), data.titles, texts=data.texts, dtype=dtype, argument="--checkpoint")
    if usual_head(model) == "items":
        raise ValueError(f"--checkpoint: expected a run that learned titles, which are searched, got {name!r}")
    inner: Any = model.model if isinstance(model, pk.RecurrentMemory) else model
    found: pk.PatchedCausalLM = inner
    return found


def cap(budget: int, device: torch.device) -> None:
    """Make allocations beyond the budget fail, whatever the GPU has."""
    torch.cuda.empty_cache()  # of what was needed to make the model
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, budget / total), device)


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    main()
