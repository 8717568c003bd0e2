# SPDX-License-Identifier: Apache-2.0
"""`pool_rows` and its gradient: backends, PyTorch's ways, the reference, and a copy of as many rows."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import patchkern as pk
from bench import pool_rows_providers as providers
from bench.suites.entry import Entry, paired
from bench.workloads import POLICIES, Workload

# No result reaches 32 MiB, from which on glibc takes fresh pages for each, and their faults would be most of the time.
USERS, TOKENS, WIDTH = 16, 4096, 1024
CPU = torch.device("cpu")
KERNELS = providers.kernels(CPU, torch.float32)
FORWARD = [*(name + how for name in KERNELS for how in ("", "+alloc", "+table"))]
FORWARD += ["embedding_bag", "index_add", "segment_reduce", "reference", "copy"]
BACKWARD = [*(name + how for name in KERNELS for how in (" compact", " dense"))]
BACKWARD += ["embedding_bag dense", "embedding_bag sparse", "reference", "copy"]
BASELINES = {"forward": "embedding_bag", "compact": "embedding_bag sparse", "dense": "embedding_bag dense"}


class Direction(NamedTuple):
    """The providers of one shape."""

    group: str
    calls: providers.Calls
    error: Callable[[str, Tensor], str | None]
    out: Tensor  # what some of them write to

    def checked(self, provider: str) -> Callable[[], Tensor]:
        """The provider's call, once it has been right."""
        self.out.fill_(float("nan"))
        reason = self.error(provider, self.calls[provider]())
        assert reason is None, f"{provider}: {reason}"
        return self.calls[provider]


class Case(NamedTuple):
    forward: Direction
    backward: Direction


@pytest.fixture(scope="module", params=["items-bfloat16", "sessions-float32"])
def case(request: pytest.FixtureRequest, small_vocabulary: Workload) -> Case:
    policy, _, dtype = request.param.partition("-")
    workload = small_vocabulary
    histories, targets = workload.samples(USERS)
    layout = pk.build_layout(workload.catalog, histories, POLICIES[policy], workload.prompt, targets)
    weight = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype))
    grad = torch.randn(layout.num_rows, WIDTH, generator=torch.Generator().manual_seed(1)).to(weight.dtype)
    out, copied = torch.empty_like(grad), torch.empty_like(grad)

    def direction(name: str, calls: providers.Calls, error: Callable[[str, Tensor], str | None]) -> Direction:
        def right(provider: str, got: Tensor) -> str | None:
            if provider == "copy":
                return None if torch.equal(got, grad) else "not a copy"
            return error(provider, got)

        shape = f"{policy}, {dtype}, {layout.num_rows} rows of {WIDTH}"
        return Direction(f"{name}, {shape}", calls | {"copy": lambda: copied.copy_(grad)}, right, out)

    forward = providers.backends_forward(weight, layout, pk.item_table(workload.catalog, weight), out)
    forward |= providers.peers_forward(weight, layout)
    backward = providers.backends_backward(grad, layout, TOKENS) | providers.peers_backward(weight, layout, grad)
    backward["reference"] = functools.partial(pk.pool_rows_grad, grad, layout, TOKENS, dense=False, backend="reference")
    return Case(
        direction("pool_rows", forward, providers.forward_error(weight, layout)),
        direction("pool_rows_grad", backward, providers.backward_error(grad, layout, TOKENS)),
    )


@pytest.mark.parametrize("provider", FORWARD)
def test_forward(case: Case, provider: str, entry: Entry) -> None:
    entry.time(case.forward.group, case.forward.checked(provider))


@pytest.mark.parametrize("provider", BACKWARD)
def test_backward(case: Case, provider: str, entry: Entry) -> None:
    entry.time(case.backward.group, case.backward.checked(provider))


@paired
@pytest.mark.parametrize("mode", BASELINES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_paired(case: Case, kernel: str, mode: str, entry: Entry) -> None:
    direction, ours = (case.forward, kernel) if mode == "forward" else (case.backward, f"{kernel} {mode}")
    baseline = BASELINES[mode]
    entry.pair(direction.group, direction.checked(ours), baseline, direction.checked(baseline))
