# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a `transformers.Trainer` that are models of this library, and have a name once they are complete."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from patchkern.models.files import choose_catalog, is_model
from patchkern.training.averaging import WeightAverage, has_average
from patchkern.training.checkpoints import checkpoints, keep
from patchkern.training.only_writer import only_writer
from patchkern.training.processes import copy_into_shards, load_states, save_states

_ASIDE = ".unfinished-checkpoint"
_MEASURED = ".validated-model"


class SavingTrainer(Trainer):
    """A trainer that saves, resumes and loads by ``save_pretrained`` and ``from_pretrained`` of its model.

    Under FSDP2 too: models and optimisers are written as one process has them, and sharded when they are read. With a
    `WeightAverage` the model is measured and saved as the average, and a checkpoint has the weights beside it.
    """

    weight_average: WeightAverage | None = None
    _saving = False
    _loaded: str | None = None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As of a Trainer, into a folder that no other process trains into: the second of two is refused."""
        alone = only_writer(str(self.args.output_dir)) if self.is_world_process_zero() else nullcontext()
        with alone:
            return super().train(*args, **kwargs)

    def averaged(self) -> AbstractContextManager[None]:
        """Meanwhile the model has the average of its weights, if there is one."""
        return nullcontext() if self.weight_average is None else self.weight_average.in_model()

    @contextmanager
    def whole_model(self) -> Generator[Any, None, None]:
        """The model to measure; under FSDP a copy that every process has all of, written and read for the purpose."""
        model: Any = self.accelerator.unwrap_model(self.model)
        if not self.is_fsdp_enabled:
            with self.averaged():
                yield model
            return
        folder = os.path.join(str(self.args.output_dir), _MEASURED)
        self._save(folder, self.accelerator.get_state_dict(self.model))
        self.accelerator.wait_for_everyone()
        yield self._read(folder).to(self.args.device)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            shutil.rmtree(folder)

    def _read(self, folder: str) -> Any:
        model: Any = self.accelerator.unwrap_model(self.model)
        return type(model).from_pretrained(folder, model.catalog, dtype=model.dtype)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = str(self.args.output_dir if output_dir is None else output_dir)
        with self.averaged():
            self.accelerator.unwrap_model(self.model).save_pretrained(folder, state_dict=state_dict)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Under FSDP as without, so that any number of processes goes on from there."""
        if self.args.should_save and self.weight_average is not None:
            self.weight_average.save(output_dir)
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        save_states(self.optimizer, self.lr_scheduler, output_dir, self.args.should_save)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """And the weights to go on with, where the model of a checkpoint is their average."""
        if checkpoint is not None and self.weight_average is not None:
            self.weight_average.resume(checkpoint, self.accelerator.unwrap_model(self.model))
        elif checkpoint is not None and has_average(checkpoint):
            raise ValueError("ema_decay: expected that of the checkpoint, whose model is an average, got None")
        rates = getattr(self.lr_scheduler, "base_lrs", None)
        if not self.is_fsdp_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
        elif checkpoint is not None:
            load_states(self.optimizer, self.lr_scheduler, checkpoint)
        if checkpoint is None:
            return
        of_checkpoint = getattr(self.lr_scheduler, "base_lrs", None)
        if rates != of_checkpoint:  # which would be used all the same
            raise ValueError(f"learning_rate: expected the rates of the checkpoint, {of_checkpoint}, got {rates}")
        if not Path(checkpoint, SCHEDULER_NAME).is_file() and not self.is_deepspeed_enabled:
            warnings.warn(
                f"resume_from_checkpoint: {checkpoint!r} was saved without its optimiser (save_only_model): moments "
                "and the schedule of the learning rate begin anew, and losses are others than those of one run",
                stacklevel=2,
            )

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        """Under FSDP a checkpoint's model is loaded like any model, before it is sharded."""
        if self.is_fsdp_enabled and resume_from_checkpoint is not None:
            self._load_from_checkpoint(resume_from_checkpoint)
        return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled and model is not None:
            if self._loaded != resume_from_checkpoint:
                raise RuntimeError("the model was sharded before the checkpoint was loaded")
            return
        self._loaded = resume_from_checkpoint
        patched: Any = self.accelerator.unwrap_model(self.model)
        wrapped: Any = patched.hf_model
        if is_model(resume_from_checkpoint):
            choose_catalog(resume_from_checkpoint, patched.catalog)
        if patched.item_embedding is not None:
            patched.load_item_embeddings(resume_from_checkpoint)
        if patched.item_head is not None:
            patched.item_head.load(resume_from_checkpoint)
        if hasattr(patched, "load_map"):
            patched.load_map(resume_from_checkpoint)
        if not isinstance(wrapped, PreTrainedModel):
            super()._load_from_checkpoint(resume_from_checkpoint, wrapped)
            return
        saved = type(wrapped).from_pretrained(resume_from_checkpoint, dtype=wrapped.dtype, trust_remote_code=False)
        wrapped.load_state_dict(saved.state_dict())

    def _load_best_model(self) -> None:
        best = str(self.state.best_model_checkpoint)
        if self.weight_average is not None:
            self.weight_average.forget()
        if self.is_deepspeed_enabled:
            super()._load_best_model()
        elif self.is_fsdp_enabled:
            copy_into_shards(self._read(best), self.accelerator.unwrap_model(self.model))
        else:
            self._load_from_checkpoint(best)

    def _get_output_dir(self, trial: Any) -> str:
        folder: str = super()._get_output_dir(trial)
        return os.path.join(folder, _ASIDE) if self._saving else folder

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write the checkpoint aside and rename it, so that a killed run leaves no half of one under its name."""
        folder = Path(self._get_output_dir(trial))
        aside, name = folder / _ASIDE, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(aside, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._saving = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._saving = False
        best = self.state.best_model_checkpoint
        if best is not None and Path(best).parent == aside:
            self.state.best_model_checkpoint = best = str(folder / name)
            if self.args.should_save:
                self.state.save_to_json(str(aside / name / TRAINER_STATE_NAME))
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            shutil.rmtree(folder / name, ignore_errors=True)
            os.replace(aside / name, folder / name)
            aside.rmdir()
            keep(checkpoints(folder), best, self.args.save_total_limit or 0)
        self.accelerator.wait_for_everyone()
