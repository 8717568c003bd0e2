# SPDX-License-Identifier: Apache-2.0
"""What one process does, and then each of two that torchrun starts: they train every kind of model, in several ways.

`torchrun --nproc_per_node 2 tests/process_cases.py FOLDER`, where FOLDER has what one process did, from whose
checkpoints runs are resumed too.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import step_processes
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from training_cases import EARLY, evaluations_of, losses_of, make_id_trainer, make_memory_trainer, make_trainer

from patchkern.models.patched_lm import PatchedCausalLM
from patchkern.training import PatchTrainer
from recipes import train
from recipes.training_choices import CHECKPOINTING

_SHORT = {"max_steps": 4, "learning_rate": 1e-3, "lr_scheduler_type": "constant"}
# the best is not the last
_FIRST = EARLY | {"metric_for_best_model": "loss", "greater_is_better": True}
_STEPS = _SHORT | {"rows_per_pass": 250, "save_strategy": "steps", "save_steps": 2}
_VECTORS = {"vector_dropout": 0.0}

ALIKE: dict[str, dict[str, Any]] = {
    "samples": _SHORT | EARLY,
    "passes": _SHORT | _FIRST | {"rows_per_pass": 250, "label_smoothing_factor": 0.1},
    "pre-training on passes": _SHORT | EARLY | {"rows_per_pass": 500, "stage": "pretrain"},
    "a number of targets": _SHORT | EARLY | {"rows_per_pass": 220, "targets_per_step": 25},
    "titles beside an item head": _STEPS | {"config": {"item_head": True, **_VECTORS}},
    "items": _STEPS | {"head": "items", "config": _VECTORS},
    "both": _STEPS | {"head": "both", "config": {"tie_word_embeddings": False, **_VECTORS}},
    "item ids": _STEPS | {"rows_per_pass": 60},
    "memory of item ids": _STEPS | {"rows_per_pass": 150},
    "memory of titles": _STEPS | {"rows_per_pass": 1200, "head": "both"},
}
"""Runs by data parallelism, which equal those of one process."""

SHARDED = {
    "passes": {},
    "titles beside an item head": {CHECKPOINTING: True},
    "items": {},
    "both": {},
    "item ids": {},
    "memory of item ids": {},
    "memory of titles": {},
}
"""Of those, the runs that FSDP2 equals too, and with what."""

RESUMED = ("items", "item ids", "both", "memory of titles")


def trainer_of(kind: str, folder: Path, accumulation: int, **options: Any) -> PatchTrainer:
    """Of ``accumulation`` passes a step, or twice as many samples."""
    options = {"gradient_accumulation_steps": accumulation, **ALIKE[kind], **options}
    if kind.startswith("memory"):
        return make_memory_trainer(folder, kind == "memory of titles", **options)
    if kind == "item ids":
        return make_id_trainer(folder, dropout=0.0, **options)
    return make_trainer(folder, **({} if "rows_per_pass" in options else {"per_device_train_batch_size": 2}), **options)


def alone(folder: Path) -> None:
    """What one process does."""
    results = {kind: _run(kind, folder / "alone" / kind, 4) for kind in ALIKE}
    (folder / "alone.json").write_text(json.dumps(results))


def _run(kind: str, folder: Path, accumulation: int = 2, resume: Path | None = None, **options: Any) -> dict[str, Any]:
    trainer = trainer_of(kind, folder, accumulation, **options)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    parameters = list(trainer.model.parameters())
    states = [value for entries in trainer.optimizer.state.values() for value in entries.values() if value.dim()]
    return {
        "losses": losses_of(trainer),
        "evaluations": evaluations_of(trainer),
        "best": trainer.state.best_model_checkpoint,
        "off the best": _difference(trainer),
        "processes": trainer.args.world_size,
        "sharded": sum(isinstance(parameter, DTensor) for parameter in parameters) / len(parameters),
        "units": [name for name, module in trainer.model.named_modules() if isinstance(module, FSDPModule)],
        "weights": _held(parameters),
        "optimizer": _held(states),
    }


def _difference(trainer: PatchTrainer) -> float | None:
    """Between the model at the end and the best that was saved."""
    if trainer.state.best_model_checkpoint is None:
        return None
    saved = PatchedCausalLM.from_pretrained(trainer.state.best_model_checkpoint)
    ours = [x.full_tensor() if isinstance(x, DTensor) else x for x in trainer.model.parameters()]
    return max(float((x - y).detach().abs().max()) for x, y in zip(ours, saved.parameters(), strict=True))


def _held(tensors: list[Tensor]) -> int:
    """Bytes in this process."""
    return sum((x.to_local() if isinstance(x, DTensor) else x).nbytes for x in tensors)


def _refused(folder: Path, kind: str, **options: Any) -> str:
    try:
        trainer_of(kind, folder, 2, fsdp=True, **options)
    except ValueError as error:
        return str(error)
    return "nothing"


def _recipe(folder: Path, *flags: str) -> dict[str, Any]:
    """recipes/train.py, told nothing of processes."""
    own = ["--stage", "items", "--model", "tiny", "--vocab_size", "300", "--data", "synthetic", "--max_steps", "2"]
    own += ["--rows_per_pass", "512", "--bf16", "False", "--logging_steps", "1", "--disable_tqdm", "True"]
    try:
        trainer = train.main([*own, "--output_dir", str(folder), *flags])
    except ValueError as error:
        return {"error": str(error)}
    finally:
        os.environ.pop("ACCELERATE_USE_FSDP", None)
    return {"losses": losses_of(trainer), "processes": trainer.args.world_size}


def _shard_on_cpus() -> None:
    """accelerate shards among accelerators only; made to do it here, it does what it does there."""
    made = AcceleratorState.__init__

    def init(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        made(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = init


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    torch.distributed.init_process_group("gloo")
    step_processes.run(rank, folder / "steps")
    results: dict[str, Any] = {kind: _run(kind, folder / "data parallel" / kind) for kind in ALIKE}
    results["recipe"] = _recipe(folder / "recipe")
    results["recipe, fsdp"] = _recipe(folder / "refused", "--fsdp")
    for kind in RESUMED:
        start = folder / "alone" / kind / "checkpoint-2"
        results[f"{kind}, resumed"] = _run(kind, folder / "resumed" / kind, resume=start)
    _shard_on_cpus()
    for kind, own in SHARDED.items():
        start = folder / "alone" / kind / "checkpoint-2"
        results[f"{kind}, sharded"] = _run(kind, folder / "sharded" / kind, fsdp=True, **own)
        if kind in RESUMED:
            results[f"{kind}, sharded, resumed"] = _run(
                kind, folder / "sharded and resumed" / kind, resume=start, fsdp=True, **own
            )
    results["refused"] = [
        _refused(folder / "refused", "items", fsdp_config={"state_dict_type": "SHARDED_STATE_DICT"}),
        _refused(folder / "refused", "items", fsdp_config={"cpu_ram_efficient_loading": True}),
    ]
    (folder / f"rank-{rank}.json").write_text(json.dumps(results))
    # Not by way of the destructors: that of DDP's reducer can wait for a gloo thread that waits for the GIL.
    torch.distributed.barrier()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
