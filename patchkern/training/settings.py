# SPDX-License-Identifier: Apache-2.0
"""How the paper trains each data set, and what small models want instead."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainingArguments

from patchkern.batch.policies import ItemPatches, SessionPatches, TextOnly
from patchkern.batch.policy_kinds import Policy

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
        sessions_keep_text: items that stay text in the sessions stage; None: as many as a session has.
        align: from where sessions are counted, see `patchkern.SessionPatches`.
        weight_decay, adam_betas: of AdamW.
        label_smoothing: share of the labels' weight that goes to all tokens alike.
        dropout: of a model that starts from random weights, see `patchkern.models.scratch.scratch_model`.
        jitter: of the order of training items, where all targets of a user are learned in one pass.
        head_learning_rate: of the item head and the items' own vectors, in all stages; None: that of the rest.
        warmup: steps in which the rate rises, as their number or a share of all below 1.
        final_rate: share of its rate that the cosine ends with.
        max_grad_norm: to which gradients are clipped.
    """

    learning_rate: float
    sessions_learning_rate: float
    batch_size: int = 64
    keep_text: int = 5
    group_size: int = 5
    sessions_keep_text: int | None = None
    align: str = "end"
    weight_decay: float = 0.0
    adam_betas: tuple[float, float] = (0.9, 0.999)
    label_smoothing: float = 0.0
    dropout: float = 0.0
    jitter: float = 0.0
    head_learning_rate: float | None = None
    warmup: float = 0.05
    final_rate: float = 0.0
    max_grad_norm: float = 0.3

    def policy(self, stage: str, max_items: int | None = 100) -> Policy:
        """The policy of a stage; after patch pre-training a model is ready for item patches."""
        if _stage(stage) == "sft":
            return TextOnly(max_items)
        if stage == "sessions":
            return SessionPatches(self.group_size, max_items, self.align, keep_text=self.sessions_keep_text)
        return ItemPatches(self.keep_text, max_items)

    def defaults(self, stage: str) -> dict[str, Any]:
        """The paper's training with these settings, as fields of `TrainingArguments`.

        One epoch, AdamW, cosine, 5 % warm-up, clip 0.3, bf16 where there is a GPU that has it. Where there is none at
        all, the CPU is named, which transformers wants to hear before it allows bf16 there.
        """
        beta1, beta2 = self.adam_betas
        cosine: dict[str, Any] = {"lr_scheduler_type": "cosine"}
        if self.final_rate:
            cosine = {
                "lr_scheduler_type": "cosine_with_min_lr",
                "lr_scheduler_kwargs": {"min_lr_rate": self.final_rate},
            }
        return {
            "num_train_epochs": 1,
            "per_device_train_batch_size": self.batch_size,
            "learning_rate": self.sessions_learning_rate if _stage(stage) == "sessions" else self.learning_rate,
            **cosine,
            "warmup_steps": self.warmup,
            "max_grad_norm": self.max_grad_norm,
            "weight_decay": self.weight_decay,
            "adam_beta1": beta1,
            "adam_beta2": beta2,
            "label_smoothing_factor": self.label_smoothing,
            "use_cpu": not torch.accelerator.is_available(),
            "bf16": torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
            "dataloader_pin_memory": torch.cuda.is_available(),
            "report_to": "none",
        }

    def arguments(self, stage: str, output_dir: str | os.PathLike[str], **overrides: Any) -> TrainingArguments:
        """`defaults` as `TrainingArguments`; ``overrides`` are further fields, and win."""
        defaults = self.defaults(stage)
        if "lr_scheduler_type" in overrides:
            defaults.pop("lr_scheduler_kwargs", None)  # they are of another one
        return TrainingArguments(output_dir=os.fspath(output_dir), **{**defaults, **overrides})


SETTINGS = {
    "ml-1m": Settings(learning_rate=8e-6, sessions_learning_rate=8e-6),
    "ml-100k": Settings(learning_rate=1e-5, sessions_learning_rate=3e-6, group_size=20),
    "goodreads": Settings(learning_rate=5e-5, sessions_learning_rate=5e-5, batch_size=32),
    # none of these is the paper's: pretrained models far below 1B, all parameters
    "pretrained-small": Settings(
        learning_rate=3e-4,
        sessions_learning_rate=1e-4,
        head_learning_rate=2e-3,
        max_grad_norm=1.0,
    ),
    # small models that start from random weights and learn titles
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
    # the same that learn items, with an item head
    "scratch-head": Settings(
        learning_rate=2e-3,
        sessions_learning_rate=2e-3,
        keep_text=0,
        sessions_keep_text=0,
        align="start",
        weight_decay=0.0,
        adam_betas=(0.9, 0.98),
        dropout=0.2,
        jitter=4.0,
        warmup=100,
        final_rate=0.02,
        max_grad_norm=1.0,
    ),
    # models of item ids
    "ids": Settings(
        learning_rate=2e-3,
        sessions_learning_rate=2e-3,
        keep_text=0,
        sessions_keep_text=0,
        align="start",
        adam_betas=(0.9, 0.98),
        dropout=0.3,
        warmup=100,
        final_rate=0.02,
        max_grad_norm=1.0,
    ),
}


def _stage(stage: str) -> str:
    if stage not in STAGES:
        raise ValueError(f"stage: expected one of {', '.join(STAGES)}, got {stage!r}")
    return stage
