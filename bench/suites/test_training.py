# SPDX-License-Identifier: Apache-2.0
"""An optimisation step of a small model: the obvious way and packed, a sample for each target and all in one pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import patchkern as pk
from bench.suites.entry import Entry, paired
from bench.workloads import Workload

pytest.importorskip("transformers")
from bench.training_providers import PASSES, PROVIDERS, TOLERANCE, make_model, take_step, whole_users

POLICY = {"one": pk.ItemPatches(keep_text=5, max_items=50), "all": pk.ItemPatches(keep_text=5, max_items=None)}


class Case(NamedTuple):
    targets: str
    workload: Workload

    @property
    def group(self) -> str:
        return "training step, " + {"one": "8 samples", "all": "every target of 2 users"}[self.targets]

    def checked(self, provider: str) -> Callable[[], object]:
        """A step whose first loss and gradient norm were those of the slow way."""
        step = self._step(provider)
        got, expected = step(), self._step(PROVIDERS[self.targets][0])()
        np.testing.assert_allclose(got, expected, rtol=TOLERANCE, err_msg=f"{provider}: loss and norm of the gradient")
        return step

    def _step(self, provider: str) -> Callable[[], tuple[float, float]]:
        workload = self.workload
        batch = workload.samples(8) if self.targets == "one" else whole_users(workload, 2, seed=0, most_items=40)
        model: Any = make_model(64, 2, 4096)
        if provider != "reference":
            model = pk.PatchedCausalLM(model, workload.catalog, workload.prompt)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

        def step() -> tuple[float, float]:
            ways = PASSES[provider](model, workload, *batch, POLICY[self.targets], rows_per_pass=4096)
            losses, norm = take_step(model, optimizer, ways)
            return sum(losses), norm

        return step


@pytest.mark.parametrize(("targets", "provider"), [(key, name) for key, names in PROVIDERS.items() for name in names])
def test_step(small_vocabulary: Workload, targets: str, provider: str, entry: Entry) -> None:
    case = Case(targets, small_vocabulary)
    entry.time(case.group, case.checked(provider))


@paired
@pytest.mark.parametrize("targets", PROVIDERS)
def test_paired(small_vocabulary: Workload, targets: str, entry: Entry) -> None:
    case = Case(targets, small_vocabulary)
    slow, fast = PROVIDERS[targets]
    entry.pair(case.group, case.checked(fast), slow, case.checked(slow))
