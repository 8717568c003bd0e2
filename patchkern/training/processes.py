# SPDX-License-Identifier: Apache-2.0
"""Training in several processes: what is refused, and an optimiser's state that any number of them can read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME


def check_processes(args: TrainingArguments) -> None:
    """Refuse processes that do not know of each other.

    Raises:
        ValueError: a launcher such as torchrun has started several, and each would train alone, into one folder.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > 1 and args.world_size == 1:
        raise ValueError(
            f"args: expected use_cpu=True where there is no accelerator, as {started} processes were started that "
            "would each train alone"
        )


def check_sharding(args: TrainingArguments, accelerator: Any, model: nn.Module) -> None:
    """Refuse fully sharded training that would be none, that fails, or whose checkpoints would be no models.

    Raises:
        ValueError: accelerate shards nothing here, or not as asked.
    """
    if not (args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"):
        return
    if accelerator.distributed_type is not DistributedType.FSDP:
        raise ValueError(
            "fsdp: expected several processes with an accelerator each, among which accelerate would shard the model, "
            f"got {args.world_size} on {args.device.type}, of which each would have all of it"
        )
    plugin = accelerator.state.fsdp_plugin
    kind = getattr(plugin.state_dict_type, "name", plugin.state_dict_type)
    for wrong, message in (
        (plugin.fsdp_version != 2, f"fsdp_config: expected version 2, got {plugin.fsdp_version}"),
        (
            kind != "FULL_STATE_DICT",
            f"fsdp_config: expected state_dict_type FULL_STATE_DICT, as checkpoints are whole models, got {kind}",
        ),
        (
            plugin.cpu_ram_efficient_loading,
            "fsdp_config: expected cpu_ram_efficient_loading False, as every process has read the model already",
        ),
        (
            any(type(module).__name__ == "TrainableTokensWrapper" for module in model.modules()),
            "fsdp: expected no adapter that trains the rows of some tokens (trainable_token_indices), whose embedding "
            "cannot be sharded; by data parallelism every process has all of the model",
        ),
    ):
        if wrong:
            raise ValueError(message)


def save_states(optimizer: Any, scheduler: Any, folder: str, is_main_process: bool) -> None:
    """Write what an optimiser that shards nothing would have, where `transformers.Trainer` has it.

    All processes call it, to gather the tensors; the main one writes.
    """
    state = optimizer.state_dict()
    whole = {
        number: {name: _whole(value, is_main_process) for name, value in entries.items()}
        for number, entries in state["state"].items()
    }
    if is_main_process:
        torch.save({**state, "state": whole}, Path(folder, OPTIMIZER_NAME))
        torch.save(scheduler.state_dict(), Path(folder, SCHEDULER_NAME))


def load_states(optimizer: Any, scheduler: Any, folder: str) -> None:
    """Take what `save_states`, or a run that shards nothing, has written: each process the shards of its parameters.

    Nothing where it was not written (``save_only_model``).

    Raises:
        ValueError: an optimiser of other parameters.
    """
    paths = [Path(folder, name) for name in (OPTIMIZER_NAME, SCHEDULER_NAME)]
    if not all(path.is_file() for path in paths):
        return
    # mapped, so that processes of a machine share its pages
    state = torch.load(paths[0], map_location="cpu", weights_only=True, mmap=True)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    if len(parameters) != len(numbers):
        raise ValueError(
            f"resume_from_checkpoint: expected an optimiser of {len(parameters)} parameters, got one of {len(numbers)}"
        )
    of_number = dict(zip(numbers, parameters, strict=True))
    shards = {
        number: {name: _shard(value, of_number[number]) for name, value in entries.items()}
        for number, entries in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": shards})
    scheduler.load_state_dict(torch.load(paths[1], weights_only=True))


def copy_into_shards(whole: nn.Module, model: nn.Module) -> None:
    """Give a sharded model the parameters of a whole one, which every process has."""
    values = dict(whole.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(_shard(values[name].detach(), parameter))


def _whole(value: Any, keep: bool) -> Any:
    if isinstance(value, DTensor):
        value = value.full_tensor()
    if isinstance(value, Tensor):
        return value.cpu() if keep else None
    return value


def _shard(value: Any, parameter: Tensor) -> Any:
    if not isinstance(value, Tensor) or not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value
    whole = value.to(parameter.device)  # of which every process has read all
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
