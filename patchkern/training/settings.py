# SPDX-License-Identifier: Apache-2.0
"""How the paper trains each data set, and what small models from random weights want instead."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainingArguments

from patchkern.batch.policies import ItemPatches, Policy, SessionPatches, TextOnly

STAGES = ("sft", "pretrain", "items", "sessions")


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
