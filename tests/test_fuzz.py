# SPDX-License-Identifier: Apache-2.0
"""Malformed layouts and calls, at random: they work, or they are a TypeError or ValueError that says something.

Never another exception, never a crash, and nothing written outside `out`. `make sanitize` runs this file against
native code built with the address and undefined-behaviour sanitizers.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import cases
import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import patchkern as pk
from patchkern.batch.layout import Transpose
from patchkern.batch.policy_dict import policy_from_dict

BACKENDS = [name for name in ("reference", "native") if pk.backends()[name].usable]
BATCH = cases.make_batch(pk.SessionPatches(2), [0, 9, 3])
LAYOUT = BATCH.layout(transpose=True)
INT32 = np.iinfo(np.int32)


@contextlib.contextmanager
def only_clear_errors() -> Iterator[None]:
    try:
        yield
    except (TypeError, ValueError) as error:
        assert str(error), "an error without a message"
        assert type(error) in (TypeError, ValueError), f"{type(error).__name__}: {error}"


def guarded(rows: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """An `out` of (rows, width) inside a canvas that shows what is written around it."""
    canvas = torch.full((rows + 4, width + 6), 777.0)
    return canvas, canvas[2 : 2 + rows, 3 : 3 + width]


def use(layout: pk.PatchLayout, vocabulary: int) -> None:
    """Everything one can do with a layout, on every backend."""
    weight = torch.ones(vocabulary, 5)
    for backend in BACKENDS:
        with only_clear_errors():
            canvas, out = guarded(layout.num_rows, 5)
            pk.pool_rows(weight, layout, backend=backend, out=out)
            out.fill_(777.0)
            assert (canvas == 777.0).all(), "written outside out"
        with only_clear_errors():
            pk.pool_rows(weight.clone().requires_grad_(), layout, backend=backend).sum().backward()
        for dense in (True, False):
            with only_clear_errors():
                grad_rows = torch.ones(layout.num_rows, 5)
                pk.pool_rows_grad(grad_rows, layout, vocabulary, dense=dense, backend=backend)
    with only_clear_errors():
        layout.compact()


# ------------------------------------------------------------------ layouts


def integers(low: int, high: int) -> st.SearchStrategy[int]:
    """Mostly near the legal range, sometimes at the ends of int32."""
    near = st.integers(low - 2, high + 2)
    return st.one_of(near, near, near, st.sampled_from([INT32.min, INT32.min + 1, -1, 0, INT32.max - 1, INT32.max]))


def int32(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@st.composite
def cuts(draw: st.DrawFn, total: int, pieces: int, smallest: int = 0) -> list[int]:
    """Offsets that cut 0..total into `pieces` of at least `smallest`."""
    free = total - pieces * smallest
    inner = sorted(draw(st.lists(st.integers(0, free), min_size=max(pieces - 1, 0), max_size=max(pieces - 1, 0))))
    return [0, *(cut + smallest * (number + 1) for number, cut in enumerate(inner)), total] if pieces else [0]


@st.composite
def legal_fields(draw: st.DrawFn) -> dict[str, Any]:
    """A layout that no policy would plan: patches overlap, repeat and come in any order."""
    titles = draw(st.integers(0, 3))
    tokens = draw(st.integers(titles, titles + 4)) if titles else 0
    entries = draw(st.integers(0, 4)) if titles else 0
    lo, hi = [], []
    for _ in range(draw(st.integers(0, 5))):
        start = draw(st.integers(-6, entries - 1)) if entries else draw(st.integers(-6, -1))
        lo.append(start)
        hi.append(draw(st.integers(start + 1, entries)) if start >= 0 else 0)
    token_ids = draw(st.lists(st.integers(0, 5), min_size=tokens, max_size=tokens))
    rows = len(lo)
    cu_seqlens = draw(cuts(rows, draw(st.integers(1 if rows else 0, 3))))
    fields: dict[str, Any] = {
        "lo": int32(lo),
        "hi": int32(hi),
        "items": int32([draw(st.integers(0, titles - 1)) for _ in range(entries)]),
        "token_ids": int32(token_ids),
        "offsets": int32(draw(cuts(tokens, titles, smallest=1))),
        "title_index": torch.arange(titles, dtype=torch.int32),
        "cu_seqlens": int32(cu_seqlens),
        "max_seqlen": max(np.diff(cu_seqlens).tolist(), default=0),
        "position_ids": torch.zeros(rows, dtype=torch.int64),
        "labels": None,
        "logit_rows": None,
        "logit_labels": None,
        "history_tokens": draw(st.integers(0, 5)),
        "history_rows": draw(st.integers(0, 5)),
        "max_position": 0 if rows else -1,
        "max_token_id": max([-1 - start for start in lo if start < 0] + token_ids, default=-1),
    }
    if rows and draw(st.booleans()):
        distinct = sorted(draw(st.sets(st.integers(0, max(fields["max_token_id"], 0)), max_size=4)))
        count = draw(st.integers(len(distinct), len(distinct) + 4)) if distinct else 0
        fields["transpose"] = Transpose(
            tokens=int32(distinct if fields["max_token_id"] >= 0 else []),
            offsets=int32(draw(cuts(count, len(distinct), smallest=1))),
            rows=int32([draw(st.integers(0, rows - 1)) for _ in range(count)]),
            divisors=int32([draw(st.integers(1, 4)) for _ in range(count)]),
        )
    return fields


@st.composite
def broken_fields(draw: st.DrawFn) -> dict[str, Any]:
    """`legal_fields` with one to three entries or counts changed."""
    fields = draw(legal_fields())
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(sorted(fields)))
        value = fields[name]
        if isinstance(value, int):
            fields[name] = draw(integers(-2, 6))
        elif isinstance(value, Transpose):
            part = draw(st.sampled_from(["tokens", "offsets", "rows", "divisors"]))
            fields[name] = dataclasses.replace(value, **{part: draw(broken_tensors(getattr(value, part)))})
        elif value is not None:
            fields[name] = draw(broken_tensors(value))
    return fields


@st.composite
def broken_tensors(draw: st.DrawFn, tensor: torch.Tensor) -> torch.Tensor:
    """One entry of a vector changed, dropped or added."""
    values = tensor.tolist()
    at = draw(st.integers(0, max(len(values) - 1, 0)))
    how = draw(st.sampled_from(["change", "change", "drop", "add"])) if values else "add"
    new = [] if how == "drop" else [draw(integers(-6, 6))]
    values[at : at if how == "add" else at + 1] = new
    return torch.tensor(values, dtype=tensor.dtype)


@settings(max_examples=150)
@given(fields=legal_fields())
def test_strange_but_legal_layouts_are_pooled(fields: dict[str, Any]) -> None:
    layout = pk.PatchLayout(**fields)
    rows = [row for user in oracle.decode(layout) for row in user]
    weight = cases.make_weight(7, 5)
    for backend in BACKENDS:
        oracle.assert_pooled(pk.pool_rows(weight, layout, backend=backend), weight, rows)
        own = dataclasses.replace(layout, transpose=None).with_transpose()
        grad = pk.pool_rows_grad(weight[: len(rows)].contiguous(), own, 7, backend=backend)
        oracle.assert_gradient(grad, weight[: len(rows)], rows, 7)
    use(layout, 7)


@settings(max_examples=500)
@given(fields=broken_fields(), vocabulary=st.integers(0, 8))
def test_broken_layouts(fields: dict[str, Any], vocabulary: int) -> None:
    with only_clear_errors():
        use(pk.PatchLayout(**fields), vocabulary)


TENSOR_FIELDS = [
    field.name for field in dataclasses.fields(LAYOUT) if isinstance(getattr(LAYOUT, field.name), torch.Tensor)
]
JUNK: list[Any] = [
    *(
        None,
        0,
        -1,
        3,
        2**31,
        2**70,
        1.5,
        float("nan"),
        True,
        "",
        "abc",
        b"x",
        [],
        [1, 2],
        (),
        {},
        {1: 2},
        object(),
        int,
    ),
    *(np.zeros(3), np.zeros((2, 2), np.int32), np.asarray(3), np.asarray(["a"], object), np.int64(3), np.float32(0.5)),
    *(
        torch.tensor(1),
        torch.zeros(3),
        torch.zeros(2, 2),
        torch.zeros(0, dtype=torch.int32),
        torch.ones(3, dtype=torch.bool),
    ),
    *(
        torch.zeros(4, dtype=torch.int32).to("meta"),
        torch.ones(3, 3).to_sparse(),
        torch.ones(4, 4).t(),
        torch.nn.Linear(1, 1),
    ),
    *(
        [[]],
        [[[]]],
        [["a"], [1]],
        [[1, "a"]],
        [None],
        ["ab", "cd"],
        [[1], 2],
        [2**80],
        [[2**80]],
        [[-1]],
        [float("nan")],
    ),
]
junk = st.sampled_from(JUNK)


@settings(max_examples=300)
@given(name=st.sampled_from([field.name for field in dataclasses.fields(LAYOUT)]), value=junk)
def test_layouts_with_a_field_of_junk(name: str, value: Any) -> None:
    with only_clear_errors():
        use(dataclasses.replace(LAYOUT, **{name: value}), cases.VOCABULARY)


@settings(max_examples=200)
@given(name=st.sampled_from(["tokens", "offsets", "rows", "divisors"]), value=junk)
def test_transposes_with_a_field_of_junk(name: str, value: Any) -> None:
    assert LAYOUT.transpose is not None
    with only_clear_errors():
        transpose = dataclasses.replace(LAYOUT.transpose, **{name: value})
        use(dataclasses.replace(LAYOUT, transpose=transpose), cases.VOCABULARY)


@settings(max_examples=300)
@given(data=st.data())
def test_layouts_with_changed_entries(data: st.DataObject) -> None:
    """A legal layout with a few entries of one tensor changed, shortened or lengthened."""
    name = data.draw(st.sampled_from(TENSOR_FIELDS))
    changed = getattr(LAYOUT, name).clone()
    for _ in range(data.draw(st.integers(1, 3))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(integers(-3, 100))
    resize: Callable[[torch.Tensor], torch.Tensor] = data.draw(
        st.sampled_from(
            [lambda t: t, lambda t: t, lambda t: t[:-1].clone(), lambda t: torch.cat([t, t[:1]]), lambda t: t[1:]]
        )
    )
    with only_clear_errors():
        use(dataclasses.replace(LAYOUT, **{name: resize(changed)}), cases.VOCABULARY)


@settings(max_examples=300)
@given(data=st.data(), with_transpose=st.booleans())
def test_layouts_overwritten_after_their_checks(data: st.DataObject, with_transpose: bool) -> None:
    """Only native code promises to look again; it is what could touch foreign memory."""
    if "native" not in BACKENDS:
        pytest.skip(f"the native backend is not usable: {pk.backends()['native'].reason}")
    layout = BATCH.layout(transpose=with_transpose)
    tensors = [layout.lo, layout.hi, layout.items, layout.token_ids, layout.offsets]
    if layout.transpose is not None:
        tensors += vars(layout.transpose).values()
    tensor = data.draw(st.sampled_from(tensors))
    for _ in range(data.draw(st.integers(1, 3))):
        tensor[data.draw(st.integers(0, len(tensor) - 1))] = data.draw(integers(-3, 100))
    with only_clear_errors():
        canvas, out = guarded(layout.num_rows, 5)
        pk.pool_rows(torch.ones(cases.VOCABULARY, 5), layout, backend="native", out=out)
        out.fill_(777.0)
        assert (canvas == 777.0).all(), "written outside out"
    for dense in (True, False):
        with only_clear_errors():
            grad_rows = torch.ones(layout.num_rows, 5)
            own = layout.with_transpose()
            pk.pool_rows_grad(grad_rows, own, cases.VOCABULARY, dense=dense, backend="native")


# ------------------------------------------------------------------ calls


ALIASES = {"sequences": ["histories"], "tokenizer": ["token_ids", "titles"]}  # what an argument becomes further in


def call_with_junk(data: st.DataObject, function: Callable[..., Any], arguments: dict[str, Any]) -> None:
    """`function` with one or two of its arguments replaced; an error names one of its arguments."""
    for name in data.draw(st.lists(st.sampled_from(sorted(arguments)), min_size=1, max_size=2, unique=True)):
        arguments = {**arguments, name: data.draw(junk, label=name)}
    with only_clear_errors():
        try:
            function(**arguments)
        except (TypeError, ValueError) as error:
            names = [*arguments, *ALIASES.get(next(iter(arguments)), ())]
            assert any(name in str(error) for name in names), f"names no argument: {error}"
            raise


def layout_arguments() -> dict[str, Any]:
    names = ("catalog", "histories", "policy", "prompt", "targets")
    return dict(zip(names, BATCH.arguments(), strict=True))


def calls() -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    weight = torch.ones(cases.VOCABULARY, 5)
    histories = pk.Histories.from_sequences([[1, 2, 3], [], [4]])
    return {
        "build_layout": (pk.build_layout, {**layout_arguments(), "transpose": None}),
        "compress_batch": (pk.compress_batch, {"weight": weight, **layout_arguments(), "backend": "auto", "out": None}),
        "pool_rows": (
            pk.pool_rows,
            {"weight": weight, "layout": LAYOUT, "backend": "auto", "out": None, "sparse_grad": False},
        ),
        "pool_rows_grad": (
            pk.pool_rows_grad,
            {
                "grad_rows": torch.ones(LAYOUT.num_rows, 5),
                "layout": LAYOUT,
                "num_embeddings": cases.VOCABULARY,
                "dense": True,
                "backend": "auto",
            },
        ),
        "Catalog": (
            pk.Catalog.from_token_ids,
            {"token_ids": [1, 2, 3], "offsets": [0, 1, 3], "item_ids": [7, 8], "titles": ["a", "b"]},
        ),
        "from_titles": (lambda titles: pk.Catalog.from_titles(titles, len), {"titles": {}}),
        "tokenizer": (lambda tokenizer: pk.Catalog.from_titles({1: "a"}, lambda title: tokenizer), {"tokenizer": [1]}),
        "index_of": (BATCH.catalog.index_of, {"item_ids": [1, 2]}),
        "Prompt": (pk.Prompt, {"prefix": [1], "separator": [2], "suffix": [3], "response_end": [4]}),
        "Prompt.from_dict": (pk.Prompt.from_dict, {"parts": {"prefix": [1]}}),
        "Histories": (pk.Histories, {"items": [1, 2, 3], "offsets": [0, 1, 3], "timestamps": [5, 6, 7]}),
        "from_sequences": (pk.Histories.from_sequences, {"sequences": [[1], [2, 3]]}),
        "latest": (histories.latest, {"max_items": 2}),
        "take": (histories.take, {"users": [0, 2]}),
        "before": (histories.before, {"users": [0, 2], "positions": [1, 0], "max_items": 3}),
        "at": (histories.at, {"users": [0, 2], "positions": [1, 0]}),
        "TextOnly": (pk.TextOnly, {"max_items": 3}),
        "ItemPatches": (pk.ItemPatches, {"keep_text": 2, "max_items": 3}),
        "SessionPatches": (pk.SessionPatches, {"group_size": 2, "max_items": 3, "align": "end"}),
        "RandomItemPatches": (pk.RandomItemPatches, {"probability": 0.5, "max_items": 3, "seed": 0}),
        "ItemDropout": (pk.ItemDropout, {"probability": 0.5, "keep_text": 2, "max_items": 3, "seed": 0}),
        "policy_from_dict": (policy_from_dict, {"description": {"name": "TextOnly"}}),
    }


@pytest.mark.parametrize("name", calls())
@settings(max_examples=150)
@given(data=st.data())
def test_calls_with_junk(name: str, data: st.DataObject) -> None:
    call_with_junk(data, *calls()[name])


def test_calls_without_junk_work() -> None:
    for function, arguments in calls().values():
        function(**arguments)


class OwnPolicy:
    """A user's policy that may answer anything."""

    def __init__(self, max_items: Any, levels: Any) -> None:
        self.max_items = max_items
        self.answer = levels

    def levels(self, histories: pk.Histories) -> Any:
        return self.answer


@settings(max_examples=200)
@given(
    max_items=junk | st.integers(1, 9),
    levels=junk
    | st.lists(st.integers(0, 3), min_size=12, max_size=12).map(lambda values: np.asarray(values, np.uint8)),
)
def test_own_policies(max_items: Any, levels: Any) -> None:
    with only_clear_errors():
        arguments = layout_arguments() | {"policy": OwnPolicy(max_items, levels)}
        use(pk.build_layout(**arguments, transpose=True), cases.VOCABULARY)


@settings(max_examples=200)
@given(data=st.data())
def test_odd_weights(data: st.DataObject) -> None:
    """Any shape, stride, offset and dtype of weight and out: right, or refused."""
    dtype = data.draw(st.sampled_from([*cases.DTYPES, torch.int32, torch.complex64, torch.bool]))
    sizes = st.lists(st.integers(0, 4) | st.just(cases.VOCABULARY), min_size=1, max_size=3)
    shape = data.draw(st.just([cases.VOCABULARY, 4]) | sizes)
    strides = data.draw(
        st.lists(st.integers(0, 9), min_size=len(shape), max_size=len(shape)) | st.just([9, 1][: len(shape)])
    )
    offset = data.draw(st.integers(0, 3))
    needed = offset + 1 + sum(max(size - 1, 0) * stride for size, stride in zip(shape, strides, strict=False))
    if len(strides) < len(shape):
        strides = [*strides, 1]
    memory = torch.randn(needed + 4096, generator=torch.Generator().manual_seed(needed)).to(dtype)
    weight = memory.as_strided(shape, strides, offset)
    for backend in BACKENDS:
        with only_clear_errors():
            rows = pk.pool_rows(weight, LAYOUT, backend=backend)
            oracle.assert_pooled(rows, weight, BATCH.rows())
        with only_clear_errors():
            grad_rows = memory.as_strided((LAYOUT.num_rows, *shape[1:]), strides, offset)
            grad = pk.pool_rows_grad(grad_rows, LAYOUT, cases.VOCABULARY, backend=backend)
            oracle.assert_gradient(grad, grad_rows, BATCH.rows(), cases.VOCABULARY)
        with only_clear_errors():
            before = memory.clone()
            out = memory.as_strided((LAYOUT.num_rows, *shape[1:]), strides, offset)
            try:
                pk.pool_rows(cases.make_weight(cases.VOCABULARY, shape[-1], dtype), LAYOUT, backend=backend, out=out)
            except (TypeError, ValueError, RuntimeError):
                assert torch.equal(memory, before), "written before an error"
                raise
