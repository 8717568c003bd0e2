# SPDX-License-Identifier: Apache-2.0
"""Single steps in each of two processes, without a trainer: data parallel, and sharded with FSDP2."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import patchkern as pk
from patchkern.models.patched_lm import PatchedCausalLM

WORLD = 2
VOCABULARY = 60
PROMPT = pk.Prompt(prefix=[3, 4], separator=[5], suffix=[6], response_end=[2])
TITLES = [np.random.default_rng(i).integers(9, VOCABULARY, 1 + i % 4).tolist() for i in range(30)]
CATALOG = pk.Catalog.from_token_ids(np.concatenate(TITLES), np.cumsum([0, *map(len, TITLES)]))
LENGTHS = [14, 3, 0, 9, 20, 1]  # three users per process, of different sizes


def make_model(tied: bool, item_head: bool = False) -> PatchedCausalLM:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    hf_model = transformers.LlamaForCausalLM(config)
    dropped = 0.4 if item_head else 0.0
    model = PatchedCausalLM(
        hf_model, CATALOG, PROMPT, item_embeddings=True, item_head=item_head, vector_dropout=dropped
    ).train()
    with torch.no_grad():
        model.item_embedding.normal_(std=0.02)
        if item_head:
            for parameter in model.item_head.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def make_layout(users: slice, head: str = "titles") -> pk.PatchLayout:
    draw = np.random.default_rng(0)
    histories = [draw.integers(0, len(TITLES), n).tolist() for n in LENGTHS]
    targets = draw.integers(0, len(TITLES), len(LENGTHS)).tolist()
    return pk.build_layout(CATALOG, histories[users], pk.SessionPatches(3), PROMPT, targets[users], head=head)


def supervised(head: str) -> Tensor | int:
    """Tokens, or items, of all users; both for both heads."""
    layout = make_layout(slice(None), head)
    tokens, items = (0 if x is None else x.numel() for x in (layout.logit_labels, layout.item_labels))
    return torch.tensor([tokens, items]) if head == "both" else tokens + items


# ------------------------------------------------------------------ what runs in each process


def whole(parameter: Tensor | None) -> Tensor | None:
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def step(module: nn.Module, rank: int, head: str = "titles") -> dict[str, Any]:
    """One training step on this process's users, by the convention of `transformers.Trainer`."""
    users = slice(rank * 3, rank * 3 + 3)
    torch.manual_seed(7)  # of the items whose vectors are dropped
    loss = module(make_layout(users, head), num_items_in_batch=supervised(head)).loss * WORLD
    loss.backward()
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    inner = module.module if isinstance(module, DistributedDataParallel) else module
    return {
        "loss": mean / WORLD,
        "gradients": {name: whole(parameter.grad) for name, parameter in inner.named_parameters()},
    }


def data_parallel(rank: int, folder: Path) -> dict[str, Any]:
    return step(DistributedDataParallel(make_model(tied=True)), rank)


def make_passes() -> list[pk.PatchLayout]:
    """Two passes for each process, all targets of some users in each: of different rows and counts of targets."""
    draw = np.random.default_rng(1)
    passes = []
    for lengths in ([14, 3], [9], [20, 6, 5], [4]):
        histories = [draw.integers(0, len(TITLES), n).tolist() for n in lengths]
        ranges = [[2, n - 1] for n in lengths]
        passes.append(pk.build_training_layout(CATALOG, histories, pk.ItemPatches(2), PROMPT, ranges))
    return passes


def accumulated_passes(rank: int, folder: Path) -> dict[str, Any]:
    """The two passes of this process in one step; only the second exchanges gradients."""
    passes = make_passes()
    total = sum(layout.logit_labels.numel() for layout in passes)
    module = DistributedDataParallel(make_model(tied=True))
    mean = torch.zeros(())
    for nth in range(2):
        with nullcontext() if nth else module.no_sync():
            loss = module(passes[rank + WORLD * nth], num_items_in_batch=total).loss * WORLD
            loss.backward()
        mean += loss.detach()
    dist.all_reduce(mean)
    gradients = {name: parameter.grad for name, parameter in module.module.named_parameters()}
    return {"loss": mean / WORLD, "gradients": gradients}


def data_parallel_items(rank: int, folder: Path) -> dict[str, Any]:
    return step(DistributedDataParallel(make_model(tied=False, item_head=True)), rank, "items")


def data_parallel_both(rank: int, folder: Path) -> dict[str, Any]:
    return step(DistributedDataParallel(make_model(tied=True, item_head=True)), rank, "both")


def sharded(tied: bool, apart: bool, item_head: bool = False) -> PatchedCausalLM:
    model = make_model(tied, item_head)
    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in model.hf_model.model.layers:
        fully_shard(layer, mesh=mesh)
    if apart:
        fully_shard(model.get_input_embeddings(), mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def layers_and_root(rank: int, folder: Path) -> dict[str, Any]:
    return step(sharded(tied=True, apart=False), rank)


def embedding_apart(rank: int, folder: Path) -> dict[str, Any]:
    return step(sharded(tied=False, apart=True), rank)


def sharded_items(rank: int, folder: Path) -> dict[str, Any]:
    return step(sharded(tied=True, apart=False, item_head=True), rank, "items")


def sharded_both(rank: int, folder: Path) -> dict[str, Any]:
    return step(sharded(tied=False, apart=True, item_head=True), rank, "both")


def saving(rank: int, folder: Path) -> dict[str, Any]:
    model = sharded(tied=True, apart=False)
    try:
        model.save_pretrained(folder / "sharded")
        message = None
    except ValueError as error:
        message = str(error)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options)
    model.save_pretrained(folder / "gathered", state_dict=state, is_main_process=rank == 0)
    dist.barrier()
    return {"message": message, "folders": sorted(path.name for path in folder.iterdir() if path.is_dir())}


def wrong_root(rank: int, folder: Path) -> dict[str, Any]:
    model = make_model(tied=True)
    fully_shard(model.hf_model, mesh=init_device_mesh("cpu", (WORLD,)))
    try:
        model(make_layout(slice(0, 3)))
    except ValueError as error:
        return {"message": str(error)}
    return {"message": None}


CASES: list[Callable[[int, Path], dict[str, Any]]] = [
    data_parallel,
    accumulated_passes,
    layers_and_root,
    embedding_apart,
    data_parallel_items,
    data_parallel_both,
    sharded_items,
    sharded_both,
    saving,
    wrong_root,
]


def run(rank: int, folder: Path) -> None:
    """All cases in turn; what they return goes into the folder."""
    folder.mkdir(exist_ok=True)
    for case in CASES:
        torch.save(case(rank, folder), folder / f"{case.__name__}.{rank}.pt")
