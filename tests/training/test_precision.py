# SPDX-License-Identifier: Apache-2.0
"""bfloat16: measured without a trace, and weights in it that a step cannot move."""

from __future__ import annotations

import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from training_cases import UNTUNED, make_data, make_model

import patchkern as pk
from patchkern.training import PatchTrainer
from patchkern.training.precision import Speed, measure_autocast, product_ratio, share_at_rest


def test_measuring_leaves_no_trace() -> None:
    model, _ = make_model()
    model.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    histories, _ = make_data()
    layout = pk.build_layout(
        model.catalog, [history[:4] for history in histories], pk.TextOnly(), model.prompt, [10] * len(histories)
    )
    state = torch.random.get_rng_state()
    speed = measure_autocast(model, layout)
    assert 0 < speed.float32 < 60 and 0 < speed.bfloat16 < 60
    assert torch.equal(torch.random.get_rng_state(), state) and not model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_products_are_compared_by_the_best_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    float32, bfloat16 = [9.0, 2.0, 3.0, 2.0], [30.0, 7.0, 6.0, 8.0]
    clock = iter(np.repeat(np.cumsum([0.0, *float32, *bfloat16]), 2)[1:-1])
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))
    assert product_ratio(torch.device("cpu")) == 3.0


def test_a_small_gain_is_none() -> None:
    assert Speed(1.3, 1.0).bfloat16_pays and not Speed(1.1, 1.0).bfloat16_pays and not Speed(1.0, 2.0).bfloat16_pays


@pytest.mark.parametrize("learning_rate", [1e-5, 3e-4, 1e-2])
def test_weights_at_rest_are_those_that_a_step_rounds_away(learning_rate: float) -> None:
    weights = (0.05 * torch.randn(20_000, generator=torch.Generator().manual_seed(0))).bfloat16()
    # away from zero: towards it the digits may be finer
    stepped = (weights.double() + learning_rate * weights.double().sign()).bfloat16()
    expected = float((stepped == weights).double().mean())
    assert share_at_rest([weights, torch.ones(5)], learning_rate) == pytest.approx(expected, abs=5e-3)
    assert share_at_rest([torch.ones(5)], learning_rate) == 0.0


def test_a_rate_that_bfloat16_weights_round_away_is_warned_of(tmp_path: Path) -> None:
    histories, samples = make_data()
    model, _ = make_model()
    arguments = UNTUNED.arguments("items", tmp_path, learning_rate=1e-5, use_cpu=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PatchTrainer(model, arguments, histories, samples, pk.TextOnly(10), rows_per_pass=250)
    with pytest.warns(UserWarning, match=r"learning_rate: 1e-05 is too low to move [89]\d% of the model's bfloat16"):
        PatchTrainer(model.bfloat16(), arguments, histories, samples, pk.TextOnly(10), rows_per_pass=250)
