# SPDX-License-Identifier: Apache-2.0
"""Plans of training steps: what is tried in which order, what is said of it, and arguments that are refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from memory_cases import hf_model, make_model
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

import patchkern as pk
from patchkern.budget.counted_step import FakeModel
from patchkern.budget.step import Lora, PassShape, StepKind
from patchkern.budget.training import TrainingTooLarge
from patchkern.budget.training_cost import Choice, TrainingBytes, TrainingCost


@pytest.fixture(scope="module")
def model() -> Any:
    """Of two layers: what is tried in which order is the same for more, and each operator of them is counted."""
    config = copy.deepcopy(hf_model("llama", torch.float32).config)
    config.num_hidden_layers = 2
    return LlamaForCausalLM(config).eval()


ASKED = Choice(False, "adamw", None)


def test_less_is_changed_first(model: Any) -> None:
    choices = [ASKED, ASKED._replace(checkpointing=True), Choice(True, "adamw_bnb_8bit", None)]
    choices.append(Choice(True, "adamw", Lora()))
    cost = TrainingCost(model, PassShape(1000, 10, 0, 1000))
    wants = [cost.needed(1000, choice).peak for choice in choices]
    assert wants == sorted(wants, reverse=True)
    flags = [(), ("--activation_checkpointing",), ("--activation_checkpointing", "--optim adamw_bnb_8bit")]
    flags.append(("--activation_checkpointing", "--lora 16"))
    for budget, choice, changed in zip(wants, choices, flags, strict=True):
        plan = pk.plan_training(model, 1000, budget, logit_rows=10, least_rows=1000)
        assert (plan.choice, plan.rows_per_pass, plan.flags) == (choice, 1000, changed)
        assert plan.tried[-1] == (choice, 1000) and all(rows == 0 for _, rows in plan.tried[:-1])
    with pytest.raises(TrainingTooLarge, match=r"budget: expected at least \d+ bytes for 1000 rows per pass") as error:
        pk.plan_training(model, 1000, wants[-1] - 1, logit_rows=10, least_rows=1000)
    assert error.value.needed == wants[-1]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_forward_pass_says_what_a_row_keeps(model: Any, checkpointing: bool) -> None:
    fake, shape = FakeModel(model, None, None, None), PassShape(1000, 10, 0, 1000)
    kind = StepKind(checkpointing=checkpointing)
    assert fake.kept_per_row(shape, kind) == fake.count_step(shape, kind).kept_per_row > 0


def test_as_many_rows_as_fit(model: Any) -> None:
    budget = pk.plan_training(model, 3000, logit_rows=30).peak
    plan = pk.plan_training(model, 5000, budget, logit_rows=50, least_rows=500)
    assert 2900 <= plan.rows_per_pass <= 3000 and plan.choice.checkpointing is False
    assert plan.flags == (f"--rows_per_pass {plan.rows_per_pass}",)
    assert plan.peak <= budget < pk.plan_training(model, plan.rows_per_pass + 100, logit_rows=31).peak


def test_adapters_that_are_there_are_planned_with(model: Any) -> None:
    config = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    with torch.device("meta"):
        adapted = get_peft_model(type(model)(model.config), config)
    given = pk.plan_training(adapted, 100)
    made = pk.plan_training(model, 100, lora=16)
    assert given.needed == made.needed and given.choice.lora is None
    with pytest.raises(ValueError, match="lora: expected None, as the model has adapters, got 16"):
        pk.plan_training(adapted, 100, lora=16)


def test_a_table_says_what_is_planned() -> None:
    plan = pk.TrainingPlan(
        rows_per_pass=4096,
        choice=Choice(True, "adamw", None),
        needed=TrainingBytes(2 << 30, 1 << 30, 4 << 30, 3 << 28, 0, 1 << 20, 0, 1 << 20),
        budget=8 << 30,
        row_bytes=2 << 20,
        row_bytes_checkpointed=1 << 18,
        tried=((Choice(False, "adamw", None), 0), (Choice(True, "adamw", None), 4096)),
        asked=(8192, Choice(False, "adamw", None)),
    )
    assert str(plan).splitlines() == [
        "4,096 rows per pass, all parameters, adamw, activation checkpointing: peak 7.75 GiB of 8.00 GiB",
        "  weights         2.00 GiB",
        "  gradients       1.00 GiB",
        "  optimizer       4.00 GiB",
        "  activations    768.0 MiB",
        "  logits           1.0 MiB",
        "  workspace        1.0 MiB",
        "  a row keeps 2.0 MiB, 0.2 MiB with checkpointing",
        "          0 rows fit with all parameters, adamw",
        "      4,096 rows fit with all parameters, adamw, activation checkpointing",
        "  to fit: --rows_per_pass 4096 --activation_checkpointing",
    ]


def test_the_catalogue_says_how_many_items() -> None:
    patched = make_model()
    plan = pk.plan_training(patched, 100, head="items")
    assert plan.needed.weights > pk.plan_training(patched, 100).needed.weights
    bare = pk.plan_training(patched.hf_model, 100, head="items", n_items=60)
    integers = 12 * int(
        patched.catalog.inputs.offsets[-1]
    )  # of the titles' tokens, which a number of items leaves open
    assert bare.peak < plan.peak <= bare.peak + 1.02 * integers


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "lion"}, "optimizer: expected one of adamw, .*, got 'lion'"),
        ({"autocast": torch.float64}, "autocast: expected torch.bfloat16, torch.float16 or None, got torch.float64"),
        ({"head": "words"}, "head: expected 'titles', 'items' or 'both', got 'words'"),
        ({"head": "items"}, "n_items: expected the items of the catalogue with head='items', got None"),
        ({"logit_rows": 101}, "logit_rows: expected at most rows_per_pass, 100, got 101"),
        ({"item_rows": 5}, "item_rows: expected None with this head, got 5"),
        ({"budget": "40"}, "budget: expected bytes, such as"),
        ({"world_size": 0}, "world_size: expected an integer in 1..*, got 0"),
        ({"longest": 0}, r"longest: expected an integer in 1\.\..*, got 0"),
        ({"lora": 0}, r"lora: expected an integer in 1\.\..*, got 0"),
        ({"label_smoothing": 1.5}, "label_smoothing: expected a finite number of at least 0 and below 1, got 1.5"),
        ({"dtype": torch.int8}, "dtype: expected one of floating-point numbers, got torch.int8"),
        ({"device": "gpu0"}, "device: expected one that torch knows, got 'gpu0'"),
    ],
    ids=str,
)
def test_arguments_that_are_refused(model: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pk.plan_training(model, 100, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"checkpointing": "no"}, "checkpointing: expected a bool, got str"),
        ({"lora": True}, "lora: expected an integer, got bool"),
        ({"label_smoothing": "0.1"}, "label_smoothing: expected a number, got str"),
        ({"dtype": "float32"}, "dtype: expected a torch.dtype or None, got str"),
        ({"device": 0}, "device: expected a torch.device or its name, got int"),
    ],
    ids=str,
)
def test_types_that_are_refused(model: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        pk.plan_training(model, 100, **options)


@pytest.mark.parametrize("model", ["Llama-3.2-1B", None])
def test_what_is_no_model(model: Any) -> None:
    message = f"model: expected a transformers causal LM or its configuration, got {type(model).__name__}"
    with pytest.raises(TypeError, match=message):
        pk.plan_training(model)
    message = f"model_config: expected a model or its configuration, got {type(model).__name__}"
    with pytest.raises(TypeError, match=message):
        pk.plan_memory(model, [10], "1GiB")
