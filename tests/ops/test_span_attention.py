# SPDX-License-Identifier: Apache-2.0
"""The op `span_attention` against its reference: values, gradients, isolation, and what it keeps in memory."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from span_cases import SPANS, Spans, expected, gradients, leaves, sdpa, visibility
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import patchkern as pk
from patchkern.ops import span_attention_native as native
from patchkern.ops import span_attention_tiles as tiles
from patchkern.ops.span_attention import span_attention


def attend(spans: Spans, tensors: Sequence[Tensor | None], **options: Any) -> Tensor:
    query, key, value, prefix_key, prefix_value = tensors
    cu_seqlens, prefix = spans.integers
    stored = {"prefix_key": prefix_key, "prefix_value": prefix_value}
    return span_attention(query, key, value, cu_seqlens, prefix=prefix, **stored, **options)


@pytest.fixture(params=["native", "tiles"], autouse=True)
def route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test by the native kernels, and without them."""
    if request.param == "tiles":
        monkeypatch.setattr(native, "serves", lambda query, dropout: False)
    elif not pk.backends()["native"].usable:
        pytest.skip(f"the native backend is not usable: {pk.backends()['native'].reason}")


# ------------------------------------------------------------------ values and gradients


def test_reference_sees_what_its_definition_says() -> None:
    for spans in SPANS.values():
        tensors = spans.tensors((4, 2), 8)
        if sum(spans.lengths):
            torch.testing.assert_close(expected(spans, tensors, 0.3), sdpa(spans, tensors, 0.3))


@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (8, 1), (6, 2)], ids=lambda h: f"heads={h[0]}/{h[1]}")
@pytest.mark.parametrize("name", SPANS)
def test_equals_reference(name: str, heads: tuple[int, int]) -> None:
    spans = SPANS[name]
    tensors = leaves(spans.tensors(heads, 8))
    got, wanted = attend(spans, tensors, scaling=0.3), expected(spans, tensors, 0.3)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(wanted)
    for ours, theirs in zip(*(gradients(out, tensors, weight) for out in (got, wanted)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("width", [1, 64, 80, 128, 256])
def test_head_widths(width: int) -> None:
    spans = SPANS["trunk and branches"]
    tensors = leaves(spans.tensors((2, 1), width))
    got, wanted = attend(spans, tensors), expected(spans, tensors, width**-0.5)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def test_values_may_be_narrower_than_keys() -> None:
    for name in ("trunk and branches", "prefixes that cross"):
        tensors = leaves(SPANS[name].tensors((4, 2), 12, value_width=5))
        got, wanted = attend(SPANS[name], tensors, scaling=1.0), expected(SPANS[name], tensors, 1.0)
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
        weight = torch.randn_like(wanted)
        for ours, theirs in zip(*(gradients(out, tensors, weight) for out in (got, wanted)), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["trunk and branches", "forty share one", "a long span"])
def test_no_less_exact_than_torch(name: str, dtype: torch.dtype) -> None:
    """Error against float64 at most twice that of SDPA with a mask in the same dtype."""
    spans = SPANS[name]
    exact = [None if x is None else x.to(dtype).double() for x in spans.tensors((4, 2), 64)]
    weight = torch.randn(1, sum(spans.lengths), 4, 64).to(dtype).double()
    results = []
    for function, kind in ((expected, torch.float64), (sdpa, dtype), (attend, dtype)):
        tensors = leaves(exact, kind)
        out = function(spans, tensors, scaling=0.125)
        assert out.dtype == kind
        results.append([out, *gradients(out, tensors, weight)])
    for true, theirs, ours in zip(*results, strict=True):
        floor = torch.finfo(dtype).eps * true.abs().max()
        assert (ours - true).abs().max() <= 2 * (theirs - true).abs().max() + floor


def test_gradcheck() -> None:
    for spans in (
        Spans([4, 3, 0, 2, 2], [(0, 0), (0, 3), (0, 4), (1, 4), (0, 4)]),
        Spans([2, 3], [(1, 4), (0, 0)], 5),
        Spans([2, 2, 1, 1], [[(0, 0), (2, 4)][::-1], [(0, 0), (0, 0)], [(0, 2), (2, 4)], [(0, 2), (2, 3)]]),
    ):
        tensors = leaves(spans.tensors((4, 2), 3))
        given = [x for x in tensors if x is not None]
        assert torch.autograd.gradcheck(lambda *x, s=spans: attend(s, (*x, *[None] * (5 - len(x)))), given)


def test_only_the_wanted_gradients() -> None:
    spans = SPANS["prefixes that cross"]
    query, key, value, prefix_key, prefix_value = spans.tensors((2, 2), 4)
    attend(spans, (query, key, value, prefix_key.requires_grad_(), prefix_value)).sum().backward()
    assert prefix_key.grad is not None
    assert query.grad is None and prefix_value.grad is None


@settings(max_examples=40)
@given(st.data())
def test_any_spans(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(0, 12), max_size=9))
    stored = data.draw(st.one_of(st.none(), st.integers(0, 40)))
    begins = [0, *itertools.accumulate(lengths)]
    ranges, prefix = data.draw(st.integers(1, 3)), []
    for begin in begins[:-1]:
        bounds = st.integers(0, begin if stored is None else stored)
        cuts = sorted(data.draw(st.lists(bounds, min_size=2 * ranges, max_size=2 * ranges)))
        prefix.append(data.draw(st.permutations(list(zip(cuts[::2], cuts[1::2], strict=True)))))
    spans = Spans(lengths, prefix, stored)
    tensors = leaves(spans.tensors((2, 1), 4))
    got, wanted = attend(spans, tensors, scaling=0.7), expected(spans, tensors, 0.7)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(wanted)
    for ours, theirs in zip(*(gradients(out, tensors, weight) for out in (got, wanted)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


# ------------------------------------------------------------------ ranges


def both(spans: Spans, tensors: Sequence[Tensor | None], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """The output and all gradients."""
    given = leaves(tensors, dtype)
    out = attend(spans, given)
    weight = torch.linspace(-1, 1, out.numel()).view(out.shape)
    return [out, *gradients(out, given, weight)]


@pytest.mark.parametrize("name", ["trunk and branches", "prefixes that cross", "empty spans"])
def test_one_range_and_empty_ones_are_the_same_bit_for_bit(name: str) -> None:
    spans = SPANS[name]
    tensors = spans.tensors((4, 2), 8)
    wanted = both(spans, tensors, torch.float32)
    for ranges in (
        [[span] for span in spans.prefix],
        [[span, (1, 1)] for span in spans.prefix],
        [[(0, 0), span, (at, at)] for at, span in enumerate(spans.prefix)],
    ):
        got = both(spans._replace(prefix=ranges), tensors, torch.float32)
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_a_range_in_two_parts_is_the_range() -> None:
    for name in ("trunk and branches", "prefixes that cross", "a long span"):
        spans = SPANS[name]
        tensors = spans.tensors((4, 2), 8)
        halves = [[(first, (first + last) // 2), ((first + last) // 2, last)] for first, last in spans.prefix]
        for prefix in (halves, [half[::-1] for half in halves]):
            for ours, theirs in zip(both(spans._replace(prefix=prefix), tensors), both(spans, tensors), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------ isolation


def test_rows_outside_the_visible_set_change_nothing() -> None:
    """Bit for bit: every row in turn, against the visibility written out."""
    for name in ("trunk and branches", "prefixes that cross", "several ranges", "ranges empty in every place"):
        spans = SPANS[name]
        tensors = [None if x is None else x.float() for x in spans.tensors((4, 2), 8)]
        before = attend(spans, tensors)[0]
        for target in (1, 3) if spans.stored is not None else (1,):
            width = spans.stored or sum(spans.lengths)
            visible = visibility(spans, width)
            for row in range(0, tensors[target].shape[2], 7):
                changed = [None if x is None else x.clone() for x in tensors]
                for at in (target, target + 1):
                    changed[at][:, :, row] = torch.randn_like(changed[at][:, :, row])
                sees = visible[:, row] if target == 3 else visible[:, width + row]
                if spans.stored is None:
                    sees = sees | visible[:, row]
                after = attend(spans, changed)[0]
                moved = (after != before).flatten(1).any(dim=1)
                assert torch.equal(moved, sees)


def test_not_a_number_stays_with_those_who_see_it() -> None:
    spans = SPANS["trunk and branches"]
    tensors = spans.tensors((4, 2), 8)
    poisoned = [None if x is None else x.clone() for x in tensors]
    for at in (0, 1, 2):
        poisoned[at][:, :, 60:] = torch.nan  # the second user
    before, after = attend(spans, tensors)[0], attend(spans, poisoned)[0]
    assert torch.equal(before[:60], after[:60])
    assert after[60:].isnan().all()


def test_gradients_of_unseen_rows_are_zero() -> None:
    spans = SPANS["prefixes that cross"]
    tensors = leaves(Spans(*spans[:2], stored=70).tensors((4, 2), 8))
    attend(spans, tensors).square().sum().backward()
    for grad in (tensors[3].grad, tensors[4].grad):
        assert (grad[:, :, 50:] == 0).all()
        assert (grad[:, :, :50] != 0).any(dim=3).all()


@pytest.mark.parametrize("name", ["trunk and branches", "several ranges"])
def test_bitwise_repeatable(name: str) -> None:
    spans = SPANS[name]
    tensors = leaves(spans.tensors((8, 2), 16), torch.float32)
    weight = torch.randn(1, sum(spans.lengths), 8, 16)
    first, second = (gradients(attend(spans, tensors), tensors, weight) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# ------------------------------------------------------------------ dropout


def test_dropout_is_unbiased() -> None:
    spans = SPANS["prefixes that cross"]
    tensors = spans.tensors((2, 1), 4)
    dropped = [attend(spans, tensors, dropout=0.5) for _ in range(400)]
    assert not torch.equal(dropped[0], dropped[1])
    torch.testing.assert_close(torch.stack(dropped).mean(0), attend(spans, tensors), atol=0.5, rtol=0)


def test_dropout_drops_the_same_in_the_backward_pass() -> None:
    spans = Spans([4, 3, 2], [(0, 0), (0, 3), (0, 4)])
    tensors = leaves(spans.tensors((2, 1), 3))[:3]

    def seeded(*given: Tensor) -> Tensor:
        torch.manual_seed(7)
        return attend(spans, (*given, None, None), dropout=0.4)

    assert torch.autograd.gradcheck(seeded, tensors)


# ------------------------------------------------------------------ tiles and memory


def test_tiles_cover_every_row_once() -> None:
    for spans in (*SPANS.values(), Spans([5000, 300], [(0, 0), (0, 5000)]), Spans([1] * 3000, [(0, 9)] * 3000, 9)):
        for n_heads in (1, 32):
            plan = list(tiles._plan(*spans.raw, 256, n_heads))
            assert [row for tile in plan for row in range(tile.begin, tile.end)] == list(range(sum(spans.lengths)))
            for tile in plan:
                rows = tile.end - tile.begin
                assert rows <= tiles._ROWS.start or rows * tile.columns * n_heads <= tiles._SCORES


def test_branches_of_one_trunk_share_tiles() -> None:
    """Their prefixes end where the others' do, nearly; each alone would multiply a few rows at a time."""
    branches = Spans([200] + [8] * 50, [(0, 0)] + [(0, 100 + 2 * n) for n in range(50)])
    plan = list(tiles._plan(*branches.raw, 256, 4))
    assert len(plan) < 20


class Largest(TorchDispatchMode):
    """The largest tensor that any operator allocated."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in known:
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return result


@pytest.mark.parametrize(
    "spans",
    [Spans([100] * 40, [(0, 3000)] * 40, 3000), Spans([3000, 1000], [(0, 0), (0, 3000)])],
    ids=["shared prefix", "long spans"],
)
def test_no_tensor_beyond_a_tile_or_an_input(spans: Spans) -> None:
    tensors = leaves(spans.tensors((4, 2), 8), torch.float32)
    with Largest() as largest:
        attend(spans, tensors).sum().backward()
    inputs = max(x.numel() for x in tensors if x is not None)
    assert largest.elements <= max(inputs, tiles._SCORES)


# ------------------------------------------------------------------ PyTorch's other features


def arguments(spans: Spans, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    query, key, value, *stored = (
        None if x is None else x.to(dtype)[0].transpose(0, 1).contiguous() for x in spans.tensors((4, 2), 8)
    )
    return (query, key, value, *spans.raw, *stored, 0.3, 0.0, 0)


@pytest.mark.unpoisoned("opcheck compares whole memory")
@pytest.mark.parametrize("name", ["trunk and branches", "ranges empty in every place"])
def test_opcheck(name: str) -> None:
    inputs = arguments(SPANS[name])
    torch.library.opcheck(torch.ops.patchkern.span_attention.default, inputs)
    out, lse = torch.ops.patchkern.span_attention(*inputs)
    query, key, value, *rest = inputs
    backward = (torch.randn_like(out), query, key, value, out, lse, *rest)
    torch.library.opcheck(torch.ops.patchkern.span_attention_grad.default, backward)


@pytest.mark.parametrize("name", ["trunk and branches", "several ranges"])
def test_compiles_without_a_graph_break(name: str) -> None:
    spans = SPANS[name]
    tensors = leaves(spans.tensors((4, 2), 8), torch.float32)
    cu_seqlens, prefix = spans.integers

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return span_attention(query, key, value, cu_seqlens, prefix=prefix)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    got, wanted = compiled(*tensors[:3]), run(*tensors[:3])
    assert torch.equal(got, wanted)
    weight = torch.randn_like(wanted)
    for ours, theirs in zip(*(gradients(out, tensors[:3], weight) for out in (got, wanted)), strict=True):
        assert torch.equal(ours, theirs)


def test_autocast() -> None:
    spans = SPANS["prefixes that cross"]
    tensors = leaves(spans.tensors((4, 2), 8), torch.float32)
    narrow = leaves(tensors, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        got = attend(spans, tensors)
    assert torch.equal(got, attend(spans, narrow))
    got.sum().backward()
    assert all(x.grad.dtype == torch.float32 for x in tensors)


def test_rows_in_any_memory_order() -> None:
    spans = SPANS["trunk and branches"]
    tensors = spans.tensors((4, 2), 8)
    by_row = [None if x is None else x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
    wide = [None if x is None else torch.cat([x, x], dim=3)[..., :8] for x in tensors]
    wanted = attend(spans, tensors)
    for other in (by_row, wide):
        torch.testing.assert_close(attend(spans, other), wanted, rtol=1e-13, atol=1e-13)


# ------------------------------------------------------------------ errors


def wrong(**change: Any) -> dict[str, Any]:
    spans = SPANS["prefixes that cross"]
    query, key, value, prefix_key, prefix_value = spans.tensors((4, 2), 8)
    cu_seqlens, prefix = spans.integers
    given = {"query": query, "key": key, "value": value, "cu_seqlens": cu_seqlens, "prefix": prefix}
    return given | {"prefix_key": prefix_key, "prefix_value": prefix_value} | change


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"prefix": [[0, 1]] * 5}, TypeError, r"prefix: expected a tensor, got list"),
        ({"prefix": torch.zeros(5, 2)}, TypeError, r"prefix: expected dtype torch.int32, got torch.float32"),
        ({"cu_seqlens": torch.tensor([0, 5, 11, 18, 26, 35])}, TypeError, r"cu_seqlens: expected dtype torch.int32"),
        ({"prefix": torch.zeros(4, 2, dtype=torch.int32)}, ValueError, r"prefix: expected shape \(5, 2\), .*\(4, 2\)"),
        ({"prefix": None}, ValueError, r"prefix: expected the rows .* got None"),
        ({"prefix_key": None}, ValueError, r"prefix_key: expected prefix_key and prefix_value together"),
        ({"prefix_value": torch.zeros(1, 2, 49, 8)}, ValueError, r"prefix_value: expected shape \(1, 2, 50, 8\)"),
        ({"prefix_key": torch.zeros(1, 2, 50, 8)}, TypeError, r"prefix_key: expected query's dtype, torch.float64"),
        ({"key": torch.zeros(1, 3, 35, 8)}, ValueError, r"query: expected shape \(1, a multiple of 3, T, d\)"),
        ({"key": torch.zeros(1, 2, 34, 8)}, ValueError, r"key: expected shape \(1, 2, 35, 8\)"),
        ({"sliding_window": 4}, ValueError, r"sliding_window: expected None with a prefix"),
        (
            {"prefix": torch.tensor([[0, 51]] * 5, dtype=torch.int32)},
            ValueError,
            r"prefix\[0\]: .*0\.\.50, got \[0",
        ),
        (
            {"prefix": torch.zeros(5, 0, 2, dtype=torch.int32)},
            ValueError,
            r"prefix: expected shape \(5, 2\), .* or \(5, R, 2\), got \(5, 0, 2\)",
        ),
        (
            {"prefix": torch.tensor([[[0, 9], [9, 51]]] * 5, dtype=torch.int32)},
            ValueError,
            r"prefix\[0, 1\]: .*0\.\.50, got \[9, 51\]",
        ),
        (
            {"prefix": torch.tensor([[[0, 0], [0, 9], [8, 12]]] * 5, dtype=torch.int32)},
            ValueError,
            r"prefix\[0, 2\]: expected rows that neither the span nor an earlier range of it has, got \[8, 12\]",
        ),
        (
            {"prefix": torch.tensor([[4, 6]] * 5, dtype=torch.int32), "prefix_key": None, "prefix_value": None},
            ValueError,
            r"prefix\[0\]: expected rows that neither the span",
        ),
        ({"prefix": torch.tensor([[3, 2]] * 5, dtype=torch.int32)}, ValueError, r"prefix\[0\]: .*got \[3, 2\]"),
        ({"cu_seqlens": torch.tensor([0, 5, 11, 18, 26, 34], dtype=torch.int32)}, ValueError, r"cu_seqlens: .*to 34"),
        ({"cu_seqlens": torch.tensor([0, 5, 4, 18, 26, 35], dtype=torch.int32)}, ValueError, r"cu_seqlens: .*non-dec"),
    ],
)
def test_wrong_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        span_attention(**wrong(**change))


@pytest.mark.parametrize("route", [{}, {"sliding_window": 2}, {"dropout": 0.1}], ids=str)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"dropout": 1.0}, ValueError, "dropout: expected a finite number of at least 0 and below 1, got 1.0"),
        ({"dropout": -0.5}, ValueError, "dropout: expected a finite number of at least 0 and below 1, got -0.5"),
        ({"dropout": float("nan")}, ValueError, "dropout: expected a finite number .* got nan"),
        ({"scaling": float("nan")}, ValueError, "scaling: expected a finite number, got nan"),
        ({"sliding_window": 0}, ValueError, "sliding_window: expected an integer in 1"),
        ({"sliding_window": True}, TypeError, "sliding_window: expected an integer, got bool"),
        ({"cu_seqlens": torch.tensor([0, 2], dtype=torch.int32)}, ValueError, "cu_seqlens: .* 0 to 5, got 0 to 2"),
        ({"cu_seqlens": torch.tensor([0, 3, 2, 5], dtype=torch.int32)}, ValueError, "cu_seqlens: expected non-decreas"),
        ({"cu_seqlens": torch.tensor([], dtype=torch.int32)}, ValueError, r"cu_seqlens: expected shape \(S \+ 1,\)"),
        ({"cu_seqlens": torch.tensor([0, 2, 5])}, TypeError, "cu_seqlens: expected dtype torch.int32"),
        ({"key": torch.zeros(1, 2, 4, 8)}, ValueError, r"key: expected shape \(1, 2, 5, 8\), got \(1, 2, 4, 8\)"),
        ({"value": torch.zeros(1, 2, 5, 8).double()}, TypeError, "value: expected query's dtype, torch.float32"),
        ({"query": torch.zeros(1, 3, 5, 8)}, ValueError, "query: expected shape .*a multiple of 2"),
    ],
)
def test_wrong_arguments_without_prefixes(
    change: dict[str, Any], error: type[Exception], message: str, route: dict[str, Any]
) -> None:
    """Whichever kernel would be the one to notice, or not to."""
    rows = torch.zeros(1, 2, 5, 8)
    given = {"query": rows, "key": rows, "value": rows, "cu_seqlens": torch.tensor([0, 2, 5], dtype=torch.int32)}
    with pytest.raises(error, match=message):
        span_attention(**{**given, **route, **change})
