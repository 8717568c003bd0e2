# SPDX-License-Identifier: Apache-2.0
"""Training: settings, passes, collators, the trainer, validation."""

from patchkern.training.checkpoints import checkpoints, find_model
from patchkern.training.likelihood import item_log_probs, target_nll
from patchkern.training.protocol import TrainableModel
from patchkern.training.settings import SETTINGS, STAGES, Settings
from patchkern.training.trainer import PatchTrainer

__all__ = [
    "SETTINGS",
    "STAGES",
    "PatchTrainer",
    "Settings",
    "TrainableModel",
    "checkpoints",
    "find_model",
    "item_log_probs",
    "target_nll",
]
