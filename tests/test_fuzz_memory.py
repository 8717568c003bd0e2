# SPDX-License-Identifier: Apache-2.0
"""Objects changed behind the library's back: native code reads what is there, or they are refused.

Pickles with other contents, tensors resized or exchanged, storages cut, arrays shared with what is written to, memory
that is not aligned, arrays written to afterwards. `make sanitize` runs this file against native code built with the
address and undefined-behaviour sanitizers, and `PATCHKERN_FUZZ_CALLS` says how many calls it makes.
"""

from __future__ import annotations

import copy
import os
import pickle
from collections.abc import Callable
from typing import Any

import cases
import numpy as np
import pytest
import torch
from torch import Tensor

import patchkern as pk
from patchkern.batch.layout import Transpose
from patchkern.ops.span_attention import span_attention

CALLS = int(os.environ.get("PATCHKERN_FUZZ_CALLS", 4_000))
SEED = int(os.environ.get("PATCHKERN_FUZZ_SEED", 0))
WIDTH = 5
EXTREMES = (-(2**31), -(2**31) + 1, -1, 0, 1, 2**31 - 2, 2**31 - 1)
ROW_FIELDS = ("lo", "hi", "items", "token_ids", "offsets", "title_index")
REFUSED = (TypeError, ValueError)


class Fuzz:
    """Random choices, and a count of the calls that came back."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.calls = self.refused = 0

    def choice(self, options: Any) -> Any:
        return options[int(self.rng.integers(len(options)))]

    def call(self, function: Callable[[], object], also: tuple[type[Exception], ...] = ()) -> None:
        """It works or says what is wrong with its arguments, in words."""
        self.calls += 1
        try:
            function()
        except (*REFUSED, *also) as error:
            assert str(error), "an error without a message"
            self.refused += 1

    def integer(self) -> int:
        return int(self.rng.integers(-4, 70)) if self.rng.random() < 0.7 else self.choice(EXTREMES)

    def batch(self) -> cases.Batch:
        return cases.make_batch(self.choice(POLICIES), self.choice([[0, 9, 3], [1], [12, 2, 2, 0], [30]]))

    def layout(self) -> pk.PatchLayout:
        return pickle.loads(pickle.dumps(self.choice(LAYOUTS)))  # nobody else's

    def tampered(self, tensor: Tensor) -> Tensor:
        """The same, but for its length, entries, dtype, stride or shape."""
        values = tensor.clone()
        how = self.choice(
            ["entry", "entry", "entry", "shorter", "longer", "empty", "dtype", "strided", "flat", "other"]
        )
        if how == "entry" and len(values):
            for _ in range(int(self.rng.integers(1, 4))):
                values[int(self.rng.integers(len(values)))] = self.integer()
        elif how == "shorter":
            return values[int(self.rng.integers(0, 3)) : len(values) - int(self.rng.integers(0, 3))]
        elif how == "longer":
            return torch.cat([values, values[: int(self.rng.integers(0, 9))], values.new_tensor([self.integer()])])
        elif how == "empty":
            return values[:0]
        elif how == "dtype":
            return values.to(self.choice([torch.int8, torch.int16, torch.int64, torch.float32, torch.bool]))
        elif how == "strided":
            return torch.stack([values, values], dim=1)[:, 0]
        elif how == "flat":
            return values[None] if self.rng.random() < 0.5 else values[:1].expand(len(values))
        elif how == "other":
            return values.to("meta")
        return values


POLICIES = [pk.TextOnly(), pk.ItemPatches(2), pk.SessionPatches(2), pk.SessionPatches(3, align="start")]
LAYOUTS = [
    cases.make_batch(policy, lengths).layout(transpose=transpose)
    for policy in POLICIES
    for lengths in ([0, 9, 3], [14])
    for transpose in (True, False)
]


def use(fuzz: Fuzz, layout: pk.PatchLayout, weight: Tensor | None = None, out: Tensor | None = None) -> None:
    """One call of many. Native code looks at every index again; the reference, which may take any memory, does not."""
    weight = torch.ones(cases.VOCABULARY, WIDTH) if weight is None else weight
    rows = layout.lo.numel() if layout.lo.dim() else 1
    which = fuzz.choice(["rows", "rows", "gradient", "backward", "transpose", "compact", "pickle"])
    if which == "rows":
        canvas = torch.full((rows + 4, WIDTH + 6), 777.0)
        target = canvas[2 : 2 + rows, 3 : 3 + WIDTH] if out is None else out
        fuzz.call(lambda: pk.pool_rows(weight, layout, backend="native", out=target))
        target.fill_(777.0)
        assert (canvas == 777.0).all(), "written outside out"
    elif which == "gradient":
        dense = fuzz.rng.random() < 0.5
        grad = torch.ones(rows, WIDTH)
        fuzz.call(lambda: pk.pool_rows_grad(grad, layout, cases.VOCABULARY, dense=dense, backend="native"))
    elif which == "backward":
        own = weight.clone().requires_grad_()
        fuzz.call(lambda: pk.pool_rows(own, layout, backend="native").sum().backward())
    elif which == "transpose":
        fuzz.call(layout.with_transpose)
    elif which == "compact":
        fuzz.call(layout.compact, (IndexError, RuntimeError))  # PyTorch's, on entries out of range
    else:
        fuzz.call(lambda: pickle.loads(pickle.dumps(layout)), (NotImplementedError,))


# ------------------------------------------------------------------ what is done to them


def pickled(fuzz: Fuzz) -> None:
    """A pickle of a layout, some of whose fields are others."""
    layout = fuzz.layout()
    for name in fuzz.rng.permutation(list(vars(layout)))[: int(fuzz.rng.integers(1, 3))].tolist():
        value = vars(layout)[name]
        if isinstance(value, Tensor):
            vars(layout)[name] = fuzz.tampered(value.flatten())
        elif isinstance(value, Transpose):
            part = fuzz.choice(["tokens", "offsets", "rows", "divisors"])
            vars(value)[part] = fuzz.tampered(getattr(value, part))
        else:
            vars(layout)[name] = fuzz.choice([None, -1, 0, 5, 2**40, "x", torch.zeros(3), LAYOUTS[0]])
    try:
        layout = copy.deepcopy(layout) if fuzz.rng.random() < 0.3 else pickle.loads(pickle.dumps(layout))
    except (*REFUSED, NotImplementedError) as error:
        assert str(error)
        fuzz.calls += 1
        fuzz.refused += 1
        return
    use(fuzz, layout)


def resized(fuzz: Fuzz) -> None:
    """Tensors changed in place, their storages cut, or exchanged, after the layout was checked."""
    layout = fuzz.layout()
    owner: Any = layout
    names: tuple[str, ...] = ROW_FIELDS
    if layout.transpose is not None and fuzz.rng.random() < 0.4:
        owner, names = layout.transpose, ("tokens", "offsets", "rows", "divisors")
    name = fuzz.choice(names)
    tensor = vars(owner)[name]
    how = fuzz.choice(["exchange", "resize", "storage", "data", "stride"])
    if how == "exchange":
        vars(owner)[name] = fuzz.tampered(tensor)
    elif how == "resize":
        tensor.resize_(max(len(tensor) + int(fuzz.rng.integers(-3, 3)), 0))
    elif how == "storage":
        tensor.untyped_storage().resize_(int(fuzz.rng.integers(0, tensor.nbytes + 1)))
    elif how == "data":
        changed = fuzz.tampered(tensor)
        if changed.dtype == tensor.dtype and not changed.is_meta:
            tensor.data = changed
    elif how == "stride":
        tensor.as_strided_(tensor.shape, (fuzz.choice([0, 1]),))
    weight = torch.ones(cases.VOCABULARY, WIDTH)
    if fuzz.rng.random() < 0.1:
        weight.untyped_storage().resize_(int(fuzz.rng.integers(0, weight.nbytes)))
        fuzz.call(lambda: pk.pool_rows(weight, layout, backend="native"))
        return
    use(fuzz, layout, weight)


def aliased(fuzz: Fuzz) -> None:
    """A layout, a weight and an out that share memory with each other."""
    layout = fuzz.layout()
    memory = np.zeros(1 << 14, np.uint8)
    for name in ROW_FIELDS:
        tensor = vars(layout)[name]
        at = 4 * int(fuzz.rng.integers(0, 2000))
        view = torch.from_numpy(memory[at : at + tensor.nbytes].view(np.int32))
        if fuzz.rng.random() < 0.5:
            view.copy_(tensor)
            vars(layout)[name] = view
    at = 4 * int(fuzz.rng.integers(0, 2000))
    floats = torch.from_numpy(memory[at:].view(np.float32))
    weight = out = None
    if fuzz.rng.random() < 0.5:
        weight = floats[: cases.VOCABULARY * WIDTH].view(cases.VOCABULARY, WIDTH)
    if weight is None or fuzz.rng.random() < 0.5:
        out = floats[: layout.num_rows * WIDTH].view(-1, WIDTH)
    use(fuzz, layout, weight, out)


def misaligned(fuzz: Fuzz) -> None:
    """Memory at odd addresses: copied into catalogues, histories and layouts, refused as weight and out."""

    def odd(array: np.ndarray) -> np.ndarray:
        shift = int(fuzz.rng.integers(0, array.itemsize))
        memory = np.zeros(array.nbytes + array.itemsize, np.uint8)
        view = memory[shift : shift + array.nbytes].view(array.dtype)
        view[:] = array
        return view

    which = fuzz.choice(["layout", "weight", "out", "batch"])
    layout = fuzz.layout()
    if which == "layout":
        fields = {
            name: x if not isinstance(x, Tensor) else torch.from_numpy(odd(x.numpy()))
            for name, x in vars(layout).items()
        }
        copied = pk.PatchLayout(**fields)
        assert copied.lo.data_ptr() % 4 == 0 and torch.equal(copied.lo, layout.lo)
        use(fuzz, copied)
    elif which == "batch":
        batch = fuzz.batch()
        catalog = pk.Catalog(odd(batch.catalog.token_ids), odd(batch.catalog.offsets), odd(batch.catalog.item_ids))
        histories = pk.Histories(
            odd(pk.Histories.coerce(batch.histories).items), odd(pk.Histories.coerce(batch.histories).offsets)
        )
        assert catalog.offsets.flags.aligned and histories.offsets.flags.aligned
        fuzz.call(
            lambda: use(fuzz, pk.build_layout(catalog, histories, batch.policy, batch.arguments()[3], transpose=True))
        )
    else:
        matrix = torch.from_numpy(odd(np.ones(cases.VOCABULARY * WIDTH, np.float32))).view(-1, WIDTH)
        if which == "weight":
            use(fuzz, layout, matrix)
        else:
            use(fuzz, layout, None, matrix[: layout.num_rows])


def rewritten(fuzz: Fuzz) -> None:
    """Catalogues and histories whose arrays are written to, exchanged, or come tampered out of a pickle."""
    batch = fuzz.batch()
    catalog: Any = pickle.loads(pickle.dumps(batch.catalog))
    histories: Any = pk.Histories.coerce(batch.histories)
    histories = pk.Histories(histories.items, histories.offsets)
    owner, name = fuzz.choice(
        [(catalog, "token_ids"), (catalog, "offsets"), (histories, "items"), (histories, "offsets")]
    )
    changed = fuzz.tampered(torch.from_numpy(getattr(owner, name).copy()))
    value = np.zeros(0, np.int32) if changed.is_meta else changed.numpy()
    setattr(owner, name, value)
    if fuzz.rng.random() < 0.4:
        try:
            owner = pickle.loads(pickle.dumps(owner))
        except REFUSED as error:
            assert str(error)
            fuzz.calls += 1
            fuzz.refused += 1
            return
        catalog, histories = (owner, histories) if isinstance(owner, pk.Catalog) else (catalog, owner)
    targets = None if fuzz.rng.random() < 0.5 else batch.targets
    # IndexError: NumPy's own, where it is NumPy that reads
    fuzz.call(
        lambda: use(
            fuzz, pk.build_layout(catalog, histories, batch.policy, batch.arguments()[3], targets, transpose=True)
        ),
        (IndexError,),
    )


def attended(fuzz: Fuzz) -> None:
    """Spans and the ranges that they see, some of them others, attended to forward and backward."""
    query = torch.ones(1, 4, 30, WIDTH, requires_grad=fuzz.rng.random() < 0.5)
    rows = torch.ones(1, 2, 30, WIDTH)
    stored = torch.ones(1, 2, int(fuzz.rng.integers(0, 60)), WIDTH) if fuzz.rng.random() < 0.5 else None
    cu_seqlens = torch.tensor([0, 9, 9, 21, 30], dtype=torch.int32)
    ranges = torch.tensor([21, 25, 9, 9, 0, 4, 4, 9, 30, 30, 0, 3, 10, 21, 0, 9], dtype=torch.int32)
    if fuzz.rng.random() < 0.3:
        cu_seqlens = fuzz.tampered(cu_seqlens)
    if fuzz.rng.random() < 0.7:
        ranges = fuzz.tampered(ranges)
    prefix = ranges.view(4, -1, 2) if ranges.numel() in (8, 16) and ranges.is_contiguous() else ranges

    def attend() -> None:
        out = span_attention(query, rows, rows, cu_seqlens, prefix=prefix, prefix_key=stored, prefix_value=stored)
        if out.requires_grad:
            out.sum().backward()

    fuzz.call(attend)


@pytest.mark.skipif(not pk.backends()["native"].usable, reason=pk.backends()["native"].reason)
@pytest.mark.parametrize("change", [pickled, resized, aliased, misaligned, rewritten, attended])
def test_changed_behind_our_back(change: Callable[[Fuzz], None]) -> None:
    fuzz = Fuzz(SEED)
    while fuzz.calls < CALLS // 6:
        change(fuzz)
    assert 0 < fuzz.refused < fuzz.calls  # it finds both
