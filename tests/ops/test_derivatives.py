# SPDX-License-Identifier: Apache-2.0
"""Derivatives that the ops do not have are refused: none comes out as zero."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import patchkern as pk
from patchkern.ops.hstu_attention import hstu_attention
from patchkern.ops.item_softmax import item_softmax
from patchkern.ops.span_attention import span_attention

SPANS = torch.tensor([0, 2, 5], dtype=torch.int32)
RANGES = torch.tensor([[0, 0], [0, 2]], dtype=torch.int32)

CATALOG = pk.Catalog.from_token_ids([5, 6, 7, 8, 9], [0, 2, 5])
LAYOUT = pk.build_layout(CATALOG, [[0, 1, 1], [0]], pk.ItemPatches(1), pk.Prompt(separator=[2]), transpose=True)
WEIGHT = torch.randn(LAYOUT.max_token_id + 1, 4, dtype=torch.float64)
ROWS = torch.randn(5, 2, 4, dtype=torch.float64)
HEADS = ROWS.transpose(0, 1)[None]

# each a function of one of its inputs
OPS: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
    "pool_rows": (lambda weight: pk.pool_rows(weight, LAYOUT), WEIGHT),
    "span_attention": (lambda query: span_attention(query, HEADS, HEADS, SPANS), HEADS),
    "span_attention with prefixes": (lambda key: span_attention(HEADS, key, HEADS, SPANS, prefix=RANGES), HEADS),
    "hstu_attention": (lambda value: hstu_attention(ROWS, ROWS, value, SPANS, normalizer=2.0), ROWS),
    "item_softmax": (lambda states: item_softmax(states, WEIGHT, WEIGHT[:, 0], torch.arange(5)), ROWS[:, 0]),
}


@pytest.fixture(params=OPS)
def op(request: pytest.FixtureRequest) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    return OPS[request.param]


def test_forward_mode_is_refused(op: tuple[Callable[[Tensor], Tensor], Tensor]) -> None:
    function, given = op
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward"):
        function(forward_ad.make_dual(given, torch.ones_like(given)))
    with forward_ad.dual_level():
        function(given)  # a tangent elsewhere is none of its business
    with pytest.raises((NotImplementedError, RuntimeError)):
        torch.func.jvp(function, (given,), (torch.ones_like(given),))


def test_a_second_derivative_is_refused(op: tuple[Callable[[Tensor], Tensor], Tensor]) -> None:
    function, given = op
    leaf = given.clone().requires_grad_()
    out = function(leaf)
    (grad,) = torch.autograd.grad(out.square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        (grad.square().sum() + out.sum()).backward()
