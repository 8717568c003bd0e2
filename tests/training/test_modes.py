# SPDX-License-Identifier: Apache-2.0
"""Whatever asks something of a model leaves every module of it in the mode that it was in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from training_cases import make_data, make_model

import patchkern as pk
from patchkern.training import target_nll
from patchkern.training.modes import in_mode
from patchkern.training.precision import measure_autocast
from patchkern.training.validation import Validation

POLICY = pk.ItemPatches(2, 10)


def ask_nll(model: Any) -> None:
    histories, (users, positions) = make_data()
    target_nll(model, histories, (users[:2], positions[:2]), POLICY)


def ask_validation(model: Any) -> None:
    histories, (users, positions) = make_data()
    Validation(model, histories, (users[:2], positions[:2]), POLICY).measure(model, range(2), 2)


def ask_speed(model: Any) -> None:
    histories, _ = make_data()
    measure_autocast(model, pk.build_layout(model.catalog, histories.take([0]), POLICY, model.prompt, [10]))


@pytest.mark.parametrize("ask", [ask_nll, ask_validation, ask_speed])
def test_modes_are_left_as_they_were(ask: Callable[[Any], None]) -> None:
    model, _ = make_model()
    model.train()
    model.hf_model.model.layers[0].eval()  # as if frozen
    before = [module.training for module in model.modules()]
    ask(model)
    assert [module.training for module in model.modules()] == before
    assert len(set(before)) == 2


def test_also_where_it_fails() -> None:
    model, _ = make_model()
    model.train()
    with pytest.raises(KeyError), in_mode(model, training=False):
        assert not any(module.training for module in model.modules())
        raise KeyError
    assert all(module.training for module in model.modules())
