# SPDX-License-Identifier: Apache-2.0
"""What only the native kernels of span attention have: instruction sets, threads, blocks, spans without prefixes."""

from __future__ import annotations

import itertools

import pytest
import torch
from span_cases import SPANS, Spans, expected, gradients, leaves
from torch import Tensor

import patchkern as pk
from patchkern.ops import native
from patchkern.ops.span_attention import span_attention

if not pk.backends()["native"].usable:
    pytest.skip(f"the native backend is not usable: {pk.backends()['native'].reason}", allow_module_level=True)

HEADS, WIDTH = (6, 2), 16
# users' trunks and branches, long enough for threads: 3 of them are a user with a trunk, the rest have none
CROWD = Spans(
    [150, 40, 30, 0, 90, 9, 7, 120, 60, 200, 33],
    [(0, 0), (0, 90), (0, 150), (0, 0), (0, 0), (220, 230), (220, 310), (0, 0), (326, 446), (0, 0), (0, 0)],
)
# two users with two ranges, of which one sees rows after its own
RANGES = Spans(
    [40, 20, 90, 30, 60, 40, 20, 90],
    [
        *[[(0, 0), (0, 0)], [(60, 150), (0, 40)], [(0, 40), (0, 0)], [(0, 60), (60, 100)]],
        *[[(0, 60), (60, 150)], [(0, 0), (0, 0)], [(240, 280), (300, 390)], [(0, 0), (240, 280)]],
    ],
)


def attend(spans: Spans, tensors: list[Tensor | None]) -> Tensor:
    query, key, value, prefix_key, prefix_value = tensors
    cu_seqlens, prefix = spans.integers
    stored = {"prefix_key": prefix_key, "prefix_value": prefix_value}
    return span_attention(query, key, value, cu_seqlens, prefix=prefix, **stored)


def both_passes(spans: Spans, tensors: list[Tensor | None], weight: Tensor) -> list[Tensor]:
    given = [None if x is None else x.detach().requires_grad_() for x in tensors]
    out = attend(spans, given)
    return [out.detach(), *gradients(out, given, weight)]


@pytest.mark.parametrize("isa", native.isa_levels())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("spans", [CROWD, SPANS["ranges empty in every place"]], ids=["crowd", "ranges"])
def test_every_instruction_set(spans: Spans, dtype: torch.dtype, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.ENVIRONMENT, isa)
    exact = [None if x is None else x.to(dtype).double() for x in spans.tensors(HEADS, 21, value_width=37)]
    tensors = leaves(exact)
    wanted = expected(spans, tensors, 21**-0.5)
    weight = torch.randn_like(wanted).to(dtype).double()
    wanted = [wanted, *gradients(wanted, tensors, weight)]
    tolerance = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    got = both_passes(spans, [None if x is None else x.to(dtype) for x in exact], weight.to(dtype))
    for ours, theirs in zip(got, wanted, strict=True):
        assert ours.dtype == dtype
        assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


@pytest.mark.parametrize("spans", [CROWD, CROWD._replace(stored=700), RANGES], ids=["own rows", "apart", "ranges"])
def test_any_number_of_threads_is_the_same_bit_for_bit(spans: Spans) -> None:
    tensors = leaves(spans.tensors(HEADS, 64), torch.float32)
    weight = torch.randn(1, sum(spans.lengths), HEADS[0], 64)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            results.append(both_passes(spans, tensors, weight))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_user_is_the_same_bit_for_bit_whoever_else_is_in_the_batch() -> None:
    """Forward and backward, a trunk with branches and a span alone: each by itself, and between others."""
    users = [
        Spans([90, 9, 7], [(0, 0), (0, 50), (0, 90)]),
        Spans([33], [(0, 0)]),
        Spans([150, 40, 30], [(0, 0), (0, 90), (0, 150)]),
        Spans([1], [(0, 0)]),
        Spans([200], [(0, 0)]),
        Spans([20, 9, 80, 7], [[(0, 0), (0, 0)], [(29, 109), (0, 20)], [(0, 20), (0, 0)], [(0, 29), (29, 70)]]),
    ]
    begins = [0, *itertools.accumulate(sum(user.lengths) for user in users)]
    ranges = [
        [(a + begin, b + begin) for a, b in [*span, (0, 0)][:2]]
        for user, begin in zip(users, begins, strict=False)
        for span in user.ranges
    ]
    batch = Spans([length for user in users for length in user.lengths], ranges)
    tensors = [None if x is None else x.float() for x in batch.tensors(HEADS, WIDTH)]
    weight = torch.randn(1, begins[-1], HEADS[0], WIDTH)
    together = both_passes(batch, tensors, weight)
    for user, begin, end in zip(users, begins[:-1], begins[1:], strict=True):
        own = [None if x is None else x[:, :, begin:end] for x in tensors]
        alone = both_passes(user, own, weight[:, begin:end])
        assert torch.equal(alone[0], together[0][:, begin:end])
        for ours, theirs in zip(alone[1:], together[1:], strict=True):
            assert torch.equal(ours, theirs[:, :, begin:end])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_packed_spans_without_prefixes_take_one_call(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", None)
    spans = Spans([70, 1, 0, 200, 33], [(0, 0)] * 5)
    query, key, value, *_ = leaves(spans.tensors(HEADS, 64), dtype)
    cu_seqlens, none = spans.integers
    weight = torch.randn(1, sum(spans.lengths), HEADS[0], 64)
    out = span_attention(query, key, value, cu_seqlens, max(spans.lengths), sliding_window=200)
    got = [out, *gradients(out, [query, key, value], weight)]
    out = span_attention(query, key, value, cu_seqlens, prefix=none)
    for ours, theirs in zip(got, [out, *gradients(out, [query, key, value], weight)], strict=True):
        assert torch.equal(ours, theirs)


def test_a_window_that_hides_something_is_not_forgotten() -> None:
    spans = Spans([9], [(0, 0)])
    query, key, value, *_ = spans.tensors((2, 2), 8)
    cu_seqlens, _ = spans.integers
    narrow, wide = (span_attention(query, key, value, cu_seqlens, 9, sliding_window=n) for n in (8, 9))
    torch.testing.assert_close(narrow[:, :8], wide[:, :8])
    assert (narrow[:, 8] - wide[:, 8]).abs().max() > 1e-3


def test_more_heads_of_one_key_head_than_a_block_has_lanes() -> None:
    spans = Spans([5, 2, 3], [(0, 0), (0, 5), (1, 4)])
    tensors = leaves(spans.tensors((210, 1), 4))
    wanted = expected(spans, tensors, 0.5)
    weight = torch.randn_like(wanted)
    for ours, theirs in zip(
        both_passes(spans, tensors, weight), [wanted, *gradients(wanted, tensors, weight)], strict=True
    ):
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("isa", native.isa_levels())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_narrow_number_comes_back(dtype: torch.dtype, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that sees itself alone gives its value back: all numbers there are, infinities and NaN among them."""
    monkeypatch.setenv(native.ENVIRONMENT, isa)
    value = torch.arange(1 << 16).to(torch.uint16).view(dtype).view(1, 1, -1, 64)
    query, rows = torch.zeros(1, 1, 1024, 64, dtype=dtype), torch.arange(1025, dtype=torch.int32)
    got = span_attention(query, query, value, rows)[0]
    assert torch.equal(got.nan_to_num(1.5, 2.5, 3.5), value[0].transpose(0, 1).nan_to_num(1.5, 2.5, 3.5))
    assert torch.equal(got.isnan(), value[0].transpose(0, 1).isnan())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_scores_far_apart(dtype: torch.dtype) -> None:
    """Weights that vanish are zero, not what the exponential does beyond its range."""
    spans = Spans([40, 30], [(0, 0), (0, 40)])
    tensors = leaves([None if x is None else 60 * x for x in spans.tensors((2, 1), 8)], dtype)
    wanted = expected(spans, leaves(tensors), 8**-0.5)
    got = attend(spans, tensors)
    assert (got - wanted).abs().max() <= 1e3 * torch.finfo(dtype).eps * wanted.abs().max()
    assert all(grad.isfinite().all() for grad in gradients(got, tensors, torch.randn(got.shape)))


def test_what_does_not_fit_is_refused_before_anything_is_read() -> None:
    query = torch.zeros(1, 4, 10, 8)
    cu_seqlens = torch.tensor([0, 4, 10], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"key: expected shape \(1, 4, 10, 8\), got \(1, 4, 9, 8\)"):
        span_attention(query, query[:, :, :9], query, cu_seqlens)
    with pytest.raises(ValueError, match="cu_seqlens: expected non-decreasing offsets from 0 to 10, got 0 to 11"):
        span_attention(query, query, query, torch.tensor([0, 4, 11], dtype=torch.int32))
    with pytest.raises(TypeError, match=r"cu_seqlens: expected dtype torch.int32, got torch.int64"):
        span_attention(query, query, query, cu_seqlens.long())
