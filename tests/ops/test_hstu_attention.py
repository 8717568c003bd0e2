# SPDX-License-Identifier: Apache-2.0
"""`hstu_attention` on every route against its reference: values, gradients, isolation, repeatability."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from span_cases import SPANS, Spans, leaves, visibility
from torch import Tensor

import patchkern as pk
from patchkern.ops import hstu_attention as hstu
from patchkern.ops import native as native_backend
from patchkern.ops import span_attention_native as native
from patchkern.ops import span_attention_prefixed as op
from patchkern.ops.hstu_attention import hstu_attention

NORMALIZER = 40.0
EXACT = pytest.mark.parametrize("route", ["native", "tiles"], indirect=True)  # the Triton kernels have no float64
NARROW = (torch.float32, torch.bfloat16, torch.float16)
ON_GPU = torch.cuda.is_available()
OF_GPU = [pytest.mark.gpu] if ON_GPU else []
device = "cpu"  # of a test's route
ROUNDED = [pytest.param(route, name, dtype) for route in ("native", "tiles") for name in SPANS for dtype in NARROW]
ROUNDED += [
    pytest.param("triton", name, dtype, marks=OF_GPU)
    for name in SPANS
    for dtype in NARROW
    # what is cheap enough for the interpreter
    if ON_GPU
    or name == "several ranges"
    or (
        dtype == torch.float32
        and name in ("no rows", "empty spans", "one row each", "prefixes that cross", "ranges empty in every place")
    )
]


@pytest.fixture(params=["native", "tiles", pytest.param("triton", marks=OF_GPU)])
def route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name: str = request.param
    if name == "tiles":
        monkeypatch.setattr(native, "serves", lambda query, dropout: False)
    elif name == "native":
        if not pk.backends()["native"].usable:
            pytest.skip(f"the native backend is not usable: {pk.backends()['native'].reason}")
    elif ON_GPU:
        monkeypatch.setattr(sys.modules[__name__], "device", "cuda")
    elif not pytest.importorskip("triton").knobs.runtime.interpret:
        pytest.skip("triton was imported without TRITON_INTERPRET=1")
    else:
        from patchkern.ops import span_attention_triton

        monkeypatch.setattr(op, "kernels", lambda *arguments: span_attention_triton)
    return name


def rows_of(spans: Spans, heads: tuple[int, int], width: int, value_width: int | None = None) -> list[Tensor | None]:
    """query, key, value, prefix_key and prefix_value: (rows, heads, width), float64."""
    return [None if x is None else x[0].transpose(0, 1).contiguous() for x in spans.tensors(heads, width, value_width)]


def attend(spans: Spans, tensors: Sequence[Tensor | None], scale: float = 0.3) -> Tensor:
    query, key, value, prefix_key, prefix_value = (None if x is None else x.to(device) for x in tensors)
    cu_seqlens, prefix = (x.to(device) for x in spans.integers)
    stored = {"prefix_key": prefix_key, "prefix_value": prefix_value}
    made = hstu_attention(query, key, value, cu_seqlens, normalizer=NORMALIZER, scale=scale, prefix=prefix, **stored)
    return made.cpu()


def expected(spans: Spans, tensors: Sequence[Tensor | None], scale: float = 0.3) -> Tensor:
    query, key, value, *stored = tensors
    return hstu.reference(query, key, value, *spans.raw, *stored, scale, NORMALIZER)


def both(function: Any, spans: Spans, tensors: Sequence[Tensor | None], dtype: torch.dtype) -> list[Tensor]:
    """The output and all gradients."""
    given = leaves(tensors, dtype)
    out = function(spans, given)
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).to(torch.bfloat16).view(out.shape).to(dtype)
    return [out, *torch.autograd.grad(out, [x for x in given if x is not None], weight)]


def bounds(spans: Spans, tensors: Sequence[Tensor | None], dtype: torch.dtype, scale: float = 0.3) -> list[Tensor]:
    """What rounding may change in the output and in each gradient, from the sizes of what is summed.

    Sums are float32, of n terms within n units of the sum of their sizes. silu' is at most 1.1 and silu'' at most 0.5,
    so an error e of a score is one of 1.1 e in its weight and 0.5 e in its slope. Weights, and the scores' gradients,
    may be rounded to ``dtype``, as results are.
    """
    query, key, value, prefix_key, prefix_value = (None if x is None else x.abs() for x in tensors)
    keys = key if prefix_key is None else prefix_key
    values = value if prefix_value is None else prefix_value
    groups = query.shape[1] // key.shape[1]
    size = {"q": query, "k": torch.cat([keys, key]), "v": torch.cat([values, value])}
    size |= {name: size[name].repeat_interleave(groups, dim=1) for name in "kv"}
    seen = visibility(spans, len(keys)).double()
    unit, rounding = torch.finfo(torch.float32).eps, torch.finfo(dtype).eps
    terms = 8 + max(query.shape[2], value.shape[2])
    grad = torch.linspace(-1, 1, query[..., 0].numel() * value.shape[2]).abs().double()
    grad = grad.view(*query.shape[:2], value.shape[2]) / NORMALIZER
    scores = torch.einsum("qhd,khd->hqk", query, size["k"]) * scale * seen
    wrong = terms * unit * scores
    back = torch.einsum("qhd,khd->hqk", grad, size["v"]) * seen
    weights, slopes = 1.1 * wrong + (8 * unit + rounding) * scores, back * (0.5 * wrong + 1.1 * terms * unit + rounding)
    long = len(seen) + terms

    def summed(form: str, of: Tensor, error: Tensor, other: Tensor) -> Tensor:
        return torch.einsum(form, error + (long * unit + rounding) * of, other)

    def collected(total: Tensor) -> list[Tensor]:
        """By key head; of rows that are their own prefixes, both sides together."""
        by_key = total.unflatten(1, (-1, groups)).sum(2)
        stored, own = by_key[: len(keys)], by_key[len(keys) :]
        return [own + stored] if prefix_key is None else [own, stored]

    out = summed("hqk,khd->qhd", scores, weights, size["v"]) / NORMALIZER
    of_query = summed("hqk,khd->qhd", 1.1 * back, slopes, size["k"]) * scale
    of_keys = collected(summed("hqk,qhd->khd", 1.1 * back, slopes, query) * scale)
    of_values = collected(summed("hqk,qhd->khd", scores, weights, grad))
    return [out, of_query, *(x for pair in zip(of_keys, of_values, strict=True) for x in pair)]


# ------------------------------------------------------------------ values and gradients


def test_reference_is_its_definition() -> None:
    spans = SPANS["several ranges"]
    query, key, value, *_ = rows_of(spans, (1, 1), 4)
    visible, rows = visibility(spans, len(key)), expected(spans, [query, key, value, None, None])
    for row in range(0, len(query), 5):
        seen = visible[row, : len(key)] | visible[row, len(key) :]
        scores = 0.3 * key[seen, 0] @ query[row, 0]
        torch.testing.assert_close(rows[row, 0], (scores * scores.sigmoid()) @ value[seen, 0] / NORMALIZER)


@EXACT
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)], ids=lambda h: f"heads={h[0]}/{h[1]}")
@pytest.mark.parametrize("name", SPANS)
def test_equals_reference(name: str, heads: tuple[int, int], route: str) -> None:
    tensors = rows_of(SPANS[name], heads, 12, value_width=5)
    got, wanted = (both(function, SPANS[name], tensors, torch.float64) for function in (attend, expected))
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("route", "name", "dtype"), ROUNDED, indirect=["route"], ids=str)
def test_within_what_rounding_explains(name: str, dtype: torch.dtype, route: str) -> None:
    spans = SPANS[name]
    tensors = [None if x is None else x.to(dtype).double() for x in rows_of(spans, (4, 2), 16)]
    got, wanted = both(attend, spans, tensors, dtype), both(expected, spans, tensors, torch.float64)
    for ours, theirs, bound in zip(got, wanted, bounds(spans, tensors, dtype), strict=True):
        assert ours.dtype == dtype
        if ours.numel():
            # float16 has no numbers between those that differ by its smallest
            smallest = torch.finfo(dtype).tiny * torch.finfo(dtype).eps
            assert ((ours - theirs).abs() <= bound + smallest).all()


@EXACT
def test_gradcheck(route: str) -> None:
    for spans in (
        Spans([2, 3], [(1, 4), (0, 0)], 5),
        Spans([2, 2, 1, 1], [[(2, 4), (0, 0)], [(0, 0), (0, 0)], [(0, 2), (2, 4)], [(0, 2), (2, 3)]]),
    ):
        tensors = leaves(rows_of(spans, (4, 2), 3, value_width=2))
        given = [x for x in tensors if x is not None]
        assert torch.autograd.gradcheck(lambda *x, s=spans: attend(s, (*x, *[None] * (5 - len(x)))), given)


@pytest.mark.parametrize("isa", native_backend.isa_levels() if pk.backends()["native"].usable else [])
def test_every_instruction_set(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native_backend.ENVIRONMENT, isa)
    spans = SPANS["ranges empty in every place"]
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        tensors = [None if x is None else x.to(dtype).double() for x in rows_of(spans, (6, 2), 21, value_width=37)]
        tolerance = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
        for ours, theirs in zip(
            both(attend, spans, tensors, dtype), both(expected, spans, tensors, torch.float64), strict=True
        ):
            assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_scores_far_from_zero(route: str) -> None:
    dtype = torch.float32
    spans = Spans([10, 5], [(0, 0), (0, 10)])
    tensors = [None if x is None else 200 * x for x in rows_of(spans, (2, 1), 8)]
    tensors = [None if x is None else x.to(dtype).double() for x in tensors]
    for ours, theirs in zip(
        both(attend, spans, tensors, dtype), both(expected, spans, tensors, torch.float64), strict=True
    ):
        assert (ours - theirs).abs().max() <= 1e3 * torch.finfo(dtype).eps * theirs.abs().max()


# ------------------------------------------------------------------ what stays the same


def test_bitwise_repeatable_and_so_are_spans_with_empty_ranges(route: str) -> None:
    spans = SPANS["trunk and branches" if route != "triton" else "one row each"]
    tensors = rows_of(spans, (4, 2), 16)
    first = both(attend, spans, tensors, torch.float32)
    more = spans._replace(prefix=[[(3, 3), span] for span in spans.prefix])
    for other in (spans, more):
        assert all(torch.equal(a, b) for a, b in zip(first, both(attend, other, tensors, torch.float32), strict=True))


def test_rows_outside_the_visible_set_change_nothing(route: str) -> None:
    spans = SPANS["several ranges"]
    rows = sum(spans.lengths)
    tensors = [None if x is None else x.float() for x in rows_of(spans, (4, 2), 8)]
    before, visible = attend(spans, tensors), visibility(spans, rows)
    for row in (0, 5, 16, 17, 30) if route != "triton" else (5, 17):
        changed = [None if x is None else x.clone() for x in tensors]
        for at in (1, 2):
            changed[at][row] = torch.randn_like(changed[at][row])
        moved = (attend(spans, changed) != before).flatten(1).any(dim=1)
        assert torch.equal(moved, visible[:, row] | visible[:, rows + row])


def test_the_whole_and_its_continuation_are_alike() -> None:
    """A constant divides: rows over a stored past are those of one long span."""
    whole = Spans([50], [(0, 0)])
    query, key, value, *_ = rows_of(whole, (2, 2), 8)
    rows = attend(whole, (query, key, value, None, None))
    rest = attend(Spans([20], [[(0, 12), (12, 30)]], 30), (query[30:], key[30:], value[30:], key[:30], value[:30]))
    torch.testing.assert_close(rest, rows[30:], rtol=1e-13, atol=1e-13)


def test_nothing_but_the_arguments_is_kept_for_the_gradient() -> None:
    spans = SPANS["trunk and branches"]
    tensors = leaves(rows_of(spans, (4, 2), 8))
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        attend(spans, tensors)
    floats = {x.data_ptr() for x in tensors if x is not None}
    assert {x.data_ptr() for x in kept if x.is_floating_point()} == floats


# ------------------------------------------------------------------ PyTorch's other features, and errors


@pytest.mark.unpoisoned("opcheck compares whole memory")
def test_opcheck() -> None:
    spans = SPANS["ranges empty in every place"]
    query, key, value, *stored = (None if x is None else x.float() for x in rows_of(spans, (4, 2), 8))
    inputs = (query, key, value, *spans.raw, *stored, 0.3, 5.0)
    torch.library.opcheck(torch.ops.patchkern.hstu_attention.default, inputs)
    grad = torch.ops.patchkern.hstu_attention_grad.default
    torch.library.opcheck(grad, (torch.randn(query.shape), *inputs))


def test_compiles_without_a_graph_break() -> None:
    spans = SPANS["several ranges"]
    tensors = leaves(rows_of(spans, (4, 2), 8), torch.float32)
    compiled = torch.compile(lambda *x: attend(spans, (*x, None, None)), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*tensors[:3]), attend(spans, tensors))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"scale": float("nan")}, ValueError, r"scale: expected a finite number, got nan"),
        ({"normalizer": 0.0}, ValueError, r"normalizer: expected a finite number above 0, got 0.0"),
        ({"normalizer": -1.0}, ValueError, r"normalizer: .*got -1.0"),
        ({"normalizer": float("nan")}, ValueError, r"normalizer: .*got nan"),
        ({"normalizer": float("inf")}, ValueError, r"normalizer: .*got inf"),
        ({"query": torch.zeros(1, 4, 35, 8)}, ValueError, r"query: expected 3 dimensions, \(rows, heads, width\), got"),
        ({"query": torch.zeros(35, 3, 8)}, ValueError, r"query: expected shape \(T, a multiple of 2, d\), got"),
        ({"key": torch.zeros(34, 2, 8)}, ValueError, r"key: expected shape \(35, 2, 8\), got \(34, 2, 8\)"),
        (
            {"value": torch.zeros(35, 2, 8)},
            TypeError,
            r"value: expected query's dtype, torch.float64, got torch.float3",
        ),
        ({"prefix": None}, ValueError, r"prefix: expected the rows .* got None"),
        ({"prefix_key": None}, ValueError, r"prefix_key: expected prefix_key and prefix_value together"),
        (
            {"prefix": torch.tensor([[[0, 9], [8, 12]]] * 5, dtype=torch.int32)},
            ValueError,
            r"prefix\[0, 1\]: expected rows that neither the span nor an earlier range of it has, got \[8, 12\]",
        ),
    ],
)
def test_wrong_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    spans = SPANS["prefixes that cross"]
    names = ("query", "key", "value", "prefix_key", "prefix_value")
    given = dict(zip(names, rows_of(spans, (4, 2), 8), strict=True)) | dict(
        zip(("cu_seqlens", "prefix"), spans.integers, strict=True)
    )
    with pytest.raises(error, match=message):
        hstu_attention(**{"normalizer": 3.0, **given, **change})
