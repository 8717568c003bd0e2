# SPDX-License-Identifier: Apache-2.0
"""The published settings, by data set and stage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

import patchkern as pk
from patchkern.training import SETTINGS


def test_settings_are_the_papers(tmp_path: Path) -> None:
    table = {name: asdict(settings) for name, settings in SETTINGS.items()}
    assert {name: table[name]["learning_rate"] for name in ("ml-1m", "goodreads", "ml-100k")} == {
        "ml-1m": 8e-6,
        "goodreads": 5e-5,
        "ml-100k": 1e-5,
    }
    assert {name: table[name]["batch_size"] for name in ("ml-1m", "goodreads", "ml-100k")} == {
        "ml-1m": 64,
        "goodreads": 32,
        "ml-100k": 64,
    }
    arguments = SETTINGS["ml-100k"].arguments("sessions", tmp_path)
    assert arguments.learning_rate == 3e-6
    assert (arguments.lr_scheduler_type, arguments.warmup_steps, arguments.max_grad_norm) == ("cosine", 0.05, 0.3)
    assert (arguments.num_train_epochs, arguments.weight_decay, arguments.report_to) == (1, 0.0, [])
    assert "adamw" in arguments.optim
    assert SETTINGS["ml-100k"].arguments("items", tmp_path, learning_rate=0.5).learning_rate == 0.5
    assert SETTINGS["ml-100k"].policy("sessions") == pk.SessionPatches(20, 100)
    without_text = pk.SessionPatches(5, None, align="start", keep_text=0)
    assert SETTINGS["scratch-head"].policy("sessions", None) == SETTINGS["ids"].policy("sessions", None) == without_text
    assert SETTINGS["ml-1m"].policy("items", None) == pk.ItemPatches(5, None)
    assert SETTINGS["ml-1m"].policy("sft") == pk.TextOnly(100)


@pytest.mark.parametrize("call", [SETTINGS["ml-1m"].policy, lambda stage: SETTINGS["ml-1m"].arguments(stage, "x")])
def test_unknown_stage_is_named(call: Callable[[str], Any]) -> None:
    with pytest.raises(ValueError, match="stage: expected one of sft, pretrain, items, sessions, got 'patch'"):
        call("patch")


def test_settings_of_ones_own_schedule(tmp_path: Path) -> None:
    arguments = SETTINGS["scratch-head"].arguments("items", tmp_path)
    assert (arguments.lr_scheduler_type, arguments.lr_scheduler_kwargs) == ("cosine_with_min_lr", {"min_lr_rate": 0.02})
    assert (arguments.warmup_steps, arguments.max_grad_norm, arguments.learning_rate) == (100, 1.0, 2e-3)
    other = SETTINGS["scratch-head"].arguments("items", tmp_path, lr_scheduler_type="linear")
    assert other.lr_scheduler_kwargs is None, "they belong to the cosine"
    small = SETTINGS["pretrained-small"]
    assert (small.learning_rate, small.head_learning_rate) == (3e-4, 2e-3)
    assert SETTINGS["ml-1m"].arguments("items", tmp_path).lr_scheduler_kwargs is None


def test_bfloat16_is_allowed_on_a_machine_without_gpu(tmp_path: Path) -> None:
    arguments = SETTINGS["ml-1m"].arguments("items", tmp_path, bf16=True)
    assert arguments.bf16 and arguments.use_cpu != torch.accelerator.is_available()
