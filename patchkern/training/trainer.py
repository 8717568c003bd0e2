# SPDX-License-Identifier: Apache-2.0
"""Training: `transformers.Trainer` over layouts.

A run is a row of *slots*, one per sample it consumes. Slot n belongs to optimisation step n // (samples per step) and
to epoch n // (samples of the data set), whose permutation gives its sample. So shuffling, the patch pre-training
schedule and its draws depend on the slot alone: the same under data-loader workers, data parallelism and resuming.
"""

from __future__ import annotations

import copy
import itertools
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import gather_object
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import Dataset, SequentialSampler
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, IntervalStrategy, SaveStrategy, speed_metrics

from patchkern.batch.catalog import Catalog
from patchkern.batch.histories import Histories, check_count
from patchkern.batch.policies import (
    AnyPolicy,
    ItemPatches,
    Level,
    Levels,
    Policy,
    RandomItemPatches,
    SessionPatches,
    TextOnly,
)
from patchkern.batch.prompt import Prompt
from patchkern.batch.sample_layout import build_layout
from patchkern.batch.training_layout import build_training_layout, join_layouts, training_rows
from patchkern.models.patched_lm import DESCRIPTION, PatchedCausalLM
from patchkern.training.validation import Validation, summary

STAGES = ("sft", "pretrain", "items", "sessions")
_ASIDE = ".unfinished-checkpoint"


# ------------------------------------------------------------------ the paper's settings


@dataclass(frozen=True)
class Settings:
    """How one data set is trained and compressed.

    Attributes:
        learning_rate: of all stages but sessions.
        sessions_learning_rate: of the sessions stage.
        batch_size: samples per optimisation step.
        keep_text: items that stay text in the items stage.
        group_size: items per session in the sessions stage.
        weight_decay, adam_betas: of AdamW.
        label_smoothing: share of the labels' weight that goes to all tokens alike.
        dropout: of a model that starts from random weights, see `patchkern.models.scratch.scratch_model`.
        jitter: of the order of training items, where all targets of a user are learned in one pass.
    """

    learning_rate: float
    sessions_learning_rate: float
    batch_size: int = 64
    keep_text: int = 5
    group_size: int = 5
    weight_decay: float = 0.0
    adam_betas: tuple[float, float] = (0.9, 0.999)
    label_smoothing: float = 0.0
    dropout: float = 0.0
    jitter: float = 0.0

    def policy(self, stage: str, max_items: int | None = 100) -> Policy:
        """The policy of a stage; after patch pre-training a model is ready for item patches."""
        if _stage(stage) == "sft":
            return TextOnly(max_items)
        if stage == "sessions":
            return SessionPatches(self.group_size, max_items)
        return ItemPatches(self.keep_text, max_items)

    def defaults(self, stage: str) -> dict[str, Any]:
        """The paper's training with these settings, as fields of `TrainingArguments`.

        One epoch, AdamW, cosine, 5 % warm-up, clip 0.3, bf16 where there is a GPU that has it.
        """
        beta1, beta2 = self.adam_betas
        return {
            "num_train_epochs": 1,
            "per_device_train_batch_size": self.batch_size,
            "learning_rate": self.sessions_learning_rate if _stage(stage) == "sessions" else self.learning_rate,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 0.05,
            "max_grad_norm": 0.3,
            "weight_decay": self.weight_decay,
            "adam_beta1": beta1,
            "adam_beta2": beta2,
            "label_smoothing_factor": self.label_smoothing,
            "bf16": torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
            "dataloader_pin_memory": torch.cuda.is_available(),
            "report_to": "none",
        }

    def arguments(self, stage: str, output_dir: str | os.PathLike[str], **overrides: Any) -> TrainingArguments:
        """`defaults` as `TrainingArguments`; ``overrides`` are further fields, and win."""
        return TrainingArguments(output_dir=os.fspath(output_dir), **{**self.defaults(stage), **overrides})


SETTINGS = {
    "ml-1m": Settings(learning_rate=8e-6, sessions_learning_rate=8e-6),
    "ml-100k": Settings(learning_rate=1e-5, sessions_learning_rate=3e-6, group_size=20),
    "goodreads": Settings(learning_rate=5e-5, sessions_learning_rate=5e-5, batch_size=32),
    # not the paper's: for small models that start from random weights
    "scratch": Settings(
        learning_rate=3e-3,
        sessions_learning_rate=1e-3,
        keep_text=1,
        weight_decay=0.1,
        adam_betas=(0.9, 0.98),
        label_smoothing=0.1,
        dropout=0.2,
        jitter=8.0,
    ),
}


def _stage(stage: str) -> str:
    if stage not in STAGES:
        raise ValueError(f"stage: expected one of {', '.join(STAGES)}, got {stage!r}")
    return stage


# ------------------------------------------------------------------ slots


class Slot(NamedTuple):
    """One sample at its place in the run."""

    number: int
    step: int
    user: int
    position: int


class SlotDataset(Dataset[Slot]):
    """All slots of a run, in order; read them sequentially.

    Every step is full: what the last one lacks comes from the next epoch's permutation.

    Args:
        users, positions: ``(S,)`` the samples, as in `Histories.before`.
        steps: optimisation steps of the run.
        samples_per_step: over all processes and accumulated batches.
        seed: of the permutations.
    """

    def __init__(
        self, users: NDArray[np.int64], positions: NDArray[np.int64], steps: int, samples_per_step: int, seed: int
    ) -> None:
        self.users, self.positions = users, positions
        self.steps, self.samples_per_step, self.seed = steps, samples_per_step, seed

    def __len__(self) -> int:
        return self.steps * self.samples_per_step

    @property
    def num_targets(self) -> int:
        """Targets that the whole run learns, repeated ones included."""
        return len(self)

    def __getitem__(self, number: int) -> Slot:
        epoch, nth = divmod(number, self.users.size)
        sample = _permutation(self.seed, epoch, self.users.size)[nth]
        return Slot(number, number // self.samples_per_step, int(self.users[sample]), int(self.positions[sample]))


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, size: int) -> NDArray[np.int64]:
    return np.random.default_rng((seed, epoch)).permutation(size)


# ------------------------------------------------------------------ passes


class Pass(NamedTuple):
    """Targets that one forward pass learns together, at their place in the run."""

    number: int
    step: int
    users: NDArray[np.int64]
    ranges: NDArray[np.int64]
    """``(n, 2)`` first and last target position of each user"""


class PassDataset(Dataset[Pass]):
    """All passes of a run, in order; read them sequentially.

    Every epoch is a new permutation of the users, packed greedily into passes of at most ``rows_per_pass`` rows. A user
    whose targets need more than that is cut into runs of consecutive targets.

    Args:
        users, positions: ``(S,)`` the samples, as in `Histories.before`.
        count_rows: the rows that ``(n,)`` users with ``(n, 2)`` target ranges take.
        rows_per_pass: the most rows of a pass.
        epochs: passes over the samples that make the run, where ``steps`` is None.
        steps: optimisation steps of the run.
        passes_per_step: over all processes and accumulated batches.
        seed: of the permutations.

    Raises:
        ValueError: a target that alone needs more than ``rows_per_pass`` rows.
    """

    def __init__(
        self,
        users: NDArray[np.int64],
        positions: NDArray[np.int64],
        count_rows: Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.int64]],
        rows_per_pass: int,
        epochs: float,
        steps: int | None,
        passes_per_step: int,
        seed: int,
    ) -> None:
        self._users, self._ranges, rows = cut_to_passes(users, positions, count_rows, rows_per_pass)
        self.passes_per_step = passes_per_step
        stream = _pack(rows, rows_per_pass, seed)
        self._passes: list[NDArray[np.int64]] = []
        if steps is None:
            left = math.ceil(epochs * rows.size)
            while left > 0:
                self._passes.append(next(stream))
                left -= self._passes[-1].size
            steps = math.ceil(len(self._passes) / passes_per_step)
        self.steps = steps
        while len(self._passes) < len(self):
            self._passes.append(next(stream))

    def __len__(self) -> int:
        return self.steps * self.passes_per_step

    @property
    def num_targets(self) -> int:
        """Targets that the whole run learns, repeated ones included."""
        counts = self._ranges[:, 1] - self._ranges[:, 0] + 1
        return int(sum(counts[runs].sum() for runs in self._passes))

    def __getitem__(self, number: int) -> Pass:
        runs = self._passes[number]
        return Pass(number, number // self.passes_per_step, self._users[runs], self._ranges[runs])


def cut_to_passes(
    users: NDArray[np.int64],
    positions: NDArray[np.int64],
    count_rows: Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.int64]],
    rows_per_pass: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Users, ranges and rows of the longest runs of consecutive targets that fit a pass; arguments of `PassDataset`."""
    order = np.lexsort((positions, users))
    users, positions = users[order], positions[order]
    begins = np.append(True, (np.diff(users) != 0) | (np.diff(positions) != 1)) if users.size else np.zeros(0, bool)
    while True:
        first = np.flatnonzero(begins)
        last = np.append(first[1:], users.size) - 1
        ranges = np.stack([positions[first], positions[last]], axis=1)
        rows = count_rows(users[first], ranges)
        large = np.flatnonzero(rows > rows_per_pass)
        if large.size == 0:
            return users[first], ranges, rows
        alone = large[first[large] == last[large]]
        if alone.size:
            at = int(alone[0])
            raise ValueError(
                f"rows_per_pass: expected at least {rows[at]} for the target of user {users[first[at]]} at position "
                f"{positions[first[at]]}, got {rows_per_pass}"
            )
        begins[(first[large] + last[large] + 1) // 2] = True


def _pack(rows: NDArray[np.int64], rows_per_pass: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """Runs of one permutation after the other, in passes that are full but for what does not fit any more."""
    taken: list[int] = []
    filled = 0
    for epoch in itertools.count():
        for run in np.random.default_rng((seed, epoch)).permutation(rows.size).tolist():
            if taken and filled + rows[run] > rows_per_pass:
                yield np.array(taken)
                taken, filled = [], 0
            taken.append(run)
            filled += int(rows[run])


# ------------------------------------------------------------------ batches


@dataclass(frozen=True)
class RawAndPatched:
    """Patch pre-training: the first half of the users as text, the second half as `RandomItemPatches`."""

    probability: float
    max_items: int | None = 100
    seed: int = 0

    def levels(self, histories: Histories) -> Levels:
        levels = RandomItemPatches(self.probability, self.max_items, self.seed).levels(histories)
        levels[: histories.offsets[len(histories) // 2]] = Level.TEXT
        return levels


@dataclass(frozen=True)
class LayoutCollator:
    """Slots to a batch ``{"layout": PatchLayout, "labels": (K,) int64}``, in the data-loader worker.

    Attributes:
        pretrain_steps: feed each sample twice, as text and as patches with a probability that rises from 0 by
            1 / ``pretrain_steps`` a step; None: once, as ``policy`` says.
        seed: of the draws.
        supervise_history: label the history's text too, see `PatchLayout.supervise_literals`.
        item_embeddings: plan what a model with item embeddings needs, see `PatchLayout.with_identities`.
    """

    catalog: Catalog
    histories: Histories
    policy: AnyPolicy
    prompt: Prompt
    pretrain_steps: int | None = None
    seed: int = 0
    supervise_history: bool = False
    item_embeddings: bool = False

    def __call__(self, slots: list[Slot]) -> dict[str, Any]:
        policy = self.policy
        users, positions = (np.array([slot[field] for slot in slots]) for field in (2, 3))
        if self.pretrain_steps is not None:
            users, positions = np.tile(users, 2), np.tile(positions, 2)
            draw = np.random.SeedSequence((self.seed, slots[0].number)).generate_state(1)
            policy = RawAndPatched(slots[0].step / self.pretrain_steps, policy.max_items, int(draw[0]))
        histories = self.histories.before(users, positions, policy.max_items)
        targets = self.histories.at(users, positions)
        layout = build_layout(self.catalog, histories, policy, self.prompt, targets)
        if self.supervise_history:
            layout = layout.supervise_literals()
        if self.item_embeddings:
            layout = layout.with_identities()
        # Trainer counts the supervised tokens of accumulated batches from their labels.
        return {"layout": layout, "labels": layout.logit_labels}


@dataclass(frozen=True)
class PassCollator:
    """A `Pass` to a batch of trunks and branches, as `LayoutCollator` makes one of samples.

    In patch pre-training every user has two trunks side by side, the text and one draw of patches, each with all the
    user's targets.
    """

    catalog: Catalog
    histories: Histories
    policy: AnyPolicy
    prompt: Prompt
    pretrain_steps: int | None = None
    seed: int = 0
    supervise_history: bool = False
    item_embeddings: bool = False
    jitter: float = 0.0

    def __call__(self, passes: list[Pass]) -> dict[str, Any]:
        (one,) = passes
        policies = [self.policy]
        if self.pretrain_steps is not None:
            draw = np.random.SeedSequence((self.seed, one.number)).generate_state(1)
            patched = RandomItemPatches(one.step / self.pretrain_steps, self.policy.max_items, int(draw[0]))
            policies = [TextOnly(self.policy.max_items), patched]
        histories = self.histories.take(one.users)
        if self.jitter:
            rng = np.random.default_rng((self.seed, one.number))
            histories = histories.jittered(self.jitter, one.ranges[:, 1] + 1, rng)
        layout = join_layouts(
            [
                build_training_layout(self.catalog, histories, policy, self.prompt, one.ranges, transpose=False)
                for policy in policies
            ]
        )
        layout = layout.with_transpose()
        if self.supervise_history:
            layout = layout.supervise_literals()
        if self.item_embeddings:
            layout = layout.with_identities()
        return {"layout": layout, "labels": layout.logit_labels}

    def rows(self, users: NDArray[np.int64], ranges: NDArray[np.int64]) -> NDArray[np.int64]:
        """``(n,)`` the most rows that each user takes."""
        histories = self.histories.take(users)
        text = TextOnly(self.policy.max_items)
        policy = self.policy if self.pretrain_steps is None else text
        rows = training_rows(self.catalog, histories, policy, self.prompt, ranges)
        return rows if self.pretrain_steps is None else 2 * rows


# ------------------------------------------------------------------ the trainer


class PatchTrainer(Trainer):
    """`transformers.Trainer` for a `PatchedCausalLM`.

    The loss of a step is the mean over all its supervised tokens, however the step is cut into batches and processes.
    Checkpoints are `PatchedCausalLM.save_pretrained` folders with the trainer's state beside the model, and appear
    under their name when they are complete; resuming from one continues the uninterrupted run, loss by loss.
    ``label_smoothing_factor`` smooths the losses of training, never those of evaluation.

    With ``eval_samples``, `evaluate` recommends for them, so that transformers' own arguments and callbacks work on hit
    rates: ``eval_strategy="steps"``, ``metric_for_best_model="HR@20"``, ``load_best_model_at_end=True``,
    `EarlyStoppingCallback`; a resumed run remembers that callback's patience with
    ``restore_callback_states_from_checkpoint=True``. Processes in data parallelism share the samples.

    Args:
        model: its catalog and prompt are used; its policy where ``policy`` is None.
        args: as for any Trainer (`Settings.arguments` has the paper's); ``num_train_epochs`` and ``max_steps`` count
            passes over ``samples`` and optimisation steps. The run's ``epoch`` in the logs goes from 0 to 1; all the
            same, to evaluate, save or log every "epoch" means after every pass over ``samples``.
        histories: the users' items, oldest first.
        samples: ``(users, positions)``, ``(S,)`` int64 each: the target of a sample is the item of that user at that
            position, its history the items before; `patchkern.data.Samples` is one.
        policy: how histories are compressed; also kept as ``model.policy``.
        pretrain: patch pre-training: every sample twice in the same batch, as text and with each item a patch with
            probability step / steps.
        supervise_history: label the history's text as well as the response. Not the paper's objective, but a model
            that starts from random weights learns many times faster from it.
        jitter: blur the order of the items up to a pass's last target by so many positions, anew in every pass
            (`Histories.jittered`); for models from scratch, and with ``rows_per_pass`` only.
        rows_per_pass: learn all targets of a user in one pass, its history computed once (`build_training_layout`),
            in batches of at most so many rows; ``per_device_train_batch_size`` is not used then. None: a sample per
            target, as published.
        eval_samples: like ``samples``, to validate on.
        eval_limit: of more take so many, evenly spread over them; None: all.
        eval_options: for `PatchedCausalLM.recommend` in `evaluate`, such as ``search`` or ``memory_budget``; by
            default 20 beams, and items already seen are excluded.
        kwargs: for `transformers.Trainer`, such as ``processing_class`` and ``callbacks``.

    Raises:
        ValueError: no samples, a sample outside its history, no policy, or an argument that this trainer cannot serve.
    """

    model: PatchedCausalLM
    train_dataset: SlotDataset | PassDataset
    data_collator: LayoutCollator | PassCollator

    def __init__(
        self,
        model: PatchedCausalLM,
        args: TrainingArguments,
        histories: Histories,
        samples: tuple[NDArray[np.int64], NDArray[np.int64]],
        policy: AnyPolicy | None = None,
        *,
        pretrain: bool = False,
        supervise_history: bool = False,
        rows_per_pass: int | None = None,
        jitter: float = 0.0,
        eval_samples: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None,
        eval_limit: int | None = 1000,
        eval_options: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        policy = model.policy if policy is None else policy
        if policy is None:
            raise ValueError("policy: expected one, here or in the model, got None")
        if args.auto_find_batch_size:
            raise ValueError("args: expected auto_find_batch_size=False: the schedule depends on the batch size")
        if not 0 <= jitter < math.inf or (jitter and rows_per_pass is None):
            raise ValueError(
                f"jitter: expected a finite number of at least 0, and 0 without rows_per_pass, got {jitter}"
            )
        users, positions = samples
        if users.size == 0:
            raise ValueError("samples: expected at least one, got none")
        histories.at(users, positions)
        model.policy = policy

        args = copy.copy(args)
        # A layout cannot be scattered over GPUs by DataParallel; several of them need torchrun.
        args._n_gpu = min(args.n_gpu, 1)
        args.remove_unused_columns = False
        if args.ddp_find_unused_parameters is None:
            # Trainer's own choice for a module it does not know is True, which is slow and breaks recomputation.
            args.ddp_find_unused_parameters = False
        seed = args.seed if args.data_seed is None else args.data_seed
        steps = args.max_steps if args.max_steps > 0 else None
        dataset: SlotDataset | PassDataset
        collator: LayoutCollator | PassCollator
        kept = (model.catalog, histories, policy, model.prompt)
        planned = (seed, supervise_history, model.item_embedding is not None)
        if rows_per_pass is None:
            per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
            args.max_steps = steps or math.ceil(args.num_train_epochs * users.size / per_step)
            dataset = SlotDataset(users, positions, args.max_steps, per_step, seed)
            collator = LayoutCollator(*kept, args.max_steps if pretrain else None, *planned)
        else:
            check_count("rows_per_pass", rows_per_pass, minimum=1)
            args.per_device_train_batch_size = 1
            per_step = args.gradient_accumulation_steps * args.world_size
            # how many steps there are depends on the rows, and those on whether there are two trunks
            collator = PassCollator(*kept, 1 if pretrain else None, *planned, jitter)
            dataset = PassDataset(
                users, positions, collator.rows, rows_per_pass, args.num_train_epochs, steps, per_step, seed
            )
            args.max_steps = dataset.steps
            collator = replace(collator, pretrain_steps=dataset.steps if pretrain else None)
        _count_epochs_in_steps(args, args.max_steps * users.size // dataset.num_targets)
        if eval_samples is not None:
            kwargs["eval_dataset"] = Validation(model, histories, eval_samples, policy, eval_limit, eval_options)
        self._saving = False
        super().__init__(
            model=model,
            args=args,
            train_dataset=dataset,
            data_collator=collator,
            **kwargs,
        )
        if eval_samples is not None and self.is_fsdp_enabled:
            raise ValueError("eval_samples: expected None under FSDP, where no process has a whole model to search")
        self.label_smoother = None  # it would compute a second loss; `compute_loss` has the model smooth its own

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        return SequentialSampler(dataset)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The model's own loss, smoothed in training as ``label_smoothing_factor`` says."""
        smoothing = self.args.label_smoothing_factor if model.training else 0.0
        return super().compute_loss(model, {**inputs, "smoothing": smoothing}, *args, **kwargs)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Recommend for ``eval_samples``: ``eval_HR@10``, ``eval_HR@20``, ``eval_NDCG@10``, ``eval_NDCG@20``, by item.

        ``eval_loss`` is the mean over all tokens of the targets' titles and response ends, without label smoothing,
        ``per_device_eval_batch_size`` samples at a time. Without ``eval_samples``, or given another ``eval_dataset``,
        as any Trainer.
        """
        samples = self.eval_dataset
        if eval_dataset is not None or not isinstance(samples, Validation):
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        started = time.time()
        share = range(self.accelerator.process_index, len(samples), self.accelerator.num_processes)
        model = self.accelerator.unwrap_model(self.model)
        parts = gather_object([samples.measure(model, share, self.args.per_device_eval_batch_size)])
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in summary(parts).items()}
        metrics |= speed_metrics(metric_key_prefix, started, num_samples=len(samples))
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # ------------------------------------------------------------------ checkpoints

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = str(self.args.output_dir if output_dir is None else output_dir)
        self.accelerator.unwrap_model(self.model).save_pretrained(folder, state_dict=state_dict)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        patched: PatchedCausalLM = self.accelerator.unwrap_model(self.model)
        wrapped: Any = patched.hf_model
        if patched.item_embedding is not None and not self.is_fsdp_enabled:
            patched.load_item_embeddings(resume_from_checkpoint)
        if self.is_fsdp_enabled or not isinstance(wrapped, PreTrainedModel):
            super()._load_from_checkpoint(resume_from_checkpoint, model if self.is_fsdp_enabled else wrapped)
            return
        saved = type(wrapped).from_pretrained(resume_from_checkpoint, dtype=wrapped.dtype)
        wrapped.load_state_dict(saved.state_dict())

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(str(self.state.best_model_checkpoint))

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
            _keep(checkpoints(folder), best, self.args.save_total_limit or 0)
        self.accelerator.wait_for_everyone()


def _count_epochs_in_steps(args: TrainingArguments, steps_per_epoch: int) -> None:
    """To `Trainer` the whole run is one epoch, which would leave one evaluation, at its end."""
    steps = min(max(steps_per_epoch, 1), args.max_steps)
    if args.eval_strategy == IntervalStrategy.EPOCH:
        args.eval_strategy, args.eval_steps = IntervalStrategy.STEPS, steps
        args.eval_delay *= steps
    if args.save_strategy == SaveStrategy.EPOCH:
        args.save_strategy, args.save_steps = SaveStrategy.STEPS, steps
    if args.logging_strategy == IntervalStrategy.EPOCH:
        args.logging_strategy, args.logging_steps = IntervalStrategy.STEPS, steps


def _keep(found: list[Path], best: str | None, limit: int) -> None:
    """Delete the oldest checkpoints beyond a limit, never the last and the best; no limit is 0."""
    spare = [path for path in found[:-1] if best is None or path != Path(best)]
    excess = min(len(found) - limit, len(spare)) if limit > 0 else 0
    for old in spare[:excess]:
        shutil.rmtree(old)


def checkpoints(folder: str | os.PathLike[str]) -> list[Path]:
    """The complete checkpoints of a run's folder, oldest first; an unfinished one has no such name."""
    found = [path for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.rpartition("-")[2].isdigit()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def find_model(folder: str | os.PathLike[str], argument: str = "folder") -> Path:
    """``folder`` itself if it is a saved `PatchedCausalLM`, else the last checkpoint in it.

    Raises:
        FileNotFoundError: neither; the message names ``argument``.
    """
    if (Path(folder) / DESCRIPTION).is_file():
        return Path(folder)
    found = checkpoints(folder)
    if not found:
        raise FileNotFoundError(
            f"{argument}: expected a model saved by patchkern, or a run with checkpoints, got {os.fspath(folder)!r}"
        )
    return found[-1]
