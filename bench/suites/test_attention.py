# SPDX-License-Identifier: Apache-2.0
"""Span attention over shared prefixes, against one `scaled_dot_product_attention` per span."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch

from bench import bench_attention
from bench.suites.entry import Entry, paired

SCALE = 5
CASES = bench_attention.cases(SCALE)
PEER = "sdpa per span"


class Case:
    """One shape of spans, and what a provider does with it, once that has been right."""

    def __init__(self, name: str) -> None:
        spans = CASES[name]
        rows = sum(spans.lengths)
        torch.manual_seed(0)
        self.inputs = bench_attention.make_inputs(spans, torch.device("cpu"), torch.float32, flex=False)
        self.grad = torch.randn(1, rows, bench_attention.HEADS, bench_attention.WIDTH)
        self._right: set[str] = set()
        self.group = f"span_attention, {name.partition(' of ')[0]}, {rows} rows"

    def checked(self, mode: str, provider: str) -> Callable[[], object]:
        if provider not in self._right:
            assert not bench_attention.check([provider], self.inputs, self.grad)
            self._right.add(provider)
        attend = bench_attention.PROVIDERS[provider]
        if mode == "forward":
            return functools.partial(bench_attention.infer, attend, self.inputs)
        return functools.partial(bench_attention.train, attend, self.inputs, self.grad)


@pytest.fixture(scope="module", params=CASES, ids=lambda name: name.replace(" ", "_"))
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


@pytest.mark.parametrize("provider", ["patchkern", PEER])
@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
def test_attention(case: Case, mode: str, provider: str, entry: Entry) -> None:
    entry.time(f"{case.group}, {mode}", case.checked(mode, provider))


@paired
@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
def test_paired(case: Case, mode: str, entry: Entry) -> None:
    entry.pair(f"{case.group}, {mode}", case.checked(mode, "patchkern"), PEER, case.checked(mode, PEER))
